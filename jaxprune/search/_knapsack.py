"""Knapsack: the widths with the highest total value that fit, by dynamic programming."""

from typing import Unpack

import numpy as np

from jaxprune.search._found import Found
from jaxprune.search._options import Options, check_count
from jaxprune.search._plain import same_fraction
from jaxprune.search._problems import Counts, Problem
from jaxprune.search._runs import Evaluate, Proposals, run

_BINS = 2000  # of the budget, in the dynamic program
_ROUNDS = 8  # in which the costs are made linear around the last solution


def knapsack(
    problem: Problem,
    evaluate: Evaluate,
    *,
    evaluations: int = 1,
    **options: Unpack[Options],
) -> Found:
    """Chooses widths with the highest total value within the budget, by dynamic programming.

    The value of a width is the sum of the scores of the units that it keeps, as in HALP. With more
    than one evaluation, values are measured instead: the score of the network in which only this
    decision is cut, at evenly spaced widths, with straight lines between them.

    The cost of a width depends on the other decisions, because a layer reads one and produces the
    other. So the program is solved for the costs around a solution, which starts uniform, and again
    around the new one, some rounds long; the best solution that fits is taken.

    Args:
        problem: from `channels` or `weights`.
        evaluate: see `run`.
        evaluations: 1 to use scores; or the largest number of candidates, to measure values.
        **options: `journal`, `at_once` and `on_evaluation` of `run`.

    Returns:
        A `Found`.

    Raises:
        ValueError: as for `run`, or if there are some evaluations but fewer than three for each
            decision.

    References:
        Shen et al., HALP: hardware-aware latency pruning, arXiv:2110.10811.

    Example:
        >>> knapsack(problem, evaluate).cost <= problem.budget
        True
        >>> knapsack(problem, evaluate, evaluations=7).kept
        {'first:1': 8, 'second:1': 16}
    """
    check_count("evaluations", evaluations)
    if evaluations > 1:
        why = " here, or exactly 1: three for each decision and one for the result"
        check_count("evaluations", evaluations, 1 + 3 * len(problem.decisions), why)
    settings = {"evaluations": evaluations}
    search = _knapsack(problem, evaluations)
    return run(problem, evaluate, search, name="knapsack", settings=settings, **options)


def _knapsack(problem: Problem, evaluations: int) -> Proposals:
    if evaluations == 1:
        values = [np.cumsum(own.scores)[own.widths - 1] for own in problem.decisions]
        yield [best_widths(problem, values)]
        return
    points = (evaluations - 1) // len(problem.decisions)
    places = [
        np.unique(np.linspace(0, len(own.widths) - 1, points).round().astype(int))
        for own in problem.decisions
    ]
    sizes = problem.sizes
    candidates = [
        (*sizes[:i], int(problem.decisions[i].widths[place]), *sizes[i + 1 :])
        for i, own in enumerate(places)
        for place in own
    ]
    scores = yield candidates
    found = iter(scores)
    values = []
    for own, at in zip(problem.decisions, places, strict=True):
        measured = [next(found) for _ in at]
        # Of two widths with one score the wider one is not worth less.
        values.append(np.interp(own.widths, own.widths[at], np.maximum.accumulate(measured)))
    yield [best_widths(problem, values)]


def best_widths(problem: Problem, values: list[np.ndarray]) -> Counts:
    """Returns the candidate with the highest total value that fits the budget.

    Args:
        problem: from `channels` or `weights`.
        values: for each decision, float [choices]: the value of each of its widths.

    Returns:
        The candidate.
    """

    def value_of(counts: Counts) -> float:
        places = [
            np.searchsorted(own.widths, count)
            for own, count in zip(problem.decisions, counts, strict=True)
        ]
        return float(sum(own[place] for own, place in zip(values, places, strict=True)))

    around = same_fraction(problem)
    best, seen = around, {around}
    for _ in range(_ROUNDS):
        around = _solve(problem, values, around)
        if value_of(around) > value_of(best):
            best = around
        if around in seen:
            break
        seen.add(around)
    return best


def _solve(problem: Problem, values: list[np.ndarray], around: Counts) -> Counts:
    """Solves the knapsack for costs that are linear around a candidate."""
    base = problem.cost(around)
    extra = [  # what a width costs more than the one of `around`; negative for smaller ones
        np.array([problem.cost((*around[:i], int(k), *around[i + 1 :])) - base for k in own.widths])
        for i, own in enumerate(problem.decisions)
    ]
    least = base + sum(own.min() for own in extra)
    limit = max(problem.budget - least, problem.dense * 1e-9)
    # Above the budget, too: where all are cut together, the linear costs are too high.
    weights = [np.ceil((own - own.min()) / limit * _BINS).astype(int) for own in extra]
    bins = min(2 * _BINS, sum(int(own.max()) for own in weights))
    best = np.zeros(bins + 1)
    choice: list[np.ndarray] = []
    for value, weight in zip(values, weights, strict=True):
        options = np.full((len(value), bins + 1), -np.inf)
        for row, own, cost in zip(options, value, weight, strict=True):
            if cost <= bins:
                row[cost:] = own + best[: bins + 1 - cost]
        choice.append(options.argmax(0))
        best = options.max(0)

    def solution(limit: int) -> Counts:
        counts = []
        for own, weight, chosen in zip(
            reversed(problem.decisions), reversed(weights), reversed(choice), strict=True
        ):
            place = int(chosen[limit])
            counts.append(int(own.widths[place]))
            limit -= int(weight[place])
        return tuple(reversed(counts))

    for limit in range(bins, -1, -max(1, bins // 200)):
        found = solution(limit)
        if problem.fits(found):
            return found
    return problem.floors
