"""From a function and its variables to an analysis of its jaxpr."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import trees
from jaxprune.structure._analysis import Analysis
from jaxprune.structure._values import Graph


class Trace(NamedTuple):
    """One way to call a function: `function(variables, *args)`.

    Example:
        >>> Trace(lambda variables, x: x @ variables["w"], (jnp.ones((1, 2)),)).updates is None
        True
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    # From the output to the part of it that is new values of variables, under the same paths, such
    # as `lambda output: output[1]`; all other outputs keep their shapes. None: all of them do.
    updates: Callable[[Any], Any] | None = None


class Model(NamedTuple):
    """What groups and plans know of the variables.

    Example:
        >>> Model({"w": (2, 3)}, frozenset({"w"}), frozenset()).shapes
        {'w': (2, 3)}
    """

    shapes: dict[str, tuple[int, ...]]  # by path, in flattening order
    parameters: frozenset[str]  # paths of what masks set to zero
    consumers: frozenset[tuple[int, int]]  # (leaf, dimension) that only consume a width


class Traced(NamedTuple):
    """A function as a jaxpr of flat inputs and outputs.

    Example:
        >>> trace = Trace(lambda variables: variables["w"])
        >>> trace_function(trace, {"w": jnp.ones(2)}).updated
        {}
    """

    closed: Any
    avals: list[Any]  # of the variables
    structure: Any  # of the output
    updated: dict[int, str]  # index of an output -> path of the variable whose new value it is


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

    shapes = [[_abstract(leaf) for leaf in part] for part in (flat, flat_args)]
    closed = jax.make_jaxpr(call)(*shapes)
    updated: dict[int, str] = {}
    if trace.updates is not None:
        indices = jax.tree.unflatten(box["structure"], list(range(len(closed.jaxpr.outvars))))
        updated = {
            index: path for path, index in trees.leaf_by_path(trace.updates(indices)).items()
        }
        known = trees.leaf_by_path(variables)
        trees.raise_for(
            [path for path in updated.values() if path not in known],
            "`updates` must return new values under paths of the variables; unknown:",
        )
    return Traced(closed, shapes[0], box["structure"], updated)


def analyze(model: Model, traced: Traced, outputs: bool = True) -> tuple[Analysis, Graph]:
    """Follows a traced function; unless told, outputs that are no updates keep their shapes."""
    analysis = Analysis(model.consumers)
    leaves = [
        analysis.leaf(jax.ShapeDtypeStruct(shape, aval.dtype), path in model.parameters)
        for (path, shape), aval in zip(model.shapes.items(), traced.avals, strict=True)
    ]
    jaxpr = traced.closed.jaxpr
    data = [analysis.data(var.aval) for var in jaxpr.invars[len(leaves) :]]
    graph = analysis.graph(jaxpr, traced.closed.consts, [*leaves, *data])
    position = {path: index for index, path in enumerate(model.shapes)}
    for index, out in enumerate(graph.outs):
        path = traced.updated.get(index)
        if path is not None and model.shapes[path] == out.shape:
            for nodes, own in zip(out.nodes, leaves[position[path]].nodes, strict=True):
                analysis.unite(nodes, own)
        elif outputs:
            for nodes in out.nodes:
                analysis.freeze(nodes, "an output has it")
    return analysis, graph


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype)
