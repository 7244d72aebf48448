"""Room for the kept weights of each layer, in steps, so that few masks need another program."""

import math
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Choice", "capacity_of", "still_fits"]

_STEPS = 8  # capacities are powers of 2 ** (1 / _STEPS)
_SPARE = 1.05  # room for layers that gain weights from others
_FEWER = 1.5  # the layers are chosen again when this factor fewer or more weights are kept


class Choice(NamedTuple):
    """The layers that have a sparse kernel, and how many kept weights each has room for.

    Example:
        >>> Choice({"hidden/kernel": 256}, 900).capacities
        {'hidden/kernel': 256}
    """

    capacities: dict[str, int]  # by layer
    kept: int  # weights of all layers that were kept when this was chosen


def capacity_of(count: int, size: int) -> int:
    """Returns the room for kept weights: 5 % more, rounded up to an eighth of an octave.

    Args:
        count: kept weights.
        size: all weights of the layer, which are always room enough.

    Returns:
        An integer of at least `count`, and at least 1.

    Example:
        >>> [capacity_of(count, 10_000) for count in (1000, 1010, 9900)]
        [1117, 1117, 10000]
    """
    steps = math.ceil(_STEPS * math.log2(max(1.0, count * _SPARE)))
    return max(1, count, min(size, math.ceil(2 ** (steps / _STEPS))))


def still_fits(choice: Choice, counts: Mapping[str, int]) -> bool:
    """Tells whether new masks can use the program of a choice, and whether they should.

    A different choice is a different program. Layers cross their steps at different times during a
    gradual ramp; therefore they are all chosen again together, once the number of kept weights has
    changed by half: six times on the way to a density of 0.1.

    Args:
        choice: the present choice.
        counts: kept weights of every layer that could have a sparse kernel.

    Returns:
        A bool.

    Example:
        >>> choice = Choice({"w": 100}, 90)
        >>> [still_fits(choice, {"w": count}) for count in (90, 101, 70, 50)]
        [True, False, True, False]
    """
    total = sum(counts.values())
    has_room = all(counts.get(name, 0) <= room for name, room in choice.capacities.items())
    return has_room and choice.kept <= _FEWER * total and total <= _FEWER * max(1, choice.kept)
