"""From weights to units and back: pooled scores, masks expanded to the weights."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.patterns._kinds import (
    NM,
    Pattern,
    Shape,
    as_float32,
    block_of,
    unit_shape,
)


def pool(pattern: Pattern, scores: jax.Array, stacked: tuple[int, ...] = ()) -> jax.Array:
    """Pools scores to one for each unit: the mean, maximum or sum over its weights.

    Args:
        pattern: None, blocks or channels.
        scores: floating-point array like the leaf. A NaN makes the score of its unit NaN.
        stacked: axes of the leaf that number copies; no unit crosses them.

    Returns:
        float32 array of `unit_shape`.

    Raises:
        ValueError: if the pattern is N:M or does not fit, or scores are not floating point.

    Example:
        >>> from jaxprune import patterns
        >>> pool(patterns.blocks((2, 2)), jnp.arange(9.0).reshape(3, 3)).tolist()
        [[2.0, 3.5], [6.5, 8.0]]
        >>> pool(patterns.channels(-1, "max"), jnp.arange(9.0).reshape(3, 3)).tolist()
        [[6.0, 7.0, 8.0]]
    """
    scores = as_float32(scores)
    block = _unit_block(pattern, scores.shape, stacked)
    if pattern is None or isinstance(pattern, NM):
        return scores
    if pattern.pool == "max":
        return _reduce(jnp.max, scores, block, fill=-jnp.inf)
    total = _reduce(jnp.sum, scores, block, fill=0.0)
    return total / _entries(block, scores.shape) if pattern.pool == "mean" else total


def expand(
    pattern: Pattern, unit_mask: jax.Array, shape: Shape, stacked: tuple[int, ...] = ()
) -> jax.Array:
    """Expands the mask of a leaf's units to the mask of its weights.

    Args:
        pattern: None, blocks or channels.
        unit_mask: bool array of `unit_shape(pattern, shape, stacked)`.
        shape: the shape of the leaf.
        stacked: as in `pool`.

    Returns:
        bool array of `shape`.

    Raises:
        ValueError: if the pattern is N:M or does not fit, or `unit_mask` has a different shape.

    Example:
        >>> from jaxprune import patterns
        >>> expand(patterns.blocks((1, 2)), jnp.array([[True, False]]), (1, 3)).tolist()
        [[True, True, False]]
    """
    block = _unit_block(pattern, shape, stacked)
    units = unit_shape(pattern, shape, stacked)
    if unit_mask.shape != units:
        raise ValueError(
            f"`unit_mask` must have the shape {units} of the units of a leaf of shape {shape}, "
            f"but has {unit_mask.shape}."
        )
    steps = zip(units, block, strict=True)
    split = jnp.reshape(unit_mask, [size for n in units for size in (n, 1)])
    spread = jnp.broadcast_to(split, [size for pair in steps for size in pair])
    whole = spread.reshape([n * step for n, step in zip(units, block, strict=True)])
    return jax.lax.slice(whole, (0,) * len(shape), shape)


def any_kept(pattern: Pattern, mask: jax.Array, stacked: tuple[int, ...] = ()) -> jax.Array:
    """Returns which units contain a kept weight; undoes `expand`.

    Args:
        pattern: None, blocks or channels.
        mask: bool array like the leaf.
        stacked: as in `pool`.

    Returns:
        bool array of `unit_shape`.

    Raises:
        ValueError: if the pattern is N:M or does not fit.

    Example:
        >>> from jaxprune import patterns
        >>> any_kept(patterns.blocks((1, 2)), jnp.array([[False, True, False]])).tolist()
        [[True, False]]
    """
    mask = jnp.asarray(mask, bool)
    return _reduce(jnp.any, mask, _unit_block(pattern, mask.shape, stacked), fill=False)


def _unit_block(pattern: Pattern, shape: Shape, stacked: tuple[int, ...]) -> Shape:
    """Returns the size of a unit along each dimension; raises for N:M, which has no units."""
    if isinstance(pattern, NM):
        raise ValueError(f"`pattern` must have units, but is {pattern}; use `n_m_mask`.")
    return block_of(pattern, shape, stacked)


def _reduce(reduction: Callable[..., jax.Array], x: jax.Array, block: Shape, fill: Any) -> Any:
    """Reduces each block to one entry; smaller blocks at the edges are padded with `fill`."""
    if math.prod(block) == 1:
        return x
    units = [-(-size // step) for size, step in zip(x.shape, block)]
    missing = [n * step - size for n, step, size in zip(units, block, x.shape)]
    if any(missing):
        x = jnp.pad(x, [(0, gap) for gap in missing], constant_values=fill)
    x = x.reshape([size for pair in zip(units, block) for size in pair])
    return reduction(x, axis=tuple(range(1, x.ndim, 2)))


def _entries(block: Shape, shape: Shape) -> int | jax.Array:
    """Counts the weights of each block, fewer at the edges; broadcastable to the units."""
    count: int | jax.Array = 1
    for axis, (step, size) in enumerate(zip(block, shape)):
        if size % step:
            along = [1] * len(shape)
            along[axis] = -(-size // step)
            first = step * jax.lax.broadcasted_iota(jnp.int32, along, axis)
            count = count * jnp.minimum(step, size - first)
        else:
            count = count * step
    return count
