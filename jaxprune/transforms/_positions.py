"""Kept weights as sorted positions in the flattened leaf, and values that follow them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import trees

LARGEST = 2**31 - 1  # positions are int32
_MULTIPLE = 128  # capacities are multiples of it, the width of a vector register of a TPU


def capacity_of(kept: float, size: int, room: float) -> int:
    """Returns the capacity for a number of kept weights: a little more, and at most the size.

    Example:
        >>> capacity_of(1000, 10_000, 0.05), capacity_of(9990, 10_000, 0.05)
        (1152, 10000)
    """
    wanted = math.ceil(max(1, kept) * (1 + room) / _MULTIPLE) * _MULTIPLE
    return min(size, wanted)


def packed_shape(leaf: Any, capacity: int) -> tuple[int, ...]:
    """Returns the shape of a packed leaf: one row, with as many dimensions as the leaf.

    Functions of Optax tell kernels from biases by their number of dimensions, and boxes of Flax
    name each dimension.

    Example:
        >>> packed_shape(jnp.zeros((3, 3, 8, 8)), 128)
        (1, 1, 1, 128)
    """
    return (1,) * (jnp.ndim(leaf) - 1) + (capacity,)


def count(mask: jax.Array) -> jax.Array:
    """Counts the kept weights of a leaf, int32 [].

    In blocks of bytes, because XLA:CPU writes all terms of a sum to memory: 1 byte for each weight
    instead of 4.

    Example:
        >>> count(jnp.arange(1000) < 600).item()
        600
    """
    flat = mask.reshape(-1).astype(jnp.uint8)
    even = flat.size // _MULTIPLE * _MULTIPLE
    blocks = jnp.sum(flat[:even].reshape(-1, _MULTIPLE), axis=1, dtype=jnp.uint8)
    return jnp.sum(blocks, dtype=jnp.int32) + jnp.sum(flat[even:], dtype=jnp.int32)


def placed(positions: jax.Array, size: int) -> jax.Array:
    """Counts the positions that are not padding, int32 []."""
    return jnp.sum(positions < size, dtype=jnp.int32)


def is_settled(positions: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns whether positions are what `follow` would make of a mask, bool []; cheap.

    All of them are kept, and either they are all that is kept or there is no room for more.
    """
    flat, capacity = positions.reshape(-1), positions.size
    stays = mask.reshape(-1).at[flat].get(mode="fill", fill_value=True, indices_are_sorted=True)
    kept = count(mask)
    return jnp.all(stays) & (placed(flat, mask.size) == jnp.minimum(kept, capacity))


def follow(positions: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the positions of the weights that a new mask keeps.

    Where there is no room for all, weights that had a place keep it, and those with the lowest
    indices of the others get what is left.

    Args:
        positions: int32 [..., capacity], sorted; padding is the size of the mask.
        mask: bool, of the shape of the leaf.

    Returns:
        int32, like `positions`.

    Example:
        >>> mask = jnp.array([True, True, False, True])
        >>> follow(jnp.array([2, 3], jnp.int32), mask), follow(jnp.full(4, 4, jnp.int32), mask)
        (Array([0, 3], dtype=int32), Array([0, 1, 3, 4], dtype=int32))
    """
    capacity = positions.size
    flat = mask.reshape(-1)
    old = flat & _had(positions, flat.size)
    new = flat & ~old
    free = capacity - jnp.sum(old, dtype=jnp.int32)
    keep = old | (new & (jnp.cumsum(new, dtype=jnp.int32) <= free))
    return compacted(keep, capacity).reshape(positions.shape)


def remain(positions: jax.Array, mask: jax.Array, capacity: int) -> jax.Array:
    """Returns the positions that a mask still keeps, with another capacity.

    Example:
        >>> remain(jnp.array([0, 2, 4], jnp.int32), jnp.array([True, False, False, True]), 2)
        Array([0, 4], dtype=int32)
    """
    flat = mask.reshape(-1)
    shape = (*positions.shape[:-1], capacity)
    return compacted(flat & _had(positions, flat.size), capacity).reshape(shape)


def compacted(keep: jax.Array, capacity: int) -> jax.Array:
    """Lists the True entries of a vector in order; padding is its size.

    Args:
        keep: bool [size] with at most `capacity` True entries.
        capacity: length of the list.

    Returns:
        int32 [capacity].

    Example:
        >>> compacted(jnp.array([False, True, True]), 3)
        Array([1, 2, 3], dtype=int32)
    """
    rank = jnp.cumsum(keep, dtype=jnp.int32) - 1
    places = jnp.where(keep, rank, capacity)
    own = jnp.arange(keep.size, dtype=jnp.int32)
    return jnp.full(capacity, keep.size, jnp.int32).at[places].set(own, mode="drop")


def gather(leaf: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the entries of a leaf at positions, and 0 as padding."""
    flat = jnp.reshape(leaf, -1)
    return flat.at[positions].get(mode="fill", fill_value=0, indices_are_sorted=True)


def scatter(values: jax.Array, positions: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns an array of a shape with values at positions, and 0 elsewhere."""
    flat = jnp.zeros(math.prod(shape), values.dtype)
    flat = flat.at[positions.reshape(-1)].set(values.reshape(-1), mode="drop")
    return flat.reshape(shape)


def moved(old: jax.Array, new: jax.Array, size: int) -> Any:
    """Returns a function that moves values from old positions to new ones.

    Args:
        old: int32 [..., capacity], sorted.
        new: int32 [..., other capacity], sorted.
        size: the padding of both.

    Returns:
        Function `(values at old positions, values for the others) -> values at new positions`.

    Example:
        >>> move = moved(jnp.array([1, 5, 9]), jnp.array([5, 7, 9]), 9)
        >>> move(jnp.array([10.0, 50.0, 0.0]), jnp.array([-1.0, -2.0, -3.0])).tolist()
        [50.0, -2.0, -3.0]
    """
    before, after = old.reshape(-1), new.reshape(-1)
    index = jnp.minimum(jnp.searchsorted(before, after), before.size - 1)
    has_moved = (before[index] == after) & (after < size)

    def move(values: jax.Array, others: jax.Array) -> jax.Array:
        result = jnp.where(has_moved, values.reshape(-1)[index], others.reshape(-1))
        return result.astype(values.dtype).reshape(new.shape)

    return move


def owners(state: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[str | None]:
    """Finds the packed leaf that each array of a state mirrors.

    Its path ends with that of the parameter, the longest one, and it has the packed shape.

    Args:
        state: state of the inner optimizer.
        shapes: packed shapes by path of the parameter.

    Returns:
        A path or None for each leaf of the state, in flattening order.

    Example:
        >>> owners({"count": 0, "mu": {"w": jnp.zeros((1, 8))}}, {"w": (1, 8)})
        [None, 'w']
    """

    def owner(path: str, leaf: Any) -> str | None:
        own = ending(path, shapes)
        return own if own is not None and jnp.shape(leaf) == shapes[own] else None

    return [owner(path, leaf) for path, leaf in trees.leaves_with_paths(state)]


def ending(path: str, paths: Mapping[str, Any]) -> str | None:
    """Returns the longest of some paths with which a path ends, or None."""
    parts = path.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts) + 1))
    return next((end for end in ends if end in paths), None)


def _had(positions: jax.Array, size: int) -> jax.Array:
    """Returns whether each entry of the flattened leaf has a position, bool [size]."""
    return jnp.zeros(size, bool).at[positions.reshape(-1)].set(True, mode="drop")
