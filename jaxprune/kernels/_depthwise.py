"""Depthwise convolutions, in which each channel has a window of its own."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import jaxprs, meshes
from jaxprune.kernels import _bilinear
from jaxprune.kernels._convolutions import (
    DIMENSIONS,
    Padding,
    Pair,
    attributes,
    explicit,
    pair_of_strides,
)
from jaxprune.kernels._finishing import Finish

__all__ = ["depthwise_convolution"]


def depthwise_convolution(
    x: Any,
    kernel: Any,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
) -> jax.Array:
    """Returns the convolution of each channel of x with its own window.

    y[b, r, s, c] = sum over i, j of x[b, r * strides[0] + i - padding[0][0], ..., c] *
    kernel[i, j, 0, c], with x = 0 outside of the image. Nothing is left out: a window has few
    weights, and XLA computes such convolutions on CPUs one channel after the other, many times
    slower than this kernel. On other devices, on meshes with explicit axes, and without a compiler
    it is XLA's convolution.
    Derivatives are those in reverse mode, of any order.

    Args:
        x: floats [batch, rows, columns, C]. Narrower ones than float32 are stored as they are and
            summed in float32; float64 is computed by XLA.
        kernel: floats [H, W, 1, C].
        strides: 1 or 2, for rows and columns.
        padding: "SAME", "VALID", or ((low, high), (low, high)), which are not negative.

    Returns:
        An array [batch, rows, columns, C] of the dtype of a dense convolution.

    Raises:
        ValueError: if shapes, strides or padding are not as above.

    Example:
        >>> from jaxprune import kernels
        >>> kernel = jnp.stack([jnp.ones((3, 3, 1)), 2 * jnp.ones((3, 3, 1))], axis=-1)
        >>> kernels.depthwise_convolution(jnp.ones((1, 3, 3, 2)), kernel)[0, 1]
        Array([[ 6., 12.],
               [ 9., 18.],
               [ 6., 12.]], dtype=float32)
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if kernel.ndim != 4 or kernel.shape[2] != 1 or x.ndim != 4 or x.shape[3] != kernel.shape[3]:
        raise ValueError(
            "`kernel` must have the shape [rows, columns, 1, channels] and `x` [batch, rows, "
            f"columns, channels], but they have {kernel.shape} and {x.shape}"
        )
    image, window = x.shape[1:3], kernel.shape[:2]
    own_strides = pair_of_strides(strides)
    own_padding = explicit(padding, image, window, own_strides)
    explicit_axes = any(meshes.is_explicit(jax.typeof(own).sharding) for own in (x, kernel))
    if explicit_axes or not _bilinear.is_supported(x, kernel):
        return _convolve(x, kernel, own_strides, own_padding)
    # Inside `shard_map`, the gradient of weights that shards share is then summed over shards.
    x, kernel = meshes.varying_like((x, kernel), x, kernel)
    apply = _operation(image, window, own_strides, own_padding)
    y = apply(x.astype(jnp.float32), kernel.astype(jnp.float32), ())
    return y.astype(jnp.result_type(x, kernel))


def finished_depthwise(
    x: jax.Array, kernel: jax.Array, finish: Finish, *, strides: Pair, padding: Padding
) -> jax.Array:
    """Returns `finish.apply` of `depthwise_convolution` by one call; all arrays are float32."""
    place = x.shape[1:3], kernel.shape[:2], strides, tuple(map(tuple, padding))
    run = _finished(*place, finish.limits)
    return run(x, kernel, (), *_bilinear.arrays_of(finish))


@functools.lru_cache(maxsize=1024)
def _finished(
    image: Pair, window: Pair, strides: Pair, padding: Padding, limits: Finish
) -> _bilinear.Pass:
    """Returns the convolution that does more to its sums."""
    apply, own = _operation(image, window, strides, padding), attributes(window, strides, padding)
    return _bilinear.finished("jaxprune_depthwise_finished", apply, limits, _operands, **own)


@functools.lru_cache(maxsize=1024)
def _operation(image: Pair, window: Pair, strides: Pair, padding: Padding) -> Any:
    """Returns (x, kernel, ()) -> y for images of one size, with its derivatives."""

    def forward(x: Any, kernel: Any, _: Any) -> jax.Array:
        return _convolve(x, kernel, strides, padding)

    def backward(dy: Any, kernel: Any, _: Any) -> jax.Array:
        x = jaxprs.abstract(dy, (len(dy), *image, kernel.shape[3]))
        run = functools.partial(_convolve, kernel=kernel, strides=strides, padding=padding)
        return jax.linear_transpose(run, x)(dy)[0]

    def sample(x: Any, dy: Any, _: Any) -> jax.Array:
        kernel = jaxprs.abstract(x, (*window, 1, x.shape[3]))
        return jax.linear_transpose(lambda k: _convolve(x, k, strides, padding), kernel)(dy)[0]

    own_attributes = attributes(window, strides, padding)

    def native(name: str, dense: _bilinear.Pass) -> _bilinear.Pass:
        return _bilinear.native(f"jaxprune_depthwise_{name}", dense, _operands, **own_attributes)

    own = _bilinear.separate(native("sample", sample))
    return _bilinear.bilinear(
        _bilinear.folded(native("forward", forward)),
        _bilinear.folded(native("backward", backward)),
        lambda x, dy, indices, packed: own(x, dy, indices),
    )


def _operands(first: Any, second: Any, _: Any) -> tuple[Any, Any]:
    """Returns the operands of a handler."""
    return first, second


def _convolve(x: Any, kernel: Any, strides: Pair, padding: Padding) -> jax.Array:
    """Computes the convolution with XLA."""
    dtype = jnp.result_type(x, kernel)
    return lax.conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        strides,
        padding,
        dimension_numbers=DIMENSIONS,
        feature_group_count=x.shape[3],
    )
