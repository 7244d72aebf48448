"""Averaged parameters: exact in every dtype, zero where pruned, and refused where ambiguous."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import training


def train(params, optimizer, steps):
    """Returns the parameters after each step of a constant gradient, and the last state."""
    state, seen = optimizer.init(params), []

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        seen.append(params)
    return seen, state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_slow_average_moves_in_every_dtype(dtype):
    """1 + 0.001 is 1 in bfloat16, so an average in that type would never leave its start."""
    params = {"kernel": jnp.full((2, 3), 1.0, dtype)}
    optimizer = optax.chain(optax.sgd(0.5), training.average_parameters(0.999))
    seen, state = train(params, optimizer, 20)
    expected = np.ones((2, 3))
    for own in seen:
        expected = 0.999 * expected + 0.001 * np.asarray(own["kernel"], np.float64)
    np.testing.assert_allclose(state[1].parameter_average["kernel"], expected, rtol=1e-5)
    found = training.with_averages(seen[-1], state)
    assert found["kernel"].dtype == dtype and (found["kernel"] < 1).all()


def test_float64_leaves_keep_their_precision():
    with jax.enable_x64(True):
        params = {"kernel": jnp.full(3, 1.0, "float64")}
        optimizer = optax.chain(optax.sgd(1e-12), training.average_parameters(0.5))
        seen, state = train(params, optimizer, 1)
        found = training.with_averages(seen[-1], state)["kernel"]
        np.testing.assert_allclose(1 - np.asarray(found), 0.5e-12, rtol=1e-3)


def test_pruned_weights_are_zero_in_stacked_layers_and_names_out_of_order():
    params = {
        "z": {"kernel": jax.random.normal(jax.random.key(0), (3, 4, 4))},
        "a": {"kernel": jax.random.normal(jax.random.key(1), (4, 4)), "bias": jnp.ones(4)},
    }
    pruning = jaxprune.magnitude_transform(
        0.5, every=1, start=2, stop=2, stacked=lambda path, leaf: 0 if leaf.ndim == 3 else None
    )
    optimizer = optax.chain(
        jaxprune.chain(optax.sgd(0.01), pruning), training.average_parameters(0.9)
    )
    seen, state = train(params, optimizer, 4)
    masks, found = jaxprune.get_masks(state), training.with_averages(seen[-1], state)
    for path in ("z", "a"):
        kept = np.asarray(masks[path]["kernel"])
        assert not kept.all() and (np.asarray(found[path]["kernel"])[~kept] == 0).all()
        assert (np.asarray(found[path]["kernel"])[kept] != 0).all()
    assert (found["a"]["bias"] != seen[-1]["a"]["bias"]).all(), "an average, not the last values"


def test_what_is_missing_or_ambiguous_is_named():
    params = {"kernel": jnp.ones(2)}
    average = training.average_parameters(0.9)
    with pytest.raises(ValueError, match="`params` is missing"):
        average.update(params, average.init(params))
    twice = optax.chain(average, training.average_parameters(0.5)).init(params)
    with pytest.raises(ValueError, match="must hold one average of parameters, but has 2"):
        training.with_averages(params, twice)
    with pytest.raises(ValueError, match="the average in `opt_state`"):
        training.with_averages({"other": jnp.ones(2)}, average.init(params))
    with pytest.raises(ValueError, match=r"`decay` must lie in \[0, 1\)"):
        training.average_parameters(1.0)
