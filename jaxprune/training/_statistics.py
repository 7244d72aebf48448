"""Measures the running statistics of norm layers again, for parameters that have changed."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import trees

PyTree = Any


def measure_statistics(
    train: Callable[..., tuple[Any, PyTree]], variables: PyTree, batches: Iterable[Any]
) -> PyTree:
    """Replaces running statistics by their means over batches, as `BatchNorm` keeps them.

    A network that has lost weights or channels sends other values through its norm layers, so the
    means and variances that it keeps for evaluation are wrong. Training mode computes
    `new = decay * old + (1 - decay) * of the batch`; here the decay is found by two calls with
    known old values, and each statistic becomes the mean over batches of its value `of the batch`.
    What is not updated in this way, such as a counter or a random key, stays as it is.

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

    def updated(variables: PyTree, batch: Any, value: float | None) -> dict[str, Any]:
        if value is not None:
            variables = {
                name: own if name == "params" else jax.tree.map(fill(value), own)
                for name, own in variables.items()
            }
        return trees.leaf_by_path(train(variables, batch)[1])

    def fill(value: float) -> Callable[[Any], Any]:
        return lambda leaf: jnp.full_like(leaf, value) if _is_statistic(leaf) else leaf

    @jax.jit
    def of_batch(variables: PyTree, batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        zero, one = (updated(variables, batch, value) for value in (0.0, 1.0))
        own = {path: leaf for path, leaf in zero.items() if _is_statistic(leaf)}
        # A layer has one decay; the difference is most exact where little is subtracted.
        decays = {}
        for path, leaf in own.items():
            place = jnp.argmin(jnp.abs(leaf))
            decays[path] = (one[path] - leaf).ravel()[place]
        return {path: leaf / (1 - decays[path]) for path, leaf in own.items()}, decays

    sums: dict[str, Any] = {}
    decays: dict[str, Any] = {}
    count = 0
    for batch in batches:
        found, decays = of_batch(variables, batch)
        sums = found if not count else {path: sums[path] + own for path, own in found.items()}
        count += 1
    if not count:
        raise ValueError("`batches` must hold at least one batch; got none")
    known = {path for path, decay in jax.device_get(decays).items() if 0 <= decay < 1 - 1e-6}
    if not known:
        raise ValueError(
            "`train` updates no running statistics; it must return (output, updates), where the "
            f"updates hold new values of some of the variables; it updates {sorted(sums)}"
        )

    def replace(path: Any, leaf: Any) -> Any:
        name = trees.path_string(path)
        return (sums[name] / count).astype(leaf.dtype) if name in known else leaf

    return jax.tree.map_with_path(replace, variables)


def _is_statistic(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
