"""Describes the layers of a function: products and convolutions with a kernel, in order."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import jaxprs, layouts, structure, trees


class Layer(NamedTuple):
    """A product or convolution with a kernel, with the names of the AMC paper where it has some.

    Example:
        >>> Layer("w", c=3, n=4, rows=1, weights=12, macs=12).k
        1
    """

    path: str  # of the kernel
    c: int  # input channels, over all groups of a grouped convolution
    n: int  # output channels
    rows: int  # rows of a product: examples times positions; examples of a convolution
    weights: int  # entries of the kernel
    macs: int  # of all uses together
    size: tuple[int, ...] = ()  # height and width of the input image; () for a product
    window: tuple[int, ...] = ()  # of a convolution
    strides: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    groups: int = 1  # of a grouped convolution; `c` for a depthwise one
    layout: layouts.Layout | None = None  # the axes of the kernel; None if one has two roles

    @property
    def h(self) -> int:
        """Height of the input; 1 for a product."""
        return self.size[0] if self.size else 1

    @property
    def w(self) -> int:
        """Width of the input; 1 for a product."""
        return self.size[-1] if self.size else 1

    @property
    def k(self) -> int:
        """Height of the window; 1 for a product."""
        return self.window[0] if self.window else 1

    @property
    def stride(self) -> int:
        """Stride of a convolution; 0 for a product, as in the published code."""
        return self.strides[0] if self.strides else 0


def find_layers(function: Callable[..., Any], variables: Any, *args: Any) -> tuple[Layer, ...]:
    """Lists the layers of a function in the order in which it uses their kernels.

    The function is traced, never run. A kernel that is used several times, as in a loop, is one
    layer with the sum of their multiply-accumulates. Kernels that `layouts.capture` cannot follow,
    such as those that an elementwise function changes first, are left out.

    Args:
        function: function `(variables, *args) -> anything`, in inference mode.
        variables: tree of arrays or of `jax.ShapeDtypeStruct`.
        *args: its other arguments: trees of arrays or shapes. A batch of one image gives the
            multiply-accumulates of an image.

    Returns:
        The layers.

    Raises:
        ValueError: if there is no layer.

    Example:
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w = {"out": jnp.ones((8, 2)), "in": jnp.ones((3, 8))}
        >>> [(layer.path, layer.c, layer.n) for layer in find_layers(mlp, w, jnp.ones((1, 3)))]
        [('in', 3, 8), ('out', 8, 2)]
    """
    trees.check_known("variables", variables, "search.find_layers")
    leaves, treedef = trees.leaf_by_path(variables), jax.tree.structure(variables)
    arrays = {path: jaxprs.abstract(leaf) for path, leaf in leaves.items() if trees.is_array(leaf)}
    wanted = [path for path, leaf in arrays.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    uses: list[_Use] = []
    captured: list[Any] = []

    def call(by_path: dict[str, Any], inputs: Any) -> Any:
        return function(treedef.unflatten([by_path.get(p, x) for p, x in leaves.items()]), *inputs)

    def take(use: layouts.Use) -> tuple[jax.Array, int]:
        shapes = [jaxprs.abstract(operand) for operand in use.operands]
        uses.append(_Use(use.equation, shapes, use.side, use.index is not None))
        # `capture` adds these numbers up for each leaf, times the length of a scan. With a digit
        # for each use, the sum says which uses a leaf has and how often they run.
        return jnp.zeros(1), _BASE ** (len(uses) - 1)

    def trace(by_path: dict[str, Any], inputs: Any) -> None:
        captured.append(layouts.capture(call, by_path, inputs, wanted, take))

    jax.eval_shape(trace, arrays, args)
    (found,) = captured
    changed = {path for path, _ in found.problems}
    layers = []
    for path in found.uses:
        digits, macs, first = found.sums[path][1], 0, None
        for use in uses:
            digits, times = divmod(digits, _BASE)
            macs += times * _macs(use, arrays[path].size)
            first = first or (use if times else None)
        if path not in changed and first is not None:
            layout = found.uses[path].layout
            own = _describe(path, first, arrays[path].size, macs)
            layers.append(own._replace(layout=None if isinstance(layout, str) else layout))
    if not layers:
        raise ValueError(
            "`function` must multiply or convolve with leaves of `variables`, but no kernel was "
            "found; see `layouts.find(...).reasons`."
        )
    return tuple(layers)


_BASE = 2**64


class _Use(NamedTuple):
    """One product of a kernel, without its arrays."""

    equation: Any
    shapes: list[Any]
    side: int  # position of the kernel among the operands
    is_picked: bool  # whether an index has picked one of several copies


def _macs(use: _Use, size: int) -> int:
    """Counts the multiply-accumulates of a use, over all copies that a scan runs over."""
    primitive, params = use.equation.primitive, use.equation.params
    own = structure.count_macs(lambda *arrays: jaxprs.bind(primitive, params, arrays), *use.shapes)
    return own if use.is_picked else own * max(1, size // use.shapes[use.side].size)


def _describe(path: str, use: _Use, size: int, macs: int) -> Layer:
    """Describes a layer by its first use."""
    kernel, other = use.shapes[use.side], use.shapes[1 - use.side]
    params = use.equation.params
    if use.equation.primitive.name == "conv_general_dilated":
        image, (out, inner, *window), _ = params["dimension_numbers"]
        return Layer(
            path,
            c=other.shape[image[1]],
            n=kernel.shape[out],
            rows=other.shape[image[0]],
            weights=size,
            macs=macs,
            size=tuple(other.shape[axis] for axis in image[2:]),
            window=tuple(kernel.shape[axis] for axis in window),
            strides=tuple(params["window_strides"]),
            padding=tuple(params["padding"]),
            groups=params["feature_group_count"],
        )
    if use.equation.primitive.name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        contracting, batch = numbers.dot_dimension_numbers[0], numbers.rhs_group_dimensions
        batch = ((), tuple(batch)) if use.side else (tuple(batch), ())
    else:
        contracting, batch = params["dimension_numbers"]
    c = math.prod(kernel.shape[axis] for axis in contracting[use.side])
    copies = math.prod(kernel.shape[axis] for axis in batch[use.side])
    rows = other.size // max(1, c * copies)
    return Layer(path, c=c, n=kernel.size // (c * copies), rows=rows, weights=size, macs=macs)
