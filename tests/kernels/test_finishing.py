"""What follows a product up to a ReLU, computed by the kernel itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import kernels, models, structure
from jaxprune.kernels import _finishing, _operations

pytestmark = pytest.mark.skipif(kernels.available() is not None, reason="no kernels here")

DRAW = np.random.default_rng(0)
MASK = DRAW.random((3, 3, 5, 8)) < 0.4
X = jnp.asarray(DRAW.normal(size=(3, 6, 7, 5)), jnp.float32)
PARAMS = {
    "w": jnp.asarray(np.where(MASK, DRAW.normal(size=MASK.shape), 0), jnp.float32),
    "scale": jnp.asarray(DRAW.normal(size=8), jnp.float32),
    "bias": jnp.asarray(DRAW.normal(size=8), jnp.float32),
    "mean": jnp.asarray(DRAW.normal(size=8), jnp.float32),
    "var": jnp.asarray(DRAW.uniform(0.5, 2, size=8), jnp.float32),
}


def each(numbers):
    """Numbers of the channels, at every position."""
    return numbers[None, None, None]


def convolve(params, x, strides=(1, 1)):
    return jax.lax.conv_general_dilated(
        x, params["w"], strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def norm(params, y):
    return (y - each(params["mean"])) * jax.lax.rsqrt(each(params["var"]) + 1e-5) * each(
        params["scale"]
    ) + each(params["bias"])


def relu(params, x):
    return jax.nn.relu(convolve(params, x))


def relu6(params, x):
    return jax.nn.relu6(3 * convolve(params, x, (2, 2)) + each(params["bias"]))


def normed(params, x):
    return jax.nn.relu(norm(params, convolve(params, x)))


def maximum(params, x):
    return jnp.maximum(norm(params, convolve(params, x)), 0)


def clipped(params, x):
    return jnp.minimum(jnp.maximum(convolve(params, x) / each(params["var"]), -0.5), 0.5)


def residual(params, x):
    y = norm(params, convolve(params, x))
    return jax.nn.relu(y + jnp.repeat(x, 2, axis=-1)[..., :8])


def residual_first(params, x):
    return jax.nn.relu(jnp.repeat(x, 2, axis=-1)[..., :8] + convolve(params, x))


def repeated(params, x):
    y = convolve(params, x)
    return jax.nn.relu(y + jnp.broadcast_to(each(params["bias"]), y.shape))


def inside_jit(params, x):
    y = convolve(params, x)
    return jax.jit(lambda y, bias: jax.nn.relu(y + bias))(y, each(params["bias"]))


def two(params, x):
    y = jax.nn.relu(convolve(params, x) + each(params["bias"]))
    return jax.nn.relu(convolve(params, y[..., :5])) + y


def own_rule(params, x):
    """A ReLU whose derivative is the user's."""
    act = jax.custom_jvp(lambda y: jnp.maximum(y, 0))
    act.defjvp(lambda primals, tangents: (act(*primals), 3 * tangents[0]))
    return act(convolve(params, x))


FINISHED = [
    (relu, 1), (relu6, 1), (normed, 1), (maximum, 1), (clipped, 1), (residual, 1),
    (residual_first, 1), (repeated, 1), (inside_jit, 1), (two, 2),
    (own_rule, 1),
]  # fmt: skip


def read_twice(params, x):
    y = convolve(params, x)
    return jax.nn.relu(y) + y


def read_twice_inside(params, x):
    y = convolve(params, x)
    return jax.jit(lambda y: jax.nn.relu(y) * y)(y)


def other_way(params, x):
    """A scale of positions instead of channels, and of a sum."""
    y = convolve(params, x)
    y = jax.nn.relu(y * jnp.arange(7.0)[None, None, :, None])
    z = convolve(params, x) + y
    return jax.nn.relu(z * each(params["scale"]))


def gelu(params, x):
    return jax.nn.gelu(convolve(params, x) + each(params["bias"]))


def identity(params, x):
    """A function that only has a derivative of its own."""
    act = jax.custom_jvp(lambda y: y)
    act.defjvp(lambda primals, tangents: (act(*primals), 3 * tangents[0]))
    return act(convolve(params, x))


def in_a_scan(params, x):
    """The product is computed once, and read at every step."""
    y = convolve(params, x)
    scaled = lambda total, scale: (total + jax.nn.relu(y * scale + params["w"].sum()), None)  # noqa: E731
    return jax.lax.scan(scaled, 0 * y, jnp.arange(3.0))[0]


def in_a_branch(params, x):
    y = convolve(params, x)
    own = lambda y, w: jax.nn.relu(y) + w.sum()  # noqa: E731
    return jax.lax.cond(x.sum() > 0, own, lambda y, w: y, y, params["w"])


def recomputed(params, x):
    y = convolve(params, x)
    return jax.checkpoint(lambda y, w: jax.nn.relu(y) + w.sum())(y, params["w"])


def channels_first(params, x):
    y = jax.lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NCHW")
    )
    return jax.nn.relu(y)


def narrow(params, x):
    return jax.nn.relu(convolve({"w": params["w"].astype(jnp.bfloat16)}, x.astype(jnp.bfloat16)))


LEFT = [
    read_twice, read_twice_inside, other_way, gelu, identity, in_a_scan, in_a_branch, recomputed,
    channels_first, narrow,
]  # fmt: skip


def wrapped_of(function, x=X, params=PARAMS, **options):
    masks = {**dict.fromkeys(params, True), "w": MASK}
    return kernels.wrap(function, masks, params, x, table="always", gradients=False, **options)


def calls(function, *args):
    """How many kernels of a compiled function finish what follows, and how many do not."""
    text = jax.jit(function).lower(*args).compile().as_text()
    finished = text.count("_finished_")
    return finished, text.count('custom_call_target="jaxprune_') - finished


def by_blocks(mask, wanted):
    """The mask, or one of blocks of 16 outputs, which have kernels of their own."""
    return np.repeat(mask[..., ::16], 16, axis=-1)[..., : mask.shape[-1]] if wanted else mask


def assert_close(found, wanted, tolerance=1e-5):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * (np.abs(wanted).max() + 1e-30)


@pytest.mark.parametrize("function, count", FINISHED, ids=lambda own: getattr(own, "__name__", ""))
def test_a_kernel_finishes_what_follows(function, count):
    wrapped = wrapped_of(function)
    assert calls(wrapped, PARAMS, X) == (count, 0)
    assert_close(jax.jit(wrapped)(PARAMS, X), function(PARAMS, X))
    assert_close(wrapped(PARAMS, X), function(PARAMS, X))  # not compiled as a whole


@pytest.mark.parametrize("function", LEFT, ids=lambda own: own.__name__)
def test_what_a_kernel_cannot_do_is_left(function):
    wrapped = wrapped_of(function)
    finished, plain = calls(wrapped, PARAMS, X)
    assert (finished, plain) == (0, 1)
    tolerance = 2e-2 if function is narrow else 1e-5
    assert_close(jax.jit(wrapped)(PARAMS, X), function(PARAMS, X), tolerance)


def test_training_is_left():
    """Its norms need the sums, and its gradients what was clamped."""
    masks = {**dict.fromkeys(PARAMS, True), "w": MASK}
    wrapped = kernels.wrap(normed, masks, PARAMS, X, table="always")
    assert calls(wrapped, PARAMS, X) == (0, 1)


@pytest.mark.parametrize("function", [relu, relu6, maximum, clipped, residual, two, own_rule])
def test_gradients(function):
    """Also at the limits, which inputs of zeros reach."""
    x = X.at[0].set(0)

    def loss(apply):
        return lambda params, x: (apply(params, x) ** 2).sum() + apply(params, x).sum()

    params = PARAMS | {"bias": PARAMS["bias"].at[:4].set(0)}
    wanted = jax.grad(loss(function), (0, 1))(params, x)
    found = jax.jit(jax.grad(loss(wrapped_of(function)), (0, 1)))(params, x)
    wanted[0]["w"] = jnp.where(MASK, wanted[0]["w"], 0)
    for path, own in jax.tree.leaves_with_path(wanted):
        own_found = dict(jax.tree.leaves_with_path(found))[path]
        assert_close(own_found, own)


def test_a_kernel_with_an_axis_of_one():
    mask = MASK[1, 1][:, None]
    params = {"w": PARAMS["w"][1, 1][:, None], "bias": PARAMS["bias"]}

    def function(params, x):
        y = jnp.einsum("brci,iko->brcko", x, params["w"])
        return jax.nn.relu(y + params["bias"][None, None, None, None])

    wrapped = kernels.wrap(
        function, {"w": mask, "bias": True}, params, X, table="always", gradients=False
    )
    assert calls(wrapped, params, X) == (1, 0)
    assert_close(jax.jit(wrapped)(params, X), function(params, X))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_inside_shard_map_and_on_meshes(kind):
    """Nothing is finished where types say how arrays are split; results are the same."""
    x = jnp.concatenate([X, X[:1]] * 2)  # 8 images
    wanted = residual(PARAMS, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    whole = jax.device_put(PARAMS, jax.NamedSharding(mesh, jax.P()))
    one = wrapped_of(residual, x[:1])
    spread = jax.jit(
        jax.shard_map(one, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P("data"))
    )
    assert calls(spread, whole, split) == (0, 1)
    assert_close(spread(whole, split), wanted)
    with jax.set_mesh(mesh):
        assert_close(jax.jit(wrapped_of(residual, x))(whole, split), wanted)


def test_not_a_number_and_infinity_pass():
    x = X.at[0, 0, 0].set(jnp.nan).at[1, 0, 0].set(jnp.inf)
    mask = np.ones_like(MASK)
    params = PARAMS | {"w": jnp.asarray(np.abs(DRAW.normal(size=mask.shape)), jnp.float32)}
    masks = {**dict.fromkeys(PARAMS, True), "w": mask}
    for function in (relu, relu6, clipped):
        wrapped = kernels.wrap(function, masks, params, x, table="always", gradients=False)
        found, wanted = jax.jit(wrapped)(params, x), function(params, x)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
        assert np.isnan(found).any()


def test_vmap():
    xs = jnp.stack([X, 2 * X])
    wrapped = wrapped_of(residual)
    found = jax.jit(jax.vmap(wrapped, (None, 0)))(PARAMS, xs)
    assert_close(found, jax.vmap(residual, (None, 0))(PARAMS, xs))
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 3 * leaf]), PARAMS)
    found = jax.jit(jax.vmap(wrapped, (0, None)))(many, X)
    assert_close(found, jax.vmap(residual, (0, None))(many, X))


@given(
    rows=st.integers(1, 70), inputs=st.integers(1, 20), outputs=st.integers(1, 40),
    density=st.floats(0, 1), parts=st.tuples(st.booleans(), st.booleans()), seed=st.integers(0, 99),
    blocks=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_products_of_any_shape(rows, inputs, outputs, density, parts, seed, blocks):
    draw = np.random.default_rng(seed)
    mask = by_blocks(draw.random((inputs, outputs)) < density, blocks)
    normal = [draw.normal(size=s).astype(np.float32) for s in ((rows, inputs), mask.shape, outputs,
              outputs, (rows, outputs))]  # fmt: skip
    x, w, scale, shift, rest = map(jnp.asarray, normal)
    finish = _finishing.Finish(
        *((scale, shift) if parts[0] else (None, None)), rest if parts[1] else None, low=-0.3
    )
    indices = kernels.product_indices(mask)
    found = _operations.finished_product(x, w, indices, finish)
    y = np.float64(x) @ np.where(mask, np.float64(w), 0)
    y = y * np.float64(scale)[None] + np.float64(shift)[None] if parts[0] else y
    y = y + np.float64(rest) if parts[1] else y
    np.testing.assert_allclose(found, np.maximum(y, -0.3), rtol=1e-4, atol=1e-4)


@given(
    batch=st.integers(1, 18), size=st.integers(3, 9), channels=st.integers(1, 20),
    outputs=st.integers(1, 40), stride=st.sampled_from([1, 2]), rest=st.booleans(),
    kind=st.sampled_from(["sparse", "blocks", "depthwise"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_convolutions_of_any_shape(batch, size, channels, outputs, stride, rest, kind, seed):
    draw = np.random.default_rng(seed)
    outputs = channels if kind == "depthwise" else outputs
    x = jnp.asarray(draw.normal(size=(batch, size, size, channels)), jnp.float32)
    shape = (3, 3, 1 if kind == "depthwise" else channels, outputs)
    w = jnp.asarray(draw.normal(size=shape), jnp.float32)
    mask = draw.random(shape) < (1 if kind == "depthwise" else 0.4)
    mask = by_blocks(mask, kind == "blocks")
    sums = jax.lax.conv_general_dilated(
        x, w * mask, (stride, stride), ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels if kind == "depthwise" else 1,
    )  # fmt: skip
    own = [jnp.asarray(draw.normal(size=outputs), jnp.float32) for _ in range(2)]
    more = jnp.asarray(draw.normal(size=sums.shape), jnp.float32) if rest else None
    finish = _finishing.Finish(*own, more, low=0.0, high=1.5)
    options = {"strides": (stride, stride), "padding": ((1, 1), (1, 1))}
    if kind == "depthwise":
        found = _operations.finished_depthwise(x, w, finish, **options)
    else:
        indices = kernels.convolution_indices(mask)
        found = _operations.finished_convolution(x, w, indices, finish, **options)
    wanted = sums * each(own[0]) + each(own[1]) + (more if rest else 0)
    np.testing.assert_allclose(found, jnp.clip(wanted, 0, 1.5), rtol=1e-4, atol=1e-4)


def test_norms_of_flax():
    """BatchNorm of NNX and of Linen, in evaluation mode, with statistics that are not 0 and 1."""

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(5, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.norm.mean[...] = PARAMS["mean"]
            self.norm.var[...] = PARAMS["var"]

        def __call__(self, x):
            return nnx.relu(self.norm(self.conv(x)))

    layer = Layer(nnx.Rngs(0))
    layer.eval()
    graph, state = nnx.split(layer)
    state.conv.kernel[...] = PARAMS["w"]
    masks = jax.tree.map(lambda leaf: MASK if leaf.shape == MASK.shape else True, state)
    wrapped = kernels.wrap(
        lambda state, x: nnx.merge(graph, state)(x), masks, state, X, table="always",
        gradients=False,
    )  # fmt: skip
    assert calls(wrapped, state, X) == (1, 0)
    assert_close(jax.jit(wrapped)(state, X), nnx.merge(graph, state)(X))

    net = linen.Sequential([linen.Dense(8), linen.BatchNorm(use_running_average=True), linen.relu])
    variables = net.init(jax.random.key(0), X[0, 0])
    mask = MASK[0, 0]
    kernel = variables["params"]["layers_0"]["kernel"]
    variables["params"]["layers_0"]["kernel"] = kernel * mask
    masks = jax.tree.map(lambda leaf: mask if leaf.shape == mask.shape else True, variables)
    wrapped = kernels.wrap(net.apply, masks, variables, X[0, 0], table="always", gradients=False)
    assert calls(wrapped, variables, X[0, 0]) == (1, 0)
    assert_close(jax.jit(wrapped)(variables, X[0, 0]), net.apply(variables, X[0, 0]))


@pytest.mark.parametrize("name, finished", [("resnet8", 7), ("mobilenet_v2", 35)])
def test_whole_networks(name, finished):
    """A residual sum is finished, the projection of its other branch and linear layers are not."""
    options = {"num_classes": 3, "rngs": nnx.Rngs(0)}
    if name == "mobilenet_v2":
        options["widths"] = models.default_widths(name, 0.25)
    own = structure.from_nnx(getattr(models, name)(**options), state="model_state")
    x = jnp.asarray(DRAW.normal(size=(2, 32, 32, 3)), jnp.float32)
    masks = jax.tree.map(
        lambda leaf: np.random.default_rng(1).random(leaf.shape) < 0.5 if leaf.ndim > 1 else True,
        own.variables["params"],
    )
    everything = jax.tree.map(lambda _: True, own.variables) | {"params": masks}
    variables = own.variables | {
        "params": jax.tree.map(lambda w, m: w * m, own.variables["params"], masks),
        "model_state": jax.tree.map(lambda s: s + 0.3, own.variables["model_state"]),
    }
    wrapped = kernels.wrap(own.evaluate, everything, variables, x, table="always", gradients=False)
    assert calls(wrapped, variables, x)[0] == finished
    assert_close(jax.jit(wrapped)(variables, x), own.evaluate(variables, x))
