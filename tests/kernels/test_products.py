"""Sparse products: values and derivatives against the masked dense product."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import Mesh, PartitionSpec

from jaxprune import kernels
from jaxprune.kernels import _building


@pytest.fixture(params=["native", "dense"])
def way(request, monkeypatch):
    """Both ways to compute: as kernels, and as masked dense operations."""
    if request.param == "dense":
        monkeypatch.setattr(_building, "available", lambda: "switched off by a test")
    elif reason := kernels.available():
        pytest.skip(reason)
    return request.param


def case(seed, shape, inputs, outputs, density):
    """x, a kernel and a mask in which some rows and columns are empty."""
    draw = np.random.default_rng(seed)
    mask = draw.random((inputs, outputs)) < density
    mask[draw.random(inputs) < 0.2] = False
    mask[:, draw.random(outputs) < 0.2] = False
    x = draw.normal(size=(*shape, inputs)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(draw.normal(size=mask.shape), jnp.float32), mask


def assert_close(own, reference, tolerance=1e-5):
    """Relative to the largest entry."""
    assert own.shape == reference.shape and own.dtype == reference.dtype
    own, reference = (np.asarray(array, np.float64) for array in (own, reference))
    scale = np.abs(reference).max(initial=1e-30)
    assert np.abs(own - reference).max(initial=0) <= tolerance * scale


def assert_same_layer(sparse, dense, *args, tolerance=1e-5):
    """Values and gradients of two functions, each as one program."""

    def run(layer):
        def passes(*args):
            y, pull = jax.vjp(layer, *args)
            dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
            return y, *pull(dy)

        return jax.jit(passes)(*args)

    for own, expected in zip(run(sparse), run(dense)):
        assert_close(own, expected, tolerance)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([0, 1, 5, 16, 64, 65, 130]),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    spare=st.integers(0, 3),
)
def test_values_and_gradients(seed, rows, inputs, outputs, density, spare):
    x, kernel, mask = case(seed, (rows,), inputs, outputs, density)
    indices = kernels.product_indices(mask, capacity=int(mask.sum()) + spare)
    assert_same_layer(
        lambda x, w: kernels.sparse_product(x, w, indices), lambda x, w: x @ (w * mask), x, kernel
    )


def test_both_ways(way):
    x, kernel, mask = case(1, (2, 3), 9, 7, 0.4)
    indices = kernels.product_indices(mask, capacity=50)
    sparse = functools.partial(kernels.sparse_product, indices=indices)
    assert_same_layer(sparse, lambda x, w: x @ (w * mask), x, kernel)
    values = kernels.pack(kernel, indices)
    np.testing.assert_array_equal(kernels.unpack(values, indices), kernel * mask)
    packed = functools.partial(kernels.sparse_product_values, indices=indices)
    assert_same_layer(packed, lambda x, v: x @ kernels.unpack(v, indices), x, values)


def test_one_row_without_axes(way):
    x, kernel, mask = case(2, (), 6, 5, 0.5)
    indices = kernels.product_indices(mask)
    assert_close(kernels.sparse_product(x, kernel, indices), x @ (kernel * mask))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_storage_in_narrow_floats_sums_in_float32(dtype, way):
    x, kernel, mask = case(3, (20,), 300, 8, 0.9)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    indices = kernels.product_indices(mask)
    y, pull = jax.vjp(lambda x, w: kernels.sparse_product(x, w, indices), x, kernel)
    exact = np.asarray(x, np.float64) @ (np.asarray(kernel, np.float64) * mask)
    assert y.dtype == dtype and [own.dtype for own in pull(y)] == [dtype, dtype]
    resolution = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert (np.abs(np.asarray(y, np.float64) - exact) <= resolution * np.abs(exact) + 1e-4).all()


def test_pruned_weights_do_not_multiply():
    """NaN and infinity reach the outputs that keep a weight for them, and no others."""
    kernel, mask = jnp.ones((3, 2)), np.array([[True, False], [True, True], [False, True]])
    indices = kernels.product_indices(mask)
    x = jnp.array([[np.nan, 1.0, 1.0], [1.0, 1.0, np.inf], [1.0, np.nan, 1.0]])
    if reason := kernels.available():
        pytest.skip(reason)
    y = kernels.sparse_product(x, kernel, indices)
    np.testing.assert_array_equal(y, [[np.nan, 2], [2, np.inf], [np.nan, np.nan]])
    poisoned = jnp.where(mask, kernel, jnp.nan)
    assert np.isfinite(kernels.sparse_product(jnp.ones((4, 3)), poisoned, indices)).all()


def test_gradients_of_gradients(way):
    x, kernel, mask = case(4, (5,), 6, 4, 0.5)
    indices = kernels.product_indices(mask)

    def penalty(layer, x, w):
        def loss(x, w):
            return jnp.sin(layer(x, w)).sum()

        first, second = jax.grad(loss, (0, 1))(x, w)
        return (first**3).sum() + (second**3).sum()

    sparse = functools.partial(penalty, lambda x, w: kernels.sparse_product(x, w, indices))
    dense = functools.partial(penalty, lambda x, w: x @ (w * mask))
    for own, expected in zip(
        jax.grad(sparse, (0, 1))(x, kernel), jax.grad(dense, (0, 1))(x, kernel)
    ):
        assert_close(own, expected, 1e-4)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, None)])
def test_vmap(axes, way):
    draw = np.random.default_rng(5)
    mask = draw.random((6, 5)) < 0.5
    indices = kernels.product_indices(mask)
    shapes = [(4, 6), (6, 5)]
    args = [
        jnp.asarray(draw.normal(size=own if axis is None else (*own[:axis], 3, *own[axis:])))
        for own, axis in zip(shapes, axes)
    ]
    args = [own.astype(jnp.float32) for own in args]
    assert_same_layer(
        jax.vmap(lambda x, w: kernels.sparse_product(x, w, indices), axes),
        jax.vmap(lambda x, w: x @ (w * mask), axes),
        *args,
    )


def test_vmap_over_images_is_one_call():
    if reason := kernels.available():
        pytest.skip(reason)
    indices = kernels.product_indices(np.ones((6, 5), bool))
    run = jax.vmap(lambda x: kernels.sparse_product(x, jnp.ones((6, 5)), indices))
    text = str(jax.make_jaxpr(run)(jnp.ones((3, 4, 6))))
    assert text.count("ffi_call[") == 1 and "scan[" not in text


def test_gradients_of_each_example(way):
    x, kernel, mask = case(6, (4, 3), 6, 5, 0.5)
    indices = kernels.product_indices(mask)

    def gradient(layer):
        return jax.vmap(jax.grad(lambda w, x: (layer(x, w) ** 2).sum()), (None, 0))(kernel, x)

    own = gradient(lambda x, w: kernels.sparse_product(x, w, indices))
    assert_close(own, gradient(lambda x, w: x @ (w * mask)))


def test_new_masks_are_data(way):
    """Masks of one capacity share a program, also for gradients, in a scan, with donation."""
    x, kernel, _ = case(7, (5,), 6, 4, 0.5)
    count = 0

    @functools.partial(jax.jit, donate_argnums=0)
    def train(kernel, indices):
        nonlocal count
        count += 1

        def step(kernel, _):
            loss = lambda w: (kernels.sparse_product(x, w, indices) ** 2).sum()  # noqa: E731
            return kernel - 0.01 * jax.grad(loss)(kernel), None

        return jax.lax.scan(step, kernel, None, length=3)[0]

    for seed in range(3):
        mask = case(seed, (5,), 6, 4, 0.5)[2]
        own = train(jnp.array(kernel), kernels.product_indices(mask, capacity=24))
        expected = np.asarray(kernel, np.float64)
        for _ in range(3):
            y = np.asarray(x) @ (expected * mask)
            expected = expected - 0.01 * 2 * (np.asarray(x).T @ y) * mask
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)
    assert count == 1


def test_inside_checkpoint_and_shard_map(way):
    x, kernel, mask = case(8, (8,), 6, 4, 0.5)
    indices = kernels.product_indices(mask)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def layer(x, w):
        return kernels.sparse_product(x, w, indices)

    spread = jax.shard_map(
        layer, mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec("data"),
    )  # fmt: skip
    for own in (jax.checkpoint(layer), jax.jit(spread)):
        assert_same_layer(own, lambda x, w: x @ (w * mask), x, kernel)


def test_sharded_rows(way):
    x, kernel, mask = case(9, (16,), 6, 4, 0.5)
    indices = kernels.product_indices(mask)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    x = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("data")))
    assert_same_layer(
        jax.jit(lambda x, w: kernels.sparse_product(x, w, indices)),
        lambda x, w: x @ (w * mask),
        x,
        kernel,
    )


def test_float64_is_masked_dense():
    with jax.enable_x64(True):
        x, kernel, mask = case(10, (3,), 6, 4, 0.5)
        indices = kernels.product_indices(mask)
        x, kernel = x.astype(jnp.float64), kernel.astype(jnp.float64)
        assert_same_layer(
            lambda x, w: kernels.sparse_product(x, w, indices),
            lambda x, w: x @ (w * mask),
            x,
            kernel,
            tolerance=1e-12,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 4))}, r"`x` must have the shape \[..., 3\].*\(2, 4\)"),
        ({"kernel": jnp.ones((2, 3))}, r"`kernel` must have the shape \(3, 2\).*\(2, 3\)"),
        ({"values": jnp.ones(5)}, r"`values` must have the shape \(6,\).*\(5,\).*pack"),
    ],
)
def test_wrong_shapes(change, message):
    indices = kernels.product_indices(np.ones((3, 2), bool))
    x = change.get("x", jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=message):
        if "values" in change:
            kernels.sparse_product_values(x, change["values"], indices)
        else:
            kernels.sparse_product(x, change.get("kernel", jnp.ones((3, 2))), indices)


@pytest.mark.parametrize(
    ("mask", "capacity", "message"),
    [
        (np.ones((2, 2)), None, r"`mask` must be bool \[K, N\], but is float64"),
        (np.ones((2, 2, 2), bool), None, r"`mask` must be bool \[K, N\]"),
        (np.ones((2, 2), bool), 3, "`capacity` must be at least the 4 kept weights.*is 3"),
    ],
)
def test_wrong_masks(mask, capacity, message):
    with pytest.raises(ValueError, match=message):
        kernels.product_indices(mask, capacity=capacity)


def test_traced_masks_are_refused():
    with pytest.raises(ValueError, match="`mask` must be concrete.*outside of jitted"):
        jax.jit(kernels.product_indices)(np.ones((2, 2), bool))
