"""Convolutions that compute kept weights only."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import jaxprs, meshes
from jaxprune.kernels import _bilinear, _indices
from jaxprune.kernels._finishing import Finish
from jaxprune.kernels._indices import ConvolutionIndices
from jaxprune.kernels._products import dense_kernel, masked_gradient

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]  # before and after, of rows and of columns
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def sparse_convolution(
    x: Any,
    kernel: Any,
    indices: ConvolutionIndices,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
) -> jax.Array:
    """Returns the convolution of x with kernel * mask, in time that falls with the density.

    y[b, r, s, n] = sum over i, j, c of x[b, r * strides[0] + i - padding[0][0], ..., c] *
    kernel[i, j, c, n] * mask[i, j, c, n], with x = 0 outside of the image. What is said of pruned
    weights, dtypes, derivatives and shards in `sparse_product` holds here, too.

    Args:
        x: floats [batch, rows, columns, C].
        kernel: floats [H, W, C, N], dense. Grouped and dilated convolutions are not supported.
        indices: from `convolution_indices`, of a mask [H, W, C, N]; data, so new ones do not
            recompile.
        strides: 1 or 2, for rows and columns.
        padding: "SAME", "VALID", or ((low, high), (low, high)), which are not negative.

    Returns:
        An array [batch, rows, columns, N] of the dtype of a dense convolution.

    Raises:
        ValueError: if shapes, strides or padding are not as above.

    Example:
        >>> from jaxprune import kernels
        >>> mask = np.zeros((3, 3, 1, 1), bool)
        >>> mask[1, 1] = True
        >>> indices = kernels.convolution_indices(mask)
        >>> kernels.sparse_convolution(jnp.ones((1, 2, 2, 1)), 5.0 * mask, indices)[0, :, :, 0]
        Array([[5., 5.],
               [5., 5.]], dtype=float32)
    """
    _indices.check_kernel(kernel, indices)
    return _convolution(x, kernel, indices, strides, padding)


def sparse_convolution_values(
    x: Any,
    values: Any,
    indices: ConvolutionIndices,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[Sequence[int]] = "SAME",
) -> jax.Array:
    """Returns `sparse_convolution` of packed weights.

    The gradient is packed, too, so that an optimizer keeps its state for kept weights only.

    Args:
        x: floats [batch, rows, columns, C].
        values: floats [capacity], from `pack`.
        indices: from `convolution_indices`.
        strides: as in `sparse_convolution`.
        padding: as in `sparse_convolution`.

    Returns:
        An array [batch, rows, columns, N].

    Raises:
        ValueError: if shapes, strides or padding are not as in `sparse_convolution`.

    Example:
        >>> from jaxprune import kernels
        >>> indices = kernels.convolution_indices(np.ones((1, 1, 1, 2), bool))
        >>> values = jnp.array([2.0, 3.0])
        >>> kernels.sparse_convolution_values(jnp.ones((1, 1, 1, 1)), values, indices).ravel()
        Array([2., 3.], dtype=float32)
    """
    _indices.check_values(values, indices)
    return _convolution(x, values, indices, strides, padding)


def finished_convolution(
    x: jax.Array,
    kernel: jax.Array,
    indices: ConvolutionIndices,
    finish: Finish,
    *,
    strides: Pair,
    padding: Padding,
) -> jax.Array:
    """Returns `finish.apply` of `sparse_convolution` by one call; all arrays are float32."""
    place = x.shape[1:3], kernel.shape[:2], strides, tuple(map(tuple, padding))
    run = _finished(*place, finish.limits)
    return run(x, kernel, indices, *_bilinear.arrays_of(finish))


def _convolution(
    x: Any, weights: Any, indices: ConvolutionIndices, strides: Any, padding: Any
) -> jax.Array:
    """Convolves with a kernel or with packed values."""
    x, weights = jnp.asarray(x), jnp.asarray(weights)
    height, width, inputs, _ = indices.mask.shape
    if x.ndim != 4 or x.shape[-1] != inputs:
        raise ValueError(
            f"`x` must have the shape [batch, rows, columns, {inputs}], because the kernel has "
            f"{inputs} input channels, but has {x.shape}; grouped convolutions are not supported"
        )
    image = x.shape[1:3]
    own_strides = pair_of_strides(strides)
    own_padding = explicit(padding, image, (height, width), own_strides)
    apply = _operation(image, (height, width), own_strides, own_padding)
    if not _bilinear.is_supported(x, weights):
        return _convolve(x, dense_kernel(weights, indices), own_strides, own_padding)
    # Inside `shard_map`, the gradient of weights that shards share is then summed over shards.
    x, weights = meshes.varying_like((x, weights), x, weights)
    y = apply(x.astype(jnp.float32), weights.astype(jnp.float32), indices)
    return y.astype(jnp.result_type(x, weights))


def pair_of_strides(strides: Any) -> Pair:
    """Returns the strides of rows and columns, or raises."""
    found = (strides, strides) if isinstance(strides, int) else tuple(map(int, strides))
    if len(found) != 2 or not set(found) <= {1, 2}:
        raise ValueError(
            f"`strides` must be 1 or 2 for rows and columns, but is {strides!r}; use "
            "`jax.lax.conv_general_dilated` for others"
        )
    return found


def explicit(padding: Any, image: Pair, window: Pair, strides: Pair) -> Padding:
    """Returns the padding as numbers, or raises."""
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(
                f'`padding` must be "SAME", "VALID" or pairs of numbers, but is {padding!r}'
            )
        padding = lax.padtype_to_pads(image, window, strides, padding.upper())
    found = tuple(tuple(map(int, own)) for own in padding)
    if [len(own) for own in found] != [2, 2] or any(number < 0 for own in found for number in own):
        raise ValueError(
            f"`padding` must be ((low, high), (low, high)) of numbers that are not negative, but "
            f"is {padding!r}"
        )
    for size, own, room in zip(image, found, window):
        if size + sum(own) < room:
            raise ValueError(
                f"`x` must be at least as large as the window with its padding, but an image of "
                f"{image} with padding {found} is smaller than the window {window}"
            )
    return found  # pyright: ignore[reportReturnType]


@functools.lru_cache(maxsize=1024)
def _operation(image: Pair, window: Pair, strides: Pair, padding: Padding) -> Any:
    """Returns (x, weights, indices) -> y for images of one size, with its derivatives."""

    def forward(x: Any, weights: Any, indices: ConvolutionIndices) -> jax.Array:
        return _convolve(x, dense_kernel(weights, indices), strides, padding)

    def backward(dy: Any, weights: Any, indices: ConvolutionIndices) -> jax.Array:
        kernel = dense_kernel(weights, indices)
        x = jaxprs.abstract(dy, (len(dy), *image, kernel.shape[2]))
        run = functools.partial(_convolve, kernel=kernel, strides=strides, padding=padding)
        return jax.linear_transpose(run, x)(dy)[0]

    def sample(packed: bool, x: Any, dy: Any, indices: ConvolutionIndices) -> jax.Array:
        kernel = jaxprs.abstract(x, indices.mask.shape)

        def run(kernel: Any) -> jax.Array:
            return _convolve(x, kernel, strides, padding)

        return masked_gradient(jax.linear_transpose(run, kernel)(dy)[0], indices, packed)

    own = attributes(window, strides, padding)
    named = functools.partial(_bilinear.native, operands=_operands, **own)
    samples = {
        packed: _bilinear.separate(
            named("jaxprune_convolution_sample", functools.partial(sample, packed))
        )
        for packed in (False, True)
    }
    return _bilinear.bilinear(
        _bilinear.folded(named("jaxprune_convolution_forward", forward)),
        _bilinear.folded(named("jaxprune_convolution_backward", backward)),
        lambda x, dy, indices, packed: samples[packed](x, dy, indices),
    )


@functools.lru_cache(maxsize=1024)
def _finished(
    image: Pair, window: Pair, strides: Pair, padding: Padding, limits: Finish
) -> _bilinear.Pass:
    """Returns the convolution that does more to its sums."""
    apply = _operation(image, window, strides, padding)
    own = attributes(window, strides, padding)
    return _bilinear.finished("jaxprune_convolution_finished", apply, limits, _operands, **own)


def _operands(x: Any, other: Any, indices: ConvolutionIndices) -> Any:
    """Returns the operands of a handler."""
    return x, other, *indices[1:]


def attributes(window: Pair, strides: Pair, padding: Padding) -> dict[str, np.ndarray]:
    """Returns what a handler knows of a convolution besides its operands."""
    return {
        "window": np.array(window, np.int64),
        "strides": np.array(strides, np.int64),
        "padding": np.array(padding, np.int64).reshape(-1),
    }


def _convolve(x: Any, kernel: Any, strides: Pair, padding: Padding) -> jax.Array:
    """Computes the dense convolution."""
    dtype = jnp.result_type(x, kernel)
    return lax.conv_general_dilated(
        x.astype(dtype), kernel.astype(dtype), strides, padding, dimension_numbers=DIMENSIONS
    )
