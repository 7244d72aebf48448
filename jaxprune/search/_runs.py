"""The one driver of all searches: scores what a search proposes, and keeps a journal."""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.search._found import Evaluation, Found, found_of
from jaxprune.search._journal import Journal, header_of, open_journal
from jaxprune.search._problems import Counts, Problem

Evaluate = Callable[[Any], Any]
# Yields lists of candidates, and receives the list of their scores
Proposals = Generator[Sequence[Counts], list[float], None]
# (score, cost) -> what the search maximizes
Reward = Callable[[float, float], float]


def accuracy(score: float, cost: float) -> float:
    """The reward for a fixed budget: the score itself; the wall keeps the budget.

    Args:
        score: what `evaluate` returns.
        cost: of the candidate.

    Returns:
        The reward.

    Example:
        >>> accuracy(0.9, 1000)
        0.9
    """
    del cost
    return score


def guaranteed_accuracy(score: float, cost: float) -> float:
    """The reward that shrinks a network as far as its accuracy allows: `-(1 - score) * ln(cost)`.

    Use it with `budget=1`, where the wall never binds.

    Args:
        score: an accuracy in [0, 1].
        cost: of the candidate, above 1, such as its multiply-accumulates.

    Returns:
        The reward.

    References:
        He et al., AMC, arXiv:1802.03494: R = -Error * log(FLOPs).

    Example:
        >>> round(guaranteed_accuracy(0.9, 1000), 3)
        -0.691
    """
    return -(1 - score) * math.log(cost)


def run(
    problem: Problem,
    evaluate: Evaluate,
    proposals: Proposals,
    *,
    name: str,
    settings: Mapping[str, Any] | None = None,
    reward: Reward = accuracy,
    journal: str | Path | None = None,
    at_once: int = 1,
    on_evaluation: Callable[[Evaluation, Evaluation], None] | None = None,
) -> Found:
    """Runs a search: scores what it proposes until it ends, and returns the best that fits.

    A search is a generator that yields lists of candidates and is sent the list of their scores; it
    must depend on nothing else. So a search that was killed resumes by itself: it starts again, is
    sent the scores that the journal has, and evaluates from there on. A candidate that comes up
    again counts as an evaluation and has the same score.

    Args:
        problem: from `channels` or `weights`.
        evaluate: function from masked variables, at dense shapes, to one finite number: such as the
            accuracy on held-out training images. Compile it with `jax.jit`: masks are data, so one
            program serves all candidates. It must return the same number for the same variables.
        proposals: the search.
        name: of the search, for the journal and the table.
        settings: what the proposals depend on besides the problem, JSON-ready; a journal with other
            settings is refused.
        reward: what is maximized, of score and cost: `accuracy` or `guaranteed_accuracy`.
        journal: a file to which each evaluation is appended. If it exists, the search resumes.
        at_once: number of candidates that `jax.vmap` evaluates together; `evaluate` must then be a
            function that JAX can trace.
        on_evaluation: function `(evaluation, best so far)`, called after each.

    Returns:
        A `Found`.

    Raises:
        ValueError: if `evaluate` returns no finite number, or the journal is damaged or belongs to
            a different search.

    Example:
        >>> def halves(problem):  # a search of one round
        ...     scores = yield [within(problem, [part] * len(problem.decisions)) for part in (0, 1)]
        >>> found = run(problem, evaluate, halves(problem), name="halves")
        >>> len(found.history)
        2
    """
    if not isinstance(at_once, int) or at_once < 1:
        raise ValueError(f"`at_once` must be an integer of at least 1, but is {at_once!r}.")
    began = time.perf_counter()
    known: dict[Counts, Any] = {}
    history: list[Evaluation] = []
    best: Evaluation | None = None
    seconds = 0.0
    score_all = _scorer(problem, evaluate, at_once)
    with contextlib.closing(proposals), _journal(journal, problem, name, settings) as book:
        for candidates in _rounds(proposals, known):
            for some in _parts(candidates, at_once):
                fresh = [own for own in dict.fromkeys(some) if own not in known]
                scores = [book.replay(len(history) + some.index(own), own) for own in fresh]
                if None in scores:  # all of them, so that a resumed search rounds in the same way
                    start = time.perf_counter()
                    scores = score_all(fresh)
                    seconds += time.perf_counter() - start
                known |= dict(zip(fresh, scores, strict=True))
                for own in some:
                    cost = problem.cost(own)
                    value = reward(known[own], cost)
                    history.append(Evaluation(own, known[own], cost, value))
                    book.append(len(history) - 1, own, known[own])
                    if problem.fits(own) and (best is None or value > best.reward):
                        best = history[-1]
                    if on_evaluation is not None and best is not None:
                        on_evaluation(history[-1], best)
    if best is None:
        raise ValueError(
            f"the search {name!r} proposed no candidate that fits the budget in "
            f"{len(history)} evaluations; allow more evaluations."
        )
    own_seconds = time.perf_counter() - began - seconds
    return found_of(problem, name, best, history, seconds, own_seconds)


def _rounds(proposals: Proposals, known: Mapping[Counts, float]) -> Iterator[Sequence[Counts]]:
    """Yields what a search proposes, and sends it the scores once they are known."""
    try:
        candidates = next(proposals)
        while True:
            yield candidates
            candidates = proposals.send([known[own] for own in candidates])
    except StopIteration:
        return


def _parts(candidates: Sequence[Counts], size: int) -> Iterator[Sequence[Counts]]:
    for start in range(0, len(candidates), size):
        yield candidates[start : start + size]


@contextlib.contextmanager
def _journal(
    path: str | Path | None, problem: Problem, name: str, settings: Mapping[str, Any] | None
) -> Iterator[Journal]:
    with contextlib.ExitStack() as stack:
        book = Journal(())
        if path is not None:
            book = stack.enter_context(open_journal(path, header_of(problem, name, settings or {})))
        yield book


def _scorer(
    problem: Problem, evaluate: Evaluate, at_once: int
) -> Callable[[Sequence[Counts]], list[float]]:
    """Returns a function that scores candidates; each of its programs is compiled once."""
    masked = jax.jit(problem.masked) if _is_arrays(problem.variables) else problem.masked
    refit = problem.refit or (lambda counts: problem.variables)

    def score(counts: Counts) -> float:
        return _number(evaluate(masked(refit(counts), jnp.asarray(counts, jnp.int32))), counts)

    if at_once == 1:
        return lambda candidates: [score(own) for own in candidates]
    axis = None if problem.refit is None else 0

    @jax.jit
    def together(variables: Any, counts: Any) -> Any:
        one = lambda variables, counts: evaluate(problem.masked(variables, counts))  # noqa: E731
        return jax.vmap(one, in_axes=(axis, 0))(variables, counts)

    def scores(candidates: Sequence[Counts]) -> list[float]:
        # The last part is filled up, so that it needs no program of its own.
        full = [*candidates, *[candidates[-1]] * (at_once - len(candidates))]
        variables = problem.variables
        if problem.refit is not None:
            fitted = {own: refit(own) for own in dict.fromkeys(full)}
            variables = jax.tree.map(lambda *x: jnp.stack(x), *[fitted[own] for own in full])
        values = np.asarray(together(variables, jnp.asarray(full, jnp.int32)))
        if values.shape != (at_once,):
            values = values.reshape(at_once, -1) if values.ndim else np.full((at_once, 2), values)
        return [_number(value, own) for value, own in zip(values, candidates, strict=False)]

    return scores


def _is_arrays(tree: Any) -> bool:
    return all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(tree))


def _number(value: Any, counts: Counts) -> float:
    """Returns the score of a candidate as a number; raises if it is none."""
    shape = np.shape(value)
    if shape != ():
        raise ValueError(
            f"`evaluate` must return one number, but returned an array of shape {shape}; return "
            "its mean, such as the accuracy over all images."
        )
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`evaluate` must return one number, but returned {type(value).__name__}."
        ) from error
    if not math.isfinite(number):
        raise ValueError(
            f"`evaluate` must return a finite number, but returned {number} for the candidate "
            f"{list(counts)}; return the worst score instead where a network computes NaN."
        )
    return number
