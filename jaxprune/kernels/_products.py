"""Products x @ kernel that compute kept weights only."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import meshes
from jaxprune.kernels import _bilinear, _indices
from jaxprune.kernels._finishing import Finish
from jaxprune.kernels._indices import ProductIndices


def sparse_product(x: Any, kernel: Any, indices: ProductIndices) -> jax.Array:
    """Returns x @ (kernel * mask), in time that falls with the density of the mask.

    Pruned weights do not multiply: what the kernel holds there is not read, and NaN or infinity in
    `x` reaches only outputs that have a kept weight for it (0 * NaN in a masked dense product would
    reach all). The gradient of the kernel is 0 where the mask is. A mask of blocks of 16 outputs,
    from the pattern `patterns.blocks((1, 16))`, is recognised and takes less time. Sums are in
    float32; arrays of bfloat16 and float16 are converted around the call, and other dtypes use a
    masked dense product. Reverse-mode derivatives of any order work, `jax.jvp` does not. An array
    that is sharded over devices is gathered first, unless the call is inside `shard_map`.

    Args:
        x: floats [..., K].
        kernel: floats [K, N], dense.
        indices: from `product_indices`, of a mask [K, N]; data, so new ones do not recompile.

    Returns:
        An array [..., N] of the dtype of a dense product.

    Raises:
        ValueError: if shapes do not fit together.

    Example:
        >>> import numpy as np
        >>> from jaxprune import kernels
        >>> indices = kernels.product_indices(np.array([[True, False], [True, True]]))
        >>> kernels.sparse_product(jnp.ones((1, 2)), jnp.ones((2, 2)), indices)
        Array([[2., 1.]], dtype=float32)
    """
    _indices.check_kernel(kernel, indices)
    return _product(x, kernel, indices)


def sparse_product_values(x: Any, values: Any, indices: ProductIndices) -> jax.Array:
    """Returns x @ unpack(values, indices): `sparse_product` of packed weights.

    The gradient is packed, too, so that an optimizer keeps its state for kept weights only.

    Args:
        x: floats [..., K].
        values: floats [capacity], from `pack`.
        indices: from `product_indices`.

    Returns:
        An array [..., N].

    Raises:
        ValueError: if shapes do not fit together.

    Example:
        >>> import numpy as np
        >>> from jaxprune import kernels
        >>> indices = kernels.product_indices(np.array([[True, False], [True, True]]))
        >>> loss = lambda values: kernels.sparse_product_values(jnp.ones(2), values, indices).sum()
        >>> jax.grad(loss)(jnp.array([1.0, 2.0, 3.0]))
        Array([1., 1., 1.], dtype=float32)
    """
    _indices.check_values(values, indices)
    return _product(x, values, indices)


def finished_product(
    x: jax.Array, kernel: jax.Array, indices: ProductIndices, finish: Finish
) -> jax.Array:
    """Returns `finish.apply` of `sparse_product` by one call; all arrays are float32."""
    rows = x.reshape(-1, x.shape[-1])
    scale, shift, rest = _bilinear.arrays_of(finish)
    rest = rest.reshape(-1, kernel.shape[1]) if rest.size else rest
    run = _finished(finish.limits)
    return run(rows, kernel, indices, scale, shift, rest).reshape(*x.shape[:-1], kernel.shape[1])


def _product(x: Any, weights: Any, indices: ProductIndices) -> jax.Array:
    """Multiplies with a kernel or with packed values."""
    x, weights = jnp.asarray(x), jnp.asarray(weights)
    inputs, outputs = indices.mask.shape
    if not x.ndim or x.shape[-1] != inputs:
        raise ValueError(
            f"`x` must have the shape [..., {inputs}], because the kernel has {inputs} inputs, but "
            f"has {x.shape}"
        )
    # Inside `shard_map`, the gradient of weights that shards share is then summed over shards.
    x, weights = meshes.varying_like((x, weights), x, weights)
    rows = x.reshape(math.prod(x.shape[:-1]), inputs)
    dtype = jnp.result_type(x, weights)
    if _bilinear.is_supported(x, weights):
        y = _APPLY(rows.astype(jnp.float32), weights.astype(jnp.float32), indices).astype(dtype)
    else:
        y = _forward(rows, weights, indices)
    return y.reshape(*x.shape[:-1], outputs)


# The three passes as masked dense functions.


def dense_kernel(weights: jax.Array, indices: Any) -> jax.Array:
    """Returns a kernel with zeros off the mask, from a kernel or from packed values."""
    if weights.ndim == 1:
        return _indices.unpack(weights, indices)
    return jnp.where(indices.mask, weights, jnp.zeros((), weights.dtype))


def masked_gradient(gradient: jax.Array, indices: Any, packed: bool) -> jax.Array:
    """Returns the gradient of a kernel as that of packed values, or with zeros off the mask."""
    if packed:
        return _indices.pack(gradient, indices)
    return jnp.where(indices.mask, gradient, jnp.zeros((), gradient.dtype))


def _forward(x: Any, weights: Any, indices: ProductIndices) -> jax.Array:
    return x @ dense_kernel(weights, indices)


def _backward(dy: Any, weights: Any, indices: ProductIndices) -> jax.Array:
    return dy @ dense_kernel(weights, indices).T


def _sample(packed: bool, x: Any, dy: Any, indices: ProductIndices) -> jax.Array:
    return masked_gradient(x.T @ dy, indices, packed)


# The same as kernels.


def _operands(first: Any, second: Any, indices: ProductIndices) -> Any:
    return first, second, *indices[1:]


_SAMPLES = {
    packed: _bilinear.separate(
        _bilinear.native("jaxprune_product_sample", functools.partial(_sample, packed), _operands)
    )
    for packed in (False, True)
}
_APPLY = _bilinear.bilinear(
    _bilinear.folded(_bilinear.native("jaxprune_product_forward", _forward, _operands)),
    _bilinear.folded(_bilinear.native("jaxprune_product_backward", _backward, _operands)),
    lambda x, dy, indices, packed: _SAMPLES[packed](x, dy, indices),
)


@functools.lru_cache(maxsize=64)
def _finished(limits: Finish) -> _bilinear.Pass:
    """Returns the product that does more to its sums."""
    return _bilinear.finished("jaxprune_product_finished", _APPLY, limits, _operands)
