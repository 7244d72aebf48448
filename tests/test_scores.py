"""Each score against its formula; structure and dtype of what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import scores


def _trees(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"a": {"kernel": (2, 3)}, "b": (4,)}

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def tree():
        return jax.tree.map(draw, shapes, is_leaf=lambda shape: isinstance(shape, tuple))

    return tree(), tree()


FORMULAS = {
    "magnitude": (scores.magnitude, lambda w, s: np.abs(w)),
    "gradient": (scores.gradient, lambda w, s: np.abs(s)),
    "taylor": (scores.taylor, lambda w, s: np.abs(w) * np.abs(s)),
}


@pytest.mark.parametrize("name", FORMULAS)
@given(seed=st.integers(0, 99), dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]))
def test_scores_are_their_formulas_in_float32(name, seed, dtype):
    score, formula = FORMULAS[name]
    params, statistics = _trees(seed, dtype)
    result = score(params, statistics)
    assert jax.tree.structure(result) == jax.tree.structure(params)
    for got, w, s in zip(*map(jax.tree.leaves, (result, params, statistics)), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, formula(np.float32(w), np.float32(s)))


def test_scores_that_need_one_argument_ignore_the_other():
    params, statistics = _trees(0)
    assert jax.tree.structure(scores.magnitude(params)) == jax.tree.structure(params)
    assert jax.tree.structure(scores.gradient(None, statistics)) == jax.tree.structure(params)


def test_the_product_of_bfloat16_is_not_rounded_to_bfloat16():
    w = jnp.array([1.0 + 2.0**-7], jnp.bfloat16)
    assert scores.taylor([w], [w])[0].tolist() == [(1.0 + 2.0**-7) ** 2]


def test_random_depends_on_seed_and_position_only():
    params, other = _trees(0)
    one, same, unlike = scores.random(3)(params), scores.random(3)(other), scores.random(4)(params)
    for a, b, c in zip(*map(jax.tree.leaves, (one, same, unlike)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).all()
        assert ((a >= 0) & (a < 1)).all()
    jitted = jax.jit(scores.random(3))(params)
    for a, b in zip(*map(jax.tree.leaves, (one, jitted)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_is_uniform_and_has_few_ties():
    draws = scores.random(0)([jnp.zeros(4000), jnp.zeros(4000)])
    values = np.sort(np.concatenate(draws))
    assert np.abs(values - (np.arange(8000) + 0.5) / 8000).max() < 0.03
    assert len(np.unique(values)) > 7900
