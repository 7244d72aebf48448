"""The three passes of a block-sparse product in Pallas: for TPUs (Mosaic) and GPUs (Triton).

On a TPU the grid goes over the steps of a list, which is prefetched as scalars and says which
blocks the next step needs, so that they are copied while the present one computes. Triton has no
prefetched scalars: there each program has one block of the result and loops over the products of
its sum.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from jaxprune import meshes

Array = Any
_MIB = 2**20
# Bytes of a TPU's vector memory, of which a kernel has 16 MiB by default: for a tile of inputs that
# stays (there are two copies), one that is read at each step (two copies), and sums with the tile
# of results that they become (one and two copies).
_RESIDENT, _STREAMED, _SUMS = 4 * _MIB, 2 * _MIB, 10 * _MIB
_LANES, _ROWS, _LONG = 128, 512, 4096
_GPU_ROWS = 128
_CHUNK = 128  # bytes of a contraction that a GPU program has in shared memory at once
_MAX_STEPS = 2**16  # two int32 of each lie in the scalar memory of 1 MiB
_NN, _NT, _TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # contracted dimensions


def fits(
    platform: str, shape: tuple[int, int], block: tuple[int, int], dtype: Any, steps: int = 0
) -> bool:
    """Tells whether the kernels of a platform take a weight [K, N] in these blocks.

    Args:
        platform: `"tpu"` or `"cuda"`.
        shape: of the weight.
        block: shape of a block.
        dtype: of x and the weight.
        steps: length of the longer list of steps.
    """
    nbytes = jnp.dtype(dtype).itemsize
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return False
    if platform == "tpu":
        aligned = block[0] % (32 // nbytes) == 0 and block[1] % _LANES == 0
        resident = _unit(block, nbytes) * max(shape) * nbytes <= _RESIDENT
        return aligned and max(block) <= _ROWS and resident and steps <= _MAX_STEPS
    return all(size in (16, 32, 64, 128) for size in block)


def block_of(shape: tuple[int, int], indices: Any) -> tuple[int, int]:
    """Returns the shape of a block of a weight [K, N]."""
    rows, columns = indices.mask.shape
    return shape[0] // rows, shape[1] // columns


def forward(platform: str, interpret: bool, x: Array, w: Array, indices: Any) -> Array:
    """Returns x @ (w * mask), for x [M, K] and w [K, N]."""
    run = _product_tpu if platform == "tpu" else _product_gpu
    return run(interpret, x, w, indices, False)


def backward(platform: str, interpret: bool, dy: Array, w: Array, indices: Any) -> Array:
    """Returns dy @ (w * mask).T, for dy [M, N] and w [K, N]."""
    run = _product_tpu if platform == "tpu" else _product_gpu
    return run(interpret, dy, w, indices, True)


def sample(platform: str, interpret: bool, x: Array, dy: Array, indices: Any) -> Array:
    """Returns (x.T @ dy) * mask, for x [M, K] and dy [M, N]; only kept blocks are computed."""
    run = _sample_tpu if platform == "tpu" else _sample_gpu
    return run(interpret, x, dy, indices)


# ---- for TPUs


def _product_tpu(interpret: bool, a: Array, w: Array, indices: Any, transposed: bool) -> Array:
    """Multiplies with w or its transpose, while what is narrower stays in vector memory.

    For each tile of rows all kept blocks of w are read, so the tile with more rows is taken: all
    columns of `a`, or all columns of the result.
    """
    block, nbytes = block_of(w.shape, indices), a.dtype.itemsize
    count, unit = a.shape[0], _unit(block, nbytes)
    width, results = w.shape[::-1] if transposed else w.shape
    gathered, scattered = _RESIDENT // (width * nbytes), _SUMS // (results * (4 + 2 * nbytes))
    rows, tiles = _tiles(count, min(_ROWS, max(gathered, scattered)), unit)
    a = _padded(a, rows * tiles)
    # A block of inputs that is narrower than the lanes of a tile must lie along its sublanes.
    narrow = bool(block[0] % _LANES)
    first_in, first_out = narrow and not transposed, narrow and transposed
    gathers = gathered >= scattered
    order = indices.by_input if transposed is gathers else indices.by_output
    sizes = block[::-1] if transposed else block

    def block_in(j: Any, results: Any, sources: Any) -> Any:
        return _source(sources[j]) if gathers else results[j]

    def block_out(j: Any, results: Any, sources: Any) -> Any:
        return results[j] if gathers else _source(sources[j])

    def of_w(i: Any, j: Any, *lists: Any) -> Any:
        del i
        own = block_in(j, *lists), block_out(j, *lists)
        return own[::-1] if transposed else own

    def whole(i: Any, j: Any, *lists: Any) -> Any:
        del j, lists
        return i, 0

    def of_a(i: Any, j: Any, *lists: Any) -> Any:
        return i, block_in(j, *lists)

    def of_out(i: Any, j: Any, *lists: Any) -> Any:
        return i, block_out(j, *lists)

    kept = _kept(order, block)
    wide_in, wide_out = (width, sizes[1]) if gathers else (sizes[0], results)
    kernel = _gathering if gathers else _scattering
    out = pl.pallas_call(
        functools.partial(kernel, sizes[not gathers], first_in, transposed, first_out),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles, order.sources.shape[0]),
            in_specs=[
                _tile(rows, wide_in, whole if gathers else of_a, first_in),
                pl.BlockSpec(block, of_w),
            ],
            out_specs=_tile(rows, wide_out, of_out if gathers else whole, first_out),
            scratch_shapes=[pltpu.VMEM(_shape(rows, wide_out, first_out), jnp.float32)],
        ),
        out_shape=_like(_shape(rows * tiles, results, first_out), a, w),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=f"block_product_{'dx' if transposed else 'y'}_tpu",
        cost_estimate=_cost(count, count * (width + results) + tiles * kept, kept, nbytes),
        interpret=interpret,
    )(order.results, order.sources, a.T if first_in else a, w)
    return (out.T if first_out else out)[:count]


def _gathering(
    size: int,
    first_in: bool,
    transposed: bool,
    first_out: bool,
    results: Any,
    sources: Any,
    a: Any,
    w: Any,
    out: Any,
    total: Any,
) -> None:
    """Adds one product to the present block of the result; `a` is there with all columns."""
    j, last = pl.program_id(1), pl.num_programs(1) - 1
    result, source = results[j], sources[j]

    @pl.when((j == 0) | (results[jnp.maximum(j - 1, 0)] != result))
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(source >= 0)
    def _() -> None:
        own = _columns(source, size, first_in)
        total[...] += _multiply(a[own], w[...], first_in, transposed, first_out)

    @pl.when((j == last) | (results[jnp.minimum(j + 1, last)] != result))
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _scattering(
    size: int,
    first_in: bool,
    transposed: bool,
    first_out: bool,
    results: Any,
    sources: Any,
    a: Any,
    w: Any,
    out: Any,
    total: Any,
) -> None:
    """Adds one product to its block of the result, which is there with all columns."""
    j, source = pl.program_id(1), sources[pl.program_id(1)]
    del results

    @pl.when(j == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(source >= 0)
    def _() -> None:
        own = _columns(source, size, first_out)
        total[own] += _multiply(a[...], w[...], first_in, transposed, first_out)

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _multiply(a: Array, w: Array, first_in: bool, transposed: bool, first_out: bool) -> Array:
    """Multiplies a tile with a block; `first_in` and `first_out`: features are the first axis."""
    if first_out:
        return _dot(w, a, _NT)
    return _dot(a, w, _TN if first_in else _NT if transposed else _NN)


def _columns(block: Array, size: int, features_first: bool) -> Any:
    """Indexes the columns of a block."""
    own = pl.ds(pl.multiple_of(block * size, size), size)
    return (own, slice(None)) if features_first else (slice(None), own)


def _shape(rows: int, features: int, features_first: bool) -> tuple[int, int]:
    """Returns the shape of an array, or of a tile."""
    return (features, rows) if features_first else (rows, features)


def _tile(rows: int, features: int, place: Any, features_first: bool) -> pl.BlockSpec:
    """Describes a tile; `place` returns its row of tiles and its column."""
    shape = _shape(rows, features, features_first)
    return pl.BlockSpec(shape, (lambda *own: place(*own)[::-1]) if features_first else place)


def _sample_tpu(interpret: bool, x: Array, dy: Array, indices: Any) -> Array:
    """Computes the gradient of each kept block in consecutive steps, into an array of zeros."""
    order, shape = indices.by_input, (x.shape[1], dy.shape[1])
    block = block_of(shape, indices)
    narrow, nbytes = bool(block[0] % _LANES), x.dtype.itemsize
    count, limit = x.shape[0], min(_LONG, _STREAMED // (max(block) * nbytes))
    rows, tiles = _tiles(count, limit, _unit(block, nbytes))
    x, dy = _padded(x, rows * tiles), _padded(dy, rows * tiles)
    steps = order.sources.shape[0]

    def tile(j: Any, m: Any, sources: Any) -> Any:
        return jnp.where(sources[j] >= 0, m, tiles - 1)  # a step without a product copies nothing

    def of_x(j: Any, m: Any, results: Any, sources: Any) -> Any:
        return tile(j, m, sources), results[j]

    def of_dy(j: Any, m: Any, results: Any, sources: Any) -> Any:
        return tile(j, m, sources), _source(sources[j])

    def of_w(j: Any, m: Any, results: Any, sources: Any) -> Any:
        return results[j], _source(sources[j])

    # A tile of x is copied again unless the next step needs the same one.
    kept = _kept(order, block)
    of_inputs = count * shape[0] if tiles == 1 else count * kept // block[1]
    moved = of_inputs + count * kept // block[0] + kept
    out = _like(shape, x, dy)
    (zeros,) = meshes.varying_like((jnp.zeros(out.shape, out.dtype),), x, dy)
    return pl.pallas_call(
        functools.partial(_sample_tpu_kernel, narrow),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(steps, tiles),
            in_specs=[
                _tile(rows, block[0], of_x, narrow),
                pl.BlockSpec((rows, block[1]), of_dy),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(block, of_w),
            scratch_shapes=[pltpu.VMEM(block, jnp.float32)],
        ),
        out_shape=out,
        input_output_aliases={4: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        name="block_product_dw_tpu",
        cost_estimate=_cost(count, moved, kept, nbytes),
        interpret=interpret,
    )(order.results, order.sources, x.T if narrow else x, dy, zeros)


def _sample_tpu_kernel(
    narrow: bool,
    results: Any,
    sources: Any,
    x: Any,
    dy: Any,
    zeros: Any,
    out: Any,
    total: Any,
) -> None:
    """Adds the product of one tile of rows; steps that only pad repeat the block before them."""
    del zeros
    j, m = pl.program_id(0), pl.program_id(1)
    before = jnp.maximum(j - 1, 0)
    own = _source(sources[j])
    differs = (results[before] != results[j]) | (_source(sources[before]) != own)
    is_new = (j == 0) | differs

    @pl.when(is_new & (m == 0))
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(sources[j] >= 0)
    def _() -> None:
        total[...] += _dot(x[...], dy[...], _NN if narrow else _TN)

    @pl.when(is_new & (m == pl.num_programs(1) - 1))
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


# ---- for GPUs


def _product_gpu(interpret: bool, a: Array, w: Array, indices: Any, transposed: bool) -> Array:
    """Gives each tile of the result a program, which loops over the products of its sum."""
    block = block_of(w.shape, indices)
    order = indices.by_input if transposed else indices.by_output
    summed, result = (block[1], block[0]) if transposed else block
    count = a.shape[0]
    rows, tiles = _tiles_gpu(count)
    a = _padded(a, rows * tiles)
    width, results = (w.shape[1], w.shape[0]) if transposed else w.shape
    chunk = min(summed, _CHUNK // a.dtype.itemsize)
    kernel = functools.partial(_product_gpu_kernel, summed, chunk, transposed)
    own = (result, width) if transposed else (width, result)
    return pl.pallas_call(
        kernel,
        grid=(tiles, results // result),
        in_specs=[
            pl.BlockSpec(order.starts.shape, lambda i, o: (0,)),
            pl.BlockSpec(order.sources.shape, lambda i, o: (0,)),
            pl.BlockSpec((rows, width), lambda i, o: (i, 0)),
            pl.BlockSpec(own, lambda i, o: (o, 0) if transposed else (0, o)),
        ],
        out_specs=pl.BlockSpec((rows, result), lambda i, o: (i, o)),
        out_shape=_like((rows * tiles, results), a, w),
        name=f"block_product_{'dx' if transposed else 'y'}_cuda",
        compiler_params=plgpu.CompilerParams(num_warps=_warps(rows * result), num_stages=3),
        interpret=interpret,
    )(order.starts, order.sources, a, w)[:count]


def _product_gpu_kernel(
    size: int, chunk: int, transposed: bool, starts: Any, sources: Any, a: Any, w: Any, out: Any
) -> None:
    """Sums over the kept blocks of one block of the result, some columns at a time."""
    begin, end = starts[pl.program_id(1)], starts[pl.program_id(1) + 1]
    end = jnp.where(sources[begin] < 0, begin, end)  # nothing is kept
    parts = size // chunk

    def body(step: Any, total: Any) -> Any:
        own = pl.ds(sources[step // parts] * size + step % parts * chunk, chunk)
        tile = w[:, own] if transposed else w[own, :]
        return total + _dot(a[:, own], tile, _NT if transposed else _NN)

    total = lax.fori_loop(begin * parts, end * parts, body, jnp.zeros(out.shape, jnp.float32))
    out[...] = total.astype(out.dtype)


def _sample_gpu(interpret: bool, x: Array, dy: Array, indices: Any) -> Array:
    """Gives each block of the gradient a program; those of pruned blocks write zeros."""
    shape = x.shape[1], dy.shape[1]
    block = block_of(shape, indices)
    rows, tiles = _tiles_gpu(x.shape[0])
    x, dy = _padded(x, rows * tiles), _padded(dy, rows * tiles)
    chunk = min(rows, _CHUNK // x.dtype.itemsize)
    return pl.pallas_call(
        functools.partial(_sample_gpu_kernel, chunk),
        grid=indices.mask.shape,
        in_specs=[
            pl.BlockSpec((1, 1), lambda k, n: (k, n)),
            pl.BlockSpec((x.shape[0], block[0]), lambda k, n: (0, k)),
            pl.BlockSpec((x.shape[0], block[1]), lambda k, n: (0, n)),
        ],
        out_specs=pl.BlockSpec(block, lambda k, n: (k, n)),
        out_shape=_like(shape, x, dy),
        name="block_product_dw_cuda",
        compiler_params=plgpu.CompilerParams(num_warps=_warps(math.prod(block)), num_stages=3),
        interpret=interpret,
    )(indices.mask.astype(jnp.int32), x, dy)


def _sample_gpu_kernel(chunk: int, mask: Any, x: Any, dy: Any, out: Any) -> None:
    """Sums over all rows, or over none."""

    def body(step: Any, total: Any) -> Any:
        own = pl.ds(step * chunk, chunk)
        return total + _dot(x[own, :], dy[own, :], _TN)

    steps = mask[0, 0] * (x.shape[0] // chunk)
    total = lax.fori_loop(0, steps, body, jnp.zeros(out.shape, jnp.float32))
    out[...] = total.astype(out.dtype)


# ---- what both share


def _dot(a: Array, b: Array, contracted: Any) -> Array:
    """Multiplies two tiles and sums in float32."""
    return lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _source(step: Array) -> Array:
    """Returns the block that a step names; ~block says that it has no product."""
    return jnp.maximum(step, ~step)


def _unit(block: tuple[int, int], nbytes: int) -> int:
    """Returns what the rows of a TPU's tile are a multiple of."""
    return _LANES if block[0] % _LANES else 32 // nbytes


def _tiles(rows: int, limit: int, unit: int) -> tuple[int, int]:
    """Returns the rows of a tile and the number of tiles; without padding where sizes allow it."""
    limit = max(unit, limit // unit * unit)
    for own in range(limit, limit // 2, -unit):
        if rows % own == 0:
            return own, rows // own
    tiles = pl.cdiv(rows, limit)
    return pl.cdiv(pl.cdiv(rows, tiles), unit) * unit, tiles


def _tiles_gpu(rows: int) -> tuple[int, int]:
    """Returns the rows of a tile, a power of 2, and the number of tiles."""
    own = min(_GPU_ROWS, max(16, pl.next_power_of_2(rows)))
    return own, pl.cdiv(rows, own)


def _warps(entries: int) -> int:
    """Returns the warps of a program that holds a tile of sums."""
    return 8 if entries >= 128 * 128 else 4


def _padded(a: Array, rows: int) -> Array:
    """Adds rows of zeros."""
    return a if a.shape[0] == rows else jnp.pad(a, ((0, rows - a.shape[0]), (0, 0)))


def _like(shape: tuple[int, ...], *operands: Array) -> Any:
    """Returns the type of a result, which varies over the shards of its operands."""
    return jax.eval_shape(
        lambda *own: meshes.varying_like((jnp.zeros(shape, own[0].dtype),), *own)[0], *operands
    )


def _kept(order: Any, block: tuple[int, int]) -> int:
    """Counts the weights of as many blocks as there is room for."""
    return (order.sources.shape[0] - order.starts.shape[0] + 1) * math.prod(block)


def _cost(rows: int, moved: int, kept: int, nbytes: int) -> pl.CostEstimate:
    """Says what a kernel computes and copies, for the scheduler of XLA and for `cost_analysis`."""
    return pl.CostEstimate(flops=2 * rows * kept, bytes_accessed=moved * nbytes, transcendentals=0)
