"""Primitives that work entry by entry: all operands share the nodes of each dimension."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxprune.structure._values import (
    ALWAYS_SAME,
    ALWAYS_ZERO,
    NOTHING,
    ZERO,
    ZEROS,
    Op,
    Rule,
    Value,
)

if TYPE_CHECKING:
    from jaxprune.structure._analysis import Analysis

# Primitives by when their result is 0: if all operands are 0; if any is; if the first is; in no
# case that is known; and by a condition of their own, see `_zeros`.
_ALL = frozenset("add sub add_any or xor atan2 complex".split())
_ANY = frozenset("mul and".split())
_FIRST = frozenset(
    "neg abs sign sqrt tanh sin tan asin atan sinh asinh atanh erf erf_inv expm1 log1p floor ceil "
    "round square cbrt real imag conj convert_element_type reduce_precision copy copy_p name "
    "bitcast_convert_type stop_gradient".split()
)
_NEVER = frozenset(
    "exp exp2 log log2 logistic cos cosh acos acosh rsqrt is_finite not eq ne lt le gt ge eq_to "
    "lt_to le_to nextafter shift_left shift_right_logical shift_right_arithmetic population_count "
    "clz erfc one_minus_square lgamma digamma igamma igammac bessel_i0e bessel_i1e "
    "polygamma".split()
)
_OWN = frozenset("max min clamp div rem pow integer_pow select_n".split())
# Primitives whose outputs are their operands, in the same order.
IDENTITIES = frozenset(
    "optimization_barrier device_put pvary sharding_constraint reshard pcast".split()
)
_KEEP_NUMBER = frozenset("convert_element_type copy copy_p name stop_gradient".split())

NAMES = _ALL | _ANY | _FIRST | _NEVER | _OWN


def with_same(zeros: np.ndarray) -> np.ndarray:
    """Adds the SAME bits that ZERO bits imply: an entry that is 0 does not depend on parameters.

    Args:
        zeros: uint8, ZERO, ZERO_SOFT and ZERO_GATE bits alone.

    Returns:
        The same bits, and SAME, SAME_SOFT and SAME_GATE beside them; see `_values` for the layout.

    Example:
        >>> with_same(np.uint8(1)).item(), with_same(np.uint8(4)).item()
        (3, 12)
    """
    return zeros | (zeros << 1)


def zero_only(facts: np.ndarray) -> np.ndarray:
    """Drops the facts about entries that are the same but not 0."""
    return with_same(facts & ZEROS)


def _analyze(analysis: "Analysis", op: Op) -> bool | None:
    out = op.outs[0]
    for value in op.ins:
        if value.shape and len(value.shape) != len(out.shape):
            return False  # such as a bitcast to narrower numbers
    for dimension, size in enumerate(out.shape):
        sharing = [v for v in op.ins if v.shape and v.shape[dimension] == size]
        first = sharing[0].nodes[dimension]
        for value in sharing[1:]:
            analysis.unite(first, value.nodes[dimension])
        out.nodes.append(first)
        out.origins.append(frozenset().union(*[value.origins[dimension] for value in sharing]))
        facts = [_facts(value, dimension, size) for value in op.ins]
        zeros = _zeros(op, facts) & ZEROS
        same = functools.reduce(np.bitwise_and, facts) & ALWAYS_SAME
        out.facts.append(with_same(zeros) | same)
    if op.name in _KEEP_NUMBER:
        out.number = op.ins[0].number
    return None


def _facts(value: Value, dimension: int, size: int) -> np.ndarray:
    """Returns the facts of an operand along a dimension; a broadcast operand is SAME there."""
    if value.number == 0:
        return np.full(size, ALWAYS_ZERO, np.uint8)
    if not value.shape or value.shape[dimension] != size:
        return np.full(size, ALWAYS_SAME, np.uint8)
    return value.facts[dimension]


def _zeros(op: Op, facts: list[np.ndarray]) -> np.ndarray:
    """Returns the ZERO bits of the result; its other bits are undefined."""
    name = op.name
    if name in _ALL:
        return functools.reduce(np.bitwise_and, facts)
    if name in _ANY:
        return functools.reduce(np.bitwise_or, facts)
    if name in _FIRST:
        return facts[0]
    numbers = [value.number for value in op.ins]
    every, nothing = np.full_like(facts[0], ALWAYS_ZERO), np.full_like(facts[0], NOTHING)
    if name in ("max", "min"):
        # max(x, c) is 0 at x = 0 if the number c is not above 0.
        sign = 1 if name == "max" else -1
        neutral = [number is not None and sign * number <= 0 for number in numbers]
        if all(neutral):
            return functools.reduce(np.bitwise_and, facts)
        pairs = zip(facts, neutral, strict=True)
        return functools.reduce(np.bitwise_and, [every if ok else own for own, ok in pairs])
    if name == "clamp":
        low, _, high = numbers
        around = low is not None and high is not None and low <= 0 <= high
        return facts[1] if around else nothing
    if name in ("div", "rem"):
        return facts[0] & ~facts[1]
    if name == "pow":
        return facts[0] if numbers[1] is not None and numbers[1] > 0 else nothing
    if name == "integer_pow":
        return facts[0] if op.params["y"] > 0 else nothing
    if name == "select_n":
        return functools.reduce(np.bitwise_and, facts[1:])
    return nothing


def is_zero(op: Op, zeros: Sequence[bool]) -> bool:
    """Tells whether a result is 0 if the operands marked in `zeros` are.

    Args:
        op: the operation.
        zeros: a bool for each operand.

    Returns:
        A bool; False if it is not known.

    Example:
        >>> is_zero(Op("mul", None, {}, [Value(None), Value(None)], [], ""), [True, False])
        True
    """
    known = [zero or value.number == 0 for zero, value in zip(zeros, op.ins, strict=True)]
    facts = [np.full(1, ALWAYS_ZERO if own else NOTHING, np.uint8) for own in known]
    return bool((_zeros(op, facts) & ZERO).all())


def _identity(analysis: "Analysis", op: Op) -> bool | None:
    if len(op.ins) != len(op.outs):
        return False
    for value, out in zip(op.ins, op.outs, strict=True):
        out.like(value)
    return None


RULES = {name: Rule(_analyze) for name in NAMES}
RULES |= {name: Rule(_identity) for name in sorted(IDENTITIES)}
