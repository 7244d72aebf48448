"""Traces a function of variables to a jaxpr and analyses that."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import trees
from jaxprune.structure._analysis import Analysis
from jaxprune.structure._slicing import is_explicit, named_sharding
from jaxprune.structure._values import UNGATED, ZERO_GATE, Graph, Split


class Trace(NamedTuple):
    """One way to call a function: `function(variables, *args)`.

    Example:
        >>> Trace(lambda variables, x: x @ variables["w"], (jnp.ones((1, 2)),)).updates is None
        True
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    # output -> the part that holds new values of variables, under the same paths, such as
    # `lambda output: output[1]`.
    updates: Callable[[Any], Any] | None = None
    # output -> the part that may lose channels, such as features for a different network; see
    # `Plan.kept_outputs`. Outputs in neither part keep their shapes.
    shrinks: Callable[[Any], Any] | None = None


class Model(NamedTuple):
    """The variables as groups and plans know them.

    Example:
        >>> Model({"w": (2, 3)}, frozenset({"w"})).shapes
        {'w': (2, 3)}
    """

    shapes: dict[str, tuple[int, ...]]  # path -> shape, in flattening order
    parameters: frozenset[str]  # paths of the leaves that masks set to zero
    consumers: frozenset[tuple[int, int]] = frozenset()  # (leaf, dimension) that only consume
    caches: frozenset[str] = frozenset()  # paths of state that starts at 0 and stays 0 where masked
    factors: tuple[tuple[Split, int], ...] = ()  # the factor of a split dimension that may shrink


class Traced(NamedTuple):
    """A function as a jaxpr with flat inputs and outputs.

    Example:
        >>> trace = Trace(lambda variables: variables["w"])
        >>> trace_function(trace, {"w": jnp.ones(2)}).updated
        {}
    """

    closed: Any  # the closed jaxpr
    avals: list[Any]  # types of the variables
    structure: Any  # tree structure of the output
    updated: dict[int, str]  # index of an output -> path of the variable whose new value it is
    shrinking: frozenset[int]  # indices of the other outputs that may lose channels


def trace_function(trace: Trace, variables: Any) -> Traced:
    """Traces a function on the shapes of its variables and arguments."""
    flat, structure = jax.tree.flatten(variables)
    flat_args, args_structure = jax.tree.flatten(trace.args)
    box: dict[str, Any] = {}

    def call(leaves: list[Any], arguments: list[Any]) -> list[Any]:
        tree = jax.tree.unflatten(structure, leaves)
        output = trace.function(tree, *jax.tree.unflatten(args_structure, arguments))
        outs, box["structure"] = jax.tree.flatten(output)
        return outs

    shapes = [[abstract(leaf) for leaf in part] for part in (flat, flat_args)]
    closed = jax.make_jaxpr(call)(*shapes)
    indices = jax.tree.unflatten(box["structure"], list(range(len(closed.jaxpr.outvars))))
    updated: dict[int, str] = {}
    if trace.updates is not None:
        new = trees.leaf_by_path(trace.updates(indices))
        updated = {index: path for path, index in new.items()}
        known = trees.leaf_by_path(variables)
        trees.raise_for(
            [path for path in updated.values() if path not in known],
            "`updates` must return new values under paths of the variables; unknown:",
        )
    shrinking = frozenset() if trace.shrinks is None else jax.tree.leaves(trace.shrinks(indices))
    return Traced(closed, shapes[0], box["structure"], updated, frozenset(shrinking))


def analyze(
    model: Model, traced: Traced, outputs: bool = True, vectors: frozenset[int] = frozenset()
) -> tuple[Analysis, Graph]:
    """Follows a traced function through an `Analysis`.

    Args:
        model: the variables.
        traced: the function.
        outputs: whether outputs that are no updates must keep their shapes.
        vectors: leaves that an earlier pass found to be vectors although they are stacked, see
            `Analysis.vectors`.

    Returns:
        The analysis, and the function as a graph of its values.
    """
    analysis = Analysis(model.consumers, dict(model.factors), vectors)
    leaves = [
        analysis.leaf(aval, path in model.parameters, path in model.caches)
        for path, aval in zip(model.shapes, traced.avals, strict=True)
    ]
    jaxpr = traced.closed.jaxpr
    data = [analysis.data(var.aval) for var in jaxpr.invars[len(leaves) :]]
    graph = analysis.graph(jaxpr, traced.closed.consts, [*leaves, *data])
    analysis.use(graph.outs)
    position = {path: index for index, path in enumerate(model.shapes)}
    for index, out in enumerate(graph.outs):
        path = traced.updated.get(index)
        if path is not None and model.shapes[path] == out.shape:
            for nodes, own in zip(out.nodes, leaves[position[path]].nodes, strict=True):
                analysis.unite(nodes, own)
        elif index in traced.shrinking:
            for nodes, facts in zip(out.nodes, out.facts, strict=True):
                analysis.rest(nodes[facts & ZERO_GATE > 0], out.support)
        elif outputs:
            for nodes in out.nodes:
                analysis.freeze(nodes, "an output has it")
    return analysis, graph


def broken_caches(model: Model, traced: Traced, analysis: Analysis, graph: Graph) -> set[str]:
    """Returns the caches whose new value may differ from 0 where they are masked."""
    return {
        path
        for index, path in traced.updated.items()
        for nodes, facts in zip(graph.outs[index].nodes, graph.outs[index].facts, strict=True)
        if path in model.caches and (facts[analysis.is_free(nodes)] & UNGATED != UNGATED).any()
    }


def abstract(leaf: Any, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """Returns the type and explicit sharding of an array, at its own or the given shape."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    sharding = named_sharding(leaf)
    return jax.ShapeDtypeStruct(
        jnp.shape(leaf) if shape is None else shape,
        dtype,
        sharding=sharding if sharding is not None and is_explicit(sharding) else None,
    )
