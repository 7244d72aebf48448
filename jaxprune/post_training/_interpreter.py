"""Reads the inputs of every kernel from the jaxpr of a model.

`apply(params, batch)` is traced to a jaxpr, and an interpreter evaluates it equation by equation.
Beside every array it carries whether the array is a *view* of a parameter leaf: the leaf itself,
or the leaf after casts, transpositions and reshapes. An equation that touches a view is one of

* a cast, transposition or reshape: its result is a view too;
* a call (`jit`, `remat`, a custom derivative): the interpreter goes inside;
* a product or a convolution with the view as its kernel: the other operand is the input of the
  layer, and its statistic is taken on the spot, so that no input outlives its equation;
* anything else: the leaf is not supported, and the name of the primitive says why.

All of this is decided while tracing, from shapes alone, so the whole capture is one jitted
function of the parameters and a batch.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxprune import trees
from jaxprune.post_training._layouts import Layout, agree
from jaxprune.post_training._products import READERS

__all__ = ["Apply", "InputStatistics", "capture_batch"]

Apply = Callable[[Any, Any], Any]

_SAME_VALUE = {"convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint"}
_RESHAPES = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim"}
_CALLS = {"jit", "closed_call", "call", "remat2", "custom_jvp_call", "custom_vjp_call"}


class InputStatistics(NamedTuple):
    """What the calibration data say about the inputs of one kernel.

    Args:
        value: sum over all rows of the statistic: float32 [groups, features, features] for
            `gram`, [groups, features] for `squared_norms`.
        rows: number of rows: examples, times positions in sequences and images.
        layout: how the kernel becomes [groups, features, outputs].

    Example:
        >>> layout = Layout((2, 5)).then((0, 1), (1, 2, 5))
        >>> InputStatistics(jnp.array([[10.0, 4.0]]), 2, layout).layout.end
        (1, 2, 5)
    """

    value: jax.Array
    rows: int
    layout: Layout


class _View(NamedTuple):
    """That an array holds the values of one parameter leaf, and in which order."""

    path: str
    layout: Layout


class _Value(NamedTuple):
    """What the interpreter knows of a variable."""

    array: Any
    view: _View | None  # None: not a parameter leaf that is captured


class _Found(NamedTuple):
    """What the interpreter has collected."""

    statistic: Callable[[jax.Array], jax.Array]
    inputs: dict[str, InputStatistics]  # an OrderedDict: `jit` returns a plain dict sorted
    problems: list[tuple[_View, str]]


def capture_batch(
    apply: Apply,
    params: Any,
    batch: Any,
    flags: tuple[bool, ...],
    statistic: Callable[[jax.Array], jax.Array],
) -> dict[str, InputStatistics]:
    """The statistics of one batch, in the order of use; can be traced."""
    leaves, treedef = jax.tree.flatten(params)
    paths = list(trees.leaf_by_path(params))
    closed = jax.make_jaxpr(lambda leaves, batch: apply(treedef.unflatten(leaves), batch))(
        leaves, batch
    )
    inputs = [
        _Value(leaf, _View(path, Layout(jnp.shape(leaf))) if flag else None)
        for leaf, path, flag in zip(leaves, paths, flags, strict=True)
    ]
    inputs += [_Value(leaf, None) for leaf in jax.tree.leaves(batch)]
    found = _Found(statistic, collections.OrderedDict(), [])
    _walk(closed.jaxpr, closed.consts, inputs, found)

    wanted = [path for path, flag in zip(paths, flags, strict=True) if flag]
    bad = {view.path for view, _ in found.problems}
    unused = [path for path in wanted if path not in found.inputs and path not in bad]
    reasons = [f"{view.path}: {reason}" for view, reason in found.problems]
    trees.raise_for(
        sorted({*reasons, *(f"{path}: `apply` never multiplies it" for path in unused)}),
        "each pruned leaf must be the kernel of products or convolutions and nothing else; exclude "
        "these with `prunable`:",
    )
    return found.inputs


def _walk(jaxpr: Any, consts: Sequence[Any], inputs: list[_Value], found: _Found) -> list[_Value]:
    """Evaluates a jaxpr and records the input of every product with a view."""
    values = dict(zip(jaxpr.constvars, [_Value(const, None) for const in consts], strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> _Value:
        return _Value(atom.val, None) if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        touches_view = any(operand.view for operand in operands)
        if touches_view and equation.primitive.name in _CALLS:
            outputs = _walk(*_body(equation.params), operands, found)
        else:
            parameters = equation.primitive.get_bind_params(equation.params)
            result = equation.primitive.bind(*(operand.array for operand in operands), **parameters)
            results = result if equation.primitive.multiple_results else [result]
            outputs = [_Value(array, None) for array in results]
            if touches_view and (view := _follow(equation, operands, found)):
                outputs = [_Value(outputs[0].array, view)]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _body(parameters: dict[str, Any]) -> tuple[Any, Sequence[Any]]:
    """The jaxpr of a call and its constants."""
    inner = parameters["call_jaxpr" if "call_jaxpr" in parameters else "jaxpr"]
    return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())


def _follow(equation: Any, operands: list[_Value], found: _Found) -> _View | None:
    """Records what an equation does with a view; its own result if that is a view as well."""
    name = equation.primitive.name
    views = [operand.view for operand in operands if operand.view]
    if step := _step(equation):
        return views[0]._replace(layout=views[0].layout.then(*step))
    if name not in READERS:
        found.problems.extend((view, f"used by `{name}`") for view in views)
    elif len(views) == 2:
        found.problems.extend((view, "multiplied by another leaf to prune") for view in views)
    else:
        side = 0 if operands[0].view else 1
        kernel, other = operands[side], operands[1 - side]
        reading = READERS[name](equation.params, other.array, kernel.array.shape, side)
        _record(views[0], reading, found)
    return None


def _step(equation: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The permutation and shape by which a view becomes another view; None if it does not."""
    if len(equation.invars) != 1 or len(equation.outvars) != 1:
        return None
    name, parameters = equation.primitive.name, equation.params
    source, output = equation.invars[0].aval, equation.outvars[0].aval
    if name == "transpose":
        return parameters["permutation"], output.shape
    same_value = name in _SAME_VALUE and jnp.issubdtype(output.dtype, jnp.floating)
    # A broadcast is a reshape if it adds axes of size 1 only; `lax.reshape` may transpose first.
    transposes = name == "reshape" and parameters["dimensions"] is not None
    reshape = name in _RESHAPES and source.size == output.size and not transposes
    return (tuple(range(source.ndim)), output.shape) if same_value or reshape else None


def _record(view: _View, reading: Any, found: _Found) -> None:
    """Adds the statistic of one use of a leaf."""
    if isinstance(reading, str):
        found.problems.append((view, reading))
        return
    steps, inputs = reading
    layout = view.layout
    for permutation, shape in steps:
        layout = layout.then(permutation, shape)
    new = InputStatistics(found.statistic(inputs), inputs.shape[1], layout)
    old = found.inputs.get(view.path)
    if old is None:
        found.inputs[view.path] = new
    elif agree(old.layout, layout):
        found.inputs[view.path] = InputStatistics(
            old.value + new.value, old.rows + new.rows, layout
        )
    else:
        found.problems.append((view, "used twice, with different input features"))
