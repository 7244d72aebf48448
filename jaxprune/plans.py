"""Budgets and patterns -> what each mask update keeps, as exact integers, and the masks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import budgets, patterns, schedules, selection, trees

__all__ = [
    "Group",
    "Plan",
    "entries_until",
    "ever_grows",
    "make_plan",
    "renew",
    "select",
    "sparsities_at",
]


class Group(NamedTuple):
    """The pruned leaves of one pattern, and how many of their units each mask update keeps.

    A unit is a weight, a block or a channel; for an N:M pattern it is one of every m weights.

    Example:
        >>> plan = make_plan({"kernel": jnp.zeros((2, 4))}, [0, 10], [0.25, 0.5])
        >>> plan.groups[0].keep.tolist()
        [6, 4]
    """

    pattern: patterns.Pattern
    members: tuple[int, ...]  # positions of its leaves among the pruned ones
    keep: np.ndarray  # int32 [entries], units kept in all; of an N:M pattern, of every m
    moved: np.ndarray  # int32 [entries], of these, dropped and regrown elsewhere
    floors: np.ndarray  # int32 [entries, members], kept at least in each leaf
    moved_of_leaf: np.ndarray  # int32 [entries, members], dropped from its floor at most


class Plan(NamedTuple):
    """All mask updates of a run, known before its first step.

    Example:
        >>> make_plan({"kernel": jnp.zeros((2, 4))}, [0, 10], [0.25, 0.5]).steps.tolist()
        [0, 10]
    """

    steps: np.ndarray  # int32 [entries], rising
    groups: tuple[Group, ...]


def make_plan(
    leaves: Mapping[str, Any],
    steps: Sequence[int],
    sparsities: Sequence[float],
    *,
    moved: Sequence[float] | None = None,
    budget: budgets.BudgetRule | None = None,
    pattern: patterns.PatternRule = None,
) -> Plan:
    """Counts everything on the host, where integers are exact.

    Leaves of different patterns do not compete: each pattern has its own budget, in its own
    units. An N:M pattern keeps of every m weights as many as the sparsity asks for, and never
    fewer than n.

    Args:
        leaves: the pruned leaves, path -> anything with a shape.
        steps: when masks change, rising.
        sparsities: sparsity after each mask update, each in [0, 1).
        moved: fraction of the kept units that each mask update drops and regrows; None is 0.
        budget: function `(shapes, sparsity) -> Budget`; None is `budgets.global_budget()`.
        pattern: see `jaxprune.patterns`; None prunes single weights.

    Returns:
        A `Plan`.

    Raises:
        ValueError: if a pattern does not fit its leaf, an N:M pattern cannot be reached, or a
            budget cannot be met.

    Example:
        >>> leaves = {"a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4))}
        >>> plan = make_plan(leaves, [0], [0.5], budget=budgets.uniform)
        >>> plan.groups[0].keep.tolist(), plan.groups[0].floors.tolist()
        ([16], [[8, 8]])
    """
    moved = [0.0] * len(steps) if moved is None else moved
    rule = budgets.global_budget() if budget is None else budget
    kinds = patterns.patterns_of(leaves, pattern)
    _check_reachable(dict(zip(leaves, kinds, strict=True)), max(sparsities))
    members: dict[patterns.Pattern, list[int]] = {}
    for i, kind in enumerate(kinds):
        members.setdefault(kind, []).append(i)
    named = list(leaves.items())
    groups = [
        _n_m_group(kind, places, sparsities, moved)
        if isinstance(kind, patterns.NM)
        else _group(kind, places, dict(named[i] for i in places), sparsities, moved, rule)
        for kind, places in members.items()
    ]
    return Plan(np.asarray(steps, np.int32), tuple(groups))


def ever_grows(plan: Plan) -> bool:
    """Whether any mask update brings units back.

    Args:
        plan: from `make_plan`.

    Returns:
        A bool.

    Example:
        >>> ever_grows(make_plan({"kernel": jnp.zeros((2, 4))}, [0, 10], [0.5, 0.25]))
        True
    """
    return any(
        bool(np.any(group.moved > 0) or np.any(np.diff(group.keep) > 0)) for group in plan.groups
    )


def entries_until(plan: Plan, step: jax.Array) -> jax.Array:
    """How many mask updates lie at `step` or before it.

    Args:
        plan: from `make_plan`.
        step: int32 [].

    Returns:
        int32 [].

    Example:
        >>> plan = make_plan({"kernel": jnp.zeros((2, 4))}, [0, 10], [0.25, 0.5])
        >>> [int(entries_until(plan, jnp.int32(step))) for step in (0, 9, 10, 99)]
        [1, 1, 2, 2]
    """
    return jnp.sum(jnp.asarray(plan.steps) <= step, dtype=jnp.int32)


def select(plan: Plan, index: Any, scores: Sequence[jax.Array]) -> list[jax.Array]:
    """Masks of the largest scores among all weights, whatever was pruned before.

    Args:
        plan: from `make_plan`.
        index: int or int32 [], which mask update.
        scores: of each pruned leaf.

    Returns:
        Bool masks like `scores`.

    Example:
        >>> plan = make_plan({"kernel": jnp.zeros(4)}, [0], [0.5])
        >>> select(plan, 0, [jnp.array([3.0, 1.0, 2.0, 0.0])])[0].tolist()
        [True, False, True, False]
    """
    return _by_group(plan, lambda group, s: _best(group, index, s, None), scores)


def renew(
    plan: Plan,
    index: Any,
    masks: Sequence[jax.Array],
    scores: Sequence[jax.Array],
    growth: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Keeps the largest scores among the kept weights and regrows the largest `growth`.

    Args:
        plan: from `make_plan`.
        index: int or int32 [], which mask update.
        masks: bool, of each pruned leaf.
        scores: of each pruned leaf; the lowest kept ones are dropped.
        growth: of each pruned leaf; None regrows nothing.

    Returns:
        Bool masks like `masks`.

    Example:
        >>> plan = make_plan({"kernel": jnp.zeros(4)}, [0], [0.5], moved=[0.5])
        >>> masks, scores = [jnp.array([True, True, False, False])], [jnp.arange(4.0)]
        >>> renew(plan, 0, masks, scores, growth=scores)[0].tolist()
        [False, True, False, True]
    """
    if growth is None:
        return _by_group(plan, lambda g, m, s: _best(g, index, s, m), masks, scores)

    def one(group: Group, masks: Any, scores: Any, growth: Any) -> list[jax.Array]:
        is_n_m = isinstance(group.pattern, patterns.NM)
        drop_and_grow = _n_m_drop_and_grow if is_n_m else _drop_and_grow
        return drop_and_grow(group, index, masks, scores, growth)

    return _by_group(plan, one, masks, scores, growth)


def sparsities_at(sparsity: float | Callable[[Any], Any], steps: Sequence[int]) -> list[float]:
    """Sparsity after each mask update: the cubic ramp to a number, or a schedule; checked.

    Args:
        sparsity: final sparsity in [0, 1), or an `optax.Schedule`.
        steps: when masks change.

    Returns:
        List of floats in [0, 1).

    Raises:
        ValueError: if a value is outside of [0, 1).

    Example:
        >>> sparsities_at(0.75, [0, 50, 100])
        [0.0, 0.65625, 0.75]
    """
    schedule = sparsity
    if not callable(schedule):
        schedule = schedules.cubic(float(schedule), steps[0], steps[-1])
    values = [schedules.sparsity_at(schedule, step) for step in steps]
    bad = [f"{s} at step {t}" for t, s in zip(steps, values, strict=True) if not 0 <= s < 1]
    trees.raise_for(bad[-3:], "`sparsity`, a fraction of zeros, must lie in [0, 1), but is:")
    return values


def _check_reachable(kinds: Mapping[str, patterns.Pattern], sparsity: float) -> None:
    """An N:M pattern must be what the largest sparsity leads to."""
    n_m = {path: kind for path, kind in kinds.items() if isinstance(kind, patterns.NM)}
    asked = {path: budgets.keep_count(kind.m, sparsity) for path, kind in n_m.items()}
    named = {path: f"{path}: {kind.n}:{kind.m}" for path, kind in n_m.items()}
    dense = [named[path] for path, kind in n_m.items() if sparsity and asked[path] > kind.n]
    trees.raise_for(dense, f"`sparsity` {sparsity} is too low to reach these patterns; raise it:")
    sparse = [named[path] for path, kind in n_m.items() if asked[path] < kind.n]
    if len(n_m) == len(kinds):  # no other leaf can make up for it
        summary = f"`sparsity` {sparsity} is more than these patterns prune; lower it to 1 - n / m:"
        trees.raise_for(sparse, summary)


def _n_m_group(
    pattern: patterns.NM, places: list[int], sparsities: Sequence[float], moved: Sequence[float]
) -> Group:
    """Of every m weights, as many as the sparsity asks for, at least n."""
    keep = [max(pattern.n, budgets.keep_count(pattern.m, s)) for s in sparsities]
    keep = np.asarray(keep, np.int32)
    count = np.floor(keep * np.asarray(moved) + 0.5)
    nothing = np.zeros((len(keep), len(places)), np.int32)
    return Group(pattern, tuple(places), keep, count.astype(np.int32), nothing, nothing)


def _group(
    pattern: patterns.Pattern,
    places: list[int],
    leaves: Mapping[str, Any],
    sparsities: Sequence[float],
    moved: Sequence[float],
    rule: budgets.BudgetRule,
) -> Group:
    """Counts of a pattern whose units compete under a budget."""
    shapes = {path: patterns.unit_shape(pattern, leaf.shape) for path, leaf in leaves.items()}
    # Once for each sparsity: at a constant one, a long run asks the same thousands of times.
    known = {sparsity: rule(shapes, sparsity) for sparsity in dict.fromkeys(sparsities)}
    total = np.array([known[sparsity].total for sparsity in sparsities], np.int64)
    floors = np.array([known[sparsity].floors for sparsity in sparsities], np.int64)
    fraction = np.asarray(moved)
    count = np.floor(total * fraction + 0.5)
    count_of_leaf = np.floor(floors * fraction[:, None] + 0.5)
    tables = (total, count, floors, count_of_leaf)
    return Group(pattern, tuple(places), *(table.astype(np.int32) for table in tables))


def _at(table: np.ndarray, index: Any) -> jax.Array:
    """One entry of a table, at a traced index."""
    return jnp.asarray(table)[index]


def _by_group(
    plan: Plan, function: Callable[..., list[jax.Array]], *lists: Sequence[jax.Array]
) -> list[jax.Array]:
    """Applies a function to the leaves of each group and puts its masks in their places."""
    masks: dict[int, jax.Array] = {}
    for group in plan.groups:
        parts = [[leaves[i] for i in group.members] for leaves in lists]
        masks.update(zip(group.members, function(group, *parts), strict=True))
    return [masks[i] for i in sorted(masks)]


def _best(group: Group, index: Any, scores: list[jax.Array], among: Any) -> list[jax.Array]:
    """The largest scores of a group, among some weights or all."""
    pattern, keep = group.pattern, _at(group.keep, index)
    if isinstance(pattern, patterns.NM):
        allowed = [None] * len(scores) if among is None else among
        return [
            patterns.n_m_mask(s, keep, pattern.m, pattern.axis, among=mask)
            for s, mask in zip(scores, allowed, strict=True)
        ]
    units = [patterns.pool(pattern, s) for s in scores]
    alive = among and [patterns.any_kept(pattern, mask) for mask in among]
    kept = selection.largest(units, keep, floors=_at(group.floors, index), among=alive)
    return _expanded(pattern, kept, scores)


def _drop_and_grow(
    group: Group, index: Any, masks: Any, scores: Any, growth: Any
) -> list[jax.Array]:
    """Drops the lowest kept scores, then fills up to the budget with the largest growth."""
    pattern, total, floors = group.pattern, _at(group.keep, index), _at(group.floors, index)
    alive = [patterns.any_kept(pattern, mask) for mask in masks]
    counts = selection.count_kept(alive)
    # Only what is pruned now can be regrown: in each leaf, and in all.
    free = jnp.array([mask.size for mask in alive], jnp.int32) - counts
    drop_floors = floors - jnp.minimum(_at(group.moved_of_leaf, index), free)
    moved = jnp.minimum(_at(group.moved, index), jnp.sum(free))
    keep = jnp.where(
        jnp.sum(floors) == total,  # the floors fix each leaf
        jnp.sum(jnp.minimum(drop_floors, counts)),
        jnp.minimum(total - moved, jnp.sum(counts)),
    )
    units = [patterns.pool(pattern, s) for s in scores]
    kept = selection.largest(units, keep, floors=drop_floors, among=alive)

    stay = selection.count_kept(kept)
    grow = total - jnp.sum(stay)
    lack = jnp.maximum(floors - stay, 0)
    grown = selection.largest(
        [patterns.pool(pattern, g) for g in growth],
        grow,
        floors=jnp.clip(grow - (jnp.cumsum(lack) - lack), 0, lack),
        among=[~mask for mask in alive],
    )
    return _expanded(pattern, [a | b for a, b in zip(kept, grown, strict=True)], scores)


def _n_m_drop_and_grow(
    group: Group, index: Any, masks: Any, scores: Any, growth: Any
) -> list[jax.Array]:
    """The same within every m weights; all of them have kept the same number before."""
    pattern, keep = group.pattern, _at(group.keep, index)
    assert isinstance(pattern, patterns.NM)
    new = []
    for mask, score, grow in zip(masks, scores, growth, strict=True):
        count = selection.count_kept([mask])[0] // (mask.size // pattern.m)
        moved = jnp.minimum(_at(group.moved, index), pattern.m - count)
        stay = jnp.minimum(keep - moved, count)
        where = pattern.m, pattern.axis
        kept = patterns.n_m_mask(score, stay, *where, among=mask)
        grown = patterns.n_m_mask(grow, keep - stay, *where, among=~mask)
        new.append(kept | grown)
    return new


def _expanded(pattern: patterns.Pattern, units: Any, like: Any) -> list[jax.Array]:
    """Masks of weights from masks of units."""
    return [patterns.expand(pattern, u, x.shape) for u, x in zip(units, like, strict=True)]
