"""Sorts the channels of groups by what they are worth, jointly in all arrays that they couple."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import processes, structure, trees

_TOLERANCE = 1e-3  # of outputs, relative to the largest; sums in a different order differ by less


def consumer_norms(groups: structure.Groups, variables: Any) -> dict[str, np.ndarray]:
    """Scores each channel by the L1 norm of the weights that read it.

    `score_c = sum |W[..., c, ...]|` over the kernels that have the channel as an input. Groups that
    nothing but vectors read are scored by the weights that make the channel.

    Args:
        groups: from `structure.find_groups`.
        variables: arrays.

    Returns:
        Name of a group -> float64 [channels].

    References:
        Cai et al. Once-for-All, section 3.3. arXiv:1908.09791.

    Example:
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w = {"in": jnp.ones((3, 4)), "out": jnp.array([[1.0], [-3.0], [0.5], [2.0]])}
        >>> groups = structure.find_groups(mlp, w, jnp.ones((1, 3)))
        >>> consumer_norms(groups, w)["in:1"].tolist()
        [1.0, 3.0, 0.5, 2.0]
    """
    leaves, parameters = trees.leaf_by_path(variables), groups.model.parameters
    scores = {}
    for name, group in groups.items():
        own = [m for m in group.members if m.path in parameters and leaves[m.path].ndim > 1]
        readers = [member for member in own if not member.produces] or own
        scores[name] = np.zeros(group.size)
        for member in readers or [m for m in group.members if m.path in parameters]:
            leaf = jnp.asarray(leaves[member.path])
            axes = tuple(axis for axis in range(leaf.ndim) if axis != member.dimension)
            sums = processes.on_host(jnp.sum(jnp.abs(leaf), axes)).astype(np.float64)
            counted = member.channels >= 0
            np.add.at(scores[name], member.channels[counted], sums[counted])
    return processes.from_first(scores)


def sort_channels(
    groups: structure.Groups,
    variables: Any,
    scores: Mapping[str, Any],
    *,
    buckets: Mapping[str, Sequence[int]] | None = None,
    apply: Callable[[Any], Any] | None = None,
) -> Any:
    """Permutes channels so that the first ones have the largest scores.

    All arrays that a group couples are permuted together, so the function remains the same, to
    rounding, and the best n channels are a prefix for every n. Equal scores keep their order.

    Args:
        groups: from `structure.find_groups`.
        variables: tree of arrays like that of `find_groups`; it may hold further leaves.
        scores: name of a group -> float [channels], larger is more important. The groups to sort.
        buckets: name of a group -> numbers of channels of narrower networks that are trained
            already. Channels are only sorted between two of these, so each of them keeps the same
            set of channels.
        apply: `variables -> outputs`. If given, the outputs before and after are compared. Some
            functions treat channels by their position, such as rotary embeddings; their channels
            can be removed but not permuted.

    Returns:
        The tree with permuted arrays.

    Raises:
        ValueError: if a name is not that of a group, scores do not fit it, its channels have
            different sizes in an array, or the outputs change; it lists all of them.

    References:
        Cai et al. Once-for-All, section 3.3. arXiv:1908.09791.

    Example:
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w = {"in": jnp.arange(4.0)[None], "out": jnp.array([[1.0], [-3.0], [0.5], [2.0]])}
        >>> groups = structure.find_groups(mlp, w, jnp.ones((1, 1)))
        >>> sort_channels(groups, w, consumer_norms(groups, w))["in"].tolist()
        [[1.0, 3.0, 0.0, 2.0]]
    """
    buckets = {} if buckets is None else buckets
    _check(groups, scores, buckets)
    permuted = _permuted(groups, variables, _orders(scores, buckets))
    if apply is not None and (gap := _gap(apply, variables, permuted)) > _TOLERANCE:
        alone = {
            name: _permuted(groups, variables, _orders({name: own}, buckets))
            for name, own in scores.items()
        }
        lines = [f"{name}: by {_gap(apply, variables, own):.2g}" for name, own in alone.items()]
        trees.raise_for(
            lines,
            f"`scores` must name groups that can be permuted, but sorting changes outputs by "
            f"{gap:.2g} of the largest. Leave out the groups whose channels the function treats by "
            "their position, such as those of rotary embeddings. Each group alone changes them:",
        )
    return permuted


def _check(
    groups: structure.Groups, scores: Mapping[str, Any], buckets: Mapping[str, Sequence[int]]
) -> None:
    """Raises one error that lists all groups that cannot be sorted like this."""
    problems = []
    for name in [*scores, *(name for name in buckets if name not in scores)]:
        if name not in groups:
            problems.append(f"{name}: not a group; groups are {', '.join(groups) or 'none'}")
            continue
        size = groups[name].size
        if np.shape(scores.get(name, np.zeros(size))) != (size,):
            problems.append(f"{name}: shape {np.shape(scores[name])}, not ({size},)")
        for member in groups[name].members:
            counts = np.bincount(member.channels[member.channels >= 0], minlength=size)
            if len(set(counts.tolist())) > 1:
                problems.append(f"{name}: channels have different sizes in {member.path}")
    trees.raise_for(problems, "`scores` and `buckets` must fit groups:")


def _orders(
    scores: Mapping[str, Any], buckets: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """Returns for each group the old channel at each new position."""
    orders = {}
    for name, own in scores.items():
        edges = np.asarray(sorted(buckets.get(name, ())), int)
        bucket = np.searchsorted(edges, np.arange(len(own)), side="right")
        orders[name] = np.lexsort((-np.asarray(own, np.float64), bucket))
    return orders


def _permuted(groups: structure.Groups, variables: Any, orders: Mapping[str, np.ndarray]) -> Any:
    """Permutes all members of the groups."""
    leaves = dict(trees.leaf_by_path(variables))
    for name, order in orders.items():
        for member in groups[name].members:
            source = _source(member.channels, order)
            leaves[member.path] = jnp.take(leaves[member.path], source, axis=member.dimension)
    return jax.tree.map_with_path(lambda path, _: leaves[trees.path_string(path)], variables)


def _source(channels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns the old index at each new index of a dimension; a channel may have several."""
    source = np.arange(len(channels))
    counted = np.flatnonzero(channels >= 0)
    by_channel = counted[np.argsort(channels[counted], kind="stable")].reshape(len(order), -1)
    source[by_channel] = by_channel[order]
    return source


def _gap(apply: Callable[[Any], Any], before: Any, after: Any) -> float:
    """Returns the largest difference of outputs, relative to their largest entry."""

    @jax.jit
    def gap(old: Any, new: Any) -> Any:
        pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        tiny = jnp.finfo(jnp.float32).tiny
        gaps = [jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), tiny) for a, b in pairs]
        return jnp.max(jnp.stack(gaps))

    found = float(processes.on_host(gap(apply(before), apply(after))))
    return found if np.isfinite(found) else np.inf
