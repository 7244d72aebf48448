"""AMC's agent: the features it sees, one update against NumPy, and its draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import models, search, structure
from jaxprune.search._agent import Settings, Transitions, make_ddpg
from jaxprune.search._amc import _episodes, _Memory, _walk, truncated
from jaxprune.search._states import rest_of, state_of, static_features
from tests.support.searching import planted, problem_of

OWN = planted()
SMALL = Settings(hidden=(5, 4), batch=6)


# States


def mobile_problem(budget=0.5):
    model = nnx.eval_shape(lambda: models.mobilenet_v1(rngs=nnx.Rngs(0)))
    pure = structure.from_nnx(model)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    trace = structure.Trace(pure.evaluate, (image,))
    groups = structure.find_groups([trace], pure.variables)
    layers = search.find_layers(pure.evaluate, pure.variables, image)
    cost = structure.mac_cost(groups, pure.evaluate, pure.variables, image)
    scores = {name: np.arange(group.size) for name, group in groups.items()}
    return search.channels(groups, pure.variables, layers, cost=cost, budget=budget, scores=scores)


@pytest.mark.slow
def test_features_of_mobilenet_are_those_of_the_paper():
    problem = mobile_problem()
    static, rest = static_features(problem), rest_of(problem)
    assert len(problem.decisions) == 14  # the stem and thirteen blocks
    first = search.State(*state_of(problem, static, rest, problem.floors, 0).tolist())
    last = search.State(*state_of(problem, static, rest, problem.floors, 13).tolist())
    assert (first.t, last.t, first.a) == (0, 1, 1)
    assert (first.c, last.c) == (0, 1)  # 32 and 1024 input channels
    assert (first.h, last.h) == (1, 0)  # 112 x 112 and a dense layer
    assert (first.stride, last.stride) == (1, 0)
    assert last.rest == 0
    # The first decision is about a depthwise and a 1x1 convolution.
    own = [layer.macs for layer in problem.decisions[0].layers]
    assert own == [112 * 112 * 9 * 32, 112 * 112 * 32 * 64]
    total = sum(layer.macs for own in problem.decisions for layer in own.layers)
    assert first.rest == pytest.approx(1 - sum(own) / total, abs=1e-6)
    assert total == 568_740_352 - 112 * 112 * 27 * 32  # all but the stem, which reads the image


def test_the_state_changes_with_what_was_kept():
    problem = problem_of(OWN)
    static, rest = static_features(problem), rest_of(problem)
    counts = (24, *problem.floors[1:])
    state = search.State(*state_of(problem, static, rest, counts, 1).tolist())
    assert state.a == 0.75
    assert state.reduced == pytest.approx(1 - problem.account(counts) / problem.dense)
    assert (static >= 0).all() and (static <= 1).all()
    assert static[:, 0].tolist() == [0, 0.5, 1]
    assert (static[:, 3] == 0).all()  # all have the same height


def test_a_walk_passes_what_was_kept_on():
    problem = problem_of(OWN)
    counts, steps = _walk(problem, static_features(problem), rest_of(problem), lambda state: 0.6)
    assert steps.actions.tolist() == [[pytest.approx(0.6)]] * 3  # before the wall
    kept = [k / own.size for k, own in zip(counts, problem.decisions, strict=True)]
    assert steps.states[1:, -1].tolist() == kept[:2]
    np.testing.assert_array_equal(steps.next_states[:-1], steps.states[1:])
    assert steps.goes_on.tolist() == [[1], [1], [0]]
    assert problem.cost(counts) <= problem.budget


# The agent


def layer(params, name):
    own = params[name]
    return np.asarray(own["kernel"][...], np.float64), np.asarray(own["bias"][...], np.float64)


def numbers(params):
    """The parameters of a network by name, in float64."""
    return {name: list(layer(params, name)) for name in params}


def forward(net, x, a=None):
    """Returns the output and what the backward pass needs."""
    if a is None:
        one = x @ net["first"][0] + net["first"][1]
    else:
        one = x @ net["of_state"][0] + net["of_state"][1]
        one = one + a @ net["of_action"][0] + net["of_action"][1]
    h1 = np.maximum(one, 0)
    two = h1 @ net["second"][0] + net["second"][1]
    h2 = np.maximum(two, 0)
    out = h2 @ net["last"][0] + net["last"][1]
    return (1 / (1 + np.exp(-out)) if a is None else out), (one, h1, two, h2)


def backward(net, x, a, kept, grad):
    """Returns the gradients by name, and that of the action."""
    one, h1, two, h2 = kept
    grads = {"last": [h2.T @ grad, grad.sum(0)]}
    grad = grad @ net["last"][0].T * (two > 0)
    grads["second"] = [h1.T @ grad, grad.sum(0)]
    grad = grad @ net["second"][0].T * (one > 0)
    if a is None:
        grads["first"] = [x.T @ grad, grad.sum(0)]
        return grads, None
    grads["of_state"] = [x.T @ grad, grad.sum(0)]
    grads["of_action"] = [a.T @ grad, grad.sum(0)]
    return grads, grad @ net["of_action"][0].T


def adam(net, grads, moments, step, rate):
    """A step of Adam; changes the moments in place."""
    new = {}
    for name, own in net.items():
        new[name] = []
        for index, (p, g) in enumerate(zip(own, grads[name], strict=True)):
            m, v = moments.get((name, index), (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            moments[name, index] = m, v
            m, v = m / (1 - 0.9**step), v / (1 - 0.999**step)
            new[name].append(p - rate * m / (np.sqrt(v) + 1e-8))
    return new


def mixed(new, old, tau):
    return {
        name: [tau * n + (1 - tau) * o for n, o in zip(own, old[name], strict=True)]
        for name, own in new.items()
    }


def close(params, net):
    for name, own in net.items():
        for found, wanted in zip(layer(params, name), own, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-6)


def batch_of(seed, settings=SMALL, rewards=None):
    generator = np.random.default_rng(seed)
    size = settings.batch
    rewards = generator.uniform(size=(size, 1)) if rewards is None else rewards
    rows = (
        generator.uniform(size=(size, 11)),
        generator.uniform(size=(size, 1)),
        rewards,
        generator.uniform(size=(size, 11)),
        generator.integers(0, 2, (size, 1)),
    )
    return Transitions(*(np.asarray(own, np.float32) for own in rows))


def test_updates_equal_a_reference_in_numpy():
    # Two steps, because the first one of Adam sees the signs of gradients only.
    rates = {"critic_rate": 0.1, "actor_rate": 0.02}
    ddpg = make_ddpg(SMALL._replace(**rates))
    agent, other = ddpg.init(0), ddpg.init(1)
    agent = agent._replace(
        target_actor=other.actor, target_critic=other.critic, baseline=jnp.float32(0.4)
    )
    batches = [batch_of(seed) for seed in range(2)]
    actor, critic = numbers(agent.actor), numbers(agent.critic)
    target_actor, target_critic = numbers(other.actor), numbers(other.critic)
    baseline, of_actor, of_critic = 0.4, {}, {}
    for step, batch in enumerate(batches, 1):
        states, actions, rewards, following, goes_on = (np.asarray(x, np.float64) for x in batch)
        baseline = baseline + 0.5 * (rewards.mean() - baseline)
        later, _ = forward(target_critic, following, forward(target_actor, following)[0])
        target = rewards - baseline + goes_on * later
        value, kept = forward(critic, states, actions)
        grads, _ = backward(critic, states, actions, kept, 2 * (value - target) / len(value))
        critic = adam(critic, grads, of_critic, step, 0.1)
        chosen, actor_kept = forward(actor, states)
        value, kept = forward(critic, states, chosen)
        _, of_action = backward(critic, states, chosen, kept, -np.ones_like(value) / len(value))
        grads, _ = backward(actor, states, None, actor_kept, of_action * chosen * (1 - chosen))
        actor = adam(actor, grads, of_actor, step, 0.02)
        target_actor = mixed(actor, target_actor, 0.01)
        target_critic = mixed(critic, target_critic, 0.01)

    stacked = Transitions(*(np.stack(own) for own in zip(*batches, strict=True)))
    new = ddpg.update(agent, stacked)
    close(new.critic, critic)
    close(new.actor, actor)
    close(new.target_actor, target_actor)
    close(new.target_critic, target_critic)
    assert float(new.baseline) == pytest.approx(baseline, rel=1e-6)


def test_the_baseline_starts_at_the_first_mean():
    ddpg = make_ddpg(SMALL)
    batches = [batch_of(seed, rewards=np.full((6, 1), seed + 1.0)) for seed in range(2)]
    stacked = Transitions(*(np.stack(own) for own in zip(*batches, strict=True)))
    new = ddpg.update(ddpg.init(0), stacked)
    assert float(new.baseline) == 1.5  # 1, then halfway to 2


def test_updates_compile_once_for_all_searches_of_a_process():
    settings = SMALL._replace(hidden=(5, 3))  # of no other test
    agent = make_ddpg(settings).init(0)
    for seed in range(3):
        ddpg = make_ddpg(settings)
        agent = ddpg.update(agent, jax.tree.map(lambda x: x[None], batch_of(seed)))
        assert ddpg is make_ddpg(settings)
    assert ddpg.update._cache_size() == 1


def test_widths_may_be_a_list():
    assert make_ddpg(SMALL._replace(hidden=[4, 4])) is make_ddpg(SMALL._replace(hidden=(4, 4)))


def test_the_actor_learns_what_pays():
    settings = Settings(hidden=(16, 16), actor_rate=1e-3, critic_rate=3e-3)
    ddpg = make_ddpg(settings)
    agent = ddpg.init(0)
    actions = np.random.default_rng(0).uniform(size=(2000, 64, 1)).astype(np.float32)
    state = np.full(11, 0.5, np.float32)
    rows = np.broadcast_to(state, (2000, 64, 11))
    rewards = -8 * (actions - 0.4) ** 2
    agent = ddpg.update(agent, Transitions(rows, actions, rewards, rows, np.zeros_like(actions)))
    assert float(ddpg.act(agent, state)) == pytest.approx(0.4, abs=0.1)


def test_defaults_are_those_of_the_published_code():
    assert Settings() == ((300, 300), 1e-4, 1e-3, 0.01, 1.0, 64, 100, 0.5, 0.5, 0.95)


def test_the_replay_is_a_ring_and_every_step_has_the_reward_of_its_episode():
    memory = _Memory(capacity=6)
    for number in range(4):
        steps = batch_of(number)
        steps = Transitions(*(own[:4] for own in steps))
        memory.add(steps, float(number))
    rows = memory.sample(np.random.default_rng(0), updates=1, batch=6)
    assert sorted(rows.rewards[0, :, 0].tolist()) == [2, 2, 3, 3, 3, 3]
    assert len(np.unique(rows.states[0], axis=0)) == 6  # without repetition


@given(st.floats(0, 1), st.floats(1e-3, 1), st.integers(0, 99))
def test_draws_are_truncated(mean, deviation, seed):
    assert 0 <= truncated(np.random.default_rng(seed), mean, deviation) <= 1


def test_draws_follow_the_truncated_distribution():
    from scipy import stats

    draws = [truncated(np.random.default_rng(seed), 0.9, 0.5) for seed in range(400)]
    wanted = stats.truncnorm((0 - 0.9) / 0.5, (1 - 0.9) / 0.5, loc=0.9, scale=0.5)
    assert stats.kstest(draws, wanted.cdf).pvalue > 0.01


def test_the_first_episodes_are_random_and_come_together():
    problem = problem_of(OWN)
    search_of = _episodes(problem, 10, 4, 0, search.accuracy, SMALL)
    assert len(next(search_of)) == 4
    assert len(search_of.send([0.0] * 4)) == 1
