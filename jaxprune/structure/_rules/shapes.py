"""Primitives that move entries without changing them."""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import lax

from jaxprune.structure._nodes import rows_of
from jaxprune.structure._rules.elementwise import zero_only
from jaxprune.structure._slicing import pick
from jaxprune.structure._values import ALWAYS_SAME, ALWAYS_ZERO, NOTHING, Op, Rule, Value

if TYPE_CHECKING:
    from jaxprune.structure._analysis import Analysis
    from jaxprune.structure._execution import Execution


def _broadcast(analysis: "Analysis", op: Op) -> None:
    value, out = op.ins[0], op.outs[0]
    out.number = value.number
    source = {to: at for at, to in enumerate(op.params["broadcast_dimensions"])}
    for dimension, size in enumerate(out.shape):
        at = source.get(dimension)
        if at is not None and value.shape[at] == size:
            out.nodes.append(value.nodes[at])
            out.facts.append(value.facts[at])
            out.origins.append(value.origins[at])
        else:  # all entries are equal, so the dimension takes any width that it is combined with
            out.nodes.append(_new(analysis, size))
            out.facts.append(np.full(size, ALWAYS_SAME, np.uint8))
            out.origins.append(frozenset())


def _run_broadcast(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    shape, dimensions = run.shape(op.outs[0]), op.params["broadcast_dimensions"]
    sharding = op.params.get("sharding")
    return [lax.broadcast_in_dim(arrays[0], shape, dimensions, out_sharding=sharding)]


def _transpose(analysis: "Analysis", op: Op) -> None:
    _pick(op, op.params["permutation"])


def _squeeze(analysis: "Analysis", op: Op) -> None:
    gone = {dimension % len(op.ins[0].shape) for dimension in op.params["dimensions"]}
    _pick(op, [dimension for dimension in range(len(op.ins[0].shape)) if dimension not in gone])
    op.outs[0].facts = [zero_only(facts) for facts in op.outs[0].facts]


def _pick(op: Op, dimensions: Sequence[int]) -> None:
    """Gives the output these dimensions of the operand, in this order."""
    _pick_into(op.outs[0], op.ins[0], dimensions)


def _pick_into(out: Value, value: Value, dimensions: Sequence[int]) -> None:
    out.nodes = [value.nodes[dimension] for dimension in dimensions]
    out.facts = [value.facts[dimension] for dimension in dimensions]
    out.origins = [value.origins[dimension] for dimension in dimensions]
    out.number = value.number


def _reverse(analysis: "Analysis", op: Op) -> None:
    value, out = op.ins[0], op.outs[0]
    out.like(value)
    for dimension in op.params["dimensions"]:
        out.nodes[dimension] = value.nodes[dimension][::-1]
        out.facts[dimension] = value.facts[dimension][::-1]
    out.facts = [zero_only(facts) for facts in out.facts]


def _reshape(analysis: "Analysis", op: Op) -> bool | None:
    value, out = op.ins[0], op.outs[0]
    if op.params.get("dimensions") is not None or 0 in value.shape:
        return False
    if math.prod(value.shape) != math.prod(out.shape):  # with symbols whose bounds are not kept
        return False
    analysis.fix(out)
    out.number = value.number
    sizes = value.aval.shape, out.aval.shape  # the numbers of symbols may be equal by chance
    blocks = reshape_blocks(value.shape, out.shape)
    for before, after in blocks:
        products = [math.prod(own[d] for d in dims) for own, dims in zip(sizes, (before, after))]
        if products[0] != products[1]:
            return False
    for before, after in blocks:
        if len(before) == len(after) == 1:
            nodes, facts = [value.nodes[before[0]]], [zero_only(value.facts[before[0]])]
        else:
            merged = _merge(analysis, op, before)
            nodes, facts = _split(analysis, *merged, [out.shape[to] for to in after])
        origins = frozenset().union(*[value.origins[dimension] for dimension in before])
        for to, own_nodes, own_facts in zip(after, nodes, facts, strict=True):
            out.nodes[to], out.facts[to], out.origins[to] = own_nodes, own_facts, origins
    return None


def reshape_blocks(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Pairs the dimensions that a reshape merges or splits; it leaves out those of size 1.

    Args:
        before: shape of the operand, without zeros.
        after: shape of the result.

    Returns:
        Pairs of dimensions before and after, each with the same product of sizes.

    Example:
        >>> reshape_blocks((2, 3, 4, 1, 5), (6, 4, 5))
        [([0, 1], [0]), ([2], [1]), ([4], [2])]
    """
    rest = [d for d, size in enumerate(before) if size > 1]
    goal = [d for d, size in enumerate(after) if size > 1]
    blocks = []
    while rest:
        left, right = [rest.pop(0)], [goal.pop(0)]
        sizes = [before[left[0]], after[right[0]]]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                left.append(rest.pop(0))
                sizes[0] *= before[left[-1]]
            else:
                right.append(goal.pop(0))
                sizes[1] *= after[right[-1]]
        blocks.append((left, right))
    return blocks


def _merge(analysis: "Analysis", op: Op, dimensions: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Flattens nodes and facts of several dimensions to one; only one of them may be free."""
    value = op.ins[0]
    nodes, facts = value.nodes[dimensions[0]], zero_only(value.facts[dimensions[0]])
    for dimension in dimensions[1:]:
        inner, inner_facts = value.nodes[dimension], zero_only(value.facts[dimension])
        if analysis.is_free(nodes).any() and analysis.is_free(inner).any():
            # If one of the two belongs to a parameter, that one remains free.
            outer_counts = analysis.nodes.of_leaf[analysis.root(nodes)].any()
            inner_counts = analysis.nodes.of_leaf[analysis.root(inner)].any()
            loser = nodes if inner_counts and not outer_counts else inner
            analysis.freeze(loser, f"merged with another free dimension by `reshape` {op.where}")
        shape = (len(nodes), len(inner))
        fixed = ~analysis.is_free(inner)[None]
        nodes = np.where(fixed, np.broadcast_to(nodes[:, None], shape), inner[None]).reshape(-1)
        facts = np.where(fixed, np.broadcast_to(facts[:, None], shape), inner_facts[None])
        facts = facts.reshape(-1)
    return nodes, facts


def _split(
    analysis: "Analysis", nodes: np.ndarray, facts: np.ndarray, sizes: list[int]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Splits a dimension into several, of which one may shrink.

    Removing an index of that factor removes it at all positions of the other factors.
    """
    if len(sizes) == 1:
        return [nodes], [facts]
    roots = analysis.root(nodes).reshape(sizes)
    factor = analysis.split_factor(roots)
    rows = rows_of(roots, factor)
    first = rows[:, 0].copy()
    analysis.unite(np.repeat(first, rows.shape[1] - 1), rows[:, 1:].reshape(-1))
    analysis.note_split(roots, first)
    parts = [_fixed(size) for size in sizes]
    row_facts = rows_of(facts.reshape(sizes), factor)
    parts[factor] = first, np.bitwise_and.reduce(row_facts, axis=1)
    return [own for own, _ in parts], [own for _, own in parts]


def _fixed(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns nodes and facts of a dimension that is kept whole."""
    return np.zeros(size, np.int64), np.zeros(size, np.uint8)


def _run_reshape(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    shape = run.shape(op.outs[0])
    if math.prod(shape) != arrays[0].size:
        raise ValueError(
            f"the plan must leave a rectangular array at `reshape` {op.where}, but keeps "
            f"{arrays[0].size} entries for shape {shape}; please report this."
        )
    return [lax.reshape(arrays[0], shape, out_sharding=op.params.get("sharding"))]


def _concatenate(analysis: "Analysis", op: Op) -> None:
    out, axis = op.outs[0], op.params["dimension"]
    for dimension in range(len(out.shape)):
        facts = [zero_only(value.facts[dimension]) for value in op.ins]
        if dimension == axis:
            out.nodes.append(np.concatenate([value.nodes[axis] for value in op.ins]))
            out.facts.append(np.concatenate(facts))
        else:
            first = op.ins[0].nodes[dimension]
            for value in op.ins[1:]:
                analysis.unite(first, value.nodes[dimension])
            out.nodes.append(first)
            out.facts.append(functools.reduce(np.bitwise_and, facts))
        out.origins.append(frozenset().union(*[value.origins[dimension] for value in op.ins]))


def _stack(analysis: "Analysis", op: Op) -> None:
    out, axis = op.outs[0], op.params["axis"]
    for dimension in range(len(op.ins[0].shape)):
        first = op.ins[0].nodes[dimension]
        for value in op.ins[1:]:
            analysis.unite(first, value.nodes[dimension])
        facts = [zero_only(value.facts[dimension]) for value in op.ins]
        out.nodes.append(first)
        out.facts.append(functools.reduce(np.bitwise_and, facts))
        out.origins.append(frozenset().union(*[value.origins[dimension] for value in op.ins]))
    nodes, facts = _fixed(len(op.ins))
    out.nodes.insert(axis, nodes)
    out.facts.insert(axis, facts)
    out.origins.insert(axis, frozenset())


def _unstack(analysis: "Analysis", op: Op) -> None:
    value, axis = op.ins[0], op.params["axis"]
    analysis.freeze(value.nodes[axis], f"`unstack` along it {op.where}")
    for out in op.outs:
        _pick_into(out, value, [d for d in range(len(value.shape)) if d != axis])
        out.facts = [zero_only(facts) for facts in out.facts]


def _pad(analysis: "Analysis", op: Op) -> None:
    value, out = op.ins[0], op.outs[0]
    filler = ALWAYS_ZERO if op.ins[1].number == 0 else NOTHING
    padded = [config != (0, 0, 0) for config in op.params["padding_config"]]
    for dimension, (low, high, between) in enumerate(op.params["padding_config"]):
        nodes, facts = value.nodes[dimension], zero_only(value.facts[dimension])
        if padded[dimension] and (between or low < 0 or high < 0):
            analysis.freeze(nodes, f"`pad` inside of or off this dimension {op.where}")
            nodes, facts = _fixed(out.shape[dimension])
        elif padded[dimension]:  # padding can be removed with whatever it is combined with
            ends = [np.full(size, filler, np.uint8) for size in (low, high)]
            nodes = np.concatenate([analysis.nodes.new(low), nodes, analysis.nodes.new(high)])
            facts = np.concatenate([ends[0], facts, ends[1]])
        if filler == NOTHING and any(p for d, p in enumerate(padded) if d != dimension):
            facts = np.zeros_like(facts)
        out.nodes.append(nodes)
        out.facts.append(facts)
        out.origins.append(value.origins[dimension])


def _run_pad(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    config = []
    for dimension, (low, high, between) in enumerate(op.equation.params["padding_config"]):
        kept = run.kept(op.outs[0], dimension)
        if not kept.all() and not between and low >= 0 and high >= 0:
            low, high = int(kept[:low].sum()), int(kept[len(kept) - high :].sum())
        config.append((low, high, between))
    return [lax.pad(arrays[0], arrays[1], config)]


def _tile(analysis: "Analysis", op: Op) -> None:
    value, out = op.ins[0], op.outs[0]
    out.like(value)
    for dimension, times in enumerate(op.params["reps"]):
        out.nodes[dimension] = np.tile(value.nodes[dimension], times)
        out.facts[dimension] = np.tile(zero_only(value.facts[dimension]), times)


def _slice(analysis: "Analysis", op: Op) -> None:
    value, out, params = op.ins[0], op.outs[0], op.params
    strides = params["strides"] or (1,) * len(value.shape)
    out.like(value)
    for dimension, ends in enumerate(
        zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ):
        out.nodes[dimension] = value.nodes[dimension][slice(*ends)]
        out.facts[dimension] = zero_only(value.facts[dimension][slice(*ends)])


def _run_slice(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    value, params, array = op.ins[0], op.equation.params, arrays[0]
    strides = params["strides"] or (1,) * len(value.shape)
    for dimension, ends in enumerate(
        zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ):
        kept = run.kept(value, dimension)
        if kept.all():
            array = lax.slice_in_dim(array, *ends, axis=dimension)
            continue
        wanted = np.arange(*ends)
        places = (np.cumsum(kept) - 1)[wanted[kept[wanted]]]
        if len(places) and (np.diff(places) == 1).all():
            first, last = int(places[0]), int(places[-1])
            array = lax.slice_in_dim(array, first, last + 1, axis=dimension)
        else:
            array = pick(array, places, dimension)
    return [array]


def _split_axis(analysis: "Analysis", op: Op) -> None:
    value, axis, start = op.ins[0], op.params["axis"], 0
    for out, size in zip(op.outs, op.params["sizes"], strict=True):
        out.like(value)
        out.nodes[axis] = value.nodes[axis][start : start + size]
        out.facts = [zero_only(facts) for facts in value.facts]
        out.facts[axis] = out.facts[axis][start : start + size]
        start += size


def _run_split(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    axis = op.params["axis"]
    sizes = [run.shape(out)[axis] for out in op.outs]
    return [*lax.split(arrays[0], sizes, axis=axis)]


def _made(analysis: "Analysis", op: Op) -> None:
    for value in op.ins:
        for nodes in value.nodes:
            analysis.freeze(nodes, f"`{op.name}` {op.where}")
    out = op.outs[0]
    out.nodes = [_new(analysis, size) for size in out.shape]
    out.facts = [np.zeros(size, np.uint8) for size in out.shape]


def _run_made(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    # Take from the dense array, so that each entry equals that of the dense function.
    return [run.take(run.bind(op, arrays)[0], op.outs[0])]


def _new(analysis: "Analysis", size: int) -> np.ndarray:
    return analysis.nodes.new(size) if size > 1 else np.zeros(size, np.int64)


RULES = {
    "broadcast_in_dim": Rule(_broadcast, _run_broadcast),
    "transpose": Rule(_transpose),
    "squeeze": Rule(_squeeze),
    "rev": Rule(_reverse),
    "reshape": Rule(_reshape, _run_reshape),
    "concatenate": Rule(_concatenate),
    "stack": Rule(_stack),
    "unstack": Rule(_unstack),
    "pad": Rule(_pad, _run_pad),
    "tile": Rule(_tile),
    "slice": Rule(_slice, _run_slice),
    "split": Rule(_split_axis, _run_split),
    "iota": Rule(_made, _run_made),
    "random_bits": Rule(_made, _run_made),
}
