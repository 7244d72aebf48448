"""Sparse convolutions: values and derivatives against the masked dense convolution."""

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
from tests.kernels.test_products import assert_close, assert_same_layer, way  # noqa: F401


def convolve(x, kernel, strides=(1, 1), padding="SAME"):
    """The dense convolution."""
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def case(seed, images, kernel, density):
    """Images, a kernel and a mask in which some channels are empty."""
    draw = np.random.default_rng(seed)
    mask = draw.random(kernel) < density
    mask[:, :, draw.random(kernel[2]) < 0.2] = False
    mask[..., draw.random(kernel[3]) < 0.2] = False
    x = jnp.asarray(draw.normal(size=images), jnp.float32)
    return x, jnp.asarray(draw.normal(size=kernel), jnp.float32), mask


PADS = st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 2, 16, 17, 40]),
    image=st.tuples(st.integers(7, 12), st.integers(7, 18)),
    channels=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    window=st.tuples(st.sampled_from([1, 2, 3, 5, 7]), st.sampled_from([1, 3, 4, 7])),
    strides=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2])),
    padding=st.one_of(st.just("SAME"), st.just("VALID"), PADS),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    spare=st.integers(0, 3),
)
def test_values_and_gradients(
    seed, batch, image, channels, window, strides, padding, density, spare
):
    x, kernel, mask = case(seed, (batch, *image, channels[0]), (*window, *channels), density)
    indices = kernels.convolution_indices(mask, capacity=int(mask.sum()) + spare)
    assert_same_layer(
        lambda x, w: kernels.sparse_convolution(x, w, indices, strides=strides, padding=padding),
        lambda x, w: convolve(x, w * mask, strides, padding),
        x,
        kernel,
    )


def test_both_ways(way):  # noqa: F811
    x, kernel, mask = case(1, (3, 6, 5, 4), (3, 3, 4, 6), 0.4)
    indices = kernels.convolution_indices(mask, capacity=220)
    for strides in ((1, 1), (2, 1)):
        options = {"strides": strides, "padding": ((1, 0), (2, 1))}
        assert_same_layer(
            functools.partial(kernels.sparse_convolution, indices=indices, **options),
            lambda x, w, options=options: convolve(x, w * mask, *options.values()),
            x,
            kernel,
        )
        assert_same_layer(
            functools.partial(kernels.sparse_convolution_values, indices=indices, **options),
            lambda x, v, options=options: convolve(
                x, kernels.unpack(v, indices), *options.values()
            ),
            x,
            kernels.pack(kernel, indices),
        )


def test_inside_shard_map(way):  # noqa: F811
    """The gradient of the kernel is summed over shards, and that of the images is not."""
    x, kernel, mask = case(3, (len(jax.devices()), 4, 5, 3), (3, 3, 3, 2), 0.5)
    indices = kernels.convolution_indices(mask)
    mesh, split = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    spread = jax.shard_map(
        functools.partial(kernels.sparse_convolution, indices=indices), mesh=mesh,
        in_specs=(split, PartitionSpec()), out_specs=split,
    )  # fmt: skip
    assert_same_layer(spread, lambda x, w: convolve(x, w * mask), x, kernel)


@pytest.mark.parametrize("image", [(0, 5), (4, 0)])
def test_empty_images(image):
    """Values and gradients are empty or 0 where padding alone meets the window."""
    indices = kernels.convolution_indices(np.ones((3, 3, 2, 4), bool))
    layer = functools.partial(kernels.sparse_convolution, indices=indices, padding=((2, 2), (2, 2)))
    y, back = jax.vjp(layer, jnp.zeros((2, *image, 2)), jnp.ones((3, 3, 2, 4)))
    assert y.shape == (2, image[0] + 2, image[1] + 2, 4)
    assert not any(leaf.any() for leaf in (y, *back(jnp.ones(y.shape))))


def test_images_larger_than_the_cache():
    """Several strips of rows of each image, and more tiles than one in a row."""
    x, kernel, mask = case(2, (18, 21, 19, 40), (3, 3, 40, 5), 0.1)
    indices = kernels.convolution_indices(mask)
    for strides in ((1, 1), (2, 2)):
        assert_same_layer(
            functools.partial(kernels.sparse_convolution, indices=indices, strides=strides),
            lambda x, w, strides=strides: convolve(x, w * mask, strides),
            x,
            kernel,
        )


@pytest.mark.parametrize("shape", [(0, 5, 5, 3), (2, 1, 1, 3)])
def test_small_images(shape, way):  # noqa: F811
    x, kernel, mask = case(3, shape, (3, 3, 3, 4), 0.9)
    indices = kernels.convolution_indices(mask)
    layer = functools.partial(kernels.sparse_convolution, indices=indices)
    if shape[0]:
        assert_same_layer(layer, lambda x, w: convolve(x, w * mask), x, kernel)
    else:
        y, pull = jax.vjp(layer, x, kernel)
        assert y.shape == (0, 5, 5, 4) and not np.asarray(pull(y)[1]).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_storage_in_narrow_floats(dtype, way):  # noqa: F811
    x, kernel, mask = case(4, (2, 5, 5, 9), (3, 3, 9, 4), 0.9)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    indices = kernels.convolution_indices(mask)
    y, pull = jax.vjp(lambda x, w: kernels.sparse_convolution(x, w, indices), x, kernel)
    wide = convolve(x.astype(jnp.float32), kernel.astype(jnp.float32) * mask)
    assert y.dtype == dtype and [own.dtype for own in pull(y)] == [dtype, dtype]
    assert_close(y.astype(jnp.float32), wide, {"bfloat16": 2**-8, "float16": 2**-11}[dtype])


def test_pruned_weights_do_not_multiply():
    if reason := kernels.available():
        pytest.skip(reason)
    mask = np.zeros((3, 3, 2, 2), bool)
    mask[1, 1, 0, 0] = mask[1, 2, 1, 1] = True
    indices = kernels.convolution_indices(mask)
    x = jnp.ones((2, 4, 4, 2)).at[0, 1, 1].set(jnp.nan)
    y = np.asarray(kernels.sparse_convolution(x, jnp.ones(mask.shape), indices))
    bad = np.zeros(y.shape, bool)
    bad[0, 1, 1, 0] = bad[0, 1, 0, 1] = True
    np.testing.assert_array_equal(np.isnan(y), bad)


@pytest.mark.parametrize("axes", [(0, None), (0, 0), (None, 0)])
def test_vmap(axes, way):  # noqa: F811
    draw = np.random.default_rng(5)
    mask = draw.random((3, 3, 2, 4)) < 0.5
    indices = kernels.convolution_indices(mask)
    shapes = [(2, 5, 4, 2), mask.shape]
    args = [
        jnp.asarray(draw.normal(size=own if axis is None else (3, *own)), jnp.float32)
        for own, axis in zip(shapes, axes)
    ]
    assert_same_layer(
        jax.vmap(lambda x, w: kernels.sparse_convolution(x, w, indices, strides=2), axes),
        jax.vmap(lambda x, w: convolve(x, w * mask, (2, 2)), axes),
        *args,
    )


def test_gradients_of_gradients(way):  # noqa: F811
    x, kernel, mask = case(6, (2, 5, 5, 2), (3, 3, 2, 3), 0.5)
    indices = kernels.convolution_indices(mask)

    def penalty(layer, x, w):
        first, second = jax.grad(lambda x, w: jnp.sin(layer(x, w)).sum(), (0, 1))(x, w)
        return (first**3).sum() + (second**3).sum()

    def sparse(x, w):
        return kernels.sparse_convolution(x, w, indices, strides=(2, 1))

    def dense(x, w):
        return convolve(x, w * mask, (2, 1))

    own = jax.grad(functools.partial(penalty, sparse), (0, 1))(x, kernel)
    expected = jax.grad(functools.partial(penalty, dense), (0, 1))(x, kernel)
    for left, right in zip(own, expected):
        assert_close(left, right, 1e-4)


def test_new_masks_are_data():
    x, kernel, _ = case(7, (2, 5, 5, 2), (3, 3, 2, 3), 0.5)
    count = 0

    @jax.jit
    def gradient(kernel, indices):
        nonlocal count
        count += 1
        return jax.grad(lambda w: (kernels.sparse_convolution(x, w, indices) ** 2).sum())(kernel)

    for seed in range(3):
        mask = case(seed, x.shape, kernel.shape, 0.5)[2]
        own = gradient(kernel, kernels.convolution_indices(mask, capacity=54))
        assert_close(own, jax.grad(lambda w: (convolve(x, w * mask) ** 2).sum())(kernel))  # noqa: B023
    assert count == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": 3}, "`strides` must be 1 or 2.*is 3"),
        ({"strides": (1, 1, 1)}, "`strides` must be 1 or 2"),
        ({"padding": "WHOLE"}, "`padding` must be .* is 'WHOLE'"),
        ({"padding": ((1, -1), (0, 0))}, "`padding` must be .* not negative"),
        ({"padding": ((1, 1),)}, "`padding` must be"),
        ({"x": jnp.ones((1, 4, 4, 6))}, r"`x` must have .*3 input channels.*grouped"),
        ({"x": jnp.ones((4, 4, 3))}, "`x` must have the shape"),
        ({"x": jnp.ones((1, 1, 4, 3)), "padding": "VALID"}, "`x` must be at least as large"),
        ({"kernel": jnp.ones((1, 1, 3, 2))}, "`kernel` must have the shape"),
    ],
)
def test_wrong_arguments(options, message):
    indices = kernels.convolution_indices(np.ones((3, 3, 3, 2), bool))
    args = {"x": jnp.ones((1, 4, 4, 3)), "kernel": jnp.ones((3, 3, 3, 2)), "indices": indices}
    with pytest.raises(ValueError, match=message):
        kernels.sparse_convolution(**args | options)


def test_without_the_library_the_program_has_no_foreign_call(monkeypatch):
    monkeypatch.setattr(_building, "available", lambda: "switched off by a test")
    indices = kernels.convolution_indices(np.ones((3, 3, 3, 2), bool))
    args = jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 3, 2))
    run = functools.partial(kernels.sparse_convolution, indices=indices)
    assert "ffi_call" not in str(jax.make_jaxpr(run)(*args))
