"""Code that the methods share: checks, the order of the layers, and the tree of masks."""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import layouts, meshes, patterns, trees
from jaxprune.post_training._inputs import (
    Apply,
    InputStatistics,
    capture_of,
    input_statistics,
    not_finite,
    scans_of,
    sum_over,
)
from jaxprune.post_training._matrices import from_matrices, to_matrices

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
    """Prunes each leaf by the statistic of its inputs; returns parameters and masks.

    With `sequential`, a leaf that a scan runs over is pruned copy by copy, in the order of the
    scan, and only the statistic of one copy of one leaf is in memory.
    """
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

    def flags_of(paths: Iterable[str]) -> tuple[bool, ...]:
        return tuple(path in paths for path in leaves)

    @functools.cache  # all copies of a leaf share one program
    def capture(*paths: str) -> Callable[..., dict[str, InputStatistics]]:
        return capture_of(apply, flags_of(paths), statistic)

    rounds: list[tuple[list[str], int | None]] = [(list(plan), None)]
    if sequential:
        rounds = _one_by_one(plan, scans_of(apply, params, batches[0], flags_of(plan)))
    for paths, copy in rounds:
        step = None if copy is None else np.int32(copy)  # of no mesh, and no constant
        current = treedef.unflatten(list(leaves.values()))
        found = sum_over(batches, capture(*paths), current, step)
        for path, inputs in _with_idle(found, statistic, copy or 0).items():
            old = leaves[path], masks[path]
            leaves[path], masks[path] = _prune(method, *old, inputs, step)
        trees.raise_for(
            not_finite({path: leaves[path] for path in paths}),
            "`batches` must give Hessians that can be inverted in float32; raise `damping`, or "
            "pass more calibration data. No inverse was found for:",
        )
    return treedef.unflatten(list(leaves.values())), treedef.unflatten(list(masks.values()))


def _one_by_one(
    paths: Iterable[str], scans: dict[str, layouts.Scan | None]
) -> list[tuple[list[str], int | None]]:
    """Returns the leaves in the order of use, those of a scan once for each of its steps."""
    rounds: list[tuple[list[str], int | None]] = []
    by_scan: dict[Any, list[str]] = {}
    for path in paths:
        by_scan.setdefault(scans.get(path) or path, []).append(path)
    for scan, members in by_scan.items():
        steps: Iterable[int | None] = [None]
        if isinstance(scan, layouts.Scan):
            steps = range(scan.length)[:: -1 if scan.reverse else 1]
        rounds += [([path], step) for step in steps for path in members]
    return rounds


def _with_idle(
    found: dict[str, InputStatistics], statistic: Callable[[jax.Array], jax.Array], copy: int
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
        f"{path}[{copy * len(flags) + i}]" if found[path].arrangement.end[0] > 1 else path
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


def _prune(
    method: Method, leaf: Any, mask: Any, inputs: InputStatistics, step: np.int32 | None
) -> tuple[jax.Array, jax.Array]:
    """Applies a method to a leaf, or to one copy in it, however it is split over devices."""

    def prune(leaf: Any, mask: Any, value: Any) -> tuple[jax.Array, jax.Array]:
        own = inputs._replace(value=value)
        if step is None:
            return method(leaf, own)
        start = np.int32(step * len(value))
        one = own._replace(arrangement=inputs.arrangement.part(len(value)))
        kernel = _copy(leaf, inputs.arrangement, start, len(value))
        pruned, kept = method(kernel, one)
        arrangement = inputs.arrangement
        return _put(leaf, pruned, arrangement, start), _put(mask, kept, arrangement, start)

    with meshes.entered(leaf):
        leaf = jnp.asarray(leaf)
        return meshes.automatically(prune, leaf, mask, inputs.value, like=leaf)


@functools.partial(jax.jit, static_argnames="count")
def _copy(leaf: Any, arrangement: layouts.Arrangement, start: np.int32, count: int) -> jax.Array:
    """Returns some matrices of a leaf."""
    return jax.lax.dynamic_slice_in_dim(to_matrices(leaf, arrangement), start, count)


@jax.jit
def _put(leaf: Any, new: Any, arrangement: layouts.Arrangement, start: np.int32) -> jax.Array:
    """Replaces some matrices of a leaf."""
    matrices = to_matrices(leaf, arrangement)
    matrices = jax.lax.dynamic_update_slice_in_dim(matrices, new, start, 0)
    return from_matrices(matrices, arrangement)


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
