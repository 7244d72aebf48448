"""Products and convolutions with masked kernels, as masked dense operations."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "ConvolutionIndices",
    "ProductIndices",
    "available",
    "convolution_indices",
    "pack",
    "product_indices",
    "sparse_convolution",
    "sparse_product",
    "unpack",
]


class ProductIndices(NamedTuple):
    """The kept entries of a matrix [K, N], as arrays; masks are data."""

    positions: jax.Array  # int32 [capacity], flat positions, ascending; K * N where there is none
    size: jax.Array  # bool [K, N], True where an entry is kept


class ConvolutionIndices(NamedTuple):
    """The kept entries of a kernel [H, W, C, N], as arrays; masks are data."""

    positions: jax.Array
    size: jax.Array


def available() -> str | None:
    """Returns None if native operations run here; otherwise why not."""
    return None


def product_indices(mask: Any, *, capacity: int | None = None) -> ProductIndices:
    """Returns the indices of a mask bool [K, N] with room for `capacity` entries."""
    return ProductIndices(*_indices(mask, capacity))


def convolution_indices(mask: Any, *, capacity: int | None = None) -> ConvolutionIndices:
    """Returns the indices of a mask bool [H, W, C, N] with room for `capacity` entries."""
    return ConvolutionIndices(*_indices(mask, capacity))


def _indices(mask: Any, capacity: int | None) -> tuple[jax.Array, jax.Array]:
    mask = np.asarray(mask)
    found = np.flatnonzero(mask)
    room = len(found) if capacity is None else capacity
    if room < len(found):
        raise ValueError(f"`capacity` must be at least {len(found)}, but is {capacity}")
    padded = np.full(room, mask.size, np.int32)
    padded[: len(found)] = found
    return jnp.asarray(padded), jnp.asarray(mask)


def sparse_product(x: jax.Array, kernel: jax.Array, indices: ProductIndices) -> jax.Array:
    """Computes `x [..., K] @ kernel [K, N]` of the kept entries."""
    return x @ _masked(kernel, indices)


def sparse_convolution(
    x: jax.Array,
    kernel: jax.Array,
    indices: ConvolutionIndices,
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> jax.Array:
    """Convolves x [B, H, W, C] with the kept entries of a kernel [H, W, C, N]."""
    return jax.lax.conv_general_dilated(
        x,
        _masked(kernel, indices),
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _masked(kernel: jax.Array, indices: Any) -> jax.Array:
    return jnp.where(indices.size, kernel, 0)


def pack(kernel: jax.Array, indices: Any) -> jax.Array:
    """Returns the kept entries of a kernel, [capacity]."""
    return kernel.reshape(-1).at[indices.positions].get(mode="fill", fill_value=0)


def unpack(values: jax.Array, indices: Any) -> jax.Array:
    """Returns the kernel of packed values."""
    kernel = jnp.zeros(indices.size.size, values.dtype)
    return kernel.at[indices.positions].set(values, mode="drop").reshape(indices.size.shape)
