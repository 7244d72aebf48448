"""Exact counts of the entries of layers, at any size.

A layer is a leaf, or one of the copies in a stacked leaf. The copies are ordered by their index
along the stacked axes, row-major, and the leaf remains one array.

Counts are int32. A tree of 2**31 entries or more is counted in int64. This needs no
`jax_enable_x64`, because `exact` switches it on for the counting alone.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["count_kept", "exact", "for_devices", "peaks"]

Axes = tuple[int, ...]


class Width(NamedTuple):
    """Integer types that can hold every count, and every position of a search."""

    count: Any  # signed
    place: Any  # unsigned, for keys and for indices


NARROW, WIDE = Width(np.int32, np.uint32), Width(np.int64, np.uint64)
# Up to this number float32 can hold every integer.
_FLOAT_LIMIT = 2**24


def count_kept(masks: Any, stacked: Sequence[Axes] | None = None) -> jax.Array:
    """Counts the True entries of each layer, exactly.

    Args:
        masks: tree of bool arrays.
        stacked: the axes of each leaf that number copies, in flattening order; None: no copies.

    Returns:
        int32 [layers]; int64 inside `exact` if there are 2**31 entries or more.

    Example:
        >>> count_kept([jnp.array([True, False, True]), jnp.array([False])]).tolist()
        [2, 0]
        >>> count_kept([jnp.array([[True, True], [False, True]])], stacked=[(0,)]).tolist()
        [2, 1]
    """
    leaves = jax.tree.leaves(masks)
    groups = packs(stacks(leaves, stacked), leaves)
    with exact(leaves):
        return of_layers(join(leaves, groups), groups, width_of(leaves))


def exact(leaves: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which the entries of some arrays can be counted.

    Args:
        leaves: anything with shapes.

    Returns:
        A context manager that enables 64-bit integers if there are 2**31 entries or more, and does
        nothing if there are fewer.

    Example:
        >>> with exact([jax.ShapeDtypeStruct((3, 2**30), jnp.float32)]):
        ...     total = jnp.asarray(3 * 2**30)
        >>> str(total.dtype)
        'int64'
    """
    wide = width_of(leaves) is WIDE
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def width_of(leaves: Iterable[Any]) -> Width:
    """Returns the smallest types that can count the entries of these arrays."""
    size = sum(math.prod(leaf.shape) for leaf in leaves)
    return NARROW if size <= np.iinfo(NARROW.count).max else WIDE


class Stack(NamedTuple):
    """The shape of a leaf, and the axes that number copies of a layer; static."""

    shape: tuple[int, ...]  # the shape of the leaf
    axes: Axes  # the axes that number copies

    @property
    def copies(self) -> int:
        """The number of copies."""
        return math.prod(self.shape[axis] for axis in self.axes)

    @property
    def size(self) -> int:
        """The number of entries of a copy."""
        return math.prod(n for axis, n in enumerate(self.shape) if axis not in self.axes)

    def spread(self, values: jax.Array) -> jax.Array:
        """Reshapes a vector with one value for each copy so that it broadcasts to the leaf."""
        sizes = [n if axis in self.axes else 1 for axis, n in enumerate(self.shape)]
        return values.reshape(sizes)


def stacks(leaves: Sequence[Any], stacked: Sequence[Axes] | None) -> list[Stack]:
    """Returns the `Stack` of each leaf."""
    axes = [()] * len(leaves) if stacked is None else stacked
    return [Stack(leaf.shape, tuple(own)) for leaf, own in zip(leaves, axes, strict=True)]


def layers_of(layouts: Sequence[Stack]) -> list[np.ndarray]:
    """Returns the indices of the layers of each leaf."""
    ends = np.cumsum([stack.copies for stack in layouts])
    return [np.arange(end - stack.copies, end) for stack, end in zip(layouts, ends, strict=True)]


def peaks(leaves: Sequence[Any], stacked: Sequence[Axes] | None = None) -> list[jax.Array]:
    """Returns the largest size of an entry of each layer: NaN if it has one, 0 if it is empty.

    Args:
        leaves: floating-point arrays.
        stacked: the axes of each leaf that number copies; None: no copies.

    Returns:
        float32 [copies] for each leaf.

    Example:
        >>> peaks([jnp.array([[1.0, -2.0], [0.0, 0.5]])], stacked=[(0,)])[0].tolist()
        [2.0, 0.5]
    """
    return [_peak(leaf, stack.axes) for leaf, stack in zip(leaves, stacks(leaves, stacked))]


@functools.partial(jax.jit, static_argnums=1)
def _peak(leaf: jax.Array, axes: Axes) -> jax.Array:
    """Returns the largest size of each copy, float32 [copies]."""
    rest = tuple(axis for axis in range(leaf.ndim) if axis not in axes)
    if leaf.size == 0:
        return jnp.zeros(math.prod(leaf.shape[axis] for axis in axes), jnp.float32)
    dtype = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
    peak = jnp.max(jnp.abs(leaf.astype(dtype)), axis=rest)
    if dtype == jnp.float64:  # what is finite remains finite
        largest = float(np.finfo(np.float32).max)
        peak = jnp.where(jnp.isfinite(peak), jnp.minimum(peak, largest), peak)
    return peak.astype(jnp.float32).reshape(-1)


class Pack(NamedTuple):
    """Leaves that are counted as one array, because their layouts are the same; static."""

    members: tuple[int, ...]  # indices of the leaves
    stack: Stack  # of the array: with several members they are its first axis, one more of copies
    layers: np.ndarray  # indices of the layers, in the order of the copies


def packs(layouts: Sequence[Stack], leaves: Sequence[Any]) -> list[Pack]:
    """Groups leaves of one layout, whose arrays `join` stacks.

    The loops of a selection then compile as those of a network with one leaf of each shape. Leaves
    that may be sharded stay alone: to stack two that are sharded differently, one would have to
    move to other devices.
    """
    layers = layers_of(layouts)
    groups: dict[Any, list[int]] = {}
    for index, (stack, leaf) in enumerate(zip(layouts, leaves, strict=True)):
        key = index if _may_be_sharded() else (stack, jax.typeof(leaf).sharding)
        groups.setdefault(key, []).append(index)
    return [
        Pack(
            tuple(members),
            _joined(layouts[members[0]], len(members)),
            np.concatenate([layers[i] for i in members]),
        )
        for members in groups.values()
    ]


_DEVICES = contextvars.ContextVar[int | None]("devices", default=None)


@contextlib.contextmanager
def for_devices(count: int) -> Iterator[None]:
    """Inside, programs are traced for this number of devices, which need not be here.

    A program that is compiled ahead of time is then the one that the other machine traces.

    Args:
        count: number of devices.

    Example:
        >>> with for_devices(256):
        ...     _may_be_sharded()
        True
    """
    token = _DEVICES.set(count)
    try:
        yield
    finally:
        _DEVICES.reset(token)


def _device_count() -> int:
    """Returns the number of devices that arrays may be split over."""
    return _DEVICES.get() or jax.device_count()


def _may_be_sharded() -> bool:
    """Returns whether an array may be on several devices, which a traced array does not tell."""
    return _device_count() > 1


def _joined(stack: Stack, number: int) -> Stack:
    """Returns the layout of an array of several leaves."""
    if number == 1:
        return stack
    return Stack((number, *stack.shape), (0, *(axis + 1 for axis in stack.axes)))


def join(leaves: Sequence[jax.Array], packs: Sequence[Pack]) -> list[jax.Array]:
    """Makes one array of the leaves of each pack."""
    lists = [[leaves[i] for i in pack.members] for pack in packs]
    return [own[0] if len(own) == 1 else jnp.stack(own) for own in lists]


def split(
    arrays: Sequence[jax.Array], packs: Sequence[Pack], numbers: Sequence[jax.Array]
) -> list[jax.Array]:
    """Returns the leaves of the arrays that `join` makes, in their own order.

    `numbers` are 0, 1, 2, ... up to the largest number of members, as arrays.
    """
    leaves = {}
    for array, pack in zip(arrays, packs, strict=True):
        if len(pack.members) == 1:
            leaves[pack.members[0]] = array
        for member, number in zip(pack.members, numbers if len(pack.members) > 1 else ()):
            leaves[member] = jax.lax.dynamic_index_in_dim(array, number, keepdims=False)
    return [leaves[index] for index in range(len(leaves))]


def by_pack(packs: Sequence[Pack], *values: jax.Array) -> list[tuple[jax.Array, ...]]:
    """Splits vectors over all layers into a part for each pack that broadcasts to its array."""
    return [
        tuple(pack.stack.spread(pick(value, pack.layers)) for value in values) for pack in packs
    ]


def pick(values: jax.Array, layers: np.ndarray) -> jax.Array:
    """Returns the entries of some layers from a vector over all; those in a row as a slice."""
    if np.array_equal(layers, np.arange(layers[0], layers[-1] + 1)):
        return values[layers[0] : layers[-1] + 1]
    return values[layers]


def total(counts: jax.Array) -> jax.Array:
    """Sums counts in their own dtype, whatever the default of JAX is."""
    return jnp.sum(counts, dtype=counts.dtype)


def cumsum(counts: jax.Array) -> jax.Array:
    """Computes the cumulative sum of counts in their own dtype."""
    return jnp.cumsum(counts, dtype=counts.dtype)


def of_layers(flags: Sequence[Any], packs: Sequence[Pack], width: Width) -> jax.Array:
    """Counts the True entries of each layer."""
    counts = [_total(own, pack.stack.axes, width.count) for own, pack in zip(flags, packs)]
    order = np.argsort(np.concatenate([pack.layers for pack in packs]))
    return pick(jnp.concatenate(counts), order)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _total(flags: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """Counts the True entries of each copy, [copies]."""
    rest = tuple(axis for axis in range(flags.ndim) if axis not in axes)
    return jax.lax.platform_dependent(
        flags,
        cpu=functools.partial(_total_of_bits, rest=rest, dtype=dtype),
        default=lambda x: jnp.sum(x, axis=rest, dtype=dtype).reshape(-1),
    )


def _total_of_bits(flags: jax.Array, rest: Axes, dtype: Any) -> jax.Array:
    """Counts along `rest` by packed bits: XLA:CPU does not fuse a comparison into a large sum."""
    if not rest:
        return flags.astype(dtype).reshape(-1)
    size, axis, columns = math.prod(flags.shape[i] for i in rest), rest[-1], flags.shape[rest[-1]]
    # Rows are split into as many parts as devices, so that each device packs only its own part.
    parts = math.gcd(columns, _device_count())
    before, after = flags.shape[:axis], flags.shape[axis + 1 :]
    split = flags.reshape(*before, parts, columns // parts, *after)
    counts = jax.lax.population_count(jnp.packbits(split, axis=axis + 1))
    along = (*rest, axis + 1)
    if size > _FLOAT_LIMIT:
        return jnp.sum(counts, axis=along, dtype=dtype).reshape(-1)
    # XLA:CPU sums float32 faster than integers.
    return jnp.sum(counts.astype(jnp.float32), axis=along).astype(dtype).reshape(-1)


def sizes(layouts: Sequence[Stack], width: Width) -> jax.Array:
    """Returns the number of entries of each layer."""
    sizes = [size for stack in layouts for size in [stack.size] * stack.copies]
    return jnp.asarray(np.array(sizes, width.count))
