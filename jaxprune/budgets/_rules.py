"""Budgets: how many weights are kept, in total and at least in each leaf. Exact, on the host."""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer

from jaxprune import schedules, trees

__all__ = [
    "Budget",
    "BudgetRule",
    "custom",
    "global_budget",
    "keep_count",
    "uniform",
]

Shape = tuple[int, ...]


class Budget(NamedTuple):
    """The number of weights that are kept, in total and at least in each leaf.

    Each leaf first gets its floor; all leaves then compete for the rest of `total`. Floors that add
    up to `total` therefore fix the count of every leaf, and with floors of 0 the scores alone
    decide.

    Args:
        total: number of weights kept over all leaves.
        floors: smallest number of weights kept in each leaf.

    Example:
        >>> Budget(total=10, floors=(2, 3)).total
        10
    """

    total: int
    floors: tuple[int, ...]


# (shapes of the prunable leaves by path, sparsity) -> how much each leaf keeps
BudgetRule = Callable[[Mapping[str, Shape], float], Budget]


def keep_count(size: int, sparsity: float) -> int:
    """Computes how many of `size` weights are kept: the rounding rule of the whole library.

    `size * sparsity` weights are removed, rounded to the nearest integer, halves up.

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
    return kept_of(size, decimal(sparsity))


def keep_counts(sizes: Sequence[int], sparsities: np.ndarray) -> np.ndarray:
    """Computes `keep_count` for many sizes and sparsities, int64 [sparsities, sizes]."""
    return kept_of_parts(sizes, [Fraction(1)] * len(sizes), sparsities)


def kept_of_parts(
    sizes: Sequence[int], parts: Sequence[Fraction], sparsities: np.ndarray
) -> np.ndarray:
    """Computes `keep_counts` where each leaf has its part of the sparsity."""
    removed = np.multiply.outer(sparsities, np.asarray(sizes, float) * np.asarray(parts, float))
    whole = np.floor(removed + 0.5)
    # Exact wherever floating point might round the other way.
    close = np.abs(removed - np.floor(removed) - 0.5) <= 1e-9 + 1e-15 * removed
    counts = np.asarray(sizes, np.int64) - whole.astype(np.int64)
    for i, j in zip(*np.nonzero(close | (removed > 2.0**52))):
        counts[i, j] = kept_of(int(sizes[j]), decimal(float(sparsities[i])) * parts[j])
    return counts


def at_all(
    rule: BudgetRule, shapes: Mapping[str, Shape], sparsities: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Applies a rule to many sparsities, as the timetable of a long run does.

    A rule may have an attribute `at_all`, a function `(shapes, float64 [n]) -> totals, floors` that
    computes all budgets at once; those of this package do. It gets each sparsity once.

    Args:
        rule: function `(shapes, sparsity) -> Budget`.
        shapes: shapes of the pruned leaves by path.
        sparsities: fractions to prune.

    Returns:
        Totals, int64 [sparsities], and floors, int64 [sparsities, leaves].

    Raises:
        ValueError: as the rule does.

    Example:
        >>> at_all(uniform, {"a": (10, 10), "b": (20,)}, [0.5, 0.9])[1].tolist()
        [[50, 10], [10, 2]]
    """
    different, where = np.unique(np.asarray(sparsities, float), return_inverse=True)
    if hasattr(rule, "at_all"):
        totals, floors = rule.at_all(shapes, different)
    else:
        found = [rule(shapes, sparsity) for sparsity in different.tolist()]
        totals = np.array([budget.total for budget in found], np.int64)
        floors = np.array([budget.floors for budget in found], np.int64)
    return totals[where], floors[where]


def with_all(rule: Any, function: Any) -> Any:
    """Gives a rule its attribute `at_all`."""
    rule.at_all = function
    return rule


def uniform(shapes: Mapping[str, Shape], sparsity: float) -> Budget:
    """Gives every leaf the same sparsity and keeps at least one weight in each.

    Args:
        shapes: shapes of the pruned leaves by path, in flattening order.
        sparsity: fraction to prune, in [0, 1).

    Returns:
        A `Budget` whose floors add up to its total.

    Example:
        >>> uniform({"a": (10, 10), "b": (20,), "c": (8, 1)}, 0.95)
        Budget(total=7, floors=(5, 1, 1))
    """
    return of_one(_uniform_at_all, shapes, sparsity)


def of_one(of_all: Callable[..., Any], shapes: Mapping[str, Shape], sparsity: float) -> Budget:
    """Computes the budget of one sparsity by the function of many, see `at_all`."""
    totals, floors = of_all(shapes, np.array([sparsity], float))
    return Budget(int(totals[0]), tuple(floors[0].tolist()))


def _uniform_at_all(shapes: Mapping[str, Shape], sparsities: np.ndarray) -> Any:
    """Computes `uniform` for many sparsities."""
    floors = np.maximum(1, keep_counts(list(sizes_of(shapes).values()), sparsities))
    return floors.sum(axis=1), floors


with_all(uniform, _uniform_at_all)


def global_budget(floor: float = 0.1) -> BudgetRule:
    """Lets all leaves compete in one ranking; each keeps at least a share of its uniform budget.

    Args:
        floor: share of its uniform budget that every leaf keeps at least, in [0, 1], and never
            less than one weight: 0 is pure global competition, 1 is `uniform` up to rounding.

    Returns:
        A function `(shapes, sparsity) -> Budget`.

    Raises:
        ValueError: if `floor` is outside [0, 1]; from the returned function, if the floors need
            more weights than the sparsity keeps.

    Example:
        >>> global_budget(0.5)({"a": (10, 10), "b": (20,)}, 0.9)
        Budget(total=12, floors=(5, 1))
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"`floor` must lie in [0, 1], but is {floor!r}.")

    def of_all(shapes: Mapping[str, Shape], sparsities: np.ndarray) -> Any:
        sizes = sizes_of(shapes)
        everything = sum(sizes.values())
        (totals,) = keep_counts([everything], sparsities).T
        shares = np.multiply.outer(floor * totals, np.array(list(sizes.values()), float))
        floors = np.maximum(1, np.floor(shares / everything).astype(np.int64))
        for row in np.flatnonzero(floors.sum(axis=1) > totals)[:1]:
            trees.raise_for(
                smallest(sizes),
                f"`sparsity` {sparsities[row]} keeps {totals[row]} of {everything} weights, fewer "
                f"than the {floors[row].sum()} that the floors of {len(sizes)} leaves need. Lower "
                "`sparsity` or `floor`, or exclude small leaves with `prunable`. The smallest are:",
            )
        return totals, floors

    return with_all(lambda shapes, sparsity: of_one(of_all, shapes, sparsity), of_all)


def custom(sparsities: Mapping[str, float]) -> BudgetRule:
    """Limits the sparsity of some leaves; the other leaves make up for the difference.

    To give leaves the sparsities themselves, pass the dict as `budget`: `budget={"layer1": 0.98,
    "layer2": 0.9}`.

    At an overall sparsity `s`, every leaf is pruned to the same level `x`, but no named leaf beyond
    the limit given for it: `sum(n * min(limit, x)) = s * sum(n)` over leaves of `n` weights. Along
    a rising schedule, a named leaf therefore follows the others until it reaches its limit, and
    remains there. Counts that are not integers are rounded by largest remainder, ties to the
    earlier leaf. An unnamed leaf keeps at least one weight; a named leaf ends at
    `keep_count(n, limit)`, which can be 0 for a tiny leaf.

    If every leaf is named, the largest possible `s` is the mean of the limits, weighted by size. If
    `s` is within half a weight per leaf of that mean, the floors are `keep_count(n, limit)` and the
    total is their sum.

    Args:
        sparsities: largest sparsity of a leaf, in [0, 1), by name; 0 keeps the leaf dense. A name
            is a path, a part of it, or has wildcards, see `trees.means`; the most precise decides.
            The path of a stacked leaf stands for all its copies, `layers/kernel[3]` for one.

    Returns:
        A function `(shapes, sparsity) -> Budget`, whose floors add up to the total.

    Raises:
        ValueError: if a value is outside [0, 1); from the returned function, if a name means no
            pruned leaf, or if the sparsity cannot be reached.

    Example:
        >>> rule = custom({"first": 0.0, "last": 0.5})
        >>> shapes = {"first": (10, 10), "last": (10, 10), "middle": (10, 10)}
        >>> rule(shapes, 0.2)
        Budget(total=240, floors=(100, 70, 70))
        >>> rule(shapes, 0.4)
        Budget(total=180, floors=(100, 50, 30))
    """
    given = sparsities_of("sparsities", sparsities)

    def limits(shapes: Mapping[str, Shape]) -> tuple[dict[str, float], dict[str, int], list[int]]:
        own, sizes = trees.by_name("sparsities", given, list(shapes)), sizes_of(shapes)
        most = [n - keep_count(n, own[path]) if path in own else n - 1 for path, n in sizes.items()]
        return own, sizes, most

    def rule(shapes: Mapping[str, Shape], sparsity: float) -> Budget:
        own, sizes, most = limits(shapes)
        pruned = sum(sizes.values()) - keep_count(sum(sizes.values()), sparsity)
        if pruned and len(own) == len(sizes) and _is_mean(sparsity, own, sizes):
            gone = most
        elif pruned > sum(most):
            _raise_unreachable(sparsity, own, sizes, sum(most))
        else:
            (gone,) = fill(list(sizes.values()), [0] * len(most), most, np.array([pruned])).tolist()
        floors = tuple(n - k for n, k in zip(sizes.values(), gone, strict=True))
        return Budget(sum(floors), floors)

    def of_all(shapes: Mapping[str, Shape], sparsities: np.ndarray) -> Any:
        own, sizes, most = limits(shapes)
        (totals,) = keep_counts([sum(sizes.values())], sparsities).T
        pruned = sum(sizes.values()) - totals
        # Near the largest sparsity of all the rule itself decides, which may raise.
        simple = pruned < sum(most) - (len(sizes) if len(own) == len(sizes) else 0)
        floors = np.zeros((len(sparsities), len(sizes)), np.int64)
        filled = fill(list(sizes.values()), [0] * len(most), most, pruned[simple])
        floors[simple] = np.asarray(list(sizes.values()), np.int64) - filled
        for row in np.flatnonzero(~simple):
            floors[row] = rule(shapes, float(sparsities[row])).floors
        return floors.sum(axis=1), floors

    return with_all(rule, of_all)


def kept_of(size: int, sparsity: Fraction) -> int:
    """Computes `keep_count` of an exact sparsity."""
    return size - math.floor(size * sparsity + Fraction(1, 2))


def sparsities_of(argument: str, sparsities: Mapping[str, Any]) -> dict[str, float]:
    """Returns the values of a dict as floats; raises unless all are single numbers in [0, 1)."""
    found, bad = {}, []
    for name, own in sparsities.items():
        if isinstance(own, Tracer):
            bad.append(f"{name}: traced, but weights are counted before the first step")
            continue
        try:
            found[name] = schedules.number(argument, own)
        except ValueError:  # no single number
            found[name] = -1.0
        if not 0 <= found[name] < 1:
            bad.append(f"{name}: {own!r}")
    trees.raise_for(
        bad, f"`{argument}` must have one number in [0, 1) for each name; change these:"
    )
    return found


def decimal(sparsity: float) -> Fraction:
    """Returns the decimal number that was written: 50 * 0.29 is below 14.5 in floating point."""
    return Fraction(str(float(sparsity)))


def sizes_of(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Returns the number of weights of each leaf, by path."""
    return {path: math.prod(shape) for path, shape in shapes.items()}


def smallest(sizes: Mapping[str, int], count: int = 8) -> list[str]:
    """Returns the lines of an error that name the smallest leaves."""
    first = sorted(sizes, key=lambda path: sizes[path])[:count]
    return [f"{path}: size {sizes[path]}" for path in first]


def fill(
    rates: Sequence[int], least: Sequence[int], most: Sequence[int], totals: np.ndarray
) -> np.ndarray:
    """Solves `sum(clip(level * rates, least, most)) = total` in integers, for many totals.

    Requires `sum(least) <= total <= sum(most)` and positive rates. Shares are rounded by largest
    remainder, ties to the lower index. The papers repeat the division until no leaf is above its
    bound, which solves the same equation without lower bounds.

    Between two corners the shares of some leaves grow with the level, those of all others are
    constant. Of a total `t` a growing leaf has `rate * (t - constants) / slope`, exactly.

    Args:
        rates: positive integers [leaves].
        least: smallest share of each leaf.
        most: largest share of each leaf.
        totals: int64 [n].

    Returns:
        int64 [n, leaves].
    """
    bounds = list(zip(rates, least, most, strict=True))
    if not bounds:
        return np.zeros((len(totals), 0), np.int64)
    corners = sorted({Fraction(b, rate) for rate, low, high in bounds for b in (low, high)})
    reached = [sum(min(max(c * r, low), high) for r, low, high in bounds) for c in corners]
    segment = np.searchsorted([math.ceil(own) for own in reached], totals, side="right") - 1
    wide = max(rates) * int(totals.max(initial=0)) >= 2**62
    kind = object if wide else np.int64  # of Python's integers, which have no limit
    counts = np.zeros((len(totals), len(rates)), np.int64)
    for at in np.unique(segment):
        rows, level = segment == at, corners[at]
        grows = np.array([low <= level * rate < high for rate, low, high in bounds])
        constants = [low if level * rate < low else high for rate, low, high in bounds]
        own = np.where(grows, 0, np.array(constants, kind))
        slope = int(np.array(rates, kind)[grows].sum()) or 1
        left = totals[rows].astype(kind) - own.sum()
        parts = np.multiply.outer(left, np.where(grows, np.array(rates, kind), 0))
        share, rest = own + parts // slope, parts % slope
        order = np.argsort(-rest, axis=1, kind="stable")  # the largest remainder first
        spare = (totals[rows] - share.sum(axis=1)).astype(np.int64)
        first = np.arange(len(rates)) < spare[:, None]
        more = np.zeros_like(counts[rows])
        np.put_along_axis(more, order, first.astype(np.int64), axis=1)
        counts[rows] = share.astype(np.int64) + more
    return counts


def _is_mean(sparsity: float, own: Mapping[str, float], sizes: Mapping[str, int]) -> bool:
    """Returns whether `sparsity` is the mean of the limits, within half a weight for each leaf."""
    gone = sum(n * decimal(own[path]) for path, n in sizes.items())
    return abs(sum(sizes.values()) * decimal(sparsity) - gone) <= Fraction(len(sizes), 2)


def _raise_unreachable(
    sparsity: float, own: Mapping[str, float], sizes: Mapping[str, int], most: int
) -> None:
    """Raises the error of `custom` for a sparsity above the largest that the limits allow."""
    everything = sum(sizes.values())
    # Rounded down, so that the value in the message can be used.
    highest = math.floor(Fraction(most * 10**4, everything)) / 10**4
    capped = [f"{path}: {own[path]} of {sizes[path]} weights" for path in own]
    trees.raise_for(
        capped or smallest(sizes),
        f"`sparsity` {sparsity} cannot be reached: with these limits of single leaves it is at "
        f"most {highest}. Lower `sparsity`, raise limits, or remove leaves from `sparsities`:",
    )
