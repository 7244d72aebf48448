"""Loops over stacked layers; rows of the stack that a plan removes are not run."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import jaxprs
from jaxprune.structure._branches import flat, needed, residuals
from jaxprune.structure._rules.control import carried, entering, loop
from jaxprune.structure._rules.elementwise import zero_only
from jaxprune.structure._slicing import pick
from jaxprune.structure._values import UNGATED, ZERO, Op, Rule, Value
from jaxprune.structure._zeros import LOST, PRESENT, follow, follow_scan
from jaxprune.structure._zeros import ZERO as REMOVED

if TYPE_CHECKING:
    from jaxprune.structure._analysis import Analysis
    from jaxprune.structure._execution import Execution


class Segment(NamedTuple):
    """Passes of a scan, one after the other, that miss the same rows.

    Example:
        >>> Segment([0, 1, 3], [0, 0], []).rows
        [0, 1, 3]
    """

    rows: list[int]  # the numbers of the passes
    states: list[int]  # of the inputs of the body, see `_zeros`
    empty: list[int]  # the positions of the stacked outputs that have no rows here


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
        place for place in range(start, len(op.ins)) if analysis.has_leaves(op.ins[place].nodes[0])
    }
    view = flat(graph)
    found = set()
    for residual in residuals(view, own):
        places = needed(view, residual, outs) & own
        states = [PRESENT] * len(op.ins)
        for place in places:
            states[place] = _state_of(op.ins[place], np.ones(op.params["length"], bool))
        spread = follow(graph, states)
        has_parameters = any(op.ins[at].of_params and states[at] == REMOVED for at in places)
        vanishes = spread.state(residual.branch) == REMOVED and not any(spread.outs[:count])
        if not has_parameters or not vanishes:
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
        The segments in order, without passes that change nothing; one if no rows are removed.
    """
    graph, (first, count) = op.inner["call"], _counts(op)
    start, length = first + count, op.params["length"]
    stacked = [
        run.kept(value, 0) & (state == PRESENT)
        for value, state in zip(op.ins[start:], states[start:], strict=True)
    ]
    if all(own.all() for own in stacked):
        return [Segment(list(range(length)), list(states), [])]
    after = follow_scan(op, states)[count:]
    results = [
        run.kept(out, 0) & (state == PRESENT)
        for out, state in zip(op.outs[count:], after, strict=True)
    ]
    lines = list(zip(*[own.tolist() for own in (*stacked, *results)], strict=True))
    found: list[Segment] = []
    for line, numbers in itertools.groupby(range(length), lines.__getitem__):
        rows = list(numbers)
        own = [
            PRESENT if here else state or _state_of(value, np.array(rows))
            for here, state, value in zip(line, states[start:], op.ins[start:])
        ]
        inner = [*states[:first], *[PRESENT] * count, *own]
        empty = [place for place, here in enumerate(line[len(stacked) :]) if not here]
        spread = follow(graph, inner)
        is_same = all(
            spread.source(out) is value
            for out, value in zip(graph.outs[:count], graph.ins[first:start])
        )
        if is_same and len(empty) == len(results):
            continue
        last = found[-1] if found else None
        if last is not None and (last.states, last.empty) == (inner, empty):
            last.rows.extend(rows)
        else:
            found.append(Segment(rows, inner, empty))
    return found


def _run_scan(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    first, count = _counts(op)
    start = first + count
    carry = [
        run.zeros(value) if array is None else array
        for value, array in zip(op.ins[first:start], arrays[first:start], strict=True)
    ]
    parts = segments(run, op, list(map(run.spread.state, op.ins)))
    place_of = [np.cumsum(run.kept(value, 0)) - 1 for value in op.ins[start:]]
    stacks: list[list[Any]] = [[] for _ in op.outs[count:]]
    for part in parts:
        rows = [
            _rows(array, places[part.rows]) if state == PRESENT else None
            for array, places, state in zip(arrays[start:], place_of, part.states[start:])
        ]
        carry, results = _run_rows(run, op, [*arrays[:first], *carry, *rows], part)
        for place, (stack, value) in enumerate(zip(stacks, results, strict=True)):
            if place not in part.empty:
                stack.append(value)
    return [*carry, *map(_joined, stacks)]


def _rows(array: Any, places: np.ndarray) -> Any:
    """Returns the rows at these places, in ascending order."""
    if jaxprs.has_symbols(array.shape[:1]) or len(places) == array.shape[0]:
        return array
    if len(places) == places[-1] - places[0] + 1:
        return array[places[0] : places[-1] + 1]
    return pick(array, places, 0)


def _joined(parts: list[Any]) -> Any:
    """Puts the rows of all segments behind each other; None if there are none."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts) if parts else None


def _run_rows(
    run: "Execution", op: Op, arrays: list[Any], part: Segment
) -> tuple[list[Any], list[Any]]:
    """Runs the passes of one segment on its rows; returns the carry and the stacked outputs."""
    graph, (first, count) = op.inner["call"], _counts(op)

    def body(carry: Any, row: Any) -> Any:
        outs = run.graph(graph, [*arrays[:first], *carry, *row], part.states)
        outs = [
            run.zeros(value) if out is None and place - count not in part.empty else out
            for place, (value, out) in enumerate(zip(graph.outs, outs, strict=True))
        ]
        return tuple(outs[:count]), tuple(outs[count:])

    carry, rows = tuple(arrays[first : first + count]), tuple(arrays[first + count :])
    stacked = any(row is not None for row in rows)
    length = None if stacked else len(part.rows)  # of rows, it may be symbolic
    options = {name: op.params[name] for name in ("reverse", "unroll")}
    carry, outs = lax.scan(body, carry, rows, length, **options)
    return list(carry), list(outs)


RULES = {"scan": Rule(_scan, _run_scan)}
