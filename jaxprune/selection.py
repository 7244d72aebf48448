"""Scores and budgets -> masks: selects exactly the k largest scores, without a sort.

Each float32 score becomes an unsigned integer key in the same order, and a search over the integers
finds the threshold `T` with exactly `k` keys at or above it. Equal scores at the threshold are kept
in the order of their index, first by leaf and then row-major within the leaf, as in a stable sort;
a search over the index finds the last one to keep. Each pass of a search only counts, so it works
on arrays of any shape without moving them: the devices of a sharded array exchange one count for
each layer, never weights.

A layer is a leaf, or one of the copies in a stacked leaf, see `counting`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import counting, meshes, trees

__all__ = ["largest"]


# Keys: 0 is never kept, 1 is NaN, then come -inf .. +inf. No key reaches _TOP.
_NEVER, _NAN, _TOP = np.uint32(0), np.uint32(1), np.uint32(0xFF800001)
# Widest bracket, in keys, within which counts are interpolated: sixteen binades of float32.
_CLOSE = 1 << 27


def largest(
    scores: Any,
    keep: Any,
    *,
    floors: Any = None,
    among: Any = None,
    stacked: Sequence[counting.Axes] | None = None,
) -> Any:
    """Selects exactly the `keep` largest scores of a tree.

    Every layer first keeps its `floors[i]` largest entries; the rest of `keep` goes to the largest
    scores of all layers. Floors that add up to `keep` therefore select within each layer; floors of
    0 select globally. Ties keep the lower index. NaN ranks below -inf.

    Args:
        scores: tree of floating-point arrays, compared in float32.
        keep: an integer [], number of entries to select in total.
        floors: None or integers [layers], smallest number of entries to select in each layer, that
            is in each leaf or in each copy of a stacked leaf.
        among: None or a tree of bools like `scores`; only entries that are True can be selected.
        stacked: the axes of each leaf that number copies, in flattening order; None: no copies.

    Returns:
        Tree of bools like `scores`. If fewer than `keep` entries can be selected, all of them
        are; a floor is lowered in the same way.

    Raises:
        ValueError: if `scores` has no leaves, or leaves that are empty or not floating point;
            if `floors` does not fit the layers, or `among` has different paths or shapes.

    Example:
        >>> scores = {"a": jnp.array([0.1, 0.9]), "b": jnp.array([0.5, 0.5, 0.3])}
        >>> masks = largest(scores, 2)
        >>> masks["a"].tolist(), masks["b"].tolist()
        ([False, True], [True, False, False])
    """
    leaves, treedef = jax.tree.flatten(scores)
    layouts = counting.stacks(leaves, stacked)
    _check(scores)
    if among is not None:
        trees.check_same_structure("among", among, scores)
        # Matched by path: string keys sort "10" before "2", integer keys do not.
        among = trees.leaves_like(scores, among)
    allowed = [None] * len(leaves) if among is None else jax.tree.leaves(among)
    with counting.exact(leaves):
        width = counting.width_of(leaves)
        packs = counting.packs(layouts, leaves)
        keys = [_keys(score, mask) for score, mask in zip(leaves, allowed, strict=True)]
        keys = counting.join(keys, packs)
        able = (
            counting.sizes(layouts, width)
            if among is None
            else counting.of_layers([key != _NEVER for key in keys], packs, width)
        )
        floors = jnp.zeros_like(able) if floors is None else jnp.asarray(floors, width.count)
        if floors.shape != able.shape:
            raise ValueError(
                f"`floors` must have one entry for each of the {able.size} layers of `scores`, but "
                f"has shape {floors.shape}."
            )
        floors = jnp.minimum(floors, able)
        keep = jnp.asarray(keep, width.count)
        keep = jnp.clip(keep, counting.total(floors), counting.total(able))
        sizes = counting.sizes(layouts, width)
        masks = _select(keys, packs, width, sizes, keep, floors, able)
    return jax.tree.unflatten(treedef, masks)


def _check(scores: Any) -> None:
    """Checks the scores that `largest` gets, as far as they are static."""
    named = trees.leaves_with_paths(scores)
    bad = [
        f"{path}: dtype {leaf.dtype}, {leaf.size} entries"
        for path, leaf in named
        if leaf.size == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    trees.raise_for(bad, "`scores` must be non-empty floating-point arrays:")
    if not named:
        raise ValueError("`scores` must have at least one leaf, but has none.")


@jax.jit
def _keys(score: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Maps float32 scores to uint32 keys in the same order; 0 where a mask is False."""
    score = score.astype(jnp.float32)
    score = jnp.where(score == 0, 0.0, score)  # -0.0 and 0.0 tie
    bits = jax.lax.bitcast_convert_type(score, jnp.uint32)
    keys = jnp.where(bits >> 31 == 0, bits | jnp.uint32(1 << 31), ~bits)
    keys = jnp.where(jnp.isnan(score), _NAN, keys)
    return keys if allowed is None else jnp.where(allowed, keys, _NEVER)


class _Cut(NamedTuple):
    """The cut of each layer, which keeps keys above `key`, and equal keys up to index `last`."""

    key: jax.Array  # places [layers]
    last: jax.Array  # counts [layers], row-major within the layer
    kept: jax.Array  # counts [layers]


class _Bracket(NamedTuple):
    """Two positions around the cut of each layer; at a higher position fewer entries are kept."""

    low: jax.Array  # places [layers], at which the target or more is kept
    high: jax.Array  # places [layers], at which less is kept
    at_low: jax.Array  # counts [layers], number of entries kept at `low`
    at_high: jax.Array  # counts [layers], number of entries kept at `high`


def _select(
    keys: Sequence[jax.Array],
    packs: Sequence[counting.Pack],
    width: counting.Width,
    sizes: jax.Array,
    keep: jax.Array,
    floors: jax.Array,
    able: jax.Array,
) -> list[jax.Array]:
    """Finds where to cut each layer, in three passes that share one compiled loop.

    Returns the masks of the leaves. The last of the three passes makes them, but all three compute
    them, and the numbers of the leaves in a pack pass through the loop. XLA:CPU compiles equal
    programs once, and those of N leaves differ if they hold a constant or what follows from one.

    1. *Common key* finds one key for all layers, at which `keep` entries or a few more are kept.
    2. *Floors* lowers the key in the layers whose floor asks for more.
    3. *Ties* finds the last of the equal keys to keep, in the layers that cannot keep all of them.

    With the scores 9, 7, 7 in layer `a` and 2, 1, 2 in layer `b`, `keep` 3, and floors 0 and 1:

    1. The common key is that of 7, where `a` keeps 3 and `b` keeps 0. With the floor of `b` these
       are 4, one too many, so the share of `a` is 2 and that of `b` is 1.
    2. The key of `b` falls to that of 2, where `b` keeps 2.
    3. Both layers keep one too many: `a` keeps 9 and the first 7, `b` keeps the first 2.

    Example:
        >>> scores = {"a": jnp.array([9.0, 7.0, 7.0]), "b": jnp.array([2.0, 1.0, 2.0])}
        >>> masks = largest(scores, 3, floors=jnp.array([0, 1]))
        >>> masks["a"].tolist(), masks["b"].tolist()
        ([True, True, False], [True, False, False])
    """
    zero = jnp.zeros_like(able)
    everything = jnp.full_like(able, np.iinfo(width.count).max)

    def search(step: jax.Array, carry: Any) -> Any:
        cut, above, share, _, numbers = carry
        common, ties = step == 0, step == 2
        start = _Bracket(
            low=jnp.where(ties, zero.astype(width.place), width.place(_NAN)),
            high=jnp.where(ties, sizes.astype(width.place) + 1, cut.key),
            at_low=jnp.where(ties, cut.kept, able),
            at_high=jnp.where(ties, above, cut.kept),
        )
        active = jnp.where(ties, cut.kept > share, cut.kept < share)

        def place(position: jax.Array) -> tuple[jax.Array, jax.Array]:
            last = sizes - 1 - position.astype(width.count)
            return jnp.where(ties, cut.key, position), jnp.where(ties, last, everything)

        def excess(counts: jax.Array) -> jax.Array:
            total = counting.total(jnp.maximum(floors, counts)) - keep
            return jnp.where(common, total, counts - share)

        def count(position: jax.Array) -> jax.Array:
            return counting.of_layers(_masks(keys, packs, *place(position)), packs, width)

        found = _search(start, active, excess, count)
        key, last = place(found.low)
        new = _Cut(key, last, found.at_low)
        new = jax.tree.map(lambda a, b: jnp.where(active, a, b), new, cut)
        above = jnp.where(active, found.at_high, above)
        share = jnp.where(common, _shares(new.kept, above, keep, floors), share)
        # Counts are not negative, which XLA does not know.
        numbers = [number + (new.kept[0] < 0) for number in numbers]
        return new, above, share, _masks(keys, packs, new.key, new.last), numbers

    nothing = _Cut(jnp.full_like(able, _TOP, dtype=width.place), everything, zero)
    # The floors alone may be enough. Until its share is known, a layer may keep all its entries.
    share = jnp.where(counting.total(floors) >= keep, zero, able)
    masks = [jnp.zeros_like(key, bool) for key in keys]
    most = max(len(pack.members) for pack in packs)
    numbers = [jnp.int32(number) for number in range(most if most > 1 else 0)]
    start = meshes.varying_like((nothing, zero, share, masks, numbers), keys, keep, floors, able)
    *_, masks, numbers = jax.lax.fori_loop(0, 3, search, start)
    return counting.split(masks, packs, numbers)


def _shares(reached: jax.Array, above: jax.Array, keep: jax.Array, floors: jax.Array) -> jax.Array:
    """Counts the entries that each layer keeps; ties at the common key go to the first layers."""
    certain = jnp.maximum(floors, above)
    spare = jnp.maximum(floors, reached) - certain
    before = counting.cumsum(spare) - spare
    return certain + jnp.clip(keep - counting.total(certain) - before, 0, spare)


def _search(
    start: _Bracket,
    active: jax.Array,
    excess: Callable[[jax.Array], jax.Array],
    count: Callable[[jax.Array], jax.Array],
) -> _Bracket:
    """Finds the highest positions at which `excess(count(position))` is not negative.

    A bracket is first divided at round numbers, until it spans a few powers of two of the score.
    Then it shrinks by the Illinois variant of regula falsi on the counts, and as a safeguard it is
    divided at a round number in every fifth pass. Round numbers, because scores that many entries
    share are round (0, all of bfloat16). The search of a layer ends early if its excess is 0.
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
        middle = at.low + jnp.clip(guess.astype(span.dtype), 1, jnp.maximum(span, 2) - 1)
        margin = jnp.maximum(span // 8, 1)
        divide = (span > _CLOSE) | (passes % 5 == 4)
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
    carry = meshes.varying_like(carry, active)
    return jax.lax.while_loop(lambda carry: jnp.any(unsettled(carry[0])), body, carry)[0]


def _roundest(low: jax.Array, high: jax.Array) -> jax.Array:
    """Returns the number from `low` to `high`, at least 1, that ends in the most zero bits."""
    zeros = np.iinfo(low.dtype).bits - 1 - jax.lax.clz((low - 1) ^ high)
    return high >> zeros << zeros


def _masks(
    keys: Sequence[jax.Array], packs: Sequence[counting.Pack], key: jax.Array, last: jax.Array
) -> list[jax.Array]:
    """Marks what a cut of each layer keeps, in the arrays of the packs."""
    cuts = counting.by_pack(packs, key, last)
    return [_flags(k, *own, stack=pack.stack) for k, pack, own in zip(keys, packs, cuts)]


@functools.partial(jax.jit, static_argnames="stack")
def _flags(
    key: jax.Array, threshold: jax.Array, last: jax.Array, stack: counting.Stack
) -> jax.Array:
    """Marks keys above the threshold, and equal keys up to a row-major index within the copy."""
    # The index is split into two small parts, or XLA:CPU would store it as large as the leaf.
    rest = tuple(axis for axis in range(key.ndim) if axis not in stack.axes)
    row, column = (_index(key.shape, rest, part, last.dtype) for part in (rest[:-1], rest[-1:]))
    threshold = threshold.astype(key.dtype)
    return key >= jnp.where(row <= last - column, threshold, threshold + 1)


def _index(
    shape: tuple[int, ...], rest: counting.Axes, axes: counting.Axes, dtype: Any
) -> jax.Array:
    """Returns the row-major index within a copy along some axes, with length 1 along the rest."""
    index = jnp.zeros((1,) * len(shape), dtype)
    for axis in axes:
        along = tuple(n if i == axis else 1 for i, n in enumerate(shape))
        stride = math.prod(shape[i] for i in rest if i > axis)
        index = index + np.asarray(stride, dtype) * jax.lax.broadcasted_iota(dtype, along, axis)
    return index
