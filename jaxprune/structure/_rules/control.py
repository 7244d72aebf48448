"""Primitives that contain functions: derivative rules, rematerialisation, loops and branches.

Of the rules, only these rely on JAX internals: how `jax.custom_jvp` and `jax.custom_vjp` store
their rules in an equation. A comment at each use names the function of `jax._src` that it mirrors,
as of JAX 0.10.2.
"""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import jaxprs
from jaxprune.structure._nodes import FROZEN
from jaxprune.structure._rules.elementwise import with_same, zero_only
from jaxprune.structure._values import ZERO, ZERO_GATE, ZERO_SOFT, Op, Rule, Value

if TYPE_CHECKING:
    from jaxprune.structure._analysis import Analysis
    from jaxprune.structure._execution import Execution

_ABSENT = ("Zero", "SymbolicZero")  # class names of JAX's symbolic zeros, for absent cotangents


def _unite_all(analysis: "Analysis", a: Value, b: Value) -> None:
    """Joins all dimensions of two values with the same shape."""
    for one, other in zip(a.nodes, b.nodes, strict=True):
        analysis.unite(one, other)


def _blank(value: Value) -> Value:
    """Makes a value with the same nodes, of which nothing else is known."""
    facts = [np.zeros(n, np.uint8) for n in value.shape]
    return Value(value.aval, list(value.nodes), facts, [frozenset()] * len(value.shape))


def entering(value: Value) -> Value:
    """Makes a value as the inner function sees it: without the operation that computed it."""
    facts = [zero_only(own) for own in value.facts]
    inside = Value(value.aval, list(value.nodes), facts, list(value.origins), value.support)
    inside.of_params, inside.number = value.of_params, value.number
    return inside


def _tangent(value: Value) -> Value:
    """Makes the tangent of a value; it is 0 where the value is always 0."""
    tangent = entering(value)
    tangent.number = None
    return tangent


def _leaving(out: Value, inner: Value) -> None:
    """Gives an output of the operation what is known of the inner function's output."""
    out.like(inner)
    out.facts = [zero_only(own) for own in inner.facts]


def _is_float(value: Value) -> bool:
    return bool(jnp.issubdtype(value.aval.dtype, jnp.inexact))


def _call(analysis: "Analysis", op: Op, jaxpr: Any, consts: Any) -> None:
    """Follows the inner function; its outputs are those of the operation."""
    op.inner["call"] = analysis.graph(jaxpr, consts, list(map(entering, op.ins)))
    for out, inner in zip(op.outs, op.inner["call"].outs, strict=True):
        _leaving(out, inner)


def _seen(analysis: "Analysis", op: Op, jaxpr: Any) -> bool:
    """Tells whether the derivative rule is being followed already, and shares what it found.

    Most rules call the function itself again, so following them without this check would not end.
    Sharing the result also keeps derivatives of derivatives right.
    """
    roots = [analysis.root(nodes) for value in op.ins for nodes in value.nodes]
    key = (str(jaxpr), tuple(np.concatenate([*roots, np.zeros(0, np.int64)]).tolist()))
    for other, inner in analysis.rule_stack:
        if other == key:
            op.inner = inner
            return True
    analysis.rule_stack.append((key, op.inner))
    return False


def _custom_jvp(analysis: "Analysis", op: Op) -> None:
    closed, skipped = op.params["call_jaxpr"], op.params["num_consts"]
    _call(analysis, op, closed.jaxpr, closed.consts)
    if not analysis.any_free(op.ins) or _seen(analysis, op, closed.jaxpr):
        return
    primals = list(map(entering, op.ins[skipped:]))
    constant = [not _is_float(value) for value in primals]
    # As `custom_derivatives.lift_jvp`: the thunk takes one bool per operand, "its tangent is 0". It
    # returns a jaxpr of all primals and the other tangents, and the same bools for the outputs.
    jaxpr, consts, out_constant = op.params["jvp_jaxpr_fun"].call_wrapped(*constant)
    tangents = [_tangent(v) for v, c in zip(primals, constant, strict=True) if not c]
    graph = analysis.graph(jaxpr, consts, [*primals, *tangents])
    analysis.rule_stack.pop()
    outs, out_tangents = graph.outs[: len(op.outs)], iter(graph.outs[len(op.outs) :])
    for out, primal, is_constant in zip(op.outs, outs, out_constant, strict=True):
        _unite_all(analysis, out, primal)
        if not is_constant:
            tangent = next(out_tangents)
            _unite_all(analysis, out, tangent)
            # A rule may move an output that the function keeps at 0, as straight-through rules do.
            pairs = zip(out.facts, tangent.facts, strict=True)
            out.facts = [own & zero_only(moving) for own, moving in pairs]
            out.support |= tangent.support
    op.inner |= {"jvp": graph, "constant": constant, "out_constant": out_constant}


def _run_custom_jvp(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    if "jvp" not in op.inner:  # none of its operands shrinks
        return run.bind(op, arrays)
    inner, skipped = op.inner, op.params["num_consts"]
    call = jax.custom_jvp(lambda *args: tuple(run.graph(inner["call"], args)))

    def jvp(primals: Any, tangents: Any) -> Any:
        pairs = zip(tangents[skipped:], inner["constant"], strict=True)
        given = [tangent for tangent, constant in pairs if not constant]
        results = run.graph(inner["jvp"], [*primals[skipped:], *given])
        outs, moving = results[: len(op.outs)], iter(results[len(op.outs) :])
        pairs = zip(outs, inner["out_constant"], strict=True)
        return tuple(outs), tuple(_no_tangent(out) if c else next(moving) for out, c in pairs)

    call.defjvp(jvp)
    return list(call(*arrays))


def _no_tangent(out: Any) -> Any:
    if jnp.issubdtype(out.dtype, jnp.inexact):
        return jnp.zeros_like(out)
    return np.zeros(out.shape, jax.dtypes.float0)


def _custom_vjp(analysis: "Analysis", op: Op) -> bool | None:
    closed = op.params["call_jaxpr"]
    _call(analysis, op, closed.jaxpr, closed.consts)
    if not analysis.any_free(op.ins):
        return None
    if op.params["num_consts"]:  # the function closes over traced values
        return False
    if _seen(analysis, op, closed.jaxpr):
        return None
    # As `custom_derivatives.lift_fwd`: the thunk takes one bool per operand, "it has a tangent". It
    # returns a jaxpr from the operands to the residuals, followed by the primal outputs.
    jaxpr, consts = op.params["fwd_jaxpr_thunk"].call_wrapped(*map(_is_float, op.ins))
    ins = list(map(entering, op.ins))
    forward = analysis.graph(jaxpr, consts, ins)
    analysis.rule_stack.pop()
    count = len(forward.outs) - len(op.outs)
    # As `ad.JVPTrace.process_custom_vjp_call`: residuals that are just an operand are not returned
    # (`custom_derivatives._filter_forwarded_inputs`). The third of `out_trees` holds the index of
    # that operand for each residual, or None for one that the forward rule computes.
    forwarded = op.params["out_trees"]()[2]
    computed = iter(forward.outs[:count])
    residuals = [_blank(next(computed) if at is None else ins[at]) for at in forwarded]
    for out, primal in zip(op.outs, forward.outs[count:], strict=True):
        _unite_all(analysis, out, primal)
    cotangents = [_blank(out) for out in op.outs]
    given: list[bool] = []

    def backward(*args: Any) -> list[Any]:
        # As `ad._custom_lin_transpose`: residuals and cotangents in, one cotangent per operand out.
        # `bwd` is a `WrappedFun` or, in newer JAX, a function that returns a pair.
        results = getattr(op.params["bwd"], "call_wrapped", op.params["bwd"])(*args)
        if isinstance(results, tuple) and isinstance(results[0], list):
            results, _ = results
        # As `custom_derivatives._flatten_bwd`: an absent cotangent is a symbolic zero, and that of
        # an integer has dtype float0. Neither enters the jaxpr.
        given[:] = [
            getattr(x, "dtype", jax.dtypes.float0) != jax.dtypes.float0
            and type(x).__name__ not in _ABSENT
            for x in results
        ]
        return [x for x, is_given in zip(results, given, strict=True) if is_given]

    shapes = [jaxprs.abstract(value.aval) for value in [*residuals, *cotangents]]
    traced = jax.make_jaxpr(backward)(*shapes)
    graph = analysis.graph(traced.jaxpr, traced.consts, [*residuals, *cotangents])
    received = [value for value, is_given in zip(op.ins, given, strict=True) if is_given]
    pairs = list(zip(received, graph.outs, strict=True))
    for value, cotangent in pairs:
        _unite_all(analysis, value, cotangent)
    _trust(analysis, op, pairs)
    for out in op.outs:
        out.support = out.support.union(*[value.support for value in op.ins])
    op.inner |= {"forward": forward, "backward": graph, "residuals": count}
    op.inner |= {"given": list(given), "forwarded": forwarded}
    return None


def _trust(analysis: "Analysis", op: Op, pairs: list[tuple[Value, Value]]) -> None:
    """Keeps "is zero" for an output only if each operand that moves it is zero, or its cotangent.

    Gradients of a zero output may move an operand that is not zero, as straight-through rules do.
    """
    for bit in (ZERO, ZERO_SOFT, ZERO_GATE):
        moving = [
            analysis.root(nodes[(own | back) & bit == 0])
            for value, cotangent in pairs
            for nodes, own, back in zip(value.nodes, value.facts, cotangent.facts, strict=True)
        ]
        roots = np.concatenate([np.zeros(0, np.int64), *moving])
        for out in op.outs:
            for dimension, nodes in enumerate(out.nodes):
                hit = np.isin(analysis.root(nodes), roots[roots != FROZEN])
                lost = with_same(np.where(hit, bit, 0).astype(np.uint8))
                out.facts[dimension] = out.facts[dimension] & ~lost


def _run_custom_vjp(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    if "forward" not in op.inner:
        return run.bind(op, arrays)
    inner = op.inner
    call = jax.custom_vjp(lambda *args: tuple(run.graph(inner["call"], args)))

    def forward(*args: Any) -> Any:
        results = run.graph(inner["forward"], args)
        computed = iter(results[: inner["residuals"]])
        residuals = [next(computed) if at is None else args[at] for at in inner["forwarded"]]
        return tuple(results[inner["residuals"] :]), tuple(residuals)

    def backward(residuals: Any, cotangents: Any) -> Any:
        results = iter(run.graph(inner["backward"], [*residuals, *cotangents]))
        return tuple(next(results) if given else None for given in inner["given"])

    call.defvjp(forward, backward)
    return list(call(*arrays))


def _remat(analysis: "Analysis", op: Op) -> None:
    _call(analysis, op, op.params["jaxpr"], ())


def _run_remat(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    states = list(map(run.spread.state, op.ins))
    call = jax.checkpoint(
        lambda *args: tuple(run.graph(op.inner["call"], args, states)),
        prevent_cse=op.params["prevent_cse"],
        policy=op.params["policy"],
    )
    return list(call(*arrays))


def loop(
    analysis: "Analysis", body: Any, consts: list[Value], carry: list[Value], rows: list[Value]
) -> tuple[Any, list[list[np.ndarray]]]:
    """Follows the body until facts hold for every pass; returns its graph and the carry's facts."""
    facts = [list(value.facts) for value in carry]
    supports = [value.support for value in carry]
    while True:
        carried = [_blank(value) for value in carry]
        for value, own, support in zip(carried, facts, supports, strict=True):
            value.facts, value.support = list(own), support
        graph = analysis.graph(body.jaxpr, body.consts, [*consts, *carried, *rows])
        after = []
        for value, out, own in zip(carried, graph.outs, facts):
            _unite_all(analysis, value, out)
            after.append([a & zero_only(b) for a, b in zip(own, out.facts, strict=True)])
        rests = [own | out.support for own, out in zip(supports, graph.outs)]
        settled = rests == supports and all(
            np.array_equal(a, b)
            for old, new in zip(facts, after, strict=True)
            for a, b in zip(old, new, strict=True)
        )
        facts, supports = after, rests
        if settled:
            return graph, [list(map(zero_only, own)) for own in facts]


def carried(outs: list[Value], graph: Any, facts: list[list[np.ndarray]]) -> None:
    """Gives the outputs of a loop what is known of its last carry."""
    for out, inner, own in zip(outs, graph.outs, facts):
        out.like(inner)
        out.facts, out.number, out.origins = own, None, []


def _while(analysis: "Analysis", op: Op) -> None:
    of_cond, of_body = op.params["cond_nconsts"], op.params["body_nconsts"]
    ins = list(map(entering, op.ins))
    consts, carry = ins[of_cond : of_cond + of_body], ins[of_cond + of_body :]
    body, cond = op.params["body_jaxpr"], op.params["cond_jaxpr"]
    graph, facts = loop(analysis, body, consts, carry, [])
    carried(op.outs, graph, facts)
    asked = [_blank(value) for value in carry]
    for value, own in zip(asked, facts, strict=True):
        value.facts = own
    op.inner["cond"] = analysis.graph(cond.jaxpr, cond.consts, [*ins[:of_cond], *asked])
    op.inner["call"] = graph


def _run_while(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    of_cond, of_body = op.params["cond_nconsts"], op.params["body_nconsts"]
    asking, doing = arrays[:of_cond], arrays[of_cond : of_cond + of_body]
    return list(
        lax.while_loop(
            lambda carry: run.graph(op.inner["cond"], [*asking, *carry])[0],
            lambda carry: tuple(run.graph(op.inner["call"], [*doing, *carry])),
            tuple(arrays[of_cond + of_body :]),
        )
    )


def _cond(analysis: "Analysis", op: Op) -> None:
    branches = [
        analysis.graph(branch.jaxpr, branch.consts, list(map(entering, op.ins[1:])))
        for branch in op.params["branches"]
    ]
    op.inner["branches"] = branches
    for out, *inner in zip(op.outs, *[graph.outs for graph in branches], strict=True):
        _leaving(out, inner[0])
        out.number, out.origins = None, []
        for other in inner[1:]:
            _unite_all(analysis, out, other)
            out.facts = [a & zero_only(b) for a, b in zip(out.facts, other.facts, strict=True)]
            out.support |= other.support


def _run_cond(run: "Execution", op: Op, arrays: list[Any]) -> list[Any]:
    calls = [functools.partial(run.graph, graph) for graph in op.inner["branches"]]
    branches = [lambda *args, call=call: tuple(call(args)) for call in calls]
    return list(lax.switch(arrays[0], branches, *arrays[1:]))


RULES = {
    "custom_jvp_call": Rule(_custom_jvp, _run_custom_jvp),
    "custom_vjp_call": Rule(_custom_vjp, _run_custom_vjp),
    "while": Rule(_while, _run_while),
    "cond": Rule(_cond, _run_cond),
}
RULES |= {name: Rule(_remat, _run_remat) for name in ("remat2", "checkpoint", "remat")}
