"""Prices candidates quickly: a search asks for thousands of costs, a plan takes milliseconds."""

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

Counts = tuple[int, ...]
_LARGEST = 4  # decisions that share a leaf; more would need too many calls of the cost
_CHECKS = 4  # random candidates at which the quick cost must be exact


def quick_cost(
    cost: Callable[[Counts], float],
    widths: Sequence[np.ndarray],
    cliques: Sequence[tuple[int, ...]],
) -> Callable[[Counts], float]:
    """Returns a function that equals `cost` and takes microseconds, where there is one.

    Multiply-accumulates, parameters and bytes are sums over leaves and layers of products of
    widths, so they are affine in the width of each decision:

        cost(k) = sum over S of a_S * product over i in S of (k_i - floor_i) / (size_i - floor_i)

    where S runs over subsets of the decisions that share a leaf. The coefficients follow from the
    costs where all of S keep everything and the rest keep their floors. The result is compared
    with `cost` at random candidates; if one differs, as for measured latencies, `cost` itself is
    called, and its results are remembered.

    Args:
        cost: function from counts to a number.
        widths: for each decision, its allowed counts, ascending.
        cliques: decisions that share a leaf, for each leaf.

    Returns:
        The function.
    """
    exact = functools.lru_cache(maxsize=2**17)(cost)
    free = [own for own in range(len(widths)) if widths[own][0] < widths[own][-1]]
    subsets = {(), *((own,) for own in free)}
    for clique in cliques:
        own = [index for index in clique if index in free]
        if len(own) > _LARGEST:
            return exact
        for count in range(2, len(own) + 1):
            subsets.update(itertools.combinations(own, count))
    floors, sizes = (np.array([own[end] for own in widths]) for end in (0, -1))
    quick = _multiaffine(exact, floors, sizes, sorted(subsets, key=lambda own: (len(own), own)))
    generator = np.random.default_rng(0)
    for _ in range(_CHECKS):
        counts = tuple(int(generator.choice(own)) for own in widths)
        if not np.isclose(quick(counts), exact(counts), rtol=1e-12, atol=0):
            return exact
    return quick


def _multiaffine(
    cost: Callable[[Counts], float],
    floors: np.ndarray,
    sizes: np.ndarray,
    subsets: Sequence[tuple[int, ...]],
) -> Callable[[Counts], float]:
    """Fits the formula of `quick_cost`; `subsets` are sorted by length."""
    coefficients: dict[tuple[int, ...], float] = {}
    are_whole = True
    for own in subsets:
        counts = floors.copy()
        counts[list(own)] = sizes[list(own)]
        value = cost(tuple(map(int, counts)))
        are_whole &= float(value).is_integer()
        less = (part for n in range(len(own)) for part in itertools.combinations(own, n))
        coefficients[own] = value - sum(coefficients[part] for part in less)
    used = [own for own in subsets if coefficients[own]]
    longest = max(map(len, used), default=0)
    spans = np.maximum(sizes - floors, 1)
    # The last place holds a 1, with which short subsets are filled up.
    places = np.array([[*own, *[len(floors)] * (longest - len(own))] for own in used], int)
    factors = np.array([coefficients[own] for own in used], float)

    def quick(counts: Counts) -> float:
        parts = np.append((np.asarray(counts) - floors) / spans, 1.0)
        value = float(factors @ parts[places].prod(axis=1))
        return round(value) if are_whole else value

    return quick
