"""What AMC's agent sees of a decision: the eleven features of the paper."""

from typing import NamedTuple

import numpy as np

from jaxprune.search._problems import Counts, Decision, Problem


class State(NamedTuple):
    """The features of a decision, with the letters of the paper, each in [0, 1] over the decisions.

    A decision on a group of channels stands for the layers that read them. `t` to `k` are those of
    the first one, and `flops` is the sum of all.

    Example:
        >>> State._fields
        ('t', 'n', 'c', 'h', 'w', 'stride', 'k', 'flops', 'reduced', 'rest', 'a')
    """

    t: float  # number of the decision
    n: float  # output channels
    c: float  # input channels: those that the decision is about
    h: float  # height of the input
    w: float  # width of the input
    stride: float  # 0 for a dense layer
    k: float  # size of the window
    flops: float  # of the layers: their multiply-accumulates
    reduced: float  # share of the dense cost that is saved, with the floors of later decisions
    rest: float  # share of all FLOPs that later decisions are about
    a: float  # fraction that the decision before keeps; 1 at first


_STATIC = 8  # features that do not change during a search
_DYNAMIC = 3


def static_features(problem: Problem) -> np.ndarray:
    """Returns the features of each decision that do not change, scaled, float [decisions, 8].

    Args:
        problem: from `channels` or `weights`.

    Returns:
        `t` to `flops` of `State`: each scaled from its least to its largest value over the
        decisions, and 0 where all have the same.

    Example:
        >>> static_features(problem).shape
        (2, 8)
    """
    rows = np.array([_row(t, own) for t, own in enumerate(problem.decisions)], float)
    low, high = rows.min(0), rows.max(0)
    return (rows - low) / np.where(high > low, high - low, 1)


def state_of(
    problem: Problem, static: np.ndarray, rest: np.ndarray, counts: Counts, index: int
) -> np.ndarray:
    """Returns the state at a decision.

    Args:
        problem: from `channels` or `weights`.
        static: from `static_features`.
        rest: from `rest_of`.
        counts: what the earlier decisions keep, then the floors.
        index: of the decision.

    Returns:
        float32 [11], in the order of `State`.

    Example:
        >>> static, rest = static_features(problem), rest_of(problem)
        >>> State(*state_of(problem, static, rest, problem.floors, 0).tolist()).a
        1.0
    """
    reduced = (problem.dense - problem.cost(counts)) / problem.dense
    before = counts[index - 1] / problem.decisions[index - 1].size if index else 1.0
    return np.array([*static[index], reduced, rest[index], before], np.float32)


def rest_of(problem: Problem) -> np.ndarray:
    """Returns the share of the multiply-accumulates that later decisions are about, for each one.

    Args:
        problem: from `channels` or `weights`.

    Returns:
        float [decisions].

    Example:
        >>> rest_of(problem).tolist()[-1]
        0.0
    """
    macs = np.array([_macs(own) for own in problem.decisions], float)
    return (macs.sum() - np.cumsum(macs)) / max(macs.sum(), 1)


def _row(t: int, decision: Decision) -> tuple[float, ...]:
    first = next((own for own in decision.layers if own.groups == 1), None)
    if first is None:
        return (t, 0, decision.size, 0, 0, 0, 0, _macs(decision))
    return t, first.n, first.c, first.h, first.w, first.stride, first.k, _macs(decision)


def _macs(decision: Decision) -> int:
    return sum(own.macs for own in decision.layers)
