"""From an elastic network to one sub-network for each budget: measure, predict, evolve, verify."""

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune import reports, search
from jaxprune.elastic._evolution import Cost, Evolution, evolve, find_cheapest, remember
from jaxprune.elastic._predictor import Fit, Predictor, fit_predictor
from jaxprune.elastic._space import (
    Choice,
    Decision,
    canonical,
    check_decisions,
    count,
    describe,
    draw,
    largest,
    smallest,
)


class Measured(NamedTuple):
    """A choice that was evaluated.

    Example:
        >>> Measured((0, 1), 0.9, 100.0).score
        0.9
    """

    choice: Choice
    score: float  # what `evaluate` returned
    cost: float


class Point(NamedTuple):
    """The best sub-network of one budget.

    Example:
        >>> Point(120.0, (0, 1), 0.9, 0.88, 100.0).budget
        120.0
    """

    budget: float
    choice: Choice
    score: float  # what `evaluate` returned
    predicted: float  # what the predictor says
    cost: float  # at most the budget


class Front(NamedTuple):
    """Sub-networks for several budgets; `print` shows a table of them.

    Example:
        >>> Front._fields[:2]
        ('points', 'decisions')
    """

    points: tuple[Point, ...]  # one for each budget, the smallest budget first
    decisions: tuple[Decision, ...]
    predictor: Predictor
    measured: tuple[Measured, ...]  # all evaluated choices, in the order of their evaluation
    sample: int  # number of these that were drawn for the predictor
    seconds: float  # spent in `evaluate` by this call
    own_seconds: float  # spent by everything else

    @property
    def pareto(self) -> tuple[Measured, ...]:
        """All measured choices that no other one beats in score or cost, the cheapest first."""
        best: list[Measured] = []
        for own in sorted(self.measured, key=lambda own: (own.cost, -own.score)):
            if not best or own.score > best[-1].score:
                best.append(own)
        return tuple(best)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain Python values without the parameters of the predictor, for `json.dumps`."""
        points = [
            own._asdict() | {"options": describe(self.decisions, own.choice)} for own in self.points
        ]
        return {
            "points": points,
            "measured": [own._asdict() for own in self.measured],
            "sample": self.sample,
            "spearman": self.predictor.spearman,
            "kendall": self.predictor.kendall,
            "error": self.predictor.error,
            "unseen": [list(own) for own in self.predictor.unseen],
            "seconds": self.seconds,
            "own_seconds": self.own_seconds,
        }

    def __str__(self) -> str:
        """Lists the points, then how well accuracies were predicted."""
        rows = [
            own._asdict()
            | {
                name: round(value) if (value := getattr(own, name)) > 1000 else value
                for name in ("budget", "cost")
            }
            | {"options": _in_words(describe(self.decisions, own.choice), self.decisions)}
            for own in self.points
        ]
        columns = {
            "budget": "budget",
            "cost": "cost",
            "score": "score",
            "predicted": "predicted",
            "options": "options",
        }
        numbers = {"Spearman": self.predictor.spearman, "Kendall": self.predictor.kendall}
        words = [f"{name} {'-' if own is None else f'{own:.3f}'}" for name, own in numbers.items()]
        return (
            f"{reports.table(rows, columns)}\n{len(self.measured)} choices measured; the predictor "
            f"on {len(self.predictor.unseen)} unseen ones: {', '.join(words)}, error "
            f"{self.predictor.error:.4g}"
        )


def specialise(
    decisions: Sequence[Decision],
    evaluate: Callable[[Choice], Any],
    cost: Cost,
    budgets: Sequence[float],
    *,
    measured: int = 100,
    verified: int = 4,
    seed: int = 0,
    predictor: Fit | None = None,
    evolution: Evolution | None = None,
    journal: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    on_evaluation: Callable[[int, Measured], None] | None = None,
) -> Front:
    """Finds the best sub-network for each budget, without training.

    1. It measures random choices, and the smallest and the largest one.
    2. It fits a predictor to four fifths of them and judges it on the rest.
    3. For each budget, evolution searches for the choices with the highest predictions.
    4. It measures the best of these.

    The result for a budget is the measured choice with the highest score that fits it. That may be
    one that was found for a smaller budget, or drawn at random.

    Args:
        decisions: those of the space.
        evaluate: function from a choice to one finite number, such as the accuracy on held-out
            training images with statistics of that choice, see `make_accuracy`. It is called once
            for each choice.
        cost: function from a choice to a finite number: multiply-accumulates, parameters, or the
            sum of a table of latencies. It is called once for each sub-network.
        budgets: largest costs, in the units of `cost`.
        measured: number of choices that are measured for the predictor: at least 5, and fewer if
            the space has fewer.
        verified: number of choices that are measured for each budget in the end.
        seed: of the draws, of the predictor and of the evolution.
        predictor: how it is fitted, see `Fit`.
        evolution: its sizes, see `Evolution`.
        journal: a file to which each evaluation is appended. If it exists, what it holds is not
            evaluated again: the call resumes, also with other budgets, numbers or seeds.
        settings: what `evaluate` depends on, JSON-ready; a journal with other settings is refused.
        on_evaluation: function `(number of measured choices, the newest)`, called after each.

    Returns:
        The `Front`.

    Raises:
        ValueError: if a budget is met by no choice (it names the cheapest), a number is out of
            range, `evaluate` or `cost` returns no finite number, or the journal is damaged or
            belongs to a different space.

    References:
        Cai, Gan, Wang, Zhang, Han. Once-for-all: train one network and specialize it for efficient
        deployment. ICLR 2020, arXiv:1908.09791.

    Example:
        >>> decisions = [Decision(name, "width", (1, 2, 3)) for name in "abc"]
        >>> front = specialise(
        ...     decisions, lambda choice: 0.5 + 0.1 * choice[0], sum, [1, 2], measured=20,
        ...     predictor=Fit(hidden=(16,), steps=200), evolution=Evolution(20, 10),
        ... )
        >>> [round(point.score, 2) for point in front.points]
        [0.6, 0.7]
    """
    began = time.perf_counter()
    check_decisions(decisions)
    costs = remember(decisions, cost)
    _check_numbers(decisions, budgets, measured, verified)
    _check_budgets(decisions, costs, budgets)
    with contextlib.ExitStack() as stack:
        header = _header(decisions, settings or {})
        book = _Book(evaluate, costs, on_evaluation, stack.enter_context(_journal(journal, header)))
        sample = draw_distinct(decisions, measured, seed)
        for own in sample:
            book.measure(own)
        fitted = fit_predictor(
            decisions, sample, [book.found[own].score for own in sample], seed=seed,
            settings=predictor,
        )  # fmt: skip
        for budget in sorted(budgets):
            ranked = evolve(
                decisions, fitted, costs, budget, seed=seed, settings=evolution, start=sample
            )
            for own in ranked[:verified]:
                book.measure(own.choice)
    everything = tuple(book.found.values())
    points = tuple(_best(everything, fitted, budget) for budget in sorted(budgets))
    own_seconds = time.perf_counter() - began - book.seconds
    return Front(
        points, tuple(decisions), fitted, everything, len(sample), book.seconds, own_seconds
    )


def draw_distinct(decisions: Sequence[Decision], number: int, seed: int) -> list[Choice]:
    """Draws different sub-networks, after the largest and the smallest one.

    Args:
        decisions: those of the space.
        number: of choices, at least 2.
        seed: of the draws.

    Returns:
        The choices; fewer if the space has fewer, or if some are so rare that a thousand draws for
        each choice do not find them.

    Example:
        >>> sorted(draw_distinct([Decision("w", "width", (1, 2, 3))], 9, seed=0))
        [(0,), (1,), (2,)]
    """
    rng = np.random.default_rng(seed)
    ends = (canonical(decisions, own(decisions)) for own in (largest, smallest))
    found = dict.fromkeys(ends)
    number = min(number, count(decisions))
    for _ in range(1000 * number):
        if len(found) >= number:
            break
        found[canonical(decisions, draw(decisions, rng))] = None
    return [*found]


class _Book:
    """Measures each choice once, by the journal or by `evaluate`."""

    def __init__(
        self,
        evaluate: Callable[[Choice], Any],
        cost: Cost,
        on_evaluation: Callable[[int, Measured], None] | None,
        journal: search.Journal,
    ) -> None:
        self._evaluate, self._cost, self._journal = evaluate, cost, journal
        self._tell, self._known = on_evaluation, journal.known
        self.found: dict[Choice, Measured] = {}
        self.seconds = 0.0

    def measure(self, choice: Choice) -> None:
        """Adds a choice to `found`."""
        if choice in self.found:
            return
        if choice not in self._known:
            began = time.perf_counter()
            score = _number(self._evaluate(choice), choice)
            self.seconds += time.perf_counter() - began
            self._journal.append(len(self._known), choice, score)
            self._known[choice] = score
        self.found[choice] = Measured(choice, self._known[choice], self._cost(choice))
        if self._tell is not None:
            self._tell(len(self.found), self.found[choice])


def _best(measured: Sequence[Measured], predictor: Predictor, budget: float) -> Point:
    own = max((own for own in measured if own.cost <= budget), key=lambda own: own.score)
    return Point(budget, own.choice, own.score, float(predictor([own.choice])[0]), own.cost)


@contextlib.contextmanager
def _journal(path: str | Path | None, header: Mapping[str, Any]) -> Iterator[search.Journal]:
    if path is None:
        yield search.Journal(())
        return
    with search.open_journal(path, header) as journal:
        yield journal


def _header(decisions: Sequence[Decision], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Describes a space, so that a journal of a different one is noticed."""
    words = repr([tuple(own) for own in decisions])
    return {
        "search": "elastic",
        "settings": dict(settings),
        "decisions": {own.name: len(own.options) for own in decisions},
        "problem": zlib.crc32(words.encode()),
        "budget": 0.0,
    }


def _number(value: Any, choice: Choice) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`evaluate` must return one number, but returned {type(value).__name__} for the "
            f"choice {choice}."
        ) from error
    if not np.isfinite(number):
        raise ValueError(
            f"`evaluate` must return a finite number, but returned {number} for the choice "
            f"{choice}; return the worst score instead where a network computes NaN."
        )
    return number


def _check_numbers(
    decisions: Sequence[Decision], budgets: Sequence[float], measured: int, verified: int
) -> None:
    problems = [
        f"`{name}` must be an integer of at least {least}, but is {value!r}"
        for name, value, least in (("measured", measured, 5), ("verified", verified, 1))
        if type(value) is not int or value < least
    ]
    if (number := count(decisions)) < 5:
        problems.append(
            f"`decisions` must allow at least 5 sub-networks, but allow {number}; evaluate all of "
            "them instead"
        )
    if not len(budgets):
        problems.append("`budgets` must hold at least one largest cost, but is empty")
    if problems:
        raise ValueError("\n".join(problems))


def _check_budgets(decisions: Sequence[Decision], cost: Cost, budgets: Sequence[float]) -> None:
    """Refuses budgets that no choice meets, before anything is measured."""
    cheapest = find_cheapest(decisions, cost)
    bad = [f"{own:g}" for own in budgets if not cost(cheapest) <= own]
    if bad:
        raise ValueError(
            f"`budgets` {', '.join(bad)} are met by no choice; the cheapest one costs "
            f"{cost(cheapest):g}: {describe(decisions, cheapest)}. Give larger budgets, or a space "
            "with smaller options."
        )


def _in_words(options: Mapping[str, int], decisions: Sequence[Decision]) -> str:
    """Writes the options of a choice, those of one kind together."""
    kinds: dict[str, list[str]] = {}
    for own in decisions:
        kinds.setdefault(own.kind, []).append(str(options.get(own.name, "-")))
    return ", ".join(f"{kind} {' '.join(own)}" for kind, own in kinds.items())
