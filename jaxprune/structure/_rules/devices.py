"""Primitives that run a function on each device, and those that exchange entries between devices.

Inside `shard_map` a value is the part of one device. Index i of a dimension that is split stands
for index i of all parts, so the channels of all parts are tied: each device loses the same ones.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxprune.structure._rules import reductions
from jaxprune.structure._rules.control import entering
from jaxprune.structure._rules.elementwise import zero_only
from jaxprune.structure._values import Op, Rule, Value

if TYPE_CHECKING:
    from jaxprune.structure._analysis import Analysis
    from jaxprune.structure._execution import Execution

# Sums, maxima and permutations over devices: entry i of the result is made of entries i.
_ENTRY_BY_ENTRY = "psum psum_invariant pmax pmin ppermute".split()


def _tie(
    analysis: "Analysis", nodes: np.ndarray, facts: np.ndarray, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ties index i of all parts of a dimension; returns nodes and facts of one part."""
    rows = nodes.reshape(parts, -1)
    for row in rows[1:]:
        analysis.unite(rows[0], row)
    return rows[0], np.bitwise_and.reduce(zero_only(facts).reshape(parts, -1), axis=0)


def _parts(op: Op, spec: Any, dimensions: int) -> list[int]:
    """Returns into how many parts `shard_map` splits each dimension of a value."""
    named = [*spec, *[None] * dimensions][:dimensions]
    axes = [() if own is None else own if isinstance(own, tuple) else (own,) for own in named]
    return [math.prod(op.params["mesh"].shape[name] for name in own) for own in axes]


def _shard_map(analysis: "Analysis", op: Op) -> None:
    jaxpr, parts = op.params["jaxpr"], []
    for value, var, spec in zip(op.ins, jaxpr.invars, op.params["in_specs"], strict=True):
        part = dataclasses.replace(entering(value), aval=var.aval)
        for dimension, count in enumerate(_parts(op, spec, len(value.shape))):
            if count > 1:
                tied = _tie(analysis, value.nodes[dimension], value.facts[dimension], count)
                part.nodes[dimension], part.facts[dimension] = tied
        parts.append(part)
    found: list[Any] = []

    def follow() -> tuple[()]:
        found.append(analysis.graph(jaxpr, (), parts))
        return ()

    # Derivative rules in the body are traced while they are followed, so that is done inside.
    jax.eval_shape(_mapped(op, follow, (), ()))
    graph = op.inner["call"] = found[0]
    for out, part, spec in zip(op.outs, graph.outs, op.params["out_specs"], strict=True):
        out.like(part)
        for dimension, count in enumerate(_parts(op, spec, len(out.shape))):
            out.nodes[dimension] = np.tile(part.nodes[dimension], count)
            out.facts[dimension] = np.tile(zero_only(part.facts[dimension]), count)


def _run_shard_map(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    def call(*args: Any) -> tuple[Any, ...]:
        return tuple(run.graph(op.inner["call"], args))

    specs = tuple(op.params["in_specs"]), tuple(op.params["out_specs"])
    return list(_mapped(op, call, *specs)(*arrays))


def _mapped(op: Op, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Any:
    """Maps a function over the devices as the operation does."""
    return jax.shard_map(
        function,
        mesh=op.params["mesh"],
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=op.params["newly_manual_axes"],
        check_vma=op.params["check_vma"],
    )


def _entry_by_entry(analysis: "Analysis", op: Op) -> bool | None:
    axes = op.params.get("axes", ())
    if any(map(reductions.is_number, axes)):  # under `vmap`, a named axis becomes a dimension
        return reductions.reduce(analysis, op)
    if len(op.ins) != len(op.outs):
        return False
    for value, out in zip(op.ins, op.outs, strict=True):
        out.like(value)
        out.facts = [zero_only(facts) for facts in value.facts]
        out.number = 0 if value.number == 0 else None  # a sum over devices is a different number
    return None


def _alike(value: Value, out: Value) -> None:
    """Gives an output what is known of the operand; it is then changed along an axis."""
    out.nodes, out.origins = list(value.nodes), list(value.origins)
    out.facts = [zero_only(facts) for facts in value.facts]


def _grow(out: Value, axis: int, parts: int) -> None:
    """Puts the parts of all devices behind each other along an axis."""
    out.nodes[axis] = np.tile(out.nodes[axis], parts)
    out.facts[axis] = np.tile(out.facts[axis], parts)


def _split(analysis: "Analysis", out: Value, axis: int, parts: int) -> None:
    """Leaves one of several parts along an axis to each device."""
    tied = _tie(analysis, out.nodes[axis], out.facts[axis], parts)
    out.nodes[axis], out.facts[axis] = tied


def _all_gather(analysis: "Analysis", op: Op) -> None:
    value, out = op.ins[0], op.outs[0]
    axis, parts = op.params["all_gather_dimension"], op.params["axis_size"]
    _alike(value, out)
    if op.params["tiled"]:
        _grow(out, axis, parts)
    else:
        _insert(out, axis, parts)


def _insert(out: Value, axis: int, size: int) -> None:
    out.nodes.insert(axis, np.zeros(size, np.int64))
    out.facts.insert(axis, np.zeros(size, np.uint8))
    out.origins.insert(axis, frozenset())


def _reduce_scatter(analysis: "Analysis", op: Op) -> None:
    value, out = op.ins[0], op.outs[0]
    axis = op.params["scatter_dimension"]
    _alike(value, out)
    if op.params["tiled"]:
        _split(analysis, out, axis, op.params["axis_size"])
    else:
        _delete(analysis, op, axis)


def _delete(analysis: "Analysis", op: Op, axis: int) -> None:
    """Gives each device one index of an axis, which the result does not have."""
    reason = f"`{op.name}` gives each device one of it {op.where}"
    analysis.freeze(op.ins[0].nodes[axis], reason)
    for own in (op.outs[0].nodes, op.outs[0].facts, op.outs[0].origins):
        del own[axis]


def _all_to_all(analysis: "Analysis", op: Op) -> None:
    value, out = op.ins[0], op.outs[0]
    split, grown = op.params["split_axis"], op.params["concat_axis"]
    _alike(value, out)
    if not op.params["tiled"]:
        _delete(analysis, op, split)
        _insert(out, grown, out.shape[grown])
    elif split == grown:
        analysis.freeze(value.nodes[split], f"`{op.name}` exchanges parts of it {op.where}")
    else:
        parts = value.shape[split] // out.shape[split]
        _split(analysis, out, split, parts)
        _grow(out, grown, parts)


RULES = {name: Rule(_entry_by_entry, reductions.run_reduce) for name in _ENTRY_BY_ENTRY}
RULES |= {"shard_map": Rule(_shard_map, _run_shard_map)}
RULES |= {name: Rule(_all_gather) for name in ("all_gather", "all_gather_invariant")}
RULES |= {"reduce_scatter": Rule(_reduce_scatter), "all_to_all": Rule(_all_to_all)}
