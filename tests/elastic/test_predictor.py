"""The predictor: its encoding, its rank correlations, and what it learns."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import elastic
from jaxprune.elastic import Decision, Fit

SPACE = (
    Decision("stage", "depth", (1, 2)),
    Decision("a", "width", (4, 6, 8), "stage", 0),
    Decision("b", "kernel", (3, 5, 7), "stage", 1),
    Decision("pixels", "resolution", (24, 28)),
)
PLAIN = tuple(Decision(name, "width", (1, 2, 3)) for name in "abcde")
SMALL = Fit(hidden=(32, 32), steps=400)
lists = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


def plain_choices(number, seed=0):
    """Different choices of `PLAIN`, and accuracies that are monotone in a sum of effects."""
    choices = elastic.draw_distinct(PLAIN, number, seed)
    effects = np.array([0.5, 1.0, 2.0, 4.0, 0.1])
    return choices, [0.5 + 0.02 * float(np.dot(own, effects)) for own in choices]


def test_skipped_blocks_are_zeros():
    rows = elastic.encode(SPACE, [(0, 2, 1, 0), (1, 2, 1, 1)])
    np.testing.assert_array_equal(
        rows, [[1, 0, 0, 0, 1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 1, 0, 1, 0, 0, 1]]
    )
    # Choices that differ only in skipped blocks are one network, so they have one code.
    np.testing.assert_array_equal(*elastic.encode(SPACE, [(0, 1, 0, 0), (0, 1, 2, 0)]))


@given(lists, st.data())
def test_rank_correlations_are_those_of_scipy(x, data):
    y = data.draw(st.lists(st.integers(-3, 3), min_size=len(x), max_size=len(x)))
    pairs = (elastic.spearman, scipy.stats.spearmanr), (elastic.kendall, scipy.stats.kendalltau)
    for own, reference in pairs:
        if len(set(x)) == 1 or len(set(y)) == 1:
            assert own(x, y) is None
        else:
            assert own(x, y) == pytest.approx(reference(x, y).statistic)


def test_it_ranks_unseen_choices():
    choices, accuracies = plain_choices(100)
    predictor = elastic.fit_predictor(PLAIN, choices, accuracies, settings=SMALL)
    assert len(predictor.unseen) == 20
    assert predictor.spearman > 0.9 and predictor.kendall > 0.75
    predicted, measured = np.array(predictor.unseen).T
    assert predictor.spearman == pytest.approx(scipy.stats.spearmanr(predicted, measured).statistic)
    assert predictor.error == pytest.approx(np.sqrt(np.mean((predicted - measured) ** 2)))
    assert predictor.error < np.std(accuracies) / 2
    # Judged on what it has not seen: neither the constants nor the fit know these accuracies.
    unseen = set(np.round(measured, 12))
    seen = [own for own in accuracies if round(own, 12) not in unseen]
    shuffled = dict(zip(choices, accuracies, strict=True))
    assert predictor.mean != pytest.approx(np.mean([*shuffled.values()]), abs=1e-9)
    assert len(seen) + len(unseen) >= 80


def test_it_is_a_function_of_its_seed():
    choices, accuracies = plain_choices(30)
    one, same, other = (
        elastic.fit_predictor(PLAIN, choices, accuracies, seed=seed, settings=SMALL)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one(choices), same(choices))
    assert one.unseen == same.unseen and one.unseen != other.unseen
    # The number of choices of a call does not matter.
    np.testing.assert_allclose(one(choices[:3]), one(choices)[:3], rtol=1e-5)
    assert one([]).shape == (0,)


def test_equal_accuracies_have_no_ranks():
    choices, _ = plain_choices(10)
    predictor = elastic.fit_predictor(PLAIN, choices, [0.5] * 10, settings=SMALL)
    assert predictor.spearman is None and predictor.kendall is None
    np.testing.assert_allclose(predictor(choices), 0.5, atol=0.2)


def test_errors():
    choices, accuracies = plain_choices(10)
    fit = lambda *args: elastic.fit_predictor(PLAIN, *args)  # noqa: E731
    with pytest.raises(ValueError, match="`accuracies` must have one number for each"):
        fit(choices, accuracies[:-1])
    with pytest.raises(ValueError, match="`choices` must hold at least 5 choices"):
        fit(choices[:4], accuracies[:4])
    with pytest.raises(ValueError, match="`choices` must differ"):
        fit([choices[0]] * 5, accuracies[:5])
    with pytest.raises(ValueError, match=r"(?s)`accuracies` must be finite.*nan.*inf"):
        fit(choices[:5], [*accuracies[:3], np.nan, np.inf])
    with pytest.raises(ValueError, match="`choice` must lie in the space"):
        fit([*choices[:4], (3, 0, 0, 0, 0)], accuracies[:5])
