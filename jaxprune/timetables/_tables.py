"""Budgets and patterns -> how much each mask update keeps, as exact integers on the host."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import budgets, patterns, schedules, trees


class Ranking(NamedTuple):
    """The pruned leaves of one pattern, and how many of their units each mask update keeps.

    A unit is a weight, a block or a channel. For an N:M pattern, units are counted within a group
    of m weights. A layer is a leaf, or one copy of a stacked leaf.

    Example:
        >>> timetable = make_timetable({"kernel": jnp.zeros((2, 4))}, [0, 10], [0.25, 0.5])
        >>> timetable.rankings[0].keep.tolist()
        [6, 4]
    """

    pattern: patterns.Pattern
    members: tuple[int, ...]  # positions of the leaves among the pruned leaves
    keep: np.ndarray  # int64 [entries], units kept in total; for an N:M pattern, of every m
    moved: np.ndarray  # int64 [entries], how many of these are dropped and regrown elsewhere
    floors: np.ndarray  # int64 [entries, layers], smallest number kept in each layer
    moved_of_layer: np.ndarray  # int64 [entries, layers], largest number dropped from each floor
    shares: np.ndarray  # int64 [entries, layers], number kept in each at the overall density


class Timetable(NamedTuple):
    """All mask updates of a run, known before its first step.

    Example:
        >>> make_timetable({"kernel": jnp.zeros((2, 4))}, [0, 10], [0.25, 0.5]).steps.tolist()
        [0, 10]
    """

    steps: np.ndarray  # int32 [entries], ascending
    rankings: tuple[Ranking, ...]
    stacked: tuple[tuple[int, ...], ...]  # axes of each pruned leaf that number copies
    marks: np.ndarray  # int32 [entries], never 0: tell an entry from those of other timetables


def make_timetable(
    leaves: Mapping[str, Any],
    steps: Sequence[int],
    sparsities: Sequence[float],
    *,
    moved: Sequence[float] | None = None,
    budget: budgets.GivenBudget = None,
    pattern: patterns.PatternRule = None,
    stacked: trees.Stacked = None,
) -> Timetable:
    """Counts what each mask update keeps, on the host, where integers are exact.

    Leaves of different patterns do not compete: each pattern has a separate budget, in units of
    that pattern. Of every m weights, an N:M pattern keeps as many as the sparsity asks for, and
    never fewer than n.

    Args:
        leaves: the pruned leaves, path -> anything with a shape.
        steps: the steps at which masks change, ascending.
        sparsities: sparsity after each mask update, each in [0, 1).
        moved: fraction of the kept units that each mask update drops and regrows; None is 0.
        budget: function `(shapes, sparsity) -> Budget`, or a dict from names of leaves to final
            sparsities, see `budgets.rule_of`; None is `budgets.global_budget()`.
        pattern: see `jaxprune.patterns`; None prunes single weights.
        stacked: function that returns the axes that number copies, see `trees.stacked_axes`.
            `budget` and `pattern` then see single copies: `budget` gets the shape of each copy, at
            paths such as `layers/kernel[3]`; `pattern` counts the axes of a copy.

    Returns:
        A `Timetable`.

    Raises:
        ValueError: if a pattern does not fit its leaf, an N:M pattern cannot be reached, a
            budget cannot be met, or `stacked` names an axis that does not exist.

    Example:
        >>> leaves = {"a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4))}
        >>> timetable = make_timetable(leaves, [0], [0.5], budget=budgets.uniform)
        >>> timetable.rankings[0].keep.tolist(), timetable.rankings[0].floors.tolist()
        ([16], [[8, 8]])
        >>> stack = {"layers": jnp.zeros((3, 4, 4))}
        >>> timetable = make_timetable(
        ...     stack, [0], [0.5], budget=budgets.uniform, stacked=lambda path, leaf: 0)
        >>> timetable.rankings[0].floors.tolist()
        [[8, 8, 8]]
    """
    moved = [0.0] * len(steps) if moved is None else moved
    axes = tuple(trees.stacked_axes(path, leaf, stacked) for path, leaf in leaves.items())
    copies = {
        path: jax.ShapeDtypeStruct(patterns.copy_shape(leaf.shape, own), jnp.result_type(leaf))
        if own
        else leaf
        for (path, leaf), own in zip(leaves.items(), axes, strict=True)
    }
    kinds = patterns.patterns_of(copies, pattern)
    _check_reachable(dict(zip(leaves, kinds, strict=True)), max(sparsities))
    members: dict[patterns.Pattern, list[int]] = {}
    for i, kind in enumerate(kinds):
        members.setdefault(kind, []).append(i)
    named = [(path, leaf.shape, own) for (path, leaf), own in zip(leaves.items(), axes)]
    budgeted, fixed = (
        [
            copy
            for leaf, kind in zip(named, kinds, strict=True)
            if isinstance(kind, patterns.NM) == is_fixed
            for copy in trees.copy_paths(*leaf)
        ]
        for is_fixed in (False, True)
    )
    given = budgets.global_budget() if budget is None else budget
    _check_names(given, budgeted, fixed)
    rule = budgets.rule_of(given, max(sparsities), budgeted)
    rankings = [
        _n_m_ranking(kind, places, sparsities, moved)
        if isinstance(kind, patterns.NM)
        else _ranking(kind, places, [named[i] for i in places], sparsities, moved, rule)
        for kind, places in members.items()
    ]
    at = np.asarray(steps, np.int32)
    return Timetable(at, tuple(rankings), axes, _marks(at, rankings))


def _check_names(budget: Any, budgeted: list[str], fixed: list[str]) -> None:
    """Raises for names in a budget that mean only leaves whose N:M pattern fixes their counts."""
    names = getattr(budget, "sparsities", budget if isinstance(budget, Mapping) else ())

    def meant(name: str, paths: list[str]) -> list[str]:
        return [path for path in paths if trees.means(name, path)]

    trees.raise_for(
        [
            f"{name}: {', '.join(meant(name, fixed)[:3])}"
            for name in names
            if meant(name, fixed) and not meant(name, budgeted)
        ],
        "`budget` must not name leaves with an N:M pattern, which keep n of every m weights "
        "whatever a budget says. Omit these names, or let `pattern` be a function of path and leaf "
        "that returns None for these leaves:",
    )


def ever_grows(timetable: Timetable) -> bool:
    """Returns whether any mask update brings units back.

    Args:
        timetable: from `make_timetable`.

    Returns:
        A bool.

    Example:
        >>> ever_grows(make_timetable({"kernel": jnp.zeros((2, 4))}, [0, 10], [0.5, 0.25]))
        True
    """
    return any(
        bool(np.any(ranking.moved > 0) or np.any(np.diff(ranking.keep) > 0))
        for ranking in timetable.rankings
    )


def entries_until(timetable: Timetable, step: jax.Array) -> jax.Array:
    """Counts the mask updates at or before `step`.

    Args:
        timetable: from `make_timetable`.
        step: int32 [].

    Returns:
        int32 [].

    Example:
        >>> timetable = make_timetable({"kernel": jnp.zeros((2, 4))}, [0, 10], [0.25, 0.5])
        >>> [int(entries_until(timetable, jnp.int32(step))) for step in (0, 9, 10, 99)]
        [1, 1, 2, 2]
    """
    return jnp.sum(jnp.asarray(timetable.steps) <= step, dtype=jnp.int32)


def sparsities_at(sparsity: float | Callable[[Any], Any], steps: Sequence[int]) -> list[float]:
    """Computes the sparsity after each mask update, from a cubic ramp or a schedule.

    Args:
        sparsity: final sparsity of the cubic ramp, in [0, 1), as a number or an array with one, or
            an `optax.Schedule`.
        steps: the steps at which masks change.

    Returns:
        List of floats in [0, 1).

    Raises:
        ValueError: if a value is outside [0, 1), no number, or traced.

    Example:
        >>> sparsities_at(0.75, [0, 50, 100])
        [0.0, 0.65625, 0.75]
    """
    schedule = sparsity
    if not callable(schedule):
        final = schedules.number("sparsity", schedule)
        schedule = schedules.cubic(final, steps[0], steps[-1])
    values = [schedules.sparsity_at(schedule, step) for step in steps]
    bad = [f"{s} at step {t}" for t, s in zip(steps, values, strict=True) if not 0 <= s < 1]
    trees.raise_for(bad[-3:], "`sparsity`, a fraction of zeros, must lie in [0, 1), but is:")
    return values


def _check_reachable(kinds: Mapping[str, patterns.Pattern], sparsity: float) -> None:
    """Raises unless the largest sparsity leads to the N:M patterns that are asked for."""
    n_m = {path: kind for path, kind in kinds.items() if isinstance(kind, patterns.NM)}
    asked = {path: budgets.keep_count(kind.m, sparsity) for path, kind in n_m.items()}
    named = {path: f"{path}: {kind.n}:{kind.m}" for path, kind in n_m.items()}
    dense = [named[path] for path, kind in n_m.items() if sparsity and asked[path] > kind.n]
    trees.raise_for(dense, f"`sparsity` {sparsity} is too low for these patterns; raise it:")
    sparse = [named[path] for path, kind in n_m.items() if asked[path] < kind.n]
    if len(n_m) == len(kinds):  # no other leaf can be pruned further instead
        summary = f"`sparsity` {sparsity} is above that of these patterns; lower it to 1 - n / m:"
        trees.raise_for(sparse, summary)


def _n_m_ranking(
    pattern: patterns.NM, places: list[int], sparsities: Sequence[float], moved: Sequence[float]
) -> Ranking:
    """Makes the ranking of an N:M pattern, which keeps at least n of every m weights."""
    keep = [max(pattern.n, budgets.keep_count(pattern.m, s)) for s in sparsities]
    keep = np.asarray(keep, np.int64)
    count = np.floor(keep * np.asarray(moved) + 0.5)
    nothing = np.zeros((len(keep), 0), np.int64)
    return Ranking(pattern, tuple(places), keep, count.astype(np.int64), nothing, nothing, nothing)


def _ranking(
    pattern: patterns.Pattern,
    places: list[int],
    leaves: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
    sparsities: Sequence[float],
    moved: Sequence[float],
    rule: budgets.BudgetRule,
) -> Ranking:
    """Makes the ranking of a pattern whose units compete under a budget."""
    shapes = {}
    for path, shape, axes in leaves:
        units = patterns.copy_shape(patterns.unit_shape(pattern, shape, axes), axes)
        shapes |= dict.fromkeys(trees.copy_paths(path, shape, axes), units)
    total, floors = budgets.at_all(rule, shapes, sparsities)
    fraction = np.asarray(moved)
    count = np.floor(total * fraction + 0.5)
    count_of_layer = np.floor(floors * fraction[:, None] + 0.5)
    sizes = [math.prod(shape) for shape in shapes.values()]
    everything = sum(sizes)
    # Products of two counts may not fit into 64 bits, Python's integers have no limit.
    kind = np.int64 if everything < 2**31 else object
    shares = np.multiply.outer(total.astype(kind), np.array(sizes, kind)) // everything
    tables = (total, count, floors, count_of_layer, shares)
    return Ranking(pattern, tuple(places), *(table.astype(np.int64) for table in tables))


def _marks(steps: np.ndarray, rankings: Sequence[Ranking]) -> np.ndarray:
    """Computes checksums of mask updates and their steps, each from 1 to 2**31 - 1."""
    kinds = repr([ranking[:2] for ranking in rankings]).encode()
    tables = [np.reshape(table, (len(steps), -1)) for own in rankings for table in own[2:]]
    content = np.concatenate([steps[:, None], *tables], axis=1, dtype="<i8")
    start = zlib.crc32(kinds)
    marks = [zlib.crc32(row, start) % (2**31 - 1) + 1 for row in content]
    return np.array(marks, np.int32)
