"""Averages against a loop, what is not finite, and which optimizers have a first moment."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import stats
from tests.support.reference import gradient_average

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


def _average(gradients, decay, dtype=jnp.float32):
    average = [jnp.zeros(gradients[0].shape, dtype)]
    for gradient in gradients:
        average = stats.update_average(average, [jnp.asarray(gradient)], decay)
    return average


# ---- update_average and unbiasing


@given(seed=st.integers(0, 99), steps=st.integers(1, 12), decay=st.sampled_from([0, 0.5, 0.99]))
def test_average_is_that_of_the_loop(seed, steps, decay):
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(steps, 2, 3)).astype(np.float32)
    gradients[rng.random(gradients.shape) < 0.2] = rng.choice([np.nan, np.inf, -np.inf])
    average = _average(gradients, decay)
    np.testing.assert_allclose(average[0], gradient_average(gradients, decay), rtol=2e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_leaves_its_own_entry_alone(bad):
    old = [jnp.array([0.125, 3.0]), jnp.array(7.0)]
    new = stats.update_average(old, [jnp.array([bad, 1.0]), jnp.array(bad)], 0.5)
    assert new[0].tolist() == [0.125, 2.0]
    assert new[1].tolist() == 7.0


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_bias_correction_recovers_a_constant_gradient(decay, steps):
    gradient = np.array([[-3.0, 0.0, 1e-6]], np.float32)
    average = _average([gradient] * steps, decay)
    unbiased = average[0] * stats.unbiasing(decay, jnp.int32(steps))
    # 1 - decay ** t loses digits of float32 while it is small.
    np.testing.assert_allclose(unbiased, np.abs(gradient), rtol=2e-4)


def test_bias_correction_is_the_formula():
    factor = stats.unbiasing(0.75, jnp.int32(3))
    np.testing.assert_allclose(factor, 1 / (1 - 0.75**3), rtol=1e-6)
    assert factor.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_average_keeps_its_dtype_and_is_computed_in_float32(dtype):
    average = [jnp.linspace(0.1, 3.0, 5000).astype(dtype)]
    gradient = jnp.linspace(-1.7, 0.9, 5000).astype(jnp.bfloat16)
    new = stats.update_average(average, [gradient], 0.9)
    old, size = average[0].astype(jnp.float32), jnp.abs(gradient.astype(jnp.float32))
    assert new[0].dtype == dtype
    assert (new[0] == (old + (1 - 0.9) * (size - old)).astype(dtype)).all()


def test_average_is_the_same_under_jit_and_vmap():
    rng = np.random.default_rng(0)
    average, gradient = rng.random((4, 3), np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    gradient[1, 1] = np.nan

    def step(average, gradient):
        return stats.update_average([average], [gradient], 0.9)[0]

    eager = step(jnp.asarray(average), jnp.asarray(gradient))
    np.testing.assert_allclose(jax.jit(step)(average, gradient), eager, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(step)(average, gradient), eager, rtol=1e-6)


# ---- first_moment


def _only_w(name):
    return {"w": name == "w", "b": name == "b"}


WITH_MOMENTUM = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "lion": optax.lion(0.1),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "masked": optax.masked(optax.sgd(0.1, momentum=0.9), _only_w("w")),
    "if finite": optax.apply_if_finite(optax.adam(0.1), 3),
}
WITHOUT = {
    "sgd": (optax.sgd(0.1), "w: no momentum"),
    "rmsprop": (optax.rmsprop(0.1), "w: no momentum"),
    "adafactor": (optax.adafactor(0.1), "w: no momentum"),
    "two": (
        optax.chain(optax.scale_by_adam(), optax.trace(0.9)),
        r"w: momenta in \[1\].*trace and \[0\].*mu",
    ),
    "empty": (optax.identity(), "w: no momentum"),
    "masked": (optax.masked(optax.sgd(0.1, momentum=0.9), _only_w("b")), "w: no momentum"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_first_moment_is_the_momentum(name):
    optimizer = WITH_MOMENTUM[name]
    state = optimizer.init(PARAMS)
    gradients = {"w": jnp.full((2, 3), 0.5), "b": jnp.full(3, -0.25)}
    _, state = optimizer.update(gradients, state, PARAMS)
    leaves = {path: PARAMS[path] for path in (["w"] if name == "masked" else ["w", "b"])}
    moments = dict(zip(leaves, stats.first_moment(state, leaves), strict=True))
    # Up to a factor of the optimizer, and of clipping, after one step it is the gradient.
    ratio = jax.tree.map(lambda m, g: m / g, moments["w"], gradients["w"])
    assert moments["w"].shape == (2, 3)
    np.testing.assert_allclose(ratio, jnp.full_like(ratio, ratio[0, 0]))
    assert ratio[0, 0] > 0
    if name != "masked":
        np.testing.assert_allclose(moments["b"] / gradients["b"], ratio[0], rtol=1e-6)


@pytest.mark.parametrize("name", WITHOUT)
def test_first_moment_lists_leaves_with_no_momentum_or_two(name):
    optimizer, line = WITHOUT[name]
    with pytest.raises(ValueError, match=f"(?s)`decay=None`.*exactly one.*\n  {line}$"):
        stats.first_moment(optimizer.init(PARAMS), {"w": PARAMS["w"]})


# ---- all_finite


def test_float64_beyond_float32_is_finite():
    with jax.enable_x64(True):
        assert bool(stats.all_finite([jnp.array([1e300, -2.0]), jnp.ones(2, jnp.float32)]))
        assert not bool(stats.all_finite([jnp.array([1e300, -jnp.inf])]))
        assert not bool(stats.all_finite([jnp.array([1e300, jnp.nan])]))


def test_all_finite():
    assert bool(stats.all_finite({}))
    assert bool(stats.all_finite([jnp.zeros(3), jnp.array(3e38), jnp.zeros((0, 2))]))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not bool(stats.all_finite([jnp.zeros(3), jnp.zeros((2, 2)).at[1, 0].set(bad)]))
        assert not bool(stats.all_finite([jnp.array([bad], jnp.bfloat16), jnp.zeros(3)]))
