"""Which channels matter: scores of channels, and how many each group keeps."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune import trees
from jaxprune.structure._groups import Groups
from jaxprune.structure._plans import Plan

Scores = Mapping[str, np.ndarray]


def filter_norms(groups: Groups, variables: Any, order: float = 1) -> dict[str, np.ndarray]:
    """The norm of each channel's filters, summed over all layers that make the channel.

    Args:
        groups: from `find_groups`.
        variables: dense.
        order: 1, 2 or `numpy.inf`.

    Returns:
        Name of a group -> float64 [channels].

    References:
        Li et al., Pruning filters for efficient ConvNets, arXiv:1608.08710.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> w = {"in": jnp.array([[1.0, -2.0], [0.0, 3.0]]), "out": jnp.ones((2, 2))}
        >>> groups = find_groups(lambda w, x: (x @ w["in"]) @ w["out"], w, jnp.ones((1, 2)))
        >>> filter_norms(groups, w)["in:1"].tolist()
        [1.0, 5.0]
    """

    def norm(rows: np.ndarray) -> np.ndarray:
        return np.linalg.norm(rows, ord=order, axis=1)

    return _summed(groups, variables, norm, _is_filter)


def norm_scales(groups: Groups, variables: Any) -> dict[str, np.ndarray]:
    """The size of the norm layers' scales, summed over the norms of each channel.

    Args:
        groups: from `find_groups`.
        variables: dense.

    Returns:
        Name of a group -> float64 [channels]; 0 for a group without a norm layer.

    References:
        Liu et al., Learning efficient convolutional networks through network slimming,
        arXiv:1708.06519.

    Example:
        >>> norm_scales(Groups(None, [], [], {}), {})
        {}
    """
    return _summed(groups, variables, lambda rows: np.abs(rows).sum(1), _is_scale)


def taylor(groups: Groups, variables: Any, gradients: Any) -> dict[str, np.ndarray]:
    """What the loss would change by, to first order, if a channel were 0: `(sum of w g) ** 2`.

    Taken at the norm layers behind a channel, its gate, or where it has none, at its filters.

    Args:
        groups: from `find_groups`.
        variables: dense.
        gradients: of the loss, a tree like `variables`; an average over batches is better.

    Returns:
        Name of a group -> float64 [channels].

    References:
        Molchanov et al., Importance estimation for neural network pruning, arXiv:1906.10771.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> w = {"in": jnp.array([[1.0, -2.0], [0.0, 3.0]]), "out": jnp.ones((2, 2))}
        >>> groups = find_groups(lambda w, x: (x @ w["in"]) @ w["out"], w, jnp.ones((1, 2)))
        >>> taylor(groups, w, w)["in:1"].tolist()
        [1.0, 169.0]
    """
    trees.check_same_structure("gradients", gradients, variables)

    def product(weight: Any, gradient: Any) -> np.ndarray:
        return np.asarray(weight, float) * np.asarray(gradient, float)

    products = jax.tree.map(product, variables, gradients)
    gates = _summed(groups, products, lambda rows: rows.sum(1), _is_gate)
    filters = _summed(groups, products, lambda rows: rows.sum(1), _is_filter)
    has_gate = {
        name: any(_is_gate(groups, member) for member in group.members)
        for name, group in groups.items()
    }
    return {name: (gates if has_gate[name] else filters)[name] ** 2 for name in groups}


def fpgm(groups: Groups, variables: Any) -> dict[str, np.ndarray]:
    """How far a filter is from all others of its layer; one near the middle can be replaced.

    Args:
        groups: from `find_groups`.
        variables: dense.

    Returns:
        Name of a group -> float64 [channels]: sums of Euclidean distances.

    References:
        He et al., Filter pruning via geometric median, arXiv:1811.00250.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> w = {"in": jnp.array([[0.0, 1.0, 3.0]]), "out": jnp.ones((3, 2))}
        >>> groups = find_groups(lambda w, x: (x @ w["in"]) @ w["out"], w, jnp.ones((1, 1)))
        >>> fpgm(groups, w)["in:1"].tolist()
        [4.0, 3.0, 5.0]
    """

    def distances(rows: np.ndarray) -> np.ndarray:
        squares = (rows**2).sum(1)
        between = squares[:, None] + squares[None] - 2 * rows @ rows.T
        return np.sqrt(between.clip(0)).sum(1)

    return _summed(groups, variables, distances, _is_filter)


def normalized(scores: Scores) -> dict[str, np.ndarray]:
    """Scores over the mean of their group, so that groups can be compared.

    Args:
        scores: name of a group -> [channels].

    Returns:
        The same; a group of zeros stays zeros.

    Example:
        >>> normalized({"a": np.array([1.0, 3.0])})["a"].tolist()
        [0.5, 1.5]
    """
    return {name: own / (np.abs(own).mean() or 1.0) for name, own in scores.items()}


def keep_uniform(
    groups: Groups, scores: Scores, density: float, *, floor: float = 0.0
) -> dict[str, np.ndarray]:
    """Keeps the same fraction of each group.

    Args:
        groups: from `find_groups`.
        scores: of the groups that are pruned; the largest stay, ties the lower index.
        density: fraction of the channels that stay, in (0, 1].
        floor: fraction that stays at least; every group keeps one channel.

    Returns:
        Name of a group -> bools, for `Groups.plan`.

    Raises:
        ValueError: a value is out of range, or scores do not fit the groups.

    Example:
        >>> from jaxprune.structure import Group
        >>> groups = Groups(None, [Group("a", 4, (), ())], [], {})
        >>> keep_uniform(groups, {"a": np.array([1.0, 4.0, 2.0, 3.0])}, 0.5)["a"].tolist()
        [False, True, False, True]
    """
    _check(groups, scores, density, floor)
    counts = {name: round(max(density, floor) * groups[name].size) for name in scores}
    return {name: _largest(own, max(1, counts[name])) for name, own in scores.items()}


def keep_global(
    groups: Groups, scores: Scores, density: float, *, floor: float = 0.0
) -> dict[str, np.ndarray]:
    """Keeps the highest scores of all groups together.

    Args:
        groups: from `find_groups`.
        scores: of the groups that are pruned, comparable between them, see `normalized`.
        density: fraction of all their channels that stays, in (0, 1].
        floor: fraction that each group keeps at least; every group keeps one channel.

    Returns:
        Name of a group -> bools, for `Groups.plan`.

    Raises:
        ValueError: as `keep_uniform`.

    Example:
        >>> from jaxprune.structure import Group
        >>> groups = Groups(None, [Group("a", 2, (), ()), Group("b", 2, (), ())], [], {})
        >>> scores = {"a": np.array([4.0, 3.0]), "b": np.array([2.0, 1.0])}
        >>> {name: own.tolist() for name, own in keep_global(groups, scores, 0.75).items()}
        {'a': [True, True], 'b': [True, False]}
    """
    _check(groups, scores, density, floor)
    total = sum(map(len, scores.values()))
    return _keep(groups, scores, round(density * total), floor)


def keep_within(
    groups: Groups,
    scores: Scores,
    limit: float,
    cost: Callable[[Plan], float],
    *,
    floor: float = 0.0,
    multiple: int = 1,
) -> dict[str, np.ndarray]:
    """Keeps as much of one global ranking as a limit of parameters, MACs or bytes allows.

    Args:
        groups: from `find_groups`.
        scores: see `keep_global`.
        limit: largest cost.
        cost: of a plan, such as `count_parameters`; must not fall when more is kept.
        floor: see `keep_global`.
        multiple: of the widths, as in `Groups.plan`.

    Returns:
        Name of a group -> bools, for `Groups.plan`.

    Raises:
        ValueError: as `keep_uniform`, or even the floors cost more than the limit.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import count_parameters, find_groups
        >>> w = {"in": jnp.arange(16.0).reshape(2, 8), "out": jnp.ones((8, 2))}
        >>> groups = find_groups(lambda w, x: (x @ w["in"]) @ w["out"], w, jnp.ones((1, 2)))
        >>> keep = keep_within(groups, filter_norms(groups, w), 13, count_parameters)
        >>> keep["in:1"].tolist()
        [False, False, False, False, False, True, True, True]
    """
    _check(groups, scores, 1.0, floor)

    def costs(count: int) -> float:
        return cost(groups.plan(_keep(groups, scores, count, floor), multiple=multiple))

    low, high = 0, sum(map(len, scores.values()))  # `low` fits, or nothing does
    if costs(low) > limit:
        raise ValueError(
            f"`limit` {limit:g} is below {costs(low):g}, the cost of what the floors keep; raise "
            "it or lower `floor`."
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if costs(middle) <= limit else (low, middle - 1)
    return _keep(groups, scores, low, floor)


def count_parameters(plan: Plan) -> int:
    """How many entries the parameters have after compaction.

    Args:
        plan: from `Groups.plan`.

    Returns:
        An exact count.

    Example:
        >>> from jaxprune.structure import Model
        >>> model = Model({"w": (2, 3)}, frozenset({"w"}))
        >>> count_parameters(Plan(model, {"w": [np.ones(2, bool), np.arange(3) < 2]}))
        4
    """
    return sum(int(np.prod(plan.shape(path))) for path in plan.model.parameters)


def _keep(groups: Groups, scores: Scores, count: int, floor: float) -> dict[str, np.ndarray]:
    """The floors, and then the best of all that is left."""
    kept = {
        name: _largest(own, max(1, round(floor * groups[name].size)))
        for name, own in scores.items()
    }
    flat = np.concatenate(list(scores.values()))
    chosen = np.concatenate(list(kept.values()))
    order = np.argsort(-flat, kind="stable")
    order = order[~chosen[order]]
    chosen[order[: max(0, count - int(chosen.sum()))]] = True
    ends = np.cumsum([len(own) for own in scores.values()])[:-1]
    return dict(zip(scores, np.split(chosen, ends), strict=True))


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest; ties keep the lower index."""
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:count]] = True
    return kept


def _check(groups: Groups, scores: Scores, density: float, floor: float) -> None:
    """Refuses what does not fit."""
    problems = []
    for name, own in scores.items():
        if name not in groups:
            problems.append(f"{name}: not a group; groups are {', '.join(groups) or 'none'}")
        elif np.shape(own) != (groups[name].size,) or not np.isfinite(own).all():
            size = groups[name].size
            problems.append(f"{name}: shape {np.shape(own)}, must be {size} finite numbers")
    trees.raise_for(problems, "`scores` must have a number for each channel:")
    if not scores:
        raise ValueError("`scores` must name at least one group, but is empty.")
    if not (0 < density <= 1 and 0 <= floor <= 1):
        raise ValueError(
            f"`density` must lie in (0, 1] and `floor` in [0, 1], but are {density} and {floor}."
        )


def _summed(
    groups: Groups,
    variables: Any,
    measure: Callable[[np.ndarray], np.ndarray],
    counts: Callable[[Groups, Any], bool],
) -> dict[str, np.ndarray]:
    """A number for each channel: the sum of what is measured of its rows in all members."""
    leaves = trees.leaf_by_path(variables)
    sums = {}
    for name, group in groups.items():
        sums[name] = np.zeros(group.size)
        for member in group.members:
            if counts(groups, member):
                array = np.moveaxis(np.asarray(leaves[member.path], float), member.dimension, 0)
                ours = member.channels >= 0
                measured = measure(array.reshape(len(array), -1)[ours])
                np.add.at(sums[name], member.channels[ours], measured)
    return sums


def _is_filter(groups: Groups, member: Any) -> bool:
    return member.produces and len(groups.model.shapes[member.path]) > 1


def _is_gate(groups: Groups, member: Any) -> bool:
    """A scale of a norm layer, or the bias beside one."""
    folder = member.path.rpartition("/")[0]
    return member.produces and f"{folder}/scale" in groups.model.shapes


def _is_scale(groups: Groups, member: Any) -> bool:
    return member.produces and member.path.rpartition("/")[2] == "scale"
