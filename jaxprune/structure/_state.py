"""Tells state from parameters: traces update it, or no gradient reaches it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jaxprune import jaxprs
from jaxprune.structure._traces import Model, Traced, analyze

# A function traced only in evaluation mode is differentiable in its running statistics, so only the
# names that Flax gives them tell them from other vectors. A kernel is never a running statistic.
_COLLECTION, _STATISTICS = "batch_stats", ("mean", "var")
_CALLS = {"jit", "pjit", "closed_call", "core_call", "xla_call", "remat2", "checkpoint", "remat"}
# Primitives whose derivative is 0 or undefined.
_FLAT = {"stop_gradient", "sign", "floor", "ceil", "round", "nextafter"}


def find_state(traces: Sequence[Traced], leaves: Mapping[str, Any]) -> dict[str, str]:
    """Finds the variables that are no parameters.

    Args:
        traces: all traced functions.
        leaves: path -> variable, in the order of the traces.

    Returns:
        Path -> reason. The reasons are: `updates` returns a new value; no gradient reaches the
        variable in a trace that uses it; Flax uses its name for running statistics. The kernel of a
        matrix product or a convolution is no running statistic, whatever its name.

    Example:
        >>> from jaxprune.structure._traces import Trace, trace_function
        >>> variables = {"w": jnp.ones(2), "average": jnp.ones(2)}
        >>> def train(variables, x):
        ...     return variables["w"] * x, {"average": variables["average"] + x}
        >>> trace = Trace(train, (jnp.ones(2),), updates=lambda output: output[1])
        >>> find_state([trace_function(trace, variables)], variables)
        {'average': '`updates` returns a new value'}
    """
    paths = list(leaves)
    state = {path: "no gradient reaches it" for path in _without_gradient(traces, paths)}
    for traced in traces:
        state |= dict.fromkeys(_changed(traced, paths), "`updates` returns a new value")
    named = {path: why for path in paths if path not in state and (why := _name_of_state(path))}
    kernels = _kernels(traces, leaves, named)
    return state | {path: why for path, why in named.items() if path not in kernels}


def _name_of_state(path: str) -> str | None:
    """Returns the reason if the name of a leaf is one of running statistics, else None."""
    parts = path.split("/")
    if _COLLECTION in parts:
        return f"lies in a `{_COLLECTION}`"
    is_named = parts[-1] in _STATISTICS
    return f"the name `{parts[-1]}` is that of running statistics" if is_named else None


def _kernels(
    traces: Sequence[Traced], leaves: Mapping[str, Any], named: Mapping[str, str]
) -> set[str]:
    """Returns the paths in `named` that are kernels of a product; `batch_stats` holds none."""
    shapes = {path: tuple(jnp.shape(leaf)) for path, leaf in leaves.items()}
    asked = {
        path
        for path in named
        if _COLLECTION not in path.split("/") and sum(size > 1 for size in shapes[path]) > 1
    }
    if not asked:  # the usual case; it saves the passes
        return set()
    passes = [analyze(Model(shapes, frozenset(asked)), traced)[0] for traced in traces]
    paths = list(leaves)
    return {paths[index] for analysis in passes for index in analysis.kernels}


def _changed(traced: Traced, paths: Sequence[str]) -> list[str]:
    """Returns the paths of updates that are not just the old value."""
    jaxpr = traced.closed.jaxpr
    source = _sources(jaxpr)
    return [
        path
        for index, path in traced.updated.items()
        if source(jaxpr.outvars[index]) is not jaxpr.invars[paths.index(path)]
    ]


def _sources(jaxpr: Any) -> Any:
    """Makes a function from a variable to the one it equals, looking through calls of `jit`."""
    made_by = {var: equation for equation in jaxpr.eqns for var in equation.outvars}

    def source(atom: Any) -> Any:
        if isinstance(atom, core.Literal) or atom not in made_by:
            return atom
        equation = made_by[atom]
        if equation.primitive.name not in _CALLS:
            return atom
        inner = _inner(equation)
        found = _sources(inner)(inner.outvars[equation.outvars.index(atom)])
        if isinstance(found, core.Literal) or found not in inner.invars:
            return atom
        return source(equation.invars[inner.invars.index(found)])

    return source


def _without_gradient(traces: Sequence[Traced], paths: Sequence[str]) -> set[str]:
    """Returns the paths that some trace uses and that no derivative of any output reaches.

    A trace without any derivative, such as one that returns tokens, proves nothing.
    """
    reached: set[int] = set()
    used: set[int] = set()
    for traced in traces:
        jaxpr = traced.closed.jaxpr
        wanted = [index not in traced.updated for index in range(len(jaxpr.outvars))]
        smooth, rough = (
            {index for index, hit in enumerate(_reach(jaxpr, wanted, flag)[: len(paths)]) if hit}
            for flag in (True, False)
        )
        reached |= smooth or rough
        used |= rough
    return {paths[index] for index in used - reached}


def _reach(jaxpr: Any, wanted: Sequence[bool], smooth: bool) -> list[bool]:
    """Tells which inputs a wanted output depends on; with `smooth`, through derivatives alone.

    The answer is yes where it cannot be known, such as inside custom derivative rules.
    """
    live: set[Any] = set()

    def mark(atoms: Sequence[Any], hits: Sequence[bool]) -> None:
        live.update(
            atom
            for atom, hit in zip(atoms, hits, strict=True)
            if hit and not isinstance(atom, core.Literal) and (not smooth or _is_float(atom))
        )

    mark(jaxpr.outvars, wanted)
    for equation in reversed(jaxpr.eqns):
        hits = [var in live for var in equation.outvars]
        if any(hits) and not (smooth and equation.primitive.name in _FLAT):
            mark(equation.invars, _through(equation, hits, smooth))
    return [var in live for var in jaxpr.invars]


def _through(equation: Any, hits: list[bool], smooth: bool) -> list[bool]:
    """Tells which operands of one operation are reached from its results."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS or name == "shard_map":
        return _reach(_inner(equation), hits, smooth)
    if name == "cond":
        sides = [_reach(branch.jaxpr, hits, smooth) for branch in params["branches"]]
        return [not smooth, *map(any, zip(*sides, strict=True))]
    if name == "scan":
        first, count = jaxprs.scan_counts(params, len(equation.invars))
        while True:  # the carry of a pass is a result of the pass before, so repeat until stable
            found = _reach(params["jaxpr"].jaxpr, hits, smooth)
            carried = [a or b for a, b in zip(hits, found[first : first + count])]
            if carried == hits[:count]:
                return found
            hits = [*carried, *hits[count:]]
    return [True] * len(equation.invars)


def _inner(equation: Any) -> Any:
    """Returns the jaxpr of a call."""
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return getattr(inner, "jaxpr", inner)


def _is_float(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)
