"""Views: arrays that hold the values of one leaf, with the position of each of its axes.

Every dimension of a view is a row-major product of *atoms*: whole axes of the leaf, or factors of
an axis that a reshape has split. Transpositions move atoms; reshapes split and merge them.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Atom", "Pick", "View", "as_kernel", "picked", "reshaped", "same_values", "view_of"]

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
    """A factor of an axis: `index // stride % size` for the indices of the axis.

    Example:
        >>> Atom(axis=0, stride=4, size=2)  # the first of the factors 2 x 4 of an axis of size 8
        Atom(axis=0, stride=4, size=2)
    """

    axis: int
    stride: int
    size: int


class Pick(NamedTuple):
    """The copies of a leaf that an index has picked, as in `kernels[i]` or `experts[chosen]`."""

    atoms: tuple[Atom, ...]  # the factors of the leaf's axes that number the copies, row-major
    index: Any  # int [picks], the copy of each pick; dimensions over it have atoms of axis PICKS
    by: str  # the primitive


PICKS = -1  # in place of an axis of the leaf: a dimension that runs over the picks


class View(NamedTuple):
    """An array that holds the values of a leaf: the leaf, and the atoms of each dimension.

    Example:
        >>> [[atom.axis for atom in dim] for dim in view_of("kernel", (3, 4)).dims]
        [[0], [1]]
    """

    path: str
    shape: Shape  # of the leaf
    dims: tuple[tuple[Atom, ...], ...]
    copies: tuple[Atom, ...] = ()  # atoms that enclosing scans run over
    pick: Pick | None = None

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
        split = {atom.axis for dim in split for atom in dim if atom.size > 1}
        return frozenset(copies - split - {PICKS})

    def picks(self) -> list[int] | None:
        """Returns the dimensions over the picks, in their order; None if one is mixed or split."""
        own = [
            (atom.stride, dim)
            for dim, atoms in enumerate(self.dims)
            for atom in atoms
            if atom.axis == PICKS and atom.size > 1
        ]
        pure = all(len([atom for atom in self.dims[dim] if atom.size > 1]) == 1 for _, dim in own)
        return [dim for _, dim in sorted(own, reverse=True)] if pure else None

    def without_pick(self) -> "View":
        """Returns the view of all copies: those that are picked count as copies of a scan."""
        if self.pick is None:
            return self
        dims = [tuple(atom for atom in dim if atom.axis != PICKS) for dim in self.dims]
        copies = (*self.copies, *self.pick.atoms)
        return View(self.path, self.shape, tuple(dims), copies)


def view_of(path: str, shape: Shape) -> View:
    """Returns the view of the leaf itself.

    Args:
        path: the path of the leaf.
        shape: its shape.

    Returns:
        A `View` with one atom for each axis.

    Example:
        >>> view_of("kernel", (3, 4)).dims[1]
        (Atom(axis=1, stride=1, size=4),)
    """
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
    """Returns the result of a cast, transposition or reshape of a view; None for all others.

    Args:
        equation: an equation whose operand is the view.
        view: the view.

    Returns:
        The view that the result is, or None.

    Example:
        >>> (equation,) = jax.make_jaxpr(jnp.transpose)(jnp.ones((3, 4))).eqns
        >>> same_values(equation, view_of("kernel", (3, 4))).dims[0]
        (Atom(axis=1, stride=1, size=4),)
    """
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


def picked(equation: Any, view: View, arrays: Sequence[Any]) -> list[View] | None:
    """Returns the results of an index along dimensions of a view; None for all others.

    These are slices of length 1, at places that may be computed, and lookups of such slices.

    Args:
        equation: the equation; its first operand is the view.
        view: the view.
        arrays: the values of the operands.
    """
    name, parameters = equation.primitive.name, equation.params
    shape, outputs = arrays[0].shape, [variable.aval.shape for variable in equation.outvars]
    if name == "gather":
        return _gathered(parameters, view, arrays, len(outputs[0]))
    if name not in ("slice", "dynamic_slice", "split"):
        return None
    cut = [axis for axis, (old, new) in enumerate(zip(shape, outputs[0])) if old != new]
    if not cut or any(own[axis] != 1 for own in outputs for axis in cut):
        return None
    starts: list[Any] = [[place] for place in range(len(outputs))]
    if name == "slice":
        starts = [[parameters["start_indices"][axis] for axis in cut]]
    elif name == "dynamic_slice":
        starts = [[arrays[1 + axis] for axis in cut]]
    dims = tuple(() if axis in cut else dim for axis, dim in enumerate(view.dims))
    index = [[jnp.reshape(jnp.asarray(i), 1) for i in own] for own in starts]
    found = [_at(view, cut, dims, own, name) for own in index]
    return None if None in found else found  # pyright: ignore[reportReturnType]


def _gathered(
    parameters: dict[str, Any], view: View, arrays: Sequence[Any], rank: int
) -> list[View] | None:
    """Returns the result of `gather` if it looks up slices that are whole or of length 1."""
    numbers, sizes = parameters["dimension_numbers"], parameters["slice_sizes"]
    shape, places = arrays[0].shape, list(numbers.start_index_map)
    cut = [axis for axis, (old, new) in enumerate(zip(shape, sizes)) if old != new]
    cut = cut or [axis for axis in places if shape[axis] == 1]
    if any(sizes[axis] != 1 for axis in cut) or numbers.operand_batching_dims:
        return None
    index = [arrays[1][..., places.index(axis)] for axis in cut]
    counts = arrays[1].shape[:-1]
    strides = [math.prod(counts[i + 1 :]) for i in range(len(counts))]
    over = iter([(Atom(PICKS, s, n),) for s, n in zip(strides, counts, strict=True)])
    left = [() if i in cut else dim for i, dim in enumerate(view.dims)]
    kept = iter([dim for i, dim in enumerate(left) if i not in numbers.collapsed_slice_dims])
    dims = tuple(next(kept if place in numbers.offset_dims else over) for place in range(rank))
    drops = parameters["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    found = _at(view, cut, dims, [own.reshape(-1) for own in index], "gather", drops=drops)
    return None if found is None else [found]


def _at(
    view: View,
    cut: Sequence[int],
    dims: tuple,
    index: Sequence[Any],
    by: str,
    *,
    drops: bool = False,
) -> View | None:
    """Returns the view at an index [picks] for each axis that is cut.

    An index out of range picks the nearest copy or, with `drops`, none, which is -1. The result is
    None if an earlier index and this one pick several copies each.
    """
    atoms, picks = (), jnp.zeros(index[0].shape if index else 1, jnp.int32)
    if view.pick is not None:
        if min(len(picks), len(view.pick.index)) > 1:
            return None
        atoms, picks = view.pick.atoms, view.pick.index + picks
    for axis, own in zip(cut, index, strict=True):
        size = math.prod(atom.size for atom in view.dims[axis])
        own = own.astype(jnp.int32)
        none = (picks < 0) | (drops & ((own < 0) | (own >= size)))
        picks = jnp.where(none, -1, picks * size + jnp.clip(own, 0, size - 1))
        atoms = (*atoms, *view.dims[axis])
    return view._replace(dims=dims, pick=Pick(atoms, picks, by))


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
