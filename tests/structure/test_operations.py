"""Hostile operations between layers: compaction equals masks, or a reason says why not."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import structure
from jaxprune.structure import Trace
from tests.support.checks import X, between, compared, dense, difference, draw, graded, layer

A = "a/kernel:1"  # the width between the layers a and b


class Case(NamedTuple):
    """A function, and what must be found in it."""

    weights: Any
    function: Any
    free: tuple = (A,)  # groups that must be found; more is fine, but never wrong
    frozen: dict = {}  # "path:dimension" -> words of the reason, for what stays whole
    args: tuple = (X,)
    updates: Any = None


def examine(case):
    """Compares with masks: half of all channels, and each extreme alone."""
    with jax.enable_x64(True):
        variables = distinct(jax.tree.map(as_float64, case.weights))
        trace = Trace(case.function, jax.tree.map(as_float64, case.args), case.updates)
        groups = structure.find_groups([trace], variables)
        call = graded(trace, trace.function, variables, groups.model.parameters)
        worst = 0.0
        for keep in choices(groups):
            gaps = compared(groups, groups.plan(keep, multiple=1), trace, call, variables)
            assert gaps is not None, "the case must have finite numbers"
            worst = max(worst, *gaps.values())
            assert worst < 1e-7, gaps
    return groups


def as_float64(leaf):
    array = np.asarray(leaf)
    return array.astype(np.float64) if array.dtype == np.float32 else array


def distinct(tree):
    """Leaves of one shape were drawn alike."""
    rng = np.random.default_rng(1)

    def change(leaf):
        changed = leaf * (1 + 0.2 * rng.normal(size=leaf.shape))
        return changed if leaf.dtype == np.float64 else leaf

    return jax.tree.map(change, tree)


def choices(groups):
    """Of all groups half and one alone, of each group all but one."""
    rng = np.random.default_rng(0)
    for count in (lambda n: (n + 1) // 2, lambda n: 1):
        if groups:
            yield {k: rng.permutation(g.size) < count(g.size) for k, g in groups.items()}
    if len(groups) > 1:
        name = list(groups)[-1]
        yield {name: np.arange(groups[name].size) != 1}
    for fraction in (0.5, 0.0) if groups.blocks else ():
        blocks = {k: rng.random(b.size) < fraction for k, b in groups.blocks.items()}
        yield blocks
        yield blocks | {k: rng.permutation(g.size) < (g.size + 1) // 2 for k, g in groups.items()}


def say_why(groups, frozen):
    """Every dimension that stays has the reason that is expected, and none has an empty one."""
    assert all(f.reason.strip() for f in groups.frozen)
    free = {f"{m.path}:{m.dimension}" for group in groups.values() for m in group.members}
    reasons = {f"{f.path}:{f.dimension}": f.reason for f in groups.frozen}
    for place, words in frozen.items():
        assert place in free or words in reasons[place], (place, reasons[place])


# ---- the width stays free

SHRINK = {
    "softmax over rows": lambda h: jax.nn.softmax(h, 0),
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": lambda h: h - jax.nn.logsumexp(h, -1, keepdims=True),
    "sort of rows": lambda h: jnp.sort(h, 0),
    "argsort of rows": lambda h: h * jnp.argsort(h, 0),
    "cumsum over rows": lambda h: jnp.cumsum(h, 0),
    "cumprod over rows": lambda h: jnp.cumprod(1 + 0.1 * h, 0),
    "associative scan over rows": lambda h: lax.associative_scan(jnp.multiply, 1 + 0.1 * h),
    "argmax over rows": lambda h: h + jnp.argmax(h, 0, keepdims=True),
    "while that counts only": lambda h: (
        h * lax.while_loop(lambda c: c < 3, lambda c: c + 1, jnp.int32(0))
    ),
    "fori loop": lambda h: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) + h * i, h),
    "scatter to rows": lambda h: h.at[jnp.array([1, 3])].set(0.5),
    "scatter-add to rows": lambda h: h.at[jnp.array([1, 1])].add(h[:2]),
    "segment sum": lambda h: jax.ops.segment_sum(h, jnp.array([0, 0, 1, 2, 1]), 3),
    "dynamic slice of rows": lambda h: lax.dynamic_slice_in_dim(h, place(h), 2, 0),
    "dynamic update of rows": lambda h: lax.dynamic_update_slice_in_dim(h, h[:1] * 2, place(h), 0),
    "rows by constants": lambda h: h[jnp.array([2, 2, 0])],
    "rows by computed places": lambda h: h[jnp.argsort(h.sum(1))],
    "maxout": lambda h: jnp.max(jnp.stack([h, jnp.cos(h)]), 0),
    "remat of dots": jax.checkpoint(
        lambda h: jnp.tanh(h) * h, policy=jax.checkpoint_policies.dots_saveable
    ),
    "remat of nothing": jax.checkpoint(
        lambda h: jax.nn.softmax(h) * h, policy=jax.checkpoint_policies.nothing_saveable
    ),
    "nested jit": jax.jit(lambda h: jax.jit(jax.nn.softmax)(h) + jax.jit(jnp.sin)(h)),
    "switch": lambda h: lax.switch(place(h), [jnp.sin, lambda h: h + 1, lambda h: h * 0], h),
    "cond with a flip": lambda h: lax.cond(h.sum() > 0, lambda h: h[:, ::-1], lambda h: h, h),
    "cond on a kept number": lambda h: lax.cond(True, lambda h: h + 1, lambda h: h, h),
    "map over rows": lambda h: lax.map(lambda row: jnp.sin(row) * row.sum(), h),
    "vmap over the width": lambda h: jax.vmap(lambda c: c - c.mean(), 1, 1)(h),
    "gradient inside": jax.grad(lambda h: jnp.sum(jnp.sin(h) * h)),
    "jvp inside": lambda h: jax.jvp(jnp.tanh, (h,), (jnp.cos(h),))[1],
    "batch norm": lambda h: (
        (h - h.mean(0, keepdims=True)) * lax.rsqrt(h.var(0, keepdims=True) + 1e-3)
    ),
    "layer norm, one pass": lambda h: (
        (h - h.mean(-1, keepdims=True))
        * lax.rsqrt((h**2).mean(-1, keepdims=True) - h.mean(-1, keepdims=True) ** 2 + 1e-3)
    ),
    "sum of absolutes": lambda h: h / (jnp.abs(h).sum(-1, keepdims=True) + 1),
    "divide by the sum": lambda h: jnp.exp(h) / jnp.exp(h).sum(-1, keepdims=True),
    "sum and largest of a width": lambda h: (
        h * jnp.max(h, -1, keepdims=True) - jnp.sum(h + 1, -1, keepdims=True)
    ),
    "smallest and largest": lambda h: h / (1 + h.max(-1, keepdims=True) - h.min(-1, keepdims=True)),
    "variance with ddof": lambda h: h / (1 + jnp.var(h, -1, ddof=1, keepdims=True)),
    "norm": lambda h: h / (jnp.linalg.norm(h, axis=-1, keepdims=True) + 1),
    "cosine": lambda h: h * jnp.sum(h * jnp.cos(h), -1, keepdims=True),
    "standardize": jax.nn.standardize,
    "any and all of rows": lambda h: h * (h > 1).any(0, keepdims=True) * (h > -9).all(0)[None],
    "clip by computed bounds": lambda h: jnp.clip(
        h, h.min(0, keepdims=True), h.mean(0, keepdims=True)
    ),
    "where of a computed mask": lambda h: jnp.where(h > h.mean(-1, keepdims=True), h, 0.0),
    "integers": lambda h: jnp.round(3 * h + 0.2).astype(jnp.int32).astype(h.dtype) + h,
    "bools": lambda h: h * (h > 0.1).astype(h.dtype) * ~(h > 1.0),
    "integer arithmetic": lambda h: h * (((h * 5).astype(jnp.int32) // 2) & 1),
    "float16": lambda h: h.astype(jnp.float16).astype(h.dtype),
    "complex": lambda h: jnp.real(lax.complex(h, h) * lax.complex(jnp.cos(h), h)),
    "one-hot by row": lambda h: (
        h * jax.nn.one_hot(jnp.argmax(h[:, :1] + h, 0), 5, axis=0, dtype=h.dtype)
    ),
    "divide by the root of the size": lambda h: h / h.shape[-1] ** 0.5 + h.size,
    "random noise": lambda h: h + jax.random.normal(jax.random.key(0), h.shape, h.dtype),
    "dropout of columns": lambda h: (
        h * jax.random.bernoulli(jax.random.key(3), 0.5, (1, 8)).astype(h.dtype)
    ),
    "linspace": lambda h: h * jnp.linspace(0.0, 1.0, 8)[None],
    "mask of places": lambda h: jnp.where(jnp.arange(8)[None] < 3, h, 0.3),
    "zeros at some places": lambda h: h * jnp.array([0, 1, 0, 1, 1, 0, 1, 1.0])[None],
    "pad beside": lambda h: jnp.pad(h, ((1, 1), (0, 0)), constant_values=0.5),
    "max pooling beside": lambda h: lax.reduce_window(
        h, -jnp.inf, lax.max, (2, 1), (1, 1), "VALID"
    ),
    "nan_to_num": jnp.nan_to_num,
    "logits of booleans": lambda h: jnp.logical_xor(h > 0, h > 1).astype(h.dtype) + h,
    "hard functions": lambda h: jax.nn.hard_swish(h) + jax.nn.hard_tanh(h) + jax.nn.relu6(h),
    "mish and elu": lambda h: jax.nn.mish(h) + jax.nn.elu(h) + jax.nn.selu(h),
    "squareplus": jax.nn.squareplus,
    "log of sigmoid": jax.nn.log_sigmoid,
    "straight through": lambda h: h + lax.stop_gradient(jnp.sign(h) - h),
    "power by itself": lambda h: (jnp.abs(h) + 0.5) ** h,
    "ties of the largest": lambda h: h * 0 + jnp.maximum(h, 5.0).max(-1, keepdims=True) + h,
}


def place(h):
    """A number of 0 to 2 that data decides."""
    return (jnp.floor(jnp.abs(h.sum()) * 7.3) % 3).astype(jnp.int32)


def out_of(operation):
    """How wide the result is that the layer b reads."""
    return jax.eval_shape(operation, jax.ShapeDtypeStruct((5, 8), "float32")).shape[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHRINK)
def test_a_width_that_stays_free(name):
    weights, function = between(SHRINK[name], out=out_of(SHRINK[name]))
    groups = examine(Case(weights, function))
    assert list(groups) == [A], str(groups)
    assert groups.unknown == {}


HALVES = {
    "maxout of neighbours": lambda h: h.reshape(5, 4, 2).max(-1),
    "maxout of halves": lambda h: h.reshape(5, 2, 4).max(1),
    "evens and odds": lambda h: h[:, ::2] * h[:, 1::2],
    "concatenation with itself": lambda h: jnp.concatenate([h, jnp.cos(h)], -1),
    "pad with a number": lambda h: jnp.pad(h, ((0, 0), (1, 2)), constant_values=0.5),
    "identity matrix": lambda h: h @ jnp.eye(8),
    "tile": lambda h: jnp.tile(h, (1, 2)),
    "repeat": lambda h: jnp.repeat(h, 2, -1),
    "empty": lambda h: jnp.concatenate([h, jnp.zeros((5, 0))], -1),
    "some columns": lambda h: h[:, 1:6:2],
    "flip and concatenate": lambda h: jnp.concatenate([h[:, ::-1], h[:, :3]], -1),
}


@pytest.mark.parametrize("name", HALVES)
def test_a_width_that_becomes_another(name):
    weights, function = between(HALVES[name], out=out_of(HALVES[name]))
    groups = examine(Case(weights, function))
    assert groups, str(groups)


# ---- the width stays whole

FREEZE = {
    "argsort": (lambda h: h * jnp.argsort(h, -1), "`sort` along it"),
    "top_k": (lambda h: lax.top_k(h, 3)[0], "`top_k` along it"),
    "median": (lambda h: h - jnp.median(h, -1, keepdims=True), "`reduce_or` over it"),
    "any": (lambda h: h * (h > 1).any(-1, keepdims=True), "`reduce_or` over it"),
    "cumprod": (lambda h: jnp.cumprod(h, -1), "`cumprod` along it"),
    "cummax": (lambda h: lax.cummax(h, 1), "`cummax` along it"),
    "logcumsumexp": (lambda h: lax.cumlogsumexp(h, 1), "`cumlogsumexp` along it"),
    "fft of rows": (lambda h: jnp.abs(jnp.fft.fft(h, axis=0)), "`fft` is not understood"),
    "associative scan": (lambda h: lax.associative_scan(jnp.add, h, axis=1), ""),
    "scatter into it": (lambda h: h.at[:, 2].set(1.0), "puts entries into it"),
    "scatter-max": (lambda h: h.at[jnp.array([1])].max(0.5), "`scatter-max` is not understood"),
    "dynamic slice": (
        lambda h: lax.dynamic_slice_in_dim(h, place(h), 3, 1),
        "`dynamic_slice` along",
    ),
    "dynamic update": (
        lambda h: lax.dynamic_update_slice_in_dim(h, h[:, :2], place(h), 1),
        "`dynamic_update_slice` along it",
    ),
    "computed column": (lambda h: h * h[:, place(h)][:, None], "`dynamic_slice` along it"),
    "computed columns": (lambda h: h[:, jnp.argsort(h[0])], ""),
    "take along it": (lambda h: jnp.take_along_axis(h, jnp.argsort(h, -1), -1), "along it"),
    "roll by a computed shift": (lambda h: jnp.roll(h, place(h), 1), "along it"),
    "argmin": (lambda h: h + jnp.argmin(h, -1, keepdims=True), "`argmin` over it"),
    "product": (lambda h: h * jnp.prod(h, -1, keepdims=True), "`reduce_prod` over it"),
    "local response": (
        lambda h: h / (1 + lax.reduce_window(h**2, 0.0, lax.add, (1, 3), (1, 1), "SAME")),
        "a window slides over it",
    ),
    "own reduction": (
        lambda h: h * lax.reduce(h, 0.0, lambda a, b: a + b * b, (1,))[:, None],
        "`reduce` is not understood",
    ),
    "inverse": (lambda h: h @ jnp.linalg.inv(h.T @ h + jnp.eye(8)), "is not understood"),
    "determinant": (lambda h: h * jnp.linalg.det(h.T @ h + jnp.eye(8)), "is not understood"),
    "cholesky": (lambda h: h @ jnp.linalg.cholesky(h.T @ h + jnp.eye(8)), "`cholesky` is not"),
    "solve": (lambda h: jnp.linalg.solve(h.T @ h + jnp.eye(8), h.T).T, "is not understood"),
    "convolve along it": (
        lambda h: jax.vmap(lambda row: jnp.convolve(row, jnp.ones(3), "same"))(h),
        "a convolution slides over it",
    ),
    "search": (lambda h: h * jnp.searchsorted(jnp.sort(h[0]), 0.3), "`sort` along it"),
    "two reductions": (
        lambda h: h + jnp.sum(h + jnp.arange(8.0)[None], -1, keepdims=True),
        "differ",
    ),
    "pad inside": (lambda h: lax.pad(h, 0.0, ((0, 0, 0), (0, 0, 1))), "inside of or off this"),
    "pad off": (lambda h: lax.pad(h, 0.0, ((0, 0, 0), (-1, 1, 0))), "inside of or off this"),
    "product of columns": (lambda h: (h[:, :, None] * h[:, None]).reshape(5, 64), ""),
    "weights by place": (
        lambda h: h * jnp.sum((h + 1) * jnp.arange(8.0)[None], -1, keepdims=True),
        "",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FREEZE)
def test_a_width_that_stays_whole_says_why(name):
    operation, words = FREEZE[name]
    weights, function = between(operation, out=out_of(operation))
    groups = examine(Case(weights, function))
    say_why(groups, {A: words})


# ---- networks in small

CASES = {}


def case(function):
    CASES[function.__name__.replace("_", " ")] = function
    return function


IMAGES, TOKENS, WORDS = draw(2, 6, 6, 3), draw(2, 5, 6), np.array([[1, 2, 0, 6], [5, 5, 3, 1]])


@case
def parametric_relu():
    weights, _ = between(jnp.tanh)

    def function(w, x):
        h = dense(w, x, "a")
        return dense(w, jnp.where(h > 0, h, w["slope"][None] * h), "b")

    return Case(weights | {"slope": draw(8)}, function)


@case
def flipped_derivative():
    """A derivative rule that mixes places: what it returns must shrink as the value does."""

    @jax.custom_jvp
    def operation(h):
        return jnp.sin(h)

    @operation.defjvp
    def _(primals, tangents):
        return jnp.sin(primals[0]), tangents[0][:, ::-1] * jnp.cos(primals[0])

    return Case(*between(operation))


@case
def derivative_of_another_function():
    """Straight-through rounding, with a saved value and a cotangent that is scaled."""

    @jax.custom_vjp
    def operation(h):
        return jnp.floor(3 * h + 0.2)

    operation.defvjp(lambda h: (operation(h), jnp.cos(h)), lambda saved, g: (2 * g * saved,))
    return Case(*between(operation))


@case
def derivative_that_is_flipped():
    @jax.custom_vjp
    def operation(h):
        return jnp.sin(h)

    operation.defvjp(lambda h: (operation(h), h), lambda h, g: (g[:, ::-1] * jnp.cos(h),))
    return Case(*between(operation))


@case
def derivative_rule_with_closed_over_data():
    weights, _ = between(jnp.tanh)

    def function(w, x):
        scale = x.sum()

        @jax.custom_vjp
        def operation(h):
            return h * scale

        operation.defvjp(lambda h: (operation(h), None), lambda _, g: (g * scale,))
        return dense(w, operation(dense(w, x, "a")), "b")

    frozen = {A: "`custom_vjp_call` is not understood"}
    return Case(weights, function, (), frozen)


@case
def scan_over_layers():
    weights = {
        "in": layer(6, 8),
        "stack": {"kernel": 0.3 * draw(3, 8, 8), "bias": draw(3, 8)},
        "out": layer(8, 3),
    }

    def function(w, x):
        def body(h, own):
            return h + jax.nn.relu(h @ own["kernel"] + own["bias"][None]), None

        return dense(w, lax.scan(body, dense(w, x, "in"), w["stack"])[0], "out")

    return Case(weights, function, ("stack/kernel:2",))


@case
def recurrent_network():
    weights = {"in": layer(6, 8), "state": {"kernel": 0.3 * draw(8, 8)}, "out": layer(8, 3)}

    def function(w, x):
        def body(h, row):
            h = jnp.tanh(h @ w["state"]["kernel"] + row)
            return h, jax.nn.sigmoid(h)

        rows = jnp.swapaxes(x @ w["in"]["kernel"] + w["in"]["bias"][None, None], 0, 1)
        last, outs = lax.scan(body, jnp.zeros((2, 8)), rows)
        return dense(w, last + outs.mean(0), "out")

    return Case(weights, function, ("in/kernel:1",), args=(TOKENS,))


@case
def long_short_term_memory():
    weights = {"in": {"kernel": 0.3 * draw(6, 32)}, "state": layer(8, 32), "out": layer(8, 3)}

    def function(w, x):
        def body(carry, row):
            h, c = carry
            gates = row @ w["in"]["kernel"] + dense(w, h, "state")
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        zeros = jnp.zeros((2, 8))
        return dense(w, lax.scan(body, (zeros, zeros), jnp.swapaxes(x, 0, 1))[0][0], "out")

    return Case(weights, function, ("in/kernel:1",), args=(TOKENS,))


@case
def gated_recurrent_unit():
    weights = {"in": layer(6, 24), "state": {"kernel": 0.3 * draw(8, 24)}, "out": layer(8, 3)}

    def function(w, x):
        def body(h, row):
            a = jnp.split(dense(w, row, "in"), 3, -1)
            b = jnp.split(h @ w["state"]["kernel"], 3, -1)
            z, r = jax.nn.sigmoid(a[0] + b[0]), jax.nn.sigmoid(a[1] + b[1])
            return (1 - z) * jnp.tanh(a[2] + r * b[2]) + z * h, None

        return dense(w, lax.scan(body, jnp.zeros((2, 8)), jnp.swapaxes(x, 0, 1))[0], "out")

    return Case(weights, function, ("in/kernel:1",), args=(TOKENS,))


@case
def an_ensemble_by_vmap():
    weights = {"a": 0.3 * draw(4, 6, 8), "b": draw(4, 8, 3)}

    def function(w, x):
        return jax.vmap(lambda a, b: jax.nn.relu(x @ a) @ b)(w["a"], w["b"])

    return Case(weights, function, ("a:2",), {"a:0": "an output has it"})


@case
def tied_weights():
    """An autoencoder with one kernel, used twice."""
    weights = {"kernel": draw(6, 8), "bias": draw(8), "back": draw(6)}

    def function(w, x):
        h = jax.nn.relu(x @ w["kernel"] + w["bias"][None])
        return h @ w["kernel"].T + w["back"][None]

    return Case(weights, function, ("kernel:1",), {"kernel:0": "fixed width"})


@case
def tied_embedding():
    weights = {"table": draw(7, 8), "a": layer(8, 10), "b": layer(10, 8)}

    def function(w, words):
        h = w["table"][words].reshape(-1, 8)
        h = h + dense(w, jax.nn.gelu(dense(w, h, "a")), "b")
        return h @ w["table"].T

    frozen = {"table:0": "`gather` looks up in it"}
    return Case(weights, function, (A, "b/kernel:1"), frozen, (WORDS,))


@case
def tied_to_itself():
    """The same square kernel twice: its inputs are its outputs."""
    weights = {"in": layer(6, 8), "square": 0.3 * draw(8, 8), "out": layer(8, 3)}

    def function(w, x):
        h = dense(w, x, "in")
        for _ in range(2):
            h = jax.nn.relu(h @ w["square"])
        return dense(w, h, "out")

    return Case(weights, function, ("in/kernel:1",))


@case
def weight_standardisation():
    weights = {"a": draw(3, 3, 3, 8), "gain": draw(8), "b": draw(3, 3, 8, 4), "head": draw(4, 3)}

    def conv(kernel, x):
        kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
        kernel = kernel * lax.rsqrt(kernel.var((0, 1, 2), keepdims=True) + 1e-3)
        return convolve(x, kernel)

    def function(w, x):
        h = jax.nn.relu(conv(w["a"], x) * w["gain"][None, None, None])
        return conv(w["b"], h).mean((1, 2)) @ w["head"]

    return Case(weights, function, ("b:3",), args=(IMAGES,))


def convolve(x, kernel, **options):
    names = "NHWC", "HWIO", "NHWC"
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, kernel, dimension_numbers=names, **options)


@case
def spectral_normalisation():
    weights, _ = between(jnp.tanh)
    weights["u"] = draw(8)

    def function(w, x):
        kernel, u = w["a"]["kernel"], w["u"]
        v = kernel @ u
        v = v / jnp.linalg.norm(v)
        u = v @ kernel
        sigma = jnp.linalg.norm(u)
        return dense(w, jax.nn.relu(x @ (kernel / sigma)), "b")

    return Case(weights, function)


@case
def low_rank_factors():
    weights = {"a": draw(6, 4), "b": draw(4, 8), "c": draw(8, 4), "d": draw(4, 3)}

    def function(w, x):
        return jax.nn.relu(x @ (w["a"] @ w["b"])) @ (w["c"] @ w["d"])

    return Case(weights, function, ("b:1",))


@case
def hypernetwork():
    """Weights that are computed from data."""
    weights = {"a": draw(6, 8), "hyper": 0.3 * draw(6, 24), "c": draw(3, 2)}

    def function(w, x):
        kernels = (x @ w["hyper"]).reshape(5, 8, 3)
        return jnp.einsum("bi,bio->bo", jax.nn.relu(x @ w["a"]), kernels) @ w["c"]

    return Case(weights, function, ("a:1",))


@case
def grouped_shuffled_convolutions():
    weights = {"a": draw(1, 1, 3, 8), "b": draw(3, 3, 2, 8), "c": draw(1, 1, 2, 8), "d": draw(8, 3)}

    def function(w, x):
        x = convolve(jax.nn.relu(convolve(x, w["a"])), w["b"], feature_group_count=4)
        x = x.reshape(*x.shape[:3], 4, 2).swapaxes(3, 4).reshape(x.shape)
        return convolve(x, w["c"], feature_group_count=4).mean((1, 2)) @ w["d"]

    frozen = {"b:2": "inputs of a grouped convolution"}
    return Case(weights, function, ("a:3",), frozen, (IMAGES,))


@case
def depthwise_convolution_with_a_multiplier():
    weights = {"a": draw(1, 1, 3, 4), "b": 0.5 * draw(3, 3, 1, 8), "c": draw(8, 3)}

    def function(w, x):
        x = convolve(jnp.tanh(convolve(x, w["a"])), w["b"], feature_group_count=4)
        return jax.nn.sigmoid(x).mean((1, 2)) @ w["c"]

    return Case(weights, function, ("a:3",), args=(IMAGES,))


@case
def transposed_and_dilated_convolutions():
    weights = {"a": draw(3, 3, 3, 8), "b": draw(3, 3, 8, 4), "c": draw(4, 3)}

    def function(w, x):
        x = jax.nn.relu(convolve(x, w["a"], rhs_dilation=(2, 2)))
        x = lax.conv_transpose(
            x, w["b"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(x).mean((1, 2)) @ w["c"]

    return Case(weights, function, ("a:3", "b:3"), {"a:0": "slides over it"}, (IMAGES,))


@case
def convolution_in_groups_of_the_batch():
    weights = {"a": draw(1, 1, 3, 8), "b": draw(3, 3, 8, 4), "c": draw(4, 3)}

    def function(w, x):
        x = convolve(convolve(x, w["a"]), w["b"], batch_group_count=2)
        return x.mean((1, 2)) @ w["c"]

    return Case(weights, function, (), {"a:3": "is not understood"}, (IMAGES,))


@case
def pooling():
    weights = {"a": draw(3, 3, 3, 8), "b": draw(3, 3, 8, 4), "c": draw(4, 3)}

    def function(w, x):
        x = convolve(x, w["a"])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = convolve(x, w["b"])
        x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME") / 4
        return jnp.max(x, (1, 2)) @ w["c"]

    return Case(weights, function, ("a:3", "b:3"), args=(IMAGES,))


def normalised(x, axes):
    return (x - x.mean(axes, keepdims=True)) * lax.rsqrt(x.var(axes, keepdims=True) + 1e-2)


@case
def group_norm_of_two_passes():
    weights = {"a": draw(1, 1, 3, 8), "scale": draw(8), "bias": draw(8), "b": draw(8, 3)}

    def function(w, x):
        x = convolve(x, w["a"])
        x = normalised(x.reshape(2, 6, 6, 4, 2), (1, 2, 4)).reshape(x.shape)
        x = x * w["scale"][None, None, None] + w["bias"][None, None, None]
        return jax.nn.relu(x).mean((1, 2)) @ w["b"]

    return Case(weights, function, ("a:3",), args=(IMAGES,))


@case
def instance_norm():
    weights = {"a": draw(1, 1, 3, 8), "scale": draw(8), "b": draw(8, 3)}

    def function(w, x):
        x = normalised(convolve(x, w["a"]), (1, 2)) * w["scale"][None, None, None]
        return jax.nn.relu(x).mean((1, 2)) @ w["b"]

    return Case(weights, function, ("a:3",), args=(IMAGES,))


@case
def batch_norm_without_a_scale_in_training():
    weights, _ = between(jnp.tanh)
    weights |= {"batch_stats": {"mean": draw(8), "var": jnp.abs(draw(8)) + 1}}

    def function(w, x):
        h, old = dense(w, x, "a"), w["batch_stats"]
        mean, var = h.mean(0), h.var(0)
        new = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}
        h = (h - mean[None]) * lax.rsqrt(var[None] + 1e-3) + old["mean"][None]
        return dense(w, h, "b"), {"batch_stats": new}

    return Case(weights, function, updates=lambda output: output[1])


@case
def batch_norm_then_mean_of_all():
    """Running statistics are no zeros where channels are pruned, so sums over them would differ."""
    weights, _ = between(jnp.tanh)
    weights |= {"batch_stats": {"mean": draw(8), "var": jnp.abs(draw(8)) + 1}}

    def function(w, x):
        h = dense(w, x, "a")
        h = (h - w["batch_stats"]["mean"][None]) * lax.rsqrt(w["batch_stats"]["var"][None])
        return dense(w, h, "b") + h.sum(-1, keepdims=True)

    return Case(weights, function, (), {A: "pruned entries would differ"})


@case
def root_mean_square_norm():
    weights, _ = between(jnp.tanh)

    def function(w, x):
        h = dense(w, x, "a")
        h = h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-3) * (1 + w["scale"][None])
        return dense(w, h, "b")

    return Case(weights | {"scale": draw(8)}, function)


@case
def gated_unit_of_two_kernels():
    weights = {"up": layer(6, 8), "gate": layer(6, 8, seed=3), "b": layer(8, 3)}

    def function(w, x):
        return dense(w, jax.nn.silu(dense(w, x, "gate")) * dense(w, x, "up"), "b")

    return Case(weights, function, ("gate/kernel:1",))


@case
def gated_unit_of_interleaved_columns():
    weights = {"a": layer(6, 16), "b": layer(8, 3)}

    def function(w, x):
        u, v = jnp.moveaxis(dense(w, x, "a").reshape(5, 8, 2), -1, 0)
        return dense(w, jax.nn.sigmoid(u) * v, "b")

    return Case(weights, function)


@case
def squeeze_and_excite():
    weights = {"a": draw(3, 3, 3, 8), "down": draw(8, 4), "up": draw(4, 8), "b": draw(8, 3)}

    def function(w, x):
        x = convolve(x, w["a"])
        gate = jax.nn.hard_sigmoid(jax.nn.relu(x.mean((1, 2)) @ w["down"]) @ w["up"])
        return jnp.max(x * gate[:, None, None], (1, 2)) @ w["b"]

    return Case(weights, function, ("a:3", "down:1"), args=(IMAGES,))


@case
def dense_concatenation():
    weights = {
        "a": draw(1, 1, 3, 4),
        "b": draw(3, 3, 4, 4),
        "c": draw(3, 3, 8, 4),
        "d": draw(12, 3),
    }

    def function(w, x):
        x = convolve(x, w["a"])
        for name in "bc":
            x = jnp.concatenate([x, jax.nn.relu(convolve(x, w[name]))], -1)
        return x.mean((1, 2)) @ w["d"]

    return Case(weights, function, ("a:3", "b:3", "c:3"), args=(IMAGES,))


@case
def u_net():
    weights = {
        "a": draw(3, 3, 3, 4),
        "b": draw(3, 3, 4, 8),
        "c": draw(3, 3, 12, 4),
        "d": draw(4, 2),
    }

    def function(w, x):
        skip = jax.nn.relu(convolve(x, w["a"]))
        low = lax.reduce_window(skip, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        low = jax.nn.relu(convolve(low, w["b"]))
        low = jnp.repeat(jnp.repeat(low, 2, 1), 2, 2)
        return jax.nn.relu(convolve(jnp.concatenate([skip, low], -1), w["c"])) @ w["d"]

    return Case(weights, function, ("a:3", "b:3", "c:3"), args=(IMAGES,))


@case
def resized_images():
    weights = {"a": draw(3, 3, 3, 8), "b": draw(8, 3)}

    def function(w, x):
        x = jax.image.resize(convolve(x, w["a"]), (2, 4, 9, 8), "bilinear")
        return jax.nn.relu(x).mean((1, 2)) @ w["b"]

    return Case(weights, function, ("a:3",), args=(IMAGES,))


@case
def convnext_block():
    weights = {
        "stem": draw(2, 2, 3, 8),
        "depthwise": 0.3 * draw(3, 3, 1, 8),
        "norm": draw(8),
        "up": layer(8, 12),
        "down": layer(12, 8),
        "scale": draw(8),
        "head": draw(8, 3),
    }

    def function(w, x):
        x = convolve(x, w["stem"], window_strides=(2, 2))
        y = convolve(x, w["depthwise"], feature_group_count=8)
        y = normalised(y, -1) * w["norm"][None, None, None]
        y = jax.nn.gelu(dense(w, y.reshape(-1, 8), "up"))
        y = dense(w, y, "down").reshape(x.shape) * w["scale"][None, None, None]
        return (x + y).mean((1, 2)) @ w["head"]

    return Case(weights, function, ("depthwise:3", "up/kernel:1"), args=(IMAGES,))


def attention(queries, heads, causal=False):
    """Queries of `queries` heads on keys and values of `heads` heads, of width 4."""
    weights = {
        "in": draw(6, 8),
        "q": draw(8, queries * 4),
        "k": draw(8, heads * 4),
        "v": draw(8, heads * 4),
        "o": draw(queries * 4, 8),
        "out": draw(8, 3),
    }

    def function(w, x):
        h = x @ w["in"]
        q, k, v = (
            (h @ w[name] / 3).reshape(2, 5, n, 4)
            for name, n in (("q", queries), ("k", heads), ("v", heads))
        )
        q = q.reshape(2, 5, heads, queries // heads, 4)
        scores = jnp.einsum("bthgd,bshd->bhgts", q, k) / 2
        if causal:
            scores = jnp.where(jnp.tril(jnp.ones((5, 5), bool))[None, None, None], scores, -1e9)
        mixed = jnp.einsum("bhgts,bshd->bthgd", jax.nn.softmax(scores), v).reshape(2, 5, -1)
        return (h + mixed @ w["o"]) @ w["out"]

    return Case(weights, function, ("in:1",), args=(TOKENS,))


@case
def multi_head_attention():
    return attention(3, 3, causal=True)


@case
def grouped_query_attention():
    return attention(4, 2)


@case
def multi_query_attention():
    return attention(4, 1)


def fused_attention(layout):
    """One kernel for queries, keys and values of all heads."""
    weights = {"in": draw(6, 8), "qkv": draw(8, 24), "out": draw(8, 3)}
    sizes = {"3": 3, "h": 2, "d": 4}

    def function(w, x):
        fused = (x @ w["in"] @ w["qkv"] / 4).reshape(2, 5, *(sizes[name] for name in layout))
        q, k, v = jnp.moveaxis(fused, 2 + layout.index("3"), 0)
        scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return jnp.einsum("bhts,bshd->bthd", scores, v).reshape(2, 5, -1) @ w["out"]

    return Case(weights, function, ("in:1", "qkv:1"), args=(TOKENS,))


@case
def fused_by_role():
    return fused_attention("3hd")


@case
def fused_by_head():
    return fused_attention("h3d")


@case
def fused_by_feature():
    return fused_attention("hd3")


@case
def rotary_positions():
    weights = {"q": draw(6, 8), "k": draw(6, 8), "v": draw(6, 8), "out": draw(8, 3)}

    def rotate(x):
        angles = jnp.arange(5.0)[:, None] * 10.0 ** -jnp.arange(4.0)[None]
        a, b = jnp.split(x, 2, -1)
        cos, sin = jnp.cos(angles)[None], jnp.sin(angles)[None]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def function(w, x):
        q, k = rotate(x @ w["q"]), rotate(x @ w["k"])
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / 8**0.5)
        return weights @ (x @ w["v"]) @ w["out"]

    return Case(weights, function, ("k:1", "v:1"), args=(TOKENS,))


@case
def normalised_queries_and_keys():
    weights = {"q": draw(6, 8), "k": draw(6, 8), "v": draw(6, 8), "s": draw(8), "out": draw(8, 3)}

    def function(w, x):
        q, k = (x @ w[name] for name in "qk")
        q, k = (
            y * lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-3) * w["s"][None, None]
            for y in (q, k)
        )
        return jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)) @ (x @ w["v"]) @ w["out"]

    return Case(weights, function, ("k:1", "v:1"), args=(TOKENS,))


@case
def keys_that_are_not_zero():
    """Scores sum over a width where neither queries nor keys are 0: nothing of it may go."""
    weights = {"q": draw(6, 8), "k": draw(6, 8), "v": draw(6, 8), "out": draw(8, 3)}

    def function(w, x):
        q, k = jax.nn.elu(x @ w["q"]) + 1, jax.nn.softmax(x @ w["k"])
        return jnp.einsum("btd,bsd,bse->bte", q, k, x @ w["v"]) @ w["out"]

    frozen = {"q:1": "pruned entries would not add 0", "k:1": "pruned entries would not add 0"}
    return Case(weights, function, ("v:1",), frozen, (TOKENS,))


@case
def linear_attention():
    weights = {"q": draw(6, 8), "k": draw(6, 8), "v": draw(6, 4), "out": draw(4, 3)}

    def function(w, x):
        q, k, v = jax.nn.relu(x @ w["q"]), jax.nn.relu(x @ w["k"]), x @ w["v"]
        total = jnp.einsum("btd,bd->bt", q, k.sum(1)) + 1
        return jnp.einsum("btd,bsd,bse->bte", q, k, v) / total[..., None] @ w["out"]

    return Case(weights, function, ("k:1", "v:1"), args=(TOKENS,))


@case
def token_mixing():
    weights = {
        "in": draw(6, 8),
        "tokens": {"a": draw(5, 4), "b": draw(4, 5)},
        "channels": {"a": draw(8, 12), "b": draw(12, 8)},
        "scale": draw(8),
        "out": draw(8, 3),
    }

    def function(w, x):
        x = x @ w["in"]
        y = (normalised(x, -1) * w["scale"][None, None]).swapaxes(1, 2)
        x = x + (jax.nn.gelu(y @ w["tokens"]["a"]) @ w["tokens"]["b"]).swapaxes(1, 2)
        x = x + jax.nn.gelu(normalised(x, -1) @ w["channels"]["a"]) @ w["channels"]["b"]
        return x.mean(1) @ w["out"]

    return Case(weights, function, ("channels/a:1", "channels/b:1", "tokens/a:1"), args=(TOKENS,))


@case
def experts_by_einsum():
    """A batch dimension that is an expert."""
    weights = {"gate": draw(6, 4), "a": draw(4, 6, 8), "b": draw(4, 8, 3)}

    def function(w, x):
        h = jax.nn.relu(jnp.einsum("ti,eio->teo", x, w["a"]))
        return jnp.einsum("te,teo,eof->tf", jax.nn.softmax(x @ w["gate"]), h, w["b"])

    return Case(weights, function, ("a:2",))


@case
def outer_products():
    weights = {"a": draw(6, 4), "b": draw(6, 8), "c": draw(4, 8, 3)}

    def function(w, x):
        h = jnp.einsum("ti,tj->tij", jnp.tanh(x @ w["a"]), jnp.tanh(x @ w["b"]))
        return jnp.einsum("tij,ijk->tk", h, w["c"])

    return Case(weights, function, ("a:1", "b:1"))


@case
def flat_outer_products():
    """Two free widths in one: one of both has to stay."""
    weights = {"a": draw(6, 4), "b": draw(6, 8), "c": draw(32, 3)}

    def function(w, x):
        h = jnp.einsum("ti,tj->tij", jnp.tanh(x @ w["a"]), jnp.tanh(x @ w["b"]))
        return h.reshape(5, 32) @ w["c"]

    return Case(weights, function, ("a:1",), {"b:1": "merged with another free dimension"})


@case
def bilinear_layer():
    weights = {"a": draw(6, 4), "b": draw(6, 8), "c": draw(4, 8, 5), "d": draw(5, 3)}

    def function(w, x):
        h = jnp.einsum("ti,ijk,tj->tk", x @ w["a"], w["c"], x @ w["b"])
        return jax.nn.relu(h) @ w["d"]

    return Case(weights, function, ("a:1", "b:1", "c:2"))


@case
def a_width_of_one():
    weights, function = between(jnp.tanh, width=1)
    return Case(weights, function, ())


@case
def a_width_that_meets_size_one():
    """A kernel of one column is spread over a width: it must not shrink to nothing."""
    weights = {"a": draw(6, 1), "b": draw(6, 8), "c": draw(8, 3)}
    return Case(weights, lambda w, x: ((x @ w["a"]) * jnp.tanh(x @ w["b"])) @ w["c"], ("b:1",))


@case
def a_leaf_that_nothing_reads():
    weights, function = between(jnp.tanh)
    frozen = {"unused:1": "no traced function uses it"}
    return Case(weights | {"unused": draw(8, 8)}, function, frozen=frozen)


@case
def an_empty_leaf():
    weights, function = between(jnp.tanh)

    def both(w, x):
        return function(w, x) + w["empty"].sum()

    return Case(weights | {"empty": jnp.zeros((0, 8))}, both)


@case
def integer_leaves():
    """Leaves that no mask touches: what they give is not 0 where channels are pruned."""
    weights, _ = between(jnp.tanh)

    def function(w, x):
        h = dense(w, x, "a") + w["offsets"][None]
        return dense(w, h, "b") + (h**2).mean(-1, keepdims=True)

    return Case(
        weights | {"offsets": np.arange(8)}, function, (), {A: "pruned entries would differ"}
    )


@case
def a_mean_of_what_is_not_zero():
    """Exp maps 0 to 1, and then positions make all pruned entries different."""
    weights, _ = between(jnp.tanh)

    def function(w, x):
        h = jnp.exp(dense(w, x, "a")) * jnp.arange(8.0)[None]
        return dense(w, h, "b") + h.mean(-1, keepdims=True)

    return Case(weights, function, (), {A: "pruned entries would differ"})


@case
def an_output_beside():
    """What is also returned must keep its width."""
    weights, _ = between(jnp.tanh)

    def function(w, x):
        h = jax.nn.relu(dense(w, x, "a"))
        return dense(w, h, "b"), {"features": h}

    return Case(weights, function, (), {A: "an output has it"})


@case
def padding_rows_of_zeros():
    """Kept and pruned entries tie in a maximum: gradients are shared among all of them."""
    weights = {"a": draw(6, 8), "b": draw(1, 3)}
    x = X.at[0].set(0.0)
    return Case(
        weights, lambda w, x: (x @ w["a"]).max(-1, keepdims=True) @ w["b"], ("a:1",), args=(x,)
    )


# It is the gradient of the whole program that newer JAX cannot take, before anything is pruned.
REFUSED = pytest.mark.xfail(
    jax.__version_info__ >= (0, 11),
    raises=jax.errors.UnexpectedTracerError,
    reason="newer JAX refuses derivative rules that close over traced values",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=REFUSED if "closed over data" in name else ()) for name in CASES],
)
def test_networks_in_small(name):
    made = CASES[name]()
    groups = examine(made)
    assert set(made.free) <= set(groups), str(groups)
    say_why(groups, made.frozen)


def test_what_produces_and_what_consumes():
    weights, function = between(jax.nn.relu)
    group = structure.find_groups(function, weights, X)[A]
    roles = {f"{m.path}:{m.dimension}": m.produces for m in group.members}
    assert roles == {"a/bias:0": True, "a/kernel:1": True, "b/kernel:0": False}
    assert group.exact and [m.path for m in group.gates] == ["a/bias", "a/kernel"]


def test_leaves_that_nothing_reads():
    groups = examine(CASES["a leaf that nothing reads"]())
    reasons = [frozen.reason for frozen in groups.frozen if frozen.path == "unused"]
    assert reasons == ["no traced function uses it"] * 2


def test_straight_through_gates():
    """The gate makes a channel 0, and its derivative rule passes on what it does not."""

    @jax.custom_jvp
    def forward_rule(gate, h):
        return gate * h

    forward_rule.defjvp(lambda values, moves: (values[0] * values[1], moves[1]))

    @jax.custom_vjp
    def backward_rule(gate, h):
        return gate * h

    backward_rule.defvjp(lambda gate, h: (gate * h, h), lambda h, g: (g * h, g))
    for rule in (forward_rule, backward_rule):

        def function(w, x, rule=rule):
            h = x @ w["a"]
            return rule(w["gate"][None] * jnp.ones_like(h), h + x @ w["b"]).sum(-1)

        examine(Case({"a": draw(6, 8), "gate": draw(8), "b": draw(6, 1)}, function))


def test_what_is_removed_shares_in_ties():
    """Zeros of masked channels tie with zeros that stay, and take their part of the gradient."""
    with jax.enable_x64(True):
        weights, rows = {"a": as_float64(draw(6, 8))}, as_float64(draw(3, 6))
        rows[1] = 0.0

        def function(w, x):
            return (x @ w["a"]).max(-1)

        groups = structure.find_groups(function, weights, rows)
        plan = groups.plan({"a:1": np.arange(8) >= 4}, multiple=1)
        masked, small = plan.mask(weights), plan.compact(weights)
        by_masks = jax.grad(lambda x: function(masked, x).sum())(rows)
        by_plan = jax.grad(lambda x: plan.wrap(function)(small, x).sum())(rows)
        assert difference(by_plan, by_masks) < 1e-7


MIXES = {
    "flipped": lambda a, b: jnp.concatenate([a, jnp.exp(b)], -1)[:, ::-1],
    "split": lambda a, b: jnp.concatenate([a, jnp.exp(b)], -1).reshape(5, 2, 4),
    "merged": lambda a, b: (jnp.exp(b)[:, :, None] * a[:, None]).reshape(5, 16),
    "in groups": lambda a, b: lax.conv_general_dilated(
        jnp.concatenate(
            [h[:, None, at] for at in (slice(2), slice(2, 4)) for h in (a, jnp.exp(b))], -1
        ),
        jnp.ones((1, 4, 4)),
        (1,),
        "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=2,
    ),
}


def test_two_widths_in_one():
    """One is 0 where it is pruned, the other is 1: a sum must not take one for the other."""
    for mix in MIXES.values():

        def function(w, x, mix=mix):
            return mix(x @ w["a"], x @ w["b"]).sum(-1)

        examine(Case({"a": draw(6, 4), "b": draw(6, 4)}, function))
