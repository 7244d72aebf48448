"""Masks of blocks of 16 outputs on CPUs: recognition, values, derivatives, wrong lists."""

import ctypes
import functools
import subprocess

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import jaxprune
from jaxprune import kernels, patterns
from jaxprune.kernels import _building
from tests.kernels.test_products import assert_close

WIDTH = 16
COUNTING = """
#include "blocks.h"
using namespace jaxprune;
extern "C" int64_t product(const int32_t* starts, const int32_t* kept, int64_t inputs,
                           int64_t outputs, int64_t capacity) {
  return count_blocks(List{starts, kept, inputs, outputs, capacity});
}
extern "C" int64_t convolution(const int32_t* taps, const int32_t* inputs, const int32_t* channels,
                               int64_t size, int64_t outputs) {
  return count_blocks(Taps{taps, inputs, channels, size}, outputs);
}
"""


@pytest.fixture(autouse=True)
def library():
    """These tests need the library."""
    if reason := kernels.available():
        pytest.skip(reason)


def block_mask(draw, shape, density):
    """A mask of whole blocks, in which some inputs and some blocks of outputs are empty."""
    units = draw.random((*shape[:-1], -(-shape[-1] // WIDTH))) < density
    units[..., draw.random(shape[-2]) < 0.2, :] = False
    units[..., draw.random(units.shape[-1]) < 0.2] = False
    return np.repeat(units, WIDTH, -1)[..., : shape[-1]]


def normal(draw, *shape):
    return draw.normal(size=shape).astype(np.float32)


# ---- recognition


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Number of blocks that the kernels see in the lists of a mask; -1: they see single weights."""
    folder = tmp_path_factory.mktemp("counting")
    (folder / "counting.cc").write_text(COUNTING)
    command = [_building.compiler(), "-std=c++17", "-shared", "-fPIC", f"-I{_building.SOURCES}"]
    command += [str(folder / "counting.cc"), "-o", str(folder / "counting.so")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "counting.so"))

    def count(mask, spare=0):
        capacity = int(mask.sum()) + spare
        if mask.ndim == 2:
            own = kernels.product_indices(mask, capacity=capacity)
            lists, run = [own.starts, own.outputs], library.product
            sizes = [*mask.shape, capacity]
        else:
            own = kernels.convolution_indices(mask, capacity=capacity)
            lists, run = [own.taps, own.inputs, own.outputs], library.convolution
            sizes = [int(own.count), mask.shape[-1]]
        run.restype = ctypes.c_int64
        arrays = [np.ascontiguousarray(own) for own in lists]
        return run(
            *(ctypes.c_void_p(own.ctypes.data) for own in arrays), *map(ctypes.c_int64, sizes)
        )

    return count


def blocks_of(mask):
    """The number of kept blocks, or -1."""
    kept = 0
    for first in range(0, mask.shape[-1], WIDTH):
        part = mask[..., first : first + WIDTH]
        if (part.any(-1) != part.all(-1)).any():
            return -1
        kept += int(part.all(-1).sum())
    return kept if mask.shape[-1] >= WIDTH else -1


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**31),
    window=st.sampled_from([(), (1, 1), (3, 3), (5, 1)]),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 70),
    density=st.sampled_from([0.6, 0.2, 1.0, 0.0]),
    spare=st.integers(0, 3),
)
def test_lists_of_blocks_are_recognised(counting, seed, window, inputs, outputs, density, spare):
    draw = np.random.default_rng(seed)
    mask = block_mask(draw, (*window, inputs, outputs), density)
    assert outputs < WIDTH or blocks_of(mask) >= 0
    assert counting(mask, spare) == blocks_of(mask)
    mask.flat[draw.integers(mask.size)] ^= True
    assert counting(mask, spare) == blocks_of(mask)


def test_what_is_not_a_block(counting):
    """Blocks begin at multiples of 16, and a few outputs are no block."""
    mask = np.zeros((3, 48), bool)
    mask[1, 8:24] = True
    assert counting(mask) == counting(mask[None, None]) == -1
    mask = np.ones((3, 15), bool)
    assert counting(mask) == counting(mask[None, None]) == -1
    mask = np.zeros((3, 48), bool)
    assert counting(mask) == counting(mask[None, None]) == 0


def test_the_pattern_makes_such_masks(counting):
    draw = np.random.default_rng(0)
    params = {"product": normal(draw, 20, 40), "convolution": normal(draw, 3, 3, 5, 40)}
    _, masks = jaxprune.prune(params, 0.7, pattern=patterns.blocks((1, WIDTH)))
    for mask in map(np.asarray, masks.values()):
        assert not mask.all() and counting(mask) == blocks_of(mask) > 0


def test_blocks_have_a_kernel_of_their_own():
    """Which adds in another order: one weight more, elsewhere, changes the rounding."""
    draw = np.random.default_rng(1)
    x, kernel, dy = normal(draw, 300, 20), normal(draw, 20, 32), normal(draw, 300, 32)
    image, window, back = (
        normal(draw, 9, 6, 6, 5),
        normal(draw, 3, 3, 5, 32),
        normal(draw, 9, 6, 6, 32),
    )
    for args, run, make in (
        ((x, kernel, dy), kernels.sparse_product, kernels.product_indices),
        ((image, window, back), kernels.sparse_convolution, kernels.convolution_indices),
    ):
        mask = block_mask(draw, args[1].shape, 0.5)
        mask[..., 0, :] = False
        other = mask.copy()
        other[..., 0, 3] = True
        found = [
            jax.vjp(functools.partial(run, args[0], indices=make(own)), args[1])[1](args[2])[0]
            for own in (mask, other)
        ]
        assert_close(found[0] * mask, found[1] * mask)
        assert (found[0] != found[1])[mask].mean() > 0.1


# ---- values and derivatives


def three_passes(layer, x, w, dy):
    @jax.jit
    def run(x, w, dy):
        y, back = jax.vjp(layer, x, w)
        return y, *back(dy.astype(y.dtype))

    return run(x, w, dy)


def product_reference(x, w, dy, mask):
    x, w, dy = (np.asarray(own, np.float64) for own in (x, w, dy))
    return x @ (w * mask), dy @ (w * mask).T, x.T @ dy * mask


def convolution_reference(x, w, dy, mask, strides, padding):
    x, w, dy = (np.asarray(own, np.float64) for own in (x, w * mask, dy))
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    y, dx, dw = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(w.shape)
    for i, j in np.ndindex(w.shape[:2]):
        rows = slice(i, i + (dy.shape[1] - 1) * strides[0] + 1, strides[0])
        columns = slice(j, j + (dy.shape[2] - 1) * strides[1] + 1, strides[1])
        y += padded[:, rows, columns] @ w[i, j]
        dx[:, rows, columns] += dy @ w[i, j].T
        dw[i, j] = np.einsum("brsc,brsn->cn", padded[:, rows, columns], dy)
    (top, _), (left, _) = padding
    dx = dx[:, top : top + x.shape[1], left : left + x.shape[2]]
    return y, dx, dw * mask


def assert_all_close(found, wanted, tolerance=1e-5):
    for own, reference in zip(found, wanted, strict=True):
        assert_close(np.asarray(own, np.float64), reference, tolerance)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([0, 1, 5, 16, 17, 64, 300]),
    inputs=st.sampled_from([1, 7, 40, 512]),
    outputs=st.integers(WIDTH, 70),
    density=st.sampled_from([0.5, 0.1, 1.0, 0.0]),
    spare=st.integers(0, 3),
    packed=st.booleans(),
)
def test_products(seed, rows, inputs, outputs, density, spare, packed):
    draw = np.random.default_rng(seed)
    mask = block_mask(draw, (inputs, outputs), density)
    x, w, dy = (
        normal(draw, rows, inputs),
        normal(draw, inputs, outputs),
        normal(draw, rows, outputs),
    )
    indices = kernels.product_indices(mask, capacity=int(mask.sum()) + spare)
    wanted = product_reference(x, w, dy, mask)
    if packed:
        layer = functools.partial(kernels.sparse_product_values, indices=indices)
        y, dx, dv = three_passes(layer, x, kernels.pack(jnp.asarray(w), indices), dy)
        found = y, dx, kernels.unpack(dv, indices)
    else:
        layer = functools.partial(kernels.sparse_product, indices=indices)
        found = three_passes(layer, x, w, dy)
    assert_all_close(found, wanted)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 2, 17]),
    image=st.tuples(st.integers(3, 9), st.integers(3, 20)),
    channels=st.tuples(st.sampled_from([1, 5, 20]), st.integers(WIDTH, 40)),
    window=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 3, 4])),
    strides=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2])),
    padding=st.tuples(*[st.tuples(st.integers(1, 4), st.integers(0, 4))] * 2),
    density=st.sampled_from([0.5, 0.1, 1.0, 0.0]),
    spare=st.integers(0, 3),
    packed=st.booleans(),
)
def test_convolutions(
    seed, batch, image, channels, window, strides, padding, density, spare, packed
):
    draw = np.random.default_rng(seed)
    mask = block_mask(draw, (*window, *channels), density)
    x, w = normal(draw, batch, *image, channels[0]), normal(draw, *mask.shape)
    indices = kernels.convolution_indices(mask, capacity=int(mask.sum()) + spare)
    options = {"indices": indices, "strides": strides, "padding": padding}
    layer = functools.partial(kernels.sparse_convolution, **options)
    dy = normal(draw, *jax.eval_shape(layer, x, w).shape)
    wanted = convolution_reference(x, w, dy, mask, strides, padding)
    if packed:
        layer = functools.partial(kernels.sparse_convolution_values, **options)
        y, dx, dv = three_passes(layer, x, kernels.pack(jnp.asarray(w), indices), dy)
        found = y, dx, kernels.unpack(dv, indices)
    else:
        found = three_passes(layer, x, w, dy)
    assert_all_close(found, wanted)


def test_crowded_images_and_strips():
    """Channels at distances that share sets of the cache, and images larger than a strip."""
    draw = np.random.default_rng(2)
    for images, window, strides in (
        ((2, 6, 7, 256), (3, 3, 256, 20), (1, 2)),
        ((1, 90, 70, 24), (3, 5, 24, 16), (2, 1)),
    ):
        mask = block_mask(draw, window, 0.2)
        x, w = normal(draw, *images), normal(draw, *window)
        padding = ((1, 1), (2, 2))
        indices = kernels.convolution_indices(mask)
        options = {"strides": strides, "padding": padding}
        layer = functools.partial(kernels.sparse_convolution, indices=indices, **options)
        dy = normal(draw, *jax.eval_shape(layer, x, w).shape)
        wanted = convolution_reference(x, w, dy, mask, strides, padding)
        assert_all_close(three_passes(layer, x, w, dy), wanted)


def test_bfloat16_is_stored_and_float32_is_summed():
    draw = np.random.default_rng(3)
    mask = block_mask(draw, (300, 40), 0.9)
    x, w, dy = (
        jnp.asarray(own, jnp.bfloat16)
        for own in (normal(draw, 20, 300), normal(draw, 300, 40), normal(draw, 20, 40))
    )
    layer = functools.partial(kernels.sparse_product, indices=kernels.product_indices(mask))
    found = three_passes(layer, x, w, dy)
    assert {own.dtype for own in found} == {jnp.dtype(jnp.bfloat16)}
    for own, exact in zip(found, product_reference(x, w, dy, mask)):
        own = np.asarray(own, np.float64)
        assert (np.abs(own - exact) <= 2**-8 * np.abs(exact) + 1e-4).all()


def test_vmap_and_gradients_of_gradients():
    draw = np.random.default_rng(4)
    mask = block_mask(draw, (6, 20), 0.6)
    x, w = normal(draw, 3, 5, 6), normal(draw, 6, 20)
    indices = kernels.product_indices(mask)

    def penalty(layer, w, x):
        return (jax.grad(lambda w: jnp.sin(layer(x, w)).sum())(w) ** 3).sum()

    found, wanted = (
        jax.vmap(jax.grad(functools.partial(penalty, layer)), (None, 0))(w, x)
        for layer in (
            lambda x, w: kernels.sparse_product(x, w, indices),
            lambda x, w: x @ (w * mask),
        )
    )
    assert_close(found, wanted, 1e-4)


def test_pruned_blocks_do_not_multiply():
    """Infinity reaches the outputs that keep a block for it, and what is pruned is not read."""
    mask = np.zeros((2, 32), bool)
    mask[0, :16] = mask[1, 16:] = True
    w = np.where(mask, 1.0, np.nan).astype(np.float32)
    x = np.array([[np.inf, 1.0]] * 20, np.float32)
    y = kernels.sparse_product(x, w, kernels.product_indices(mask))
    np.testing.assert_array_equal(y, np.repeat([[np.inf, 1.0]] * 20, 16, -1))


# ---- masks that change, and functions


def test_masks_that_stop_being_blocks_share_the_program():
    draw = np.random.default_rng(5)
    x, dy = normal(draw, 2, 5, 5, 4), normal(draw, 2, 5, 5, 40)
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(w, indices):
        traces.append(1)
        y, back = jax.vjp(lambda w: kernels.sparse_convolution(x, w, indices), w)
        return w - back(dy)[0], y

    whole = block_mask(draw, (3, 3, 4, 40), 0.4)
    mixed = whole.copy()
    mixed[1, 1, 2, 7] ^= True
    for mask in (whole, mixed, whole):
        w = normal(draw, *mask.shape)
        new, y = step(jnp.array(w), kernels.convolution_indices(mask, capacity=1440))
        padding = ((1, 1), (1, 1))
        wanted, _, dw = convolution_reference(x, w, dy, mask, (1, 1), padding)
        assert_all_close((new, y), (w - dw, wanted))
    assert len(traces) == 1


def test_wrap_and_serve():
    """Blocks of a convolution and of a product; new masks of single weights have room."""
    draw = np.random.default_rng(6)
    params = {"kernel": normal(draw, 3, 3, 4, 32), "head": normal(draw, 32, 20)}
    images = normal(draw, 5, 6, 6, 4)

    def apply(params, images):
        hidden = jax.lax.conv_general_dilated(
            images, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(hidden).mean((1, 2)) @ params["head"]

    pruned, masks = jaxprune.prune(params, 0.7, pattern=patterns.blocks((1, WIDTH)))
    wrapped = kernels.wrap(apply, masks, pruned, images, table="always")
    assert set(wrapped.indices) == {"kernel", "head"}
    traces = []

    @jax.jit
    def run(params, indices):
        traces.append(1)
        return wrapped(params, images, indices=indices)

    assert_close(run(pruned, wrapped.indices), apply(pruned, images))
    others = {name: draw.permuted(np.array(mask)) for name, mask in masks.items()}
    single = jaxprune.apply_masks(params, others)
    wrapped = wrapped.update(others)
    assert_close(run(single, wrapped.indices), apply(single, images))
    assert len(traces) == 1
    with kernels.serve(apply, masks, pruned, images[0], sizes=(1, 4), table="always") as server:
        answers = [future.result() for future in [server.submit(image) for image in images]]
    assert_close(jnp.stack(answers), apply(pruned, images))


# ---- wrong lists


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(["starts", "outputs", "positions"]),
    wild=st.one_of(st.integers(-2, 70), st.sampled_from([-(2**31), 2**31 - 1])),
)
def test_altered_lists_of_products(seed, name, wild):
    """One number of a list of blocks is altered: the call is refused, or computes what it says."""
    draw = np.random.default_rng(seed)
    own = kernels.product_indices(block_mask(draw, (3, 20), 0.8), capacity=60)
    size = int(own.starts[-1])
    lists = {field: np.array(getattr(own, field)) for field in ("starts", "outputs", "positions")}
    lists[name][draw.integers(4 if name == "starts" else max(size, 1))] = wild
    starts, outputs, positions = lists.values()
    used = int(starts[-1])
    right = starts[0] == 0 and (np.diff(starts) >= 0).all() and used <= 60
    right = right and ((outputs[:used] >= 0) & (outputs[:used] < 20)).all()
    right = right and ((positions[:used] >= 0) & (positions[:used] <= 59)).all()
    indices = own._replace(**{field: jnp.asarray(array) for field, array in lists.items()})
    x, w = normal(draw, 4, 3), normal(draw, 3, 20)
    if not right:
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="jaxprune: .*indices"):
            jax.block_until_ready(PRODUCT(x, w, indices))
        return
    inputs = np.repeat(np.arange(3), np.diff(starts))
    wanted = np.zeros((4, 20))
    np.add.at(wanted.T, outputs[:used], (x[:, inputs] * w.ravel()[positions[:used]]).T)
    assert_all_close([PRODUCT(x, w, indices)], [wanted])


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(["positions", "taps", "inputs", "outputs", "count"]),
    wild=st.one_of(st.integers(-2, 70), st.sampled_from([-(2**31), 2**31 - 1])),
)
def test_altered_lists_of_convolutions(seed, name, wild):
    draw = np.random.default_rng(seed)
    own = kernels.convolution_indices(block_mask(draw, (1, 1, 3, 20), 0.8), capacity=60)
    size = int(own.count)
    lists = {field: np.array(getattr(own, field)) for field in own._fields[1:]}
    if name == "count":
        lists["count"] = np.array(wild, np.int32)
    else:
        lists[name][draw.integers(max(size, 1))] = wild
    positions, taps, inputs, outputs, count = lists.values()
    right = 0 <= count <= 60
    for array, below in ((positions, 60), (taps, 1), (inputs, 3), (outputs, 20)):
        right = right and ((array[:count] >= 0) & (array[:count] < below)).all()
    indices = own._replace(**{field: jnp.asarray(array) for field, array in lists.items()})
    x, w = normal(draw, 1, 2, 2, 3), normal(draw, 1, 1, 3, 20)
    if not right:
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="jaxprune: .*indices"):
            jax.block_until_ready(CONVOLUTION(x, w, indices))
        return
    wanted = np.zeros((1, 2, 2, 20))
    values = w.ravel()[positions[:count]]
    np.add.at(wanted.T, outputs[:count], (x[..., inputs[:count]] * values).T)
    assert_all_close([CONVOLUTION(x, w, indices)], [wanted])


PRODUCT = jax.jit(kernels.sparse_product)
CONVOLUTION = jax.jit(kernels.sparse_convolution)
