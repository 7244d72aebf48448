"""Searches on problems with planted answers, and their parts against slower references."""

import itertools

import numpy as np
import pytest

from jaxprune import search, structure
from jaxprune.search._knapsack import best_widths
from jaxprune.search._plain import highest_scores, same_fraction
from tests.support.searching import planted, problem_of, synthetic

# Each must find the channels that are free; the agent needs more episodes, see below
FINDERS = {
    "ranking": search.ranking,
    "random": lambda *args: search.random(*args, evaluations=400, seed=0),
    "cross_entropy": lambda *args: search.cross_entropy(*args, evaluations=120, seed=0),
    "greedy": lambda *args: search.greedy(*args, evaluations=40),
    "knapsack": search.knapsack,
    "measured knapsack": lambda *args: search.knapsack(*args, evaluations=13),
}
ANSWERS = {"first": (8, 32, 16), "last": (32, 24, 8), "middle": (24, 8, 24)}


@pytest.mark.parametrize("alive", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("call", FINDERS.values(), ids=FINDERS)
def test_every_search_finds_the_free_channels(call, alive):
    own = planted(alive)
    problem = problem_of(own)
    found = call(problem, own.evaluate)
    assert found.kept == own.answer
    assert found.score == 0 and found.cost == problem.budget


@pytest.mark.parametrize("alive", ANSWERS.values(), ids=ANSWERS)
def test_the_uniform_control_does_not(alive):
    own = planted(alive)
    found = search.uniform(problem_of(own), own.evaluate)
    assert len(set(found.kept.values())) == 1 and found.score < 0


@pytest.mark.slow
@pytest.mark.parametrize("alive", ANSWERS.values(), ids=ANSWERS)
def test_the_agent_reaches_the_known_optimum(alive):
    own = planted(alive)
    found = search.amc(problem_of(own), own.evaluate, episodes=300, seed=0)
    assert found.kept == own.answer and found.score == 0


def test_ranking_is_keep_within():
    own = planted()
    generator = np.random.default_rng(0)
    scores = {name: generator.exponential(size=group.size) for name, group in own.groups.items()}
    for budget in (0.3, 0.5, 0.8):
        problem = problem_of(own, budget, scores=scores, floor=0.25, multiple=4)
        keep = structure.keep_within(
            own.groups,
            scores,
            problem.budget,
            structure.count_parameters,
            floor=0.25,
            multiple=4,
        )
        plan = own.groups.plan(keep, multiple=4)
        counts = highest_scores(problem)
        found = [int(plan.channels(own.groups[x.name]).sum()) for x in problem.decisions]
        assert list(counts) == found


def test_uniform_is_the_largest_fraction_that_fits():
    problem = synthetic([np.arange(1, 101)] * 3, sum, 150)
    assert same_fraction(problem) == (50, 50, 50)
    assert same_fraction(synthetic([np.arange(1, 101)] * 3, sum, 290)) == (96, 96, 96)
    problem = synthetic([np.arange(8, 65, 8)] * 2, sum, 100)
    assert same_fraction(problem) == (48, 48)
    assert same_fraction(synthetic([np.arange(1, 5)], sum, 9)) == (4,)


def test_the_knapsack_is_optimal_where_costs_add_up():
    generator = np.random.default_rng(0)
    for _ in range(10):
        widths = [np.arange(1, 6)] * 4
        rates = generator.integers(1, 5, 4)
        values = [np.cumsum(generator.exponential(size=5)) for _ in widths]

        def cost(counts, rates=rates):
            return float(np.dot(rates, counts))

        problem = synthetic(widths, cost, float(rates.sum() * 3))
        best = max(
            sum(own[k - 1] for own, k in zip(values, counts, strict=True))
            for counts in itertools.product(*widths)
            if cost(counts) <= problem.budget
        )
        found = best_widths(problem, values)
        assert cost(found) <= problem.budget
        assert sum(own[k - 1] for own, k in zip(values, found, strict=True)) == pytest.approx(best)


def test_the_knapsack_is_close_where_costs_multiply():
    generator = np.random.default_rng(1)
    for _ in range(10):
        widths = [np.arange(1, 7)] * 4
        values = [np.cumsum(np.sort(generator.exponential(size=6))[::-1]) for _ in widths]

        def cost(counts):
            return counts[0] + sum(a * b for a, b in itertools.pairwise(counts)) + counts[-1]

        problem = synthetic(widths, cost, 60)
        best = max(
            sum(own[k - 1] for own, k in zip(values, counts, strict=True))
            for counts in itertools.product(*widths)
            if cost(counts) <= problem.budget
        )
        found = best_widths(problem, values)
        assert cost(found) <= problem.budget
        assert sum(own[k - 1] for own, k in zip(values, found, strict=True)) >= 0.9 * best


def test_greedy_cuts_where_the_loss_per_saved_cost_is_least():
    # Decision 0 loses 1 per unit that costs 1; decision 1 loses 1.5 per unit that costs 2.
    problem = synthetic([np.arange(1, 9)] * 2, lambda k: k[0] + 2 * k[1], 18)
    seen = []

    def score(counts):
        seen.append(counts)
        return -1.0 * (8 - counts[0]) - 1.5 * (8 - counts[1])

    steps = _drive(search._greedy._steps(problem, 30), score)
    assert steps[0] == (8, 8) and len(steps) <= 30
    assert max((own for own in steps if problem.fits(own)), key=score) == (8, 5)


def test_greedy_without_evaluations_for_a_step_still_fits():
    problem = synthetic([np.arange(1, 9)] * 3, sum, 4)
    candidates = _drive(search._greedy._steps(problem, 5), lambda counts: float(sum(counts)))
    assert problem.fits(candidates[-1]) and len(candidates) <= 5


def _drive(proposals, score):
    """Runs a search by hand; returns all its candidates."""
    seen, scores = [], None
    try:
        while True:
            candidates = next(proposals) if scores is None else proposals.send(scores)
            seen.extend(candidates)
            scores = [score(own) for own in candidates]
    except StopIteration:
        return seen


def test_cross_entropy_scores_the_uniform_candidate_first_and_then_closes_in():
    own = planted()
    problem = problem_of(own)
    found = search.cross_entropy(problem, own.evaluate, evaluations=100, seed=3)
    assert found.history[0].counts == same_fraction(problem)
    means = [np.mean([x.score for x in found.history[i : i + 20]]) for i in (0, 80)]
    assert means[1] > means[0]
