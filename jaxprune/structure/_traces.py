"""Traces a function of variables to a jaxpr and analyses that."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jaxprune import trees
from jaxprune.jaxprs import abstract, on_arrays, split
from jaxprune.structure._analysis import Analysis
from jaxprune.structure._values import UNGATED, ZERO_GATE, Graph, Split


class Trace(NamedTuple):
    """One way to call a function: `function(variables, *args, **kwargs)`.

    Arrays among the arguments are traced. All other leaves, such as bools, numbers, strings and
    functions, are passed on as they are.

    Example:
        >>> import jax.numpy as jnp
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
    kwargs: Mapping[str, Any] = MappingProxyType({})


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
    dtypes: Mapping[str, str] = MappingProxyType({})  # path -> dtype, where known


class Traced(NamedTuple):
    """A function as a jaxpr with flat inputs and outputs.

    Example:
        >>> import jax.numpy as jnp
        >>> trace = Trace(lambda variables: variables["w"])
        >>> trace_function(trace, {"w": jnp.ones(2)}).updated
        {}
    """

    closed: Any  # the closed jaxpr
    avals: list[Any]  # types of the variables
    output: Callable[..., Any]  # arrays that the jaxpr returns -> the whole output, see `Parts`
    updated: dict[int, str]  # index of an output -> path of the variable whose new value it is
    shrinking: frozenset[int]  # indices of the other outputs that may lose channels


def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function compiled; what is no array is passed on as it is, and returned as it is."""
    call, arrays, box = on_arrays(function, *args, **kwargs)
    results = jax.jit(call)(arrays)
    return box[0](results)


def to_jaxpr(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Traces a function on shapes; returns the jaxpr of its arrays, and the types of its output."""
    call, arrays, box = on_arrays(function, *args, **kwargs)
    closed = jax.make_jaxpr(call)(list(map(abstract, arrays)))
    return closed, box[0](closed.out_avals)


def trace_function(trace: Trace, variables: Any) -> Traced:
    """Traces a function on the shapes of its variables and arguments."""
    call, arrays, box = on_arrays(trace.function, variables, *trace.args, **trace.kwargs)
    shapes = list(map(abstract, arrays))
    closed = jax.make_jaxpr(call)(shapes)
    indices = box[0](range(len(closed.out_avals)), False)
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
    count = len(split(variables).arrays)
    return Traced(closed, shapes[:count], box[0], updated, frozenset(shrinking))


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
    analysis.mark_used()
    return analysis, graph


def broken_caches(model: Model, traced: Traced, analysis: Analysis, graph: Graph) -> set[str]:
    """Returns the caches whose new value may differ from 0 where they are masked."""
    return {
        path
        for index, path in traced.updated.items()
        for nodes, facts in zip(graph.outs[index].nodes, graph.outs[index].facts, strict=True)
        if path in model.caches and (facts[analysis.is_free(nodes)] & UNGATED != UNGATED).any()
    }
