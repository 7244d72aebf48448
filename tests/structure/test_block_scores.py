"""Scores of blocks are those by hand, and budgets choose among blocks and channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import structure
from tests.structure.test_blocks import NO, X, network, of_mlp, plain, stack, weights
from tests.support.checks import dense


@pytest.fixture
def pruned():
    variables, function = weights(of_mlp(1), of_mlp(2)), network(plain, plain)
    return function, variables, structure.find_groups(function, variables, X)


def test_blocks_are_ranked_like_channels(pruned):
    _, _, groups = pruned
    scores = {"layers/0/down": np.array([1.0]), "layers/1/down": np.array([2.0])}
    keep = structure.keep_global(groups, scores, 0.5)
    assert {k: v.tolist() for k, v in keep.items()} == {
        "layers/0/down": [False],
        "layers/1/down": [True],
    }
    with pytest.raises(ValueError, match="use `keep_global`"):
        structure.keep_uniform(groups, scores, 0.5)
    total = structure.count_parameters(groups.plan({}))
    found = structure.keep_within(groups, scores, total - 1, structure.count_parameters)
    assert found["layers/0/down"].tolist() == [False]
    widths = structure.keep_within(
        groups,
        {"layers/1/up:1": np.arange(12.0)},
        total / 2,
        structure.count_parameters,
        multiple=1,
        keep=found,
    )
    assert widths["layers/0/down"].tolist() == [False]
    count = structure.count_parameters(groups.plan(widths, multiple=1))
    assert count <= total / 2 < count + 17 and widths["layers/1/up:1"][-1]


def influence_by_hand(x, y):
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    return 1 - cosine.mean()


def streams(variables, step=plain):
    x = dense(variables, X, "in")
    found = [x]
    for n in range(4):
        for part in variables["layers"]:
            x = step(jax.tree.map(lambda leaf, n=n: leaf[n], part), x)
            found.append(x)
    return [np.asarray(x, float) for x in found]


@pytest.mark.parametrize("remat", [False, True])
def test_scores_of_a_stack_are_those_by_hand(remat):
    variables = stack()

    def call(w, x):
        step = jax.checkpoint(plain) if remat else plain

        def body(x, own):
            return step(own[1], step(own[0], x)), None

        return dense(w, lax.scan(body, dense(w, x, "in"), w["layers"])[0], "out")

    def loss(w, x):
        return jnp.mean(call(w, x) ** 2)

    groups, found = structure.find_groups(call, variables, X), streams(variables)
    scores = structure.block_influence(groups, call, variables, [X, X])
    for part, name in enumerate(groups.blocks):
        wanted = [influence_by_hand(*found[2 * n + part : 2 * n + part + 2]) for n in range(4)]
        np.testing.assert_allclose(scores[name], wanted, atol=1e-5)
    layers = groups.joined(lambda name: "layers")
    wanted = [influence_by_hand(found[2 * n], found[2 * n + 2]) for n in range(4)]
    scores = structure.block_influence(layers, call, variables, [X])
    np.testing.assert_allclose(scores["layers"], wanted, atol=1e-5)
    rises = structure.block_losses(groups, loss, variables, [X])
    name = "layers/1/down"
    less = groups.plan({name: np.array([True, True, False, True])}).mask(variables)
    np.testing.assert_allclose(
        rises[name][2], loss(less, X) - loss(variables, X), rtol=1e-3, atol=1e-5
    )
    taylor = structure.block_taylor(groups, loss, variables, [X])

    def scaled(factor):
        part = variables["layers"][1]
        down = part["down"].at[2].multiply(factor)
        layers = (variables["layers"][0], part | {"down": down})
        return loss(variables | {"layers": layers}, X)

    np.testing.assert_allclose(taylor[name][2], jax.grad(scaled)(1.0) ** 2, rtol=1e-3)


def test_scores_of_a_list_are_those_by_hand(pruned):
    function, variables, groups = pruned
    x = dense(variables, X, "in")
    y = plain(variables["layers"][0], x)
    scores = structure.block_influence(groups, function, variables, [X])
    np.testing.assert_allclose(
        scores["layers/0/down"], [influence_by_hand(np.asarray(x), np.asarray(y))], atol=1e-5
    )
    joined = groups.joined(lambda name: "both")
    z = plain(variables["layers"][1], y)
    np.testing.assert_allclose(
        structure.block_influence(joined, function, variables, [X])["both"],
        [influence_by_hand(np.asarray(x), np.asarray(z))],
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="at least one batch"):
        structure.block_influence(groups, function, variables, [])
    with pytest.raises(ValueError, match="does not run:\n  layers/0/down"):
        structure.block_influence(groups, lambda w, x: dense(w, x, "in"), variables, [X])
    nothing = structure.Groups(groups.model, (), (), {})
    with pytest.raises(ValueError, match="no residual branch was found"):
        structure.block_influence(nothing, function, variables, [X])


# ---- costs


def test_time_is_measured_once_for_each_choice_of_shapes(pruned):
    function, variables, groups = pruned
    traced = []

    def noted(w, x):
        traced.append(w["layers"][1]["up"].shape)
        return function(w, x)

    seconds = structure.latency_cost(noted, variables, X, repeats=2)
    plans = [groups.plan({"layers/0/down": NO})] * 2 + [
        groups.plan(
            {"layers/0/down": NO, "layers/1/up:1": np.roll(np.arange(12) < 4, n)}, multiple=1
        )
        for n in range(3)
    ]
    found = [seconds(plan) for plan in plans]
    assert len(traced) == 2 and len(set(found)) == 2 and min(found) > 0
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        structure.latency_cost(function, variables, X, repeats=0)


def test_any_number_is_a_budget(pruned):
    _, variables, groups = pruned
    scores = {name: np.arange(12.0) for name in ("layers/0/up:1", "layers/1/up:1")}

    def cost(plan):
        return 1e-3 * structure.count_parameters(plan)

    keep = structure.keep_within(groups, scores, 0.3, cost, multiple=1)
    assert cost(groups.plan(keep, multiple=1)) <= 0.3
    with pytest.raises(ValueError, match="`plan` must have caches"):
        structure.cache_cost(variables)(groups.plan({}))
