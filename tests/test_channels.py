"""AGIP on channels: exact counts, exact zeros, and the same training with the channels removed."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from structure_checks import draw

import jaxprune
from jaxprune import budgets, scores, structure

STEPS = 12
WINDOW = {"every": 2, "start": 1, "stop": 7}  # mask updates at 1, 3, 5 and 7


def net(params, x):
    """Two hidden layers, the first with a norm, the second without."""
    hidden = x @ params["a"]["kernel"]
    hidden = (hidden - hidden.mean(0, keepdims=True)) / (hidden.std(0, keepdims=True) + 1e-3)
    hidden = jax.nn.relu(hidden * params["norm"]["scale"][None] + params["norm"]["bias"][None])
    hidden = jax.nn.relu(hidden @ params["b"]["kernel"] + params["b"]["bias"][None])
    return hidden @ params["c"]["kernel"]


PARAMS = {
    "a": {"kernel": draw(6, 10)},
    "norm": {"scale": 1 + 0.3 * draw(10), "bias": 0.3 * draw(10, seed=1)},
    "b": {"kernel": draw(10, 8) / 3, "bias": 0.3 * draw(8)},
    "c": {"kernel": draw(8, 3) / 3},
}
X, Y = draw(32, 6), draw(32, 3)
GROUPS = structure.find_groups(net, PARAMS, X)
NORMED, PLAIN = "a/kernel:1", "b/kernel:1"


def agip(sparsity=0.5, groups=GROUPS, **options):
    return jaxprune.agip_transform(sparsity, groups=groups, **(WINDOW | options))


def loss(function, params):
    return jnp.mean((function(params, X) - Y) ** 2)


def trained(optimizer, steps=STEPS, function=net, params=PARAMS, state=None):
    """All (params, state) of a training, jitted once."""
    state, traces = optimizer.init(params) if state is None else state, []

    @jax.jit
    def step(params, state):
        traces.append(True)
        grads = jax.grad(functools.partial(loss, function))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        yield params, state
    assert len(traces) == 1


INNER = {
    "momentum": lambda prune: jaxprune.chain(optax.sgd(0.05, momentum=0.9), prune),
    "optax.chain": lambda prune: optax.chain(optax.sgd(0.05, momentum=0.9), prune),
    "adamw": lambda prune: jaxprune.chain(optax.adamw(0.01, weight_decay=0.1), prune),
    "decay": lambda prune: jaxprune.chain(
        optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9), prune
    ),
    "MultiSteps": lambda prune: optax.MultiSteps(
        jaxprune.chain(optax.sgd(0.05, momentum=0.9), prune), 1
    ),
}
OPTIONS = {
    "default": {},
    "no average": {"decay": None},
    "regrowth": {"regrow": 0.4},
    "global": {"budget": budgets.global_budget()},
    "magnitude": {"score": scores.magnitude},
    "random": {"score": scores.random(3)},
}


def off(state):
    """Group -> channels that are off; from the masks of the gates."""
    masks = jaxprune.get_masks(state)
    return {
        NORMED: ~masks["norm"]["scale"],
        PLAIN: ~masks["b"]["bias"],
    }


CASES = [(name, "default") for name in INNER] + [("momentum", name) for name in OPTIONS][1:]


@pytest.mark.parametrize(("inner", "option"), CASES)
def test_counts_and_zeros_are_exact(inner, option):
    optimizer = INNER[inner](agip(**OPTIONS[option]))
    ramp = dict(zip((1, 3, 5, 7), jaxprune.plans.sparsities_at(0.5, (1, 3, 5, 7)), strict=True))
    sparsity = 0.0
    for number, (params, state) in enumerate(trained(optimizer)):
        sparsity = ramp.get(number, sparsity)
        masked, masks = off(state), jaxprune.get_masks(state)
        counts = {name: int(own.sum()) for name, own in masked.items()}
        if option == "global":
            assert sum(counts.values()) == 18 - budgets.keep_count(18, sparsity)
            assert counts[NORMED] < 10 and counts[PLAIN] < 8
        else:
            assert counts[NORMED] == 10 - budgets.keep_count(10, sparsity)
            assert counts[PLAIN] == 8 - budgets.keep_count(8, sparsity)
        for name in ("scale", "bias"):
            assert (params["norm"][name][masked[NORMED]] == 0).all()
            np.testing.assert_array_equal(masks["norm"][name], ~masked[NORMED])
        assert (params["b"]["bias"][masked[PLAIN]] == 0).all()
        assert (params["b"]["kernel"][:, masked[PLAIN]] == 0).all()
        assert masks["a"]["kernel"].ndim == 0, "a norm is enough; its kernel goes on learning"


def test_sparsity_zero_gives_the_updates_of_the_plain_optimizer():
    plain, ours = optax.sgd(0.05, momentum=0.9), INNER["momentum"](agip(0.0))
    states = plain.init(PARAMS), ours.init(PARAMS)
    for _ in range(3):
        grads = jax.jit(jax.grad(functools.partial(loss, net)))(PARAMS)
        expected, plain_state = jax.jit(plain.update)(grads, states[0], PARAMS)
        updates, state = jax.jit(ours.update)(grads, states[1], PARAMS)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        states = plain_state, state


def test_the_statistic_is_the_squared_taylor_term_at_the_gates():
    decay, expected, params = 0.8, np.zeros(10), PARAMS
    optimizer = INNER["momentum"](agip(decay=decay, start=50, stop=50))
    state = None
    for new, state in trained(optimizer, 4):  # noqa: B007
        grads = jax.grad(functools.partial(loss, net))(params)["norm"]
        term = sum(np.asarray(params["norm"][n] * grads[n], float) for n in ("scale", "bias"))
        expected, params = decay * expected + (1 - decay) * term**2, new
    (average,) = jaxprune.trees.state_fields(state, "channel_average")
    np.testing.assert_allclose(average[NORMED], expected, rtol=1e-4)


def test_the_lowest_statistics_go():
    optimizer = INNER["momentum"](agip(start=3, stop=3))
    *_, (_, before), (_, after) = trained(optimizer, 4)
    (average,) = jaxprune.trees.state_fields(after, "channel_average")
    assert not off(before)[NORMED].any()
    lowest = np.argsort(np.asarray(average[NORMED]), kind="stable")[:5]
    assert sorted(lowest) == sorted(np.flatnonzero(off(after)[NORMED]))


def test_a_channel_comes_back_and_learns_again():
    optimizer = INNER["momentum"](agip(regrow=0.4, every=2, start=1, stop=9))
    back = 0
    steps = list(trained(optimizer, 12))
    for (old, a), (new, b) in zip(steps, steps[1:], strict=False):
        returned = np.flatnonzero(off(a)[NORMED] & ~off(b)[NORMED])
        back += len(returned)
        (age,) = jaxprune.trees.state_fields(b, "channel_age")
        for channel in returned:
            assert old["norm"]["scale"][channel] == 0 != new["norm"]["scale"][channel]
            assert age[NORMED][channel] == 0
    assert back, "nothing came back"


def test_a_gradient_that_is_not_finite_is_refused():
    optimizer = jaxprune.chain(optax.sgd(0.1), agip(start=1, stop=1))
    state, params = optimizer.init(PARAMS), PARAMS
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    bad = ones | {"norm": {"scale": ones["norm"]["scale"].at[2].set(jnp.nan), "bias": jnp.ones(10)}}
    refused = []
    for grads in (ones, bad, ones):
        updates, state = optimizer.update(grads, state, params)
        refused.append([int(x) for x in jaxprune.trees.state_fields(state, "refused")][0])
        counts = int(off(state)[NORMED].sum())
    assert refused == [0, 1, 1] and counts == 5
    (average,) = jaxprune.trees.state_fields(state, "channel_average")
    assert np.isfinite(average[NORMED]).all()


@pytest.mark.parametrize("inner", ["momentum", "adamw", "decay"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_training_goes_on_the_same_without_the_channels(inner, multiple):
    make = INNER[inner]
    dense = list(trained(make(agip())))
    params, state = dense[4]  # two more mask updates are to come
    kept = {name: ~own for name, own in off(state).items()}
    plan = GROUPS.plan({name: np.asarray(own) for name, own in kept.items()}, multiple=multiple)
    groups = GROUPS.compact(plan)
    assert groups[NORMED].size < 10
    optimizer = make(agip(groups=groups))
    small, done = (
        plan.compact(params),
        structure.compact_state(plan, optimizer, state, params, groups=GROUPS),
    )
    assert done.restarted == ()
    after = trained(optimizer, STEPS - 5, plan.wrap(net), small, done.state)
    for (params, state), (small, small_state) in zip(dense[5:], after, strict=True):
        chex.assert_trees_all_close(small, plan.compact(params), rtol=1e-4, atol=1e-5)
        for name, own in off(state).items():
            left = plan.channels(GROUPS[name])
            np.testing.assert_array_equal(off(small_state)[name], own[left])


def test_the_state_is_vectors():
    state = agip(regrow=0.2).init({"params": PARAMS}["params"])
    floats = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32]
    assert sorted(leaf.shape for leaf in floats) == [(8,), (8,), (10,), (10,)]


def test_paths_of_the_variables_may_be_longer():
    groups = structure.find_groups(lambda v, x: net(v["params"], x), {"params": PARAMS}, X)
    (one,) = {tuple(sorted(group.size for group in groups.values()))}
    assert one == (8, 10)
    *_, (params, state) = trained(INNER["momentum"](agip(groups=groups)))
    assert off(state)[NORMED].sum() == 5 and (params["norm"]["scale"] == 0).sum() == 5


def test_groups_of_another_model():
    other = {"a": PARAMS["a"], "norm": {"scale": jnp.ones(7)}, "b": PARAMS["b"], "c": PARAMS["c"]}
    with pytest.raises(ValueError, match="`groups` must be of the model") as error:
        agip().init(other)
    assert "norm/scale: shape (7,), must have 10 along axis 0" in str(error.value)
    assert "norm/bias: missing" in str(error.value)


def test_options_of_weights_are_refused():
    with pytest.raises(ValueError, match="`pattern` is of weights and must be None with `groups`"):
        agip(pattern=jaxprune.patterns.channels(axis=-1))


def test_every_group_keeps_a_channel():
    *_, (_, state) = trained(INNER["momentum"](agip(0.97)))
    assert {name: int((~own).sum()) for name, own in off(state).items()} == {NORMED: 1, PLAIN: 1}
