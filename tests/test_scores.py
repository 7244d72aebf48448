"""Each score against its formula; structure and dtype of what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import scores
from tests.support import reference


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


@pytest.mark.slow
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


@pytest.mark.parametrize("shape", [(2, 2**16, 2**16), (2**33,), (1, 2**32)])
def test_random_scores_have_no_largest_size(shape):
    (draw,) = jax.eval_shape(scores.random(0), [jax.ShapeDtypeStruct(shape, jnp.float32)])
    assert (draw.shape, draw.dtype) == (shape, jnp.float32)


def test_positions_beyond_32_bits_do_not_repeat(monkeypatch):
    """With an index of 8 bits in place of 32, the second 256 entries are not those of the first."""
    leaf = [jnp.zeros((2, 16, 16))]
    monkeypatch.setattr(scores, "_WORD", np.dtype(np.uint8))
    draw = np.asarray(scores.random(0)(leaf)[0])
    assert len(np.unique(draw)) > 500


# ---- random scores


@pytest.mark.slow
def test_draw_hashes_the_row_major_position_under_a_word_for_each_leaf():
    key, shapes = jax.random.key(3), [(4, 3, 5), (7,), ()]
    words = jax.random.bits(key, (3,), jnp.uint32)
    draws = scores.draw(key, [jnp.zeros(shape, jnp.bfloat16) for shape in shapes])
    for drawn, word, shape in zip(draws, words, shapes, strict=True):
        assert drawn.dtype == jnp.float32
        wanted = reference.hashed(word, int(np.prod(shape))).reshape(shape)
        np.testing.assert_array_equal(drawn, wanted)


def test_draws_are_uniform_and_unrelated():
    """Bins by chi-square; rows, columns, leaves and keys by correlation; all fixed seeds."""
    leaves = [jnp.zeros((256, 256)), jnp.zeros((256, 256))]
    a, b = (np.asarray(x, np.float64) for x in scores.draw(jax.random.key(0), leaves))
    c = np.asarray(scores.draw(jax.random.key(1), leaves)[0], np.float64)
    counts = np.histogram(a, 64, (0, 1))[0]
    assert ((counts - 1024) ** 2 / 1024).sum() < 104  # 63 degrees of freedom, p = .001
    pairs = [(a, b), (a, c), (a[:, :-1], a[:, 1:]), (a[:-1], a[1:]), (a[:-2], a[2:])]
    for x, y in pairs:
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 4 / 256
    lags = [np.corrcoef(a.ravel()[:4096], np.roll(b.ravel(), k)[:4096])[0, 1] for k in range(512)]
    assert max(np.abs(lags)) < 5 / 64
