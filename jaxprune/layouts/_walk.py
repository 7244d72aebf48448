"""Follows the parameters of a model through its jaxpr to the products in which they are kernels.

An interpreter evaluates the jaxpr equation by equation. With every array it stores whether the
array is a *view* of a parameter leaf. An equation that touches a view is one of

* a cast, transposition or reshape: its result is a view too;
* a call (`jit`, `remat`, a custom derivative): the interpreter enters it;
* a scan: the interpreter enters it; a leaf that the scan runs over is a single copy there;
* an index along one dimension, static, computed in a loop or read from data: its result is a view
  of the copies that are picked;
* a sum with something that does not depend on data, such as an adapter: a view of the same leaf,
  whose inputs are the same;
* a product or a convolution with the view as its kernel: a use of the leaf. The other operand is
  the input of the layer; `take` computes a statistic of it at once, so that no input outlives its
  equation;
* anything else: the leaf has no layout, and the name of the primitive says why.

Whatever the use is, the scans around it and the batch dimensions of its equation prove which axes
of the leaf number copies.

Without `take`, only the role of each axis is needed. Then a view may also be sliced, or pass
through elementwise functions.

With a `rule`, the interpreter runs the function with some equations replaced: the rule is asked
before every equation, and returns its results or leaves the equation to the interpreter.

All of this is decided while tracing, from shapes alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxprune import jaxprs
from jaxprune.layouts._kernels import Arrangement, agree, arrange
from jaxprune.layouts._views import PICKS, View, as_kernel, picked, same_values

__all__ = ["Found", "Scan", "Take", "Use", "Value", "walk"]

_CALLS = {"jit", "closed_call", "call", "remat2", "custom_jvp_call", "custom_vjp_call"}
_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
# Penalties, norms and means: a leaf that is reduced may still be a kernel elsewhere.
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax"}


class Use(NamedTuple):
    """A product with a kernel, as the argument `take` of `capture` sees it.

    Example:
        >>> shapes = []
        >>> def take(use):
        ...     shapes.append(use.operands[1 - use.side].shape)
        ...     return jnp.zeros(1), 1
        >>> from jaxprune.layouts import capture
        >>> found = capture(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, jnp.ones((5, 2)),
        ...     ["w"], take)
        >>> shapes
        [(5, 2)]
    """

    equation: Any
    operands: Sequence[jax.Array]
    side: int  # position of the kernel among the operands: 0 left, 1 right
    # Where an index has picked the kernel: the copy of each pick, the number of copies, and the
    # dimensions of the kernel that run over the picks, in their order.
    index: jax.Array | None = None
    copies: int = 1
    picks: Sequence[int] = ()


# the use of a kernel -> statistic [groups, ...] and its rows
Take = Callable[[Use], tuple[jax.Array, int]]


class Value(NamedTuple):
    """The value of a variable, and what the interpreter knows about it.

    Example:
        >>> Value(jnp.ones(2)).view is None
        True
    """

    array: Any
    view: View | None = None  # None: not a view of a followed leaf
    data: bool = False  # whether it may depend on the input of the model
    zero: bool = False  # whether it is known to be 0 everywhere; only rules tell
    known: Any = None  # what a rule remembers of it; not inside of scans


class Scan(NamedTuple):
    """A scan over stacked leaves; all leaves of the same scan have the same `identity`.

    Example:
        >>> from jaxprune.layouts import capture
        >>> def apply(p, x):
        ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
        >>> found = capture(apply, {"w": jnp.ones((3, 2, 2))}, jnp.ones(2), ["w"])
        >>> found.scans["w"].length
        3
    """

    identity: object
    length: int
    reverse: bool


class Found(NamedTuple):
    """The results of the interpreter; the dicts are in the order of use.

    Example:
        >>> from jaxprune.layouts import capture
        >>> list(capture(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, jnp.ones(2), ["w"]).uses)
        ['w']
    """

    take: Take | None
    step: jax.Array | None  # of a scan over stacked leaves, take statistics at this step only
    uses: dict[str, Arrangement]
    sums: dict[str, tuple[jax.Array, int]]  # statistic and rows, added up over the uses
    problems: list[tuple[str, str]]  # path and reason
    copies: dict[str, frozenset[int]]  # axes of a leaf that number copies in each of its uses
    scans: dict[str, Scan | None]  # the first scan over a leaf; None if it has other uses as well
    # (equation, operands, what is found) -> the results; None leaves the equation to the walk.
    rule: Callable[[Any, list[Value], "Found"], list[Value] | None] | None = None


def walk(jaxpr: Any, consts: Sequence[Any], inputs: list[Value], found: Found) -> list[Value]:
    """Evaluates a jaxpr and records every product with a view.

    Args:
        jaxpr: the jaxpr, not closed.
        consts: its constants.
        inputs: a `Value` for each of its inputs.
        found: what is asked, and where the answers go.

    Returns:
        A `Value` for each output.

    Example:
        >>> closed = jax.make_jaxpr(lambda x: x + 1)(1.0)
        >>> found = Found(None, None, {}, {}, [], {}, {})
        >>> float(walk(closed.jaxpr, closed.consts, [Value(2.0)], found)[0].array)
        3.0
    """
    values = dict(zip(jaxpr.constvars, map(Value, consts), strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        return Value(atom.val) if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        with jaxprs.context(equation):
            outputs = _evaluate(equation, operands, found)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate(equation: Any, operands: list[Value], found: Found) -> list[Value]:
    """Evaluates one equation."""
    if found.rule is not None:
        replaced = found.rule(equation, operands, found)
        if replaced is not None:
            return replaced
    name, touches = equation.primitive.name, any(operand.view for operand in operands)
    if touches and name in _CALLS:
        return walk(*_body(equation.params), operands, found)
    if touches and name == "scan":
        return _scan(equation.params, operands, found)
    arrays = [operand.array for operand in operands]
    results = jaxprs.bind(equation.primitive, equation.params, arrays)
    views = _follow(equation, operands, found) if touches else None
    data = any(operand.data for operand in operands)
    return [
        Value(array, view, data)
        for array, view in zip(results, views or [None] * len(results), strict=True)
    ]


def _body(parameters: dict[str, Any]) -> tuple[Any, Sequence[Any]]:
    """Returns the jaxpr of a call and its constants."""
    inner = parameters["call_jaxpr" if "call_jaxpr" in parameters else "jaxpr"]
    return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())


def _follow(equation: Any, operands: list[Value], found: Found) -> list[View] | None:
    """Records what an equation does with views; returns the views among its results, or None."""
    name = equation.primitive.name
    views = [operand.view for operand in operands]
    touched = [view for view in views if view]
    if view := same_values(equation, touched[0]):
        return [view]
    if found.take is not None:
        if views[0] and (results := picked(equation, views[0], [x.array for x in operands])):
            return results
        if name in ("add", "sub", "add_any") and _is_adapted(equation, operands, views):
            return touched
    else:
        if results := as_kernel(equation, views, [operand.data for operand in operands]):
            return results
        if name in _REDUCTIONS:
            for view in touched:
                if view.copies:  # a penalty on a whole stack does not rule out copies
                    _narrow(found, view.path, view.numbered())
            return None
    for side, view in enumerate(views):
        if view:
            _narrow(found, view.path, view.numbered(_batch(equation, side)))
    if name not in _PRODUCTS:
        found.problems.extend((view.path, _used_by(name, view)) for view in touched)
    elif len(touched) == 1:
        _record(equation, operands, 0 if views[0] else 1, found)
    elif operands[0].data != operands[1].data:
        # A table entry that was looked up by data is the input of the other leaf.
        table = 0 if operands[0].data else 1
        found.problems.append((touched[table].path, "looked up by its index"))
        _record(equation, operands, 1 - table, found)
    else:
        found.problems.extend((view.path, "multiplied by another leaf") for view in touched)
    return None


def _is_adapted(equation: Any, operands: list[Value], views: list[View | None]) -> bool:
    """Returns whether a sum adds to one leaf something that does not depend on data."""
    alike = len({atom.aval.shape for atom in equation.invars}) == 1
    return alike and views.count(None) == 1 and not any(operand.data for operand in operands)


def _used_by(name: str, view: View) -> str:
    """Says which primitives used a leaf in a way that is not understood."""
    return f"used by `{name}`" if view.pick is None else f"used by `{view.pick.by}`, then `{name}`"


def _narrow(found: Found, path: str, axes: frozenset[int]) -> None:
    """Keeps the axes that number copies in this use of a leaf and in all earlier ones."""
    found.copies[path] = found.copies.get(path, axes) & axes


def _batch(equation: Any, side: int) -> tuple[int, ...]:
    """Returns the dimensions of an operand whose indices an equation computes independently."""
    numbers = equation.params.get("dimension_numbers")
    if equation.primitive.name == "ragged_dot_general":
        numbers = equation.params["ragged_dot_dimension_numbers"]
        return tuple(numbers.rhs_group_dimensions) if side == 1 else ()
    if equation.primitive.name == "dot_general":
        # Without contracting axes it is elementwise, like `jnp.einsum("nd,d->nd", x, scale)`.
        return tuple(numbers[1][side]) if numbers[0][side] else ()
    if equation.primitive.name == "gather" and side == 0:
        return tuple(numbers.operand_batching_dims)
    return ()


def _record(equation: Any, operands: list[Value], side: int, found: Found) -> None:
    """Records one use of a leaf, with its statistic."""
    view = operands[side].view
    assert view is not None
    arrangement = arrange(equation, view, side)
    if isinstance(arrangement, str):
        found.problems.append((view.path, arrangement))
    elif found.take is None:
        _add(found, view.path, arrangement, None)
    else:
        use = Use(equation, [operand.array for operand in operands], side)
        if view.pick is not None:
            count = math.prod(atom.size for atom in view.pick.atoms)
            use = use._replace(index=view.pick.index, copies=count, picks=view.picks() or ())
        _add(found, view.path, arrangement, found.take(use))


def _add(
    found: Found,
    path: str,
    arrangement: Arrangement,
    taken: tuple[jax.Array, int] | None,
    scan: Scan | None = None,
) -> None:
    """Adds one use of a leaf to the earlier ones; all must put its weights in the same places."""
    found.scans[path] = found.scans[path] if path in found.uses and scan else scan
    before = found.uses.setdefault(path, arrangement)
    if taken is None:
        if before.layout != arrangement.layout:
            found.problems.append((path, "used twice, with different inputs and outputs"))
    elif not agree(before, arrangement):
        found.problems.append((path, "used twice, with different input features"))
    elif path in found.sums:
        value, rows = found.sums[path]
        found.sums[path] = value + taken[0], rows + taken[1]
    else:
        found.sums[path] = taken


def _scan(parameters: dict[str, Any], operands: list[Value], found: Found) -> list[Value]:
    """Evaluates a scan, and records the products of its body for all steps."""
    closed, length = parameters["jaxpr"], parameters["length"]
    body = closed.jaxpr
    consts, count = jaxprs.scan_counts(parameters, len(operands))
    ends = consts + count
    # What a rule would make of values from outside, it would make again at every step.
    fixed = [value._replace(known=None) for value in operands[:consts]]
    carried, over = operands[consts:ends], operands[ends:]
    # A carried value that every step passes on unchanged remains a view.
    starts = []
    for value, new, old in zip(carried, body.outvars, body.invars[consts:ends]):
        same = new is old
        if value.view and not same:
            found.problems.append((value.view.path, "changed by `scan`"))
            _narrow(found, value.view.path, value.view.numbered())
        starts.append(Value(value.array, value.view if same else None, data=True))
    for i, value in enumerate(over):
        if value.view and any(atom.axis == PICKS for atom in value.view.dims[0]):
            found.problems.append((value.view.path, _used_by("scan", value.view)))
            over[i] = value._replace(view=None)
    members = [value.view and value.view.one_of_stack() for value in over]
    mapped = {value.view.path: len(value.view.copies) for value in over if value.view}
    inner = Found(found.take, None if mapped else found.step, {}, {}, [], {}, {}, found.rule)
    of_one_step = found.step is not None and bool(mapped)
    ends_views: list[View | None] = []

    def step(carry: Any, slices: Any) -> Any:
        for part in inner[2:7]:  # JAX may trace this function more than once
            part.clear()
        number, slices = slices
        carries = [value._replace(array=x) for value, x in zip(starts, carry, strict=True)]
        parts = [
            Value(x, view, value.data) for x, view, value in zip(slices, members, over, strict=True)
        ]
        own = inner
        if of_one_step and found.take is not None:
            own = inner._replace(take=_taken_if(number == found.step, found.take))
        results = walk(body, closed.consts, [*fixed, *carries, *parts], own)
        ends_views[:] = [value.view for value in results]
        arrays = [value.array for value in results]
        sums = {path: value for path, (value, _) in inner.sums.items()}
        return arrays[: len(carry)], arrays[len(carry) :], sums

    first = [value.array for value in carried]
    slices = jnp.arange(length), [value.array for value in over]
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), slices)
    _, _, shapes = jax.eval_shape(step, first, one)
    # Statistics of leaves that all steps share are summed in the carry, because those of all steps
    # together may not fit into memory; and so are those of one step, to which others add 0.
    apart = {} if of_one_step else mapped
    totals = {p: jnp.zeros(s.shape, s.dtype) for p, s in shapes.items() if p not in apart}

    def summed(state: Any, slices: Any) -> Any:
        carry, totals = state
        carry, outputs, sums = step(carry, slices)
        totals = {path: total + sums[path] for path, total in totals.items()}
        return (carry, totals), (outputs, {p: x for p, x in sums.items() if p in apart})

    options = {name: parameters[name] for name in ("length", "reverse", "unroll")}
    (last, totals), (outputs, stacks) = jax.lax.scan(summed, (first, totals), slices, **options)
    found.problems.extend(inner.problems)
    for path, axes in inner.copies.items():
        _narrow(found, path, axes)
    scan = Scan(object(), length, parameters["reverse"])
    for path, arrangement in inner.uses.items():
        taken = None
        if path in stacks:
            stack = stacks[path]
            taken = stack.reshape(-1, *stack.shape[2:]), inner.sums[path][1]
        elif path in totals:
            steps = 1 if path in mapped else length
            taken = totals[path], inner.sums[path][1] * steps
        if found.take is None or taken is not None:
            around = scan if path in mapped else inner.scans[path]
            _add(found, path, arrangement, taken, around)
    results = [value._replace(array=x) for value, x in zip(starts, last, strict=True)]
    for value, view in zip(starts, ends_views):
        if view and not value.view:  # the next step uses the copy of this step
            found.problems.append((view.path, "carried on by `scan`"))
            _narrow(found, view.path, frozenset())
    for array, view in zip(outputs, ends_views[len(last) :], strict=True):
        stacked = None
        if view and view.path in mapped and view.pick is None:
            stacked = view.stack(mapped[view.path])
        if view and not stacked:
            found.problems.append((view.path, "returned by `scan`"))
            _narrow(found, view.path, view.numbered())
        results.append(Value(array, stacked or None, data=True))
    return results


def _taken_if(wanted: jax.Array, take: Take) -> Take:
    """Makes a statistic that is 0, at no cost, unless a condition holds."""

    def taken(use: Use) -> tuple[jax.Array, int]:
        rows: list[int] = []

        def value() -> jax.Array:
            found, count = take(use)
            rows.append(count)
            return found

        shape = jax.eval_shape(value)
        return jax.lax.cond(wanted, value, lambda: jnp.zeros(shape.shape, shape.dtype)), rows[-1]

    return taken
