"""The perplexity of language models, by NumPy and by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.training import perplexity

TABLE = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 7, (3, 9))


def apply(table, tokens):
    """A model that sees the last token only."""
    return table[tokens]


def losses():
    """Those of the tokens but the first, by NumPy."""
    logits = TABLE.astype(np.float64)[TOKENS[:, :-1]]
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log, TOKENS[:, 1:, None], -1)[..., 0]


def test_it_is_that_of_numpy_however_tokens_are_batched():
    expected = math.exp(losses().mean())
    for batches in ([TOKENS], [TOKENS[:1], TOKENS[1:]], iter([jnp.asarray(TOKENS)])):
        assert perplexity(apply, jnp.asarray(TABLE), batches) == pytest.approx(expected, rel=1e-6)


def test_masked_tokens_do_not_count():
    mask = np.arange(9)[None] < np.array([[9], [4], [1]])
    expected = math.exp(losses()[mask[:, 1:]].mean())
    found = perplexity(apply, jnp.asarray(TABLE), [(TOKENS, mask)])
    assert found == pytest.approx(expected, rel=1e-6)
    # What the model says of them does not matter, be it NaN.
    broken = np.where(np.roll(mask, -1, axis=1)[:, :, None], TABLE[TOKENS], np.nan)
    assert perplexity(lambda p, t: p, jnp.asarray(broken), [(TOKENS, mask)]) == found


def test_a_certain_model_has_1_and_a_wrong_one_infinity():
    tokens = np.array([[1, 2, 3, 1]])
    follows = jnp.zeros((7, 7)).at[np.array([1, 2, 3]), np.array([2, 3, 1])].set(1e4)
    assert perplexity(apply, follows, [tokens]) == 1
    assert perplexity(apply, -follows, [tokens]) == math.inf
    assert math.isnan(perplexity(apply, follows * jnp.nan, [tokens]))


def test_the_function_is_compiled_once_for_all_parameters():
    traces = []

    def counted(table, tokens):
        traces.append(1)
        return table[tokens]

    for scale in (1.0, 0.5):
        perplexity(counted, jnp.asarray(TABLE) * scale, [TOKENS, TOKENS])
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "must have tokens to predict, but has none"),
        ([TOKENS[:, :1]], "must have tokens to predict, but has none"),
        ([(TOKENS, np.zeros((3, 9), bool))], "must have tokens to predict, but has none"),
        ([TOKENS.astype(np.float32)], r"must hold integers \[B, T\], but has float32 \(3, 9\)"),
        ([TOKENS[0]], r"must hold integers \[B, T\], but has int\d+ \(9,\)"),
        ([(TOKENS, np.ones((3, 8), bool))], r"masks of the shape of the tokens, \(3, 9\), but one"),
    ],
)
def test_other_batches_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        perplexity(apply, jnp.asarray(TABLE), batches)


def test_one_array_and_other_logits_are_refused():
    with pytest.raises(TypeError, match=r"is one array; pass `\[tokens\]`"):
        perplexity(apply, jnp.asarray(TABLE), TOKENS)
    with pytest.raises(ValueError, match=r"for tokens \(3, 9\), but their shape is \(9, 3, 7\)"):
        perplexity(lambda p, t: jax.numpy.swapaxes(p[t], 0, 1), jnp.asarray(TABLE), [TOKENS])
