"""Sorting permutes channels jointly: the function remains, and prefixes nest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import elastic, models, structure


def conv(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def draws(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=own), jnp.float32) for name, own in shapes.items()}


def residual(w, x):
    x = jax.nn.relu(conv(x, w["stem"]))
    x = jax.nn.relu(x + conv(jax.nn.relu(conv(x, w["up"])), w["down"]))
    return x.mean((1, 2)) @ w["head"]


def depthwise(w, x):
    x = jax.nn.relu(conv(x, w["up"]))
    x = jax.nn.relu(conv(x, w["deep"], groups=6))
    return conv(x, w["down"]).mean((1, 2))


def grouped(w, x):
    x = jax.nn.relu(conv(x, w["stem"]))
    x = jax.nn.relu(conv(x, w["grouped"], groups=2))
    return conv(x, w["down"]).mean((1, 2))


def flattened(w, x):
    x = jax.nn.relu(conv(x, w["stem"]))
    return x.reshape(x.shape[0], -1) @ w["head"]


def attention(w, x):
    batch, length, _ = x.shape
    split = [(x @ w[name]).reshape(batch, length, 3, 4) for name in ("query", "key", "value")]
    query, key, value = split
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, -1)
    return mixed @ w["out"]


IMAGES = (2, 4, 4, 2)
CASES = {
    "residual": (
        residual,
        draws(stem=(3, 3, 2, 4), up=(3, 3, 4, 6), down=(3, 3, 6, 4), head=(4, 3)),
        IMAGES,
    ),
    "depthwise": (
        depthwise,
        draws(up=(1, 1, 2, 6), deep=(3, 3, 1, 6), down=(1, 1, 6, 3)),
        IMAGES,
    ),
    "grouped": (
        grouped,
        draws(stem=(3, 3, 2, 8), grouped=(3, 3, 4, 8), down=(1, 1, 8, 3)),
        IMAGES,
    ),
    "flattened": (flattened, draws(stem=(3, 3, 2, 4), head=(64, 3)), IMAGES),
    "attention": (
        attention,
        draws(query=(8, 12), key=(8, 12), value=(8, 12), out=(12, 8)),
        (2, 5, 8),
    ),
}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000))
def test_sorting_leaves_the_function_as_it_was(name, seed):
    function, variables, shape = CASES[name]
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    groups = structure.find_groups(function, variables, x)
    assert len(groups) >= 1
    scores = {name: rng.permutation(group.size) for name, group in groups.items()}
    permuted = elastic.sort_channels(groups, variables, scores)
    changed = [k for k in variables if not np.array_equal(variables[k], permuted[k])]
    assert changed or all((np.diff(own) < 0).all() for own in scores.values())
    np.testing.assert_allclose(function(permuted, x), function(variables, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_prefixes_of_sorted_channels_are_the_best_and_nest(name):
    function, variables, shape = CASES[name]
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    groups = structure.find_groups(function, variables, x)
    for one, group in groups.items():
        scores = np.random.default_rng(2).permutation(group.size).astype(float)
        permuted = elastic.sort_channels(groups, variables, {one: scores})
        order = np.argsort(-scores)
        for count in range(1, group.size + 1):
            best = np.zeros(group.size, bool)
            best[order[:count]] = True
            chosen = groups.plan({one: best}, multiple=1).mask(variables)
            prefix = groups.plan({one: np.arange(group.size) < count}, multiple=1).mask(permuted)
            np.testing.assert_allclose(
                function(prefix, x), function(chosen, x), rtol=1e-4, atol=1e-4
            )


def test_scores_are_the_norms_of_what_reads_a_channel():
    function, variables, shape = CASES["residual"]
    groups = structure.find_groups(function, variables, jnp.ones(shape))
    scores = elastic.consumer_norms(groups, variables)
    own = {name: np.abs(np.asarray(leaf)) for name, leaf in variables.items()}
    inner = next(name for name, group in groups.items() if group.size == 6)
    stream = next(name for name, group in groups.items() if group.size == 4)
    np.testing.assert_allclose(scores[inner], own["down"].sum((0, 1, 3)), rtol=1e-6)
    expected = own["up"].sum((0, 1, 3)) + own["head"].sum(1)
    np.testing.assert_allclose(scores[stream], expected, rtol=1e-6)


def test_channels_are_only_sorted_inside_their_bucket():
    function, variables, shape = CASES["depthwise"]
    groups = structure.find_groups(function, variables, jnp.ones(shape))
    (name,) = groups
    scores = {name: np.arange(6.0)}
    permuted = elastic.sort_channels(groups, variables, scores, buckets={name: (2, 5)})
    taken = [1, 0, 4, 3, 2, 5]
    np.testing.assert_array_equal(permuted["down"], variables["down"][:, :, taken])
    np.testing.assert_array_equal(permuted["deep"], variables["deep"][..., taken])


def test_equal_scores_keep_their_order():
    function, variables, shape = CASES["depthwise"]
    groups = structure.find_groups(function, variables, jnp.ones(shape))
    (name,) = groups
    permuted = elastic.sort_channels(groups, variables, {name: [0, 1, 1, 0, 1, 0]})
    np.testing.assert_array_equal(permuted["up"], variables["up"][..., [1, 2, 4, 0, 3, 5]])


def test_channels_that_are_told_apart_by_position_are_refused():
    def function(w, x):
        hidden = (x @ w["in"]) * jnp.arange(1.0, 7.0)[None]
        return jax.nn.relu(hidden) @ w["out"]

    variables = draws(**{"in": (3, 6), "out": (6, 2)})
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
    groups = structure.find_groups(function, variables, x)
    (name,) = groups
    scores = {name: np.arange(6.0)}
    with pytest.raises(ValueError, match=f"by their position(.|\n)*{name}: by"):
        elastic.sort_channels(groups, variables, scores, apply=lambda w: function(w, x))


def test_scores_that_do_not_fit_are_listed():
    function, variables, shape = CASES["depthwise"]
    groups = structure.find_groups(function, variables, jnp.ones(shape))
    (name,) = groups
    with pytest.raises(ValueError, match=r"nothing: not a group(.|\n)*shape \(5,\), not \(6,\)"):
        elastic.sort_channels(groups, variables, {"nothing": [1.0], name: np.ones(5)})


@pytest.mark.slow
def test_running_statistics_move_with_their_channels():
    model = models.resnet8(in_channels=1, rngs=nnx.Rngs(0))
    pure = structure.from_nnx(model)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32), pure.variables
    )
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32)
    groups = structure.find_groups(pure.traces(x), pure.variables, parameters=pure.is_parameter)
    scores = elastic.consumer_norms(groups, variables)
    permuted = elastic.sort_channels(
        groups, variables, scores, apply=jax.jit(lambda own: pure.evaluate(own, x))
    )
    old, new = variables["state"]["stem"]["norm"], permuted["state"]["stem"]["norm"]
    assert not np.array_equal(old["mean"], new["mean"])
    assert sorted(np.asarray(old["mean"])) == sorted(np.asarray(new["mean"]))
