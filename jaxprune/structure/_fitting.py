"""Decides whether a function that reads widths from arrays may run unchanged on smaller ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from jaxprune import jaxprs, trees
from jaxprune.jaxprs import split
from jaxprune.structure._traces import run, to_jaxpr
from jaxprune.trees import is_array

_INLINED = frozenset(
    "jit pjit closed_call core_call xla_call custom_jvp_call custom_vjp_call remat2 checkpoint "
    "remat".split()
)
_SAME_SHAPE = {"broadcast_in_dim", "reshape", "convert_element_type", "copy", "copy_p", "squeeze"}
_MOST = 8  # largest number of reasons listed
_LONGEST = 60  # largest number of letters shown of a parameter in a reason


class Fit(NamedTuple):
    """The result of `Plan.fits`; true if the function may run on the smaller arrays.

    Example:
        >>> bool(Fit(False, False, 0.33, ("`mul` by 4.0, in the dense network by 5.6",)))
        False
    """

    fits: bool
    proven: bool  # whether both consist of the same operations with the same constants
    difference: float | None  # of outputs, relative to the largest entry; None if none were run
    reasons: tuple[str, ...]  # the places where the functions differ

    def __bool__(self) -> bool:
        """Tells whether the function fits."""
        return self.fits


def compare(
    function: Callable[..., Any],
    wrapped: Callable[..., Any],
    small: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tolerance: float,
) -> Fit:
    """Compares a function with its wrapped form, both on the compacted arrays.

    Args:
        function: `function(variables, *args)`.
        wrapped: the same function from `Plan.wrap`.
        small: compacted arrays or `jax.ShapeDtypeStruct`.
        args: arguments of the functions, arrays or `jax.ShapeDtypeStruct`.
        kwargs: their keyword arguments.
        tolerance: largest relative difference allowed.

    Returns:
        A `Fit`.

    Example:
        >>> def mean(w, x):
        ...     return (x @ w).sum() / w.shape[1]
        >>> fit = compare(mean, lambda w, x: (x @ w).sum() / 4, jnp.ones((2, 2)),
        ...     (jnp.ones((1, 2)),), {}, 1e-4)
        >>> fit.fits, fit.difference
        (False, 1.0)
    """
    planned, outputs = to_jaxpr(wrapped, small, *args, **kwargs)
    try:
        found, own = to_jaxpr(function, small, *args, **kwargs)
    except Exception as error:  # user code may raise anything for shapes that it does not expect
        message = str(error).strip().splitlines() or [""]
        return Fit(False, False, None, (f"it raises {type(error).__name__}: {message[0]}",))
    unlike = _unlike(_forms(own), _forms(outputs))
    if unlike:
        return Fit(False, False, None, unlike[:_MOST])
    reasons = _differences(found, planned)
    if reasons is None:
        return Fit(True, True, None, ())
    given = split((small, args, dict(kwargs))).arrays
    if not all(isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in given):
        return Fit(False, False, None, reasons)
    # Compare at moved variables too: initial zeros, such as those of a head, hide any difference.
    gaps = []
    for variables in (small, _moved(small)):
        outs = [split(run(call, variables, *args, **kwargs)).arrays for call in (wrapped, function)]
        gaps += [relative_gap(*pair) for pair in zip(*outs, strict=True)]
    worst = float(np.max([0.0, *gaps]))  # NaN if one is
    return Fit(bool(worst <= tolerance), False, worst, reasons)


def relative_gap(a: Any, b: Any) -> float:
    """Returns the largest difference relative to the largest entry of `a`.

    Args:
        a: array.
        b: array of the same shape.

    Returns:
        The relative difference; NaN if an entry is NaN. For integers and random keys, 1.0 if any
        entry differs and 0.0 if none does.

    Example:
        >>> relative_gap(jnp.array([2.0, 1.0]), jnp.array([2.0, 2.0]))
        0.5
    """
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return float(not np.array_equal(a, b))
    scale = jnp.max(jnp.abs(a), initial=0.0) + 1e-30
    return float(jnp.max(jnp.abs(a - b), initial=0.0) / scale)


def _forms(outputs: Any) -> dict[str, str]:
    named = trees.leaf_by_path(outputs)
    return {
        path: f"{out.dtype}{list(out.shape)}" if is_array(out) else repr(out)
        for path, out in named.items()
    }


def _unlike(own: Mapping[str, str], wanted: Mapping[str, str]) -> tuple[str, ...]:
    """Lists the outputs whose types or shapes differ."""
    return tuple(
        f"output {path}: {own.get(path, 'nothing')}, must be {wanted.get(path, 'nothing')}"
        for path in {**own, **wanted}
        if own.get(path) != wanted.get(path)
    )


def _moved(variables: Any) -> Any:
    """Adds noise to the variables; the noise is positive, as variances must not be negative."""
    parts = split(variables)
    generator = np.random.default_rng(0)
    moved = [
        leaf + jnp.asarray(generator.uniform(0.05, 0.2, leaf.shape), leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf
        for leaf in parts.arrays
    ]
    return parts.tree(moved)


class _Expression(NamedTuple):
    """One operation of a program."""

    equation: Any
    ins: tuple[int, ...]  # numbers of the operands


class _Numbering:
    """Numbers expressions so that two have the same number only if they compute the same."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}

    def number(self, *key: Any) -> int:
        return self._known.setdefault(key, len(self._known))

    def program(self, closed: Any) -> tuple[list[int], dict[int, _Expression]]:
        """Returns the numbers of the outputs, and all expressions by number, in order."""
        seen: dict[int, _Expression] = {}
        return self._follow(closed.jaxpr, closed.consts, self.inputs(closed.jaxpr), seen), seen

    def inputs(self, jaxpr: Any) -> list[int]:
        """Returns the numbers of a program's inputs."""
        return [self.number("input", i, str(v.aval)) for i, v in enumerate(jaxpr.invars)]

    def constant(self, array: Any) -> int:
        if isinstance(array, Tracer):
            return self.number("tracer", id(array))
        if jnp.issubdtype(jax.typeof(array).dtype, jax.dtypes.extended):
            array = jax.random.key_data(array)
        numbers = np.asarray(array)
        return self.number("constant", numbers.shape, str(numbers.dtype), numbers.tobytes())

    def _follow(
        self, jaxpr: Any, consts: Sequence[Any], ins: Sequence[int], seen: dict[int, _Expression]
    ) -> list[int]:
        known = dict(zip(jaxpr.constvars, map(self.constant, consts), strict=True))
        known |= zip(jaxpr.invars, ins, strict=True)

        def read(atom: Any) -> int:
            return self.constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            name, params = equation.primitive.name, equation.params
            operands = [read(atom) for atom in equation.invars]
            if name in _INLINED:
                inner = params.get("jaxpr", params.get("call_jaxpr"))
                consts = getattr(inner, "consts", ())
                outs = self._follow(getattr(inner, "jaxpr", inner), consts, operands, seen)
            elif name in _SAME_SHAPE and _is_same(equation):
                outs = operands[:1]
            else:
                key = self.number(name, self._content(params), tuple(operands))
                seen.setdefault(key, _Expression(equation, tuple(operands)))
                outs = [self.number("result", key, i) for i in range(len(equation.outvars))]
            known |= zip(equation.outvars, outs, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _content(self, value: Any) -> Any:
        """Turns a parameter of an operation into a value that can be compared."""
        if isinstance(value, Mapping):
            return tuple((name, self._content(own)) for name, own in sorted(value.items()))
        if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
            closed = value if isinstance(value, core.ClosedJaxpr) else core.ClosedJaxpr(value, ())
            outs, seen = self.program(closed)
            return tuple(outs), tuple(seen)
        if type(value) in (tuple, list):
            return tuple(map(self._content, value))
        return None if callable(value) and not isinstance(value, type) else str(value)


def _is_same(equation: Any) -> bool:
    """Tells whether an operation returns its operand unchanged."""
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    return before.shape == after.shape and before.dtype == after.dtype


def _differences(found: Any, planned: Any) -> tuple[str, ...] | None:
    """Lists where two programs differ; None if they are the same."""
    numbering = _Numbering()
    own_outs, own = numbering.program(found)
    outs, theirs = numbering.program(planned)
    if own_outs == outs:
        return None
    # List only the first operations that differ: those whose operands are the same in both.
    shared = set(numbering.inputs(found.jaxpr))
    for key in own.keys() & theirs.keys():
        results = range(len(own[key].equation.outvars))
        shared.update(numbering.number("result", key, index) for index in results)
    reasons: list[str] = []
    for key, expression in own.items():
        if key not in theirs and _operands(expression) <= shared:
            others = (other for number, other in theirs.items() if number not in own)
            partner = next((other for other in others if _is_partner(expression, other)), None)
            reasons += _describe(expression.equation, partner and partner.equation)
    return tuple(dict.fromkeys(reasons))[:_MOST] or ("it runs different operations",)


def _operands(expression: _Expression) -> set[int]:
    """Returns the numbers of the operands that are no constants of the program."""
    atoms = zip(expression.equation.invars, expression.ins, strict=True)
    return {number for atom, number in atoms if not isinstance(atom, core.Literal)}


def _is_partner(one: _Expression, other: _Expression) -> bool:
    """Tells whether both apply the same primitive to the same operands, constants aside."""
    same = one.equation.primitive is other.equation.primitive
    return same and _operands(one) == _operands(other)


def _describe(equation: Any, partner: Any) -> list[str]:
    text = f"`{equation.primitive.name}` at {jaxprs.line(equation) or 'an unknown line'}"
    if partner is None:
        return [f"{text} has no counterpart in the compacted function"]
    pairs = [
        (str(a.val), str(b.val))
        for a, b in zip(equation.invars, partner.invars, strict=True)
        if isinstance(a, core.Literal) and isinstance(b, core.Literal)
    ]
    for name, value in equation.params.items():
        other = partner.params.get(name)
        if isinstance(value, core.ClosedJaxpr) and isinstance(other, core.ClosedJaxpr):
            inner = _differences(value, other)
            if inner is not None:
                return list(inner)
        elif not callable(value):
            pairs.append((f"{name}={value}"[:_LONGEST], f"{name}={other}"[:_LONGEST]))
    unlike = [pair for pair in pairs if pair[0] != pair[1]]
    if unlike:
        return [f"{text} has {unlike[0][0]}, in the dense network {unlike[0][1]}"]
    return [f"{text} uses different constants"]
