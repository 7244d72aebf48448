"""Products and convolutions as rows of input features times a matrix, in the layout of both.

Each reader takes the parameters of an equation, the operand that is not the kernel, the shape of
the kernel and its side (0 left, 1 right). It returns the steps that bring the kernel into
matrices [groups, features, outputs] and the inputs as [groups, rows, features]; or the reason why
it cannot.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["READERS"]

Step = tuple[tuple[int, ...], tuple[int, ...]]  # permutation, then shape
Reading = tuple[list[Step], jax.Array]


def _product(
    parameters: dict[str, Any], other: jax.Array, shape: tuple[int, ...], side: int
) -> Reading | str:
    """`dot_general`: contracting axes are features, batch axes groups, what is left outputs."""
    contracting, batch = parameters["dimension_numbers"]
    # Features in the order of the kernel's axes, whatever the order in the equation.
    pairs = sorted(zip(contracting[side], contracting[1 - side], strict=True))
    features, other_features = [a for a, _ in pairs], [a for _, a in pairs]
    groups, other_groups = list(batch[side]), list(batch[1 - side])
    outputs = [a for a in range(len(shape)) if a not in (*features, *groups)]
    rows = [a for a in range(other.ndim) if a not in (*other_features, *other_groups)]

    sizes = tuple(math.prod(shape[a] for a in axes) for axes in (groups, features, outputs))
    count = math.prod(other.shape[a] for a in rows)
    inputs = other.transpose(*other_groups, *rows, *other_features)
    steps = [((*groups, *features, *outputs), sizes)]
    return steps, inputs.reshape(sizes[0], count, sizes[1]).astype(jnp.float32)


def _convolution(
    parameters: dict[str, Any], other: jax.Array, shape: tuple[int, ...], side: int
) -> Reading | str:
    """`conv_general_dilated`: features are window positions, row-major, times input channels."""
    if side == 0:
        return "is the image of a convolution, not its kernel"
    if parameters["batch_group_count"] != 1:
        return "is the kernel of a convolution with `batch_group_count`"
    image, kernel, _ = parameters["dimension_numbers"]  # each: batch or output, channels, spatial
    groups = parameters["feature_group_count"]
    window = tuple(shape[axis] for axis in kernel[2:])
    channels, outputs = shape[kernel[1]], shape[kernel[0]] // groups
    features = math.prod(window) * channels

    patches = _patches(other.transpose(image[0], *image[2:], image[1]), window, parameters)
    patches = patches.reshape(-1, math.prod(window), groups, channels).transpose(2, 0, 1, 3)
    # The groups are consecutive runs of the output channels.
    steps = [
        ((*kernel[2:], kernel[1], kernel[0]), (features, groups, outputs)),
        ((1, 0, 2), (groups, features, outputs)),
    ]
    return steps, patches.reshape(groups, -1, features).astype(jnp.float32)


def _patches(image: jax.Array, window: tuple[int, ...], parameters: dict[str, Any]) -> jax.Array:
    """What each window sees: [batch, *spatial, channels] -> [batch, *out, windows, channels]."""
    # Slices of the padded image: `conv_general_dilated_patches` would multiply by ones.
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


READERS = {"dot_general": _product, "conv_general_dilated": _convolution}
