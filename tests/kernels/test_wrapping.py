"""`kernels.wrap`: values and gradients of the masked dense function, whatever surrounds it."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune
from jaxprune import kernels, models, structure, trees
from tests.support import zoo_linen, zoo_nnx
from tests.support.clients import CLIENTS, IMAGES
from tests.support.sparse import compare, drawn_masks, gap

KEYS = jax.random.split(jax.random.key(0), 8)


def normal(*shape, key=0):
    return jax.random.normal(KEYS[key], shape)


def mlp(params, x):
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["head"]["kernel"]


def mlp_params():
    sizes = {"first": (12, 20), "second": (20, 16), "head": (16, 5)}
    params = {
        name: {"kernel": normal(*shape, key=i), "bias": normal(shape[1], key=i)}
        for i, (name, shape) in enumerate(sizes.items())
    }
    del params["head"]["bias"]
    return params


X = normal(6, 12, key=7)
MLP = mlp_params()
MASKS = drawn_masks(MLP)


def test_mlp_equals_the_masked_dense_one():
    wrapped, values, gradients = compare(mlp, MASKS, MLP, X)
    assert list(wrapped.indices) == ["first/kernel", "head/kernel", "second/kernel"]
    assert max(values, gradients) < 1e-5


def test_gradients_of_masked_weights_are_zero_where_a_kernel_is_used():
    params = jaxprune.apply_masks(MLP, MASKS)
    wrapped = kernels.wrap(mlp, MASKS, params, X, table="always")
    loss = lambda call, **options: jax.grad(lambda p: call(p, X, **options).sum())(params)  # noqa: E731
    removed = ~MASKS["first"]["kernel"]
    assert not np.any(np.asarray(loss(wrapped)["first"]["kernel"])[removed])
    dense = np.asarray(loss(wrapped, indices={})["first"]["kernel"])
    assert np.count_nonzero(dense[removed]) > 50
    assert gap(dense, loss(mlp)["first"]["kernel"]) == 0


# ---- what may be between a leaf and its product


def times_own_mask(params, x):
    return x @ (params["w"] * MASK)


def where_own_mask(params, x):
    return x @ jnp.where(MASK, params["w"], 0)


def applied(params, x):
    return x @ jaxprune.apply_masks(params, {"w": jnp.asarray(MASK)})["w"]


def scaled_to_length(params, x):
    w = params["w"]
    return x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True) * 3.0)


def scaled_by_data(params, x):
    return x @ (-params["w"] * jnp.max(x))


def transposed(params, x):
    return x @ params["w"].T.reshape(4, 2, 12).reshape(8, 12).T


def left(params, x):
    return params["w"].T @ x.T


def of_heads(params, x):
    return jnp.einsum("bk,khd->bhd", x, params["w"].reshape(12, 2, 4))


def from_heads(params, x):
    return jnp.einsum("bhk,hkd->bd", x.reshape(6, 3, 4), params["w"].reshape(3, 4, 8))


def cast(params, x):
    return (x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)).astype(jnp.float32)


def wider(params, x):
    a, b = x.astype(jnp.bfloat16), params["w"].astype(jnp.bfloat16)
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def jitted(params, x):
    return jax.jit(lambda w, x: x @ w)(params["w"], x)


def rematerialised(params, x):
    return jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w)))(params["w"], x)


def shared_by_scan(params, x):
    def step(h, row):
        return jnp.tanh(row @ params["w"] + h), None

    return jax.lax.scan(step, jnp.zeros(8), x)[0]


def in_branches(params, x):
    def one(w, x):
        return x @ w

    def other(w, x):
        return jnp.sin(x @ (2.0 * w))

    return jax.lax.cond(x[0, 0] > 0, one, other, params["w"], x)


def twice(params, x):
    y = x @ params["w"]
    return y + jnp.sin(x) @ params["w"], y @ params["w"].T


def mapped(params, x):
    return jax.vmap(lambda row: row @ params["w"])(x)


def penalised(params, x):
    return x @ params["w"] + jnp.sum(params["w"] ** 2) + jnp.sum(jnp.abs(params["w"]))


def own_gradient(params, x):
    """The gradient of a product has a product with the same kernel."""
    return jax.grad(lambda x: jnp.sum(jnp.sin(x @ params["w"])))(x)


W = normal(12, 8, key=3)
MASK = np.random.default_rng(5).random((12, 8)) < 0.5
THROUGH = [
    times_own_mask, where_own_mask, applied, scaled_to_length, scaled_by_data, transposed, left,
    of_heads, from_heads, cast, wider, jitted, rematerialised, shared_by_scan, in_branches, twice,
    mapped, penalised, own_gradient,
]  # fmt: skip


@pytest.mark.parametrize("function", THROUGH, ids=lambda own: own.__name__)
def test_a_kernel_is_followed(function):
    wrapped, values, gradients = compare(function, {"w": MASK}, {"w": W}, X)
    assert wrapped.indices, wrapped
    assert sparse_operations(function, wrapped) > 0
    assert max(values, gradients) < (2e-2 if function is cast else 1e-5)


@pytest.mark.parametrize("apart", [True, False, (True, False)])
def test_a_function_that_recomputes_in_its_own_gradient_still_does(apart):
    """XLA must not merge what is computed again with what was computed before."""

    def layer(w, x):
        return jnp.sin(x @ w)

    def gradient(params, x):
        again = jax.checkpoint(layer, prevent_cse=apart)
        return jax.grad(lambda x: again(params["w"], x).sum())(x)

    wrapped, values, gradients = compare(gradient, {"w": MASK}, {"w": W}, X)
    assert wrapped.indices and max(values, gradients) < 1e-5
    text = jax.jit(wrapped).lower({"w": jnp.where(MASK, W, 0)}, X).as_text()
    assert ("optimization_barrier" in text) == (apart is not False)


def sparse_operations(function, wrapped):
    """How many products of the function call a kernel, by counting calls while tracing."""
    counts = []
    from jaxprune.kernels import _sites

    with pytest.MonkeyPatch.context() as patch:
        of = _sites.operations.sparse_product
        patch.setattr(
            _sites.operations,
            "sparse_product",
            lambda *args: (counts.append(args[1].shape), of(*args))[1],
        )
        jax.make_jaxpr(wrapped)({"w": jnp.where(MASK, W, 0)}, X)
    del function
    return len(counts)


def added(params, x):
    return x @ (params["w"] + x[0, 0])


def exponential(params, x):
    return x @ jnp.exp(params["w"])


def where_something(params, x):
    return x @ jnp.where(MASK, params["w"], 1.0)


def stacked(params, x):
    return jax.lax.scan(lambda h, w: (h @ w @ w.T, None), x, params["w"].reshape(3, 4, 8)[:, :, :])[
        0
    ]


def batched(params, x):
    return jnp.einsum("bhk,hkd->bhd", x.reshape(6, 3, 4), params["w"].reshape(3, 4, 8))


def sliced(params, x):
    return x @ params["w"][:, :4]


def picked(params, x):
    return x[:, :8] @ params["w"][0]


def custom(params, x):
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g * 2, g @ r[0].T))
    return product(params["w"], x)


def integer(params, x):
    return (x * 10).astype(jnp.int32) @ params["w"].astype(jnp.int32)


def half(params, x):
    return x.astype(jnp.float16) @ params["w"].astype(jnp.float16)


def unused(params, x):
    return x


LEFT = {
    added: "used by `add`",
    exponential: "used by `exp`",
    where_something: "used by `select_n`",
    stacked: "a scan stacks it with other layers",
    batched: "a product with batch dimensions",
    sliced: "used by `slice`",
    picked: "used by `",
    custom: "used by `custom_vjp_call`",
    integer: "used by `convert_element_type`",
    half: "computed in float16",
    unused: "the function never multiplies it",
}


@pytest.mark.parametrize("function", LEFT, ids=lambda own: own.__name__)
def test_all_else_is_left_as_it_is_and_said(function):
    params = {"w": jnp.where(MASK, W, 0)}
    if function is stacked:
        params = {"w": params["w"]}

        def run(params, x):
            return stacked(params, x[:, :4])
    else:
        run = function
    wrapped = kernels.wrap(run, {"w": MASK}, params, X, table="always")
    assert not wrapped.indices
    assert LEFT[function] in str(wrapped)
    own, wanted = jax.jit(wrapped)(params, X), jax.jit(run)(params, X)
    assert np.array_equal(own, wanted)
    if function is not integer:
        own, wanted = (
            jax.grad(lambda p, call=call: jnp.sum(call(p, X)).astype(jnp.float32))(params)["w"]
            for call in (wrapped, run)
        )
        assert np.array_equal(own, wanted)


def test_derivative_rules_beside_a_kernel_remain():
    @jax.custom_jvp
    def doubled(x):
        return x

    doubled.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))

    def function(params, x):
        return doubled(x @ params["w"])

    wrapped, values, gradients = compare(function, {"w": MASK}, {"w": W}, X)
    assert wrapped.indices and max(values, gradients) < 1e-5
    params = {"w": jnp.where(MASK, W, 0)}
    plain = jax.grad(lambda p: (X @ p["w"]).sum())(params)["w"] * MASK
    assert gap(jax.grad(lambda p: wrapped(p, X).sum())(params)["w"], 2 * plain) < 1e-6


def test_a_mixed_function_keeps_its_other_products():
    """One leaf is a kernel in one product and something else in another."""

    def function(params, x):
        return x @ params["w"], x @ jnp.exp(params["w"])

    wrapped, values, gradients = compare(function, {"w": MASK}, {"w": W}, X)
    assert "used by `exp`" in str(wrapped) and wrapped.indices
    assert max(values, gradients) < 1e-5


# ---- convolutions


@pytest.mark.slow
@hypothesis.settings(max_examples=12)
@hypothesis.given(
    strides=st.tuples(*[st.sampled_from([1, 2])] * 2),
    window=st.sampled_from([(1, 1), (3, 3), (3, 1), (5, 5)]),
    padding=st.sampled_from(["SAME", "VALID", ((1, 0), (2, 1))]),
    layout=st.sampled_from([("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_convolutions(strides, window, padding, layout, density):
    image = {"N": 2, "H": 7, "W": 6, "C": 3}
    kernel = {"H": window[0], "W": window[1], "I": 3, "O": 4}
    x = normal(*(image[axis] for axis in layout[0]))
    w = normal(*(kernel[axis] for axis in layout[1]), key=1)
    mask = np.random.default_rng(1).random(w.shape) < density

    def function(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], strides, padding, dimension_numbers=layout
        )

    wrapped, values, gradients = compare(function, {"w": mask}, {"w": w}, x)
    assert list(wrapped.indices) == ["w"]
    assert max(values, gradients) < 1e-5


@pytest.mark.parametrize("window", [1, 3])
def test_a_convolution_of_stride_2(window):
    function, params, x = convolve((window, window, 4, 6), window_strides=(2, 2))
    mask = np.random.default_rng(0).random(params["w"].shape) < 0.4
    wrapped, values, gradients = compare(function, {"w": mask}, params, x)
    assert wrapped.indices and max(values, gradients) < 1e-5


def convolve(shape, x=(2, 8, 8, 4), **options):
    """A convolution with an NHWC image, and its parameters."""
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    numbers = options.pop("dimension_numbers", ("NHWC", "HWIO", "NHWC"))

    def function(params, x):
        return jax.lax.conv_general_dilated(x, params["w"], dimension_numbers=numbers, **options)

    return function, {"w": normal(*shape)}, normal(*x, key=1)


REFUSED = {
    "a convolution of 2 groups": convolve((3, 3, 2, 6), feature_group_count=2),
    "a dilated convolution": convolve((3, 3, 4, 6), rhs_dilation=(2, 2)),
    "a transposed convolution": convolve(
        (3, 3, 4, 6), padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)
    ),
    "a convolution of strides 3 x 3": convolve((3, 3, 4, 6), window_strides=(3, 3)),
    "a convolution with a window of 2 x 2": convolve((2, 2, 4, 6)),
    "a convolution with a window of 9 x 9": convolve((9, 9, 4, 6)),
    "a convolution that crops its image": convolve((3, 3, 4, 6), padding=((-1, 1), (1, 1))),
    "a convolution over 1 dimension": convolve(
        (3, 4, 6),
        (2, 8, 4),
        window_strides=(1,),
        dimension_numbers=("NHC", "HIO", "NHC"),
    ),
    "a convolution with `batch_group_count`": convolve((3, 3, 4, 6), batch_group_count=2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_convolutions_without_a_kernel_are_left(reason):
    function, params, x = REFUSED[reason]
    masks = {"w": np.random.default_rng(0).random(params["w"].shape) < 0.5}
    params = jaxprune.apply_masks(params, masks)
    wrapped = kernels.wrap(function, masks, params, x, table="always")
    assert not wrapped.indices and f"dense: {reason}\n" in f"{wrapped}\n"
    assert np.array_equal(wrapped(params, x), function(params, x))


def test_the_image_of_a_convolution_is_no_kernel():
    def function(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            params["w"], x, (1, 1), "SAME", dimension_numbers=numbers
        )

    masks = {"w": np.zeros((2, 8, 8, 4), bool)}
    params = {"w": jnp.zeros((2, 8, 8, 4))}
    wrapped = kernels.wrap(function, masks, params, normal(3, 3, 4, 5), table="always")
    assert "the image of a convolution, not its kernel" in str(wrapped)


# ---- models


def nnx_functions(model):
    functions = structure.from_nnx(model)
    return functions.evaluate, functions.train, functions.variables


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resnet(dtype):
    model = models.resnet8(num_classes=4, in_channels=3, dtype=dtype, rngs=nnx.Rngs(0))
    _, train, variables = nnx_functions(model)
    masks = drawn_masks(variables)
    wrapped, values, gradients = compare(train, masks, variables, normal(8, 8, 8, 3))
    assert len(wrapped.indices) == 10  # all convolutions, shortcuts and the head
    assert not wrapped.reasons
    # Batch norms over few values multiply the noise of rounding, most in bfloat16.
    assert values < (0.1 if dtype == "bfloat16" else 1e-4)
    assert dtype == "bfloat16" or gradients < 1e-3


@pytest.mark.slow
def test_mobilenet():
    model = models.mobilenet_v1(num_classes=4, in_channels=3, widths=models.default_widths(
        "mobilenet_v1", 0.25), rngs=nnx.Rngs(0))  # fmt: skip
    evaluate, _, variables = nnx_functions(model)
    masks = drawn_masks(variables)
    wrapped, values, gradients = compare(evaluate, masks, variables, normal(2, 32, 32, 3))
    kinds = {layer.kernel for layer in wrapped.layers.values()}
    assert kinds == {"product", "3x3 convolution"} and len(wrapped.indices) == 15
    # Their masks are there or not, as they were drawn.
    assert str(wrapped).count("a depthwise convolution") in (0, 13) and wrapped.depthwise == 13
    assert values < 1e-4 and gradients < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("framework", CLIENTS)
def test_frameworks(framework):
    client = CLIENTS[framework](jaxprune.fixed_mask_transform())
    masks = drawn_masks(client.variables, under=client.under)
    for trace in client.traces:
        wrapped, values, gradients = compare(
            trace.function, masks, client.variables, IMAGES, under=client.under or None
        )
        assert len(wrapped.indices) == 3, wrapped
        assert values < 1e-4 and gradients < 1e-3


ZOO = {f"linen {n}": own for n, own in zoo_linen.MODELS.items()}
ZOO |= {f"nnx {n}": own for n, own in zoo_nnx.MODELS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_models_of_others(name):
    """Whatever surrounds the kernels: scans, remat, caches, experts, Fourier transforms."""
    case = ZOO[name]()
    trace = next(iter(case.traces.values()))
    masks = drawn_masks(case.variables, under="params")
    wrapped, values, gradients = compare(
        trace.function, masks, case.variables, *trace.args, under="params"
    )
    assert wrapped.indices or wrapped.reasons
    assert values < 1e-3 and gradients < 1e-2


def test_a_module_with_functions_among_its_leaves():
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.MLP(12, 3, 16, 2, key=KEYS[0])
    masks = drawn_masks(module)

    def apply(module, x):
        return jax.vmap(module)(x)

    module = jaxprune.apply_masks(module, masks)
    wrapped = kernels.wrap(apply, masks, module, X, table="always")
    assert len(wrapped.indices) == 3
    call = eqx.filter_jit(lambda module, x: wrapped(module, x))
    assert gap(call(module, X), apply(module, X)) < 1e-5


# ---- transformations of JAX


def test_vmap_over_a_batch_and_over_networks():
    params = jaxprune.apply_masks(MLP, MASKS)
    wrapped = kernels.wrap(mlp, MASKS, params, X[0][None], table="always")
    batches = normal(3, 2, 12)
    rows = mlp(params, batches.reshape(6, 12)).reshape(3, 2, 5)
    assert gap(jax.vmap(lambda x: wrapped(params, x))(batches), rows) < 1e-5
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    found = jax.vmap(lambda p: jax.grad(lambda p: wrapped(p, X).sum())(p))(several)
    one = jax.grad(lambda p: wrapped(p, X).sum())(jax.tree.map(lambda x: 2 * x, params))
    assert gap(jax.tree.map(lambda x: x[1], found), one) < 1e-5


def test_gradients_inside_of_nonlinear_losses():
    params = jaxprune.apply_masks({"w": W}, {"w": MASK})

    def function(params, x):
        return jnp.sin(x @ params["w"])

    wrapped = kernels.wrap(function, {"w": MASK}, params, X, table="always")
    own, wanted = (
        jax.grad(lambda p, call=call: jnp.sum(call(p, X) ** 2))(params)["w"] * MASK
        for call in (wrapped, function)
    )
    assert gap(own, wanted) < 1e-5


def test_other_arguments_than_those_of_wrap():
    """A larger batch and a keyword; the kernels are the same."""

    def function(params, x, *, scale=1.0):
        return scale * mlp(params, x)

    params = jaxprune.apply_masks(MLP, MASKS)
    wrapped = kernels.wrap(function, MASKS, params, X, table="always")
    x = normal(17, 12)
    assert gap(wrapped(params, x, scale=3.0), 3 * mlp(params, x)) < 1e-5


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda: (MLP, X))
    wrapped = kernels.wrap(mlp, MASKS, *shapes, table="always")
    params = jaxprune.apply_masks(MLP, MASKS)
    assert gap(wrapped(params, X), mlp(params, X)) < 1e-5


# ---- bad arguments


def test_masks_that_do_not_fit_are_listed():
    masks = {**MASKS, "first": {"kernel": np.ones((3, 3), bool), "bias": True}}
    with pytest.raises(ValueError, match=r"`masks` must fit `params`") as error:
        kernels.wrap(mlp, masks, MLP, X)
    assert "first/kernel: shape (12, 20), but mask (3, 3)" in str(error.value)
    with pytest.raises(ValueError, match="third: a mask without a leaf"):
        kernels.wrap(mlp, {**MASKS, "third": np.ones((2, 2), bool)}, MLP, X)
    with pytest.raises(ValueError, match="nothing is pruned"):
        kernels.wrap(mlp, jax.tree.map(lambda x: True, MLP), MLP, X)


def test_masked_integers_are_listed():
    params = {"a": jnp.ones((2, 2), jnp.int8), "b": jnp.ones((2, 2), jnp.int32)}
    masks = jax.tree.map(lambda x: np.eye(2, dtype=bool), params)
    with pytest.raises(ValueError, match="must be floating point") as error:
        kernels.wrap(lambda p, x: x @ p["a"] @ p["b"], masks, params, jnp.ones((1, 2), jnp.int32))
    assert "a: int8" in str(error.value) and "b: int32" in str(error.value)


def test_other_bad_arguments():
    with pytest.raises(TypeError, match="`function` must be a function"):
        kernels.wrap("mlp", MASKS, MLP, X)  # pyright: ignore
    with pytest.raises(ValueError, match="must hold values, but inside `jit`"):
        jax.jit(lambda masks: kernels.wrap(mlp, masks, MLP, X)(MLP, X))(MASKS)
    params = jaxprune.apply_masks(MLP, MASKS)
    wrapped = kernels.wrap(mlp, MASKS, params, X, table="always")
    with pytest.raises(ValueError, match="`indices` must be those of this function") as error:
        wrapped(params, X, indices={"third/kernel": wrapped.indices["head/kernel"]})
    assert "third/kernel: not a layer" in str(error.value)
    with pytest.raises(ValueError, match="`params` must have the masked leaves") as error:
        wrapped({"first": params["first"], "second": {"kernel": jnp.ones((2, 2))}}, X)
    assert "head/kernel: missing" in str(error.value)
    assert "second/kernel: shape (2, 2), but (20, 16)" in str(error.value)


def test_new_masks_that_do_not_fit_are_listed():
    wrapped = kernels.wrap(mlp, MASKS, MLP, X, table="always")
    bad = {**MASKS, "head": {"kernel": np.ones((1, 5), bool)}}
    with pytest.raises(ValueError, match=r"head/kernel: mask \(1, 5\), but the leaf has \(16, 5\)"):
        wrapped.update(bad)
    with pytest.raises(ValueError, match="first/bias: a mask that prunes a leaf"):
        first = {"kernel": True, "bias": np.arange(20) > 3}
        wrapped.update({**MASKS, "first": first})
    with pytest.raises(ValueError, match="head/kernel: room for 1 weights, but"):
        wrapped.update(MASKS, capacities=kernels.Capacities({"head/kernel": 1}, 1))


def test_paths_are_those_of_trees():
    assert set(trees.leaf_by_path(MLP)) >= {"first/kernel", "head/kernel"}
