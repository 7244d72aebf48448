"""Greedy search in NetAdapt's shape: many small cuts, each where it costs the least score."""

from typing import Unpack

from jaxprune.search._found import Found
from jaxprune.search._options import Options, check_count
from jaxprune.search._problems import Counts, Problem
from jaxprune.search._runs import Evaluate, Proposals, run


def greedy(
    problem: Problem,
    evaluate: Evaluate,
    *,
    evaluations: int = 400,
    **options: Unpack[Options],
) -> Found:
    """Cuts the dense network step by step, each time the decision that loses least for its saving.

    With T steps, the cost falls to `dense - t (dense - budget) / T` in step t. A step tries each
    decision alone: it keeps the largest number of units with which the cost falls that far, or its
    floor if that is not enough. The one with the least lost score per saved cost is taken. T is as
    large as the evaluations allow: one for each decision and step, and one for the dense network.

    Args:
        problem: from `channels` or `weights`.
        evaluate: see `run`.
        evaluations: the largest number of candidates.
        **options: `journal`, `at_once` and `on_evaluation` of `run`.

    Returns:
        A `Found`. Candidates on the way cost more than the budget; the last ones fit.

    Raises:
        ValueError: as for `run`, or if there are fewer evaluations than one step takes.

    References:
        Yang et al., NetAdapt: platform-aware neural network adaptation for mobile applications,
        arXiv:1804.03230. It fine-tunes briefly after each step; here nothing is trained.

    Example:
        >>> greedy(problem, evaluate, evaluations=9).kept
        {'first:1': 8, 'second:1': 16}
    """
    count = len(problem.decisions)
    why = " here, one for each decision and two"
    check_count("evaluations", evaluations, count + 2, why)
    settings = {"evaluations": evaluations}
    search = _steps(problem, evaluations)
    return run(problem, evaluate, search, name="greedy", settings=settings, **options)


def _steps(problem: Problem, evaluations: int) -> Proposals:
    counts = problem.sizes
    (score,) = yield [counts]
    left = evaluations - 1
    while not problem.fits(counts):
        cost = problem.cost(counts)
        steps = max(1, (left - 1) // len(counts))
        target = max(problem.budget, cost - (cost - problem.budget) / steps)
        if left <= len(counts):  # no evaluations for another step: cut without looking
            counts = _smallest(problem, counts)
            yield [counts]
            return
        cuts = [
            own for own in (_cut(problem, counts, i, target) for i in range(len(counts))) if own
        ]
        scores = yield cuts
        left -= len(cuts)
        losses = [
            (score - own) / (cost - problem.cost(cut))
            for own, cut in zip(scores, cuts, strict=True)
        ]
        best = losses.index(min(losses))
        counts, score = cuts[best], scores[best]


def _cut(problem: Problem, counts: Counts, index: int, target: float) -> Counts | None:
    """Returns the least cut of one decision that reaches the target, or all of it; None if none."""
    smaller = [int(own) for own in problem.decisions[index].widths if own < counts[index]]
    low, high = 0, len(smaller) - 1
    if not smaller:
        return None

    def at(place: int) -> Counts:
        return (*counts[:index], smaller[place], *counts[index + 1 :])

    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if problem.cost(at(middle)) <= target else (low, middle - 1)
    return at(low) if problem.cost(at(low)) < problem.cost(counts) else None


def _smallest(problem: Problem, counts: Counts) -> Counts:
    """Cuts decisions one after the other, the most expensive first, until the budget is kept."""
    while not problem.fits(counts):
        cuts = [_cut(problem, counts, i, problem.budget) for i in range(len(counts))]
        counts = min((own for own in cuts if own), key=problem.cost)
    return counts
