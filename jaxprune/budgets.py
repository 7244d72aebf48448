"""How many weights stay: in all, and at least in each leaf. Exact integers, on the host."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

__all__ = ["Budget", "BudgetRule", "global_budget", "keep_count", "uniform"]

Shape = tuple[int, ...]


class Budget(NamedTuple):
    """How many weights stay.

    Leaves compete for what is left of `total` after each has its floor, so that floors
    which add up to `total` fix every leaf, and floors of 0 leave everything to the scores.

    Args:
        total: weights kept over all leaves.
        floors: weights kept at least, for each leaf.

    Example:
        >>> Budget(total=10, floors=(2, 3)).total
        10
    """

    total: int
    floors: tuple[int, ...]


BudgetRule = Callable[[Sequence[Shape], float], Budget]


def keep_count(size: int, sparsity: float) -> int:
    """How many of `size` weights stay: the rounding rule of the whole library.

    `size * sparsity` weights go, rounded to the nearest integer, halves up.

    Args:
        size: number of weights.
        sparsity: fraction to prune, in [0, 1).

    Returns:
        An integer between 0 and `size`.

    Example:
        >>> keep_count(25_000_000, 0.72)
        7000000
        >>> keep_count(5, 0.5)
        2
    """
    # As the decimal number that was written: 50 * 0.29 is 14.499999999999998 in floating point.
    exact = Fraction(str(float(sparsity)))
    return size - math.floor(size * exact + Fraction(1, 2))


def uniform(shapes: Sequence[Shape], sparsity: float) -> Budget:
    """The same sparsity in every leaf.

    Args:
        shapes: shapes of the pruned leaves.
        sparsity: fraction to prune, in [0, 1).

    Returns:
        A `Budget` whose floors add up to its total.

    Example:
        >>> uniform([(10, 10), (20,)], 0.9)
        Budget(total=12, floors=(10, 2))
    """
    floors = tuple(keep_count(math.prod(shape), sparsity) for shape in shapes)
    return Budget(sum(floors), floors)


def global_budget(floor: float = 0.1) -> BudgetRule:
    """All leaves compete in one ranking; each keeps a share of its uniform budget.

    Args:
        floor: share of the uniform budget that every leaf keeps at least, in [0, 1], never
            less than one weight: 0 is pure global competition, 1 is `uniform` up to rounding.

    Returns:
        A function `(shapes, sparsity) -> Budget`.

    Raises:
        ValueError: if `floor` is outside [0, 1]; from the returned function, if not even one
            weight can stay in each leaf.

    Example:
        >>> global_budget(0.5)([(10, 10), (20,)], 0.9)
        Budget(total=12, floors=(5, 1))
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"`floor` must lie in [0, 1], but is {floor!r}.")

    def rule(shapes: Sequence[Shape], sparsity: float) -> Budget:
        sizes = [math.prod(shape) for shape in shapes]
        total = keep_count(sum(sizes), sparsity)
        floors = tuple(max(1, math.floor(floor * total * n / sum(sizes))) for n in sizes)
        if sum(floors) > total:
            small = min(sizes)
            raise ValueError(
                f"`sparsity` {sparsity} keeps {total} of {sum(sizes)} weights, fewer than the "
                f"{sum(floors)} that the floors of {len(sizes)} leaves need (the smallest leaf "
                f"has {small} weights). Lower `sparsity` or `floor`, or exclude small leaves "
                "with `prunable`."
            )
        return Budget(total, floors)

    return rule
