"""Places of a function at which a masked leaf is the kernel of a product or convolution.

A `Site` says how the leaf's mask and the operands of an equation are arranged for a sparse kernel:
`x [..., K] @ kernel [K, N]`, or an image [B, H, W, C] with a kernel [H, W, C, N].
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import meshes
from jaxprune.jaxprs import has_symbols
from jaxprune.kernels import _operations as operations
from jaxprune.kernels._finishing import Finish
from jaxprune.layouts import Atom, View

__all__ = [
    "Key",
    "Site",
    "arranged",
    "compute",
    "compute_depthwise",
    "is_depthwise",
    "is_finishable",
    "site_of",
]

PRODUCTS = {"dot_general", "conv_general_dilated"}
_DTYPES = {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
_WIDEST = 7  # height and width of the largest window with a sparse kernel


class Key(NamedTuple):
    """What the indices of a mask are made for; products with the same key share them.

    Example:
        >>> Key("w", "product", (3, 4), ((Atom(0, 1, 3),), (Atom(1, 1, 4),))).shape
        (3, 4)
    """

    path: str  # of the leaf
    kind: str  # "product" or "convolution"
    shape: tuple[int, ...]  # of the kernel as the operation takes it: [K, N] or [H, W, C, N]
    dims: tuple[tuple[Atom, ...], ...]  # factors of the leaf's axes in each of its dimensions


class Site(NamedTuple):
    """One product or convolution with a masked leaf.

    Example:
        >>> Site(Key("w", "product", (3, 4), ((), ())), 8, 1).rows
        8
    """

    key: Key
    rows: int  # outputs for each output channel: examples times positions
    side: int  # position of the kernel among the operands: 0 left, 1 right
    strides: tuple[int, int] = (1, 1)


def site_of(equation: Any, view: View, side: int) -> Site | str:
    """Describes a product with a masked leaf, or says why no sparse kernel computes it.

    Args:
        equation: a product or a convolution.
        view: its operand that holds the leaf.
        side: the position of this operand.

    Returns:
        A `Site`, or the reason.

    Example:
        >>> from jaxprune.layouts import view_of
        >>> (equation,) = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))).eqns
        >>> site_of(equation, view_of("w", (3, 4)), side=1).rows
        2
    """
    if view.copies:
        return "a scan stacks it with other layers"
    if view.pick is not None:
        return "an index picks it from a stack"
    shapes = [variable.aval.shape for variable in (*equation.invars, *equation.outvars)]
    if any(map(has_symbols, shapes)):
        return "its sizes are symbols"
    if not math.prod(shapes[-1]):
        return "its result is empty"
    dtypes = {variable.aval.dtype for variable in (*equation.invars, *equation.outvars)}
    if not dtypes <= _DTYPES:
        return f"computed in {', '.join(sorted(map(str, dtypes - _DTYPES)))}"
    of = _product if equation.primitive.name == "dot_general" else _convolution
    return of(equation, view, side)


def _product(equation: Any, view: View, side: int) -> Site | str:
    """Describes `dot_general`."""
    contracting, batch = equation.params["dimension_numbers"]
    if batch[side]:
        return "a product with batch dimensions, of several kernels at once"
    inputs, outputs = _axes(len(view.dims), contracting[side])
    dims = [tuple(a for axis in axes for a in view.dims[axis]) for axes in (inputs, outputs)]
    key = _key(view.path, "product", dims)
    rows = math.prod(equation.outvars[0].aval.shape) // key.shape[1]
    return Site(key, rows, side)


def _convolution(equation: Any, view: View, side: int) -> Site | str:
    """Describes `conv_general_dilated`."""
    parameters = equation.params
    _, kernel, out = parameters["dimension_numbers"]
    strides, padding = tuple(parameters["window_strides"]), parameters["padding"]
    window = tuple(equation.invars[1].aval.shape[axis] for axis in kernel[2:])
    groups = parameters["feature_group_count"]
    if side == 0:
        return "the image of a convolution, not its kernel"
    if groups > 1:
        return f"a convolution of {groups} groups"
    if parameters["batch_group_count"] > 1:
        return "a convolution with `batch_group_count`"
    if set(parameters["rhs_dilation"]) != {1}:
        return "a dilated convolution"
    if set(parameters["lhs_dilation"]) != {1}:
        return "a transposed convolution"
    if len(window) != 2:
        return f"a convolution over {len(window)} dimension" + "s" * (len(window) > 1)
    if min(min(pair) for pair in padding) < 0:
        return "a convolution that crops its image"
    result = equation.outvars[0].aval.shape
    rows = math.prod(result) // result[out[1]]
    features = view.dims[kernel[1]], view.dims[kernel[0]]
    if window == (1, 1) and not any(map(any, padding)):
        return Site(_key(view.path, "product", features), rows, side, strides)
    if not set(strides) <= {1, 2}:
        return f"a convolution of strides {strides[0]} x {strides[1]}"
    if any(size % 2 == 0 or size > _WIDEST for size in window):
        return f"a convolution with a window of {window[0]} x {window[1]}"
    dims = [*(view.dims[axis] for axis in kernel[2:]), *features]
    return Site(_key(view.path, "convolution", dims), rows, side, strides)


def is_depthwise(equation: Any) -> bool:
    """Tells whether an equation is a depthwise convolution that `compute_depthwise` computes.

    Args:
        equation: any equation.

    Returns:
        A bool.

    Example:
        >>> def convolve(x, kernel):
        ...     return jax.lax.conv_general_dilated(
        ...         x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ...         feature_group_count=x.shape[-1])
        >>> x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
        >>> is_depthwise(jax.make_jaxpr(convolve)(x, kernel).eqns[0])
        True
    """
    if equation.primitive.name != "conv_general_dilated":
        return False
    parameters, avals = equation.params, [v.aval for v in (*equation.invars, *equation.outvars)]
    kernel = parameters["dimension_numbers"][1]
    groups, shape = parameters["feature_group_count"], avals[1].shape
    return (
        len(shape) == 4
        and not any(has_symbols(aval.shape) for aval in avals)
        # XLA cannot divide a kernel among several devices, as types with explicit axes ask for.
        and not any(meshes.is_explicit(aval.sharding) for aval in avals)
        and math.prod(avals[2].shape) > 0
        and {aval.dtype for aval in avals} <= _DTYPES
        and groups > 1
        and shape[kernel[1]] == 1
        and shape[kernel[0]] == groups
        # A window of one weight scales each channel, which XLA fuses into what is around it.
        and math.prod(shape[axis] for axis in kernel[2:]) > 1
        and parameters["batch_group_count"] == 1
        and {*parameters["rhs_dilation"], *parameters["lhs_dilation"]} == {1}
        and set(parameters["window_strides"]) <= {1, 2}
        and min(min(pair) for pair in parameters["padding"]) >= 0
    )


def compute_depthwise(
    equation: Any, operands: list[jax.Array], finish: Finish | None = None
) -> jax.Array:
    """Computes a depthwise convolution with a kernel of its own.

    Args:
        equation: an equation for which `is_depthwise` holds.
        operands: images and windows.
        finish: what is done to the sums, where `is_finishable` holds.

    Returns:
        The result of the equation, in its dtype.

    Example:
        >>> def convolve(x, kernel):
        ...     return jax.lax.conv_general_dilated(
        ...         x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ...         feature_group_count=x.shape[-1])
        >>> operands = [jnp.ones((1, 3, 3, 2)), jnp.ones((3, 3, 1, 2))]
        >>> (equation,) = jax.make_jaxpr(convolve)(*operands).eqns
        >>> compute_depthwise(equation, operands).ravel().tolist()
        [9.0, 9.0]
    """
    parameters, result = equation.params, equation.outvars[0].aval
    image, (n, c, *window), out = parameters["dimension_numbers"]
    x, kernel = (operand.astype(result.dtype) for operand in operands)
    x, kernel = x.transpose(image[0], *image[2:], image[1]), kernel.transpose(*window, c, n)
    options = {"strides": parameters["window_strides"], "padding": parameters["padding"]}
    if finish is not None:
        return operations.finished_depthwise(x, kernel, finish, **options)
    return operations.depthwise_convolution(x, kernel, **options).transpose(_order(out))


def is_finishable(equation: Any, site: Site | None = None) -> bool:
    """Tells whether a kernel can do more to the sums of a product before it stores them.

    They must be float32, on one device, and have their channels last.

    Args:
        equation: a product or convolution that a kernel computes.
        site: what `site_of` said of it; None for a depthwise convolution.

    Example:
        >>> (equation,) = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.eye(3, 4)).eqns
        >>> site = Site(Key("w", "product", (3, 4), ((), ())), 2, 1)
        >>> is_finishable(equation, site), is_finishable(equation, site._replace(side=0))
        (True, False)
    """
    aval = equation.outvars[0].aval
    atoms = [*equation.invars, *equation.outvars]
    if aval.dtype != jnp.float32 or aval.ndim < 2 or not all(atom.aval.size for atom in atoms):
        return False
    if getattr(aval, "vma", None) or meshes.is_explicit(aval.sharding):
        return False
    if equation.primitive.name == "conv_general_dilated":
        return tuple(equation.params["dimension_numbers"].out_spec) == (0, 3, 1, 2)
    return site is not None and site.side == 1 and aval.shape[-1] == site.key.shape[-1]


def _order(out: Any) -> list[int]:
    """Returns where the axes of an output are in [batch, rows, columns, channels]."""
    order = {out[0]: 0, out[1]: 3, out[2]: 1, out[3]: 2}
    return [order[axis] for axis in range(4)]


def _axes(rank: int, contracting: Any) -> tuple[list[int], list[int]]:
    """Returns the contracting axes in their order in the array, and the other ones."""
    return sorted(contracting), [axis for axis in range(rank) if axis not in contracting]


def _key(path: str, kind: str, dims: Any) -> Key:
    """Makes a key; factors of size 1 say nothing."""
    atoms = tuple(tuple(atom for atom in dim if atom.size > 1) for dim in dims)
    return Key(path, kind, tuple(math.prod(a.size for a in dim) for dim in atoms), atoms)


def arranged(mask: np.ndarray, key: Key) -> np.ndarray:
    """Arranges the mask of a leaf as the operation takes its kernel.

    Args:
        mask: bool, of the shape of the leaf.
        key: the arrangement.

    Returns:
        bool of shape `key.shape`.

    Example:
        >>> key = Key("w", "product", (3, 2), ((Atom(1, 1, 3),), (Atom(0, 1, 2),)))
        >>> arranged(np.array([[True, False, False], [True, True, False]]), key).tolist()
        [[True, True], [False, True], [False, False]]
    """
    wanted = [atom for dim in key.dims for atom in dim]
    stored = sorted(wanted, key=lambda atom: (atom.axis, -atom.stride))
    split = mask.reshape([atom.size for atom in stored])
    return split.transpose([stored.index(atom) for atom in wanted]).reshape(key.shape)


def compute(
    equation: Any,
    operands: list[jax.Array],
    site: Site,
    indices: Any,
    finish: Finish | None = None,
) -> jax.Array:
    """Computes an equation with a sparse kernel.

    Args:
        equation: the equation.
        operands: its two operands.
        site: what `site_of` said of it.
        indices: of the mask, see `jaxprune.kernels.product_indices`.
        finish: what is done to the sums, where `is_finishable` holds.

    Returns:
        The result of the equation, in its dtype.

    Example:
        >>> from jaxprune.layouts import view_of
        >>> operands = [jnp.ones((2, 3)), jnp.eye(3, 4)]
        >>> (equation,) = jax.make_jaxpr(jnp.dot)(*operands).eqns
        >>> site = site_of(equation, view_of("w", (3, 4)), side=1)
        >>> indices = operations.product_indices(np.eye(3, 4, dtype=bool))
        >>> compute(equation, operands, site, indices).tolist()
        [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    """
    # Sums are in float32 or wider, so the operands need the type that the result has.
    result = equation.outvars[0].aval
    x, kernel = (operands[side].astype(result.dtype) for side in (1 - site.side, site.side))
    run = _run_product if equation.primitive.name == "dot_general" else _run_convolution
    return run(equation.params, x, kernel, site, indices, finish).reshape(result.shape)


def _run_product(
    parameters: dict[str, Any],
    x: jax.Array,
    kernel: jax.Array,
    site: Site,
    indices: Any,
    finish: Finish | None,
) -> jax.Array:
    """Computes `dot_general`."""
    side, (contracting, _) = site.side, parameters["dimension_numbers"]
    inputs, outputs = _axes(kernel.ndim, contracting[side])
    # The axes of `x` that meet the kernel's inputs, in the order of these.
    meets = dict(zip(contracting[side], contracting[1 - side], strict=True))
    features = [meets[axis] for axis in inputs]
    rest = [axis for axis in range(x.ndim) if axis not in features]
    rows = x.transpose(*rest, *features).reshape(*(x.shape[axis] for axis in rest), -1)
    matrix = kernel.transpose(*inputs, *outputs).reshape(site.key.shape)
    if finish is not None:
        return operations.finished_product(rows, matrix, indices, finish)
    y = operations.sparse_product(rows, matrix, indices)
    y = y.reshape(*y.shape[:-1], *(kernel.shape[axis] for axis in outputs))
    if side == 1:
        return y
    order = [*range(len(rest), y.ndim), *range(len(rest))]  # the left operand comes first
    return y.transpose(order)


def _run_convolution(
    parameters: dict[str, Any],
    x: jax.Array,
    kernel: jax.Array,
    site: Site,
    indices: Any,
    finish: Finish | None,
) -> jax.Array:
    """Computes `conv_general_dilated`."""
    image, (n, c, *window), out = parameters["dimension_numbers"]
    x = x.transpose(image[0], *image[2:], image[1])
    if site.key.kind == "product":
        x = x[:, :: site.strides[0], :: site.strides[1]]
        matrix = kernel.transpose(*window, c, n).reshape(site.key.shape)
        if finish is not None:
            return operations.finished_product(x, matrix, indices, finish)
        y = operations.sparse_product(x, matrix, indices)
    else:
        kernel = kernel.transpose(*window, c, n)
        options = {"strides": site.strides, "padding": parameters["padding"]}
        if finish is not None:
            return operations.finished_convolution(x, kernel, indices, finish, **options)
        y = operations.sparse_convolution(x, kernel, indices, **options)
    return y.transpose(_order(out))
