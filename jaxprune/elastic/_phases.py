"""Phases of progressive shrinking, and the sub-networks that each step trains."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.elastic._space import Choice, Decision, draw, largest, smallest

ALL = 1 << 30  # all options of a kind are open


class Phase(NamedTuple):
    """A part of the training in which some decisions vary.

    Example:
        >>> Phase("depth", 1000, 2, 0.01, {"kernel": ALL, "depth": 2}).teaches
        True
    """

    name: str
    steps: int
    networks: int  # sub-networks a step; their gradients are added up
    learning_rate: float  # the peak; it falls to 0 by a half cosine
    options: Mapping[str, int]  # kind of a decision -> number of its largest options to draw from
    warmup: int = 0  # steps in which the rate rises
    sort: bool = False  # whether channels are sorted before it
    teaches: bool = True  # whether the full network as it was after the first phase is the teacher
    sandwich: bool = False  # whether each step trains the largest and the smallest, and draws

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, counted from the start of the phase."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * self.learning_rate * (1 + float(np.cos(np.pi * done)))


class _Row(NamedTuple):
    """A phase as published, relative to the training of the full network."""

    name: str
    epochs: float
    networks: int
    rate: float  # relative to the peak of the full network
    kernel: int
    depth: int
    width: int
    warmup: float = 0.0  # fraction of its steps


# Epochs and rates of the authors' code (train_ofa_net.py): 180 epochs at 2.6 / 32 for each GPU for
# the full network, then 3e-2, 2.5e-3 and 7.5e-3.
_FULL = 2.6 / 32
_ROWS = (
    _Row("full", 180, 1, 1.0, 1, 1, 1),
    _Row("kernel", 120, 1, 3e-2 / _FULL, ALL, 1, 1, 5 / 120),
    _Row("depth 1", 25, 2, 2.5e-3 / _FULL, ALL, 2, 1),
    _Row("depth 2", 120, 2, 7.5e-3 / _FULL, ALL, ALL, 1, 5 / 120),
    _Row("width 1", 25, 4, 2.5e-3 / _FULL, ALL, ALL, 2),
    _Row("width 2", 120, 4, 7.5e-3 / _FULL, ALL, ALL, ALL, 5 / 120),
)
_SANDWICH = (_ROWS[0], _Row("sandwich", 410, 4, 7.5e-3 / _FULL, ALL, ALL, ALL, 5 / 120))


def phases(
    decisions: Sequence[Decision],
    steps: int,
    *,
    learning_rate: float = 0.1,
    networks: int = 4,
    sandwich: bool = False,
) -> tuple[Phase, ...]:
    """Plans the training: the full network, then kernels, depth and width, as published.

    The phases share the steps like the published epochs: 180, 120, 25, 120, 25 and 120. Phases that
    open no further option are left out, and the others share their steps. Resolutions vary from the
    start.

    Args:
        decisions: those of the space.
        steps: total number of steps of the optimizer.
        learning_rate: peak for the full network; the later phases have 0.37, 0.03 and 0.09 of it,
            as published.
        networks: highest number of sub-networks a step; published are 1 for kernels, 2 for depth, 4
            for width. A sub-network costs as much as a step of the full network.
        sandwich: replaces the phases after the first by a single one, in which each step trains the
            largest and the smallest network, and as many others as `networks` allows.

    Returns:
        The phases in their order.

    Raises:
        ValueError: if there are fewer steps than phases, or a number is out of range.

    References:
        Cai et al. Once-for-All. arXiv:1908.09791.
        Yu, Huang. Universally slimmable networks (the sandwich rule). arXiv:1903.05134.

    Example:
        >>> decisions = [Decision("s", "depth", (0, 1, 2)), Decision("w", "width", (4, 8))]
        >>> [(own.name, own.steps, own.networks) for own in phases(decisions, 1000)]
        [('full', 404, 1), ('depth 1', 57, 2), ('depth 2', 269, 2), ('width 1', 270, 4)]
    """
    low = 2 if sandwich else 1
    if networks < low or learning_rate <= 0:
        raise ValueError(
            f"`networks` must be at least {low} and `learning_rate` above 0; got {networks} and "
            f"{learning_rate}."
        )
    rows: list[_Row] = []
    for row in _SANDWICH if sandwich else _ROWS:
        if rows and _open(decisions, row) == _open(decisions, rows[-1]):
            continue
        rows.append(row)
    weights = [row.epochs for row in rows]
    # A kind that has two options is all open after its first phase, which then is its only one.
    for index, row in enumerate(rows):
        is_only = index + 1 == len(rows) or rows[index + 1].name[:5] != row.name[:5]
        if row.name.endswith(" 1") and is_only:
            second = _ROWS[_ROWS.index(row) + 1]
            weights[index] = second.epochs
            rows[index] = row._replace(rate=second.rate, warmup=second.warmup)
    if steps < len(rows):
        raise ValueError(f"`steps` must be at least {len(rows)}, one for each phase; got {steps}.")
    stops = np.round(np.cumsum(weights) / sum(weights) * steps)
    lengths = np.maximum(np.diff(stops, prepend=0), 1).astype(int)
    while lengths.sum() > steps:  # phases that had none took one
        lengths[np.argmax(lengths)] -= 1
    return tuple(
        Phase(
            name=row.name,
            steps=int(length),
            networks=max(low, min(row.networks, networks)) if index else 1,
            learning_rate=learning_rate * row.rate,
            options={"kernel": row.kernel, "depth": row.depth, "width": row.width},
            warmup=round(row.warmup * int(length)),
            sort=row.width > 1,
            teaches=index > 0,
            sandwich=sandwich and index > 0,
        )
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True))
    )


def _open(decisions: Sequence[Decision], row: _Row) -> list[int]:
    """Returns how many options of each decision a phase draws from."""
    counts = {"kernel": row.kernel, "depth": row.depth, "width": row.width}
    return [min(len(own.options), counts.get(own.kind, ALL)) for own in decisions]


def sub_networks(
    decisions: Sequence[Decision], phase: Phase, seed: int, step: int
) -> tuple[Choice, ...]:
    """Draws the sub-networks of a step.

    They depend on the seed, the step and their number alone, so all processes draw the same, and a
    run that resumes draws what it would have drawn.

    Args:
        decisions: those of the space.
        phase: the phase that the step lies in.
        seed: of the run.
        step: number of the step in the whole training.

    Returns:
        A choice for each sub-network.

    Example:
        >>> decisions = [Decision("w", "width", (2, 4, 6, 8))]
        >>> phase = Phase("width 1", 10, 3, 0.1, {"width": 2})
        >>> sub_networks(decisions, phase, seed=0, step=7)  # two largest options
        ((3,), (3,), (3,))
    """
    counts = [
        min(len(own.options), ALL if own.kind == "resolution" else phase.options.get(own.kind, 1))
        for own in decisions
    ]
    # Drawing from fewer options and moving the result up leaves the smallest ones out.
    some = [
        own._replace(options=own.options[-n:]) for own, n in zip(decisions, counts, strict=True)
    ]

    def one(number: int) -> Choice:
        rng = np.random.default_rng([seed, step, number])
        drawn = draw(some, rng)
        if phase.sandwich and number < 2:
            ends = largest(some) if number == 0 else smallest(some)
            drawn = tuple(
                own if decision.kind != "resolution" else index
                for decision, own, index in zip(decisions, ends, drawn, strict=True)
            )
        moved = zip(decisions, counts, drawn, strict=True)
        return tuple(len(own.options) - n + index for own, n, index in moved)

    return tuple(one(number) for number in range(phase.networks))


def trained_widths(
    decisions: Sequence[Decision], units: Sequence[Sequence[str]], phase: Phase | None
) -> dict[str, tuple[int, ...]]:
    """Returns the widths of each group that a phase has trained, for `sort_channels(buckets=...)`.

    Example:
        >>> decisions = [Decision("w", "width", (2, 4, 6, 8))]
        >>> trained_widths(decisions, [["w"]], Phase("width 1", 10, 3, 0.1, {"width": 2}))
        {'w': (6,)}
    """
    count = 1 if phase is None else phase.options.get("width", 1)
    return {
        name: own.options[-min(count, len(own.options)) :][:-1]
        for own, names in zip(decisions, units, strict=True)
        if own.kind == "width"
        for name in names
    }
