"""Layouts: what each axis of a leaf is, proven from the jaxpr of any function."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given

import jaxprune
from jaxprune import budgets, layouts, patterns, trees
from jaxprune.layouts import Layout

X = jnp.zeros((2, 4))
IMAGE = jnp.zeros((2, 6, 6, 4))
NHWC = ("NHWC", "HWIO", "NHWC")
DENSE = Layout(inputs=(0,), outputs=(1,))
STORED_TURNED = Layout(inputs=(1,), outputs=(0,))
CONV = Layout(inputs=(2,), outputs=(3,), positions=(0, 1))
STACK = Layout(inputs=(1,), outputs=(2,), copies=(0,))


def _conv(x, w, **options):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", **options)


def _scan(w, x, **options):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w, **options)


def _nested(w, x):
    def block(x, w):
        return jax.checkpoint(lambda x: _scan(w, x)[0])(x), None

    return jax.lax.scan(block, x, w)


def _recurrent(w, x):
    return jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ w), h), X[0], x)


def _expert(w, x):
    return x @ w[x.sum().astype(int)]


def _standardized(w, x):
    mean, std = (f(w, axis=(0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.std))
    return _conv(x, (w - mean) / (std + 1e-5), dimension_numbers=NHWC)


def _transposed(w, x, transpose_kernel):
    return jax.lax.conv_transpose(
        x, w, (2, 2), "SAME", dimension_numbers=NHWC, transpose_kernel=transpose_kernel
    )


def _quantized(w, x):
    scale = jnp.abs(w).max() / 127
    return x @ (w + jax.lax.stop_gradient(jnp.round(w / scale) * scale - w))


def _ensemble(w, x):
    return jax.vmap(lambda w, x: _conv(x, w, dimension_numbers=NHWC))(w, jnp.stack([x, x]))


# name -> (shape of the leaf, function of leaf and input, input, layout)
USES = {
    "x @ w": ((4, 3), lambda w, x: x @ w, X, DENSE),
    "x @ w.T": ((3, 4), lambda w, x: x @ w.T, X, STORED_TURNED),
    "w @ x": ((3, 4), lambda w, x: w @ x.T, X, STORED_TURNED),
    "vmap": ((3, 4), lambda w, x: jax.vmap(lambda x: w @ x)(x), X, STORED_TURNED),
    "vector": ((4,), lambda w, x: x @ w, X, Layout(inputs=(0,))),
    "bfloat16": ((4, 3), lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), X, DENSE),
    "query": (
        (4, 2, 3),
        lambda w, x: jnp.einsum("nd,dhk->nhk", x, w),
        X,
        Layout(inputs=(0,), outputs=(1, 2)),
    ),
    "attention's output": (
        (2, 2, 3),
        lambda w, x: jnp.einsum("nhk,hkd->nd", x.reshape(2, 2, 2), w),
        X,
        Layout(inputs=(0, 1), outputs=(2,)),
    ),
    "heads, reshaped": (
        (4, 2, 3),
        lambda w, x: x @ w.reshape(4, 6),
        X,
        Layout(inputs=(0,), outputs=(1, 2)),
    ),
    "queries, keys and values": ((4, 9), lambda w, x: jnp.split(x @ w, 3, -1), X, DENSE),
    "split kernel": ((4, 9), lambda w, x: [x @ part for part in jnp.split(w, 3, 1)], X, DENSE),
    "experts": ((5, 4, 3), lambda w, x: jnp.einsum("nd,ndk->nk", jnp.zeros((5, 4)), w), X, STACK),
    "ragged experts": (
        (5, 4, 3),
        lambda w, x: jax.lax.ragged_dot(jnp.zeros((7, 4)), w, jnp.array([1, 2, 0, 3, 1])),
        X,
        STACK,
    ),
    "scan": ((5, 4, 4), _scan, X, STACK),
    "scan, reversed": ((5, 4, 4), functools.partial(_scan, reverse=True, unroll=2), X, STACK),
    "scan over the middle": (
        (4, 5, 4),
        lambda w, x: _scan(jnp.moveaxis(w, 1, 0), x),
        X,
        Layout(inputs=(0,), outputs=(2,), copies=(1,)),
    ),
    "scan in a scan": ((2, 3, 4, 4), _nested, X, Layout((2,), (3,), copies=(0, 1))),
    "scan that collects": (
        (5, 4, 4),
        lambda w, x: _scan(jax.lax.map(lambda w: w.T, w), x),
        X,
        Layout(inputs=(2,), outputs=(1,), copies=(0,)),
    ),
    "one stacked layer": ((1, 4, 4), _scan, X, STACK),
    "recurrent": ((4, 4), _recurrent, X, DENSE),
    "loop": ((3, 4, 4), lambda w, x: [x @ w[i] for i in range(3)], X, STACK),
    "chosen expert": ((5, 4, 3), _expert, X, STACK),
    "conv": ((3, 3, 4, 2), lambda w, x: _conv(x, w, dimension_numbers=NHWC), IMAGE, CONV),
    "conv OIHW": (
        (2, 4, 3, 3),
        lambda w, x: _conv(x.transpose(0, 3, 1, 2), w),
        IMAGE,
        Layout(inputs=(1,), outputs=(0,), positions=(2, 3)),
    ),
    "conv in groups": (
        (3, 3, 2, 6),
        lambda w, x: _conv(x, w, dimension_numbers=NHWC, feature_group_count=2),
        IMAGE,
        CONV,
    ),
    "depthwise": (
        (3, 3, 1, 4),
        lambda w, x: _conv(x, w, dimension_numbers=NHWC, feature_group_count=4),
        IMAGE,
        CONV,
    ),
    "ensemble of convs": (
        (2, 3, 3, 4, 5),
        _ensemble,
        IMAGE,
        Layout(inputs=(3,), outputs=(4,), positions=(1, 2), copies=(0,)),
    ),
    "1x1 conv, squeezed": ((1, 1, 4, 2), lambda w, x: x @ jnp.squeeze(w, (0, 1)), IMAGE, CONV),
    "transposed conv": (
        (2, 2, 4, 3),
        functools.partial(_transposed, transpose_kernel=False),
        IMAGE,
        CONV,
    ),
    "transposed conv, transposed kernel": (
        (2, 2, 3, 4),
        functools.partial(_transposed, transpose_kernel=True),
        IMAGE,
        Layout(inputs=(3,), outputs=(2,), positions=(0, 1)),
    ),
    "standardized": ((3, 3, 4, 2), _standardized, IMAGE, CONV),
    "masked and scaled": (
        (4, 3),
        lambda w, x: x @ jnp.where(jnp.arange(12).reshape(4, 3) > 2, 0.5 * w, 0.0),
        X,
        DENSE,
    ),
    "quantized": ((4, 3), _quantized, X, DENSE),
    "penalty": ((4, 3), lambda w, x: (x @ w).sum() + (w**2).sum(), X, DENSE),
    "remat": ((4, 3), lambda w, x: jax.checkpoint(lambda w: x @ w)(w), X, DENSE),
    "used twice": ((4, 4), lambda w, x: x @ w @ w, X, DENSE),
}


@pytest.mark.parametrize("name", USES)
def test_layouts_of_every_kind_of_use(name):
    shape, use, x, layout = USES[name]
    found = layouts.find(lambda p, x: use(p["w"], x), {"w": jnp.zeros(shape)}, x)
    assert dict(found) == {"w": layout}, found.reasons
    assert found.stacked("w", None) == (layout.copies or None)
    assert sorted(axis for part in layout for axis in part) == list(range(len(shape)))


# name -> (shape of the leaf, function of leaf and input, reason)
OTHER = {
    "embedding": ((9, 4), lambda w, x: w[jnp.array([1, 2])], "used by `gather`"),
    "tied embedding": (
        (9, 4),
        lambda w, x: (w[jnp.array([1, 2])] + x) @ w.T,
        "used by `gather`",
    ),
    "bias": ((4,), lambda w, x: x + w[None], "used by `add`"),
    "repeated": (
        (4, 3),
        lambda w, x: jnp.broadcast_to(w, (2, 4, 3)),
        "used by `broadcast_in_dim`",
    ),
    "scale of one example": ((4,), lambda w, x: jnp.tanh(x[0] * w), "used by `mul`"),
    "bias of one example before a kernel": (
        (4,),
        lambda w, x: (x[0] + w) @ jnp.ones((4, 3)),
        "used by `add`",
    ),
    "both sides": (
        (4, 4),
        lambda w, x: x @ w + x @ w.T,
        "used twice, with different inputs and outputs",
    ),
    "positions": ((2, 4), lambda w, x: x + w, "used by `add`"),
    "never": ((4, 3), lambda w, x: x, "the function never multiplies it"),
    "low rank": ((4, 3), lambda w, x: x @ (w @ w.T), "multiplied by another leaf"),
    "hypernetwork": ((4, 3), lambda w, x: x @ (w * x.sum()), "used by `mul`"),
    "mixed": (
        (4, 6),
        lambda w, x: x[:, :2] @ w.reshape(2, 12),
        "axis 0 is in part inputs and in part outputs",
    ),
    "across axes": ((4, 3), lambda w, x: x[:, :3] @ w.reshape(3, 4), "used by `reshape`"),
    "changed on the way": (
        (4, 4),
        lambda w, x: jax.lax.scan(lambda w, x: (0.5 * w, x @ w), w, x)[1],
        "changed by `scan`",
    ),
    "repeated on the way": (
        (4, 4),
        lambda w, x: x @ jax.lax.scan(lambda h, x: (h @ w, w.T), x, x)[1][0],
        "returned by `scan`",
    ),
    "image": (
        (4, 4),
        lambda w, x: _conv(w[None, None], jnp.ones((1, 1, 2, 2))),
        "is the image of a convolution, not its kernel",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_proven_has_a_reason(name):
    shape, use, reason = OTHER[name]
    params = {"w": jnp.zeros(shape), "kernel": jnp.zeros((4, 3))}
    found = layouts.find(lambda p, x: (use(p["w"], x), x @ p["kernel"]), params, X)
    assert dict(found) == {"kernel": DENSE}
    assert dict(found.reasons) == {"w": reason} and found.reason("w") == reason


# ---- copies of leaves without a layout


def _over(w, x, use=jnp.multiply):
    """A scan over the first axis of a leaf."""
    return jax.lax.scan(lambda x, w: (use(x, w), None), x, w)[0]


def _row(w, x):
    return x + w[x.sum().astype(int)]


# name -> (shape of the leaf, function of leaf and input, axes that are proven to number copies)
COPIES = {
    "scale": ((3, 4), _over, (0,)),
    "scale by einsum": (
        (3, 4),
        lambda w, x: _over(w, x, lambda x, w: jnp.einsum("nd,d->nd", x, w)),
        (0,),
    ),
    "bias": ((3, 4), lambda w, x: _over(w, x, jnp.add), (0,)),
    "scale of each entry": ((3, 2, 4), _over, (0,)),
    "number of each layer": ((3,), _over, (0,)),
    "norm": (
        (3, 4),
        lambda w, x: _over(w, x, lambda x, w: x / jnp.sqrt((x**2).mean() + 1e-6) * (1 + w)),
        (0,),
    ),
    "table of each layer": ((3, 9, 4), lambda w, x: _over(w, x, lambda x, w: _row(w, x)), (0,)),
    "both sides": ((3, 4, 4), lambda w, x: _over(w, x, lambda x, w: x @ w + x @ w.T), (0,)),
    "in a condition": (
        (3, 4),
        lambda w, x: _over(w, x, lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x * w, lambda: x)),
        (0,),
    ),
    "only reduced": ((3, 4), lambda w, x: _over(w, x, lambda x, w: x * w.max()), (0,)),
    "nested scans": ((2, 3, 4), lambda w, x: _over(w, x, lambda x, w: _over(w, x)), (0, 1)),
    "outer scan, all at once": ((2, 3, 4), lambda w, x: _over(w, x, lambda x, w: x * w[0]), (0,)),
    "moved axis": ((4, 3), lambda w, x: _over(w.T, x), (1,)),
    "moved axes": (
        (3, 4, 2),
        lambda w, x: _over(w.transpose(2, 0, 1), x, lambda x, w: _over(w, x)),
        (0, 2),
    ),
    "axis in two parts": (
        (6, 4),
        lambda w, x: _over(w.reshape(2, 3, 4), x, lambda x, w: _over(w, x)),
        (0,),
    ),
    "one part of an axis": (
        (6, 4),
        lambda w, x: _over(w.reshape(3, 2, 4), x, lambda x, w: x * w),
        None,
    ),
    "one layer": ((1, 4), _over, (0,)),
    "map": ((3, 4), lambda w, x: jax.lax.map(lambda w: x * w, w), (0,)),
    "scan that collects": ((3, 4), lambda w, x: _over(jax.lax.map(lambda w: 2 * w, w), x), (0,)),
    "gradient": ((3, 4), lambda w, x: jax.grad(lambda w: (_over(w, x) ** 2).sum())(w), (0,)),
    "remat": ((3, 4), lambda w, x: _over(w, x, jax.checkpoint(lambda x, w: jnp.sin(x) * w)), (0,)),
    "mapped data": ((3, 4), lambda w, x: jax.vmap(lambda x: _over(w, x))(x), (0,)),
    "two scans": ((3, 4), lambda w, x: _over(w, _over(w, x), jnp.add), (0,)),
    "two halves": ((4, 4), lambda w, x: _over(w[2:], _over(w[:2], x)), (0,)),
    "penalty": ((3, 4), lambda w, x: _over(w, x).sum() + (w**2).sum(), (0,)),
    "masked": (
        (3, 4),
        lambda w, x: _over(jnp.where(jnp.arange(4) > 1, w, 0.0), x),
        (0,),
    ),
    # vmap: what is an operand of a product or a lookup has batch dimensions.
    "mapped products of two": (
        (3, 4, 2),
        lambda w, x: jax.vmap(lambda w: x @ (w @ w.T))(w),
        (0,),
    ),
    "mapped tables": ((3, 9, 4), lambda w, x: jax.vmap(_row)(w, jnp.stack([x] * 3)), (0,)),
    "mapped scans": (
        (3, 2, 4, 4),
        lambda w, x: jax.vmap(lambda w, x: _over(w, x, lambda x, w: x @ w + x @ w.T))(
            w, jnp.stack([x] * 3)
        ),
        (0, 1),
    ),
    # What proves nothing.
    "not scanned": ((4,), lambda w, x: x * w[None], None),
    "entries of a product without a sum": (
        (2, 4),
        lambda w, x: jnp.einsum("nd,nd->nd", x, w),
        None,
    ),
    "shared by all layers": ((2, 4), lambda w, x: _over(jnp.zeros(3), x, lambda x, _: x * w), None),
    "repeated for each layer": ((4,), lambda w, x: _over(jnp.broadcast_to(w, (3, 4)), x), None),
    "scanned over and added": ((2, 4), lambda w, x: _over(w, x) + w, None),
    "scanned over, and one layer alone": ((3, 4), lambda w, x: _over(w, x) + w[0], None),
    "scanned over along two axes": ((4, 4), lambda w, x: _over(w.T, _over(w, x)), None),
    "nested and not": (
        (3, 4, 4),
        lambda w, x: _over(w, x, lambda x, w: _over(w, x) * w[:2]),
        (0,),
    ),
    "used in the next step": (
        (3, 4),
        lambda w, x: jax.lax.scan(lambda last, w: (w, last * x * w), jnp.ones(4), w)[1],
        None,
    ),
    "changed on the way": (
        (2, 4),
        lambda w, x: jax.lax.scan(lambda w, x: (0.5 * w, None), w, x)[0],
        None,
    ),
    "row of a table": ((9, 4), _row, None),
    "loop": ((3, 4), lambda w, x: [x * w[i][None] for i in range(3)], None),
    "never": ((3, 4), lambda w, x: x, None),
}


@pytest.fixture
def broadcasting():
    """Vectors broadcast in these models as they do in those of users."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("broadcasting")
@pytest.mark.parametrize("name", COPIES)
def test_copies_of_leaves_that_are_no_kernels(name):
    shape, use, copies = COPIES[name]
    found = layouts.find(lambda p, x: use(p["w"], x), {"w": jnp.zeros(shape)}, X)
    assert found.stacked("w", None) == copies, found
    assert trees.stacked_axes("w", jnp.zeros(shape), found.stacked) == (copies or ())


@given(
    sizes=st.permutations([2, 3, 4, 5]),
    dimensions=st.integers(1, 4),
    depth=st.integers(1, 3),
    order=st.permutations(range(4)),
    uses=st.lists(st.booleans(), min_size=1, max_size=2),
)
def test_copies_are_the_axes_that_scans_run_over(sizes, dimensions, depth, order, uses):
    order = [axis for axis in order if axis < dimensions]
    depth = min(depth, dimensions)

    def run(w, x, depth):
        return _over(w, x, lambda x, w: run(w, x, depth - 1)) if depth else jnp.sin(x) * w.sum()

    def use(w, x):
        # The second use may be scanned over with one axis less.
        for deep in uses:
            x = run(w.transpose(order), x, depth - deep)
        return x

    found = layouts.find(use, jnp.zeros(sizes[:dimensions]), X)
    fewest = min([depth - deep for deep in uses if depth - deep] or [0])
    assert found.stacked("", None) == (tuple(sorted(order[:fewest])) or None)


@pytest.mark.usefixtures("broadcasting")
def test_leaves_outside_of_the_trace_prove_nothing():
    found = layouts.find(lambda p, x: _over(p["w"], x), {"w": jnp.zeros((3, 4)), "n": 3}, X)
    assert found.stacked("n", 3) is None and found.stacked("other", None) is None
    assert "{'n': (), 'w': (0,)}" in repr(found)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    parts=st.lists(st.sampled_from(["inputs", "outputs", "copies"]), min_size=5, max_size=5),
    shuffled=st.permutations(range(5)),
    merge=st.booleans(),
)
def test_layouts_are_found_for_any_order_of_axes(sizes, parts, shuffled, merge):
    # The leaf is brought into [copies, inputs, outputs] by a transposition, and then multiplied.
    parts = parts[: len(sizes)]
    order = [axis for axis in shuffled if axis < len(sizes)]
    order.sort(key=lambda axis: ("copies", "inputs", "outputs").index(parts[axis]))
    groups, inputs, _ = (
        [sizes[a] for a in order if parts[a] == part] for part in ("copies", "inputs", "outputs")
    )

    def use(w, x):
        w = w.transpose(order)
        if merge:
            return jnp.einsum("gi,gio->go", x, w.reshape(*x.shape, -1))
        x = x.reshape(*groups, *inputs)
        batch = tuple(range(len(groups)))
        inner = tuple(range(len(groups), x.ndim))
        return jax.lax.dot_general(x, w, ((inner, inner), (batch, batch)))

    x = jnp.zeros((int(np.prod(groups, dtype=int)), int(np.prod(inputs, dtype=int))))
    found = layouts.find(use, jnp.zeros(sizes), x)[""]
    for part in ("inputs", "outputs", "copies"):
        for axis in getattr(found, part):
            assert parts[axis] == part or sizes[axis] == 1
    if not merge:
        assert all(axis in getattr(found, part) for axis, part in enumerate(parts))


def test_a_row_that_data_look_up_is_the_input_of_the_next_kernel():
    params = {"table": jnp.zeros((9, 4)), "w": jnp.zeros((4, 3))}
    found = layouts.find(lambda p, token: p["table"][token] @ p["w"], params, jnp.array(2))
    assert dict(found) == {"w": DENSE}
    assert found.reason("table") == "looked up by its index"


def test_mappings_are_immutable_and_name_the_closest_path():
    tree = {"net": {"w": jnp.zeros((4, 3)), "step": jnp.zeros((), int)}, "name": "net"}
    found = layouts.find(lambda p, x: x @ p["net"]["w"], tree, X)
    assert list(found) == ["net/w"] and len(found) == 1
    assert dict(found.reasons) == {"net/step": "has dtype int32", "name": "is not an array"}
    assert "did you mean net/w?" in found.reason("w")
    assert repr(found).startswith("Layouts({'net/w': Layout(")
    with pytest.raises(TypeError):
        found["w"] = DENSE
    with pytest.raises(TypeError):
        found.reasons["w"] = ""


def test_nothing_is_computed_and_shapes_are_enough():
    huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.bfloat16)

    def apply(params, x, train, name):
        assert train is True and name == "x"
        return x @ params[0]

    x = jax.ShapeDtypeStruct((8, 2**20), jnp.bfloat16)
    assert layouts.find(apply, [huge], x, True, "x")["0"] == DENSE


def test_gradients_do_not_hide_a_layout():
    # A whole training step can be traced, too: reductions and updates of a leaf are no uses.
    def loss(params, x):
        return jnp.mean((x @ params["w"]) ** 2) + 1e-3 * optax.tree.norm(params)

    assert dict(layouts.find(loss, {"w": jnp.zeros((4, 3))}, X)) == {"w": DENSE}


# ---- frameworks


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        x = x + linen.MultiHeadDotProductAttention(2, name="attention")(x)
        return x + linen.Dense(4, name="dense")(linen.relu(x)), None


class Transformer(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(7, 4, name="embed")(tokens)
        stack = linen.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = stack(name="layers")(x, None)
        return linen.Dense(7, name="head")(x)


@pytest.mark.slow
def test_a_scanned_linen_transformer():
    tokens = jnp.zeros((2, 5), int)
    params = Transformer().init(jax.random.key(0), tokens)["params"]
    found = layouts.find(lambda p, x: Transformer().apply({"params": p}, x), params, tokens)
    into_heads = Layout(inputs=(1,), outputs=(2, 3), copies=(0,))
    assert dict(found) == {
        "head/kernel": DENSE,
        "layers/attention/key/kernel": into_heads,
        "layers/attention/out/kernel": Layout(inputs=(1, 2), outputs=(3,), copies=(0,)),
        "layers/attention/query/kernel": into_heads,
        "layers/attention/value/kernel": into_heads,
        "layers/dense/kernel": STACK,
    }
    assert found.reason("embed/embedding") == "used by `gather`"
    for path, leaf in trees.leaf_by_path(params).items():  # biases as well as kernels
        assert found.stacked(path, leaf) == ((0,) if path.startswith("layers/") else None)
    kernels = {path: x for path, x in trees.leaf_by_path(params).items() if path in found}
    axes = [p.axis for p in patterns.patterns_of(kernels, patterns.n_m(1, 2, layouts=found))]
    assert [a % x.ndim for a, x in zip(axes, kernels.values())] == [0, 1, 2, 1, 1, 1]
    shapes = {
        f"{path}[1]": leaf.shape[1:] if path.startswith("layers") else leaf.shape
        for path, leaf in kernels.items()
    }
    rule = budgets.by_layout(budgets.erdos_renyi_kernel, found)
    floors = dict(zip(shapes, rule(shapes, 0.5).floors))
    assert floors["layers/attention/query/kernel[1]"] == floors["layers/dense/kernel[1]"]


def test_nnx_modules_with_vmapped_and_scanned_layers():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(axis_size=3)
            def make(rngs):
                return nnx.Linear(4, 4, rngs=rngs)

            self.layers = make(rngs)
            self.up = nnx.ConvTranspose(4, 3, (2, 2), rngs=rngs)

        def __call__(self, x):
            @nnx.scan
            def forward(x, layer):
                x = nnx.relu(layer(x))
                return x, None

            x, _ = forward(x, self.layers)
            return self.up(x)

    graph, params = nnx.split(Stack(nnx.Rngs(0)))
    found = layouts.find(lambda p, x: nnx.merge(graph, p)(x), params, IMAGE)
    assert dict(found) == {"layers/kernel": STACK, "up/kernel": CONV}
    assert found.stacked("layers/bias", None) == (0,) and found.stacked("up/bias", None) is None


@pytest.mark.slow
def test_equinox_modules():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        up: eqx.nn.ConvTranspose2d
        layers: eqx.nn.Linear
        head: eqx.nn.Linear
        activation: object = jax.nn.relu

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(4, 6, 3, padding=1, key=key)
            self.up = eqx.nn.ConvTranspose2d(6, 8, 2, key=key)
            self.layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(
                jax.random.split(key, 3)
            )
            self.head = eqx.nn.Linear(8, 5, key=key)

        def __call__(self, x):
            x = self.activation(self.up(self.conv(x))).mean((1, 2))
            dynamic, static = eqx.partition(self.layers, eqx.is_array)
            x, _ = jax.lax.scan(lambda x, w: (eqx.combine(w, static)(x), None), x, dynamic)
            return self.head(x)

    net = Net(jax.random.key(0))
    oihw = Layout(inputs=(1,), outputs=(0,), positions=(2, 3))
    wanted = {
        "conv/weight": oihw,
        "up/weight": oihw,
        "layers/weight": Layout(inputs=(2,), outputs=(1,), copies=(0,)),
        "head/weight": STORED_TURNED,
    }
    whole = layouts.find(lambda net, x: net(x), net, jnp.zeros((4, 6, 6)))
    mapped = layouts.find(lambda net, x: jax.vmap(net)(x), net, jnp.zeros((2, 4, 6, 6)))
    assert dict(whole) == dict(mapped) == wanted
    for found in (whole, mapped):
        assert found.stacked("layers/bias", None) == (0,)
        assert found.stacked("head/bias", None) is None
    params = eqx.filter(net, eqx.is_array)
    rule = patterns.n_m(2, 4, layouts=whole)
    _, masks = jaxprune.prune(
        params,
        0.5,
        pattern=rule,
        prunable=lambda path, leaf: path in ("head/weight", "conv/weight"),
    )
    assert (np.asarray(masks.head.weight).reshape(5, 2, 4).sum(-1) == 2).all()
    assert (np.asarray(masks.conv.weight).reshape(6, 1, 4, 3, 3).sum(2) == 2).all()


def test_haiku_layer_stacks():
    hk = pytest.importorskip("haiku")

    def forward(x):
        stack = hk.experimental.layer_stack(3)(lambda x: hk.Linear(4)(jax.nn.relu(x)))
        return hk.Linear(2, name="head")(stack(x))

    net = hk.without_apply_rng(hk.transform(forward))
    params = net.init(jax.random.key(0), X)
    found = layouts.find(net.apply, params, X)
    assert sorted(found.values()) == sorted([DENSE, STACK])
    assert all(path.endswith("/w") for path in found)
    stacked = [path for path in trees.leaf_by_path(params) if found.stacked(path, None)]
    assert len(stacked) == 2 and not any("head" in path for path in stacked)  # w and b


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_models_of_this_library_store_outputs_last(name):
    from jaxprune import models

    model = getattr(models, name)(num_classes=10, rngs=nnx.Rngs(0))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    found = layouts.find(
        lambda p, x: nnx.merge(graph, p, rest)(x), params, jnp.zeros((1, 32, 32, 3))
    )
    kernels = [path for path, _ in trees.leaves_with_paths(params) if path.endswith("kernel")]
    assert list(found) == kernels
    assert set(found.values()) == {CONV, DENSE}


def test_keyword_arguments_that_are_no_arrays():
    def apply(params, x, *, train, kind="relu", dtype=jnp.float32):
        hidden = getattr(jax.nn, kind)(x.astype(dtype) @ params["a"])
        return hidden @ params["b"] if train else hidden

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    found = layouts.find(
        apply, params, jnp.ones((2, 3)), train=True, kind="gelu", dtype=jnp.float32
    )
    assert found["a"].inputs == (0,) and found["b"].outputs == (1,)
    found = layouts.find(apply, params, x=jnp.ones((2, 3)), train=False)
    assert "never multiplies" in found.reason("b")
