"""Decisions of an elastic network, and choices: one option for each decision."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune import trees

KINDS = ("width", "depth", "kernel", "resolution")

# One index into the options of each decision, in their order
Choice = tuple[int, ...]


class Decision(NamedTuple):
    """A part of an elastic network that may vary.

    The options are numbers of channels (the first ones are kept), numbers of skippable blocks of a
    stage (the first ones are kept), windows of a convolution, or pixels of the images.

    Example:
        >>> Decision("stage1", "depth", (0, 1, 2)).options[-1]
        2
    """

    name: str  # such as "stage2", "blocks/3/conv1/kernel:3" or "resolution"
    kind: str  # "width", "depth", "kernel" or "resolution"
    options: tuple[int, ...]  # from the smallest to the largest
    # The depth decision whose blocks this decision lies in, and the number of the block among them:
    # the decision is without effect while the stage keeps at most `place` blocks.
    stage: str = ""
    place: int = 0


def count(decisions: Sequence[Decision]) -> int:
    """Counts the different sub-networks of a space.

    Decisions inside of skipped blocks are without effect and do not count.

    Args:
        decisions: those of the space.

    Returns:
        An exact integer.

    Raises:
        ValueError: as for `check_decisions`.

    Example:
        >>> depth = Decision("stage", "depth", (1, 2))
        >>> widths = [Decision(f"b{i}", "width", (4, 6, 8), "stage", i) for i in range(2)]
        >>> count([depth, *widths])  # 3 with one block, 3 * 3 with two
        12
    """
    check_decisions(decisions)
    total = 1
    for decision in decisions:
        if decision.kind == "depth":
            inner = [own for own in decisions if own.stage == decision.name]
            total *= sum(
                math.prod(len(own.options) for own in inner if own.place < kept)
                for kept in decision.options
            )
        elif not decision.stage:
            total *= len(decision.options)
    return total


def draw(decisions: Sequence[Decision], rng: np.random.Generator) -> Choice:
    """Draws a choice: every option of a decision is equally likely.

    Args:
        decisions: those of the space.
        rng: a generator of NumPy, so that all processes draw the same from the same seed.

    Returns:
        The choice.

    Example:
        >>> draw([Decision("width", "width", (4, 8))], np.random.default_rng(0))
        (1,)
    """
    return tuple(int(rng.integers(len(decision.options))) for decision in decisions)


def smallest(decisions: Sequence[Decision]) -> Choice:
    """Returns the choice with the first option of each decision.

    Example:
        >>> smallest([Decision("width", "width", (4, 8))])
        (0,)
    """
    return (0,) * len(decisions)


def largest(decisions: Sequence[Decision]) -> Choice:
    """Returns the choice with the last option of each decision: the full network.

    Example:
        >>> largest([Decision("width", "width", (4, 8))])
        (1,)
    """
    return tuple(len(decision.options) - 1 for decision in decisions)


def used(decisions: Sequence[Decision], choice: Choice) -> tuple[bool, ...]:
    """Tells which decisions have an effect: those that lie in no skipped block.

    Args:
        decisions: those of the space.
        choice: one index for each.

    Returns:
        A bool for each decision.

    Raises:
        ValueError: as for `check`.

    Example:
        >>> decisions = [Decision("s", "depth", (0, 1)), Decision("w", "width", (4, 8), "s", 0)]
        >>> used(decisions, (0, 1))
        (True, False)
    """
    check(decisions, choice)
    depths = {
        own.name: own.options[index]
        for own, index in zip(decisions, choice, strict=True)
        if own.kind == "depth"
    }
    return tuple(not own.stage or own.place < depths[own.stage] for own in decisions)


def canonical(decisions: Sequence[Decision], choice: Choice) -> Choice:
    """Sets decisions without effect to their largest option.

    Two choices give the same network exactly if these are equal.

    Args:
        decisions: those of the space.
        choice: one index for each.

    Returns:
        A choice of the same network.

    Raises:
        ValueError: as for `check`.

    Example:
        >>> decisions = [Decision("s", "depth", (0, 1)), Decision("w", "width", (4, 8), "s", 0)]
        >>> canonical(decisions, (0, 0))
        (0, 1)
    """
    own = zip(choice, used(decisions, choice), largest(decisions), strict=True)
    return tuple(index if is_used else last for index, is_used, last in own)


def describe(decisions: Sequence[Decision], choice: Choice) -> dict[str, int]:
    """Names what a choice means.

    Args:
        decisions: those of the space.
        choice: one index for each.

    Returns:
        Name of a decision -> chosen option; decisions inside of skipped blocks are left out.

    Raises:
        ValueError: as for `check`.

    Example:
        >>> describe([Decision("width", "width", (4, 8))], (1,))
        {'width': 8}
    """
    own = zip(decisions, choice, used(decisions, choice), strict=True)
    return {decision.name: decision.options[index] for decision, index, is_used in own if is_used}


def check(decisions: Sequence[Decision], choice: Any) -> None:
    """Raises unless a choice lies in the space.

    Args:
        decisions: those of the space.
        choice: what must be one index into the options of each.

    Raises:
        ValueError: if it has another length or an index is out of range; it lists all of them.

    Example:
        >>> check([Decision("width", "width", (4, 8))], (1,))
    """
    if not isinstance(choice, (tuple, list)) or len(choice) != len(decisions):
        raise ValueError(
            f"`choice` must be a tuple of {len(decisions)} indices, one for each decision of the "
            f"space, but is {choice!r}."
        )
    problems = [
        f"{own.name}: {index!r}, must be 0 to {len(own.options) - 1} for the options {own.options}"
        for own, index in zip(decisions, choice, strict=True)
        if isinstance(index, bool)
        or not isinstance(index, (int, np.integer))
        or not 0 <= index < len(own.options)
    ]
    trees.raise_for(problems, "`choice` must lie in the space:")


def check_decisions(decisions: Sequence[Decision]) -> None:
    """Raises unless decisions are well formed.

    Args:
        decisions: those of a space.

    Raises:
        ValueError: if a name is used twice, a kind is unknown, options are not increasing, or a
            stage is no depth decision; it lists all of them.

    Example:
        >>> check_decisions([Decision("width", "width", (4, 8))])
    """
    problems, names = [], [own.name for own in decisions]
    depths = {own.name for own in decisions if own.kind == "depth"}
    for own in decisions:
        least = 0 if own.kind == "depth" else 1
        if names.count(own.name) > 1:
            problems.append(f"{own.name}: names two decisions")
        if own.kind not in KINDS:
            problems.append(f"{own.name}: kind {own.kind!r}, must be one of {', '.join(KINDS)}")
        if not own.options or list(own.options) != sorted({*own.options}) or own.options[0] < least:
            problems.append(
                f"{own.name}: options {own.options}, must be integers from {least} on that increase"
            )
        if own.stage and (own.stage not in depths or own.kind in ("depth", "resolution")):
            problems.append(f"{own.name}: stage {own.stage!r}, must be a depth decision")
    trees.raise_for(problems, "`decisions` must describe what may vary:")
