"""Functions are called as their framework calls them: keywords, strings, modules, generation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxprune import structure
from tests.support.checks import draw, halves

TOKENS = jnp.arange(10).reshape(2, 5)
KEY = jax.random.key(1)


class Language(linen.Module):
    """A model of tokens that generates through its own `apply`."""

    words: int = 11

    @linen.compact
    def __call__(self, tokens, *, train, kind="relu", dtype=jnp.float32):
        hidden = linen.Dense(16, dtype=dtype)(linen.Embed(self.words, 12)(tokens))
        hidden = linen.BatchNorm(use_running_average=not train)(hidden)
        hidden = getattr(linen, kind)(hidden)
        hidden = linen.Dropout(0.5, deterministic=not train)(hidden)
        return linen.Dense(self.words)(hidden)

    def generate(self, variables, tokens, count, temperature=1.0, *, key=None):
        for step in range(count):
            logits = self.apply(variables, tokens, train=False)[:, -1] / temperature
            if key is None:
                new = jnp.argmax(logits, -1)
            else:
                new = jax.random.categorical(jax.random.fold_in(key, step), logits)
            tokens = jnp.concatenate([tokens, new[:, None]], 1)
        return tokens

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def logits_of(self, variables, tokens, train):
        return self.apply(variables, tokens, train=train)


@pytest.fixture(scope="module")
def language():
    model = Language()
    variables = model.init(jax.random.key(0), TOKENS, train=False)
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.abs(draw(*leaf.shape)), variables)
    train = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": KEY}, "kind": "gelu"}
    groups = structure.find_groups(
        model.apply, variables, TOKENS, updates=lambda output: output[1], **train
    )
    return model, variables, train, groups


@pytest.mark.slow
def test_keywords_strings_and_mutable_collections(language):
    model, variables, train, groups = language
    assert {name: group.size for name, group in groups.items()} == {
        "params/Dense_0/kernel:1": 16,
        "params/Embed_0/embedding:1": 12,
    }
    plan = groups.plan(halves(groups), multiple=1)
    assert plan.verify(model.apply, variables, TOKENS, updates=lambda out: out[1], **train) < 1e-5
    assert plan.verify(model.apply, variables, TOKENS, train=False, dtype=jnp.float32) < 1e-5
    small = plan.compact(variables)
    logits, new = plan.wrap(model.apply)(small, TOKENS, **train)
    wanted, dense = model.apply(plan.mask(variables), TOKENS, **train)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    mean = plan.take("batch_stats/BatchNorm_0/mean", dense["batch_stats"]["BatchNorm_0"]["mean"])
    np.testing.assert_allclose(new["batch_stats"]["BatchNorm_0"]["mean"], mean, atol=1e-6)
    compiled = jax.jit(plan.wrap(model.apply), static_argnames=("train", "mutable"))
    logits, _ = compiled(small, TOKENS, train=True, mutable=("batch_stats",), rngs=train["rngs"])
    assert logits.shape == (2, 5, 11)


@pytest.mark.slow
def test_methods_that_generate(language):
    model, variables, _, groups = language
    plan = groups.plan(halves(groups), multiple=1)
    small, masked = plan.compact(variables), plan.mask(variables)
    for keywords in ({}, {"temperature": 0.7, "key": KEY}):
        found = plan.wrap(model.generate)(small, TOKENS, 3, **keywords)
        np.testing.assert_array_equal(found, model.generate(masked, TOKENS, 3, **keywords))
    logits = plan.wrap(model.logits_of)(small, TOKENS, False)
    np.testing.assert_allclose(logits, model.logits_of(masked, TOKENS, False), atol=1e-5)


def test_costs_and_fits_take_keywords(language):
    model, variables, _, groups = language
    half, keywords = groups.plan(halves(groups), multiple=1), {"train": False, "kind": "relu"}
    macs = structure.count_macs(model.apply, variables, TOKENS, **keywords)
    assert macs == 10 * (12 * 16 + 16 * 11)
    cost = structure.mac_cost(groups, model.apply, variables, TOKENS, **keywords)
    assert (cost(groups.plan({})), cost(half)) == (macs, 10 * (6 * 8 + 8 * 11))
    fit = half.fits(model.apply, variables, TOKENS, **keywords)
    assert not fit and "ScopeParamShapeError" in fit.reasons[0]  # Linen knows the dense shapes
    kept = half.kept_outputs(model.apply, variables, TOKENS, **keywords)
    assert [own.size for own in kept] == [2, 5, 11]


class Gated(nnx.Module):
    """A norm, dropout, a function and numbers in a module of NNX."""

    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(3, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)
        self.act, self.scale = jax.nn.relu, 0.5

    def __call__(self, x, *, kind="plain"):
        hidden = self.drop(self.act(self.norm(self.first(x)))) * self.scale
        return self.last(hidden if kind == "plain" else jnp.sin(hidden))


def call(module, x, **keywords):
    return module(x, **keywords)


def train(module, x):
    own = nnx.clone(module)
    own.train()
    return own(x), own


@pytest.mark.slow
def test_modules_of_nnx():
    model, x = Gated(nnx.Rngs(0)), draw(4, 3)
    model.eval()
    groups = structure.find_groups(call, model, x, kind="sine")
    assert [(group.name, group.size) for group in groups.values()] == [("first/kernel:1", 16)]
    plan = groups.plan(halves(groups), multiple=1)
    assert plan.verify(call, model, x, kind="sine") < 1e-5
    assert plan.verify(train, model, x, updates=lambda output: output[1]) < 1e-5
    small = plan.compact(model)
    assert isinstance(small, Gated) and small.first.kernel.shape == (3, 8)
    output, new = plan.wrap(train)(small, x)
    assert new.norm.mean.shape == (8,) and new.act is jax.nn.relu
    np.testing.assert_allclose(output, train(plan.mask(model), x)[0], atol=1e-5)
    pure = structure.from_nnx(model)
    own = structure.find_groups(pure.traces(x, kind="sine"), pure.variables)
    plan = own.plan(halves(own), multiple=1)
    assert plan.verify(pure.evaluate, pure.variables, x, kind="sine") < 1e-5
    assert pure.module(plan, pure.variables, x, kind="sine").first.kernel.shape == (3, 8)


def test_whole_modules_of_equinox():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        """Functions, strings and numbers among the leaves."""

        body: Any
        drop: Any
        name: str
        factor: float

        def __call__(self, x, *, key=None, inference=True):
            hidden = self.drop(self.body.layers[0](x), key=key, inference=inference)
            return self.body.layers[1](self.body.activation(hidden)) * self.factor

    model = Net(eqx.nn.MLP(3, 2, 16, 1, key=KEY), eqx.nn.Dropout(0.5), "net", 2.0)
    x = draw(4, 3)

    def apply(model, x, **keywords):
        return jax.vmap(functools.partial(model, **keywords))(x)

    groups = structure.find_groups(apply, model, x)
    assert [(group.name, group.size) for group in groups.values()] == [
        ("body/layers/0/weight:0", 16)
    ]
    plan = groups.plan(halves(groups), multiple=1)
    assert plan.verify(apply, model, x) < 1e-5
    assert plan.verify(apply, model, x, key=KEY, inference=False) < 1e-5
    assert plan.fits(apply, model, x)
    small = plan.compact(model)
    assert small.body.layers[0].weight.shape == (8, 3) and small.name == "net"
    np.testing.assert_allclose(plan.wrap(apply)(small, x), apply(plan.mask(model), x), atol=1e-5)
    # Under `filter_jit` numbers are static; under `jit` of a tree of numbers they are arrays.
    np.testing.assert_allclose(eqx.filter_jit(apply)(small, x), apply(small, x), atol=1e-6)
    cost = structure.byte_cost(model)
    assert (cost(groups.plan({})), cost(plan)) == (4 * (5 * 16 + 16 + 2), 4 * (5 * 8 + 8 + 2))


def test_functions_of_haiku():
    hk = pytest.importorskip("haiku")

    def net(x, is_training):
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Linear(16)(x), is_training))
        x = hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x
        return hk.Linear(2)(x)

    model, x = hk.transform_with_state(net), draw(4, 3)
    variables = model.init(KEY, x, True)  # (params, state)

    def apply(variables, *args, **keywords):
        return model.apply(*variables, *args, **keywords)

    def updates(output):
        return None, output[1]

    groups = structure.find_groups(apply, variables, KEY, x, updates=updates, is_training=True)
    assert [(group.name, group.size) for group in groups.values()] == [
        ("0/batch_norm/offset:1", 16)
    ]
    plan = groups.plan(halves(groups), multiple=1)
    assert plan.verify(apply, variables, KEY, x, updates=updates, is_training=True) < 1e-5
    small = plan.compact(variables)
    assert plan.wrap(apply)(small, None, x, is_training=False)[0].shape == (4, 2)


def test_numbers_of_python_stay_numbers_until_jit_makes_them_arrays():
    weights = {"a": draw(3, 8), "b": draw(8, 2), "rate": 0.5, "kind": 2}
    weak = jnp.asarray(0.5).astype(jnp.float32)

    def function(w, x, power, scale):
        hidden = (x @ w["a"]) ** w["kind"] * w["rate"] if isinstance(w["kind"], int) else x @ w["a"]
        return (hidden * scale) @ w["b"], power, [1] * power

    x = draw(4, 3)
    groups = structure.find_groups(function, weights, x, 3, weak)
    assert "rate" not in groups.model.shapes
    plan = groups.plan({"a:1": np.arange(8) < 3}, multiple=1)
    small = plan.compact(weights)
    output, power, ones = plan.wrap(function)(small, x, 3, weak)
    wanted = function(plan.mask(weights), x, 3, weak)[0]
    np.testing.assert_allclose(output, wanted, atol=1e-5)
    assert (power, ones) == (3, [1, 1, 1])
    compiled = jax.jit(lambda w: plan.wrap(lambda w, x: x @ w["a"] @ w["b"] * w["rate"])(w, x))
    masked = plan.mask(weights)
    np.testing.assert_allclose(compiled(small), x @ masked["a"] @ masked["b"] * 0.5, atol=1e-5)


def test_weak_types_promote_as_in_the_function_itself():
    weights = {"a": draw(3, 8).astype(jnp.bfloat16), "b": draw(8, 2).astype(jnp.bfloat16)}
    x = draw(4, 3).astype(jnp.bfloat16)

    def function(w, x, scale):
        return x @ w["a"] * scale @ w["b"]

    plan = structure.find_groups(function, weights, x, 0.5).plan(
        {"a:1": np.arange(8) < 4}, multiple=1
    )
    run = jax.jit(plan.wrap(function))
    assert run(plan.compact(weights), x, 0.5).dtype == jnp.bfloat16


@pytest.mark.parametrize("inside", [False, True])
def test_an_output_that_is_a_number_is_as_weakly_typed_as_before(inside):
    def function(w, x):
        y = x @ w["a"] @ w["b"]
        branch = jax.lax.cond(y[0, 0] > 0, lambda: 2.0, lambda: 3.0) if inside else 2.0
        return y, branch, jnp.float32(2)

    weights, x = {"a": draw(3, 8), "b": draw(8, 2)}, draw(4, 3)
    plan = structure.find_groups(function, weights, x).plan({"a:1": np.arange(8) < 4}, multiple=1)
    small = plan.compact(weights)
    wanted = [leaf.weak_type for leaf in jax.tree.leaves(jax.eval_shape(function, weights, x))]
    found = jax.make_jaxpr(plan.wrap(function))(small, x).out_avals
    assert [leaf.weak_type for leaf in found] == wanted == [False, True, False]


def test_arguments_beside_a_list_of_traces():
    traces = [structure.Trace(lambda w, x: x @ w["a"], (draw(4, 3),))]
    with pytest.raises(ValueError, match="put them into the traces"):
        structure.find_groups(traces, {"a": draw(3, 8)}, draw(4, 3))
    with pytest.raises(ValueError, match="put them into the traces"):
        structure.find_groups(traces, {"a": draw(3, 8)}, parameter=lambda path, leaf: True)
