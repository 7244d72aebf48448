"""Runs a function with the products of some leaves replaced, and finds these products.

The function is traced to a jaxpr, which the walk of `layouts` evaluates. It follows each masked
leaf through what keeps its zeros in place: casts, transpositions, reshapes, products with masks and
scales, `jit`, scans, branches and rematerialisation. Where a leaf meets a product or a convolution,
`replace` may compute it; everything else is bound as it was traced, so that derivative rules,
sharding constraints and names of scopes remain.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune import jaxprs, layouts, trees
from jaxprune.kernels._sites import PRODUCTS, Site, site_of
from jaxprune.layouts import Value

__all__ = ["Note", "Replace", "evaluate"]

# (equation, operands, site) -> the result; None leaves the equation as it is
Replace = Callable[[Any, list[jax.Array], Site], jax.Array | None]
# (path, reason): why a use of a leaf is left as it is
Note = Callable[[str, str], None]
_ENTERED = {"jit", "closed_call", "call", "scan"}  # by the walk itself
_REMAT = {"remat2", "checkpoint", "remat"}
# Norms and penalties of a leaf say nothing of its product.
_UNNOTED = {"reduce_sum", "reduce_max", "integer_pow", "square", "abs", "sign"}


def evaluate(
    function: Callable[..., Any],
    paths: Collection[str],
    replace: Replace,
    note: Note,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls a function with some of its products replaced.

    Args:
        function: `function(params, *args, **kwargs)`.
        paths: paths of the masked leaves in `params`; their masked entries must be 0.
        replace: called for each product or convolution with a masked leaf as its kernel.
        note: called for each other use of a masked leaf, and each product without a sparse kernel.
        params: tree of arrays.
        *args: the other arguments.
        **kwargs: the keyword arguments.

    Returns:
        The output of the function.

    Example:
        >>> seen = []
        >>> def replace(equation, operands, site):
        ...     seen.append(site.key.shape)
        >>> out = evaluate(lambda w, x: x @ w, [""], replace, print, jnp.eye(2), jnp.ones((1, 2)))
        >>> out.tolist(), seen
        ([[1.0, 1.0]], [(2, 2)])
    """
    call, arrays, box = jaxprs.on_arrays(function, params, *args, **kwargs)
    closed = jax.make_jaxpr(call)(list(map(jaxprs.abstract, arrays)))
    leaves = trees.leaves_with_paths(params)
    names = [path for path, leaf in leaves if trees.is_array(leaf)]
    values = [
        Value(array, layouts.view_of(path, array.shape) if path in paths else None)
        for array, path in zip(arrays, names)
    ]
    values += map(Value, arrays[len(names) :])  # the other arguments
    found = layouts.Found(None, None, {}, {}, [], {}, {}, _rule_of(replace, note))
    outputs = layouts.walk(closed.jaxpr, closed.consts, values, found)
    for path, reason in found.problems:  # of scans
        note(path, reason)
    return box[0](
        [
            out.array if isinstance(out.array, jax.Array) else jnp.asarray(out.array, aval.dtype)
            for out, aval in zip(outputs, closed.out_avals, strict=True)
        ]
    )


def _rule_of(replace: Replace, note: Note) -> Callable[..., list[Value] | None]:
    """Makes the rule that the walk asks before each equation."""

    def rule(equation: Any, operands: list[Value], found: layouts.Found) -> list[Value] | None:
        name, views = equation.primitive.name, [operand.view for operand in operands]
        if not any(views):
            return _zeros(equation, operands)
        if name in _ENTERED:
            return None
        if name in _REMAT:
            return _rematerialised(equation.params, operands, found)
        if name == "cond":
            return _branched(equation.params, operands, found)
        arrays = [operand.array for operand in operands]
        if name in PRODUCTS:
            result = _product(equation, arrays, views)
            if result is not None:
                return [Value(result)]
        results = jaxprs.bind(equation.primitive, equation.params, arrays)
        view = None if name in PRODUCTS else _followed(equation, operands)
        if view is None and name not in PRODUCTS | _UNNOTED:
            for own in filter(None, views):
                note(own.path, f"used by `{name}`")
        return [Value(array, view) for array in results]

    def _product(equation: Any, arrays: list[Any], views: list[Any]) -> Any:
        if all(views):
            for view in views:
                note(view.path, "multiplied by another masked leaf")
            return None
        side = 0 if views[0] else 1
        site = site_of(equation, views[side], side)
        if isinstance(site, str):
            note(views[side].path, site)
            return None
        return replace(equation, arrays, site)

    return rule


def _zeros(equation: Any, operands: list[Value]) -> list[Value] | None:
    """Follows a number 0 that is cast and repeated, as in `jnp.where(mask, kernel, 0)`."""
    if equation.primitive.name not in ("broadcast_in_dim", "convert_element_type"):
        return None
    if not _is_zero(operands[0]):
        return None
    arrays = [operand.array for operand in operands]
    (result,) = jaxprs.bind(equation.primitive, equation.params, arrays)
    return [Value(result, None, zero=True)]


def _is_zero(value: Value) -> bool:
    """Tells whether a value is known to be 0 everywhere."""
    if value.zero:
        return True
    if isinstance(value.array, Tracer) or np.ndim(value.array):
        return False
    number = np.asarray(value.array)
    return number.dtype.kind in "fiub" and not number.item()


def _followed(equation: Any, operands: list[Value]) -> layouts.View | None:
    """Returns the view that a result is, if it is 0 wherever the leaf is; None otherwise."""
    name, views = equation.primitive.name, [operand.view for operand in operands]
    view = next(view for view in views if view)
    if len(views) == 1 and (same := layouts.same_values(equation, view)):
        return same
    shape = equation.outvars[0].aval.shape
    if equation.invars[views.index(view)].aval.shape != shape or any(
        other not in (None, view) for other in views
    ):
        return None
    if name in ("mul", "neg", "copy", "reduce_precision") or (name == "div" and not views[1]):
        return view
    if name == "select_n" and not views[0]:
        kept = all(case.view or _is_zero(case) for case in operands[1:])
        return view if kept else None
    return None


def _rematerialised(
    parameters: dict[str, Any], operands: list[Value], found: layouts.Found
) -> list[Value]:
    """Enters a rematerialised function, and rematerialises it again."""

    def call(*arrays: Any) -> list[Any]:
        own = [value._replace(array=array) for value, array in zip(operands, arrays, strict=True)]
        return [value.array for value in layouts.walk(parameters["jaxpr"], (), own, found)]

    arrays = [operand.array for operand in operands]
    options = {name: parameters[name] for name in ("prevent_cse", "policy")}
    return list(map(Value, jax.checkpoint(call, **options)(*arrays)))


def _branched(
    parameters: dict[str, Any], operands: list[Value], found: layouts.Found
) -> list[Value]:
    """Enters the branches of a condition."""

    def branch(closed: Any) -> Callable[..., list[Any]]:
        def call(*arrays: Any) -> list[Any]:
            pairs = zip(operands[1:], arrays, strict=True)
            own = [value._replace(array=array) for value, array in pairs]
            outputs = layouts.walk(closed.jaxpr, closed.consts, own, found)
            pairs = zip(outputs, closed.out_avals, strict=True)
            return [jnp.asarray(value.array, aval.dtype) for value, aval in pairs]

        return call

    arrays = [operand.array for operand in operands]
    branches = list(map(branch, parameters["branches"]))
    return list(map(Value, jax.lax.switch(arrays[0], branches, *arrays[1:])))
