"""Exact integers: the rounding rule, totals that add up, floors that can be met."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import keep_count

from jaxprune import budgets

SIZES = st.integers(1, 10**8)
SPARSITIES = st.floats(0, 1, exclude_max=True)
SHAPES = st.lists(st.lists(st.integers(1, 12), max_size=4).map(tuple), min_size=1, max_size=6)


# ---- keep_count


@pytest.mark.parametrize("size", [1, 7, 99, 1000, 272_474, 11_689_512, 25_502_912, 2**31 - 1])
def test_keep_count_is_exact_for_decimals(size):
    # 25,502,912 prunable weights are those of ResNet-50.
    for digits in (2, 3):
        for i in range(10**digits):
            sparsity = i / 10**digits
            assert budgets.keep_count(size, sparsity) == keep_count(size, sparsity), sparsity


def test_halves_prune_one_more():
    assert [budgets.keep_count(size, 0.5) for size in (1, 3, 5, 7)] == [0, 1, 2, 3]
    assert [budgets.keep_count(2, s) for s in (0.25, 0.75)] == [1, 0]
    assert budgets.keep_count(50, 0.29) == 35  # 50 * 0.29 is below 14.5 in floating point


@given(size=SIZES, sparsity=SPARSITIES)
def test_keep_count_is_the_nearest_integer(size, sparsity):
    kept = budgets.keep_count(size, sparsity)
    assert type(kept) is int
    assert 0 <= kept <= size
    assert abs(size - kept - size * sparsity) <= 0.5 + 1e-6


@given(size=SIZES, low=SPARSITIES, high=SPARSITIES)
def test_keep_count_falls_with_sparsity(size, low, high):
    low, high = sorted((low, high))
    assert budgets.keep_count(size, low) >= budgets.keep_count(size, high)
    assert budgets.keep_count(size, 0.0) == size


# ---- uniform


@given(shapes=SHAPES, sparsity=SPARSITIES)
def test_uniform_gives_every_leaf_its_own_count(shapes, sparsity):
    budget = budgets.uniform(shapes, sparsity)
    assert budget.floors == tuple(budgets.keep_count(math.prod(s), sparsity) for s in shapes)
    assert budget.total == sum(budget.floors)


# ---- global_budget


@given(shapes=SHAPES, sparsity=st.floats(0, 0.99), floor=st.floats(0, 1))
def test_global_floors_can_be_met(shapes, sparsity, floor):
    sizes = [math.prod(shape) for shape in shapes]
    total = budgets.keep_count(sum(sizes), sparsity)
    shares = [Fraction(floor) * total * n / sum(sizes) for n in sizes]
    try:
        budget = budgets.global_budget(floor)(shapes, sparsity)
    except ValueError as error:
        assert "`sparsity`" in str(error)
        assert sum(max(1, math.floor(share)) for share in shares) > total
        return
    assert budget.total == total
    assert sum(budget.floors) <= total
    for least, size, share in zip(budget.floors, sizes, shares, strict=True):
        assert 1 <= least <= size
        assert least == 1 or abs(least - math.floor(share)) <= (share.denominator > 1)


def test_floor_one_can_always_be_met_by_leaves_that_keep_something() -> None:
    rule = budgets.global_budget(1.0)
    assert rule([(3,)] * 10, 0.1) == budgets.Budget(27, (2,) * 10)


@given(hundreds=st.lists(st.integers(1, 50), min_size=1, max_size=5), percent=st.integers(0, 99))
def test_floor_one_is_uniform_where_nothing_is_rounded(hundreds, percent):
    shapes = [(n, 100) for n in hundreds]
    rule = budgets.global_budget(1.0)
    assert rule(shapes, percent / 100) == budgets.uniform(shapes, percent / 100)


def test_floor_zero_leaves_one_weight_in_each_leaf():
    assert budgets.global_budget(0.0)([(10, 10), (20,)], 0.9) == budgets.Budget(12, (1, 1))


def test_default_floor_is_a_tenth_of_the_uniform_budget():
    assert budgets.global_budget()([(10, 100), (50, 10)], 0.5) == budgets.Budget(750, (50, 25))


# ---- errors


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan")])
def test_floor_must_be_a_share(floor):
    with pytest.raises(ValueError, match=r"`floor` must lie in \[0, 1\], but is"):
        budgets.global_budget(floor)


def test_a_budget_that_cannot_be_met_says_what_to_do():
    with pytest.raises(ValueError) as error:
        budgets.global_budget(0.0)([(3,), (4,), (4,)], 0.9)
    assert str(error.value) == (
        "`sparsity` 0.9 keeps 1 of 11 weights, fewer than the 3 that the floors of 3 leaves "
        "need (the smallest leaf has 3 weights). Lower `sparsity` or `floor`, or exclude small "
        "leaves with `prunable`."
    )
