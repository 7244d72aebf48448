"""Room for the kept weights of each layer, in steps, so that few masks need another program."""

import math
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Capacities", "capacity_of", "still_fit"]

_STEPS = 8  # capacities are powers of 2 ** (1 / _STEPS)
_SPARE = 1.05  # room for layers that gain weights from others
_FACTOR = 1.5  # all layers are chosen again when this factor fewer or more weights are kept


class Capacities(NamedTuple):
    """The layers that have a sparse kernel, and how many kept weights each has room for.

    Example:
        >>> Capacities({"hidden/kernel": 256}, kept=900).by_layer
        {'hidden/kernel': 256}
    """

    by_layer: dict[str, int]
    kept: int  # weights of all layers, with a kernel or not, that were kept at this choice


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


def still_fit(capacities: Capacities, counts: Mapping[str, int]) -> bool:
    """Tells whether new masks can use the program of these capacities, and whether they should.

    Different capacities are a different program. Layers cross their steps at different times during
    a gradual ramp; therefore they are all chosen again together, once the number of kept weights
    has changed by half: six times on the way to a density of 0.1.

    Args:
        capacities: the present ones.
        counts: kept weights of every layer that could have a sparse kernel.

    Returns:
        A bool.

    Example:
        >>> capacities = Capacities({"w": 100}, 90)
        >>> [still_fit(capacities, {"w": count}) for count in (90, 101, 70, 50)]
        [True, False, True, False]
    """
    total = sum(counts.values())
    has_room = all(counts.get(name, 0) <= room for name, room in capacities.by_layer.items())
    close = capacities.kept <= _FACTOR * total and total <= _FACTOR * max(1, capacities.kept)
    return has_room and close
