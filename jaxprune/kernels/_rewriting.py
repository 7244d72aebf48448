"""Runs a function with the products of some leaves replaced, and finds these products.

The function is traced to a jaxpr, which the walk of `layouts` evaluates. It follows each masked
leaf through what keeps its zeros in place: casts, transpositions, reshapes, products with masks and
scales, `jit`, scans, branches and rematerialisation. Where a leaf meets a product or a convolution,
`replace` may compute it; everything else is bound as it was traced, so that derivative rules,
sharding constraints and names of scopes remain. Depthwise convolutions are computed by a kernel of
their own, masked or not.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxprune import jaxprs, layouts, trees
from jaxprune.kernels import _operations as operations
from jaxprune.kernels._finishing import Product, count_reads, follow
from jaxprune.kernels._sites import (
    PRODUCTS,
    compute_depthwise,
    is_depthwise,
    is_finishable,
    site_of,
)
from jaxprune.layouts import Value

__all__ = ["Depthwise", "Note", "Replace", "evaluate", "replace_depthwise"]

# (equation, operands, site[, finish]) -> the result; None leaves the equation as it is
Replace = Callable[..., jax.Array | None]
# (path, reason): why a use of a leaf is left as it is
Note = Callable[[str, str], None]
# (equation, operands[, finish]) -> the result of a depthwise convolution
Depthwise = Callable[..., jax.Array]
_ENTERED = {"jit", "closed_call", "call", "scan"}  # by the walk itself
_CALLS = {"jit", "closed_call"}  # entered for depthwise convolutions, too
_REMAT = {"remat2", "checkpoint", "remat"}
# What `export.jax` and its like say to a function that has this as its attribute `no_export`.
NO_EXPORT = (
    "its kernels are custom calls, built for the machine they run on, and do not travel in a file; "
    "export the function itself, with `masks=` if it is pruned, or serve it in this process with "
    "`kernels.serve`"
)
# Norms and penalties of a leaf say nothing of its product.
_UNNOTED = {"reduce_sum", "reduce_max", "integer_pow", "square", "abs", "sign"}


def evaluate(
    function: Callable[..., Any],
    paths: Collection[str],
    replace: Replace,
    note: Note,
    params: Any,
    *args: Any,
    depthwise: Depthwise = compute_depthwise,
    finish: bool = False,
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
        depthwise: called for each depthwise convolution that has a kernel.
        finish: whether kernels also do what follows a product up to a ReLU, see `follow`; then the
            caller must compile the function, or products are computed twice.
        **kwargs: the keyword arguments.

    Returns:
        The output of the function.

    Example:
        >>> import jax.numpy as jnp
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
    reads = count_reads(closed.jaxpr) if finish else None
    rule = _rule_of(replace, note, depthwise, reads)
    found = layouts.Found(None, None, {}, {}, [], {}, {}, rule)
    outputs = layouts.walk(closed.jaxpr, closed.consts, values, found)
    for path, reason in found.problems:  # of scans
        note(path, reason)
    return box[0](
        [
            jaxprs.as_output(out.array, aval)
            for out, aval in zip(outputs, closed.out_avals, strict=True)
        ]
    )


def replace_depthwise(
    function: Callable[..., Any], mesh: jax.sharding.Mesh | None = None
) -> Callable[..., Any]:
    """Makes a function compute its depthwise convolutions by `depthwise_convolution`.

    XLA computes these on CPUs one channel after the other, many times slower. The function is
    traced whenever it is called, so compile what calls it. Convolutions over two dimensions with
    strides 1 and 2 and windows of more than one weight are replaced, inside of `jit`,
    `jax.checkpoint` and branches; all else is left as it is, and so is everything where kernels are
    not available. `wrap` does this as well.

    Args:
        function: `function(*args, **kwargs)`, such as a model or a loss. It must be pure: what it
            changes besides its outputs, such as the state of an NNX module, is lost.
        mesh: the devices that it will run on. XLA cannot divide a kernel among several devices, so
            with more than one, and on other devices than CPUs, the function itself is returned.
            Types with explicit axes say so themselves: what has them is left as it is.

    Returns:
        A function with the same arguments and, to rounding, the same outputs and gradients. It
        cannot be exported, and has no forward-mode derivatives where something was replaced.

    Raises:
        TypeError: if `function` cannot be called.

    References:
        Howard et al. MobileNets. arXiv:1704.04861.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxprune import models
        >>> widths = models.default_widths("mobilenet_v1", 0.25)
        >>> model = models.mobilenet_v1(widths=widths, rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> graph, state = nnx.split(model)
        >>> def apply(state, images):
        ...     return nnx.merge(graph, state)(images)
        >>> fast, images = jax.jit(replace_depthwise(apply)), jnp.ones((1, 32, 32, 3))
        >>> bool(jnp.allclose(fast(state, images), apply(state, images), atol=1e-4))
        True
    """
    if not callable(function):
        raise TypeError(f"`function` must be a function, but is {function!r:.80}")
    if mesh is not None and (mesh.size > 1 or mesh.devices.flat[0].platform != "cpu"):
        return function

    @functools.wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        if operations.available() is not None:
            return function(*args, **kwargs)
        call, arrays, _ = jaxprs.on_arrays(function, *args, **kwargs)
        closed = jax.make_jaxpr(call)(list(map(jaxprs.abstract, arrays)))
        if not _any_depthwise(closed.jaxpr):
            return function(*args, **kwargs)
        return evaluate(lambda _, *own, **more: function(*own, **more), (), _never, _never, (),
                        *args, **kwargs)  # fmt: skip

    replaced.no_export = NO_EXPORT  # pyright: ignore[reportAttributeAccessIssue]
    return replaced


def _never(*_: Any) -> None:
    """Replaces and notes nothing."""


def _rule_of(
    replace: Replace, note: Note, depthwise: Depthwise, reads: Counter | None
) -> Callable[..., list[Value] | None]:
    """Makes the rule that the walk asks before each equation."""

    def rule(equation: Any, operands: list[Value], found: layouts.Found) -> list[Value] | None:
        name, views = equation.primitive.name, [operand.view for operand in operands]
        if is_depthwise(equation):
            for view in filter(None, views):
                note(view.path, "a depthwise convolution, which has a dense kernel of its own")
            arrays = [operand.array for operand in operands]
            is_finished = reads is not None and is_finishable(equation)
            compute = functools.partial(depthwise, equation, arrays)
            return [_value(compute, equation, is_finished)]
        if reads is not None and (results := follow(equation, operands, found, reads)):
            return results
        if not any(views):
            if not _has_depthwise(equation):
                return _zeros(equation, operands)
            if name in _CALLS:
                closed = equation.params["jaxpr"]
                return layouts.walk(closed.jaxpr, closed.consts, operands, found)
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
                return [result]
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
        compute = functools.partial(replace, equation, arrays, site)
        is_finished = reads is not None and is_finishable(equation, site)
        own = _value(compute, equation, is_finished)
        return None if own.array is None else own

    return rule


def _value(compute: Callable[..., Any], equation: Any, is_finished: bool) -> Value:
    """Computes a product; where its kernel can do what follows, the result says so."""
    product = Product(compute, equation.outvars[0].aval.shape) if is_finished else None
    return Value(compute(), known=product)


def _has_depthwise(equation: Any) -> bool:
    """Tells whether an equation that is entered holds a depthwise convolution with a kernel."""
    if equation.primitive.name not in _CALLS | _REMAT | {"cond"}:
        return False
    inner = equation.params.get("branches") or [equation.params["jaxpr"]]
    return any(_any_depthwise(getattr(own, "jaxpr", own)) for own in inner)


def _any_depthwise(jaxpr: Any) -> bool:
    """Tells whether equations of a jaxpr are, or hold, depthwise convolutions with a kernel."""
    return any(is_depthwise(own) or _has_depthwise(own) for own in jaxpr.eqns)


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
        pairs = zip(operands, arrays, strict=True)
        own = [value._replace(array=array, known=None) for value, array in pairs]
        return [value.array for value in layouts.walk(parameters["jaxpr"], (), own, found)]

    arrays = [operand.array for operand in operands]
    if parameters["differentiated"]:
        # What JAX does for a backward pass when it compiles: without it, XLA would keep what was
        # computed before, instead of computing it again.
        apart = np.broadcast_to(parameters["prevent_cse"], len(arrays))
        arrays = [
            lax.optimization_barrier(array) if flag else array
            for array, flag in zip(arrays, apart, strict=True)
        ]
    options = {name: parameters[name] for name in ("prevent_cse", "policy")}
    return list(map(Value, jax.checkpoint(call, **options)(*arrays)))


def _branched(
    parameters: dict[str, Any], operands: list[Value], found: layouts.Found
) -> list[Value]:
    """Enters the branches of a condition."""

    def branch(closed: Any) -> Callable[..., list[Any]]:
        def call(*arrays: Any) -> list[Any]:
            pairs = zip(operands[1:], arrays, strict=True)
            own = [value._replace(array=array, known=None) for value, array in pairs]
            outputs = layouts.walk(closed.jaxpr, closed.consts, own, found)
            pairs = zip(outputs, closed.out_avals, strict=True)
            return [jaxprs.as_output(value.array, aval) for value, aval in pairs]

        return call

    arrays = [operand.array for operand in operands]
    branches = list(map(branch, parameters["branches"]))
    return list(map(Value, lax.switch(arrays[0], branches, *arrays[1:])))
