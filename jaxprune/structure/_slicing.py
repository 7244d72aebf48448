"""What a plan leaves of one array, wherever the array lies."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding


def take(array: Any, kept: Sequence[np.ndarray]) -> Any:
    """The entries that stay; on several devices they are split as the array was.

    Args:
        array: of any dtype.
        kept: bools for each dimension.

    Returns:
        A smaller array.

    Example:
        >>> take(jnp.arange(6).reshape(2, 3), [np.ones(2, bool), np.arange(3) < 2]).tolist()
        [[0, 1], [3, 4]]
    """
    if all(own.all() for own in kept):
        return array
    sharding = named_sharding(array)
    if is_on_one_cpu(array):  # as fast there, with nothing to compile for each shape
        host = np.asarray(array)
        for dimension, own in enumerate(kept):
            host = host if own.all() else np.compress(own, host, axis=dimension)
        return jax.device_put(host, array.sharding if array.committed else None)
    for dimension, own in enumerate(kept):
        if own.all():
            continue
        places = np.flatnonzero(own)
        if sharding is not None and is_explicit(sharding):
            index = (slice(None),) * dimension + (places,)
            array = array.at[index].get(out_sharding=sharding)
        else:
            array = jnp.take(array, places, axis=dimension)
    is_concrete = not isinstance(array, Tracer)
    return jax.device_put(array, sharding) if sharding is not None and is_concrete else array


def zero(array: Any, kept: Sequence[np.ndarray]) -> Any:
    """The array with zeros at what goes.

    Args:
        array: of any dtype.
        kept: bools for each dimension.

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
    """Why an array of this shape cannot be split over devices as a larger one is; None if it can.

    Args:
        array: the larger one.
        shape: of the smaller one.

    Returns:
        A sentence without its subject.

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
            return f"dimension {dimension} keeps {size}, to be split in {parts} over {over}"
    return None


def named_sharding(array: Any) -> NamedSharding | None:
    """How an array is split over several devices, if it is."""
    sharding = getattr(array, "sharding", None)
    if isinstance(array, Tracer):
        sharding = jax.typeof(array).sharding
        return sharding if is_explicit(sharding) else None
    several = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return sharding if several else None


def is_on_one_cpu(array: Any) -> bool:
    """Whether it is an array of numbers that NumPy can read where it lies."""
    is_array = isinstance(array, jax.Array) and not isinstance(array, Tracer)
    if not is_array or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return False
    (device, *others) = array.devices()
    return not others and device.platform == "cpu"


def is_explicit(sharding: NamedSharding) -> bool:
    """Whether the types of arrays say how they are split."""
    return AxisType.Explicit in sharding.mesh.axis_types
