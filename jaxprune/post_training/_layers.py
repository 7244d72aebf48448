"""Code that the methods share: checks, the order of the layers, and the tree of masks."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import meshes, patterns, trees
from jaxprune.post_training._inputs import (
    Apply,
    InputStatistics,
    input_statistics,
    not_finite,
)

__all__ = ["NM", "check_amount", "largest", "prune_layers"]

NM = tuple[int, int]
# (a leaf, the statistics of its inputs) -> (the pruned leaf, its mask)
Method = Callable[[Any, InputStatistics], tuple[jax.Array, jax.Array]]


def prune_layers(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    method: Method,
    *,
    statistic: Callable[[jax.Array], jax.Array],
    n_m: NM | None,
    prunable: trees.Prunable,
    stacked: trees.Stacked,
    sequential: bool,
) -> tuple[Any, Any]:
    """Prunes each leaf by the statistic of its inputs; returns parameters and masks."""
    # `input_statistics` raises if `batches` is a single array.
    batches = batches if isinstance(batches, jax.Array | np.ndarray) else list(batches)
    # The plan is only the leaves, their order and their arrangement; the statistic is a dummy.
    plan = input_statistics(
        apply,
        params,
        batches[:1],
        statistic=lambda inputs: jnp.zeros(len(inputs)),
        prunable=prunable,
        stacked=stacked,
    )
    leaves, treedef = trees.leaf_by_path(params), jax.tree.structure(params)
    masks = {path: jnp.asarray(np.ones(jnp.shape(leaf), bool)) for path, leaf in leaves.items()}
    _check_leaves(leaves, plan, n_m)

    def capture(paths: set[str]) -> dict[str, InputStatistics]:
        current = treedef.unflatten(list(leaves.values()))
        return input_statistics(
            apply, current, batches, statistic=statistic, prunable=lambda path, _: path in paths
        )

    rounds = [{path} for path in plan] if sequential else [set(plan)]
    for paths in rounds:
        for path, inputs in _with_idle(capture(paths), statistic).items():
            leaves[path], masks[path] = _prune(method, leaves[path], inputs)
        trees.raise_for(
            not_finite({path: leaves[path] for path in plan if path in paths}),
            "`batches` must give Hessians that can be inverted in float32; raise `damping`, or "
            "pass more calibration data. No inverse was found for:",
        )
    return treedef.unflatten(list(leaves.values())), treedef.unflatten(list(masks.values()))


def _with_idle(
    found: dict[str, InputStatistics], statistic: Callable[[jax.Array], jax.Array]
) -> dict[str, InputStatistics]:
    """Gives matrices that no input has reached the statistic of equal inputs, and warns of them.

    An expert may get no row of the calibration data. Its weights must not go for that: with equal
    and uncorrelated inputs both methods are magnitude pruning without an update.
    """
    idle = {
        path: np.asarray(jnp.all(inputs.value == 0, range(1, inputs.value.ndim)))
        for path, inputs in found.items()
    }
    names = [
        f"{path}[{i}]" if len(flags) > 1 else path
        for path, flags in idle.items()
        for i in np.flatnonzero(flags)
    ]
    if not names:
        return found
    rule = (
        "`batches` has no input that is not 0 for these kernels, which are pruned by magnitude; "
        "give more calibration data if they matter:"
    )
    warnings.warn("\n  ".join([rule, *names]), stacklevel=4)
    new = {}
    for path, inputs in found.items():
        (equal,) = statistic(jnp.eye(inputs.arrangement.end[1])[None])
        flags = idle[path].reshape(-1, *[1] * equal.ndim)
        new[path] = inputs._replace(value=jnp.where(flags, equal, inputs.value))
    return new


def _prune(method: Method, leaf: Any, inputs: InputStatistics) -> tuple[jax.Array, jax.Array]:
    """Applies a method to a leaf, however it is split over devices."""

    def prune(leaf: Any, value: Any) -> tuple[jax.Array, jax.Array]:
        return method(leaf, inputs._replace(value=value))

    with meshes.entered(leaf):
        return meshes.automatically(prune, jnp.asarray(leaf), inputs.value, like=leaf)


def largest(scores: jax.Array, keep: int | jax.Array) -> jax.Array:
    """Returns the mask of the `keep` largest entries of a vector; ties keep the lower index."""
    # A sort, because each shape is used only once and it compiles ten times faster than
    # `selection`.
    order = jnp.argsort(scores, stable=True, descending=True)
    return jnp.zeros(scores.shape, bool).at[order].set(jnp.arange(scores.size) < keep)


def check_amount(sparsity: float | None, n_m: NM | None) -> None:
    """Raises unless exactly one of the two is given and is valid."""
    if (sparsity is None) == (n_m is None):
        raise ValueError(
            f"exactly one of `sparsity` and `n_m` must be given, but they are {sparsity!r} and "
            f"{n_m!r}; to keep n of m is the sparsity 1 - n / m."
        )
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"`sparsity` must lie in [0, 1), but is {sparsity!r}.")
    if n_m is not None:
        if not isinstance(n_m, tuple) or len(n_m) != 2:
            raise ValueError(f"`n_m` must be a tuple (n, m), but is {n_m!r}.")
        patterns.n_m(*n_m, axis=-2)  # raises if the numbers are out of range


def _check_leaves(leaves: dict[str, Any], plan: dict[str, InputStatistics], n_m: NM | None) -> None:
    """Raises for weights that are not finite and for features whose number m does not divide."""
    trees.raise_for(
        not_finite({path: leaves[path] for path in plan}),
        "`params` must be finite, but these leaves are not finite:",
    )
    features = {path: inputs.arrangement.end[1] for path, inputs in plan.items()}
    if n_m is not None:
        trees.raise_for(
            [f"{path}: {size} features" for path, size in features.items() if size % n_m[1]],
            f"`n_m` needs numbers of input features that are multiples of {n_m[1]}; exclude these "
            "leaves with `prunable`:",
        )
