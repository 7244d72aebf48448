"""The cross-entropy method: draws candidates around the best ones so far."""

from typing import Unpack

import numpy as np

from jaxprune.search._found import Found
from jaxprune.search._options import Options, check_count
from jaxprune.search._plain import same_fraction
from jaxprune.search._problems import Counts, Problem
from jaxprune.search._runs import Evaluate, Proposals, run
from jaxprune.search._wall import within

_SMOOTHING = 0.7  # weight of the new mean and deviation
_LEAST = 0.03  # deviation where widths are close together


def cross_entropy(
    problem: Problem,
    evaluate: Evaluate,
    *,
    evaluations: int = 400,
    seed: int = 0,
    population: int = 20,
    elite: float = 0.2,
    deviation: float = 0.5,
    **options: Unpack[Options],
) -> Found:
    """Draws fractions from normal distributions that follow the best candidates.

    Each round draws a population of fractions, one normal distribution for each decision, under the
    wall; mean and deviation then move to those of the best candidates of the round (the elite):
    new = 0.7 of the elite's + 0.3 of the old. The first mean is the uniform candidate, which is
    scored first.

    Args:
        problem: from `channels` or `weights`.
        evaluate: see `run`.
        evaluations: number of candidates, over all rounds.
        seed: of the draws.
        population: candidates of a round.
        elite: fraction of the population whose fractions the next round follows, in (0, 1].
        deviation: of the first round.
        **options: `journal`, `at_once` and `on_evaluation` of `run`.

    Returns:
        A `Found`.

    Raises:
        ValueError: as for `run`, or if a number is out of range.

    References:
        Rubinstein, Kroese. The cross-entropy method. Springer, 2004.

    Example:
        >>> found = cross_entropy(problem, evaluate, evaluations=20, population=5, seed=0)
        >>> len(found.history), found.kept
        (20, {'first:1': 8, 'second:1': 16})
    """
    check_count("evaluations", evaluations)
    check_count("population", population, 2)
    if not 0 < elite <= 1 or not deviation > 0:
        raise ValueError(
            f"`elite` must be in (0, 1] and `deviation` above 0, but are {elite} and {deviation}."
        )
    settings = {"evaluations": evaluations, "seed": seed, "population": population}
    settings |= {"elite": elite, "deviation": deviation}
    best = max(1, round(elite * population))
    search = _rounds(problem, evaluations, seed, population, best, deviation)
    return run(problem, evaluate, search, name="cross_entropy", settings=settings, **options)


def _rounds(
    problem: Problem, evaluations: int, seed: int, population: int, best: int, deviation: float
) -> Proposals:
    generator = np.random.default_rng(seed)

    def fractions(counts: Counts) -> np.ndarray:
        return np.divide(counts, problem.sizes)

    start = same_fraction(problem)
    mean, spread = fractions(start), np.full(len(start), deviation)
    # The last rounds still try the next widths, which are `step` away.
    step = np.array([np.diff(own.widths).max(initial=0) / own.size for own in problem.decisions])
    least = np.maximum(step / 2, _LEAST)
    left = evaluations
    first = [start]
    while left:
        count = min(population, left) - len(first)
        draws = np.clip(generator.normal(mean, spread, (count, len(mean))), 0, 1)
        candidates = [*first, *(within(problem, own) for own in draws)]
        scores = yield candidates
        left, first = left - len(candidates), []
        # What the wall left of the draws, not the draws themselves.
        order = np.argsort(-np.array(scores), kind="stable")[:best]
        chosen = np.array([fractions(candidates[index]) for index in order])
        mean = _SMOOTHING * chosen.mean(0) + (1 - _SMOOTHING) * mean
        spread = _SMOOTHING * chosen.std(0) + (1 - _SMOOTHING) * spread
        spread = np.maximum(spread, least)
