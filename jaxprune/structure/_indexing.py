"""Primitives that look entries up or replace them at computed places."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.structure._elementwise import zero_only
from jaxprune.structure._values import Op, Rule


def _gather(analysis: Any, op: Op) -> None:
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
    # Without a number of its own, filling gives NaN, in what is kept as well.
    filled_with = op.params.get("fill_value")
    if filled_with not in (None, 0) or not jnp.issubdtype(out.aval.dtype, jnp.inexact):
        out.facts = [np.zeros_like(facts) for facts in out.facts]


def _run_gather(run: Any, op: Op, arrays: list[Any]) -> list[Any]:
    dense, now = op.ins[0].shape, run.shape(op.ins[0])
    sizes = tuple(
        now[dimension] if size == dense[dimension] else size
        for dimension, size in enumerate(op.params["slice_sizes"])
    )
    return [op.primitive.bind(*arrays, **op.params | {"slice_sizes": sizes})]


def _dynamic_slice(analysis: Any, op: Op) -> None:
    value, out = op.ins[0], op.outs[0]
    analysis.fix(out)
    for dimension, size in enumerate(op.params["slice_sizes"]):
        if size == value.shape[dimension]:
            out.nodes[dimension] = value.nodes[dimension]
            out.facts[dimension] = zero_only(value.facts[dimension])
            out.origins[dimension] = value.origins[dimension]
        else:
            analysis.freeze(value.nodes[dimension], f"`dynamic_slice` along it {op.where}")


def _run_dynamic_slice(run: Any, op: Op, arrays: list[Any]) -> list[Any]:
    return [lax.dynamic_slice(arrays[0], arrays[1:], run.shape(op.outs[0]))]


def _dynamic_update_slice(analysis: Any, op: Op) -> None:
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


RULES = {
    "gather": Rule(_gather, _run_gather),
    "dynamic_slice": Rule(_dynamic_slice, _run_dynamic_slice),
    "dynamic_update_slice": Rule(_dynamic_update_slice),
}
