"""Compaction: smaller arrays compute what dense arrays with zeros do, or nothing is removed."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jaxprune
from jaxprune import models, structure
from jaxprune.structure import Trace
from tests.support.checks import X, between, check, dense, difference, draw, halves, layer

# ---- one operation between two layers: what shrinks, and that it stays right


SHRINK = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "one more": lambda h: h + 1,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "softmax": jax.nn.softmax,
    "leaky relu": jax.nn.leaky_relu,
    "mean of squares": lambda h: h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-3),
    "layer norm, two passes": lambda h: (
        (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3)
    ),
    "largest": lambda h: h / jnp.max(jnp.abs(h) + 1, -1, keepdims=True),
    "clip": lambda h: jnp.clip(h, -0.5, 0.5),
    "where": lambda h: jnp.where(h > 0.1, h, 0.0),
    "flip": lambda h: h[:, ::-1],
    "roll": lambda h: jnp.roll(h, 3, axis=1),
    "transpose": lambda h: h.T.T,
    "reshape": lambda h: h.reshape(5, 2, 4).reshape(5, 8),
    "shuffle": lambda h: h.reshape(5, 2, 4).swapaxes(1, 2).reshape(5, 8),
    "remat": jax.checkpoint(lambda h: jnp.sin(h) * h),
    "scan over steps": lambda h: lax.scan(
        lambda c, x: (c * 0.5 + x, None), h, jnp.ones((3, 1, 1)) * h[None]
    )[0],
    "cond": lambda h: lax.cond(h.sum() > 0, lambda h: h * 2, lambda h: -h, h),
    "vmap": jax.vmap(lambda row: jnp.sin(row) * 2),
    "dropout": lambda h: jnp.where(jax.random.bernoulli(jax.random.key(1), 0.7, h.shape), h, 0.0),
    "barrier": lax.optimization_barrier,
    "bfloat16": lambda h: h.astype(jnp.bfloat16).astype(jnp.float32),
    "index array": lambda h: h * jnp.arange(8.0)[None],
    "max with zero": lambda h: jnp.maximum(h, 0.0) - jnp.minimum(h, 0.0),
    "power": lambda h: (h**2 + 1e-6) ** 0.5,
    "divide": lambda h: h / (1 + jnp.abs(h)),
    "pooling": lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 1), (1, 1), "VALID"),
    "stop gradient": lambda h: h + lax.stop_gradient(h),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHRINK)
def test_operations_that_leave_a_width_free(name):
    weights, function = between(SHRINK[name])
    groups, plan = check([Trace(function, (X,))], weights)
    assert [group.name for group in groups.values()] == ["a/kernel:1"], str(groups)
    assert plan.shape("a/kernel") == (6, plan.shape("b/kernel")[0])
    assert plan.shape("b/kernel")[0] < 8


FREEZE = {
    "sort": (lambda h: jnp.sort(h, -1), "`sort` along it"),
    "cumsum": (lambda h: jnp.cumsum(h, -1), "`cumsum` along it"),
    "fft": (lambda h: jnp.abs(jnp.fft.fft(h)), "`fft` along it"),
    "argmax": (lambda h: h * jnp.argmax(h, -1)[:, None], "`argmax` over it"),
    "scatter": (lambda h: h.at[:, jnp.array([1, 2])].add(1.0), "puts entries into it"),
    "look-up": (lambda h: h[:, jnp.array([3, 1, 1, 0, 2, 5, 6, 7])], "`gather` looks up"),
    "window": (
        lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 2), (1, 1), "SAME"),
        "a window slides over it",
    ),
    "two norms at once": (
        lambda h: h - (h - h.mean(-1, keepdims=True)).mean(keepdims=True),
        "",
    ),
    "product": (lambda h: h * jnp.prod(jnp.abs(h) + 1, -1, keepdims=True), "`reduce_prod` over it"),
    "weights by place": (
        lambda h: h + jnp.sum(h * 0 + jnp.arange(8.0)[None], -1, keepdims=True),
        "",
    ),
}


@pytest.mark.parametrize("name", FREEZE)
def test_operations_that_freeze_a_width_say_why(name):
    operation, reason = FREEZE[name]
    weights, function = between(operation)
    groups = structure.find_groups(function, weights, X)
    if groups:  # more may become free, but never wrong
        check([Trace(function, (X,))], weights)
    if reason:
        assert not groups
        found = [f.reason for f in groups.frozen if (f.path, f.dimension) == ("a/kernel", 1)]
        assert found and reason in found[0], found
        assert reason in str(groups)


# ---- models


def jiggle(variables):
    """No norm scale, bias or running statistic is trivial."""

    def change(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        moved = leaf + 0.3 * jax.random.normal(jax.random.key(len(str(path))), leaf.shape)
        return jnp.abs(moved) + 0.2 if "var" in str(path) else moved

    return jax.tree_util.tree_map_with_path(change, variables)


def nnx_traces(model, *args):
    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)
    variables = {"params": nnx.to_pure_dict(parameters), "state": nnx.to_pure_dict(rest)}

    def merge(variables, train):
        own = nnx.merge(graphdef, variables["params"], variables["state"])
        (own.train if train else own.eval)()
        return own

    def evaluate(variables, *args):
        return merge(variables, False)(*args)

    def train(variables, *args):
        own = merge(variables, True)
        output = own(*args)
        return output, {"state": nnx.to_pure_dict(nnx.state(own, nnx.Not(nnx.Param)))}

    traces = [Trace(evaluate, args), Trace(train, args, lambda output: output[1])]
    return traces, jiggle(variables)


@pytest.mark.slow
def test_resnet():
    model = models.resnet8(num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(3), (4, 8, 8, 1))
    traces, variables = nnx_traces(model, images)
    groups, plan = check(traces, variables)
    assert sorted(group.size for group in groups.values()) == [16, 16, 32, 32, 64, 64]
    residual = groups["params/blocks/0/conv2/kernel:3"]
    assert {"params/stem/conv/kernel", "params/blocks/1/projection/conv/kernel"} < {
        member.path for member in residual.members
    }
    assert groups.unknown == {}
    free = {(m.path, m.dimension) for group in groups.values() for m in group.members}
    kernels = [path for path in groups.model.shapes if path.endswith("kernel")]
    assert all(
        {(path, len(groups.model.shapes[path]) - 1), (path, len(groups.model.shapes[path]) - 2)}
        & free
        for path in kernels
    )
    # Other batch sizes, and masks of the dense network.
    more = jax.random.normal(jax.random.key(4), (7, 8, 8, 1))
    assert plan.verify(traces[0].function, variables, more) < 1e-5
    train = traces[1]
    assert plan.verify(train.function, variables, more, updates=train.updates) < 1e-4


class Block(nn.Module):
    """A transformer block with dropout."""

    heads: int = 4

    @nn.compact
    def __call__(self, x, train):
        y = nn.MultiHeadDotProductAttention(self.heads, deterministic=not train)(nn.LayerNorm()(x))
        x = x + nn.Dropout(0.1, deterministic=not train)(y)
        y = nn.gelu(nn.Dense(40)(nn.LayerNorm(use_fast_variance=False)(x)))
        return x + nn.Dense(x.shape[-1])(y)


class ViT(nn.Module):
    """Patches, a class token, positions, a block and a head."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(24, (4, 4), (4, 4), name="patch")(x).reshape(x.shape[0], -1, 24)
        token = self.param("token", nn.initializers.normal(0.1), (1, 1, 24))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 24)), x], 1)
        x = x + self.param("position", nn.initializers.normal(0.1), (1, x.shape[1], 24))
        x = Block()(x, train)
        return nn.Dense(10, name="head")(nn.LayerNorm()(x)[:, 0])


@pytest.mark.slow
def test_vision_transformer():
    model, images = ViT(), jax.random.normal(jax.random.key(3), (3, 8, 8, 3))
    variables = jiggle(model.init(jax.random.key(0), images, train=False))
    key = jax.random.key(5)

    def evaluate(variables, images):
        return model.apply(variables, images, train=False)

    def train(variables, images):
        return model.apply(variables, images, train=True, rngs={"dropout": key})

    groups, _ = check([Trace(evaluate, (images,)), Trace(train, (images,))], variables)
    sizes = sorted(group.size for group in groups.values())
    assert 24 in sizes and 40 in sizes and 4 in sizes, str(groups)  # width, hidden layer, heads
    free = {m.path for group in groups.values() for m in group.members}
    total = sum(np.prod(shape) for shape in groups.model.shapes.values())
    assert sum(np.prod(groups.model.shapes[path]) for path in free) > 0.95 * total


class Mobile(nn.Module):
    """Dense concatenation, depthwise and grouped convolutions, squeeze-excite, group norm."""

    @nn.compact
    def __call__(self, x, train):
        def norm(name):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)

        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        y = nn.relu(norm("n1")(x))
        x = jnp.concatenate([x, nn.Conv(4, (3, 3), name="dense")(y)], -1)
        y = nn.relu6(norm("n2")(nn.Conv(24, (1, 1), name="expand")(x)))
        y = nn.Conv(24, (3, 3), feature_group_count=24, name="depthwise")(y)
        gate = nn.Dense(24, name="gate")(nn.relu(nn.Dense(6, name="squeeze")(y.mean((1, 2)))))
        y = y * nn.sigmoid(gate)[:, None, None]
        x = x + nn.Conv(12, (1, 1), name="project")(y)
        y = nn.Conv(16, (3, 3), feature_group_count=4, name="grouped")(x)
        y = nn.GroupNorm(num_groups=4, name="group_norm")(nn.swish(y))
        u, g = jnp.split(nn.Dense(32, name="glu")(y.mean((1, 2))), 2, -1)
        return nn.Dense(5, name="head")(u * nn.silu(g))


@pytest.mark.slow
def test_mobile_network():
    model, images = Mobile(), jax.random.normal(jax.random.key(3), (4, 8, 8, 3))
    variables = jiggle(model.init(jax.random.key(0), images, train=False))

    def evaluate(variables, images):
        return model.apply(variables, images, train=False)

    def train(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    traces = [Trace(evaluate, (images,)), Trace(train, (images,), lambda output: output[1])]
    groups, _ = check(traces, variables)
    assert {"params/depthwise/kernel:3", "params/squeeze/kernel:1"} < set(groups), str(groups)


# ---- plans


WEIGHTS, FUNCTION = between(jax.nn.relu)


@pytest.fixture(scope="module")
def mlp():
    return structure.find_groups(FUNCTION, WEIGHTS, X)


def test_plans_compose(mlp):
    first = mlp.plan({"a/kernel:1": np.arange(8) != 3}, multiple=1)
    small = first.compact(WEIGHTS)
    wrapped = first.wrap(FUNCTION)
    again = structure.find_groups(wrapped, small, X)
    assert [(group.name, group.size) for group in again.values()] == [("a/kernel:1", 7)]
    second = again.plan({"a/kernel:1": np.arange(7) < 4}, multiple=1)
    assert second.verify(wrapped, small, X) < 1e-5
    assert second.compact(small)["b"]["kernel"].shape == (4, 3)


@pytest.mark.parametrize(
    ("kept", "multiple", "width"), [(1, 4, 4), (4, 4, 4), (5, 4, 8), (3, 16, 8), (3, 1, 3)]
)
def test_widths_are_rounded_up(mlp, kept, multiple, width):
    flags = np.arange(8) >= 8 - kept
    plan = mlp.plan({"a/kernel:1": flags}, multiple=multiple)
    assert plan.shape("a/bias") == (width,)
    assert plan.kept["a/bias"][0][flags].all(), "what was to stay stays"


def test_each_group_may_have_its_multiple():
    """Attention whose heads and their width are dimensions of one kernel, and an MLP after it."""

    def net(w, x):
        q, k, v = (jnp.einsum("btc,chd->bthd", x, w[name]["kernel"]) for name in "qkv")
        share = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        x = jnp.einsum("bhts,bshd,hdc->btc", share, v, w["out"])
        return jax.nn.relu(x @ w["mlp"]["up"]) @ w["mlp"]["down"]

    weights = {name: {"kernel": draw(16, 6, 16)} for name in "qkv"}
    weights |= {"out": draw(6, 16, 16), "mlp": {"up": draw(16, 32), "down": draw(32, 4)}}
    groups = structure.find_groups(net, weights, draw(1, 3, 16))
    sizes = {name: group.size for name, group in groups.items()}
    assert {"k/kernel:1": 6, "k/kernel:2": 16, "v/kernel:2": 16, "mlp/up:1": 32}.items() <= (
        sizes.items()
    )
    keep = {name: np.arange(size) < 5 for name, size in sizes.items()}
    multiple = {"k/kernel:1": 1, "kernel": 4, "mlp": 16, "*": 2}
    plan = groups.plan(keep, multiple=multiple)
    assert plan.shape("k/kernel")[1:] == (5, 8) and plan.shape("v/kernel")[1:] == (5, 8)
    assert plan.shape("mlp/up")[1] == 16
    assert plan.verify(net, weights, draw(1, 3, 16)) < 1e-5
    # The rest has the default.
    default = groups.plan(keep).shape("mlp/up")
    assert groups.plan(keep, multiple={"kernel": 4}).shape("mlp/up") == default


@pytest.mark.parametrize("multiple", [0, -1, 2.5, True, "8", {"a": 0}])
def test_multiples_are_positive_integers(mlp, multiple):
    with pytest.raises(ValueError, match=r"`multiple` must be an integer of at least 1, but is:\n"):
        mlp.plan({"a/kernel:1": np.arange(8) < 3}, multiple=multiple)


def test_what_is_no_choice_of_channels_is_refused(mlp):
    with pytest.raises(ValueError, match="change these:\n  b: did you mean"):
        mlp.plan({}, multiple={"b": 2})
    with pytest.raises(ValueError, match="`keep` must be a dict from the names of groups"):
        mlp.plan([np.arange(8) < 3])
    with pytest.raises(ValueError, match="`keep` must hold values, but inside `jit`"):
        jax.jit(lambda kept: mlp.plan({"a/kernel:1": kept}))(np.arange(8) < 3)


@pytest.mark.parametrize("score", ["filter_norms", "norm_scales", "fpgm", "taylor"])
def test_scores_are_not_for_jit(mlp, score):
    more = (WEIGHTS,) if score == "taylor" else ()
    with pytest.raises(ValueError, match=f"Call `structure.{score}` outside"):
        jax.jit(lambda w: getattr(structure, score)(mlp, w, *more))(WEIGHTS)


def test_widths_are_multiples_of_8_and_heads_are_not_rounded():
    """Heads are a dimension, or a factor of one; experts are copies; a norm ties pairs."""

    def net(w, x):
        q, k, v = (jnp.einsum("btc,chd->bthd", x, w[name]) for name in "qkv")
        share = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        x = jnp.einsum("bhts,bshd,hdc->btc", share, v, w["out"])
        fused = (x @ w["fused"]).reshape(*x.shape[:2], 3, 12, 16)
        mixed = (fused[:, :, 0] * fused[:, :, 1] * fused[:, :, 2]).reshape(*x.shape[:2], 192)
        share = jnp.einsum("bthd,bshd->bhts", fused[:, :, 0], fused[:, :, 1])
        x = jnp.einsum("bhts,bshd->bthd", share, fused[:, :, 2]).reshape(mixed.shape) @ w["back"]
        x = jnp.einsum("btec,ecd->btd", jnp.einsum("btc,ecd->bted", x, w["up"]), w["down"])
        pairs = (x @ w["wide"]).reshape(*x.shape[:2], 24, 2)
        pairs = pairs - pairs.mean(-1, keepdims=True)
        return jax.nn.relu(pairs.reshape(*x.shape[:2], 48) @ w["narrow"]) @ w["last"]

    weights = {name: draw(16, 12, 32) for name in "qkv"} | {"out": draw(12, 32, 16)}
    weights |= {"fused": draw(16, 3 * 12 * 16), "back": draw(192, 16)}
    weights |= {"up": draw(12, 16, 32), "down": draw(12, 32, 16), "wide": draw(16, 48)}
    weights |= {"narrow": draw(48, 8), "last": draw(8, 4)}
    groups = structure.find_groups(net, weights, draw(1, 3, 16))
    multiples = {name: (group.size, group.multiple) for name, group in groups.items()}
    assert {
        "fused:1": (12, 1),
        "k:1": (12, 1),
        "k:2": (32, 8),
        "v:2": (32, 8),
        "up:2": (32, 8),
        "wide:1": (24, 4),
        "narrow:1": (8, 1),
    }.items() <= multiples.items()
    plan = groups.plan({name: np.arange(group.size) < 5 for name, group in groups.items()})
    assert plan.shape("k") == (16, 5, 8) and plan.shape("wide") == (8, 16)
    assert plan.shape("fused") == (8, 3 * 5 * 16) and plan.shape("narrow") == (16, 5)
    assert plan.verify(net, weights, draw(1, 3, 16)) < 1e-4
    scores = structure.filter_norms(groups, weights)
    limit = structure.count_parameters(groups.plan({})) / 2
    keep = structure.keep_within(groups, scores, limit, structure.count_parameters)
    assert structure.count_parameters(groups.plan(keep)) <= limit


def test_a_plan_survives_a_file(mlp, tmp_path):
    plan = mlp.plan(halves(mlp), multiple=1)
    plan.save(tmp_path / "plan.json")
    again = structure.load_plan(tmp_path / "plan.json")
    small = plan.compact(WEIGHTS)
    chosen = again.compact(WEIGHTS)
    assert jax.tree.all(jax.tree.map(np.array_equal, small, chosen))
    out = again.wrap(FUNCTION)(small, X)
    np.testing.assert_array_equal(out, plan.wrap(FUNCTION)(small, X))
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.slow
def test_transformations_of_a_wrapped_function(mlp):
    plan = mlp.plan(halves(mlp), multiple=1)
    small, wrapped = plan.compact(WEIGHTS), plan.wrap(FUNCTION)
    masked = plan.mask(WEIGHTS)
    rows = jax.vmap(lambda row: wrapped(small, row[None])[0])(X)
    np.testing.assert_allclose(rows, FUNCTION(masked, X), rtol=1e-5, atol=1e-5)
    _, outs = lax.scan(lambda c, row: (c, wrapped(small, row[None])[0]), 0, X)
    np.testing.assert_allclose(outs, rows, rtol=1e-5, atol=1e-5)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    assert wrapped(half, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    def curvature(function, w):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(function(w, x))))
        return jax.jvp(gradient, (X,), (jnp.ones_like(X),))[1]

    np.testing.assert_allclose(
        curvature(wrapped, small), curvature(FUNCTION, masked), rtol=1e-4, atol=1e-4
    )


# ---- optimizer state

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 9)),
    "lamb": lambda: optax.lamb(0.1),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "partition": lambda: optax.partition(
        {"one": optax.adam(0.1), "two": optax.sgd(0.1, momentum=0.9)}, {"a": "one", "b": "two"}
    ),
    "masked": lambda: optax.chain(optax.masked(optax.trace(0.9), {"a": True, "b": False})),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "masks": lambda: jaxprune.chain(optax.sgd(0.1, momentum=0.9), jaxprune.fixed_mask_transform()),
}


def stepped(tx, function, params, state):
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(function(p, X))))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_masked(mlp, name):
    tx = OPTIMIZERS[name]()
    plan = mlp.plan(halves(mlp), multiple=1)
    params, state = WEIGHTS, tx.init(WEIGHTS)
    for _ in range(3):
        params, state = stepped(tx, FUNCTION, params, state)
    small = plan.compact(params)
    done = structure.compact_state(plan, tx, state, params)
    assert done.restarted == ()
    shapes = jax.tree.map(jnp.shape, done.state)
    assert shapes == jax.tree.map(jnp.shape, tx.init(small))
    # One step on gradients of the masked network; lamb and clipping look at norms of all weights.
    masked = plan.mask(params)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(FUNCTION(p, X))))(masked)
    if name not in ("lamb", "clip"):
        updates, _ = tx.update(grads, state, masked)
        small_updates, _ = tx.update(plan.compact(grads), done.state, small)
        assert difference(plan.compact(updates), small_updates) < 1e-6
    wrapped = plan.wrap(FUNCTION)
    trained, _ = stepped(tx, wrapped, small, done.state)
    assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, small)


@pytest.mark.slow
def test_what_has_no_slices_begins_anew():
    weights, function = between(jax.nn.relu, width=256)
    weights["a"]["kernel"], x = draw(128, 256), draw(5, 128)
    groups = structure.find_groups(function, weights, x)
    plan = groups.plan(halves(groups), multiple=1)
    tx = optax.adafactor(0.1)
    state = tx.init(weights)
    done = structure.compact_state(plan, tx, state, weights)
    assert done.restarted and all("a/kernel" in path for path in done.restarted)
    assert {path.split("/")[-3] for path in done.restarted} <= {"v_row", "v_col"}
    small = plan.compact(weights)
    tx.update(small, done.state, small)


def test_parameters_may_be_a_part_of_the_variables():
    variables = {"params": WEIGHTS, "other": jnp.ones(3)}

    def function(v, x):
        return FUNCTION(v["params"], x) + v["other"][None]

    groups = structure.find_groups(function, variables, X)
    plan = groups.plan(halves(groups), multiple=1)
    tx = optax.adam(0.1)
    done = structure.compact_state(plan, tx, tx.init(WEIGHTS), WEIGHTS, under="params")
    assert done.state[0].mu["a"]["kernel"].shape == (6, 4) and done.restarted == ()
    with pytest.raises(ValueError, match=r"a/kernel: shape \(6, 8\), in the plan missing"):
        structure.compact_state(plan, tx, tx.init(WEIGHTS), WEIGHTS)


# ---- bad input


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"a/kernel:1": np.ones(7, bool)}, r"a/kernel:1: bool\[7\], not bool\[8\]"),
        ({"a/kernel:1": np.ones(8)}, r"a/kernel:1: float64\[8\], not bool\[8\]"),
        ({"a/kernel:1": np.zeros(8, bool)}, "a/kernel:1: keeps nothing"),
        ({"other": np.ones(8, bool)}, "other: not a group; groups are a/kernel:1"),
    ],
)
def test_bad_choices(mlp, keep, message):
    with pytest.raises(ValueError, match=message):
        mlp.plan(keep, multiple=1)


def test_variables_of_another_model(mlp):
    plan = mlp.plan(halves(mlp), multiple=1)
    other = {"a": layer(6, 9), "c": layer(1, 1)}
    for call in (plan.compact, plan.mask, lambda v: plan.wrap(FUNCTION)(v, X)):
        with pytest.raises(ValueError, match="must be those of the plan") as error:
            call(other)
        assert "b/kernel: missing" in str(error.value)
        assert "c/bias: not in the plan" in str(error.value)
        assert "a/bias: shape (9,), must be" in str(error.value)
    with pytest.raises(ValueError, match="must be those of the plan"):
        plan.wrap(FUNCTION)(WEIGHTS, X)


def test_a_plan_that_does_not_fit_the_function(mlp):
    plan = mlp.plan(halves(mlp), multiple=1)
    small = plan.compact(WEIGHTS)

    def sorts(w, x):
        return dense(w, jnp.sort(dense(w, x, "a"), -1), "b")

    with pytest.raises(ValueError, match="does not fit this function.*\n.*`sort` along it"):
        plan.wrap(sorts)(small, X)

    one_sided = structure.Plan(
        plan.model, plan.kept | {"b/kernel": [np.ones(8, bool), np.ones(3, bool)]}
    )
    with pytest.raises(ValueError, match="b/kernel dimension 0: would have to shrink as well"):
        one_sided.wrap(FUNCTION)(one_sided.compact(WEIGHTS), X)


def test_updates_must_be_of_the_variables():
    with pytest.raises(ValueError, match="unknown.*\n.*new"):
        structure.find_groups(
            lambda w, x: (FUNCTION(w, x), {"new": x}), WEIGHTS, X, updates=lambda out: out[1]
        )


def test_a_function_that_does_not_trace(mlp):
    def broken(w, x):
        return x if float(x.sum()) > 0 else FUNCTION(w, x)

    with pytest.raises(jax.errors.ConcretizationTypeError):
        structure.find_groups(broken, WEIGHTS, X)


def test_plan_files_of_other_versions(mlp, tmp_path):
    file = tmp_path / "plan.json"
    mlp.plan(halves(mlp), multiple=1).save(file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(ValueError, match="a plan of version 99; this jaxprune reads 3"):
        structure.load_plan(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not a plan of jaxprune"):
        structure.load_plan(file)
    with pytest.raises(FileNotFoundError):
        structure.load_plan(tmp_path / "none.json")


def test_verify_notices_a_difference(mlp):
    plan = mlp.plan(halves(mlp), multiple=1)
    with pytest.raises(ValueError, match="differs from the masked one by"):
        plan.verify(FUNCTION, WEIGHTS, X, tolerance=-1.0)
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, WEIGHTS)
    with pytest.raises(ValueError, match="differs from the masked one by nan"):
        plan.verify(FUNCTION, bad, X)
    with pytest.raises(ValueError, match=r"outputs must have the shapes .*\(5, 4\)"):
        plan.verify(lambda w, x: x @ w["a"]["kernel"], WEIGHTS, X)


def test_unused_leaves_and_dead_code_freeze_nothing_they_do_not_touch(mlp):
    weights = WEIGHTS | {"unused": jnp.ones((4, 4))}

    def function(w, x):
        jnp.sort(dense(w, x, "a"))  # nobody looks at it
        return FUNCTION(w, x)

    groups = structure.find_groups(function, weights, X)
    assert "a/kernel:1" in groups and groups["a/kernel:1"].size == 8
