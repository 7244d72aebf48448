"""Primitives that work entry by entry: all operands share the nodes of each dimension."""

import functools
from typing import Any

import numpy as np

from jaxprune.structure._values import (
    ALWAYS_SAME,
    ALWAYS_ZERO,
    NOTHING,
    ZEROS,
    Op,
    Rule,
    Value,
)

# 0 if all operands are 0; 0 if any is; 0 if the first is.
_ALL = "add sub add_any or xor atan2 complex"
_ANY = "mul and"
_FIRST = (
    "neg abs sign sqrt tanh sin tan asin atan sinh asinh atanh erf erf_inv expm1 log1p floor ceil "
    "round square cbrt real imag conj convert_element_type reduce_precision copy copy_p name "
    "bitcast_convert_type stop_gradient"
)
_NEVER = (
    "exp exp2 log log2 logistic cos cosh acos acosh rsqrt is_finite not eq ne lt le gt ge eq_to "
    "lt_to le_to nextafter shift_left shift_right_logical shift_right_arithmetic population_count "
    "clz erfc one_minus_square lgamma digamma igamma igammac bessel_i0e bessel_i1e polygamma"
)
_OWN = "max min clamp div rem pow integer_pow select_n"
# Each output is the operand of its position.
IDENTITIES = frozenset(
    "optimization_barrier device_put pvary sharding_constraint reshard pcast psum pmean "
    "psum_invariant".split()
)
_KEEP_NUMBER = {"convert_element_type", "copy", "copy_p", "name", "stop_gradient"}

NAMES = frozenset(f"{_ALL} {_ANY} {_FIRST} {_NEVER} {_OWN}".split())


def zero_only(facts: np.ndarray) -> np.ndarray:
    """Facts without a common value that is not 0."""
    zeros = facts & ZEROS
    return zeros | (zeros << 1)


def _analyze(analysis: Any, op: Op) -> bool | None:
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
        out.facts.append(zeros | (zeros << 1) | same)
    if op.name in _KEEP_NUMBER:
        out.number = op.ins[0].number
    return None


def _facts(value: Value, dimension: int, size: int) -> np.ndarray:
    """Facts of an operand along a dimension; what is broadcast is the same everywhere."""
    if value.number == 0:
        return np.full(size, ALWAYS_ZERO, np.uint8)
    if not value.shape or value.shape[dimension] != size:
        return np.full(size, ALWAYS_SAME, np.uint8)
    return value.facts[dimension]


def _zeros(op: Op, facts: list[np.ndarray]) -> np.ndarray:
    """Where the result is 0, among other bits."""
    name, numbers = op.name, [value.number for value in op.ins]
    every, nothing = np.full_like(facts[0], ALWAYS_ZERO), np.full_like(facts[0], NOTHING)
    if name in _ALL.split():
        return functools.reduce(np.bitwise_and, facts)
    if name in _ANY.split():
        return functools.reduce(np.bitwise_or, facts)
    if name in _FIRST.split():
        return facts[0]
    if name in ("max", "min"):
        # max(x, c) of x = 0 is 0 if c is not above it.
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


def identity(analysis: Any, op: Op) -> bool | None:
    """Each output is the operand of its position."""
    if len(op.ins) != len(op.outs):
        return False
    for value, out in zip(op.ins, op.outs, strict=True):
        out.like(value)
    return None


RULES = {name: Rule(_analyze) for name in NAMES}
RULES |= {name: Rule(identity) for name in sorted(IDENTITIES)}
