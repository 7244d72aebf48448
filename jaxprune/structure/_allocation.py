"""Chooses how many channels each group keeps, and which."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxprune import trees
from jaxprune.structure._groups import Group, Groups, Multiple
from jaxprune.structure._plans import Plan
from jaxprune.structure._scores import Scores

Fractions = float | Mapping[str, float]


def keep_uniform(
    groups: Groups,
    scores: Scores,
    density: float,
    *,
    floor: Fractions = 0.0,
    ceiling: Fractions = 1.0,
    ignore: Callable[[Group], bool] | None = None,
) -> dict[str, np.ndarray]:
    """Keeps the same fraction of the channels in each group.

    Args:
        groups: from `find_groups`.
        scores: group name -> float [channels]. The largest scores are kept; ties keep the lower
            index. Groups without scores are kept whole. The names of blocks of a stack are
            accepted, too.
        density: fraction of the channels to keep, in (0, 1].
        floor: smallest fraction of a group to keep: one number for all groups, or a mapping from
            group names. At least one channel is always kept, but no block.
        ceiling: largest fraction of a group to keep, given in the same way.
        ignore: `group -> bool`: groups to keep whole and leave out of the ranking.

    Returns:
        Group name -> bool [channels], for `Groups.plan`.

    Raises:
        ValueError: if a value is out of range, scores do not fit their groups, a name belongs to no
            group with scores, or `ignore` matches none or all of these groups.

    Example:
        >>> from jaxprune.structure import Group
        >>> groups = Groups(None, [Group("a", 4, (), ())], [], {})
        >>> keep_uniform(groups, {"a": np.array([1.0, 4.0, 2.0, 3.0])}, 0.5)["a"].tolist()
        [False, True, False, True]
    """
    bounds = _bounds(groups, scores, density, floor, ceiling, ignore)
    units = groups.units
    trees.raise_for(
        [name for name in bounds if name in groups.blocks and units[name].size == 1],
        "`keep_uniform` cannot keep a fraction of a single block; use `keep_global` for these:",
    )
    return {
        name: _largest(scores[name], min(max(round(density * units[name].size), least), most))
        for name, (least, most) in bounds.items()
    }


def keep_global(
    groups: Groups,
    scores: Scores,
    density: float,
    *,
    floor: Fractions = 0.0,
    ceiling: Fractions = 1.0,
    ignore: Callable[[Group], bool] | None = None,
) -> dict[str, np.ndarray]:
    """Keeps the channels with the highest scores in one ranking of all groups.

    Keeping a fraction d of the channels keeps about d ** 2 of the parameters between two pruned
    layers, as these lose both inputs and outputs.

    Args:
        groups: from `find_groups`.
        scores: name of a group or block -> float [channels], comparable between groups; see
            `normalized`. The channels of a block are the layers of its stack, or one.
        density: fraction of the channels of all ranked groups to keep, in (0, 1].
        floor: see `keep_uniform`.
        ceiling: see `keep_uniform`.
        ignore: see `keep_uniform`.

    Returns:
        Group name -> bool [channels], for `Groups.plan`.

    Raises:
        ValueError: as for `keep_uniform`.

    Example:
        >>> from jaxprune.structure import Group
        >>> groups = Groups(None, [Group("a", 2, (), ()), Group("b", 2, (), ())], [], {})
        >>> scores = {"a": np.array([4.0, 3.0]), "b": np.array([2.0, 1.0])}
        >>> {name: own.tolist() for name, own in keep_global(groups, scores, 0.75).items()}
        {'a': [True, True], 'b': [True, False]}
    """
    bounds = _bounds(groups, scores, density, floor, ceiling, ignore)
    return _keep(scores, bounds, round(density * sum(len(scores[name]) for name in bounds)))


def keep_within(
    groups: Groups,
    scores: Scores,
    limit: float,
    cost: Callable[[Plan], float],
    *,
    floor: Fractions = 0.0,
    ceiling: Fractions = 1.0,
    ignore: Callable[[Group], bool] | None = None,
    multiple: Multiple = None,
    keep: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Keeps as much of one global ranking as a limit of parameters, MACs, bytes or time allows.

    Args:
        groups: from `find_groups`.
        scores: see `keep_global`.
        limit: largest cost allowed.
        cost: `plan -> number`, such as `count_parameters`, or from `mac_cost`, `byte_cost`,
            `cache_cost` or `latency_cost`; it must not fall when more is kept.
        floor: see `keep_uniform`.
        ceiling: see `keep_uniform`.
        ignore: see `keep_uniform`.
        multiple: widths are rounded up to a multiple of this, as in `Groups.plan`, also by default.
        keep: what is decided already, such as the blocks to keep when `scores` are those of widths.

    Returns:
        Name -> bool [channels], with those in `keep`, for `Groups.plan`.

    Raises:
        ValueError: as for `keep_uniform`, or if the floors alone cost more than the limit.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import filter_norms, find_groups
        >>> w = {"in": jnp.arange(16.0).reshape(2, 8), "out": jnp.ones((8, 2))}
        >>> groups = find_groups(lambda w, x: (x @ w["in"]) @ w["out"], w, jnp.ones((1, 2)))
        >>> keep = keep_within(groups, filter_norms(groups, w), 13, count_parameters)
        >>> keep["in:1"].tolist()
        [False, False, False, False, False, True, True, True]
    """
    bounds = _bounds(groups, scores, 1.0, floor, ceiling, ignore)

    def costs(count: int) -> float:
        return cost(groups.plan({**keep, **_keep(scores, bounds, count)}, multiple=multiple))

    low, high = 0, sum(len(scores[name]) for name in bounds)  # `low` fits, or nothing does
    if costs(low) > limit:
        raise ValueError(
            f"`limit` {limit:g} is below {costs(low):g}, the cost of what the floors keep; raise "
            "it or lower `floor`."
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if costs(middle) <= limit else (low, middle - 1)
    return {**keep, **_keep(scores, bounds, low)}


def count_parameters(plan: Plan) -> int:
    """Counts the entries of the compacted parameters.

    Args:
        plan: from `Groups.plan`.

    Returns:
        The exact count.

    Example:
        >>> from jaxprune.structure import Model
        >>> model = Model({"w": (2, 3)}, frozenset({"w"}))
        >>> count_parameters(Plan(model, {"w": [np.ones(2, bool), np.arange(3) < 2]}))
        4
    """
    return sum(int(np.prod(plan.shape(path))) for path in plan.model.parameters)


class _Bounds(NamedTuple):
    """The smallest and the largest number of channels that a group keeps."""

    least: int
    most: int


def _keep(scores: Scores, bounds: Mapping[str, _Bounds], count: int) -> dict[str, np.ndarray]:
    """Keeps the smallest number in each group, then the best of all that the bounds allow."""
    kept = {name: _largest(scores[name], own.least) for name, own in bounds.items()}
    allowed = {name: _largest(scores[name], own.most) for name, own in bounds.items()}
    flat = np.concatenate([scores[name] for name in bounds])
    chosen, possible = (np.concatenate(list(own.values())) for own in (kept, allowed))
    order = np.argsort(-flat, kind="stable")
    order = order[possible[order] & ~chosen[order]]
    chosen[order[: max(0, count - int(chosen.sum()))]] = True
    ends = np.cumsum([len(own) for own in kept.values()])[:-1]
    return dict(zip(bounds, np.split(chosen, ends), strict=True))


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Marks the `count` largest scores; ties keep the lower index."""
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-np.asarray(scores), kind="stable")[:count]] = True
    return kept


def _bounds(
    groups: Groups,
    scores: Scores,
    density: float,
    floor: Fractions,
    ceiling: Fractions,
    ignore: Callable[[Group], bool] | None,
) -> dict[str, _Bounds]:
    """Checks the arguments and returns the bounds of each ranked group."""
    problems, units = [], groups.units
    for name, own in scores.items():
        if name not in units:
            problems.append(f"{name}: not a group; groups are {', '.join(units) or 'none'}")
        elif np.shape(own) != (units[name].size,) or not np.isfinite(own).all():
            size = units[name].size
            problems.append(f"{name}: shape {np.shape(own)}, must be {size} finite numbers")
    trees.raise_for(problems, "`scores` must have a number for each channel:")
    if not scores:
        raise ValueError("`scores` must name at least one group, but is empty.")
    if not 0 < density <= 1:
        raise ValueError(f"`density` must lie in (0, 1], but is {density}.")
    # Rank in the order of the groups, which decides ties: `jit` returns `scores` sorted by name.
    named = [name for name in units if name in scores]
    ranked = [name for name in named if ignore is None or not ignore(units[name])]
    if ignore is not None and len(ranked) in (0, len(scores)):
        matches = "none" if ranked else "all"
        raise ValueError(f"`ignore` must match some groups and not others, but matches {matches}.")
    low = _by_name("floor", floor, 0.0, ranked)
    high = _by_name("ceiling", ceiling, 1.0, ranked)
    crossed = [f"{name}: {low[name]} and {high[name]}" for name in ranked if low[name] > high[name]]
    trees.raise_for(crossed, "`floor` must not be above `ceiling`:")
    sizes = {name: units[name].size for name in ranked}
    least = {
        name: max(0 if name in groups.blocks else 1, round(low[name] * size))
        for name, size in sizes.items()
    }
    return {n: _Bounds(least[n], max(least[n], round(high[n] * size))) for n, size in sizes.items()}


def _by_name(
    argument: str, value: Fractions, default: float, ranked: list[str]
) -> dict[str, float]:
    """Returns a fraction for each ranked group."""
    given = value if isinstance(value, Mapping) else dict.fromkeys(ranked, value)
    problems = [f"{name}: not a group that is ranked" for name in given if name not in ranked]
    problems += [f"{n}: {own} is not in [0, 1]" for n, own in given.items() if not 0 <= own <= 1]
    trees.raise_for(problems, f"`{argument}` must be a fraction, or a mapping from groups to some:")
    return {name: given.get(name, default) for name in ranked}
