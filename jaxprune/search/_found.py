"""What a search has found, and the course that it took."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxprune import reports, structure
from jaxprune.search._problems import Counts, Problem


class Evaluation(NamedTuple):
    """One candidate that was scored.

    Example:
        >>> Evaluation((8, 16), 0.5, 100.0, 0.5).score
        0.5
    """

    counts: Counts  # units that each decision keeps
    score: float  # what `evaluate` returned
    cost: float
    reward: float  # what the search maximizes, see `run`


class Found(NamedTuple):
    """The best candidate of a search; `print` shows a table of its decisions.

    Example:
        >>> Found._fields[:4]
        ('search', 'plan', 'masks', 'score')
    """

    search: str  # name of the search
    plan: structure.Plan | None  # of a problem of channels
    masks: Any  # of a problem of weights: a tree of bools like the parameters; else None
    score: float  # what `evaluate` returned for it
    cost: float  # as the user's cost function counts
    dense: float  # cost of the dense network
    budget: float  # the largest cost that was allowed
    kept: dict[str, int]  # name of a decision -> units that are kept
    sizes: dict[str, int]  # name of a decision -> all its units
    history: tuple[Evaluation, ...]  # all evaluations, in order
    seconds: float  # spent in `evaluate`
    own_seconds: float  # spent by the search itself

    @property
    def best(self) -> list[float]:
        """The best score so far after each evaluation, of candidates that fit the budget."""
        scores, best = [], float("-inf")
        for own in self.history:
            best = max(best, own.score) if own.cost <= self.budget else best
            scores.append(best)
        return scores

    def to_dict(self) -> dict[str, Any]:
        """Returns plain Python values without the masks, ready for `json.dumps`."""
        own = self._asdict()
        del own["masks"], own["plan"]
        return own | {"history": [list(each) for each in self.history]}

    def __str__(self) -> str:
        """Lists what each decision keeps, then the totals."""
        rows = [
            {"name": name, "size": size, "kept": self.kept[name], "part": self.kept[name] / size}
            for name, size in self.sizes.items()
        ]
        text = reports.table(
            rows, {"name": "", "size": "units", "kept": "kept", "part": "fraction"}
        )
        return (
            f"{text}\n{self.search}: score {self.score:.4g} at {self.cost / self.dense:.1%} of the "
            f"dense cost (budget {self.budget / self.dense:.1%}), {len(self.history)} evaluations"
        )


def found_of(
    problem: Problem,
    name: str,
    best: Evaluation,
    history: Sequence[Evaluation],
    seconds: float,
    own_seconds: float,
) -> Found:
    """Makes the result, and has the user's cost function confirm that it fits the budget."""
    cost = problem.account(best.counts)
    if not cost <= problem.budget:
        raise ValueError(
            f"`cost` must give the same number for the same plan, but gave {best.cost:g} during "
            f"the search and {cost:g} after it, above the budget {problem.budget:g}."
        )
    outcome = problem.outcome(best.counts)
    is_plan = isinstance(outcome, structure.Plan)
    names = [own.name for own in problem.decisions]
    return Found(
        search=name,
        plan=outcome if is_plan else None,
        masks=None if is_plan else outcome,
        score=best.score,
        cost=cost,
        dense=problem.dense,
        budget=problem.budget,
        kept=dict(zip(names, best.counts, strict=True)),
        sizes=dict(zip(names, problem.sizes, strict=True)),
        history=tuple(history),
        seconds=seconds,
        own_seconds=own_seconds,
    )
