"""Slices one array as a plan says, on whichever devices the array lies."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding


def take(array: Any, kept: Sequence[np.ndarray]) -> Any:
    """Takes the kept entries; over several devices they are split as the array was.

    Args:
        array: array of any dtype.
        kept: bool [size] for each dimension.

    Returns:
        The smaller array.

    Example:
        >>> take(jnp.arange(6).reshape(2, 3), [np.ones(2, bool), np.arange(3) < 2]).tolist()
        [[0, 1], [3, 4]]
    """
    if all(own.all() for own in kept):
        return array
    sharding = named_sharding(array)
    if is_on_one_cpu(array):  # NumPy is as fast there and compiles nothing for each shape
        host = np.asarray(array)
        for dimension, own in enumerate(kept):
            host = host if own.all() else np.compress(own, host, axis=dimension)
        return jax.device_put(host, array.sharding if array.committed else None)
    for dimension, own in enumerate(kept):
        if own.all():
            continue
        array = pick(array, np.flatnonzero(own), dimension)
    is_concrete = not isinstance(array, Tracer)
    return jax.device_put(array, sharding) if sharding is not None and is_concrete else array


def pick(array: Any, places: np.ndarray, dimension: int) -> Any:
    """Takes the entries at some places of a dimension, split over devices as before.

    Args:
        array: array of any dtype.
        places: int [n].
        dimension: the dimension.

    Returns:
        The smaller array.

    Example:
        >>> pick(jnp.arange(6).reshape(2, 3), np.array([0, 2]), 1).tolist()
        [[0, 2], [3, 5]]
    """
    sharding = jax.typeof(array).sharding
    if not is_explicit(sharding):
        return jnp.take(array, places, axis=dimension)
    index = (slice(None),) * dimension + (places,)
    return jnp.asarray(array).at[index].get(out_sharding=sharding)


def zero(array: Any, kept: Sequence[np.ndarray]) -> Any:
    """Sets the entries that are not kept to 0.

    Args:
        array: array of any dtype.
        kept: bool [size] for each dimension.

    Returns:
        An array of the same shape.

    Example:
        >>> zero(jnp.arange(3), [np.array([True, False, True])]).tolist()
        [0, 0, 2]
    """
    for dimension, own in enumerate(kept):
        if not own.all():
            shape = [-1 if d == dimension else 1 for d in range(array.ndim)]
            array = jnp.where(own.reshape(shape), array, jnp.zeros_like(array))
    return array


def uneven(array: Any, shape: Sequence[int]) -> str | None:
    """Explains why a smaller array cannot be split over devices like a larger one.

    Args:
        array: the larger array.
        shape: shape of the smaller array.

    Returns:
        The reason, for the end of an error line, or None if the array can be split.

    Example:
        >>> uneven(np.ones(3), (2,)) is None
        True
    """
    sharding = named_sharding(array)
    if sharding is None:
        return None
    for dimension, (axes, size) in enumerate(zip(sharding.spec, shape, strict=False)):
        names = axes if isinstance(axes, tuple) else (axes,) if isinstance(axes, str) else ()
        parts = math.prod(sharding.mesh.shape[name] for name in names)
        if size % parts:
            over = ", ".join(names)
            return f"dimension {dimension} keeps {size}, to be split into {parts} over {over}"
    return None


def named_sharding(array: Any) -> NamedSharding | None:
    """Returns how an array is split over several devices, or None if it is not."""
    sharding = getattr(array, "sharding", None)
    if isinstance(array, Tracer):
        sharding = jax.typeof(array).sharding
        return sharding if is_explicit(sharding) else None
    several = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return sharding if several else None


def is_on_one_cpu(array: Any) -> bool:
    """Tells whether an array of numbers lies on one CPU, where NumPy can read it in place."""
    is_array = isinstance(array, jax.Array) and not isinstance(array, Tracer)
    if not is_array or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return False
    (device, *others) = array.devices()
    return not others and device.platform == "cpu"


def is_explicit(sharding: NamedSharding) -> bool:
    """Tells whether the types of arrays say how they are split (explicit sharding)."""
    return AxisType.Explicit in sharding.mesh.axis_types
