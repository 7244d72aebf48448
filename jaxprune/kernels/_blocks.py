"""Products x @ kernel of the kept blocks of a kernel, for matrix units of TPUs and GPUs."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxprune import meshes, patterns
from jaxprune.kernels import _bilinear

_PLATFORMS = ("tpu", "cuda")


class BlockOrder(NamedTuple):
    """The kept blocks of a kernel as steps, ordered by the block of a result that they add to.

    A block of the result without a kept block has one step, which has no product. Steps that only
    fill the list up to its length come last and repeat the block before them.

    Example:
        >>> own = block_indices(np.array([[True, False], [True, False]]), (1, 1)).by_output
        >>> own.results.tolist(), own.sources.tolist(), own.starts.tolist()
        ([0, 0, 1, 1], [0, 1, -1, -1], [0, 2, 3])
    """

    starts: jax.Array  # int32 [results + 1]: the first step of each block of the result
    results: jax.Array  # int32 [steps]: block of the result
    sources: jax.Array  # int32 [steps]: block that is multiplied; ~block: there is no product


class BlockIndices(NamedTuple):
    """The kept blocks of a kernel [K, N], from `block_indices`; arrays only.

    Example:
        >>> block_indices(np.ones((4, 6), bool), (2, 2)).mask.shape
        (2, 3)
    """

    mask: jax.Array  # bool [K / rows of a block, N / columns of a block]
    by_output: BlockOrder  # for y = x @ kernel: sums over blocks of inputs
    by_input: BlockOrder  # for the gradients: sums over blocks of outputs


def block_indices(
    mask: Any,
    block: tuple[int | None, int | None] | patterns.Blocks = (128, 128),
    *,
    capacity: int | None = None,
) -> BlockIndices:
    """Lists the kept blocks of a kernel [K, N], on the host.

    Make masks with `pattern=patterns.blocks(block)`. Reshape the mask and the kernel of a
    projection with several input or output axes to [K, N] first.

    Args:
        mask: bool [K, N], True where a weight is kept; NumPy or a concrete JAX array. All weights
            of a block have the same.
        block: the shape of a block, or the pattern `patterns.blocks` that made the mask; None is
            the whole dimension. It must divide the kernel. Which shapes have kernels on which
            platform says `block_platforms`.
        capacity: number of kept blocks for which there is room. Masks of the same shape and
            capacity give arrays of the same shapes, so a function that takes them as arguments is
            not compiled again. None is the number of kept blocks.

    Returns:
        The indices.

    Raises:
        ValueError: if the mask is not bool of rank 2 or is traced, if the block does not divide it,
            if it is not constant on a block, or if it does not fit `capacity`.

    Example:
        >>> mask = np.zeros((4, 6), bool)
        >>> mask[:2, 4:] = True
        >>> block_indices(mask, (2, 2), capacity=3).mask.tolist()
        [[False, False, True], [False, False, False]]
        >>> mask[0, 4] = False
        >>> block_indices(mask, (2, 2))
        Traceback (most recent call last):
        ValueError: `mask` must be constant on blocks of (2, 2), but 1 of 6 blocks are mixed; the
        first is block (0, 2), rows 0 to 1 and columns 4 to 5, with 3 of 4 weights kept; ...
    """
    mask = _checked(mask)
    rows, columns = _checked_block(block, mask.shape)
    whole = mask.reshape(mask.shape[0] // rows, rows, mask.shape[1] // columns, columns)
    kept = whole.sum((1, 3))
    if (mixed := (kept > 0) & (kept < rows * columns)).any():
        k, n = (int(own) for own in np.argwhere(mixed)[0])
        raise ValueError(
            f"`mask` must be constant on blocks of {(rows, columns)}, but {mixed.sum()} of "
            f"{mixed.size} blocks are mixed; the first is block {(k, n)}, rows {k * rows} to "
            f"{(k + 1) * rows - 1} and columns {n * columns} to {(n + 1) * columns - 1}, with "
            f"{kept[k, n]} of {rows * columns} weights kept; prune with "
            f"`pattern=patterns.blocks({(rows, columns)})`"
        )
    units = kept > 0
    count = int(units.sum())
    capacity = count if capacity is None else capacity
    is_whole = isinstance(capacity, (int, np.integer)) and not isinstance(capacity, bool)
    if not is_whole or capacity < count:
        raise ValueError(
            f"`capacity` must be a whole number, at least the {count} kept blocks of `mask`, but "
            f"is {capacity!r}; give a larger one"
        )
    return jax.tree.map(jnp.asarray, _indices(units, int(capacity)))


def block_platforms(
    shape: tuple[int, int],
    block: tuple[int, int] = (128, 128),
    dtype: Any = jnp.float32,
) -> tuple[str, ...]:
    """Returns the platforms on which `block_product` computes kept blocks only.

    On all others it is the masked dense product. For TPUs a block has a multiple of 128 columns and
    of 8 rows in float32, or 16 rows in bfloat16, at most 512 x 512; for GPUs (CUDA) both sides are
    one of 16, 32, 64 and 128.

    Args:
        shape: of the kernel [K, N].
        block: the shape of a block.
        dtype: that of `x` and the kernel together.

    Returns:
        Some of `"tpu"` and `"cuda"`.

    Example:
        >>> block_platforms((1024, 4096), (128, 128), jnp.bfloat16)
        ('tpu', 'cuda')
        >>> block_platforms((1024, 4096), (8, 128)), block_platforms((1024, 4096), (32, 32))
        (('tpu',), ('cuda',))
    """
    from jaxprune.kernels import _pallas

    return tuple(own for own in _PLATFORMS if _pallas.fits(own, shape, block, dtype))


def block_product(
    x: Any, kernel: Any, indices: BlockIndices, *, interpret: str | None = None
) -> jax.Array:
    """Returns x @ (kernel * mask), where TPUs and GPUs compute kept blocks only.

    So do the gradients: that of the kernel is 0 in pruned blocks. Sums are in float32, also of
    bfloat16; how float32 is multiplied, `jax.default_matmul_precision` decides, as in dense
    products. On CPUs, and wherever `block_platforms` names no kernel, this is the masked dense
    product. Reverse-mode derivatives of any order work, `jax.jvp` does not. Arrays that are sharded
    over devices need `jax.shard_map` around the call. The kernels were compiled for TPUs and GPUs
    and compared with the dense product in an interpreter; they were never timed.

    Indices outside of `jit` are checked on the host. Those that a compiled function takes as
    arguments are not; `check_block_indices` does it before.

    Args:
        x: floats [..., K]. Rows are padded to a multiple of a tile.
        kernel: floats [K, N], dense.
        indices: from `block_indices`, of a mask [K, N]; data, so new ones do not recompile.
        interpret: `"tpu"` or `"cuda"` runs the kernels of that platform in the interpreter of
            Pallas, anywhere, with blocks of any shape; for tests, slow.

    Returns:
        An array [..., N] of the dtype of a dense product.

    Raises:
        ValueError: if shapes do not fit together, or if indices are corrupt.

    References:
        Gray, Radford and Kingma, GPU kernels for block-sparse weights, 2017.

    Example:
        >>> mask = np.array([[True, True, False, False]] * 2)
        >>> indices = block_indices(mask, (2, 2))
        >>> block_product(jnp.ones((1, 2)), jnp.ones((2, 4)), indices)
        Array([[2., 2., 0., 0.]], dtype=float32)
        >>> block_product(jnp.ones((1, 2)), jnp.ones((2, 4)), indices, interpret="tpu")
        Array([[2., 2., 0., 0.]], dtype=float32)
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    _check_shapes(x, kernel, indices)
    if interpret not in (None, *_PLATFORMS):
        raise ValueError(f"`interpret` must be None, 'tpu' or 'cuda', but is {interpret!r}")
    if not any(isinstance(own, Tracer) for own in jax.tree.leaves(indices)):
        check_block_indices(indices)
    # Inside `shard_map`, the gradient of weights that shards share is then summed over shards.
    x, kernel = meshes.varying_like((x, kernel), x, kernel)
    dtype = jnp.result_type(x, kernel)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(dtype)
    y = _product(interpret)(rows, kernel.astype(dtype), indices)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def check_block_indices(indices: BlockIndices) -> None:
    """Raises unless the lists of indices are those of their mask; on the host.

    Kernels read blocks of memory at these places, so check indices that come from a file.

    Args:
        indices: concrete arrays.

    Raises:
        ValueError: if an array has another shape, dtype or entry than `block_indices` gives it.

    Example:
        >>> indices = block_indices(np.ones((2, 2), bool), (1, 1))
        >>> check_block_indices(indices)
        >>> wrong = indices.by_output._replace(sources=jnp.array([0, 1, 0, 7, -2, -2]))
        >>> check_block_indices(indices._replace(by_output=wrong))
        Traceback (most recent call last):
        ValueError: `indices` must be made by `block_indices`, but by_output.sources[3] is 7, not 1
    """
    mask = np.asarray(indices.mask)
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(
            "`indices` must be made by `block_indices`, but mask is "
            f"{mask.dtype} of shape {mask.shape}, not bool of rank 2"
        )
    capacity = np.size(indices.by_output.sources) - mask.shape[1]
    if capacity < mask.sum():
        raise ValueError(
            "`indices` must be made by `block_indices`, but by_output.sources has room for "
            f"{capacity} blocks, and mask keeps {mask.sum()}"
        )
    expected = _indices(mask, capacity)
    for name in ("by_output", "by_input"):
        for field in BlockOrder._fields:
            own = np.asarray(getattr(getattr(indices, name), field))
            other = getattr(getattr(expected, name), field)
            if (own.shape, own.dtype) != (other.shape, other.dtype):
                found = f"{name}.{field} is {own.dtype} of shape {own.shape}, not int32 of"
                found = f"{found} {other.shape}"
            elif (own != other).any():
                place = int(np.flatnonzero(own != other)[0])
                found = f"{name}.{field}[{place}] is {own[place]}, not {other[place]}"
            else:
                continue
            raise ValueError(f"`indices` must be made by `block_indices`, but {found}")


# ---- indices


def _indices(units: Any, capacity: int) -> BlockIndices:
    """Returns the indices of a mask of blocks, as NumPy arrays."""
    return BlockIndices(units, _order(units.T, capacity), _order(units, capacity))


def _order(kept: np.ndarray, capacity: int) -> BlockOrder:
    """Lists the blocks of a mask [results, sources], row by row."""
    listed = kept.copy()
    listed[~kept.any(1), 0] = True  # a step that only writes zeros
    results, sources = np.nonzero(listed)
    sources = np.where(kept[results, sources], sources, ~sources)
    padding = capacity + len(kept) - len(results)
    last = max(sources[-1], ~sources[-1])
    arrays: list[Any] = [
        np.concatenate([[0], np.cumsum(listed.sum(1))]),
        np.append(results, [results[-1]] * padding),
        np.append(sources, [~last] * padding),
    ]
    return BlockOrder(*(own.astype(np.int32) for own in arrays))


def _checked(mask: Any) -> np.ndarray:
    """Returns a mask as a NumPy array, or raises."""
    if isinstance(mask, Tracer):
        raise ValueError(
            "`mask` must be concrete, but is traced: the number of kept blocks decides shapes. "
            "Make indices outside of jitted code and pass them as arguments."
        )
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool or not mask.size:
        raise ValueError(
            f"`mask` must be bool [K, N] with entries, but is {mask.dtype} of shape {mask.shape}; "
            "give the mask of one kernel, reshaped to [K, N]"
        )
    return mask


def _checked_block(block: Any, shape: tuple[int, int]) -> tuple[int, int]:
    """Returns the shape of a block that divides a kernel, or raises."""
    sizes = block.shape if isinstance(block, patterns.Blocks) else block
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
        raise ValueError(
            f"`block` must have two sizes, but is {sizes!r}; give for example (128, 128)"
        )
    pattern = patterns.blocks(tuple(sizes))
    rows, columns = (size or whole for size, whole in zip(pattern.shape, shape))
    if shape[0] % rows or shape[1] % columns:
        raise ValueError(
            f"`block` must divide the kernel of shape {shape}, but is {(rows, columns)}; choose "
            "another block, or another width of the layer"
        )
    return rows, columns


def _check_shapes(x: jax.Array, kernel: jax.Array, indices: BlockIndices) -> None:
    """Raises unless x, kernel and indices fit together."""
    if not isinstance(indices, BlockIndices):
        raise ValueError(
            f"`indices` must be made by `block_indices`, but is {type(indices).__name__}; make "
            "them of the mask of this kernel"
        )
    rows, columns = indices.mask.shape
    if kernel.ndim != 2 or not kernel.size or kernel.shape[0] % rows or kernel.shape[1] % columns:
        raise ValueError(
            f"`kernel` must have the shape [K, N] of the mask in `indices`, which has {rows} x "
            f"{columns} blocks, but has {kernel.shape}; make indices of a mask of this kernel"
        )
    if not x.ndim or x.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"`x` must have the shape [..., {kernel.shape[0]}], because the kernel has "
            f"{kernel.shape[0]} inputs, but has {x.shape}"
        )


# ---- the three passes


def _masked(kernel: jax.Array, indices: BlockIndices) -> jax.Array:
    """Returns a kernel with zeros in pruned blocks."""
    (rows, columns), shape = indices.mask.shape, kernel.shape
    blocks = kernel.reshape(rows, shape[0] // rows, columns, shape[1] // columns)
    zero = jnp.zeros((), kernel.dtype)
    return jnp.where(indices.mask[:, None, :, None], blocks, zero).reshape(shape)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies dense matrices, with sums in float32."""
    is_float = jnp.issubdtype(a.dtype, jnp.floating)
    wide = jnp.promote_types(a.dtype, jnp.float32) if is_float else a.dtype
    return jnp.matmul(a, b, preferred_element_type=wide).astype(a.dtype)


def _dense_forward(x: Any, kernel: Any, indices: BlockIndices) -> jax.Array:
    return _dot(x, _masked(kernel, indices))


def _dense_backward(dy: Any, kernel: Any, indices: BlockIndices) -> jax.Array:
    return _dot(dy, _masked(kernel, indices).T)


def _dense_sample(x: Any, dy: Any, indices: BlockIndices) -> jax.Array:
    return _masked(_dot(x.T, dy), indices)


def _pass(name: str, dense: Callable[..., Any], interpret: str | None) -> Callable[..., Any]:
    """Returns a pass that calls the kernels of a platform, and a dense function elsewhere."""

    def run(first: Any, second: Any, indices: BlockIndices) -> jax.Array:
        # Loads Pallas, which takes a second, and which sparse kernels of CPUs do not need.
        from jaxprune.kernels import _pallas

        if not first.shape[0]:  # no rows
            return dense(first, second, indices)
        kernel = getattr(_pallas, name)
        if interpret:
            return kernel(interpret, True, first, second, indices)
        shape = (first.shape[1], second.shape[1]) if name == "sample" else second.shape
        block = _pallas.block_of(shape, indices)
        steps = max(indices.by_output.sources.size, indices.by_input.sources.size)
        own = {
            platform: functools.partial(kernel, platform, False)
            for platform in _PLATFORMS
            if _pallas.fits(platform, shape, block, first.dtype, steps)
        }
        return lax.platform_dependent(first, second, indices, default=dense, **own)

    return run


@functools.lru_cache
def _product(interpret: str | None) -> Callable[..., jax.Array]:
    """Returns the product as a differentiable function."""
    sample = _bilinear.separate(_pass("sample", _dense_sample, interpret))
    return _bilinear.bilinear(
        _bilinear.folded(_pass("forward", _dense_forward, interpret)),
        _bilinear.folded(_pass("backward", _dense_backward, interpret)),
        lambda x, dy, indices, _: sample(x, dy, indices),
    )
