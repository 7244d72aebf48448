"""What a compiled program exchanges between devices and what its arguments take, from its text.

The text is that of `compiled.as_text()`: HLO after partitioning, so that all shapes are those on
one device.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

KINDS = (
    "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# An asynchronous pair counts once, by its end: what begins it also has the operands as results.
_COLLECTIVE = re.compile(rf"= (\S.*?) ({'|'.join(KINDS)})(?:-done)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.-]+)")
_LISTED = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_PARAMETER = re.compile(r"= (\w+)\[([\d,]*)\](?:\{([^}]*)\})? parameter\((\d+)\)")


class Collective(NamedTuple):
    """An exchange between devices."""

    kind: str
    bytes: int  # of its results on one device, without padding
    sizes: tuple[int, ...]  # entries of each result
    source: str  # the operation that it is for, such as "jit(step)/jvp()/dot_general"; or ""
    conditional: bool  # whether it runs in a branch only


@dataclasses.dataclass(frozen=True)
class Argument:
    """An array that a program takes, or the part of it that one device has."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    padded: int  # bytes in memory, in the tiles of the layout


def collectives(text: str) -> list[Collective]:
    """All exchanges of a program; one in a loop is there once."""
    bodies = computations(text)
    conditional = in_branches(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None:
                continue
            shapes = _SHAPE.findall(match[1])
            sizes = tuple(math.prod(_dimensions(dimensions)) for _, dimensions in shapes)
            nbytes = sum(n * bits(dtype) // 8 for n, (dtype, _) in zip(sizes, shapes, strict=True))
            source = _SOURCE.search(line)
            found.append(
                Collective(
                    match[2], nbytes, sizes, source[1] if source else "", name in conditional
                )
            )
    return found


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a program."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []  # those before the first computation belong to none
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            lines = found.setdefault(head[1], [])
        else:
            lines.append(line)
    return found


def in_branches(bodies: dict[str, list[str]]) -> set[str]:
    """The computations that run in a branch of a `conditional` only, with all that they call."""
    calls = {name: [*_called(lines)] for name, lines in bodies.items()}
    reached: set[str] = set()
    waiting = [
        branch
        for lines in bodies.values()
        for branch in _called(line for line in lines if " conditional(" in line)
    ]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += calls.get(name, [])
    return reached


def _called(lines: Iterable[str]) -> Iterator[str]:
    """Names of the computations that lines call."""
    for line in lines:
        yield from _CALLED.findall(line)
        for names in _LISTED.findall(line):
            yield from (name.strip().removeprefix("%") for name in names.split(","))


def arguments(text: str) -> list[Argument]:
    """The arguments of a program, in order; those that it does not use may be missing."""
    entry = re.search(r"^ENTRY %?([\w.-]+) ", text, re.M)
    lines = computations(text)[entry[1]] if entry else []
    found = {}
    for dtype, dimensions, layout, number in _PARAMETER.findall("\n".join(lines)):
        shape = tuple(_dimensions(dimensions))
        nbytes, padded = (n * bits(dtype) // 8 for n in (math.prod(shape), in_tiles(shape, layout)))
        found[int(number)] = Argument(dtype, shape, nbytes, padded)
    return [argument for _, argument in sorted(found.items())]


def in_tiles(shape: Sequence[int], layout: str) -> int:
    """Entries of an array in memory; a TPU fills up tiles.

    Args:
        shape: of the array.
        layout: what the text has in braces, such as `3,2,1,0:T(8,128)`: the order of dimensions,
            the fastest first, and the tile of the fastest ones. Tiles inside of a tile move entries
            but add none.
    """
    order, _, rest = layout.partition(":")
    slow_to_fast = [shape[axis] for axis in reversed(_dimensions(order))]
    tile = re.search(r"T\(([\d,]+)\)", rest)
    if tile is None:
        return math.prod(shape)
    sides = _dimensions(tile[1])
    sizes = [1] * (len(sides) - len(slow_to_fast)) + slow_to_fast
    rounded = [-(-size // side) * side for size, side in zip(sizes[-len(sides) :], sides)]
    return math.prod(sizes[: -len(sides)]) * math.prod(rounded)


def bits(dtype: str) -> int:
    """Of an entry; what has no size, such as a token, has 0."""
    number = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(number[0]) if number else 0


def _dimensions(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]
