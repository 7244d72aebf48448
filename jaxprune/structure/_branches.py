"""Finds sums of a value and something computed from it, and what only such a branch needs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxprune.structure._rules.elementwise import IDENTITIES
from jaxprune.structure._values import Graph, Op, Value
from jaxprune.structure._zeros import ADDS, CALLS

# A stream remains one through these, and through products with a number.
_SAME = IDENTITIES | frozenset("convert_element_type reduce_precision copy copy_p".split())
_SCALES = frozenset("mul div".split())


class Residual(NamedTuple):
    """A sum whose one operand, the branch, is computed from the other, the stream.

    Example:
        >>> Residual(Op("add", None, {}, [], [], ""), Value(None), Value(None)).op.name
        'add'
    """

    op: Op
    stream: Value
    branch: Value


class Flat(NamedTuple):
    """A graph in which rematerialised functions are part of it; loops remain single operations.

    Example:
        >>> flat(Graph([], [], [])).adds
        []
    """

    sources: dict[int, Sequence[Value]]  # id of a value -> what it is computed from
    order: dict[int, int]  # id of a value -> its position; it comes after what it is computed from
    inputs: dict[int, int]  # id of a value -> the inputs that it depends on, as bits
    adds: list[Op]


def flat(graph: Graph) -> Flat:
    """Flattens a graph."""
    view = Flat({}, {}, {}, [])
    for place, value in enumerate(graph.ins):
        view.order[id(value)], view.inputs[id(value)] = 0, 1 << place
    _flatten(view, graph)
    return view


def _flatten(view: Flat, graph: Graph) -> None:
    def computed(value: Value, sources: Sequence[Value]) -> None:
        if id(value) in view.order:
            return
        view.sources[id(value)], view.order[id(value)] = sources, len(view.order)
        inputs = 0
        for source in sources:
            inputs |= view.inputs.get(id(source), 0)
        view.inputs[id(value)] = inputs

    for op in graph.ops:
        if op.name in CALLS:
            inner = op.inner["call"]
            for value, operand in zip(inner.ins, op.ins, strict=True):
                computed(value, [operand])
            _flatten(view, inner)
            for out, value in zip(op.outs, inner.outs, strict=True):
                computed(out, [value])
        else:
            for out in op.outs:
                computed(out, op.ins)
            if op.name in ADDS:
                view.adds.append(op)


def residuals(view: Flat, places: set[int] | frozenset[int]) -> Iterator[Residual]:
    """Yields the sums of a stream and a branch whose branch depends on more inputs.

    Args:
        view: a flat graph.
        places: positions of the inputs of which the branch must need one that the stream does not.
    """
    wanted = sum(1 << place for place in places)
    for op in view.adds:
        for stream, branch in (op.ins, op.ins[::-1]):
            more = view.inputs.get(id(branch), 0) & ~view.inputs.get(id(stream), 0) & wanted
            shapes = {tuple(value.shape) for value in (stream, branch, *op.outs)}
            if more and len(shapes) == 1 and not stream.of_params:
                terms = _terms(view, stream)
                if _depends(view, branch, terms):
                    yield Residual(op, stream, branch)


def _terms(view: Flat, stream: Value) -> set[int]:
    """Returns the ids of what a stream is a sum of, the stream included."""
    found, waiting = set[int](), [stream]
    while waiting:
        value = waiting.pop()
        if id(value) in found or id(value) not in view.order or value.of_params:
            continue
        found.add(id(value))
        op = value.op
        if op is None or op.name in CALLS:  # the input of a call, or its result
            sources = view.sources.get(id(value), ())
        elif op.name in IDENTITIES:
            sources = [op.ins[op.outs.index(value)]]
        elif op.name in ADDS or op.name in _SAME or _scales(op):
            sources = op.ins
        else:
            continue
        waiting += [own for own in sources if own.shape == value.shape]
    return found


def _scales(op: Op) -> bool:
    return op.name in _SCALES and any(value.number is not None for value in op.ins)


def _depends(view: Flat, value: Value, targets: set[int]) -> bool:
    """Tells whether a value is computed from one of the targets."""
    lowest = min((view.order[target] for target in targets), default=0)
    seen, waiting = {id(value)}, [value]
    while waiting:
        for source in view.sources.get(id(waiting.pop()), ()):
            if id(source) in targets:
                return True
            if id(source) not in seen and view.order.get(id(source), -1) >= lowest:
                seen.add(id(source))
                waiting.append(source)
    return False


def needed(view: Flat, residual: Residual, outs: Sequence[Value]) -> frozenset[int]:
    """Returns the positions of the inputs that reach the outputs through a branch alone.

    Args:
        view: a flat graph.
        residual: the sum whose branch may be left out.
        outs: the outputs.
    """
    cut, seen, waiting = id(residual.op.outs[0]), set[int](), list(outs)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        waiting += [residual.stream] if id(value) == cut else view.sources.get(id(value), ())
    left = 0
    for key in seen:
        if key not in view.sources:  # an input
            left |= view.inputs.get(key, 0)
    alone = view.inputs[id(residual.branch)] & ~left
    return frozenset(place for place in range(alone.bit_length()) if alone >> place & 1)
