"""Networks that grow: they compute what they did, what is new learns, and removal takes it back."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune import models, structure

IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)


def _resnet(seed):
    widths = models.Widths(8, ((4, 8), (8, 8), (8, 12)))
    return models.resnet8(num_classes=5, in_channels=3, widths=widths, rngs=nnx.Rngs(seed))


def _mobilenet(seed):
    blocks = [(12, 8, 3, 1, False), (16, 8, 5, 1, True)]
    return models.MBConv(blocks, stem=8, head=16, in_channels=3, num_classes=5, rngs=nnx.Rngs(seed))


def _decoder(seed):
    return models.decoder_mini(11, widths=(16, [(4, 2, 24), (4, 2, 16)]), rngs=nnx.Rngs(seed))


def _noisy(variables, seed):
    """Biases and scales that are not 0 and 1."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [
        leaf + 0.1 * jnp.abs(jax.random.normal(key, leaf.shape, leaf.dtype))
        if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for leaf, key in zip(leaves, keys)
    ]  # fmt: skip
    return jax.tree.unflatten(tree, noise)


def _network(make, inputs):
    """Groups and functions of a network, and variables of two seeds."""
    own, other = (structure.from_nnx(make(seed)) for seed in (0, 1))
    groups = structure.find_groups(own.evaluate, own.variables, inputs)
    return own, groups, _noisy(own.variables, 2), _noisy(other.variables, 3)


def _drawn(groups, seed):
    draws = np.random.default_rng(seed)
    keep = {name: draws.random(group.size) < 0.6 for name, group in groups.items()}
    for own in keep.values():
        own[draws.integers(len(own))] = True
    return groups.plan(keep, multiple=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "inputs"), [(_resnet, IMAGES), (_mobilenet, IMAGES), (_decoder, TOKENS)]
)
def test_a_wider_network_computes_the_same(make, inputs):
    own, groups, trained, fresh = _network(make, inputs)
    plan = _drawn(groups, 4)
    small = plan.compact(trained)
    large = structure.expand(groups, plan, small, fresh)
    expected = plan.wrap(own.evaluate)(small, inputs)
    np.testing.assert_allclose(own.evaluate(large, inputs), expected, rtol=1e-4, atol=1e-5)
    # In training mode norms measure the batch, and new channels are in it.
    logits = plan.wrap(own.train)(small, inputs)[0]
    np.testing.assert_allclose(own.train(large, inputs)[0], logits, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, plan.compact(large), small)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(large)]
    assert shapes == [jnp.shape(leaf) for leaf in jax.tree.leaves(fresh)]


@pytest.mark.slow
def test_the_gates_of_new_channels_learn_at_once():
    own, groups, trained, fresh = _network(_resnet, IMAGES)
    plan = groups.plan(
        {name: np.arange(group.size) < group.size // 2 for name, group in groups.items()},
        multiple=1,
    )
    large = structure.expand(groups, plan, plan.compact(trained), fresh)

    def loss(params):
        return jnp.mean(own.train(large | {"params": params}, IMAGES)[0] ** 2)

    scale = large["params"]["blocks"][0]["norm1"]["scale"]
    assert (scale[:2] > 1e-3).all() and (scale[2:] < 1e-29).all()
    slopes = jax.grad(loss)(large["params"])["blocks"][0]["norm1"]["scale"]
    assert (jnp.abs(slopes[2:]) > 1e-6).all(), "a relu of 0 would have no slope"


def _mlp(w, x):
    return jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) @ w["c"]


def _mlp_weights(seed, sizes=(3, 6, 5, 2)):
    draws = np.random.default_rng(seed)
    return {
        name: jnp.asarray(draws.normal(size=shape), jnp.float32)
        for name, shape in zip("abc", zip(sizes, sizes[1:]))
    }


@hypothesis.given(seed=st.integers(0, 99), first=st.integers(1, 6), second=st.integers(1, 5))
def test_any_plan_can_be_taken_back(seed, first, second):
    x = jnp.ones((2, 3))
    trained, fresh = _mlp_weights(seed), _mlp_weights(seed + 1)
    groups = structure.find_groups(_mlp, trained, x)
    draws = np.random.default_rng(seed)
    keep = {"a:1": draws.permutation(6) < first, "b:1": draws.permutation(5) < second}
    plan = groups.plan(keep, multiple=1)
    small = plan.compact(trained)
    large = structure.expand(groups, plan, small, fresh)
    np.testing.assert_allclose(_mlp(large, x), _mlp(small, x), rtol=1e-5, atol=1e-6)
    # What produces new outputs is next to 0, and what reads new inputs is fresh.
    kept = keep["a:1"][:, None] & keep["b:1"]
    faint = np.where(keep["b:1"], fresh["b"], fresh["b"] * np.float32(2.0**-100))
    np.testing.assert_array_equal(large["b"], np.where(kept, trained["b"], faint))


def test_momentum_grows_with_the_weights():
    x = jnp.ones((2, 3))
    weights = _mlp_weights(0)
    groups = structure.find_groups(_mlp, weights, x)
    plan = groups.plan({"a:1": np.arange(6) % 2 == 0}, multiple=1)
    optimizer = optax.adam(0.1)
    small = plan.compact(weights)
    state = optimizer.init(small)
    _, state = optimizer.update(jax.tree.map(jnp.ones_like, small), state, small)
    grown = structure.expand_state(plan, state, optimizer.init(weights), weights)
    assert int(grown[0].count) == 1
    expected = np.where(np.arange(6) % 2 == 0, 0.1, 0.0)
    np.testing.assert_allclose(grown[0].mu["a"], np.tile(expected, (3, 1)), rtol=1e-6)
    np.testing.assert_allclose(grown[0].mu["b"][:, 0], expected, rtol=1e-6)
    moved, _ = optimizer.update(jax.tree.map(jnp.ones_like, weights), grown, weights)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, weights)


def test_growth_on_a_mesh_and_inside_jit():
    x = jnp.ones((2, 8))
    trained, fresh = (_mlp_weights(seed, (8, 16, 8, 2)) for seed in (0, 1))
    groups = structure.find_groups(_mlp, trained, x)
    plan = groups.plan({"a:1": np.arange(16) < 8}, multiple=8)
    expected = structure.expand(groups, plan, plan.compact(trained), fresh)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("data"))
    split = {name: jax.device_put(fresh[name], place) for name in "ab"} | {"c": fresh["c"]}
    large = structure.expand(groups, plan, plan.compact(trained | {"a": split["a"]}), split)
    assert large["b"].sharding == place
    inside = jax.jit(lambda small, base: structure.expand(groups, plan, small, base))(
        plan.compact(trained), fresh
    )
    for name in "bc":
        np.testing.assert_array_equal(large[name], expected[name])
    jax.tree.map(np.testing.assert_array_equal, inside, expected)


def test_refusals():
    x = jnp.ones((2, 3))
    weights = _mlp_weights(0)
    groups = structure.find_groups(_mlp, weights, x)
    plan = groups.plan({"a:1": np.arange(6) < 3}, multiple=1)
    small = plan.compact(weights)
    with pytest.raises(ValueError, match=r"a: shape \(3, 6\) in `variables`, must be \(3, 3\)"):
        structure.expand(groups, plan, weights, weights)
    with pytest.raises(ValueError, match=r"b: shape \(3, 5\) in `base`, must be \(6, 5\)"):
        structure.expand(groups, plan, small, small)
    with pytest.raises(ValueError, match="c: shape missing in `variables`"):
        structure.expand(groups, plan, {name: small[name] for name in "ab"}, weights)
    other = structure.find_groups(lambda w, x: jnp.tanh(x @ w["d"]) @ w["e"],
                                  {"d": jnp.ones((3, 4)), "e": jnp.ones((4, 2))}, x)  # fmt: skip
    with pytest.raises(ValueError, match="d: not in the plan"):
        structure.expand(other, plan, small, weights)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = optimizer.init(weights)
    with pytest.raises(ValueError, match="must be states of the same optimizer"):
        structure.expand_state(plan, optax.adam(0.1).init(small), state, weights)
