"""Compaction while training: when it pays, and that training does not notice."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune
from jaxprune import structure
from jaxprune.structure import Policy
from tests.support.checks import draw
from tests.transforms.test_agip_channels import PARAMS, X, Y, net

VARIABLES = {"params": PARAMS, "shift": jnp.zeros(3)}


def apply(variables, x):
    return net(variables["params"], x) + variables["shift"][None]


GROUPS = structure.find_groups(
    apply, VARIABLES, X, parameters=lambda path, leaf: path.startswith("params")
)
NORMED = "params/b/kernel:1"


def make_optimizer(groups):
    agip = jaxprune.agip_transform(0.6, groups=groups, every=2, start=1, stop=9)
    return jaxprune.chain(optax.sgd(0.05, momentum=0.9), agip)


def make_step(function, groups):
    optimizer = make_optimizer(groups)

    @jax.jit
    def step(variables, opt_state):
        def loss(params):
            return jnp.mean((function(variables | {"params": params}, X) - Y) ** 2)

        params = variables["params"]
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return variables | {"params": optax.apply_updates(params, updates)}, opt_state

    return step


@pytest.mark.slow
def test_two_switches_train_as_masks_do():
    dense, dense_state = VARIABLES, make_optimizer(GROUPS).init(PARAMS)
    small, state, network = dense, dense_state, structure.dense_network(GROUPS)
    dense_step = step = make_step(apply, GROUPS)
    sizes = []
    for number in range(14):
        dense, dense_state = dense_step(dense, dense_state)
        small, state = step(small, state)
        if number in (4, 10):  # in the middle of the ramp, and after it
            keep = structure.masked_channels(network.groups, state)
            assert list(keep) == list(GROUPS) != sorted(GROUPS), "the state is sorted by name"
            switch = structure.shrink(
                network, keep, {apply: (X,)}, make_optimizer, small, state, multiple=2
            )
            assert switch.difference < 1e-5 and switch.restarted == ()
            assert set(switch.rounded) == {n for n, own in keep.items() if own.sum() % 2}
            network, small, state = switch.network, switch.variables, switch.opt_state
            step = make_step(network.plan.wrap(apply), network.groups)
        sizes.append(network.groups[NORMED].size)
        chex.assert_trees_all_close(small, network.plan.compact(dense), rtol=1e-4, atol=1e-5)
    assert sizes[3] == 10 > sizes[5] > sizes[-1] == 4


@pytest.fixture
def masked():
    """A network, its state and channels after a mask update."""
    step = make_step(apply, GROUPS)
    variables, state = VARIABLES, make_optimizer(GROUPS).init(PARAMS)
    for _ in range(6):
        variables, state = step(variables, state)
    return variables, state, structure.masked_channels(GROUPS, state)


@pytest.mark.slow
def test_a_channel_that_is_not_masked_does_not_go(masked):
    variables, state, keep = masked
    keep = {name: own.copy() for name, own in keep.items()}
    keep[NORMED][np.flatnonzero(keep[NORMED])[0]] = False
    network = structure.dense_network(GROUPS)
    before = jax.tree.map(np.array, (variables, state))
    with pytest.raises(ValueError, match="`keep` must keep every channel that is not masked"):
        call = {apply: (X,)}
        structure.shrink(network, keep, call, make_optimizer, variables, state, multiple=1)
    jax.tree.map(np.testing.assert_array_equal, before, (variables, state))


def test_a_nan_is_not_a_small_difference(masked):
    variables, state, keep = masked
    broken = variables | {"shift": jnp.full(3, jnp.nan)}
    with pytest.raises(ValueError, match="differs from the present one by nan"):
        network = structure.dense_network(GROUPS)
        structure.shrink(network, keep, {apply: (X,)}, make_optimizer, broken, state)


def test_fewer_channels_than_the_multiple_keep_the_multiple(masked):
    variables, state, keep = masked
    network = structure.dense_network(GROUPS)
    switch = structure.shrink(
        network, keep, {apply: (X,)}, make_optimizer, variables, state, multiple=8
    )
    assert keep[NORMED].sum() < 8 == switch.network.groups[NORMED].size
    assert NORMED in switch.rounded
    left = structure.masked_channels(switch.network.groups, switch.opt_state)
    assert left[NORMED].sum() == keep[NORMED].sum(), "what fills up stays masked"


def test_states_without_channels_or_with_others(masked):
    with pytest.raises(ValueError, match="`opt_state` must hold the channels of one"):
        structure.masked_channels(GROUPS, optax.sgd(0.1).init(PARAMS))
    other = structure.find_groups(
        lambda v, x: x @ v["p"] @ v["q"], {"p": draw(2, 3), "q": draw(3, 2)}, draw(1, 2)
    )
    with pytest.raises(ValueError, match="p:1: 0 channels in the state, 3 in it"):
        structure.masked_channels(other, masked[1])


COSTS = {"cost": st.floats(0.1, 1), "part": st.floats(0, 1), "left": st.integers(0, 10_000)}


@given(**COSTS, price=st.floats(0, 1000), done=st.integers(0, 6))
def test_a_switch_pays_for_itself(cost, part, left, price, done):
    policy = Policy(switch_steps=price, most=4, saving=0.2)
    smaller = cost * part
    if structure.pays(policy, cost=cost, smaller=smaller, left=left, done=done):
        assert done < 4 and smaller <= 0.8 * cost + 1e-9
        assert cost * left > smaller * left + price, "cheaper with the switch than without"
    elif done < 4 and part <= 0.79:
        assert (cost - smaller) * left <= price


@given(**COSTS, done=st.integers(0, 6), changing=st.integers(1, 1000))
def test_while_masks_change_a_later_switch_is_kept_and_counted(cost, part, left, done, changing):
    """It takes what is left over from the last change on, so this one saves nothing there."""
    policy = Policy(switch_steps=50.0, most=4, saving=0.2)
    costs = {"cost": cost, "smaller": cost * part}
    found = structure.pays(policy, **costs, left=left, done=done, changing=changing)
    fewer, until = policy._replace(most=3), min(left, changing)
    assert found == structure.pays(fewer, **costs, left=until, done=done)


def test_a_longer_run_never_makes_a_switch_worse():
    policy = Policy(switch_steps=100.0)
    answers = [
        structure.pays(policy, cost=1.0, smaller=0.7, left=left, done=0) for left in range(1000)
    ]
    assert answers == sorted(answers) and answers.index(True) == 334
