"""Loops over stacked layers; rows of the stack that a plan removes are not run."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import jaxprs
from jaxprune.structure._branches import flat, needed, residuals
from jaxprune.structure._rules.control import carried, entering, loop
from jaxprune.structure._rules.elementwise import zero_only
from jaxprune.structure._values import UNGATED, ZERO, Graph, Op, Rule, Value
from jaxprune.structure._zeros import LOST, PRESENT, follow, follow_scan
from jaxprune.structure._zeros import ZERO as REMOVED

if TYPE_CHECKING:
    from jaxprune.structure._analysis import Analysis
    from jaxprune.structure._execution import Execution


class Segment(NamedTuple):
    """Consecutive passes of a scan that miss the same rows.

    Example:
        >>> Segment(0, 4, [0, 0], [], False).stop
        4
    """

    start: int
    stop: int
    states: list[int]  # of the inputs of the body, see `_zeros`
    empty: list[int]  # the positions of the stacked outputs that have no rows here
    idle: bool  # whether these passes change nothing and have no rows of outputs


def _counts(op: Op) -> tuple[int, int]:
    """Returns how many operands of a scan are constants, and how many are carried."""
    return jaxprs.scan_counts(op.params, len(op.ins))


def _scan(analysis: "Analysis", op: Op) -> None:
    closed = op.params["jaxpr"]
    first, count = _counts(op)
    ins = list(map(entering, op.ins))
    consts, carry, xs = ins[:first], ins[first : first + count], ins[first + count :]
    rows = []
    for value, aval in zip(xs, closed.in_avals[first + count :], strict=True):
        row = Value(aval, value.nodes[1:], value.facts[1:], value.origins[1:], value.support)
        row.of_params = value.of_params
        rows.append(row)
    graph, facts = loop(analysis, closed, consts, carry, rows)
    carried(op.outs[:count], graph, facts)
    for out, inner in zip(op.outs[count:], graph.outs[count:], strict=True):
        length = out.shape[0]
        out.nodes = [np.zeros(length, np.int64), *inner.nodes]
        out.facts = [np.zeros(length, np.uint8), *map(zero_only, inner.facts)]
        out.support = inner.support
    op.inner["call"] = graph
    free = set() if op.params["reverse"] else _unite_rows(analysis, op)
    for place, value in enumerate(xs, first + count):
        if place not in free:
            analysis.freeze(value.nodes[0], f"`scan` runs over it {op.where}")


def _unite_rows(analysis: "Analysis", op: Op) -> set[int]:
    """Unites the rows of each block of the body: the layers that it is removed from.

    Returns:
        The positions of the operands whose rows are those of a block.
    """
    graph, (first, count) = op.inner["call"], _counts(op)
    outs, start = graph.outs[:count], first + count
    own = {
        place
        for place in range(start, len(op.ins))
        if analysis.has_leaves(op.ins[place].nodes[0])
    }
    view = flat(graph)
    loops = {id(graph.ins[first + i]): out for i, out in enumerate(outs)}
    found = set()
    for residual in residuals(view, own):
        places = needed(view, residual, outs, loops) & own
        states = [
            PRESENT if place not in places else _state_of(value, np.ones(len(value.facts[0]), bool))
            for place, value in enumerate(op.ins)
        ] if places else []
        spread = follow(graph, states) if places else None
        if (
            spread is None
            or not any(op.ins[at].of_params and states[at] == REMOVED for at in places)
            or spread.state(residual.branch) != REMOVED
            or any(spread.outs[:count])
        ):
            continue
        nodes = op.ins[min(places)].nodes[0]
        for place in places:
            analysis.unite(nodes, op.ins[place].nodes[0])
        for out, state in zip(op.outs[count:], spread.outs[count:], strict=True):
            if state != PRESENT:
                out.nodes[0] = nodes
                facts = UNGATED if state == REMOVED else np.uint8(0)
                out.facts[0] = np.full(out.shape[0], facts, np.uint8)
        analysis.layers.append(nodes)
        found |= places
    return found


def _state_of(value: Value, rows: np.ndarray) -> int:
    """Returns what removed rows of an operand are, see `_zeros`."""
    return REMOVED if (value.facts[0][rows] & ZERO).all() else LOST


def segments(run: "Execution", op: Op, states: Sequence[int]) -> list[Segment]:
    """Sorts the passes of a scan by the rows that a plan leaves them.

    Args:
        run: knows the plan.
        op: the scan.
        states: the states of its operands.

    Returns:
        The segments in order; one if no rows are removed.
    """
    graph, (first, count) = op.inner["call"], _counts(op)
    start, length = first + count, op.params["length"]
    stacked = [
        run.kept(value, 0) & (state == PRESENT)
        for value, state in zip(op.ins[start:], states[start:], strict=True)
    ]
    if all(own.all() for own in stacked):
        return [Segment(0, length, list(states), [], False)]
    after = follow_scan(op, states)[count:]
    results = [
        run.kept(out, 0) & (state == PRESENT)
        for out, state in zip(op.outs[count:], after, strict=True)
    ]
    lines = zip(*[own.tolist() for own in (*stacked, *results)], strict=True)
    found, at = [], 0
    for line, same in itertools.groupby(lines):
        stop = at + len(list(same))
        rows = np.zeros(length, bool)
        rows[at:stop] = True
        own = [
            PRESENT if here else state or _state_of(value, rows)
            for here, state, value in zip(line, states[start:], op.ins[start:])
        ]
        inner = [*states[:first], *[PRESENT] * count, *own]
        empty = [place for place, here in enumerate(line[len(stacked) :]) if not here]
        spread = follow(graph, inner)
        is_same = all(
            spread.source(out) is value
            for out, value in zip(graph.outs[:count], graph.ins[first:start])
        )
        idle = is_same and len(empty) == len(results)
        found.append(Segment(at, stop, inner, empty, idle))
        at = stop
    return found


def _run_scan(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    states = list(map(run.spread.state, op.ins))
    first, count = _counts(op)
    carry = [
        run.zeros(value) if array is None else array
        for value, array in zip(op.ins[first : first + count], arrays[first:])
    ]
    arrays = [*arrays[:first], *carry, *arrays[first + count :]]
    parts = [own for own in segments(run, op, states) if not own.idle]
    if len(parts) == 1 and not any(parts[0].states) and not parts[0].empty:
        return _run_rows(run, op, arrays, parts[0])
    rows = [
        np.cumsum(run.kept(value, 0)) - 1 if array is not None else None
        for value, array in zip(op.ins[first + count :], arrays[first + count :])
    ]
    stacks: list[list[Any]] = [[] for _ in op.outs[count:]]
    for part in parts:
        here = [
            array[own[part.start] : own[part.stop - 1] + 1]
            if own is not None and state == PRESENT
            else None
            for array, own, state in zip(
                arrays[first + count :], rows, part.states[first + count :], strict=True
            )
        ]
        results = _run_rows(run, op, [*arrays[:first], *carry, *here], part)
        carry = results[:count]
        for place, (stack, value) in enumerate(zip(stacks, results[count:], strict=True)):
            if place not in part.empty:
                inner = op.inner["call"].outs[count + place]
                if value is None:
                    value = jnp.zeros((part.stop - part.start, *run.shape(inner)), inner.aval.dtype)
                stack.append(value)
    return [*carry, *map(_joined, stacks)]


def _joined(parts: list[Any]) -> Any:
    """Puts the rows of all segments behind each other; None if there are none."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts) if parts else None


def _run_rows(run: "Execution", op: Op, arrays: list[Any], part: Segment) -> list[Any]:
    """Runs the passes of one segment on its rows."""
    first, count = _counts(op)

    def body(carry: Any, row: Any) -> Any:
        outs = run.graph(op.inner["call"], [*arrays[:first], *carry, *row], part.states)
        carry = [
            run.zeros(value) if out is None else out
            for value, out in zip(op.inner["call"].outs, outs[:count])
        ]
        return tuple(carry), tuple(outs[count:])

    carry, rows = tuple(arrays[first : first + count]), tuple(arrays[first + count :])
    stacked = any(row is not None for row in rows)
    length = None if stacked else part.stop - part.start  # of rows, it may be symbolic
    options = {name: op.params[name] for name in ("reverse", "unroll")}
    carry, outs = lax.scan(body, carry, rows, length, **options)
    return [*carry, *outs]


RULES = {"scan": Rule(_scan, _run_scan)}
