"""The wall: no decision may take so much that the floors of the rest no longer fit the budget."""

from collections.abc import Sequence

from jaxprune.search._problems import Counts, Problem


def widest(problem: Problem, counts: Counts, index: int, fraction: float) -> int:
    """Returns how many units a decision may keep when it wants a fraction of them.

    Formula: the largest allowed k with k <= up(fraction) and
    cost(earlier decisions, k, floors of the later ones) <= budget, where `up` rounds up to an
    allowed number. In AMC's words: a <- min(a, (B - other) / this), then a <- max(a, floor).

    Args:
        problem: from `channels` or `weights`.
        counts: what the earlier decisions keep, and anything for the rest.
        index: of the decision.
        fraction: what it wants, in [0, 1].

    Returns:
        The number of units. As the floors fit at the start and each step preserves that, a
        candidate that is built in this way never costs more than the budget.

    Example:
        >>> from jaxprune.search._problems import Decision
        >>> import numpy as np
        >>> own = Decision("a", 4, np.arange(1, 5), np.arange(4), np.ones(4), ())
        >>> parts = (own, own), 5, 8, sum, sum, None, None, None
        >>> widest(Problem(*parts), (1, 1), 0, 1.0), widest(Problem(*parts), (2, 1), 1, 1.0)
        (4, 3)
    """
    decision = problem.decisions[index]
    before, after = counts[:index], problem.floors[index + 1 :]

    def fits(place: int) -> bool:
        return problem.fits((*before, int(decision.widths[place]), *after))

    high = int(decision.widths.searchsorted(decision.at_least(fraction)))
    if fits(high):
        return int(decision.widths[high])
    low = 0  # it fits, as it did in the step before
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return int(decision.widths[low])


def within(problem: Problem, fractions: Sequence[float]) -> Counts:
    """Returns the candidate of fractions that the wall clips, one decision after the other.

    Args:
        problem: from `channels` or `weights`.
        fractions: the fraction of its units that each decision wants to keep, in [0, 1].

    Returns:
        The number of units of each decision; they cost at most the budget.

    Example:
        >>> from jaxprune.search._problems import Decision
        >>> import numpy as np
        >>> own = Decision("a", 4, np.arange(1, 5), np.arange(4), np.ones(4), ())
        >>> within(Problem((own, own), 5, 8, sum, sum, None, None, None), [0.5, 1.0])
        (2, 3)
    """
    counts = problem.floors
    for index, fraction in enumerate(fractions):
        kept = widest(problem, counts, index, fraction)
        counts = (*counts[:index], kept, *counts[index + 1 :])
    return counts
