"""The inputs of a kernel: the other operand of its product, as rows of features."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["rows_of_features"]


def rows_of_features(
    equation: Any, other: jax.Array, shape: tuple[int, ...], side: int
) -> jax.Array:
    """Returns the inputs of a kernel, float32 [groups, rows, features], in its matrices' order.

    `shape` is the shape of the kernel in the equation, `side` its position: 0 left, 1 right.
    """
    kind = {"dot_general": _product, "conv_general_dilated": _convolution}
    inputs = kind[equation.primitive.name](equation.params, other, shape, side)
    return inputs.astype(jnp.float32)


def _product(
    parameters: dict[str, Any], other: jax.Array, shape: tuple[int, ...], side: int
) -> jax.Array:
    """Arranges inputs of `dot_general`: features are contracting axes, groups are batch axes."""
    contracting, batch = parameters["dimension_numbers"]
    # Features have the order of the kernel's axes, whatever their order in the equation.
    features = [a for _, a in sorted(zip(contracting[side], contracting[1 - side], strict=True))]
    groups = list(batch[1 - side])
    rows = [a for a in range(other.ndim) if a not in (*features, *groups)]
    sizes = [math.prod(other.shape[a] for a in axes) for axes in (groups, rows, features)]
    return other.transpose(*groups, *rows, *features).reshape(sizes)


def _convolution(
    parameters: dict[str, Any], other: jax.Array, shape: tuple[int, ...], side: int
) -> jax.Array:
    """Arranges inputs of a convolution: features are window positions times input channels."""
    del side
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
