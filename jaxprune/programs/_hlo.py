"""Reads the text of a compiled program: its exchanges, the sizes of its arguments, its FLOPs.

The text is that of `compiled.as_text()`: HLO after partitioning, so all shapes are those on one
device.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

# Collective operations: what devices exchange.
KINDS = (
    "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# Count an asynchronous pair once, by its end: the results of its start include the operands.
_COLLECTIVE = re.compile(rf"= (\S.*?) ({'|'.join(KINDS)})(?:-done)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_SOURCE = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.-]+)")
_LISTED = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_PARAMETER = re.compile(r"= (\w+)\[([\d,]*)\](?:\{([^}]*)\})? parameter\((\d+)\)")
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?([\w.-]+) = (\S.*?) [\w-]+\(([^)]*)\)")
# Finds the letters of the kernel's axes in `b01f_o01i->b01f`, also in a library's convolution.
_CONVOLUTION = re.compile(r"dim_labels=\w+_(\w+)->")
_PRODUCT = re.compile(
    r"(?: dot\(.*lhs_contracting_dims=\{|\"lhs_contracting_dimensions\":\[)([^]}]*)"
)


class Collective(NamedTuple):
    """An exchange between devices.

    Example:
        >>> Collective("all-reduce", 32, (8,), "jit(step)/add", False).kind in KINDS
        True
    """

    kind: str  # one of `KINDS`
    bytes: int  # bytes of its results on one device, without padding
    sizes: tuple[int, ...]  # number of entries of each result
    source: str  # the operation that needs it, such as "jit(step)/jvp()/dot_general"; or ""
    conditional: bool  # whether it runs only in a branch


@dataclasses.dataclass(frozen=True)
class Argument:
    """An array that a program takes, or the part of it on one device.

    Example:
        >>> Argument("f32", (2, 3), 24, 4096).padded  # one tile of 8 x 128 entries on a TPU
        4096
    """

    dtype: str  # as in the text, such as "f32"
    shape: tuple[int, ...]
    bytes: int  # bytes of its entries
    padded: int  # bytes in memory, including the padding of tiles


def collectives(text: str) -> list[Collective]:
    """Lists the exchanges of a program; one in a loop is listed once.

    Args:
        text: `compiled.as_text()`.

    Returns:
        The exchanges in the order of the text.

    Example:
        >>> text = '''
        ... ENTRY %main (p: f32[8]) -> f32[8] {
        ...   ROOT %sum = f32[8]{0} all-reduce(%p), metadata={op_name="jit(step)/add"}
        ... }'''
        >>> [found] = collectives(text)
        >>> found.kind, found.bytes, found.source
        ('all-reduce', 32, 'jit(step)/add')
    """
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
    """Maps the name of each computation of a program to its lines."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []  # lines before the first computation belong to none
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            lines = found.setdefault(head[1], [])
        else:
            lines.append(line)
    return found


def in_branches(bodies: dict[str, list[str]]) -> set[str]:
    """Finds the branches of each `conditional`, and all computations that they call."""
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
    """Yields the names of the computations that lines call."""
    for line in lines:
        yield from _CALLED.findall(line)
        for names in _LISTED.findall(line):
            yield from (name.strip().removeprefix("%") for name in names.split(","))


def arguments(text: str) -> list[Argument]:
    """Lists the arguments of a program in order; unused ones may be missing.

    Args:
        text: `compiled.as_text()`.

    Returns:
        The arguments of the entry computation, on one device.

    Example:
        >>> text = '''
        ... ENTRY %main (p: f32[2,3]) -> f32[2,3] {
        ...   ROOT %p = f32[2,3]{1,0} parameter(0)
        ... }'''
        >>> arguments(text)
        [Argument(dtype='f32', shape=(2, 3), bytes=24, padded=24)]
    """
    entry = re.search(r"^ENTRY %?([\w.-]+) ", text, re.M)
    lines = computations(text)[entry[1]] if entry else []
    found = {}
    for dtype, dimensions, layout, number in _PARAMETER.findall("\n".join(lines)):
        shape = tuple(_dimensions(dimensions))
        nbytes, padded = (n * bits(dtype) // 8 for n in (math.prod(shape), in_tiles(shape, layout)))
        found[int(number)] = Argument(dtype, shape, nbytes, padded)
    return [argument for _, argument in sorted(found.items())]


def costs(text: str) -> dict[str, float]:
    """Estimates `compiled.cost_analysis()` from the text, for devices where it returns nothing.

    Args:
        text: `compiled.as_text()`.

    Returns:
        `"flops"`: two for each multiply-accumulate of convolutions (padding included) and matrix
        products, where the body of a loop counts once; and `"bytes accessed"`: NaN, as the text
        does not tell.

    Example:
        >>> text = '''
        ... ENTRY %main (a: f32[2,3], b: f32[3,4]) -> f32[2,4] {
        ...   %a = f32[2,3]{1,0} parameter(0)
        ...   %b = f32[3,4]{1,0} parameter(1)
        ...   ROOT %c = f32[2,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}
        ... }'''
        >>> costs(text)["flops"]
        48.0
    """
    macs = 0
    for lines in computations(text).values():
        arrays: dict[str, list[int]] = {}
        for line in lines:
            match = _INSTRUCTION.search(line)
            if match is None:
                continue
            shape = _SHAPE.search(match[2])  # the shape of the first result
            if shape:
                arrays[match[1]] = _dimensions(shape[2])
                macs += _macs(line, arrays, match[1], re.findall(r"%([\w.-]+)", match[3]))
    return {"flops": 2.0 * macs, "bytes accessed": math.nan}


def _macs(line: str, arrays: Mapping[str, list[int]], result: str, operands: Sequence[str]) -> int:
    """Counts the multiply-accumulates of one operation."""
    if match := _CONVOLUTION.search(line):
        # An entry of the forward result takes the products of the kernel for one output channel.
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
    """Counts the entries that an array takes in memory; a TPU pads the last tile.

    Args:
        shape: shape of the array.
        layout: the text in braces after the shape, such as `3,2,1,0:T(8,128)`: the order of
            dimensions, the fastest first, and the tile of the fastest ones. Tiles inside a tile
            move entries but add none.

    Returns:
        The number of entries, padding included.

    Example:
        >>> in_tiles((2, 3), "1,0:T(8,128)"), in_tiles((2, 3), "1,0")
        (1024, 6)
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
    """Returns the number of bits of an entry; 0 for a type without a size, such as a token.

    Args:
        dtype: a type as in HLO, such as `"bf16"` or `"pred"`.

    Returns:
        The number of bits in memory.

    Example:
        >>> bits("bf16"), bits("pred"), bits("token")
        (16, 8, 0)
    """
    number = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(number[0]) if number else 0


def _dimensions(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]
