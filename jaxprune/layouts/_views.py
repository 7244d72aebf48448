"""Views: arrays that hold the values of one leaf, with the position of each of its axes.

Every dimension of a view is a row-major product of *atoms*: whole axes of the leaf, or factors of
an axis that a reshape has split. Transpositions move atoms; reshapes split and merge them.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax.numpy as jnp

__all__ = ["Atom", "View", "as_kernel", "reshaped", "same_values", "view_of"]

Shape = tuple[int, ...]

_SAME_VALUE = {
    *("convert_element_type", "copy", "copy_p", "device_put", "mesh_cast", "pvary", "reshard"),
    *("sharding_constraint", "stop_gradient"),
}
# Primitives that keep every entry in its place, although its value may change.
_ELEMENTWISE = {
    *("abs", "add", "add_any", "and", "ceil", "clamp", "convert_element_type", "cos", "div"),
    *("eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le"),
    *("log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow"),
    *("reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "square"),
    *("sub", "tanh"),
}


class Atom(NamedTuple):
    """A factor of an axis: `index // stride % size` for the indices of the axis."""

    axis: int
    stride: int
    size: int


class View(NamedTuple):
    """An array that holds the values of a leaf: the leaf, and the atoms of each dimension."""

    path: str
    shape: Shape  # of the leaf
    dims: tuple[tuple[Atom, ...], ...]
    copies: tuple[Atom, ...] = ()  # atoms that enclosing scans run over

    def one_of_stack(self) -> "View":
        """Returns the view inside a scan over its first dimension."""
        return self._replace(dims=self.dims[1:], copies=(*self.copies, *self.dims[0]))

    def stack(self, depth: int) -> "View | None":
        """Returns the view after the scan that stacks it; `depth` atoms belong to outer scans."""
        if len(self.copies) <= depth:  # every step returns the same values
            return None
        return self._replace(dims=(self.copies[depth:], *self.dims), copies=self.copies[:depth])

    def numbered(self, batch: Collection[int] = ()) -> frozenset[int]:
        """Returns the whole axes of the leaf that number copies if the `batch` dimensions do."""
        split = [dim for i, dim in enumerate(self.dims) if i not in batch]
        copies = {atom.axis for i in batch for atom in self.dims[i]}
        copies |= {atom.axis for atom in self.copies}
        return frozenset(copies - {atom.axis for dim in split for atom in dim if atom.size > 1})


def view_of(path: str, shape: Shape) -> View:
    """Returns the view of the leaf itself."""
    return View(path, shape, tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape)))


def reshaped(dims: tuple[tuple[Atom, ...], ...], shape: Shape) -> tuple | None:
    """Returns the dimensions after a reshape, or None if a dimension would mix parts of axes."""
    atoms = [atom for dim in dims for atom in dim]
    result = []
    for size in shape:
        taken, missing = [], size
        if size == 1 and atoms and atoms[0].size == 1:
            taken.append(atoms.pop(0))
        while missing > 1:
            if not atoms:
                return None
            atom = atoms.pop(0)
            if missing % atom.size == 0:
                missing //= atom.size
            elif atom.size % missing == 0:
                rest = atom.size // missing
                atoms.insert(0, Atom(atom.axis, atom.stride, rest))
                atom, missing = Atom(atom.axis, atom.stride * rest, missing), 1
            else:
                return None
            taken.append(atom)
        result.append(tuple(taken))
    if any(atom.size != 1 for atom in atoms):
        return None
    if result:  # the remaining atoms are axes of size 1
        result[-1] += tuple(atoms)
    return tuple(result)


def same_values(equation: Any, view: View) -> View | None:
    """Returns the result of a cast, transposition or reshape of a view; None for all others."""
    if len(equation.invars) != 1 or len(equation.outvars) != 1:
        return None
    name, parameters = equation.primitive.name, equation.params
    source, output = equation.invars[0].aval, equation.outvars[0].aval
    dims = None
    if name in _SAME_VALUE and jnp.issubdtype(output.dtype, jnp.floating):
        dims = view.dims
    elif name == "transpose":
        dims = tuple(view.dims[axis] for axis in parameters["permutation"])
    elif name == "squeeze":
        gone = {axis % source.ndim for axis in parameters["dimensions"]}
        dims = tuple(dim for axis, dim in enumerate(view.dims) if axis not in gone)
    elif name == "broadcast_in_dim" and source.size == output.size:
        old = dict(zip(parameters["broadcast_dimensions"], view.dims, strict=True))
        dims = tuple(old.get(axis, ()) for axis in range(output.ndim))
    elif name == "reshape":
        order = parameters["dimensions"] or range(source.ndim)  # it may transpose first
        dims = reshaped(tuple(view.dims[axis] for axis in order), output.shape)
    return None if dims is None else view._replace(dims=dims)


def as_kernel(equation: Any, views: list[View | None], data: list[bool]) -> list[View] | None:
    """Returns the results of an equation that keeps the axes, though not all values.

    Such equations are elementwise functions of the leaf and of values that do not depend on data
    (masks, scales, rounding), slices and reversals. Returns None for all others.
    """
    name, outputs = equation.primitive.name, [v.aval for v in equation.outvars]
    view = next(view for view in views if view)
    shape = equation.invars[views.index(view)].aval.shape
    if name == "rev":
        return [view]
    if name in _ELEMENTWISE and outputs[0].shape == shape and not any(data):
        alike = (
            other == view if other else _broadcasts(atom.aval.shape, shape)
            for atom, other in zip(equation.invars, views, strict=True)
        )
        return [view] if all(alike) else None
    if name in ("slice", "dynamic_slice", "split") and views[0] is view:
        results = [_sliced(view.dims, shape, output.shape) for output in outputs]
        return None if None in results else [view._replace(dims=dims) for dims in results]
    return None


def _broadcasts(shape: Shape, to: Shape) -> bool:
    """Returns whether an operand of a given shape broadcasts to another shape."""
    return not shape or all(size in (1, n) for size, n in zip(shape, to, strict=True))


def _sliced(dims: tuple[tuple[Atom, ...], ...], before: Shape, after: Shape) -> tuple | None:
    """Returns the dimensions of a slice; None if it cuts a dimension made of several axes."""
    result = []
    for dim, old, new in zip(dims, before, after, strict=True):
        real = [atom for atom in dim if atom.size > 1]
        if old != new and len(real) > 1:
            return None
        result.append(dim if old == new else (real[0]._replace(size=new),))
    return tuple(result)
