"""What a compiled program exchanges, what its arguments take and what it multiplies, from its text.

The text is that of `compiled.as_text()`: HLO after partitioning, so that all shapes are those on
one device.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?([\w.-]+) = (\S.*?) [\w-]+\(([^)]*)\)")
# The letters of a kernel's axes in `b01f_o01i->b01f`: of a library's convolution of any kind, too.
_CONVOLUTION = re.compile(r"dim_labels=\w+_(\w+)->")
_PRODUCT = re.compile(
    r"(?: dot\(.*lhs_contracting_dims=\{|\"lhs_contracting_dimensions\":\[)([^]}]*)"
)


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


def costs(text: str) -> dict[str, float]:
    """What `compiled.cost_analysis()` says, as far as the text tells it, for where it says nothing.

    FLOPs are those of convolutions, their padding included, and of matrix products. What is in a
    loop counts once.
    """
    macs = 0
    for lines in computations(text).values():
        arrays: dict[str, list[int]] = {}
        for line in lines:
            match = _INSTRUCTION.search(line)
            shape = match and _SHAPE.search(match[2])  # of several results, the first
            if match and shape:
                arrays[match[1]] = _dimensions(shape[2])
                macs += _macs(line, arrays, match[1], re.findall(r"%([\w.-]+)", match[3]))
    return {"flops": 2.0 * macs, "bytes accessed": math.nan}


def _macs(line: str, arrays: Mapping[str, list[int]], result: str, operands: Sequence[str]) -> int:
    """Multiply-accumulates of one operation."""
    if match := _CONVOLUTION.search(line):
        # Each entry of the forward result takes a kernel's worth of one output channel.
        outputs, kernel = result, operands[1]
        if "$convBackwardFilter" in line:
            outputs, kernel = operands[1], result
        elif "$convBackwardInput" in line:
            outputs = operands[0]
        channels = arrays[kernel][match[1].index("o")]
        return math.prod(arrays[outputs]) * math.prod(arrays[kernel]) // channels
    if match := _PRODUCT.search(line):
        axes = re.findall(r"\d+", match[1])
        return math.prod(arrays[result]) * math.prod(arrays[operands[0]][int(i)] for i in axes)
    return 0


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
