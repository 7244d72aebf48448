"""Which functions may run on the smaller arrays as they are, and modules there and back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxprune
from jaxprune import models, structure, trees
from tests.structure.test_finding import SHRINK
from tests.support import zoo, zoo_nnx
from tests.support.checks import X, between, difference, draw, halves


def planned(function, variables, *args):
    groups = structure.find_groups(function, variables, *args)
    assert groups
    return groups.plan(halves(groups), multiple=1)


def off(plan, function, variables, *args):
    """How far the function on the smaller arrays is from the dense one with zeros."""
    small = function(plan.compact(variables), *args)
    return difference(function(plan.mask(variables), *args), small)


# ---- programs that read widths from their arrays, or not


def mlp(w, x):
    return jax.nn.gelu(x @ w["in"] + w["bias"][None]) @ w["out"]


MLP = {"in": draw(6, 16), "bias": draw(16), "out": draw(16, 3)}


def shared_heads(w, x):
    """Attention in which several queries share a key-value head; all counts are read."""
    _, heads, width = w["key"].shape
    query = jnp.einsum("td,dhw->thw", x, w["query"]).reshape(len(x), heads, -1, width)
    key, value = (jnp.einsum("sd,dhw->shw", x, w[name]) for name in ("key", "value"))
    weights = jax.nn.softmax(jnp.einsum("thgw,shw->hgts", query, key) / width**0.5)
    mixed = jnp.einsum("hgts,shw->thgw", weights, value)
    return mixed.reshape(len(x), -1) @ w["out"].reshape(-1, w["out"].shape[-1])


HEADS = {
    "query": draw(6, 8, 4),
    "key": draw(6, 4, 4),
    "value": draw(6, 4, 4, seed=1),
    "out": draw(8, 4, 5),
}


def gemma(w, tokens):
    """Embeddings times the root of the width; the mean of squares over the width."""
    width = w["table"].shape[1]
    h = w["table"][tokens] * jnp.sqrt(width)
    h = h + jax.nn.relu(h @ w["in"]) @ w["out"]
    h = h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) * w["scale"][None]
    return h @ w["table"].T


GEMMA = {
    "table": draw(11, 16) / 8,
    "in": draw(16, 20) / 4,
    "out": draw(20, 16) / 4,
    "scale": 1 + draw(16) / 4,
}


def rotary(w, x):
    """Queries and keys whose pairs of entries turn by an angle that depends on the head's width."""
    query, key = (
        zoo.rotate_halves((x @ w[name])[None, :, None], jnp.arange(len(x))[None])[0, :, 0]
        for name in ("query", "key")
    )
    return jax.nn.softmax(query @ key.T) @ x


ROTARY = {"query": draw(6, 16) / 4, "key": draw(6, 16, seed=1) / 4}
TOKENS = jnp.array([3, 1, 4, 1, 5])


@pytest.mark.parametrize("arrays", [True, False])
def test_an_mlp_fits(arrays):
    plan = planned(mlp, MLP, X)
    assert off(plan, mlp, MLP, X) < 1e-6
    given = (MLP, X) if arrays else jax.eval_shape(lambda: (MLP, X))
    assert plan.fits(mlp, *given) == structure.Fit(True, True, None, ())
    assert plan.fits(mlp, plan.compact(MLP), X).proven


def test_heads_of_keys_and_values_fit():
    groups = structure.find_groups(shared_heads, HEADS, X)
    assert [group.size for group in groups.values()] == [4, 4], str(groups)
    (heads,) = [g for g in groups.values() if {m.path for m in g.members} == set(HEADS)]
    plan = groups.plan({heads.name: np.array([True, False, False, True])}, multiple=1)
    assert off(plan, shared_heads, HEADS, X) < 1e-6
    assert plan.fits(shared_heads, HEADS, X)


@pytest.mark.slow
def test_a_width_that_scales_embeddings_and_divides_means_does_not_fit():
    plan = planned(gemma, GEMMA, TOKENS)
    assert off(plan, gemma, GEMMA, TOKENS) > 0.1
    fit = plan.fits(gemma, GEMMA, TOKENS)
    assert not fit and not fit.proven and fit.difference > 0.1
    assert "`sqrt` at" in fit.reasons[0] and "has 8.0, in the dense network 16.0" in fit.reasons[0]
    shapes = jax.eval_shape(lambda: GEMMA)
    assert plan.fits(gemma, shapes, TOKENS).reasons == fit.reasons


def test_a_width_of_the_mean_alone_does_not_fit():
    def normed(w, x):
        h = x @ w["in"]
        return h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) @ w["out"]

    fit = planned(normed, MLP, X).fits(normed, MLP, X)
    assert not fit and fit.difference == pytest.approx(1 - 0.5**0.5, rel=1e-3)
    (reason,) = fit.reasons
    assert "`div` at" in reason and "has 8.0, in the dense network 16.0" in reason


def test_what_differs_in_a_loop_is_found_in_it():
    def looped(w, x):
        def body(h, _):
            return h * jnp.mean(h**2, -1, keepdims=True), None

        return jax.lax.scan(body, x @ w["in"], None, length=2)[0] @ w["out"]

    fit = planned(looped, MLP, X).fits(looped, MLP, X)
    (reason,) = fit.reasons
    assert not fit and "`div` at" in reason and "has 8.0, in the dense network 16.0" in reason


def test_what_no_array_holds_may_differ_too():
    def powers(w, x):
        return (x @ w["in"]) ** (w["in"].shape[1] // 4 + 1) @ w["out"]

    fit = planned(powers, MLP, X).fits(powers, MLP, X)
    (reason,) = fit.reasons
    assert not fit and "`integer_pow` at" in reason
    assert "has y=3, in the dense network y=5" in reason


@pytest.mark.slow
def test_the_parts_of_a_language_model():
    case = zoo_nnx.language_model()
    groups = structure.find_groups(list(case.traces.values()), case.variables)
    trace = case.traces["prefill"]
    found = {}
    for name, keep in halves(groups).items():
        plan = groups.plan({name: keep}, multiple=1)
        found[name] = plan.fits(trace.function, case.variables, *trace.args)
    heads, width, hidden = (
        [fit for name, fit in found.items() if part in name]
        for part in ("/k/kernel", "/out/kernel", "/gate/kernel")
    )
    assert all(fit.proven for fit in hidden) and hidden
    # The module knows the number of its heads, and its norms divide by the width.
    assert all("it raises TypeError: cannot reshape" in fit.reasons[0] for fit in heads) and heads
    assert all(not fit and fit.difference > 0.1 for fit in width) and width


def test_rotary_pairs_do_not_fit():
    plan = planned(rotary, ROTARY, X)
    assert plan.shape("query") == (6, 8)
    assert off(plan, rotary, ROTARY, X) > 0.01
    fit = plan.fits(rotary, ROTARY, X)
    assert not fit and fit.difference > 0.01 and fit.reasons


def test_numbers_of_places_fit_where_the_first_places_stay():
    def placed(w, x):
        return (x @ w["in"]) * jnp.arange(w["in"].shape[1])[None] @ w["out"]

    groups = structure.find_groups(placed, MLP, X)
    first = groups.plan({"in:1": np.arange(16) < 8}, multiple=1).fits(placed, MLP, X)
    assert first and not first.proven and first.difference < 1e-6
    assert not groups.plan({"in:1": np.arange(16) >= 8}, multiple=1).fits(placed, MLP, X)


def test_zeros_that_training_starts_from_hide_nothing():
    zeros = {**MLP, "out": jnp.zeros((16, 3))}

    def scaled(w, x):
        return mlp(w, x) * w["in"].shape[1]

    plan = planned(scaled, zeros, X)
    assert off(plan, scaled, zeros, X) == 0
    fit = plan.fits(scaled, zeros, X)
    assert not fit and fit.difference == pytest.approx(0.5)


def test_what_cannot_run_or_returns_another_shape_says_so():
    def fixed(w, x):
        return mlp(w, x) + 0 * w["in"].reshape(6, 4, 4).sum()

    def wide(w, x):
        return {"wide": jnp.zeros((len(x), w["in"].shape[1])) + mlp(w, x).sum(), "narrow": x}

    def other(w, x):
        return {"narrow": x} if w["in"].shape[1] < 16 else x

    plan = planned(mlp, MLP, X)
    (reason,) = plan.fits(wide, MLP, X).reasons
    assert reason == "output wide: float32[5, 8], must be float32[5, 16]"
    reasons = plan.fits(other, MLP, X).reasons
    assert reasons == (
        "output narrow: float32[5, 6], must be nothing",
        "output : nothing, must be float32[5, 6]",
    )
    plan = planned(fixed, MLP, X)
    (reason,) = plan.fits(fixed, MLP, X).reasons
    assert reason.startswith("it raises TypeError: ")


def test_dropout_draws_other_bits():
    def dropped(w, x):
        h = x @ w["in"]
        return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0) @ w["out"]

    assert not planned(dropped, MLP, X).fits(dropped, MLP, X)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHRINK)
def test_a_proof_means_equal_numbers(name):
    weights, function = between(SHRINK[name])
    plan = planned(function, weights, X)
    small = plan.compact(weights)
    fit, shapes = (
        plan.fits(function, weights, X),
        plan.fits(function, jax.eval_shape(lambda: weights), X),
    )
    assert shapes.fits == shapes.proven == fit.proven
    try:
        found = function(small, X)
    except Exception:
        assert not fit
        return
    far = difference(plan.wrap(function)(small, X), found)
    assert fit.fits == (far < 1e-4)
    assert not fit.proven or far == 0


@given(kept=st.lists(st.booleans(), min_size=16, max_size=16).filter(any))
def test_any_hidden_units_fit(kept):
    plan = structure.find_groups(mlp, MLP, X).plan({"in:1": np.array(kept)}, multiple=1)
    assert plan.fits(mlp, MLP, X).proven


# ---- modules of Flax NNX, there and back


class Norms(nnx.Module):
    """Two dense layers with a norm between them."""

    def __init__(self, norm, *, rngs):
        self.expand = nnx.Linear(6, 16, rngs=rngs)
        self.norm = norm(16, rngs=rngs)
        self.project = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.project(nnx.relu(self.norm(self.expand(x))))


def split(module, *args):
    pure = structure.from_nnx(module)
    groups = structure.find_groups(pure.traces(*args), pure.variables, parameters=pure.is_parameter)
    assert groups
    return pure, groups.plan(halves(groups), multiple=1)


def test_a_module_there_and_back():
    pure, plan = split(Norms(nnx.BatchNorm, rngs=nnx.Rngs(0)), X)
    module = pure.module(plan, pure.variables, X)
    assert module.expand.kernel.shape == (6, 8) and module.norm.mean.shape == (8,)
    dense = pure.evaluate(plan.mask(pure.variables), X)
    np.testing.assert_allclose(module(X), dense, rtol=1e-5, atol=1e-6)
    assert plan.fits(pure.train, pure.variables, X).proven
    # Smaller arrays that were trained: the same module with these.
    output, new = plan.wrap(pure.train)(plan.compact(pure.variables), X)
    small = {**plan.compact(pure.variables), **new}
    module = pure.module(plan, small, X)
    np.testing.assert_array_equal(module.norm.mean[...], new["state"]["norm"]["mean"])
    np.testing.assert_allclose(module(X), plan.wrap(pure.evaluate)(small, X), rtol=1e-6)


def test_a_module_that_reads_its_width_does_not_come_back():
    pure, plan = split(Norms(nnx.LayerNorm, rngs=nnx.Rngs(0)), X)
    message = r"use `plan.wrap\(function\)` instead.*\n  `div` at .*8.0, in the dense network 16.0"
    with pytest.raises(ValueError, match=message):
        pure.module(plan, pure.variables, X)
    small = plan.compact(pure.variables)
    dense = pure.evaluate(plan.mask(pure.variables), X)
    np.testing.assert_allclose(plan.wrap(pure.evaluate)(small, X), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_resnet_there_and_back():
    images = draw(2, 8, 8, 1)
    model = models.resnet8(num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
    pure, plan = split(model, images)
    assert set(pure.variables) == {"params", "state"}
    module = pure.module(plan, pure.variables, images)
    dense = pure.evaluate(plan.mask(pure.variables), images)
    np.testing.assert_allclose(module(images), dense, rtol=1e-4, atol=1e-5)


def test_another_method_and_the_module_itself():
    class Coder(nnx.Module):
        def __init__(self, *, rngs):
            self.expand, self.project = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

        def encode(self, x):
            return nnx.relu(self.expand(x))

        def __call__(self, x):
            return self.project(self.encode(x))

    coder = Coder(rngs=nnx.Rngs(0))
    pure = structure.from_nnx(coder)
    codes = structure.from_nnx(coder, lambda module, x: module.encode(x))
    np.testing.assert_array_equal(pure.evaluate(pure.variables, X), coder(X))
    np.testing.assert_array_equal(codes.evaluate(pure.variables, X), coder.encode(X))
    assert trees.leaf_by_path(pure.variables).keys() == trees.leaf_by_path(codes.variables).keys()
    _, new = pure.train(pure.variables, X)
    assert new == {}


def test_a_linen_module_refuses_smaller_arrays():
    module = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)])
    variables = module.init(jax.random.key(0), X)
    plan = planned(module.apply, variables, X)
    (reason,) = plan.fits(module.apply, variables, X).reasons
    assert "it raises ScopeParamShapeError" in reason


def test_an_equinox_module_there_and_back():
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.MLP(6, 3, 16, 1, key=jax.random.key(0))
    arrays, static = eqx.partition(module, eqx.is_array)

    def function(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    plan = planned(function, arrays, X)
    assert plan.fits(function, arrays, X)
    small = eqx.combine(plan.compact(arrays), static)
    assert small.layers[0].weight.shape == (8, 6)
    np.testing.assert_allclose(
        jax.vmap(small)(X), function(plan.mask(arrays), X), rtol=1e-5, atol=1e-6
    )


# ---- the optimizer of a smaller module


def nnx_steps(module, optimizer, steps):
    """Steps of training, in one program."""

    @nnx.jit
    def step(module, optimizer):
        module.train()
        loss = lambda module: jnp.mean((module(X) - 1) ** 2)  # noqa: E731
        optimizer.update(module, nnx.grad(loss)(module))

    for _ in range(steps):
        step(module, optimizer)


def test_an_nnx_optimizer_goes_on_with_the_smaller_module():
    module = Norms(nnx.BatchNorm, rngs=nnx.Rngs(0))
    tx = jaxprune.chain(optax.adam(0.01), jaxprune.magnitude_transform(0.5, every=1, stop=1))
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    nnx_steps(module, optimizer, 3)
    pure, plan = split(module, X)
    small = pure.module(plan, pure.variables, X)
    new, restarted = pure.optimizer(plan, optimizer, small)
    assert restarted == () and int(new.step.get_value()) == 3 == int(optimizer.step.get_value())
    # The same as slicing the state of Optax, here and after further steps.
    params = pure.variables["params"]
    state, _ = structure.compact_state(plan, tx, optimizer.opt_state, params, under="params")
    small_params = plan.compact(pure.variables)["params"]
    for ours, theirs in zip(jax.tree.leaves(new.opt_state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    nnx_steps(small, new, 1)
    train = plan.wrap(pure.train)
    rest = {name: own for name, own in plan.compact(pure.variables).items() if name != "params"}
    loss = lambda params: jnp.mean((train(rest | {"params": params}, X)[0] - 1) ** 2)  # noqa: E731
    updates, _ = tx.update(jax.grad(loss)(small_params), state, small_params)
    wanted = trees.leaf_by_path(optax.apply_updates(small_params, updates))
    for path, leaf in trees.leaf_by_path(nnx.state(small, nnx.Param)).items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-4, atol=1e-5)
    assert jaxprune.check(nnx.state(small, nnx.Param), new.opt_state).ok


def test_channels_that_an_nnx_optimizer_masks_are_removed():
    module = Norms(nnx.BatchNorm, rngs=nnx.Rngs(0))
    pure, _ = split(module, X)
    groups = structure.find_groups(pure.traces(X), pure.variables, parameters=pure.is_parameter)

    def tx(groups):
        agip = jaxprune.agip_transform(0.5, every=1, stop=1, groups=groups)
        return jaxprune.chain(optax.sgd(0.01), agip)

    optimizer = nnx.Optimizer(module, tx(groups), wrt=nnx.Param)
    nnx_steps(module, optimizer, 3)
    ((name, channels),) = optimizer.opt_state[1].channels.items()
    assert int(jnp.sum(channels[...])) == 8
    pure, _ = split(module, X)
    plan = groups.plan({name: np.asarray(channels[...])}, multiple=1)
    small = pure.module(plan, pure.variables, X)
    new, restarted = pure.optimizer(
        plan, optimizer, small, tx=tx(groups.compact(plan)), groups=groups
    )
    assert restarted == ()
    nnx_steps(small, new, 2)
    (left,) = new.opt_state[1].channels.values()
    assert left.shape == (8,) and bool(jnp.all(left[...]))


def test_what_belongs_to_other_modules_is_refused():
    module = Norms(nnx.BatchNorm, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adam(0.1), wrt=nnx.Param)
    pure, plan = split(module, X)
    with pytest.raises(ValueError, match=r"expand/bias: shape \(16,\), in the plan \(8,\)"):
        pure.optimizer(plan, optimizer, module)
    params = pure.variables["params"]
    with pytest.raises(ValueError, match=r"but is an `nnx.Optimizer`. Write `from_nnx\(module\)"):
        structure.compact_state(plan, optimizer.tx, optimizer, params, under="params")
    other = optax.sgd(0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"must be a state of `optimizer`.*\n.*only in `state`"):
        structure.compact_state(plan, other, optimizer.opt_state, params, under="params")
