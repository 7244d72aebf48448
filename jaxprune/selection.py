"""Scores and budgets -> masks: exactly k largest, without a sort.

A float32 score becomes an unsigned integer key in the same order, and a search on the
integers finds the threshold `T` with exactly `k` keys above it or at it. Equal scores at the
threshold are kept in the order of their index, first by leaf and then row-major within the
leaf, as a stable sort would; a search on the index finds the last one. Each pass of a search
only counts, so it works on arrays of any shape where they lie: sharded arrays exchange one
count for each leaf, never weights.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees

__all__ = ["count_kept", "largest"]

# Keys: 0 can never be kept, 1 is NaN, then -inf .. +inf. No key reaches _TOP.
_NEVER, _NAN, _TOP = np.uint32(0), np.uint32(1), np.uint32(0xFF800001)
_LIMIT = 2**31 - 1
# Up to here every integer is a float32.
_FLOAT_LIMIT = 2**24
# Widest bracket, in keys, in which counts are worth interpolating: sixteen binades of float32.
_NARROW = np.uint32(1 << 27)


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
        among = trees.leaves_like(scores, among)  # text keys sort "10" before "2", numbers do not
    allowed = [None] * len(leaves) if among is None else jax.tree.leaves(among)
    keys = [_keys(score, mask) for score, mask in zip(leaves, allowed, strict=True)]

    able = _sizes(leaves) if among is None else count_kept(among)
    floors = jnp.minimum(floors.astype(jnp.int32), able)
    keep = jnp.clip(jnp.asarray(keep, jnp.int32), jnp.sum(floors), jnp.sum(able))
    cut = _cut(keys, keep, floors, able)
    masks = [_flags(*leaf) for leaf in zip(keys, cut.key, cut.last, strict=True)]
    return jax.tree.unflatten(treedef, masks)


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
    return jnp.stack([_total(mask) for mask in jax.tree.leaves(masks)])


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


@jax.jit
def _keys(score: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Maps float32 to uint32 so that the order is kept; 0 where not allowed."""
    score = score.astype(jnp.float32)
    score = jnp.where(score == 0, 0.0, score)  # -0.0 and 0.0 tie
    bits = jax.lax.bitcast_convert_type(score, jnp.uint32)
    keys = jnp.where(bits >> 31 == 0, bits | jnp.uint32(1 << 31), ~bits)
    keys = jnp.where(jnp.isnan(score), _NAN, keys)
    return keys if allowed is None else jnp.where(allowed, keys, _NEVER)


@jax.jit
def _total(flags: jax.Array) -> jax.Array:
    """Counts True, int32 []."""
    return jax.lax.platform_dependent(
        flags, cpu=_total_of_bits, default=lambda x: jnp.sum(x, dtype=jnp.int32)
    )


def _total_of_bits(flags: jax.Array) -> jax.Array:
    """Counts True by packed bits: XLA:CPU does not fuse a comparison into a large reduction."""
    columns = flags.shape[-1] if flags.ndim else 1
    # A device that holds a part of each row packs its part alone.
    parts = math.gcd(columns, jax.device_count())
    bits = jnp.packbits(flags.reshape(*flags.shape[:-1], parts, columns // parts), axis=-1)
    counts = jax.lax.population_count(bits)
    if flags.size > _FLOAT_LIMIT:
        return jnp.sum(counts, dtype=jnp.int32)
    # XLA:CPU sums float32 faster than integers.
    return jnp.sum(counts.astype(jnp.float32)).astype(jnp.int32)


def _sizes(leaves: Sequence[jax.Array]) -> jax.Array:
    """Entries of each leaf, int32 [leaves]."""
    return jnp.array([leaf.size for leaf in leaves], jnp.int32)


class _Cut(NamedTuple):
    """What each leaf keeps: keys above `key`, and those equal to it up to index `last`."""

    key: jax.Array  # uint32 [leaves]
    last: jax.Array  # int32 [leaves], row-major
    kept: jax.Array  # int32 [leaves]


class _Bracket(NamedTuple):
    """Positions around the cut of each leaf: the further, the fewer are kept."""

    low: jax.Array  # uint32 [leaves], keeps the target or more
    high: jax.Array  # uint32 [leaves], keeps less
    at_low: jax.Array  # int32 [leaves], how many each keeps at `low`
    at_high: jax.Array  # int32 [leaves]


def _cut(keys: Sequence[jax.Array], keep: jax.Array, floors: jax.Array, able: jax.Array) -> _Cut:
    """Finds where to cut each leaf, in three searches that share one compiled loop.

    The first one finds the key that all leaves share, where `keep` entries or a few more
    stay. The second one lowers it in the leaves whose floor asks for more. The third one finds
    the last of the equal keys that stays, in the leaves where not all of them can.
    """
    sizes, zero = _sizes(keys), jnp.zeros(able.shape, jnp.int32)
    everything = jnp.full(able.shape, _LIMIT)

    def search(step: jax.Array, carry: tuple[_Cut, jax.Array, jax.Array]) -> Any:
        cut, above, share = carry
        common, ties = step == 0, step == 2
        start = _Bracket(
            low=jnp.full(able.shape, jnp.where(ties, 0, _NAN)),
            high=jnp.where(ties, sizes.astype(jnp.uint32) + 1, cut.key),
            at_low=jnp.where(ties, cut.kept, able),
            at_high=jnp.where(ties, above, cut.kept),
        )
        active = jnp.where(ties, cut.kept > share, cut.kept < share)

        def place(position: jax.Array) -> tuple[jax.Array, jax.Array]:
            last = sizes - 1 - position.astype(jnp.int32)
            return jnp.where(ties, cut.key, position), jnp.where(ties, last, everything)

        def excess(counts: jax.Array) -> jax.Array:
            total = jnp.sum(jnp.maximum(floors, counts)) - keep
            return jnp.where(common, total, counts - share)

        def count(position: jax.Array) -> jax.Array:
            places = zip(keys, *place(position), strict=True)
            return jnp.stack([_total(_flags(*leaf)) for leaf in places])

        found = _search(start, active, excess, count)
        key, last = place(found.low)
        new = _Cut(key, last, found.at_low)
        new = jax.tree.map(lambda a, b: jnp.where(active, a, b), new, cut)
        above = jnp.where(active, found.at_high, above)
        return new, above, jnp.where(common, _shares(new.kept, above, keep, floors), share)

    nothing = _Cut(jnp.full(able.shape, _TOP), everything, zero)
    # Floors alone may be enough. Until its share is known, a leaf may keep all that it can.
    share = jnp.where(jnp.sum(floors) >= keep, zero, able)
    return jax.lax.fori_loop(0, 3, search, (nothing, zero, share))[0]


def _shares(reached: jax.Array, above: jax.Array, keep: jax.Array, floors: jax.Array) -> jax.Array:
    """How many entries each leaf keeps: ties at the common key go to the first leaves."""
    certain = jnp.maximum(floors, above)
    spare = jnp.maximum(floors, reached) - certain
    before = jnp.cumsum(spare) - spare
    return certain + jnp.clip(keep - jnp.sum(certain) - before, 0, spare)


def _search(
    start: _Bracket,
    active: jax.Array,
    excess: Callable[[jax.Array], jax.Array],
    count: Callable[[jax.Array], jax.Array],
) -> _Bracket:
    """Finds the furthest positions at which `excess(count(position))` is not negative.

    A bracket is divided at round numbers until it spans a few powers of two of the score, and
    then shrinks by the Illinois variant of regula falsi on the counts, with a division at a round
    number every fifth pass as a safeguard. Scores that many entries share (0, all of bfloat16)
    are round numbers. The search of a leaf ends early where its excess is 0.
    """
    one = jnp.ones(active.shape, jnp.float32)

    def unsettled(at: _Bracket) -> jax.Array:
        return active & (at.high - at.low > 1) & (excess(at.at_low) != 0)

    def body(carry: Any) -> Any:
        at, low_weight, high_weight, was_up, passes = carry
        span = at.high - at.low
        over = excess(at.at_low).astype(jnp.float32) * low_weight
        under = -excess(at.at_high).astype(jnp.float32) * high_weight
        guess = span.astype(jnp.float32) * (over / jnp.maximum(over + under, 1.0))
        middle = at.low + jnp.clip(guess.astype(jnp.uint32), 1, jnp.maximum(span, 2) - 1)
        margin = jnp.maximum(span // 8, 1)
        divide = (span > _NARROW) | (passes % 5 == 4)
        middle = jnp.where(divide, _roundest(at.low + margin, at.high - margin), middle)
        counts = count(middle)
        moves = unsettled(at)
        up = moves & (excess(counts) >= 0)
        down = moves & ~up
        at = _Bracket(
            low=jnp.where(up, middle, at.low),
            high=jnp.where(down, middle, at.high),
            at_low=jnp.where(up, counts, at.at_low),
            at_high=jnp.where(down, counts, at.at_high),
        )
        low_weight = jnp.where(up, 1.0, jnp.where(was_up, low_weight, low_weight / 2))
        high_weight = jnp.where(down, 1.0, jnp.where(was_up, high_weight / 2, high_weight))
        return at, low_weight, high_weight, up, passes + 1

    carry = (start, one, one, jnp.zeros(active.shape, bool), jnp.int32(0))
    return jax.lax.while_loop(lambda carry: jnp.any(unsettled(carry[0])), body, carry)[0]


def _roundest(low: jax.Array, high: jax.Array) -> jax.Array:
    """The number from `low` to `high`, at least 1, that ends in the most zero bits."""
    zeros = 31 - jax.lax.clz((low - 1) ^ high)
    return high >> zeros << zeros


@jax.jit
def _flags(key: jax.Array, threshold: jax.Array, last: jax.Array) -> jax.Array:
    """True above the threshold, and at it up to a row-major index."""
    # The index in two small parts, or XLA:CPU stores an array of it as large as the leaf.
    axes = range(key.ndim)
    row, column = _index(key.shape, axes[:-1]), _index(key.shape, axes[-1:])
    return key >= jnp.where(row <= last - column, threshold, threshold + 1)


def _index(shape: tuple[int, ...], axes: Iterable[int]) -> jax.Array:
    """Row-major index along some dimensions, int32, with length 1 along the others."""
    index = jnp.zeros((1,) * len(shape), jnp.int32)
    for axis in axes:
        along = tuple(n if i == axis else 1 for i, n in enumerate(shape))
        stride = math.prod(shape[axis + 1 :])
        index = index + stride * jax.lax.broadcasted_iota(jnp.int32, along, axis)
    return index
