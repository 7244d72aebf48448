"""Primitives that read or replace entries at computed indices."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.structure._rules.elementwise import zero_only
from jaxprune.structure._values import Op, Rule

if TYPE_CHECKING:
    from jaxprune.structure._analysis import Analysis
    from jaxprune.structure._execution import Execution


def _gather(analysis: "Analysis", op: Op) -> None:
    (value, indices), out = op.ins, op.outs[0]
    numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    for nodes in indices.nodes:
        analysis.freeze(nodes, f"indices of `gather` {op.where}")
    analysis.fix(out)
    batch = getattr(numbers, "operand_batching_dims", ())
    gone = {*numbers.collapsed_slice_dims, *batch}
    window = [dimension for dimension in range(len(value.shape)) if dimension not in gone]
    for dimension, size in enumerate(value.shape):
        looked_up = dimension in numbers.start_index_map
        if dimension in window and sizes[dimension] == size and not looked_up:
            to = numbers.offset_dims[window.index(dimension)]
            out.nodes[to] = value.nodes[dimension]
            out.facts[to] = zero_only(value.facts[dimension])
            out.origins[to] = value.origins[dimension]
        else:
            analysis.freeze(value.nodes[dimension], f"`gather` looks up in it {op.where}")
    # Out-of-range indices fill with NaN in kept entries too, so nothing changes; a fill number
    # other than 0 would differ from the 0 of removed entries.
    filled_with = op.params.get("fill_value")
    harmless = filled_with is None or filled_with == 0 or filled_with != filled_with
    if not harmless or not jnp.issubdtype(out.aval.dtype, jnp.inexact):
        out.facts = [np.zeros_like(facts) for facts in out.facts]


def _run_gather(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    dense, now, params = op.ins[0].aval.shape, run.shape(op.ins[0]), op.equation.params
    sizes = tuple(
        now[dimension] if size == dense[dimension] else size
        for dimension, size in enumerate(params["slice_sizes"])
    )
    return [op.primitive.bind(*arrays, **params | {"slice_sizes": sizes})]


def _dynamic_slice(analysis: "Analysis", op: Op) -> None:
    value, out = op.ins[0], op.outs[0]
    analysis.fix(out)
    for dimension, size in enumerate(op.params["slice_sizes"]):
        if size == value.shape[dimension]:
            out.nodes[dimension] = value.nodes[dimension]
            out.facts[dimension] = zero_only(value.facts[dimension])
            out.origins[dimension] = value.origins[dimension]
        else:
            analysis.freeze(value.nodes[dimension], f"`dynamic_slice` along it {op.where}")


def _run_dynamic_slice(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    return [lax.dynamic_slice(arrays[0], arrays[1:], run.shape(op.outs[0]))]


def _dynamic_update_slice(analysis: "Analysis", op: Op) -> None:
    (value, update), out = op.ins[:2], op.outs[0]
    analysis.fix(out)
    for dimension, size in enumerate(value.shape):
        if update.shape[dimension] == size:
            analysis.unite(value.nodes[dimension], update.nodes[dimension])
            out.nodes[dimension] = value.nodes[dimension]
            facts = value.facts[dimension] & update.facts[dimension]
            out.facts[dimension] = zero_only(facts)
        else:
            for operand in (value, update):
                reason = f"`dynamic_update_slice` along it {op.where}"
                analysis.freeze(operand.nodes[dimension], reason)


def _scatter(analysis: "Analysis", op: Op) -> None:
    value, indices, updates = op.ins
    out, numbers = op.outs[0], op.params["dimension_numbers"]
    for nodes in indices.nodes:
        analysis.freeze(nodes, f"indices of `{op.name}` {op.where}")
    analysis.fix(out)
    gone = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
    window = [dimension for dimension in range(len(value.shape)) if dimension not in gone]
    placed = dict(zip(window, numbers.update_window_dims, strict=True))
    for dimension in range(len(updates.shape)):
        if dimension not in placed.values():
            analysis.freeze(updates.nodes[dimension], f"places of `{op.name}` {op.where}")
    for dimension, size in enumerate(value.shape):
        own = placed.get(dimension)
        computed = dimension in numbers.scatter_dims_to_operand_dims
        if own is not None and updates.shape[own] == size and not computed:
            analysis.unite(value.nodes[dimension], updates.nodes[own])
            out.nodes[dimension] = value.nodes[dimension]
            facts = value.facts[dimension] & updates.facts[own]
            out.facts[dimension] = zero_only(facts)
        else:
            reason = f"`{op.name}` puts entries into it {op.where}"
            analysis.freeze(value.nodes[dimension], reason)
            if own is not None:
                analysis.freeze(updates.nodes[own], reason)


RULES = {
    "gather": Rule(_gather, _run_gather),
    "dynamic_slice": Rule(_dynamic_slice, _run_dynamic_slice),
    "dynamic_update_slice": Rule(_dynamic_update_slice),
}
# Other scatter modes (mul, min, max) do not map 0 to 0.
RULES |= {name: Rule(_scatter) for name in ("scatter", "scatter-add", "scatter_add", "scatter-sub")}
