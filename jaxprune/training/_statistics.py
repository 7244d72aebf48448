"""Measures the running statistics of norm layers again, for parameters that have changed."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees

PyTree = Any


def measure_statistics(
    train: Callable[..., tuple[Any, PyTree]],
    variables: PyTree,
    batches: Iterable[Any],
    *,
    mean_of: Callable[[str], str | None] | None = None,
    weight: Callable[[Any], float] | None = None,
    decays: Mapping[str, float] | None = None,
) -> PyTree:
    """Replaces running statistics by their means over batches, as `BatchNorm` keeps them.

    A network that has lost weights or channels sends other values through its norm layers, so the
    means and variances that it keeps for evaluation are wrong. Training mode computes
    `new = decay * old + (1 - decay) * of the batch`. The decay follows from the new values for the
    old values 0 and 1, and with it each statistic becomes the mean over batches of its value `of
    the batch`. What is not updated in this way, such as a counter, a random key or a vector of
    spectral norm, stays as it is.

    With `mean_of`, the batches count as one large batch. From the n_b examples of each, its means
    m_b and its variances v_b, with w_b = n_b / sum(n), follow the mean m = sum(w_b * m_b), and the
    variance by the law of total variance:

        v = sum(w_b * v_b) + sum(w_b * (m_b - m)^2)

    Args:
        train: `(variables, batch) -> (output, updates)` in training mode, where `updates` has the
            new values of some entries of `variables`; such as `structure.from_nnx(model).train`, or
            `lambda v, x: model.apply(v, x, train=True, mutable="batch_stats")` in Linen. Calls with
            the same function object compile once; a module that holds arrays compiles each time.
        variables: dict of trees, such as `{"params": ..., "batch_stats": ...}`.
        batches: inputs of `train`; at least one. Ten batches of training data are usually enough.
        mean_of: function from the path of a statistic to the path of its mean if it is a variance,
            else None, such as `mean_beside`. Default: variances are averaged like all others, and
            all batches have the same weight.
        weight: with `mean_of`, function from a batch to its number of examples. Default: the length
            of the first axis, which all arrays of the batch must share.
        decays: from `find_decays`, to save three calls of `train`.

    Returns:
        `variables` with new statistics.

    Raises:
        ValueError: if there is no batch, training updates no running statistic, `mean_of` names a
            mean that is no statistic, or the size of a batch is not clear.

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
    old, program = _statistics(variables), _program_of(train)
    means: dict[str, str] = {}
    averages: dict[str, Any] = {}
    total = 0.0
    for batch in batches:
        if decays is None:
            decays = _decays(program, variables, batch)
        if not total:
            means = _means(decays, mean_of)
        zeros = {path: jnp.zeros_like(x) if path in decays else x for path, x in old.items()}
        new = program(variables, batch, zeros)
        own = {path: new[path] / (1 - decay) for path, decay in decays.items()}
        size = 1.0 if mean_of is None else (weight or _size)(batch)
        total += size
        part = size / total  # 1 for the first batch
        averages = averages or {path: jnp.zeros_like(x) for path, x in own.items()}
        moved = {path: x - averages[path] for path, x in own.items()}
        averages = {path: averages[path] + part * x for path, x in moved.items()}
        for path, mean in means.items():
            averages[path] = averages[path] + part * (1 - part) * moved[mean] ** 2
    if not total:
        raise ValueError("`batches` must hold at least one batch; got none")
    return _replaced(variables, averages)


def find_decays(
    train: Callable[..., tuple[Any, PyTree]], variables: PyTree, batch: Any
) -> dict[str, float]:
    """Finds the running statistics that training updates, and the decay of each.

    Args:
        train: see `measure_statistics`.
        variables: dict of trees.
        batch: input of `train`.

    Returns:
        Path of a statistic -> its decay.

    Raises:
        ValueError: if training updates no running statistic.

    Example:
        >>> def train(variables, x):
        ...     return x, {"stats": {"mean": 0.75 * variables["stats"]["mean"] + 0.25 * x.mean()}}
        >>> find_decays(train, {"stats": {"mean": jnp.array(0.0)}}, jnp.ones(2))
        {'stats/mean': 0.75}
    """
    return _decays(_program_of(train), variables, batch)


def _decays(
    program: Callable[..., dict[str, Any]], variables: PyTree, batch: Any
) -> dict[str, float]:
    """Finds decays with a compiled program."""
    old = _statistics(variables)

    def updates_from(value: float, paths: Collection[str]) -> dict[str, Any]:
        own = {path: jnp.full_like(x, value) if path in paths else x for path, x in old.items()}
        return program(variables, batch, own)

    def decays_of(paths: Collection[str]) -> dict[str, float]:
        zero, one = (updates_from(value, paths) for value in (0.0, 1.0))
        found = {path: _decay(zero[path], one[path]) for path in zero if path in paths}
        return {path: decay for path, decay in found.items() if decay is not None}

    updated = sorted(updates_from(0.0, ()))
    decays = decays_of(updated)
    for path in [path for path in updated if path not in decays]:
        # With all others as they are: the output may depend on them.
        decays |= decays_of([path])
    if not decays:
        raise ValueError(
            "`train` updates no running statistics; it must return (output, updates), where the "
            f"updates hold new values of some of the variables; it updates {updated}. A network "
            "without batch normalization has no statistics to measure"
        )
    return decays


def mean_beside(path: str) -> str | None:
    """Names the mean that belongs to a variance, as Flax names them: `var` beside `mean`.

    Args:
        path: of a running statistic.

    Returns:
        The path of its mean, or None if it is no variance.

    Example:
        >>> mean_beside("batch_stats/norm/var"), mean_beside("batch_stats/norm/mean")
        ('batch_stats/norm/mean', None)
    """
    parent, slash, name = path.rpartition("/")
    return f"{parent}{slash}mean" if name == "var" else None


def _program(train: Callable[..., tuple[Any, PyTree]]) -> Callable[..., dict[str, Any]]:
    """Compiles `(variables, batch, own) -> statistics after a batch where they were own before`."""

    def updates(variables: PyTree, batch: Any, own: dict[str, Any]) -> dict[str, Any]:
        new = trees.leaf_by_path(train(_replaced(variables, own), batch)[1])
        return {path: new[path] for path in own if path in new}

    return jax.jit(updates)


# A few, as programs hold their functions and what these refer to.
_remembered = functools.lru_cache(maxsize=8)(_program)


def _program_of(train: Callable[..., tuple[Any, PyTree]]) -> Callable[..., dict[str, Any]]:
    """Returns the program of a function, the same one for the same function where it can."""
    try:
        hash(train)
    except TypeError:  # a module that holds arrays, such as those of Equinox
        return _program(train)
    return _remembered(train)


def _means(
    decays: Mapping[str, float], mean_of: Callable[[str], str | None] | None
) -> dict[str, str]:
    """Returns variance -> mean, by path."""
    found = {} if mean_of is None else {path: mean_of(path) for path in decays}
    means = {path: mean for path, mean in found.items() if mean is not None}
    bad = [f"{path}: {mean!r}" for path, mean in means.items() if mean not in decays]
    trees.raise_for(bad, "`mean_of` must name a statistic that training updates, but does not for:")
    return means


def _size(batch: Any) -> float:
    """Returns the number of examples in a batch."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else -1 for shape in shapes}
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError(
            "`batches` must hold arrays whose first axis is the batch, but one has the shapes "
            f"{shapes}; give `weight`, a function from a batch to its number of examples"
        )
    return float(sizes.pop())


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
