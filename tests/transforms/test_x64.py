"""With `jax_enable_x64` every method keeps the laws, on float32 and on float64 leaves.

`make test-x64` runs more of the tests this way: the contract, selection, plans and patterns.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import at_init, patterns, structure
from tests.support.combinations import in_turn
from tests.transforms.test_contract import (
    INNER,
    STEPS,
    TRANSFORMS,
    inputs,
    make_params,
    make_step,
    run,
)

X64 = functools.partial(jax.enable_x64, True)


# Each row with one dtype in turn, and some with both.
CASES = in_turn(TRANSFORMS, [np.float32, np.float64])
CASES += [("default", np.float64), ("everything", np.float64), ("channels", np.float32)]


@pytest.mark.slow
@pytest.mark.parametrize(("transform", "dtype"), dict.fromkeys(CASES))
def test_the_masks_are_those_of_32_bits(transform, dtype):
    expected = run(transform, "momentum")
    with X64():
        tx = INNER["momentum"](TRANSFORMS[transform]())
        params = make_params(dtype)
        state = tx.init(params)
        before = jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
        chex.clear_trace_counter()
        step = jax.jit(chex.assert_max_traces(make_step(tx), n=1))
        for i in range(STEPS):
            params, state = step(params, state, inputs(i).astype(dtype))
            masks = jaxprune.get_masks(state)
            for name in "ab":
                weight, mask = (np.asarray(tree[name]["kernel"]) for tree in (params, masks))
                np.testing.assert_array_equal(weight[~mask], 0.0)
            if dtype == np.float32:
                chex.assert_trees_all_equal(masks, expected.masks[i])
        total = sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim)
        assert total == sum(int(m.sum()) for m in jax.tree.leaves(expected.masks[-1]) if m.ndim)
        after = jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
        assert before == after


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_call_without_training(dtype):
    expected = jaxprune.prune(make_params(), 0.7)[1]
    with X64():
        params = make_params(dtype)
        pruned, masks = jaxprune.prune(params, 0.7)
        chex.assert_trees_all_equal(masks, expected)
        assert pruned["a"]["kernel"].dtype == dtype
        again = jaxprune.prune(pruned, 0.8, masks=masks)[1]
        assert sum(int(m.sum()) for m in jax.tree.leaves(again) if m.ndim > 1) == 51
        two_of_four, columns = patterns.n_m(2, 4, axis=-2), patterns.channels(axis=-1)
        for pattern in (two_of_four, patterns.blocks((2, 2)), columns):
            half = jaxprune.prune(params, 0.5, pattern=pattern)[1]
            assert sum(int(m.sum()) for m in jax.tree.leaves(half) if m.ndim > 1) == 128
        rounds = jaxprune.prune_in_rounds(params, 0.5, lambda p: p, rounds=2)[1]
        assert sum(int(m.sum()) for m in jax.tree.leaves(rounds) if m.ndim > 1) == 128


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_channels(dtype):
    def net(w, x):
        return jax.nn.relu(x @ w["in"]) @ w["out"]

    with X64():
        rng = np.random.default_rng(0)
        params = {"in": jnp.asarray(rng.normal(size=(3, 8)), dtype)}
        params["out"] = jnp.asarray(rng.normal(size=(8, 2)), dtype)
        x = jnp.asarray(rng.normal(size=(4, 3)), dtype)
        groups = structure.find_groups(net, params, x)
        tx = jaxprune.chain(
            optax.sgd(0.1), jaxprune.agip_transform(0.5, every=1, stop=2, groups=groups)
        )
        state = tx.init(params)
        step = jax.jit(tx.update)
        for _ in range(4):
            gradients = jax.grad(lambda p: jnp.mean(net(p, x) ** 2))(params)
            updates, state = step(gradients, state, params)
            params = optax.apply_updates(params, updates)
        assert params["in"].dtype == dtype
        (kept,) = structure.masked_channels(groups, state).values()
        assert kept.sum() == 4


@pytest.mark.slow
def test_scores_before_training():
    with X64():
        params = make_params(np.float64)
        kernels = {name: params[name]["kernel"] for name in "ab"}

        def loss(p, batch):
            return jnp.mean((jnp.tanh(batch @ p["a"]) @ p["b"]) ** 2)

        scores = at_init.snip(loss, kernels, inputs(0).astype(np.float64))
        masks = jaxprune.prune(kernels, 0.5, score=scores)[1]
        assert sum(int(mask.sum()) for mask in masks.values()) == 128
