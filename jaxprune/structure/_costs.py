"""What a function costs: multiply-accumulates, for all plans from one analysis."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxprune.structure._execution import Execution
from jaxprune.structure._groups import Groups
from jaxprune.structure._plans import Plan
from jaxprune.structure._traces import Trace, abstract, analyze, trace_function
from jaxprune.structure._values import Graph, Op

Shape = Sequence[int]


def macs_of(name: str, params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    """Multiply-accumulates of one primitive; padding counts as if it were there.

    Args:
        name: of the primitive.
        params: of the equation.
        ins: shapes of the operands.
        outs: shapes of the results.

    Returns:
        An exact count; 0 for all that is neither a product of matrices nor a convolution.

    Example:
        >>> macs_of("dot_general", {"dimension_numbers": (((1,), (0,)), ((), ()))},
        ...     [(2, 3), (3, 4)], [(2, 4)])
        24
    """
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return math.prod(outs[0]) * math.prod(ins[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel_out, *rest = params["dimension_numbers"].rhs_spec
        taps = math.prod(ins[1][axis] for axis in rest)
        dilation = math.prod(params.get("lhs_dilation") or ())
        return math.prod(outs[0]) * taps // dilation  # zeros between inputs are not multiplied
    return 0


def count_macs(function: Callable[..., Any], *args: Any) -> int:
    """Multiply-accumulates of one call, from the jaxpr: products of matrices and convolutions.

    A loop counts as often as it runs, a branch as its dearest side, `while` as one pass. Padding
    counts. XLA's `cost_analysis` counts two operations for each of ours, and leaves padding out.

    Args:
        function: any JAX function.
        *args: arrays or `jax.ShapeDtypeStruct`.

    Returns:
        An exact count.

    Example:
        >>> count_macs(lambda a, b: jnp.tanh(a @ b), jnp.ones((2, 3)), jnp.ones((3, 4)))
        24
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*jax.tree.map(abstract, args)).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> int:
    inner = [_of_jaxpr(own) for own in _jaxprs(equation)]
    if inner:
        name, params = equation.primitive.name, equation.params
        return _together(name, params, inner)
    ins = [jnp.shape(var.aval) for var in equation.invars]
    outs = [var.aval.shape for var in equation.outvars]
    return macs_of(equation.primitive.name, equation.params, ins, outs)


def _jaxprs(equation: Any) -> list[Any]:
    """The functions that an equation calls; of a custom derivative, not the rules."""
    names = ("jaxpr", "call_jaxpr", "branches", "body_jaxpr", "cond_jaxpr")
    found = [equation.params[name] for name in names if name in equation.params]
    flat = [own for part in found for own in (part if isinstance(part, tuple) else (part,))]
    return [own.jaxpr if isinstance(own, core.ClosedJaxpr) else own for own in flat]


def _together(name: str, params: dict[str, Any], inner: Sequence[int]) -> int:
    """The cost of an operation from those of the functions inside."""
    return max(inner) if name == "cond" else sum(inner) * params.get("length", 1)


def mac_cost(
    groups: Groups, function: Callable[..., Any], variables: Any, *args: Any
) -> Callable[[Plan], int]:
    """Multiply-accumulates of one call after compaction, as a function of the plan.

    The function is analysed once; each plan then takes a few milliseconds.

    Args:
        groups: from `find_groups`.
        function: one of those that were analysed.
        variables: dense arrays or `jax.ShapeDtypeStruct`.
        *args: of the function, likewise; one image gives the cost of an image.

    Returns:
        A function from plans of these groups to exact counts, as those of `reports.count_macs`; for
        `keep_within`.

    Example:
        >>> from jaxprune.structure import find_groups
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w, x = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}, jnp.ones((1, 3))
        >>> groups = find_groups(mlp, w, x)
        >>> cost = mac_cost(groups, mlp, w, x)
        >>> cost(groups.plan({})), cost(groups.plan({"in:1": jnp.arange(8) < 4}))
        (40, 20)
    """
    analysis, graph = analyze(groups.model, trace_function(Trace(function, args), variables))

    def cost(plan: Plan) -> int:
        return _of_graph(graph, Execution(analysis, plan.kept_nodes(analysis)))

    return cost


def _of_graph(graph: Graph, execution: Execution) -> int:
    return sum(_of_op(op, execution) for op in graph.ops)


def _of_op(op: Op, execution: Execution) -> int:
    called = op.inner.get("branches") or [op.inner[n] for n in ("call", "cond") if n in op.inner]
    if called:
        return _together(op.name, op.params, [_of_graph(own, execution) for own in called])
    ins, outs = ([execution.shape(value) for value in part] for part in (op.ins, op.outs))
    return macs_of(op.name, op.params, ins, outs)


def byte_cost(variables: Any) -> Callable[[Plan], int]:
    """Bytes of all variables after compaction, as a function of the plan.

    Args:
        variables: dense arrays or `jax.ShapeDtypeStruct`.

    Returns:
        A function from plans to exact counts, for `keep_within`.

    Example:
        >>> from jaxprune.structure import find_groups
        >>> w = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2), jnp.bfloat16)}
        >>> groups = find_groups(lambda w, x: x @ w["in"] @ w["out"], w, jnp.ones((1, 3)))
        >>> byte_cost(w)(groups.plan({"in:1": jnp.arange(8) < 4}))
        64
    """
    sizes = [abstract(leaf).dtype.itemsize for leaf in jax.tree.leaves(variables)]

    def cost(plan: Plan) -> int:
        entries = [math.prod(plan.shape(path)) for path in plan.model.shapes]
        return sum(own * size for own, size in zip(entries, sizes, strict=True))

    return cost
