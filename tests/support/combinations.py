"""Fewer combinations than all: every value of every axis, but not every pair."""

import itertools
from collections.abc import Iterable
from typing import Any


def in_turn(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """As many combinations as the longest axis has values; the other axes are gone round.

    For axes that the code treats apart, so that a pair shows nothing that its values alone do not.

    Example:
        >>> in_turn(["a", "b", "c"], [1, 2])
        [('a', 1), ('b', 2), ('c', 1)]
    """
    values = [list(axis) for axis in axes]
    length = max(map(len, values))
    return list(itertools.islice(zip(*map(itertools.cycle, values)), length))
