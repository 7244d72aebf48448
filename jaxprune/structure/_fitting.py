"""Whether a function that reads widths from its arrays may run on the smaller arrays as it is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core, source_info_util

from jaxprune import trees
from jaxprune.structure._traces import abstract

_INLINED = frozenset(
    "jit pjit closed_call core_call xla_call custom_jvp_call custom_vjp_call remat2 checkpoint "
    "remat".split()
)
_SAME_SHAPE = {"broadcast_in_dim", "reshape", "convert_element_type", "copy", "copy_p", "squeeze"}
_MOST = 8  # reasons that are listed
_LONGEST = 60  # letters of a parameter in a reason


class Fit(NamedTuple):
    """What `Plan.fits` found; true if the function may run on the smaller arrays.

    Example:
        >>> bool(Fit(False, False, 0.33, ("`mul` by 4.0, in the dense network by 5.6",)))
        False
    """

    fits: bool
    proven: bool  # both are the same operations with the same constants
    difference: float | None  # of numbers, relative to the largest entry; None if none were run
    reasons: tuple[str, ...]  # where the functions differ

    def __bool__(self) -> bool:
        """Whether it fits."""
        return self.fits


def compare(
    function: Callable[..., Any],
    wrapped: Callable[..., Any],
    small: Any,
    args: tuple[Any, ...],
    tolerance: float,
) -> Fit:
    """Compares a function with its compacted form, both on the smaller arrays.

    Args:
        function: `function(variables, *args)`.
        wrapped: the same from `Plan.wrap`.
        small: arrays or `jax.ShapeDtypeStruct`.
        args: of the functions, likewise.
        tolerance: of the relative difference.

    Returns:
        A `Fit`.

    Example:
        >>> def mean(w, x):
        ...     return (x @ w).sum() / w.shape[1]
        >>> fit = compare(mean, lambda w, x: (x @ w).sum() / 4, jnp.ones((2, 2)),
        ...     (jnp.ones((1, 2)),), 1e-4)
        >>> fit.fits, fit.difference
        (False, 1.0)
    """
    shapes = jax.tree.map(abstract, (small, args))
    planned, outputs = jax.make_jaxpr(wrapped, return_shape=True)(shapes[0], *shapes[1])
    try:
        found, own = jax.make_jaxpr(function, return_shape=True)(shapes[0], *shapes[1])
    except Exception as error:  # whatever the user's code raises for shapes that it does not expect
        message = str(error).strip().splitlines() or [""]
        return Fit(False, False, None, (f"it raises {type(error).__name__}: {message[0]}",))
    unlike = _unlike(_forms(own), _forms(outputs))
    if unlike:
        return Fit(False, False, None, unlike[:_MOST])
    reasons = _differences(found, planned)
    if reasons is None:
        return Fit(True, True, None, ())
    if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(small)):
        return Fit(False, False, None, reasons)
    # Zeros that a network starts from, such as those of its head, would hide any difference.
    gaps = []
    for variables in (small, _moved(small)):
        outs = [jax.tree.leaves(jax.jit(call)(variables, *args)) for call in (wrapped, function)]
        gaps += [relative_gap(*pair) for pair in zip(*outs, strict=True)]
    worst = float(np.max([0.0, *gaps]))  # NaN if one is
    return Fit(bool(worst <= tolerance), False, worst, reasons)


def relative_gap(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest entry; of integers, whether any differs.

    Args:
        a: array.
        b: array of the same shape.

    Returns:
        A number; NaN if an entry is.

    Example:
        >>> relative_gap(jnp.array([2.0, 1.0]), jnp.array([2.0, 2.0]))
        0.5
    """
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return float(not np.array_equal(a, b))
    scale = jnp.max(jnp.abs(a), initial=0.0) + 1e-30
    return float(jnp.max(jnp.abs(a - b), initial=0.0) / scale)


def _forms(outputs: Any) -> dict[str, str]:
    named = trees.leaf_by_path(outputs)
    return {path: f"{out.dtype}{list(out.shape)}" for path, out in named.items()}


def _unlike(own: Mapping[str, str], wanted: Mapping[str, str]) -> tuple[str, ...]:
    """Outputs of other types or shapes."""
    return tuple(
        f"output {path}: {own.get(path, 'nothing')}, must be {wanted.get(path, 'nothing')}"
        for path in {**own, **wanted}
        if own.get(path) != wanted.get(path)
    )


def _moved(variables: Any) -> Any:
    """Other variables: larger ones, as variances must not be negative."""
    leaves, structure = jax.tree.flatten(variables)
    generator = np.random.default_rng(0)
    moved = [
        leaf + jnp.asarray(generator.uniform(0.05, 0.2, leaf.shape), leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf
        for leaf in leaves
    ]
    return jax.tree.unflatten(structure, moved)


class _Expression(NamedTuple):
    """One operation of a program."""

    equation: Any
    ins: tuple[int, ...]  # numbers of what goes in


class _Numbering:
    """Gives expressions numbers: the same one only to the same computation."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}

    def number(self, *key: Any) -> int:
        return self._known.setdefault(key, len(self._known))

    def program(self, closed: Any) -> tuple[list[int], dict[int, _Expression]]:
        """Numbers of the outputs, and all expressions by number, in order."""
        seen: dict[int, _Expression] = {}
        return self._follow(closed.jaxpr, closed.consts, self.inputs(closed.jaxpr), seen), seen

    def inputs(self, jaxpr: Any) -> list[int]:
        """Numbers of what goes into a program."""
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
        """A parameter of an operation as something that can be compared."""
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
    """Whether an operation hands its operand on as it is."""
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    return before.shape == after.shape and before.dtype == after.dtype


def _differences(found: Any, planned: Any) -> tuple[str, ...] | None:
    """Where two programs part; None if they are the same."""
    numbering = _Numbering()
    own_outs, own = numbering.program(found)
    outs, theirs = numbering.program(planned)
    if own_outs == outs:
        return None
    # The first operations that differ: what they compute from is the same in both.
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
    return tuple(dict.fromkeys(reasons))[:_MOST] or ("it does other operations",)


def _operands(expression: _Expression) -> set[int]:
    """Numbers of the operands that are no constants of the program."""
    atoms = zip(expression.equation.invars, expression.ins, strict=True)
    return {number for atom, number in atoms if not isinstance(atom, core.Literal)}


def _is_partner(one: _Expression, other: _Expression) -> bool:
    """Whether both do the same to the same operands, with other constants."""
    same = one.equation.primitive is other.equation.primitive
    return same and _operands(one) == _operands(other)


def _describe(equation: Any, partner: Any) -> list[str]:
    text = f"`{equation.primitive.name}` at {source_info_util.summarize(equation.source_info)}"
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
    return [f"{text} meets other constants"]
