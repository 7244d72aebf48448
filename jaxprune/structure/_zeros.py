"""Follows arrays that a plan removes whole, as zeros that are never computed.

A removed parameter is 0 in the dense function. This finds which results are 0 because of it, and
which sums therefore equal one of their operands: so a branch of a residual network disappears.
Whatever is not known to be 0 is computed from zeros, so an unknown operation costs time and never
correctness.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxprune import jaxprs
from jaxprune.structure._rules import elementwise
from jaxprune.structure._values import Graph, Op, Value

# What is known of a value. LOST values came from removed state, such as running averages, which
# may be anything in the dense function.
PRESENT, ZERO, LOST = 0, 1, 2

ADDS = frozenset("add add_any".split())
CALLS = frozenset("remat2 checkpoint remat".split())  # they run their function once, as it is
_DERIVED = frozenset("custom_jvp_call custom_vjp_call".split())
_PRODUCTS = frozenset("dot_general conv_general_dilated ragged_dot_general".split())
# Primitives that are 0 if these operands are; the other operands are places.
_MOVES = dict.fromkeys(
    "broadcast_in_dim reshape transpose squeeze slice split rev expand_dims dynamic_slice "
    "reduce_sum reduce_max reduce_min cumsum".split(),
    (0,),
) | {"pad": (0, 1), "dynamic_update_slice": (0, 1), "scatter": (0, 2), "scatter-add": (0, 2)}


class Spread(NamedTuple):
    """What removed operands mean for the values of a graph.

    Example:
        >>> follow(Graph([], [], []), [])
        Spread(states={}, same={}, outs=[])
    """

    states: dict[int, int]  # id of a value -> ZERO or LOST; all other values are PRESENT
    same: dict[int, Value]  # id of a value -> the value of the graph that it equals
    outs: list[int]  # the states of the outputs

    def state(self, value: Value) -> int:
        """Returns what is known of a value."""
        return self.states.get(id(value), PRESENT)

    def source(self, value: Value) -> Value:
        """Returns the first value of the graph that a value equals."""
        while id(value) in self.same:
            value = self.same[id(value)]
        return value


def follow(
    graph: Graph, states: Sequence[int], users: Mapping[int, Sequence[int]] | None = None
) -> Spread:
    """Follows removed operands through a graph.

    Args:
        graph: a traced function.
        states: the state of each input.
        users: from `users_of`; saves time where a graph is followed often.

    Returns:
        The states of all values.
    """
    found = {id(value): state for value, state in zip(graph.ins, states, strict=True) if state}
    spread = Spread(found, {}, [])
    if found:
        users = users_of(graph) if users is None else users
        waiting = sorted({number for key in found for number in users.get(key, ())})
        seen = set(waiting)
        while waiting:  # operations in their order; those that meet nothing removed are left out
            op = graph.ops[heapq.heappop(waiting)]
            results = _results(op, list(map(spread.state, op.ins)), spread)
            for out, state in zip(op.outs, results, strict=True):
                if state:
                    found[id(out)] = state
                    for number in users.get(id(out), ()):
                        if number not in seen:
                            seen.add(number)
                            heapq.heappush(waiting, number)
    return spread._replace(outs=list(map(spread.state, graph.outs)))


def users_of(graph: Graph) -> dict[int, list[int]]:
    """Maps the id of each value to the numbers of the operations that read it."""
    users: dict[int, list[int]] = {}
    for number, op in enumerate(graph.ops):
        for value in op.ins:
            users.setdefault(id(value), []).append(number)
    return users


def follow_scan(op: Op, ins: Sequence[int]) -> list[int]:
    """Returns the states of a scan's results; operands are removed for all passes or none."""
    first, count = jaxprs.scan_counts(op.params, len(ins))
    carry = list(ins[first : first + count])
    while True:
        outs = follow(op.inner["call"], [*ins[:first], *carry, *ins[first + count :]]).outs
        after = [a if a == b else max(a, b) & LOST for a, b in zip(carry, outs)]
        if after == carry:
            return [*carry, *outs[count:]]
        carry = after


def _results(op: Op, ins: list[int], spread: Spread) -> list[int]:
    """Returns the state of each result, and notes results that equal an operand."""
    name, rest = op.name, LOST if LOST in ins else PRESENT
    if name in CALLS:
        inner = follow(op.inner["call"], ins)
        spread.states.update(inner.states)
        places = {id(value): place for place, value in enumerate(op.inner["call"].ins)}
        for out, own in zip(op.outs, op.inner["call"].outs, strict=True):
            place = places.get(id(inner.source(own)))
            if place is not None and inner.state(own) == PRESENT:
                spread.same[id(out)] = op.ins[place]
        return inner.outs
    if name in _DERIVED:
        # The derivative rule need not be that of the function; it matters for present operands.
        alone = all(state or not _is_float(value) for state, value in zip(ins, op.ins, strict=True))
        return follow(op.inner["call"], ins).outs if alone else [rest] * len(op.outs)
    if name == "scan":
        return follow_scan(op, ins)
    if name in elementwise.IDENTITIES:
        return ins
    if name in elementwise.NAMES:
        if elementwise.is_zero(op, [state == ZERO for state in ins]):
            return [ZERO]
        if name in ADDS and rest == PRESENT:
            other, out = op.ins[0 if ins[1] else 1], op.outs[0]
            if (other.aval.shape, other.aval.dtype) == (out.aval.shape, out.aval.dtype):
                spread.same[id(out)] = other
        return [rest]
    if name in _PRODUCTS and ZERO in ins[:2]:
        return [ZERO] * len(op.outs)
    if name == "concatenate":
        needed = range(len(ins))
    else:
        needed = _MOVES.get(name, ())
    zero = [ins[place] == ZERO or op.ins[place].number == 0 for place in needed]
    return [ZERO if zero and all(zero) else rest] * len(op.outs)


def _is_float(value: Value) -> bool:
    return bool(jnp.issubdtype(value.aval.dtype, jnp.inexact))
