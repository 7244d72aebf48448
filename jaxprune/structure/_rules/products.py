"""Primitives that multiply and sum: contractions and convolutions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxprune.structure._rules.elementwise import zero_only
from jaxprune.structure._values import ZERO, Op, Rule, Value

if TYPE_CHECKING:
    from jaxprune.structure._analysis import Analysis
    from jaxprune.structure._execution import Execution


# Dimensions of the first and of the second operand that belong together
Pairs = tuple[Sequence[int], Sequence[int]]


def _contract(analysis: "Analysis", a: Value, at: int, b: Value, bt: int, op: Op) -> None:
    """Joins two dimensions that are summed over together; pruned entries must add 0 to the sum."""
    analysis.unite(a.nodes[at], b.nodes[bt])
    _consume(analysis, a, at, b)
    _consume(analysis, b, bt, a)
    reason = f"`{op.name}` {op.where} sums over it, and pruned entries would not add 0"
    analysis.need(a.nodes[at], a.facts[at] | b.facts[bt], ZERO, reason)


def _consume(analysis: "Analysis", weight: Value, dimension: int, other: Value) -> None:
    """Notes a dimension of a parameter that is summed over with data."""
    if weight.of_params and not other.of_params:
        analysis.consumers |= weight.origins[dimension]


def _note_kernels(analysis: "Analysis", value: Value, copies: Sequence[int] = ()) -> None:
    """Notes the leaves with two or more dimensions in one copy of a product, such as a matrix.

    `copies` are the batch dimensions of the product, which only repeat it.
    """
    if not value.of_params:
        return
    spans: dict[int, list[int]] = {}  # leaf -> its dimension for each dimension of the value
    for dimension, size in enumerate(value.shape):
        if size > 1 and dimension not in copies:
            for leaf in {leaf for leaf, _ in value.origins[dimension]}:
                own = [at for place, at in value.origins[dimension] if place == leaf]
                spans.setdefault(leaf, []).append(min(own))
    analysis.kernels |= {leaf for leaf, own in spans.items() if len(set(own)) > 1}


def _dot_general(analysis: "Analysis", op: Op) -> None:
    (a, b), (contract, batch) = op.ins, op.params["dimension_numbers"]
    _note_kernels(analysis, a, batch[0])
    _note_kernels(analysis, b, batch[1])
    if contract[0]:  # without, the product is elementwise
        analysis.copies += [a.nodes[at] for at in batch[0]]
    _multiply(analysis, op, contract, batch)


def _multiply(
    analysis: "Analysis", op: Op, contract: Pairs, batch: Pairs, groups: Sequence[int] = ()
) -> None:
    """Fills in a product of two operands; `groups` are dimensions of the second that go."""
    (a, b), out = op.ins[:2], op.outs[0]
    for at, bt in zip(*contract, strict=True):
        _contract(analysis, a, at, b, bt, op)
    for at, bt in zip(*batch, strict=True):
        analysis.unite(a.nodes[at], b.nodes[bt])
        out.nodes.append(a.nodes[at])
        out.facts.append(zero_only(a.facts[at] | b.facts[bt]))
        out.origins.append(a.origins[at] | b.origins[bt])
    used = {*contract[0], *batch[0]}, {*contract[1], *batch[1], *groups}
    for value, gone in zip((a, b), used):
        for dimension in range(len(value.shape)):
            if dimension not in gone:
                out.nodes.append(value.nodes[dimension])
                out.facts.append(zero_only(value.facts[dimension]))
                out.origins.append(value.origins[dimension])


def _ragged_dot(analysis: "Analysis", op: Op) -> None:
    """Follows products of which each row is multiplied by the kernel of its group.

    The rows of a group lie together, so that neither rows nor groups can be removed.
    """
    (a, b, sizes), out = op.ins, op.outs[0]
    numbers = op.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    _note_kernels(analysis, b, [*batch[1], *groups])
    rows = [a.nodes[dimension] for dimension in numbers.lhs_ragged_dimensions]
    for nodes in [*sizes.nodes, *rows, *[b.nodes[dimension] for dimension in groups]]:
        analysis.freeze(nodes, f"`{op.name}` finds its groups by it {op.where}")
    _multiply(analysis, op, contract, batch, groups)
    for size in out.shape[: len(out.shape) - len(out.nodes)]:  # a sum of rows for each group
        out.nodes.insert(0, np.zeros(size, np.int64))
        out.facts.insert(0, np.zeros(size, np.uint8))
        out.origins.insert(0, frozenset())


def _convolution(analysis: "Analysis", op: Op) -> bool | None:
    if op.params["batch_group_count"] != 1:
        return False
    (image, kernel), out = op.ins, op.outs[0]
    _note_kernels(analysis, kernel)
    numbers, groups = op.params["dimension_numbers"], op.params["feature_group_count"]
    image_batch, image_in, *image_space = numbers.lhs_spec
    kernel_out, kernel_in, *kernel_space = numbers.rhs_spec
    out_batch, out_channel, *_ = numbers.out_spec
    for value, space in ((image, image_space), (kernel, kernel_space)):
        for dimension in space:
            analysis.freeze(value.nodes[dimension], f"a convolution slides over it {op.where}")
    analysis.fix(out)
    out.nodes[out_batch] = image.nodes[image_batch]
    out.facts[out_batch] = zero_only(image.facts[image_batch])
    facts = zero_only(kernel.facts[kernel_out])
    if groups == 1:
        _contract(analysis, image, image_in, kernel, kernel_in, op)
    else:  # only whole groups of channels can be removed; depthwise, a group is one channel
        per_group = image.shape[image_in] // groups, kernel.shape[kernel_out] // groups
        ins = image.nodes[image_in].reshape(groups, per_group[0])
        outs = kernel.nodes[kernel_out].reshape(groups, per_group[1])
        for column in (*ins.T[1:], *outs.T):
            analysis.unite(ins[:, 0], column)
        analysis.freeze(kernel.nodes[kernel_in], f"inputs of a grouped convolution {op.where}")
        zeros = zero_only(image.facts[image_in]).reshape(groups, per_group[0])
        facts = facts | np.repeat(np.bitwise_and.reduce(zeros, axis=1), per_group[1])
    out.nodes[out_channel] = kernel.nodes[kernel_out]
    out.facts[out_channel] = facts
    out.origins[out_channel] = kernel.origins[kernel_out]
    return None


def _run_convolution(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    numbers, (image, kernel) = op.params["dimension_numbers"], arrays
    if 0 in kernel.shape:  # a slice of a dimension may lose all its channels
        return [jnp.zeros(run.shape(op.outs[0]), op.outs[0].aval.dtype)]
    groups = image.shape[numbers.lhs_spec[1]] // kernel.shape[numbers.rhs_spec[1]]
    params = op.equation.params | {"feature_group_count": groups}
    return [op.primitive.bind(image, kernel, **params)]


RULES = {
    "dot_general": Rule(_dot_general),
    "ragged_dot_general": Rule(_ragged_dot),
    "conv_general_dilated": Rule(_convolution, _run_convolution),
}
