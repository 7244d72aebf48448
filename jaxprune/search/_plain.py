"""Searches without a model of what is good: uniform, random, and one ranking of all scores."""

from typing import Any, Unpack

import numpy as np

from jaxprune.search._found import Found
from jaxprune.search._options import Options, check_count
from jaxprune.search._problems import Counts, Problem
from jaxprune.search._runs import Evaluate, Proposals, run
from jaxprune.search._wall import within

_HALVINGS = 40


def uniform(problem: Problem, evaluate: Evaluate, **options: Unpack[Options]) -> Found:
    """Keeps the same fraction everywhere, the largest that fits: one evaluation.

    Args:
        problem: from `channels` or `weights`.
        evaluate: see `run`.
        **options: `journal`, `at_once` and `on_evaluation` of `run`.

    Returns:
        A `Found`.

    Raises:
        ValueError: as for `run`.

    Example:
        >>> uniform(problem, evaluate).kept
        {'first:1': 8, 'second:1': 8}
    """
    return run(problem, evaluate, _once(same_fraction(problem)), name="uniform", **options)


def random(
    problem: Problem,
    evaluate: Evaluate,
    *,
    evaluations: int = 400,
    seed: int = 0,
    **options: Unpack[Options],
) -> Found:
    """Draws every fraction uniformly from [0, 1] under the wall, as AMC's agent does at first.

    Args:
        problem: from `channels` or `weights`.
        evaluate: see `run`.
        evaluations: number of candidates.
        seed: of the draws.
        **options: `journal`, `at_once` and `on_evaluation` of `run`.

    Returns:
        A `Found`.

    Raises:
        ValueError: as for `run`, or if `evaluations` is no integer above 0.

    Example:
        >>> found = random(problem, evaluate, evaluations=8, seed=0)
        >>> len(found.history), found.cost <= found.budget
        (8, True)
    """
    check_count("evaluations", evaluations)
    settings = {"evaluations": evaluations, "seed": seed}
    search = _random(problem, evaluations, seed)
    return run(problem, evaluate, search, name="random", settings=settings, **options)


def ranking(problem: Problem, evaluate: Evaluate, **options: Unpack[Options]) -> Found:
    """Keeps the highest scores of one ranking of all units: one evaluation.

    For channels and scores of `structure.normalized` this is `structure.keep_within`; for weights
    it is global magnitude pruning.

    Args:
        problem: from `channels` or `weights`.
        evaluate: see `run`.
        **options: `journal`, `at_once` and `on_evaluation` of `run`.

    Returns:
        A `Found`.

    Raises:
        ValueError: as for `run`.

    Example:
        >>> ranking(problem, evaluate).cost <= problem.budget
        True
    """
    return run(problem, evaluate, _once(highest_scores(problem)), name="ranking", **options)


def same_fraction(problem: Problem) -> Counts:
    """Returns the candidate of one fraction for all decisions, the largest that fits."""

    def at(fraction: float) -> Counts:
        return tuple(own.at_least(fraction) for own in problem.decisions)

    low, high = 0.0, 1.0
    if problem.fits(at(high)):
        return at(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.fits(at(middle)) else (low, middle)
    return at(low)


def highest_scores(problem: Problem) -> Counts:
    """Returns the candidate that keeps the top of one ranking, as long as it fits."""
    spare = [own.scores[own.floor :] for own in problem.decisions]  # beyond the floors
    owner = np.concatenate([np.full(len(own), i) for i, own in enumerate(spare)])
    order = np.argsort(-np.concatenate(spare), kind="stable")

    def first(number: int) -> Counts:
        more = np.bincount(owner[order[:number]], minlength=len(spare))
        wanted = np.add(problem.floors, more)
        return tuple(
            int(own.widths[np.searchsorted(own.widths, count)])
            for own, count in zip(problem.decisions, wanted, strict=True)
        )

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if problem.fits(first(middle)) else (low, middle - 1)
    return first(low)


def _once(counts: Counts) -> Proposals:
    yield [counts]


def _random(problem: Problem, evaluations: int, seed: int) -> Proposals:
    generator = np.random.default_rng(seed)
    draws: Any = generator.uniform(size=(evaluations, len(problem.decisions)))
    yield [within(problem, fractions) for fractions in draws]
