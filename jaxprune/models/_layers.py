"""Convolutions and normalisations that the convolutional networks are built of."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

__all__ = [
    "ConvNorm", "Layers", "check_arguments", "check_images", "make_layers", "shifted_depthwise",
]  # fmt: skip

_Arrays = TypeVar("_Arrays", bound=tuple)


class Layers(NamedTuple):
    """The builders of a network's layers, with the network's options."""

    conv: Callable[..., nnx.Conv]
    norm: Callable[..., nnx.BatchNorm]
    shifted: bool = False  # whether depthwise convolutions are sums of shifted images


def make_layers(
    *,
    padding: str | None = None,
    shifted: bool = False,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    dtype: DTypeLike,
    axis_name: str | None,
    rngs: nnx.Rngs,
) -> Layers:
    """Returns the builders of a network.

    Args:
        padding: None pads both sides of an image by half a window, so that its centre stays in
            place; "SAME" is TensorFlow's, which pads the end more than the start at stride 2.
        shifted: whether depthwise convolutions are computed by `shifted_depthwise`.
        momentum: how much of the running statistics a training step keeps.
        epsilon: what is added to a variance.
        dtype: dtype of the computation.
        axis_name: mapped axis over which to average batch statistics.
        rngs: source of the initial parameters.
    """
    return Layers(
        partial(_conv, padding=padding, dtype=dtype, rngs=rngs),
        partial(
            _norm,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            axis_name=axis_name,
            rngs=rngs,
        ),
        shifted,
    )


class ConvNorm(nnx.Module):
    """A convolution without bias and its normalisation."""

    def __init__(
        self,
        layers: Layers,
        in_width: int,
        out_width: int,
        size: int,
        stride: int = 1,
        groups: int = 1,
    ):
        self.conv = layers.conv(in_width, out_width, size, stride, groups)
        self.norm = layers.norm(out_width)
        self.shifted = layers.shifted and groups == in_width == out_width

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.shifted:
            kernel = self.conv.kernel[...].astype(x.dtype)
            return self.norm(shifted_depthwise(x, kernel, self.conv.strides, self.conv.padding))
        return self.norm(self.conv(x))


def shifted_depthwise(
    images: jax.Array, kernel: jax.Array, strides: Any, padding: Any
) -> jax.Array:
    """Computes a depthwise convolution as a sum of shifted images, each times a row of weights.

    XLA:CPU has no fast depthwise convolution: a training step of MobileNetV1 of half width, with
    64 images of 64 x 64 pixels, takes a third of the time like this (0.25 s instead of 0.74).

    Args:
        images: [B, H, W, C].
        kernel: [height, width, 1, C].
        strides: an integer or one for each of the two axes.
        padding: "SAME", an integer, or pairs, as in `nnx.Conv`.

    Returns:
        What the convolution with `feature_group_count=C` does, up to rounding.
    """
    window = kernel.shape[:2]
    strides = (strides, strides) if isinstance(strides, int) else tuple(strides)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(images.shape[1:3], window, strides, padding)
    elif isinstance(padding, int):
        padding = [(padding, padding)] * 2
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    sizes = [
        (full - size) // stride + 1
        for full, size, stride in zip(images.shape[1:3], window, strides, strict=True)
    ]
    terms = [
        kernel[row : row + 1, column : column + 1]
        * images[
            :,
            row : row + (sizes[0] - 1) * strides[0] + 1 : strides[0],
            column : column + (sizes[1] - 1) * strides[1] + 1 : strides[1],
        ]
        for row in range(window[0])
        for column in range(window[1])
    ]
    return sum(terms[1:], start=terms[0])


def check_arguments(num_classes: int, in_channels: int, dtype: DTypeLike) -> Any:
    """Returns the dtype; raises unless all three arguments of a network are usable."""
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"`{argument}` must be at least 1; got {value}.")
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be floating, such as jnp.bfloat16; got {dtype}.")
    return dtype


def check_images(images: jax.Array, in_channels: int) -> None:
    """Raises unless `images` are floating [B, H, W, in_channels]."""
    if images.ndim != 4 or images.shape[-1] != in_channels:
        raise ValueError(
            f"`images` must be [B, H, W, {in_channels}]; got shape {images.shape}. "
            "Put the channels last, or build the network with a different `in_channels`."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"`images` must be floating; got {images.dtype}. Normalise them first.")


def _keep_dtypes(args: _Arrays, /, *, dtype: Any = None, inexact: bool = True) -> _Arrays:
    """Replaces the promotion of `nnx.BatchNorm`, which rounds running statistics to `dtype`."""
    return args


def _he_normal(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, *, groups: int = 1
) -> jax.Array:
    """Draws normal numbers with variance 2 / fan-out, for kernels [height, width, in, out]."""
    height, width, _, fan_out = shape
    # Draw flat: the values are the same, and XLA:CPU compiles a draw of rank 1 five times faster.
    draws = jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
    return math.sqrt(2 * groups / (height * width * fan_out)) * draws


def _conv(
    in_width: int,
    out_width: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    *,
    padding: str | None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Makes a `size` x `size` convolution without bias."""
    return nnx.Conv(
        in_width,
        out_width,
        (size, size),
        strides=stride,
        padding=size // 2 if padding is None else padding,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=partial(_he_normal, groups=groups),
        dtype=dtype,
        rngs=rngs,
    )


def _norm(
    width: int,
    scale: float = 1.0,
    *,
    momentum: float,
    epsilon: float,
    dtype: DTypeLike,
    axis_name: str | None,
    rngs: nnx.Rngs,
) -> nnx.BatchNorm:
    """Makes a batch normalisation with float32 statistics whose scale starts at `scale`."""
    return nnx.BatchNorm(
        width,
        momentum=momentum,
        epsilon=epsilon,
        scale_init=nnx.initializers.constant(scale),
        dtype=dtype,
        promote_dtype=_keep_dtypes,
        axis_name=axis_name,
        rngs=rngs,
    )
