"""Measures the running statistics of norm layers again, for parameters that have changed."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees

PyTree = Any


def measure_statistics(
    train: Callable[..., tuple[Any, PyTree]], variables: PyTree, batches: Iterable[Any]
) -> PyTree:
    """Replaces running statistics by their means over batches, as `BatchNorm` keeps them.

    A network that has lost weights or channels sends other values through its norm layers, so the
    means and variances that it keeps for evaluation are wrong. Training mode computes
    `new = decay * old + (1 - decay) * of the batch`. The decay follows from the new values for the
    old values 0 and 1, and with it each statistic becomes the mean over batches of its value `of
    the batch`. What is not updated in this way, such as a counter, a random key or a vector of
    spectral norm, stays as it is.

    Args:
        train: `(variables, batch) -> (output, updates)` in training mode, where `updates` has the
            new values of some entries of `variables`; such as `structure.from_nnx(model).train`, or
            `lambda v, x: model.apply(v, x, train=True, mutable="batch_stats")` in Linen.
        variables: dict of trees, such as `{"params": ..., "batch_stats": ...}`.
        batches: inputs of `train`; at least one. Ten batches of training data are usually enough.

    Returns:
        `variables` with new statistics.

    Raises:
        ValueError: if there is no batch, or training updates no running statistic.

    Example:
        >>> def train(variables, x):
        ...     old = variables["stats"]["mean"]
        ...     return x, {"stats": {"mean": 0.99 * old + 0.01 * x.mean()}}
        >>> variables = {"stats": {"mean": jnp.array(0.0)}}
        >>> batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]
        >>> print(f"{measure_statistics(train, variables, batches)['stats']['mean']:.3f}")
        4.000

    References:
        Wu, Johnson. Rethinking "Batch" in BatchNorm. arXiv:2105.07576, section 3.
    """

    old = _statistics(variables)

    @jax.jit
    def updates(variables: PyTree, batch: Any, own: dict[str, Any]) -> dict[str, Any]:
        new = trees.leaf_by_path(train(_replaced(variables, own), batch)[1])
        return {path: new[path] for path in own if path in new}

    def updates_from(value: float, paths: Collection[str], batch: Any) -> dict[str, Any]:
        own = {path: jnp.full_like(x, value) if path in paths else x for path, x in old.items()}
        return updates(variables, batch, own)

    def decays_of(paths: Collection[str], batch: Any) -> dict[str, Any]:
        zero, one = (updates_from(value, paths, batch) for value in (0.0, 1.0))
        found = {path: _decay(zero[path], one[path]) for path in zero if path in paths}
        return {path: decay for path, decay in found.items() if decay is not None}

    sums: dict[str, Any] = {}
    decays: dict[str, Any] = {}
    updated: list[str] = []
    count = 0
    for batch in batches:
        if not count:
            updated = sorted(updates_from(0.0, (), batch))
            decays = decays_of(updated, batch)
            for path in [path for path in updated if path not in decays]:
                # With all others as they are: the output may depend on them.
                decays |= decays_of([path], batch)
        new = updates_from(0.0, decays, batch)
        own = {path: new[path] / (1 - decay) for path, decay in decays.items()}
        sums = {path: sums[path] + x for path, x in own.items()} if count else own
        count += 1
    if not count:
        raise ValueError("`batches` must hold at least one batch; got none")
    if not decays:
        raise ValueError(
            "`train` updates no running statistics; it must return (output, updates), where the "
            f"updates hold new values of some of the variables; it updates {updated}"
        )
    return _replaced(variables, {path: own / count for path, own in sums.items()})


def _decay(zero: Any, one: Any) -> float | None:
    """Returns the decay that follows from the new values for the old values 0 and 1, or None."""
    zero, one = np.asarray(zero, np.float64).ravel(), np.asarray(one, np.float64).ravel()
    slopes, largest = one - zero, np.abs(zero).max(initial=0)
    # A layer has one decay. The slope is most exact where little is subtracted.
    decay = float(slopes[np.abs(zero).argmin()]) if slopes.size else np.nan
    is_one = np.abs(slopes - decay).max(initial=0) <= 1e-5 * (1 + largest)  # not if it is NaN
    return decay if is_one and -1e-6 < decay < 1 - 1e-6 else None


def _statistics(variables: PyTree) -> dict[str, Any]:
    """Returns what may be a running statistic, by path: floating-point leaves but parameters."""
    rest = {name: own for name, own in variables.items() if name != "params"}
    leaves = trees.leaf_by_path(rest)
    return {
        path: leaf
        for path, leaf in leaves.items()
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }


def _replaced(variables: PyTree, new: dict[str, Any]) -> PyTree:
    """Returns the variables with other values at some paths."""

    def replace(path: Any, leaf: Any) -> Any:
        own = new.get(trees.path_string(path))
        return leaf if own is None else own.astype(jnp.result_type(leaf))

    return jax.tree.map_with_path(replace, variables)
