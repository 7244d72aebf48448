"""Scores and budgets -> masks: exactly k largest, without a sort.

A float32 score becomes an unsigned integer key in the same order, and a search on the
integers finds the threshold `T` with exactly `k` keys above it or at it. Each pass of the
search only counts, so it works on arrays of any shape where they lie: sharded arrays
exchange counts, never weights. Equal scores at the threshold are kept in the order of their
index, first by leaf and then row-major within the leaf, as a stable sort would.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees

__all__ = ["count_kept", "largest"]

# Keys: 0 can never be kept, 1 is NaN, then -inf .. +inf. No key reaches _TOP.
_NEVER, _NAN, _TOP = np.uint32(0), np.uint32(1), np.uint32(0xFF800001)
_LIMIT = 2**31 - 1
# Widest bracket, in keys, in which counts are worth interpolating: eight binades of float32.
_NARROW = np.uint32(1 << 26)


def largest(scores: Any, keep: Any, *, floors: Any = None, among: Any = None) -> Any:
    """Selects exactly the `keep` largest scores of a tree.

    Every leaf first keeps its largest `floors[i]` entries; what is left of `keep` goes to
    the largest scores anywhere. Floors that add up to `keep` therefore select within each
    leaf, floors of 0 select globally. Ties keep the lower index. NaN ranks below -inf.

    Args:
        scores: tree of floating-point arrays, compared in float32.
        keep: int or int32 [], entries to select in all.
        floors: None or ints or int32 [leaves], entries to select at least in each leaf.
        among: None or a tree of bools like `scores`; only entries that are True can be selected.

    Returns:
        Tree of bools like `scores`. If fewer than `keep` entries can be selected, all of them
        are; a floor is lowered in the same way.

    Raises:
        ValueError: if the leaves have more than 2**31 - 1 entries together, `floors` has
            another number of leaves, or `among` has other paths or shapes.

    Example:
        >>> scores = {"a": jnp.array([0.1, 0.9]), "b": jnp.array([0.5, 0.5, 0.3])}
        >>> masks = largest(scores, 2)
        >>> masks["a"].tolist(), masks["b"].tolist()
        ([False, True], [True, False, False])
    """
    leaves, treedef = jax.tree.flatten(scores)
    floors = jnp.zeros(len(leaves), jnp.int32) if floors is None else jnp.asarray(floors)
    _check(scores, floors.shape)
    if among is not None:
        trees.check_same_structure("among", among, scores)
    allowed = [None] * len(leaves) if among is None else jax.tree.leaves(among)
    keys = [_keys(score, mask) for score, mask in zip(leaves, allowed, strict=True)]

    able = _sizes(leaves) if among is None else count_kept(among)
    floors = jnp.minimum(floors.astype(jnp.int32), able)
    keep = jnp.clip(jnp.asarray(keep, jnp.int32), jnp.sum(floors), jnp.sum(able))
    share, cut = _share_out(keys, keep, floors, able)
    masks = _masks(keys, share, _cut_each(keys, share, cut, able))
    return jax.tree.unflatten(treedef, [m.reshape(x.shape) for m, x in zip(masks, leaves)])


def count_kept(masks: Any) -> jax.Array:
    """Counts the True entries of each leaf, exactly.

    Args:
        masks: tree of bool arrays.

    Returns:
        int32 [leaves].

    Example:
        >>> count_kept([jnp.array([True, False, True]), jnp.array([False])]).tolist()
        [2, 0]
    """
    return jnp.stack([_total(_with_rows(mask)) for mask in jax.tree.leaves(masks)])


def _check(scores: Any, floors_shape: tuple[int, ...]) -> None:
    """Static checks of the arguments of `largest`."""
    named = trees.leaves_with_paths(scores)
    bad = [
        f"{path}: dtype {leaf.dtype}, {leaf.size} entries"
        for path, leaf in named
        if leaf.size == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    trees.raise_for(bad, "`scores` must be non-empty floating-point arrays:")
    size = sum(leaf.size for _, leaf in named)
    if not named or size > _LIMIT:
        raise ValueError(
            f"`scores` must have between 1 and {_LIMIT} entries in all, but has {size}; "
            "select for parts of the tree."
        )
    if floors_shape != (len(named),):
        raise ValueError(
            f"`floors` must have one entry for each of the {len(named)} leaves of `scores`, but "
            f"has shape {floors_shape}."
        )


def _keys(score: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Maps float32 to uint32 so that the order is kept; 0 where not allowed."""
    score = _with_rows(score.astype(jnp.float32))
    score = jnp.where(score == 0, 0.0, score)  # -0.0 and 0.0 tie
    bits = jax.lax.bitcast_convert_type(score, jnp.uint32)
    keys = jnp.where(bits >> 31 == 0, bits | jnp.uint32(1 << 31), ~bits)
    keys = jnp.where(jnp.isnan(score), _NAN, keys)
    return keys if allowed is None else jnp.where(_with_rows(allowed), keys, _NEVER)


def _with_rows(x: jax.Array) -> jax.Array:
    """Gives scalars and vectors leading dimensions; leaves matrices and more as they are."""
    return x.reshape((1,) * (2 - x.ndim) + x.shape) if x.ndim < 2 else x


def _row_totals(flags: jax.Array) -> jax.Array:
    """Counts True along the last dimension, int32."""
    # XLA:CPU does not fuse a comparison into a reduction; packed bits are 32 times smaller.
    return jax.lax.platform_dependent(
        flags,
        cpu=lambda x: jnp.sum(
            jax.lax.population_count(jnp.packbits(x, axis=-1)), axis=-1, dtype=jnp.int32
        ),
        default=lambda x: jnp.sum(x, axis=-1, dtype=jnp.int32),
    )


def _total(flags: jax.Array) -> jax.Array:
    """Counts True, int32 []."""
    return jnp.sum(_row_totals(flags))


def _sizes(leaves: Sequence[jax.Array]) -> jax.Array:
    """Entries of each leaf, int32 [leaves]."""
    return jnp.array([leaf.size for leaf in leaves], jnp.int32)


class _Cut(NamedTuple):
    """A threshold for each leaf with the counts around it, each [leaves]."""

    threshold: jax.Array  # uint32
    reached: jax.Array  # int32, keys at the threshold or above it
    above: jax.Array  # int32, a lower bound of the keys above it; exact where it matters


def _search(
    keys: Sequence[jax.Array],
    objective: Callable[[jax.Array], jax.Array],
    target: jax.Array,
    able: jax.Array,
) -> _Cut:
    """Finds the highest thresholds at which `objective(counts)` is not below `target`.

    `counts` says how many keys of each leaf reach its threshold. A bracket is halved until
    it spans a few powers of two of the score, and then shrinks by the Illinois variant of
    regula falsi on the counts, with a bisection every fourth pass as a safeguard. The search
    of a leaf ends early where its target is met exactly: then no tie has to be cut.
    """
    zero, one = jnp.zeros(able.shape, jnp.int32), jnp.ones(able.shape, jnp.float32)
    nothing = objective(zero) >= target  # the floors alone are enough
    top = jnp.full(able.shape, _TOP)
    low = jnp.where(nothing, top, _NAN)
    at_low = jnp.where(nothing, zero, able)
    start = (low, top, at_low, zero, one, one, zero > 0, jnp.int32(0))

    def open_(low: jax.Array, high: jax.Array, at_low: jax.Array) -> jax.Array:
        return (high - low > 1) & (objective(at_low) != target)

    def body(carry: Any) -> Any:
        low, high, at_low, at_high, low_weight, high_weight, was_up, passes = carry
        span = high - low
        over = (objective(at_low) - target).astype(jnp.float32) * low_weight
        under = (target - objective(at_high)).astype(jnp.float32) * high_weight
        guess = span.astype(jnp.float32) * (over / jnp.maximum(over + under, 1.0))
        halve = (span > _NARROW) | (passes % 4 == 3)
        step = jnp.where(halve, span // 2, guess.astype(jnp.uint32))
        middle = low + jnp.clip(step, 1, jnp.maximum(span, 2) - 1)
        at_middle = jnp.stack([_total(key >= t) for key, t in zip(keys, middle, strict=True)])
        moves = open_(low, high, at_low)
        up = moves & (objective(at_middle) >= target)
        down = moves & ~up
        return (
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, at_middle, at_low),
            jnp.where(down, at_middle, at_high),
            jnp.where(up, 1.0, jnp.where(was_up, low_weight, low_weight / 2)),
            jnp.where(down, 1.0, jnp.where(was_up, high_weight / 2, high_weight)),
            up,
            passes + 1,
        )

    low, _, at_low, at_high, *_ = jax.lax.while_loop(
        lambda carry: jnp.any(open_(*carry[:3])), body, start
    )
    return _Cut(low, at_low, at_high)


def _share_out(
    keys: Sequence[jax.Array], keep: jax.Array, floors: jax.Array, able: jax.Array
) -> tuple[jax.Array, _Cut]:
    """How many entries each leaf keeps, int32 [leaves], and the threshold common to all."""

    def objective(counts: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.sum(jnp.maximum(floors, counts)), counts.shape)

    cut = _search(keys, objective, jnp.broadcast_to(keep, able.shape), able)
    certain = jnp.maximum(floors, cut.above)
    spare = jnp.maximum(floors, cut.reached) - certain
    before = jnp.cumsum(spare) - spare
    exact = objective(cut.reached)[0] == keep
    share = certain + jnp.clip(keep - jnp.sum(certain) - before, 0, spare)
    return jnp.where(exact, jnp.maximum(floors, cut.reached), share), cut


def _cut_each(keys: Sequence[jax.Array], share: jax.Array, cut: _Cut, able: jax.Array) -> _Cut:
    """The common threshold, and a lower one for each leaf whose floor asks for more."""
    lower = share > cut.reached
    # `able` is met by the first threshold, so only leaves below the common one are searched.
    own = _search(keys, lambda counts: counts, jnp.where(lower, share, able), able)
    return jax.tree.map(lambda a, b: jnp.where(lower, a, b), own, cut)


def _masks(keys: Sequence[jax.Array], share: jax.Array, cut: _Cut) -> list[jax.Array]:
    """Keeps `share[i]` entries of each leaf: all above its threshold, the first ones at it."""
    tied = cut.reached > share
    rows, columns = jax.lax.cond(
        jnp.any(tied),
        lambda: _last_ties(keys, cut.threshold, share - cut.above),
        lambda: (jnp.zeros_like(share), jnp.zeros_like(share)),
    )
    rows = jnp.where(tied, rows, _LIMIT)
    return [
        (key > t) | ((key == t) & _up_to(key.shape, row, column))
        for key, t, row, column in zip(keys, cut.threshold, rows, columns, strict=True)
    ]


def _last_ties(
    keys: Sequence[jax.Array], thresholds: jax.Array, need: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Row and column of each leaf's `need`-th key at its threshold, in row-major order."""
    ties = [key == t for key, t in zip(keys, thresholds, strict=True)]
    row, before = _find([_row_totals(tie).reshape(-1) for tie in ties], need)
    columns = [_row_of(tie, r) for tie, r in zip(ties, row, strict=True)]
    return row, _find(columns, need - before)[0]


def _row_of(flags: jax.Array, row: jax.Array) -> jax.Array:
    """One row of flags as int32 [last dimension], by row-major index."""

    # A masked sum instead of an index, which would gather a sharded array.
    def masked_sum(x: jax.Array, dtype: Any) -> jax.Array:
        here = jnp.where(_row_index(x.shape) == row, x, 0)
        return jnp.sum(here, axis=tuple(range(x.ndim - 1)), dtype=dtype)

    def by_bits(x: jax.Array) -> jax.Array:
        bits = masked_sum(jnp.packbits(x, axis=-1), jnp.uint8)
        return jnp.unpackbits(bits, count=x.shape[-1]).astype(jnp.int32)

    return jax.lax.platform_dependent(
        flags, cpu=by_bits, default=lambda x: masked_sum(x, jnp.int32)
    )


def _find(counts: Sequence[jax.Array], need: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In each vector, where the running sum reaches `need`, and the sum before that place.

    The place is -1 where `need` is 0.
    """
    flat = jnp.concatenate(counts)
    start = np.cumsum([0] + [c.size for c in counts[:-1]])
    running = jnp.cumsum(flat)
    base = running[start] - flat[start]
    place = jnp.clip(jnp.searchsorted(running, base + need), 0, flat.size - 1)
    before = running[place] - flat[place] - base
    return jnp.where(need > 0, place.astype(jnp.int32) - start.astype(np.int32), -1), before


def _row_index(shape: tuple[int, ...]) -> jax.Array:
    """Row-major index over all dimensions but the last, int32, broadcastable to `shape`."""
    index, stride = jnp.zeros((1,) * len(shape), jnp.int32), 1
    for axis in range(len(shape) - 2, -1, -1):
        steps = (*(1,) * axis, shape[axis], *(1,) * (len(shape) - axis - 1))
        index = index + stride * jax.lax.broadcasted_iota(jnp.int32, steps, axis)
        stride *= shape[axis]
    return index


def _up_to(shape: tuple[int, ...], row: jax.Array, column: jax.Array) -> jax.Array:
    """True up to and including one row-major position."""
    columns = (*(1,) * (len(shape) - 1), shape[-1])
    rows = _row_index(shape)
    index = jax.lax.broadcasted_iota(jnp.int32, columns, len(shape) - 1)
    return (rows < row) | ((rows == row) & (index <= column))
