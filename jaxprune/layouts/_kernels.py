"""The meaning of a kernel's dimensions in products and convolutions."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxprune.layouts._views import Atom, Shape, View, reshaped

__all__ = ["Arrangement", "Layout", "agree", "arrange"]


class Layout(NamedTuple):
    """The role of each axis of a leaf that is used as a kernel.

    Each axis is in exactly one of the four tuples, which are ascending.

    Args:
        inputs: axes that a product sums over, and input channels of a convolution.
        outputs: axes that remain in the result of a product, and output channels of a convolution.
        positions: axes of a convolution's window.
        copies: axes that number independent kernels: stacked layers, experts, ensembles.

    Example:
        >>> Layout(inputs=(2,), outputs=(3,), positions=(0, 1), copies=())  # Flax, convolution
        Layout(inputs=(2,), outputs=(3,), positions=(0, 1), copies=())
    """

    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()


@jax.tree_util.register_static
@dataclass(frozen=True)
class Arrangement:
    """The way a leaf is arranged as matrices that multiply rows of input features.

    A dense layer has one group. A grouped convolution, a product with batch dimensions (experts)
    and a scan over layers have one matrix for each group. Features are window positions times
    inputs. Each field except the first lists factors of the leaf's axes.

    Args:
        shape: shape of the leaf.
        groups: factors that number the matrices, as triples of axis, stride and size.
        positions: window positions, row-major.
        inputs: input features or channels.
        outputs: output features or channels.

    Example:
        >>> dense = Arrangement((4, 3), (), (), (Atom(0, 1, 4),), (Atom(1, 1, 3),))
        >>> dense.end, dense.layout.inputs
        ((1, 4, 3), (0,))
    """

    shape: Shape
    groups: tuple[Atom, ...]
    positions: tuple[Atom, ...]
    inputs: tuple[Atom, ...]
    outputs: tuple[Atom, ...]

    @property
    def parts(self) -> tuple[tuple[Atom, ...], ...]:
        """The factors of the groups, the features and the outputs."""
        return self.groups, (*self.positions, *self.inputs), self.outputs

    @property
    def end(self) -> tuple[int, int, int]:
        """The shape (groups, features, outputs) of the matrices."""
        groups, features, outputs = (math.prod(size for _, _, size in part) for part in self.parts)
        return groups, features, outputs

    def part(self, count: int) -> "Arrangement":
        """Returns the arrangement of some matrices by themselves, [count, features, outputs]."""
        shape = (count, *self.end[1:])
        groups, features, outputs = ((Atom(axis, 1, size),) for axis, size in enumerate(shape))
        return Arrangement(shape, groups, (), features, outputs)

    @property
    def layout(self) -> Layout | str:
        """The role of each axis, or the reason why an axis has two roles."""
        groups, outputs = self.groups, self.outputs
        if groups and self.positions and not outputs:
            # A depthwise convolution: one input per channel, so the channels are the outputs.
            groups, outputs = groups[:-1], groups[-1:]
        axes = {
            "inputs": {axis for axis, _, _ in self.inputs},
            "outputs": {axis for axis, _, _ in outputs},
            "positions": {axis for axis, _, _ in self.positions},
        }
        # The output channels of a grouped convolution are its groups times its outputs.
        axes["copies"] = {axis for axis, _, _ in groups} - axes["outputs"]
        for axis, size in enumerate(self.shape):
            found = [name for name, members in axes.items() if axis in members]
            if not found:  # removed by an index; an axis of size 1 is a window of one position
                axes["positions" if size == 1 else "copies"].add(axis)
            elif len(found) > 1:
                return f"axis {axis} is in part {' and in part '.join(found)}"
        return Layout(**{name: tuple(sorted(members)) for name, members in axes.items()})


def arrange(equation: Any, view: View, side: int) -> Arrangement | str:
    """Returns the arrangement of a view in a product or convolution, or why it is not a kernel.

    `side` is the position of the view among the operands: 0 left, 1 right.
    """
    over = view.picks()
    if over is None:
        return "is looked up by an index, of which a reshape has split a dimension"
    if over and equation.primitive.name != "dot_general":
        return f"is looked up by an index with dimensions, then used by `{equation.primitive.name}`"
    if over and set(over) & set(equation.params["dimension_numbers"][0][side]):
        return "is looked up by an index over which a product sums"
    kind = {
        "dot_general": _product,
        "conv_general_dilated": _convolution,
        "ragged_dot_general": _ragged_product,
    }
    view = view.without_pick()
    return kind[equation.primitive.name](equation.params, view, side)


def _product(parameters: dict[str, Any], view: View, side: int) -> Arrangement:
    """Arranges the kernel of `dot_general`: contracting axes are inputs, batch axes are groups."""
    contracting, batch = (axes[side] for axes in parameters["dimension_numbers"])
    free = [a for a in range(len(view.dims)) if a not in (*contracting, *batch)]
    # Features have the order of the kernel's axes, whatever their order in the equation.
    groups, inputs, outputs = (_atoms(view, axes) for axes in (batch, sorted(contracting), free))
    return Arrangement(view.shape, view.copies + groups, (), inputs, outputs)


def _ragged_product(parameters: dict[str, Any], view: View, side: int) -> Arrangement | str:
    """Arranges the kernels of `ragged_dot`, one for each group of rows."""
    numbers = parameters["ragged_dot_dimension_numbers"]
    (contracting, batch), rows = numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions
    if side == 0:
        return "is the left side of `ragged_dot`, not its kernels"
    if any(batch) or rows[0] in contracting[0] or parameters["group_offset"] is not None:
        return "is used by `ragged_dot` over inputs or batches of groups"
    groups = numbers.rhs_group_dimensions
    free = [axis for axis in range(len(view.dims)) if axis not in (*groups, *contracting[1])]
    numbered, inputs, outputs = (
        _atoms(view, axes) for axes in (groups, sorted(contracting[1]), free)
    )
    return Arrangement(view.shape, view.copies + numbered, (), inputs, outputs)


def _convolution(parameters: dict[str, Any], view: View, side: int) -> Arrangement | str:
    """Arranges the kernel of `conv_general_dilated`: groups are runs of its output channels."""
    if side == 0:
        return "is the image of a convolution, not its kernel"
    if parameters["batch_group_count"] != 1:
        return "is the kernel of a convolution with `batch_group_count`"
    _, (output, channel, *window), _ = parameters["dimension_numbers"]
    count = parameters["feature_group_count"]
    channels = math.prod(atom.size for atom in view.dims[output])
    split = reshaped((view.dims[output],), (count, channels // count))
    if split is None:
        return "is the kernel of a convolution whose groups cut across an axis"
    positions, inputs = _atoms(view, window), _atoms(view, [channel])
    return Arrangement(view.shape, view.copies + split[0], positions, inputs, split[1])


def _atoms(view: View, axes: Any) -> tuple[Atom, ...]:
    """Returns the atoms of some dimensions of a view."""
    return tuple(atom for axis in axes for atom in view.dims[axis])


def agree(one: Arrangement, other: Arrangement) -> bool:
    """Returns whether two arrangements of a leaf put every weight in the same place."""
    return [_merged(part) for part in one.parts] == [_merged(part) for part in other.parts]


def _merged(atoms: tuple[Atom, ...]) -> list[Atom]:
    """Merges atoms into as few as possible without changing the order of entries."""
    result: list[Atom] = []
    for atom in atoms:
        last = result[-1] if result else None
        if last and last.axis == atom.axis and last.stride == atom.stride * atom.size:
            result[-1] = Atom(atom.axis, atom.stride, last.size * atom.size)
        elif atom.size > 1:
            result.append(atom)
    return result
