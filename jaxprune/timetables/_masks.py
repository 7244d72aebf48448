"""Timetable and scores -> the masks of one mask update, inside a compiled step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import counting, patterns, selection
from jaxprune.timetables._tables import Ranking, Timetable


def select(timetable: Timetable, index: Any, scores: Sequence[jax.Array]) -> list[jax.Array]:
    """Keeps the largest scores among all weights, whatever was pruned before.

    Args:
        timetable: from `make_timetable`.
        index: int or int32 [], the number of the mask update.
        scores: one array for each pruned leaf.

    Returns:
        Bool masks like `scores`.

    Example:
        >>> from jaxprune.timetables import make_timetable
        >>> timetable = make_timetable({"kernel": jnp.zeros(4)}, [0], [0.5])
        >>> select(timetable, 0, [jnp.array([3.0, 1.0, 2.0, 0.0])])[0].tolist()
        [True, False, True, False]
    """
    return _by_ranking(timetable, lambda ranking, axes, s: _best(ranking, axes, index, s), scores)


def renew(
    timetable: Timetable,
    index: Any,
    masks: Sequence[jax.Array],
    scores: Sequence[jax.Array],
    growth: Sequence[jax.Array] | None = None,
    unranked: jax.Array | None = None,
) -> list[jax.Array]:
    """Keeps the largest scores among the kept weights and regrows the largest `growth`.

    Args:
        timetable: from `make_timetable`.
        index: int or int32 [], the number of the mask update.
        masks: one bool array for each pruned leaf.
        scores: one array for each pruned leaf; the lowest scores of kept weights are dropped.
        growth: one array for each pruned leaf; None regrows nothing.
        unranked: bool [layers], True for a layer whose scores cannot be compared with those of
            other layers. It keeps at least its share at the overall density. None: no layer.

    Returns:
        Bool masks like `masks`.

    Example:
        >>> from jaxprune.timetables import make_timetable
        >>> timetable = make_timetable({"kernel": jnp.zeros(4)}, [0], [0.5], moved=[0.5])
        >>> masks, scores = [jnp.array([True, True, False, False])], [jnp.arange(4.0)]
        >>> renew(timetable, 0, masks, scores, growth=scores)[0].tolist()
        [False, True, False, True]
    """
    layouts = counting.stacks(masks, timetable.stacked)
    layers = counting.layers_of(layouts)

    def one(ranking: Ranking, axes: Any, masks: Any, scores: Any, growth: Any, own: Any) -> Any:
        silent = None if unranked is None else counting.pick(unranked, np.concatenate(own))
        if growth[0] is None:
            return _best(ranking, axes, index, scores, masks, silent)
        if isinstance(ranking.pattern, patterns.NM):
            return _n_m_drop_and_grow(ranking, axes, index, masks, scores, growth)
        return _drop_and_grow(ranking, axes, index, masks, scores, growth, silent)

    return _by_ranking(timetable, one, masks, scores, growth or [None] * len(masks), layers)


def _at(table: np.ndarray, index: Any, units: Sequence[Any]) -> jax.Array:
    """Reads a table at a traced index, in the integer type that can count these units."""
    return jnp.asarray(table, counting.width_of(units).count)[index]


def _by_ranking(
    timetable: Timetable, function: Callable[..., list[jax.Array]], *lists: Sequence[Any]
) -> list[jax.Array]:
    """Applies a function to the leaves of each ranking; returns its masks in the leaves' order."""
    masks: dict[int, jax.Array] = {}
    for ranking in timetable.rankings:
        parts = [[leaves[i] for i in ranking.members] for leaves in (timetable.stacked, *lists)]
        masks.update(zip(ranking.members, function(ranking, *parts), strict=True))
    return [masks[i] for i in sorted(masks)]


def _best(
    ranking: Ranking, stacked: Any, index: Any, scores: Any, among: Any = None, unranked: Any = None
) -> list[jax.Array]:
    """Keeps the largest scores of a ranking, among some weights or all."""
    pattern = ranking.pattern
    if isinstance(pattern, patterns.NM):
        allowed = [None] * len(scores) if among is None else among
        keep = _at(ranking.keep, index, ())
        return [
            patterns.n_m_mask(
                s, keep, pattern.m, patterns.axis_of(pattern, s.shape, axes), among=mask
            )
            for s, axes, mask in zip(scores, stacked, allowed, strict=True)
        ]
    units = [patterns.pool(pattern, s, axes) for s, axes in zip(scores, stacked)]
    alive = among and _alive(pattern, among, stacked)
    with counting.exact(units):
        keep, floors = _at(ranking.keep, index, units), _floors(ranking, index, units, unranked)
        kept = selection.largest(units, keep, floors=floors, among=alive, stacked=stacked)
    return _expanded(pattern, kept, scores, stacked)


def _floors(ranking: Ranking, index: Any, units: Any, unranked: Any) -> jax.Array:
    """Returns the smallest count of each layer; unranked layers get their share if it fits."""
    floors = _at(ranking.floors, index, units)
    if unranked is None:
        return floors
    lack = jnp.maximum(_at(ranking.shares, index, units) - floors, 0) * unranked
    spare = _at(ranking.keep, index, units) - counting.total(floors)
    # The first layers are filled up first, while the total has spare units.
    return floors + jnp.clip(spare - (counting.cumsum(lack) - lack), 0, lack)


def _drop_and_grow(
    ranking: Ranking, stacked: Any, index: Any, masks: Any, scores: Any, growth: Any, unranked: Any
) -> list[jax.Array]:
    """Drops the lowest kept scores, then regrows the largest `growth` up to the budget."""
    pattern, alive = ranking.pattern, _alive(ranking.pattern, masks, stacked)
    with counting.exact(alive):
        total, fixed = (_at(table, index, alive) for table in (ranking.keep, ranking.floors))
        floors = _floors(ranking, index, alive, unranked)
        counts = counting.count_kept(alive, stacked)
        # Only units that are pruned now can be regrown, in each layer and in total.
        free = counting.count_kept([~mask for mask in alive], stacked)
        drop_floors = floors - jnp.minimum(_at(ranking.moved_of_layer, index, alive), free)
        moved = jnp.minimum(_at(ranking.moved, index, alive), counting.total(free))
        keep = jnp.where(
            counting.total(fixed) == total,  # the floors fix the count of each layer
            counting.total(jnp.minimum(drop_floors, counts)),
            jnp.minimum(total - moved, counting.total(counts)),
        )
        units = [patterns.pool(pattern, s, axes) for s, axes in zip(scores, stacked)]
        kept = selection.largest(units, keep, floors=drop_floors, among=alive, stacked=stacked)

        stay = counting.count_kept(kept, stacked)
        grow = total - counting.total(stay)
        lack = jnp.maximum(floors - stay, 0)
        grown = selection.largest(
            [patterns.pool(pattern, g, axes) for g, axes in zip(growth, stacked)],
            grow,
            # First layers first, while growth lasts: a layer gets what it lacks, up to what the
            # layers before it leave of `grow`.
            floors=jnp.clip(grow - (counting.cumsum(lack) - lack), 0, lack),
            among=[~mask for mask in alive],
            stacked=stacked,
        )
    return _expanded(pattern, [a | b for a, b in zip(kept, grown)], scores, stacked)


def _n_m_drop_and_grow(
    ranking: Ranking, stacked: Any, index: Any, masks: Any, scores: Any, growth: Any
) -> list[jax.Array]:
    """Drops and grows within every m weights, each of which has kept the same number so far."""
    pattern, keep = ranking.pattern, _at(ranking.keep, index, ())
    assert isinstance(pattern, patterns.NM)
    new = []
    for mask, axes, score, grow in zip(masks, stacked, scores, growth, strict=True):
        where = pattern.m, patterns.axis_of(pattern, mask.shape, axes)
        with counting.exact([mask]):
            count = counting.count_kept([mask])[0] // (mask.size // pattern.m)
        count = count.astype(jnp.int32)
        moved = jnp.minimum(_at(ranking.moved, index, ()), pattern.m - count)
        stay = jnp.minimum(keep - moved, count)
        kept = patterns.n_m_mask(score, stay, *where, among=mask)
        grown = patterns.n_m_mask(grow, keep - stay, *where, among=~mask)
        new.append(kept | grown)
    return new


def _alive(pattern: patterns.Pattern, masks: Any, stacked: Any) -> list[jax.Array]:
    """Returns which units contain a kept weight."""
    return [patterns.any_kept(pattern, mask, axes) for mask, axes in zip(masks, stacked)]


def _expanded(pattern: patterns.Pattern, units: Any, like: Any, stacked: Any) -> list[jax.Array]:
    """Expands masks of units to masks of weights."""
    return [
        patterns.expand(pattern, own, leaf.shape, axes)
        for own, leaf, axes in zip(units, like, stacked, strict=True)
    ]
