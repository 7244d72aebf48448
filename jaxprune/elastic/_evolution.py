"""Evolution of choices under a budget: mutants and crossovers of those with the best scores."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.elastic._space import Choice, Decision, canonical, check, describe, draw, smallest

Cost = Callable[[Choice], float]
Scores = Callable[[Sequence[Choice]], Any]  # N choices -> N numbers, larger is better


class Evolution(NamedTuple):
    """The sizes of an evolution; the defaults are the published ones.

    Example:
        >>> Evolution(generations=100).population
        100
    """

    population: int = 100
    generations: int = 500
    parents: float = 0.25  # share of the population that is kept and has descendants
    mutants: float = 0.5  # share of the population that are mutants; as many are crossovers
    mutation: float = 0.1  # probability that a decision of a mutant is drawn again
    resolution: float = 0.5  # the same probability for decisions on the resolution


class Evolved(NamedTuple):
    """A choice that an evolution has found.

    Example:
        >>> Evolved((0, 1), 0.9, 100.0).cost
        100.0
    """

    choice: Choice
    score: float
    cost: float


def evolve(
    decisions: Sequence[Decision],
    scores: Scores,
    cost: Cost,
    budget: float,
    *,
    seed: int = 0,
    settings: Evolution | None = None,
    start: Sequence[Choice] = (),
) -> list[Evolved]:
    """Searches for the choices with the highest scores whose cost is within a budget.

    The first population is drawn at random. In each generation the best choices become parents; the
    next population are the parents, mutants of random parents (each decision is drawn again with
    some probability), and crossovers of two random parents (each decision from either). In a choice
    above the budget random decisions move towards the cheapest choice, one option at a time, until
    it fits. The published code draws such a choice again until one fits, which may take forever
    where few do.

    Args:
        decisions: those of the space.
        scores: function from N choices to N numbers, such as a `Predictor`; no choice is asked
            for twice.
        cost: function from a choice to a number, such as its multiply-accumulates. It is called
            once for each choice; give one made by `remember` to share its results with other calls.
        budget: the largest cost that is allowed.
        seed: of all draws; the result depends on nothing else.
        settings: see `Evolution`, whose defaults are taken if this is None.
        start: choices for the first population, such as those measured before.

    Returns:
        Distinct choices that fit the budget, the best first: at most as many as the population.

    Raises:
        ValueError: if no choice meets the budget (it names the cheapest), a setting is out of
            range, or a choice of `start` lies outside the space.

    References:
        Cai et al., Once-for-all, ICLR 2020, arXiv:1908.09791, section 3.4. Real et al., Regularized
        evolution for image classifier architecture search, arXiv:1802.01548.

    Example:
        >>> decisions = [Decision(name, "width", (1, 2, 3)) for name in "abc"]
        >>> best, *_ = evolve(
        ...     decisions, lambda choices: [own[0] + 2 * own[1] for own in choices], sum, budget=3,
        ...     settings=Evolution(population=8, generations=10),
        ... )
        >>> best
        Evolved(choice=(1, 2, 0), score=5.0, cost=3.0)
    """
    settings = Evolution() if settings is None else settings
    _check(settings)
    for own in start:
        check(decisions, own)
    rng = np.random.default_rng(seed)
    costs = cost if isinstance(cost, _Remembered) else remember(decisions, cost)
    cheapest = find_cheapest(decisions, costs)
    if not costs(cheapest) <= budget:
        raise ValueError(
            f"`budget` {budget:g} is met by no choice; the cheapest one costs {costs(cheapest):g}: "
            f"{describe(decisions, cheapest)}. Give a larger budget, or smaller options."
        )
    known: dict[Choice, float] = {}

    def ranked(choices: Iterable[Choice]) -> list[Choice]:
        """Scores new choices in one call; returns distinct ones, the best first."""
        distinct = [*dict.fromkeys(choices)]
        fresh = [own for own in distinct if own not in known]
        if fresh:
            known.update(zip(fresh, map(float, scores(fresh)), strict=True))
        return sorted(distinct, key=lambda own: -known[own])  # stable: ties keep their order

    def fitting(choice: Choice) -> Choice:
        """Moves random decisions towards the cheapest choice, one option at a time."""
        own = canonical(decisions, choice)
        while costs(own) > budget:
            apart = [i for i in range(len(own)) if own[i] != cheapest[i]]
            index = apart[int(rng.integers(len(apart)))]
            step = 1 if cheapest[index] > own[index] else -1
            own = canonical(decisions, (*own[:index], own[index] + step, *own[index + 1 :]))
        return own

    size = settings.population
    first = [tuple(own) for own in start][:size]
    first += [draw(decisions, rng) for _ in range(size - len(first))]
    population = ranked(map(fitting, first))
    rates = np.array(
        [
            settings.resolution if own.kind == "resolution" else settings.mutation
            for own in decisions
        ]
    )
    mutants, crossovers = round(settings.mutants * size), round(settings.mutants * size)
    for _ in range(settings.generations):
        parents = population[: max(1, round(settings.parents * size))]
        children = [_mutant(decisions, _one(parents, rng), rates, rng) for _ in range(mutants)]
        children += [
            _crossover(_one(parents, rng), _one(parents, rng), rng) for _ in range(crossovers)
        ]
        population = ranked([*parents, *map(fitting, children)])
    return [Evolved(own, known[own], costs(own)) for own in population[:size]]


def find_cheapest(decisions: Sequence[Decision], cost: Cost) -> Choice:
    """Finds the choice with the lowest cost, by changing one decision at a time.

    It starts with the smallest option of each decision, and that is the result for every cost that
    grows with the options.

    Args:
        decisions: those of the space.
        cost: function from a choice to a number.

    Returns:
        The choice.

    Example:
        >>> find_cheapest([Decision("a", "width", (1, 2)), Decision("b", "width", (1, 2))], sum)
        (0, 0)
    """
    best = canonical(decisions, smallest(decisions))
    lowest = cost(best)
    changed = True
    while changed:
        changed = False
        for index, own in enumerate(decisions):
            for option in range(len(own.options)):
                other = canonical(decisions, (*best[:index], option, *best[index + 1 :]))
                if cost(other) < lowest:
                    best, lowest, changed = other, cost(other), True
    return best


class _Remembered:
    """A cost function that is called once for each sub-network."""

    def __init__(self, decisions: Sequence[Decision], cost: Cost) -> None:
        self._decisions, self._cost = tuple(decisions), cost
        self._known: dict[Choice, float] = {}

    def __call__(self, choice: Choice) -> float:
        own = canonical(self._decisions, choice)
        if own not in self._known:
            value = float(self._cost(own))
            if not np.isfinite(value):
                raise ValueError(
                    f"`cost` must return a finite number, but returned {value} for the choice "
                    f"{own}: {describe(self._decisions, own)}."
                )
            self._known[own] = value
        return self._known[own]


def remember(decisions: Sequence[Decision], cost: Cost) -> Cost:
    """Makes a cost function that calls another one once for each sub-network.

    Args:
        decisions: those of the space. Choices that differ only in skipped blocks have one cost.
        cost: function from a choice to a number.

    Returns:
        The function.

    Raises:
        ValueError: when it is called, if `cost` returns no finite number.

    Example:
        >>> calls = []
        >>> cost = remember([Decision("w", "width", (4, 8))], lambda own: calls.append(own) or 1)
        >>> cost((0,)), cost((0,)), calls
        (1.0, 1.0, [(0,)])
    """
    return _Remembered(decisions, cost)


def _one(parents: Sequence[Choice], rng: np.random.Generator) -> Choice:
    return parents[int(rng.integers(len(parents)))]


def _mutant(
    decisions: Sequence[Decision], parent: Choice, rates: np.ndarray, rng: np.random.Generator
) -> Choice:
    fresh, is_drawn = draw(decisions, rng), rng.uniform(size=len(rates)) < rates
    return tuple(new if own else old for old, new, own in zip(parent, fresh, is_drawn, strict=True))


def _crossover(one: Choice, two: Choice, rng: np.random.Generator) -> Choice:
    picks = rng.integers(2, size=len(one))
    return tuple(b if own else a for a, b, own in zip(one, two, picks, strict=True))


def _check(settings: Evolution) -> None:
    problems = [
        f"{name} {getattr(settings, name)!r}, must be an integer of at least {least}"
        for name, least in (("population", 2), ("generations", 0))
        if type(getattr(settings, name)) is not int or getattr(settings, name) < least
    ]
    problems += [
        f"{name} {getattr(settings, name)!r}, must be in [0, 1]"
        for name in ("parents", "mutants", "mutation", "resolution")
        if not 0 <= getattr(settings, name) <= 1
    ]
    if problems:
        raise ValueError("\n  ".join(["`settings` must be in range:", *problems]))
