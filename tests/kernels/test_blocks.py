"""Block-sparse products: kernels of Pallas, interpreted, against the masked dense product."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

import jaxprune
from jaxprune import kernels, patterns
from jaxprune.kernels import _pallas
from tests.kernels.test_products import assert_close, assert_same_layer

WAYS = ["tpu", "cuda", None]


def case(seed, shape, blocks, block, density):
    """x, a kernel and a mask of whole blocks, of which some rows and columns are empty."""
    draw = np.random.default_rng(seed)
    units = draw.random(blocks) < density
    if density < 1:
        units[draw.random(blocks[0]) < 0.2] = False
        units[:, draw.random(blocks[1]) < 0.2] = False
    mask = np.kron(units, np.ones(block, bool))
    x, kernel = draw.normal(size=(*shape, mask.shape[0])), draw.normal(size=mask.shape)
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), mask


def layer_of(mask, block, way, spare=0):
    indices = kernels.block_indices(mask, block)
    indices = kernels.block_indices(mask, block, capacity=int(indices.mask.sum()) + spare)
    return functools.partial(kernels.block_product, indices=indices, interpret=way)


def dense(mask):
    return lambda x, kernel: x @ (kernel * mask)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that arrays of a test have several, in every layout."""

    def use(lanes):
        sizes = {"_LANES": lanes, "_ROWS": 8, "_LONG": 8, "_GPU_ROWS": 16, "_CHUNK": 8}
        for name, value in sizes.items():
            monkeypatch.setattr(_pallas, name, value)

    return use


# ---- values and gradients


@pytest.mark.slow
@pytest.mark.parametrize("way", ["tpu", "cuda"])
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([0, 1, 5, 16, 33]),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    block=st.sampled_from([(4, 4), (8, 4), (4, 16), (1, 2), (12, 8)]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    spare=st.integers(0, 3),
    lanes=st.sampled_from([4, 128]),
)
def test_values_and_gradients(way, seed, rows, blocks, block, density, spare, lanes):
    x, kernel, mask = case(seed, (rows,), blocks, block, density)
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"_LANES": lanes, "_ROWS": 8, "_LONG": 8, "_GPU_ROWS": 16, "_CHUNK": 8}
        for name, value in sizes.items():
            patch.setattr(_pallas, name, value)
        assert_same_layer(layer_of(mask, block, way, spare), dense(mask), x, kernel)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("blocks", [(2, 3), (3, 2)])
@pytest.mark.parametrize("size", [128, 16])
def test_sizes_of_hardware(way, blocks, size):
    x, kernel, mask = case(1, (2, 65), blocks, (size, 128), 0.6)
    assert_same_layer(layer_of(mask, (size, 128), way, 2), dense(mask), x, kernel)


@pytest.mark.parametrize("way", WAYS)
def test_one_row_without_axes(way):
    x, kernel, mask = case(2, (), (3, 2), (4, 8), 0.5)
    assert_close(layer_of(mask, (4, 8), way)(x, kernel), x @ (kernel * mask))


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("blocks", [(2, 4), (4, 2)])
@pytest.mark.parametrize("lanes", [4, 128])
def test_nothing_is_read_before_it_is_written(density, blocks, lanes, small_tiles):
    """On a simulated TPU, whose memory holds NaN first and whose copies are checked for races."""
    small_tiles(lanes)
    params = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    x, kernel, mask = case(3, (11,), blocks, (4, 4), density)
    dy = jnp.cos(jnp.arange(11.0 * mask.shape[1])).reshape(11, -1)
    indices = layer_of(mask, (4, 4), None, 2).keywords["indices"]
    own = _pallas.forward("tpu", params, x, kernel, indices)
    assert_close(own, x @ (kernel * mask))
    assert_close(_pallas.backward("tpu", params, dy, kernel, indices), dy @ (kernel * mask).T)
    assert_close(_pallas.sample("tpu", params, x, dy, indices), (x.T @ dy) * mask)


@pytest.mark.parametrize("way", WAYS)
def test_pruned_blocks_are_not_read(way):
    x, kernel, mask = case(4, (5,), (3, 3), (4, 4), 0.5)
    poisoned = jnp.where(mask, kernel, jnp.nan)
    layer = layer_of(mask, (4, 4), way)
    y, pull = jax.vjp(layer, x, poisoned)
    assert_close(y, x @ (kernel * mask))
    assert not np.asarray(pull(y)[1])[~mask].any() and np.isfinite(pull(y)[0]).all()
    assert np.asarray(pull(y)[1])[mask].all()


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_stored_and_float32_summed(way):
    x, kernel, mask = case(5, (20,), (40, 2), (16, 8), 0.9)
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    y, pull = jax.vjp(layer_of(mask, (16, 8), way), x, kernel)
    exact_x, exact = np.asarray(x, np.float64), np.asarray(kernel, np.float64) * mask
    dy = np.asarray(y, np.float64)
    found = [y, *pull(y)]
    for own, expected in zip(found, [exact_x @ exact, dy @ exact.T, (exact_x.T @ dy) * mask]):
        assert own.dtype == jnp.bfloat16
        error = np.abs(np.asarray(own, np.float64) - expected)
        assert (error <= 2**-8 * np.abs(expected) + 1e-4 * np.abs(expected).max()).all()


@pytest.mark.parametrize("way", WAYS)
def test_mixed_dtypes_promote_like_a_dense_product(way):
    x, kernel, mask = case(6, (3,), (2, 2), (4, 4), 0.5)
    half = x.astype(jnp.bfloat16)
    assert_same_layer(layer_of(mask, (4, 4), way), dense(mask), half, kernel, tolerance=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_64_bit_numbers(way):
    with jax.enable_x64(True):
        x, kernel, mask = case(7, (9,), (3, 2), (4, 4), 0.5)
        layer = layer_of(mask, (4, 4), way, 1)
        assert_same_layer(layer, dense(mask), x, kernel)
        if way is None:
            x, kernel = x.astype(jnp.float64), kernel.astype(jnp.float64)
            assert_same_layer(layer, dense(mask), x, kernel, tolerance=1e-12)


# ---- transformations of JAX


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_gradients(way):
    x, kernel, mask = case(8, (5,), (2, 3), (4, 2), 0.6)

    def penalty(layer, x, kernel):
        first, second = jax.grad(lambda *own: jnp.sin(layer(*own)).sum(), (0, 1))(x, kernel)
        return (first**3).sum() + (second**3).sum()

    both = [
        jax.grad(functools.partial(penalty, own), (0, 1))(x, kernel)
        for own in (layer_of(mask, (4, 2), way), dense(mask))
    ]
    for own, expected in zip(*both):
        assert_close(own, expected, 1e-4)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, None)])
@pytest.mark.parametrize("way", WAYS)
def test_vmap(axes, way):
    draw = np.random.default_rng(9)
    mask = np.kron(draw.random((3, 2)) < 0.5, np.ones((2, 2), bool))
    shapes = [(4, 6), (6, 4)]
    args = [
        jnp.asarray(
            draw.normal(size=own if axis is None else (*own[:axis], 3, *own[axis:])), jnp.float32
        )
        for own, axis in zip(shapes, axes)
    ]
    layer = layer_of(mask, (2, 2), way)
    assert_same_layer(jax.vmap(layer, axes), jax.vmap(dense(mask), axes), *args)


def test_vmap_over_rows_is_one_call():
    layer = layer_of(np.ones((8, 4), bool), (4, 4), "tpu")
    run = jax.vmap(lambda x: layer(x, jnp.ones((8, 4))))
    text = str(jax.make_jaxpr(run)(jnp.ones((3, 5, 8))))
    assert text.count("pallas_call[") == 1 and "scan[" not in text


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_each_example(way):
    x, kernel, mask = case(10, (3, 2), (3, 2), (2, 2), 0.5)

    def gradient(layer):
        return jax.vmap(jax.grad(lambda w, x: (layer(x, w) ** 2).sum()), (None, 0))(kernel, x)

    assert_close(gradient(layer_of(mask, (2, 2), way)), gradient(dense(mask)))


@pytest.mark.parametrize("way", WAYS)
def test_new_masks_are_data(way):
    """Masks of one capacity share a program, also for gradients, in a scan, with donation."""
    x, kernel, _ = case(11, (5,), (3, 2), (2, 4), 0.5)
    count = 0

    @functools.partial(jax.jit, donate_argnums=0)
    def train(kernel, indices):
        nonlocal count
        count += 1

        def step(kernel, _):
            def loss(kernel):
                return (kernels.block_product(x, kernel, indices, interpret=way) ** 2).sum()

            return kernel - 0.01 * jax.grad(loss)(kernel), None

        return jax.lax.scan(step, kernel, None, length=3)[0]

    for seed, density in enumerate([0.0, 0.5, 0.9]):
        mask = case(seed, (5,), (3, 2), (2, 4), density)[2]
        own = train(jnp.array(kernel), kernels.block_indices(mask, (2, 4), capacity=6))
        expected = np.asarray(kernel, np.float64)
        for _ in range(3):
            y = np.asarray(x) @ (expected * mask)
            expected = expected - 0.01 * 2 * (np.asarray(x).T @ y) * mask
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)
    assert count == 1


@pytest.mark.parametrize("way", [None, "tpu", "cuda"])
def test_inside_checkpoint_and_shard_map(way):
    x, kernel, mask = case(12, (8,), (3, 2), (2, 2), 0.5)
    layer = layer_of(mask, (2, 2), way)
    assert_same_layer(jax.checkpoint(layer), dense(mask), x, kernel)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = jax.shard_map(
        layer, mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec("data"), check_vma=way is None,
    )  # fmt: skip
    assert_same_layer(jax.jit(spread), dense(mask), x, kernel)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernels_inside_shard_map(platform):
    """Their results vary over shards, and the gradient of the kernel is summed over them."""
    x, kernel, mask = case(13, (8,), (2, 2), (16, 128), 1.0)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = jax.shard_map(
        layer_of(mask, (16, 128), None), mesh=mesh, out_specs=PartitionSpec("data"),
        in_specs=(PartitionSpec("data"), PartitionSpec()),
    )  # fmt: skip

    def passes(x, kernel):
        y, pull = jax.vjp(spread, x, kernel)
        return y, *pull(y)

    text = jax.jit(passes).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    target = {"tpu": "@tpu_custom_call(", "cuda": "gpu.triton("}[platform]
    assert text.count(target) == 3 and "all_reduce" in text


# ---- which platform computes what


@pytest.mark.parametrize(
    ("block", "dtype", "expected"),
    [
        ((128, 128), "bfloat16", ("tpu", "cuda")),
        ((128, 128), "float32", ("tpu", "cuda")),
        ((8, 128), "float32", ("tpu",)),
        ((8, 128), "bfloat16", ()),
        ((16, 128), "bfloat16", ("tpu", "cuda")),
        ((512, 512), "float32", ("tpu",)),
        ((1024, 128), "float32", ()),
        ((32, 64), "float32", ("cuda",)),
        ((128, 128), "float16", ()),
    ],
)
def test_platforms(block, dtype, expected):
    """What is said is what programs hold."""
    shape = 2 * block[0], 2 * block[1]
    assert kernels.block_platforms(shape, block, jnp.dtype(dtype)) == expected
    indices = kernels.block_indices(np.ones(shape, bool), block)
    x, kernel = jnp.ones((32, shape[0]), dtype), jnp.ones(shape, dtype)

    def passes(x, kernel, indices):
        y, pull = jax.vjp(lambda *own: kernels.block_product(*own, indices), x, kernel)
        return y, *pull(y)

    for platform, target in {"tpu": "tpu_custom_call", "cuda": "gpu.triton", "cpu": ""}.items():
        traced = jax.jit(passes).trace(x, kernel, indices)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        calls = text.count("custom_call @")
        assert calls == (3 if platform in expected else 0)
        assert calls == 0 or text.count(f"{target}(") == 3


def test_exports_for_one_platform_at_a_time():
    indices = kernels.block_indices(np.ones((128, 256), bool))
    args = jnp.ones((8, 128)), jnp.ones((128, 256)), indices

    def export(*platforms):
        return jax.export.export(jax.jit(kernels.block_product), platforms=platforms)(*args)

    assert export("tpu").mlir_module().count("@tpu_custom_call(") == 1
    np.testing.assert_allclose(export("cpu").call(*args), np.full((8, 256), 128.0))
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        export("cpu", "tpu")
    with pytest.raises(ValueError, match="no compatibility guarantees"):
        export("cuda")


@given(
    rows=st.integers(1, 10_000),
    limit=st.integers(1, 600),
    unit=st.sampled_from([8, 16, 128]),
)
def test_tiles_cover_all_rows(rows, limit, unit):
    own, tiles = _pallas._tiles(rows, limit, unit)
    assert own % unit == 0 and own <= max(limit, unit) and (tiles - 1) * own < rows <= tiles * own
    assert rows % unit or limit < 2 * unit or tiles * own < rows + max(limit, unit)


def test_rows_that_fit_tiles_are_not_copied():
    assert _pallas._tiles(4096, 320, 16) == (256, 16)
    assert _pallas._tiles(4096, 512, 16) == (512, 8)
    assert _pallas._tiles(600, 512, 16) == (304, 2)


# ---- indices


def steps_of(order):
    return [(int(result), int(source)) for result, source in zip(order.results, order.sources)]


@given(
    seed=st.integers(0, 2**31),
    blocks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    spare=st.integers(0, 4),
)
def test_steps(seed, blocks, block, density, spare):
    """Every kept block is one step, every result has a step, and the rest repeats the last."""
    mask = case(seed, (), blocks, block, density)[2]
    units = mask[:: block[0], :: block[1]]
    capacity = int(units.sum()) + spare
    indices = kernels.block_indices(mask, patterns.blocks(block), capacity=capacity)
    np.testing.assert_array_equal(indices.mask, units)
    for order, kept in ((indices.by_output, units.T), (indices.by_input, units)):
        steps = steps_of(order)
        assert len(steps) == capacity + len(kept)
        assert sorted(own for own in steps if own[1] >= 0) == list(zip(*np.nonzero(kept)))
        assert [own[0] for own in steps] == sorted(own[0] for own in steps)
        assert {own[0] for own in steps} == set(range(len(kept)))
        for result, (start, end) in enumerate(zip(order.starts, order.starts[1:])):
            assert {own[0] for own in steps[start:end]} == {result}
            expected = np.flatnonzero(kept[result]).tolist() or [~0]
            assert [own[1] for own in steps[start:end]] == expected
        last = steps[int(order.starts[-1]) - 1]
        rest = steps[int(order.starts[-1]) :]
        assert rest == [(last[0], ~max(last[1], ~last[1]))] * len(rest)
    kernels.check_block_indices(indices)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (np.ones((4, 4), int), {}, "`mask` must be bool .K, N. with entries, but is int64 of"),
        (np.ones(4, bool), {}, r"is bool of shape \(4,\); give the mask of one kernel, reshaped"),
        (np.ones((0, 4), bool), {}, r"with entries, but is bool of shape \(0, 4\)"),
        (np.ones((4, 6), bool), {"block": (4, 4)}, r"divide the kernel of shape \(4, 6\), but is"),
        (np.ones((4, 4), bool), {}, r"divide the kernel of shape \(4, 4\), but is \(128, 128\)"),
        (np.ones((4, 4), bool), {"block": (4,)}, r"must have two sizes, but is \(4,\)"),
        (np.ones((4, 4), bool), {"block": 4}, "`block` must have two sizes, but is 4; give"),
        (np.ones((4, 4), bool), {"block": None}, "`block` must have two sizes, but is None; give"),
        (np.ones((4, 4), bool), {"block": (4, 0)}, "`shape` must be a tuple of positive integers"),
        (np.ones((4, 4), bool), {"block": (2, 2), "capacity": 3}, "at least the 4 kept blocks"),
        (np.ones((4, 4), bool), {"block": (2, 2), "capacity": 9.0}, "a whole number, .* is 9.0;"),
        (np.ones((4, 4), bool), {"block": (2, 2), "capacity": "9"}, "a whole number, .* is '9';"),
        (np.ones((1, 1), bool), {"block": (1, 1), "capacity": True}, "a whole number, .* is True;"),
        (
            np.arange(24).reshape(4, 6) != 9,
            {"block": (2, 2)},
            r"1 of 6 blocks are mixed; the first is block \(0, 1\), rows 0 to 1 and columns 2 to "
            r"3, with 3 of 4 weights kept; prune with `pattern=patterns.blocks\(\(2, 2\)\)`",
        ),
    ],
)
def test_wrong_masks(mask, options, message):
    with pytest.raises(ValueError, match=message):
        kernels.block_indices(mask, **options)


def test_traced_masks_are_refused():
    with pytest.raises(ValueError, match="`mask` must be concrete, but is traced"):
        jax.jit(lambda mask: kernels.block_indices(mask, (1, 1)))(jnp.ones((2, 2), bool))


CORRUPT = {
    "sources": ({"sources": [0, 1, 0, 2, -2, -2]}, r"by_output.sources\[3\] is 2, not 1"),
    "negative": ({"sources": [0, -3, 0, 1, -2, -2]}, r"by_output.sources\[1\] is -3, not 1"),
    "results": ({"results": [0, 1, 1, 1, 1, 1]}, r"by_output.results\[1\] is 1, not 0"),
    "starts": ({"starts": [0, 2, 5]}, r"by_output.starts\[2\] is 5, not 4"),
    "short": ({"starts": [0, 2]}, r"by_output.starts is int32 of shape \(2,\), not int32 of \(3"),
    "room": ({"sources": [0, 1, 0]}, "by_output.sources has room for 1 blocks, and mask keeps 4"),
    "other": ({"results": [0, 0, 1, 1, 1]}, r"by_output.results is int32 of shape \(5,\), not"),
}


@pytest.mark.parametrize("fault", CORRUPT)
def test_corrupt_indices_are_refused(fault):
    """Also by the product itself, outside of `jit` and as constants of a compiled function."""
    changed, message = CORRUPT[fault]
    indices = kernels.block_indices(np.ones((2, 2), bool), (1, 1), capacity=4)
    kernels.check_block_indices(indices)
    wrong = {name: jnp.asarray(value, jnp.int32) for name, value in changed.items()}
    corrupt = indices._replace(by_output=indices.by_output._replace(**wrong))
    for call in (kernels.check_block_indices, product, jitted):
        with pytest.raises(ValueError, match=message):
            call(corrupt)


def product(indices):
    return kernels.block_product(jnp.ones(2), jnp.ones((2, 2)), indices, interpret="tpu")


def jitted(indices):
    return jax.jit(lambda: product(indices))()


def test_corrupt_masks_are_refused():
    indices = kernels.block_indices(np.ones((2, 2), bool), (1, 1))
    with pytest.raises(ValueError, match="mask is int32 of shape .2, 2., not bool of rank 2"):
        kernels.check_block_indices(indices._replace(mask=indices.mask.astype(jnp.int32)))
    order = indices.by_input
    wide = order._replace(sources=np.asarray(order.sources, np.int64))
    with pytest.raises(ValueError, match="by_input.sources is int64 of shape .*not int32"):
        kernels.check_block_indices(indices._replace(by_input=wide))


@pytest.mark.parametrize(
    ("x", "kernel", "message"),
    [
        ((2, 3), (4, 6), r"`x` must have the shape \[..., 4\].*\(2, 3\)"),
        ((), (4, 6), r"`x` must have the shape \[..., 4\].*\(\)"),
        ((2, 4), (4, 5), r"`kernel` must .*2 x 3 blocks, but has \(4, 5\); make indices"),
        ((2, 4), (24,), r"`kernel` must have the shape \[K, N\] .*\(24,\)"),
    ],
)
def test_wrong_shapes(x, kernel, message):
    indices = kernels.block_indices(np.ones((4, 6), bool), (2, 2))
    with pytest.raises(ValueError, match=message):
        kernels.block_product(jnp.ones(x), jnp.ones(kernel), indices)


@pytest.mark.parametrize("wrong", [np.ones((2, 2), bool), kernels.product_indices(np.eye(2) > 0)])
def test_other_indices_are_refused(wrong):
    with pytest.raises(ValueError, match="`indices` must be made by `block_indices`, but is "):
        kernels.block_product(jnp.ones(2), jnp.ones((2, 2)), wrong)


def test_whole_numbers_are_exact():
    """They have no kernel, and sums in float32 would round them."""
    indices = kernels.block_indices(np.ones((2, 2), bool), (1, 1))
    x = jnp.array([[2**24 + 1, 2]], jnp.int32)
    y = kernels.block_product(x, jnp.ones((2, 2), jnp.int32), indices)
    assert y.dtype == jnp.int32 and y.tolist() == [[2**24 + 3] * 2]


def test_wrong_interpreter():
    indices = kernels.block_indices(np.ones((2, 2), bool), (1, 1))
    with pytest.raises(ValueError, match="`interpret` must be None, 'tpu' or 'cuda', but is 'gpu'"):
        kernels.block_product(jnp.ones(2), jnp.ones((2, 2)), indices, interpret="gpu")


def test_masks_of_pruning():
    """The masks of `prune` with a pattern of blocks are those that indices take."""
    pattern = patterns.blocks((4, 8))
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 24))}
    params, masks = jaxprune.prune(params, 0.5, pattern=pattern)
    indices = kernels.block_indices(masks["kernel"], pattern)
    assert int(indices.mask.sum()) == 6
    x = jax.random.normal(jax.random.key(1), (3, 16))
    y = kernels.block_product(x, params["kernel"], indices, interpret="tpu")
    assert_close(y, x @ params["kernel"])
