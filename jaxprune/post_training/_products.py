"""The inputs of a kernel: the other operand of its product, as rows of features."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import layouts

__all__ = ["statistic_of"]

Statistic = Callable[[jax.Array], jax.Array]


def statistic_of(use: layouts.Use, statistic: Statistic) -> tuple[jax.Array, int]:
    """Computes a statistic of the inputs of a kernel, and counts their rows.

    Of kernels that an index picks, each copy gets the inputs of its own rows. The copies are
    visited one after the other, with rows of zeros in place of those of other copies, so that
    memory does not grow with their number; rows of zeros add nothing to a statistic.

    Args:
        use: the product.
        statistic: function from float32 [groups, rows, features] to [groups, ...], a sum over
            rows.

    Returns:
        The statistic, with the groups of the kernel's matrices in their order, and the number of
        rows; with an index, of the rows of all copies together.
    """
    name, parameters = use.equation.primitive.name, use.equation.params
    if name == "ragged_dot_general":
        return _of_ragged(parameters, use.operands, statistic)
    kernel, other = use.operands[use.side], use.operands[1 - use.side]
    if name == "conv_general_dilated":
        inputs = _convolution(parameters, other, kernel.shape).astype(jnp.float32)
    else:
        inputs = _product(parameters, other, use.side).astype(jnp.float32)
    if use.index is None:
        return statistic(inputs), inputs.shape[1]
    if len(use.index) == 1:
        value = statistic(inputs)
        every = jnp.zeros((use.copies, *value.shape), value.dtype).at[use.index[0]].set(value)
        return _joined(every), inputs.shape[1]
    batch = parameters["dimension_numbers"][1][use.side]
    inputs = inputs.reshape(*(kernel.shape[axis] for axis in batch), *inputs.shape[1:])
    # A dimension of picks that the inputs lack: all its picks see the same inputs.
    missing = [axis for axis in use.picks if axis not in batch]
    inputs = jnp.broadcast_to(inputs, (*(kernel.shape[axis] for axis in missing), *inputs.shape))
    order = [(*missing, *batch).index(axis) for axis in use.picks]
    rest = [axis for axis in range(inputs.ndim) if axis not in order]
    inputs = inputs.transpose(*order, *rest)
    inputs = inputs.reshape(len(use.index), -1, *inputs.shape[-2:])
    return _by_copy(inputs, use.index, use.copies, statistic)


def _by_copy(
    inputs: jax.Array, index: jax.Array, copies: int, statistic: Statistic
) -> tuple[jax.Array, int]:
    """Computes the statistic of each copy from inputs [picks, groups, rows, features]."""
    picks, groups, rows, features = inputs.shape

    def of_copy(copy: jax.Array) -> jax.Array:
        own = jnp.where((index == copy)[:, None, None, None], inputs, 0)
        return statistic(own.transpose(1, 0, 2, 3).reshape(groups, picks * rows, features))

    return _joined(jax.lax.map(of_copy, jnp.arange(copies))), picks * rows


def _joined(value: jax.Array) -> jax.Array:
    """Joins the first two axes, copies and groups."""
    return value.reshape(-1, *value.shape[2:])


def _of_ragged(
    parameters: dict[str, Any], operands: Any, statistic: Statistic
) -> tuple[jax.Array, int]:
    """Computes the statistic for `ragged_dot`, whose rows are sorted by the kernel they meet."""
    numbers = parameters["ragged_dot_dimension_numbers"]
    (contracting, _), (ragged,) = numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions
    other, sizes = operands[0].astype(jnp.float32), operands[2]
    features = [axis for _, axis in sorted(zip(contracting[1], contracting[0], strict=True))]
    rest = [axis for axis in range(other.ndim) if axis not in (ragged, *features)]
    count, width = other.shape[ragged], math.prod(other.shape[axis] for axis in features)
    inputs = other.transpose(ragged, *rest, *features).reshape(count, 1, -1, width)
    # Rows after the last group belong to none.
    index = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(count), side="right")
    return _by_copy(inputs, index, len(sizes), statistic)


def _product(parameters: dict[str, Any], other: jax.Array, side: int) -> jax.Array:
    """Arranges inputs of `dot_general`: features are contracting axes, groups are batch axes."""
    contracting, batch = parameters["dimension_numbers"]
    # Features have the order of the kernel's axes, whatever their order in the equation.
    features = [a for _, a in sorted(zip(contracting[side], contracting[1 - side], strict=True))]
    groups = list(batch[1 - side])
    rows = [a for a in range(other.ndim) if a not in (*features, *groups)]
    sizes = [math.prod(other.shape[a] for a in axes) for axes in (groups, rows, features)]
    return other.transpose(*groups, *rows, *features).reshape(sizes)


def _convolution(parameters: dict[str, Any], other: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Arranges inputs of a convolution: features are window positions times input channels."""
    image, kernel, _ = parameters["dimension_numbers"]  # each: (batch or output, channels, spatial)
    groups = parameters["feature_group_count"]
    window = tuple(shape[axis] for axis in kernel[2:])
    channels = shape[kernel[1]]
    patches = _patches(other.transpose(image[0], *image[2:], image[1]), window, parameters)
    patches = patches.reshape(-1, math.prod(window), groups, channels).transpose(2, 0, 1, 3)
    return patches.reshape(groups, -1, math.prod(window) * channels)


def _patches(image: jax.Array, window: tuple[int, ...], parameters: dict[str, Any]) -> jax.Array:
    """Cuts out windows: [batch, *spatial, channels] -> [batch, *out, positions, channels]."""
    # By slices of the padded image, because `conv_general_dilated_patches` multiplies by ones.
    padding = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(
            parameters["padding"], parameters["lhs_dilation"], strict=True
        )
    ]
    image = jax.lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
    sizes, dilations = np.array(image.shape[1:-1]), np.array(parameters["rhs_dilation"])
    strides = np.array(parameters["window_strides"])
    spans = (sizes - (np.array(window) - 1) * dilations - 1) // strides * strides + 1
    taps = []
    for position in np.ndindex(*window):
        start = np.array(position) * dilations
        begin, end = (0, *start, 0), (image.shape[0], *(start + spans), image.shape[-1])
        taps.append(jax.lax.slice(image, begin, end, (1, *strides, 1)))
    return jnp.stack(taps, axis=-2)
