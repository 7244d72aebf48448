"""Primitives that combine or order the entries along a dimension."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.structure._rules.elementwise import zero_only
from jaxprune.structure._values import SAME, ZERO, Op, Rule, Value

if TYPE_CHECKING:
    from jaxprune.structure._analysis import Analysis
    from jaxprune.structure._execution import Execution

_SUMMARIES = frozenset({"reduce_sum", "reduce_max", "reduce_min"})
_OTHERS = frozenset("reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split())
_WINDOWS = frozenset("reduce_window_max reduce_window_sum reduce_window_min".split())
_SCANS = frozenset("cumsum cumprod cummax cummin cumlogsumexp sort top_k".split())
# Under `vmap`, a collective over a named axis becomes a reduction over numbered axes.
_COLLECTIVES = {"psum": "reduce_sum", "pmax": "reduce_max", "pmin": "reduce_min"}


def reduce(analysis: "Analysis", op: Op) -> None:
    """Follows a reduction; a collective may have names of mesh axes beside dimensions."""
    for value, out in zip(op.ins, op.outs, strict=True):
        _reduce_one(analysis, op, value, out)


def _reduce_one(analysis: "Analysis", op: Op, value: Value, out: Value) -> None:
    name = _COLLECTIVES.get(op.name, op.name)
    axes = set(filter(is_number, op.params["axes"]))
    corrected = None
    for axis in sorted(axes):
        nodes, facts = value.nodes[axis], value.facts[axis]
        free = analysis.is_free(nodes)
        reason = f"`{name}` over it {op.where}"
        if name not in _SUMMARIES:
            analysis.freeze(nodes, reason)
        elif name == "reduce_sum" and (facts[free] & ZERO).all():
            analysis.need(nodes, facts, ZERO, f"{reason}, and pruned entries would not add 0")
        elif free.any() and corrected is None:
            # Removed entries can be computed: they are added to the sum, or compared with the rest.
            corrected = axis
            analysis.need(nodes, facts, SAME, f"{reason}, and pruned entries would differ")
        else:
            analysis.freeze(nodes, reason)
    for dimension in range(len(value.shape)):
        if dimension not in axes:
            facts = zero_only(value.facts[dimension])
            out.nodes.append(value.nodes[dimension])
            out.facts.append(facts if name in _SUMMARIES else np.zeros_like(facts))
            out.origins.append(value.origins[dimension])


def is_number(axis: Any) -> bool:
    """Tells whether an axis is a number, not a name."""
    return isinstance(axis, int | np.integer)


def run_reduce(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    """Runs a reduction on smaller arrays, with what the removed entries would add."""
    pairs = zip(op.ins, arrays, strict=True)
    return run.bind(op, [_completed(run, op, *pair) for pair in pairs])


def _completed(run: "Execution", op: Op, value: Value, array: Any) -> Any:
    """Appends to an operand whatever its removed entries would add to the result."""
    name = _COLLECTIVES.get(op.name, op.name)
    for axis in filter(is_number, op.params.get("axes", ())):
        removed = int((~run.kept(value, axis)).sum())
        if not removed or (name == "reduce_sum" and run.is_zero(value, axis)):
            continue
        gone = run.removed(value, axis)
        alike = gone.shape[axis] == 1
        if name != "reduce_sum":  # append each: equal maxima share the gradient
            gone = jnp.repeat(gone, removed, axis) if alike else gone
        elif alike:
            gone = gone * jnp.asarray(removed, gone.dtype)
        array = lax.concatenate([array, gone], axis)
    return array


def _along(analysis: "Analysis", op: Op) -> bool | None:
    value = op.ins[0]
    dimensions = len(value.shape)
    axis = op.params.get("axis", op.params.get("dimension", dimensions - 1)) % dimensions
    if any(other.shape != value.shape for other in op.ins):
        return False
    for other in op.ins:
        analysis.freeze(other.nodes[axis], f"`{op.name}` along it {op.where}")
    for dimension in range(dimensions):
        for other in op.ins[1:]:
            analysis.unite(value.nodes[dimension], other.nodes[dimension])
    for out in op.outs:
        analysis.fix(out)
        for dimension in range(dimensions):
            if dimension != axis:
                out.nodes[dimension] = value.nodes[dimension]
    return None


def _window(analysis: "Analysis", op: Op) -> None:
    value, out, params = op.ins[0], op.outs[0], op.params
    analysis.fix(out)
    sides = zip(params["padding"], params["window_dimensions"], strict=True)
    # The maximum of a window that holds only padding would be an infinity.
    covered = all(max(padding) < window for padding, window in sides)
    for dimension in range(len(value.shape)):
        alone = params["window_dimensions"][dimension] == params["window_strides"][dimension] == 1
        alone &= tuple(params["padding"][dimension]) == (0, 0)
        for name in ("base_dilation", "window_dilation"):
            alone &= not params.get(name) or params[name][dimension] == 1
        if alone:
            out.nodes[dimension] = value.nodes[dimension]
            if covered:
                out.facts[dimension] = zero_only(value.facts[dimension])
        else:
            analysis.freeze(value.nodes[dimension], f"a window slides over it {op.where}")


def _fft(analysis: "Analysis", op: Op) -> None:
    value, out = op.ins[0], op.outs[0]
    analysis.fix(out)
    transformed = len(value.shape) - len(op.params["fft_lengths"])
    for dimension, nodes in enumerate(value.nodes):
        if dimension >= transformed:
            analysis.freeze(nodes, f"`fft` along it {op.where}")
        else:  # the transform is linear, so it maps 0 to 0
            out.nodes[dimension] = nodes
            out.facts[dimension] = zero_only(value.facts[dimension])


RULES = {name: Rule(reduce, run_reduce) for name in sorted(_SUMMARIES)}
RULES |= {name: Rule(reduce) for name in sorted(_OTHERS)}
RULES |= {name: Rule(_along) for name in sorted(_SCANS)}
RULES |= {"fft": Rule(_fft)}
RULES |= {name: Rule(_window) for name in sorted(_WINDOWS)}
