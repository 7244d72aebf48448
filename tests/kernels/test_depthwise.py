"""Depthwise convolutions: values and derivatives against XLA's, and functions that hold them."""

import functools

import hypothesis.strategies as st
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxprune
from jaxprune import export, kernels, models, structure
from jaxprune.kernels import _building
from tests.kernels.test_products import assert_same_layer, way  # noqa: F401

NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolve(x, kernel, strides=(1, 1), padding="SAME"):
    """The convolution of XLA."""
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=NUMBERS, feature_group_count=x.shape[-1]
    )


def normal(*shape, key=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(key), shape).astype(dtype)


@pytest.fixture
def native():
    """The test needs the library."""
    if reason := kernels.available():
        pytest.skip(reason)


PADS = st.tuples(*[st.tuples(st.integers(0, 5), st.integers(0, 5))] * 2)


@pytest.mark.slow
@given(
    key=st.integers(0, 2**20),
    batch=st.sampled_from([1, 2, 5]),
    image=st.tuples(st.integers(7, 12), st.integers(7, 18)),
    channels=st.sampled_from([2, 3, 8, 15, 16, 17, 33, 70, 129]),
    window=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    strides=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2])),
    padding=st.one_of(st.just("SAME"), st.just("VALID"), PADS),
)
def test_values_and_gradients(key, batch, image, channels, window, strides, padding):
    options = {"strides": strides, "padding": padding}
    assert_same_layer(
        functools.partial(kernels.depthwise_convolution, **options),
        functools.partial(convolve, **options),
        normal(batch, *image, channels, key=key),
        normal(*window, 1, channels, key=key + 1),
    )


def test_both_ways(way):  # noqa: F811
    options = {"strides": (2, 1), "padding": ((1, 0), (2, 1))}
    assert_same_layer(
        functools.partial(kernels.depthwise_convolution, **options),
        functools.partial(convolve, **options),
        normal(3, 6, 5, 20),
        normal(3, 5, 1, 20, key=1),
    )


def test_second_derivatives_and_vmap():
    x, kernel = normal(3, 2, 5, 5, 4), normal(3, 3, 1, 4, key=1)

    def penalty(layer):
        def loss(kernel, x):
            slopes = jax.grad(lambda x: (layer(x, kernel) ** 3).sum())(x)
            return (slopes**2).sum()

        return jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(None, 0))

    own = penalty(kernels.depthwise_convolution)(kernel, x)
    for got, expected in zip(own, penalty(convolve)(kernel, x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-2)
    mapped = jax.vmap(kernels.depthwise_convolution)(x, jnp.stack([kernel, -kernel, 2 * kernel]))
    expected = [convolve(a, b * kernel) for a, b in zip(x, (1, -1, 2))]
    np.testing.assert_allclose(mapped, jnp.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        x, kernel = normal(2, 6, 6, 3, dtype=dtype), normal(3, 3, 1, 3, key=1, dtype=dtype)
        y = kernels.depthwise_convolution(x, kernel)
        wide = convolve(x.astype(jnp.float32), kernel.astype(jnp.float32))
        assert y.dtype == dtype
        np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("x", "kernel", "options", "words"),
    [
        ((1, 4, 4, 3), (3, 3, 1, 4), {}, "`kernel` must have the shape"),
        ((1, 4, 4, 3), (3, 3, 3, 3), {}, "`kernel` must have the shape"),
        ((4, 4, 3), (3, 3, 1, 3), {}, "`kernel` must have the shape"),
        ((1, 4, 4, 3), (3, 3, 1, 3), {"strides": 3}, "`strides` must be 1 or 2"),
        ((1, 4, 4, 3), (3, 3, 1, 3), {"padding": "FULL"}, "`padding` must be"),
        ((1, 4, 4, 3), (3, 3, 1, 3), {"padding": ((-1, 0), (0, 0))}, "not negative"),
        ((1, 2, 2, 3), (3, 3, 1, 3), {"padding": "VALID"}, "at least as large as the window"),
    ],
)
def test_wrong_arguments(x, kernel, options, words):
    with pytest.raises(ValueError, match=words):
        kernels.depthwise_convolution(jnp.ones(x), jnp.ones(kernel), **options)


@pytest.mark.parametrize(
    ("window", "kernel"), [([3, 3], (3, 3, 2, 2)), ([3, 5], (3, 3, 1, 2)), ([3, 3], (3, 3, 1, 3))]
)
def test_the_handler_checks_shapes(native, window, kernel):
    """Whatever the Python side has got wrong is an error there, not a fault of memory."""
    name, result = "jaxprune_depthwise_forward", jax.ShapeDtypeStruct((1, 4, 4, 2), "float32")
    call = jax.ffi.ffi_call(_building.target(name), result)
    sizes = {"window": window, "strides": [1, 1], "padding": [1, 1, 1, 1]}
    sizes = {name: np.array(value, np.int64) for name, value in sizes.items()}
    errors = ValueError, jax.errors.JaxRuntimeError  # which of them depends on the version of JAX
    with pytest.raises(errors, match="jaxprune: "):
        jax.block_until_ready(call(jnp.ones((1, 4, 4, 2)), jnp.ones(kernel), **sizes))


@pytest.mark.parametrize(
    ("x", "padding"),
    [
        ((0, 4, 4, 3), "SAME"),
        ((2, 0, 4, 3), ((2, 2), (1, 1))),
        ((2, 4, 0, 3), ((0, 1), (3, 3))),
    ],
)
def test_empty_images(x, padding):
    """Values and gradients are empty or 0, also where padding alone meets the window."""
    options = {"strides": (1, 2), "padding": padding}
    x, kernel = jnp.zeros(x), normal(3, 3, 1, x[-1])

    def both(layer):
        y, back = jax.vjp(functools.partial(layer, **options), x, kernel)
        return y, back(jnp.ones(y.shape))

    own, expected = (jax.tree.leaves(both(f)) for f in (kernels.depthwise_convolution, convolve))
    assert [leaf.shape for leaf in own] == [leaf.shape for leaf in expected]
    assert not any(leaf.any() for leaf in own)
    fast = kernels.replace_depthwise(functools.partial(convolve, **options))
    assert np.array_equal(fast(x, kernel), expected[0])


# ---- functions


def count(function, *args):
    """Counts the convolutions and the forward passes of kernels in a program."""

    def names(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name, str(equation.params.get("target_name", ""))
            for own in jax.extend.core.jaxprs_in_params(equation.params):
                yield from names(own)

    found = list(names(jax.make_jaxpr(function)(*args).jaxpr))
    convolutions = sum(name == "conv_general_dilated" for name, _ in found)
    return convolutions, sum("depthwise_forward" in target for _, target in found)


def nested(params, x):
    """Depthwise convolutions in the function, in `jit`, in `jax.checkpoint` and in a branch."""
    layer = functools.partial(convolve, kernel=params["w"])
    x = jax.jit(layer)(layer(x))
    x = jax.checkpoint(lambda x: jnp.sin(jax.jit(layer)(x) / 99))(x)
    return jax.lax.cond(x.sum() > 0, layer, lambda x: x, x)


def test_a_function_with_depthwise_convolutions(native):
    params, x = {"w": normal(3, 3, 1, 5)}, normal(2, 6, 6, 5, key=1)
    fast = kernels.replace_depthwise(nested)
    assert count(nested, params, x) == (4, 0) and count(fast, params, x)[1] == 4
    assert_same_layer(
        lambda x, w: fast({"w": w}, x), lambda x, w: nested({"w": w}, x), x, params["w"]
    )


@pytest.mark.parametrize("outside", [False, True])
def test_inside_shard_map(native, outside):
    """The gradient of the windows is summed over shards, and that of the images is not."""
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def spread(layer):
        own = (PartitionSpec("data"), PartitionSpec())
        return jax.shard_map(layer, mesh=mesh, in_specs=own, out_specs=own[0])

    fast = kernels.replace_depthwise(spread(convolve)) if outside else None
    fast = fast or spread(kernels.replace_depthwise(convolve))
    x, kernel = normal(len(jax.devices()), 4, 5, 3), normal(3, 3, 1, 3, key=1)
    assert count(fast, x, kernel)[1] == (not outside)  # a function that is mapped is left
    assert_same_layer(fast, convolve, x, kernel)
    assert_same_layer(spread(kernels.depthwise_convolution), convolve, x, kernel)


@pytest.mark.parametrize("devices", [1, 8])
def test_explicit_axes_are_left(native, devices):
    own = jax.devices()[:devices]
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Explicit,), devices=own)
    with jax.set_mesh(mesh):
        x = jax.device_put(normal(8, 4, 5, 3), NamedSharding(mesh, PartitionSpec("data")))
        kernel = jax.device_put(normal(3, 3, 1, 3, key=1), NamedSharding(mesh, PartitionSpec()))
        for fast in (kernels.replace_depthwise(convolve), kernels.depthwise_convolution):
            assert count(fast, x, kernel)[1] == 0
            assert jax.typeof(fast(x, kernel)) == jax.typeof(convolve(x, kernel))
            slopes = jax.grad(lambda *args, f=fast: (f(*args) ** 2).sum(), argnums=(0, 1))
            assert jax.tree.map(jnp.shape, jax.jit(slopes)(x, kernel)) == (x.shape, kernel.shape)


def test_types_of_outputs_are_kept(native):
    """Numbers stay weakly typed, so that they do not widen what is computed from them."""

    def function(kernel, x):
        y, number = jax.lax.cond(x.sum() > 0, lambda: (convolve(x, kernel), 1.0), lambda: (x, 2.0))
        return y, number, 3.0 + 0 * number, 4, jnp.float32(5), jax.lax.full((), 6), None, "seven"

    args = normal(3, 3, 1, 5, dtype=jnp.bfloat16), normal(2, 6, 6, 5, key=1, dtype=jnp.bfloat16)
    fast = kernels.replace_depthwise(function)
    assert count(lambda *args: fast(*args)[:-1], *args)[1] == 1
    assert jax.tree.map(jax.typeof, fast(*args)[:-1]) == jax.tree.map(
        jax.typeof, function(*args)[:-1]
    )
    assert fast(*args)[-1] == "seven"


def test_other_orders_of_dimensions(native):
    def function(params, x):
        numbers = ("NCHW", "OIHW", "NCHW")
        return jax.lax.conv_general_dilated(
            x, params, (2, 1), "SAME", dimension_numbers=numbers, feature_group_count=6
        )

    params, x = normal(6, 1, 3, 5), normal(2, 6, 7, 8, key=1)
    fast = kernels.replace_depthwise(function)
    assert count(fast, params, x)[1] == 1
    assert_same_layer(lambda x, w: fast(w, x), lambda x, w: function(w, x), x, params)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 2},
        {"feature_group_count": 4, "rhs_dilation": (2, 2)},
        {"feature_group_count": 4, "lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))},
        {"feature_group_count": 4, "window_strides": (3, 1)},
        {"feature_group_count": 4, "padding": ((-1, 1), (1, 1))},
    ],
)
def test_other_convolutions_are_left(native, options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    kernel = normal(3, 3, 4 // options["feature_group_count"], 4)

    def function(kernel, x):
        return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=NUMBERS, **options)

    x = normal(2, 8, 8, 4, key=1)
    fast = kernels.replace_depthwise(function)
    assert count(fast, kernel, x)[1] == 0
    assert np.array_equal(fast(kernel, x), function(kernel, x))


@pytest.mark.parametrize("shape", [(3, 3, 1, 8), (1, 1, 1, 4)])
def test_more_outputs_than_inputs_and_windows_of_one_weight_are_left(native, shape):
    kernel, x = normal(*shape), normal(2, 8, 8, 4, key=1)

    def function(kernel, x):
        return convolve(x, kernel)

    fast = kernels.replace_depthwise(function)
    assert count(fast, kernel, x)[1] == 0
    assert np.array_equal(fast(kernel, x), function(kernel, x))


def test_without_kernels_the_function_is_left(monkeypatch):
    monkeypatch.setattr(_building, "_loaded", lambda: ("", "there is no compiler"))
    params, x = {"w": normal(3, 3, 1, 5)}, normal(2, 6, 6, 5, key=1)
    assert count(kernels.replace_depthwise(nested), params, x) == (4, 0)


def test_it_is_not_exported(native):
    params, x = {"w": normal(3, 3, 1, 5)}, normal(2, 6, 6, 5, key=1)
    with pytest.raises(ValueError, match="custom calls"):
        export.jax(kernels.replace_depthwise(nested), params, x, "never.bin")
    with pytest.raises(TypeError, match="`function` must be a function"):
        kernels.replace_depthwise(3)


def test_wrapped_functions_replace_them_in_dense_steps_as_well(native):
    """Masked and unmasked ones; the gradient of a masked weight is that of the function."""

    def function(params, x):
        x = convolve(convolve(x, params["masked"]), params["other"])
        return x.mean((1, 2)) @ params["head"]

    keys = iter(range(9))
    params = {
        "masked": normal(3, 3, 1, 5, key=next(keys)),
        "other": normal(5, 5, 1, 5, key=next(keys)),
        "head": normal(5, 4, key=next(keys)),
    }
    masks = {"masked": normal(3, 3, 1, 5, key=7) > 0, "head": normal(5, 4, key=8) > 0}
    masks |= {"other": True}
    params, x = jaxprune.apply_masks(params, masks), normal(2, 6, 6, 5, key=9)
    wrapped = kernels.wrap(function, masks, params, x, table="always")
    assert wrapped.depthwise == 2 and list(wrapped.indices) == ["head"]
    assert "1 of 2 masked leaves have sparse kernels, 2 depthwise convolutions" in str(wrapped)
    for indices in ({}, wrapped.indices):
        run = functools.partial(wrapped, indices=indices)
        assert count(run, params, x)[1] == 2
        np.testing.assert_allclose(run(params, x), function(params, x), rtol=1e-5, atol=1e-5)
        own, expected = (jax.grad(lambda p, f=f: f(p, x).sum())(params) for f in (run, function))
        for name in ("masked", "other"):
            np.testing.assert_allclose(own[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mbconv"])
def test_models(native, name):
    options = {"num_classes": 4, "in_channels": 1, "rngs": nnx.Rngs(0)}
    if name != "mbconv":
        options["widths"] = models.default_widths(name, 0.25)
    functions = structure.from_nnx(getattr(models, name)(**options))
    variables, images = functions.variables, normal(4, 32, 32, 1)
    fast = kernels.replace_depthwise(functions.evaluate)
    layers = {"mobilenet_v1": 13, "mobilenet_v2": 17, "mbconv": 6}[name]
    assert count(fast, variables, images)[1] == layers
    slopes = [
        jax.grad(lambda v, f=f: (f(v, images) ** 2).sum())(variables)
        for f in (fast, functions.evaluate)
    ]
    for own, expected in zip(*map(jax.tree.leaves, slopes), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
