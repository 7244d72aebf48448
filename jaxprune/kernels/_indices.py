"""Masks as lists of indices, and kernels as the values of kept weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

LARGEST = 2**31 - 1  # positions are int32


class ProductIndices(NamedTuple):
    """The kept weights of a kernel [K, N], from `product_indices`; arrays only.

    Kept weights are numbered in the order of the flattened kernel. Entries from the number of kept
    weights, which is the last of `starts`, to the capacity are padding that nothing reads.

    Example:
        >>> product_indices(np.array([[True, False], [True, True]])).outputs
        Array([0, 0, 1], dtype=int32)
    """

    mask: jax.Array  # bool [K, N]
    positions: jax.Array  # int32 [capacity]: place in the flattened kernel; padding: K * N
    starts: jax.Array  # int32 [K + 1]: the first kept weight of each input
    outputs: jax.Array  # int32 [capacity]: output of each weight


class ConvolutionIndices(NamedTuple):
    """The kept weights of a kernel [H, W, C, N], from `convolution_indices`; arrays only.

    Kept weights are numbered by output channel, input channel and position in the window. Entries
    from `count` to the capacity are padding that nothing reads.

    Example:
        >>> convolution_indices(np.ones((1, 3, 1, 1), bool)).taps
        Array([0, 1, 2], dtype=int32)
    """

    mask: jax.Array  # bool [H, W, C, N]
    positions: jax.Array  # int32 [capacity]: place in the flattened kernel; padding: H * W * C * N
    taps: jax.Array  # int32 [capacity]: row in the window * W + column
    inputs: jax.Array  # int32 [capacity]: input channel
    outputs: jax.Array  # int32 [capacity]: output channel
    count: jax.Array  # int32 []: kept weights


def product_indices(mask: Any, *, capacity: int | None = None) -> ProductIndices:
    """Lists the kept weights of a kernel [K, N], on the host.

    Args:
        mask: bool [K, N], True where a weight is kept; NumPy or a concrete JAX array.
        capacity: entries of the lists. Masks of the same shape and capacity give arrays of the same
            shapes, so a function that takes them as arguments is not compiled again. None is the
            number of kept weights.

    Returns:
        The indices.

    Raises:
        ValueError: if the mask is not bool of rank 2 or is traced, or does not fit `capacity`.

    Example:
        >>> own = product_indices(np.eye(3, dtype=bool), capacity=4)
        >>> own.positions
        Array([0, 4, 8, 9], dtype=int32)
    """
    mask = _checked(mask, 2, "[K, N]")
    positions = np.flatnonzero(mask)
    capacity = _capacity(capacity, len(positions))
    return ProductIndices(
        jnp.asarray(mask),
        _padded(positions, capacity, mask.size),
        jnp.asarray(np.concatenate([[0], np.cumsum(mask.sum(1))]), jnp.int32),
        _padded(positions % max(mask.shape[1], 1), capacity),
    )


def convolution_indices(mask: Any, *, capacity: int | None = None) -> ConvolutionIndices:
    """Lists the kept weights of a convolution kernel [H, W, C, N], on the host.

    Args:
        mask: bool [H, W, C, N], True where a weight is kept; NumPy or a concrete JAX array.
        capacity: entries of the lists, as in `product_indices`.

    Returns:
        The indices.

    Raises:
        ValueError: if the mask is not bool of rank 4 or is traced, or does not fit `capacity`.

    Example:
        >>> mask = np.zeros((3, 3, 2, 4), bool)
        >>> mask[1, 1] = True
        >>> int(convolution_indices(mask, capacity=10).count)
        8
    """
    mask = _checked(mask, 4, "[H, W, C, N]")
    outputs, inputs, rows, columns = np.nonzero(mask.transpose(3, 2, 0, 1))
    capacity = _capacity(capacity, len(inputs))
    positions = np.ravel_multi_index((rows, columns, inputs, outputs), mask.shape)
    return ConvolutionIndices(
        jnp.asarray(mask),
        _padded(positions, capacity, mask.size),
        _padded(rows * mask.shape[1] + columns, capacity),
        _padded(inputs, capacity),
        _padded(outputs, capacity),
        jnp.asarray(len(inputs), jnp.int32),
    )


def pack(kernel: Any, indices: ProductIndices | ConvolutionIndices) -> jax.Array:
    """Returns the kept weights of a kernel, with 0 as padding.

    Args:
        kernel: an array of the shape of the mask.
        indices: the indices of the mask.

    Returns:
        The values, of shape [capacity] and the dtype of the kernel.

    Raises:
        ValueError: if the kernel has a different shape from the mask.

    Example:
        >>> indices = product_indices(np.array([[True, False], [True, True]]), capacity=4)
        >>> pack(jnp.array([[1.0, 2.0], [3.0, 4.0]]), indices)
        Array([1., 3., 4., 0.], dtype=float32)
    """
    check_kernel(kernel, indices)
    flat = jnp.asarray(kernel).reshape(-1)
    return flat.at[indices.positions].get(mode="fill", fill_value=0)


def unpack(values: Any, indices: ProductIndices | ConvolutionIndices) -> jax.Array:
    """Returns the dense kernel of packed values, with 0 where a weight is not kept.

    Args:
        values: an array [capacity] from `pack`, or one that was computed from it.
        indices: the indices of the mask.

    Returns:
        The kernel, of the shape of the mask and the dtype of the values.

    Raises:
        ValueError: if there is not one value for each entry of the indices.

    Example:
        >>> indices = product_indices(np.array([[True, False], [True, True]]))
        >>> unpack(jnp.array([1.0, 3.0, 4.0]), indices)
        Array([[1., 0.],
               [3., 4.]], dtype=float32)
    """
    check_values(values, indices)
    flat = jnp.zeros(indices.mask.size, jnp.result_type(values))
    flat = flat.at[indices.positions].set(values, mode="drop", unique_indices=False)
    return flat.reshape(indices.mask.shape)


def check_kernel(kernel: Any, indices: ProductIndices | ConvolutionIndices) -> None:
    """Raises unless a kernel has the shape of the mask."""
    if jnp.shape(kernel) != indices.mask.shape:
        raise ValueError(
            f"`kernel` must have the shape {indices.mask.shape} of the mask in `indices`, but has "
            f"{jnp.shape(kernel)}; make indices of a mask of this kernel"
        )


def check_values(values: Any, indices: ProductIndices | ConvolutionIndices) -> None:
    """Raises unless there is one value for each entry."""
    if jnp.shape(values) != indices.positions.shape:
        raise ValueError(
            f"`values` must have the shape {indices.positions.shape} of the entries in `indices`, "
            f"but has {jnp.shape(values)}; make values with `pack(kernel, indices)`"
        )


def _checked(mask: Any, rank: int, shape: str) -> np.ndarray:
    """Returns a mask as a NumPy array, or raises."""
    if isinstance(mask, Tracer):
        raise ValueError(
            "`mask` must be concrete, but is traced: the number of kept weights decides shapes. "
            "Make indices outside of jitted code and pass them as arguments."
        )
    mask = np.asarray(mask)
    if mask.ndim != rank or mask.dtype != bool:
        raise ValueError(
            f"`mask` must be bool {shape}, but is {mask.dtype} of shape {mask.shape}; give the "
            "mask of one kernel"
        )
    if mask.size > LARGEST:
        raise ValueError(
            f"`mask` must have at most {LARGEST} entries, but has {mask.size}; split the kernel"
        )
    return mask


def _capacity(capacity: int | None, count: int) -> int:
    """Returns the number of entries of the lists, or raises."""
    if capacity is None:
        return count
    if capacity < count:
        raise ValueError(
            f"`capacity` must be at least the {count} kept weights of `mask`, but is {capacity}; "
            "give a larger one"
        )
    return capacity


def _padded(entries: np.ndarray, capacity: int, padding: int = 0) -> jax.Array:
    """Returns int32 entries with padding up to the capacity."""
    full = np.full(capacity, padding, np.int32)
    full[: len(entries)] = entries
    return jnp.asarray(full)
