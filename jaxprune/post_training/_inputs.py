"""Statistics of the inputs of each kernel of a model, summed over calibration data."""

import collections
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import layouts, meshes, trees
from jaxprune.post_training._products import statistic_of

__all__ = [
    "Apply",
    "InputStatistics",
    "capture_of",
    "gram",
    "input_statistics",
    "not_finite",
    "prunable_kernels",
    "scans_of",
    "squared_norms",
    "sum_over",
]

Apply = Callable[[Any, Any], Any]


class InputStatistics(NamedTuple):
    """A statistic of the inputs of one kernel, summed over the calibration data.

    Args:
        value: sum of the statistic over all rows: float32 [groups, features, features] for
            `gram`, [groups, features] for `squared_norms`.
        rows: number of rows: examples times positions in sequences and images. Where an index
            picks copies of a kernel, the rows of all copies together.
        arrangement: the way the kernel is arranged as [groups, features, outputs].

    Example:
        >>> params, x = {"kernel": jnp.ones((5, 2))}, jnp.ones((3, 2))
        >>> found = input_statistics(lambda p, x: x @ p["kernel"].T, params, [x])["kernel"]
        >>> found.rows, found.arrangement.end
        (3, (1, 2, 5))
    """

    value: jax.Array
    rows: int
    arrangement: layouts.Arrangement


def gram(inputs: jax.Array) -> jax.Array:
    """Computes `X^T X`, from which SparseGPT takes its Hessian.

    Args:
        inputs: float32 [groups, rows, features].

    Returns:
        float32 [groups, features, features].

    Example:
        >>> gram(jnp.array([[[1.0, 2.0], [3.0, 0.0]]])).tolist()
        [[[10.0, 2.0], [2.0, 4.0]]]
    """
    return jnp.einsum("grf,grh->gfh", inputs, inputs, precision=jax.lax.Precision.HIGHEST)


def squared_norms(inputs: jax.Array) -> jax.Array:
    """Computes `||X_j||^2` for every feature: the diagonal of `gram` at a fraction of its cost.

    Args:
        inputs: float32 [groups, rows, features].

    Returns:
        float32 [groups, features].

    Example:
        >>> squared_norms(jnp.array([[[1.0, 2.0], [3.0, 0.0]]])).tolist()
        [[10.0, 4.0]]
    """
    return jnp.sum(inputs * inputs, axis=1)


def input_statistics(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    *,
    statistic: Callable[[jax.Array], jax.Array] = gram,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
) -> dict[str, InputStatistics]:
    """Runs calibration data through a model and sums a statistic of the inputs of every kernel.

    It supports the kernels of `dot_general` (any contracting and batch dimensions) and
    `conv_general_dilated` (any strides, padding, dilation and groups), after casts, transpositions
    and reshapes, and inside `jit`, `remat`, custom derivatives and scans. Features have the order
    of `kernel.reshape(features, outputs)` for kernels (in, out) and (height, width, in, out);
    `arrangement` brings kernels that are stored differently into this order. Stacked layers that a
    scan runs over are groups, each with the inputs of its own layer, and so are the copies of a
    kernel that an index picks (a number, the counter of a loop, the expert of each row) and the
    experts of `ragged_dot`. What is added to a kernel, such as a merged adapter, does not change
    its inputs. If a leaf is used more than once, the statistics of its uses are added.

    Memory and time: a convolution writes the patches of one batch at a time, which are height x
    width times as large as its input; use smaller batches if they do not fit. Where rows choose
    their experts, the rows are read once for each expert.

    Args:
        apply: function `(params, batch) -> anything`, in inference mode.
        params: tree of arrays.
        batches: iterable of batches, each a second argument of `apply`: an array or a tree of
            arrays. It is read once.
        statistic: function from the inputs of one layer, float32 [groups, rows, features], to an
            array that is summed over batches: `gram` or `squared_norms`.
        prunable: which leaves to capture, see `trees.prunable_flags`.
        stacked: function `(path, leaf) -> axis, tuple of axes, or None`, the axes that number
            copies of a layer. They are found without it. If it is given, it is compared with the
            axes found, and its axes do not count as dimensions when `prunable` is None.

    Returns:
        Dict from leaf path to `InputStatistics`, in the order in which `apply` uses the leaves.

    Raises:
        TypeError: if `batches` is a single array.
        ValueError: lists every leaf that `apply` uses in a different way or never, every leaf whose
            `stacked` axes do not number copies, and every leaf whose inputs are not finite; or if
            there is no batch.

    Example:
        >>> def apply(params, x):
        ...     return jax.nn.relu(x @ params["kernel"] )
        >>> params = {"kernel": jnp.ones((2, 3))}
        >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0]])]
        >>> input_statistics(apply, params, batches)["kernel"].value.tolist()
        [[[10.0, 2.0], [2.0, 4.0]]]
    """
    if hasattr(batches, "shape"):
        raise TypeError(
            "`batches` must be an iterable of batches, but is one array; pass `[batch]`."
        )
    trees.raise_for(
        [
            f"{path}: {type(leaf).__name__}"
            for path, leaf in trees.leaves_with_paths(params)
            if not trees.is_numeric(leaf)
        ],
        "`params` must hold arrays only; remove all other leaves (`nnx.split`, "
        "`equinox.partition`):",
    )
    flags = prunable_kernels(params, prunable, stacked)
    found = sum_over(batches, capture_of(apply, flags, statistic), params)
    _check_stacked(params, stacked, found)
    return found


def capture_of(
    apply: Apply, flags: tuple[bool, ...], statistic: Callable[[jax.Array], jax.Array]
) -> Callable[..., dict[str, InputStatistics]]:
    """Compiles `(params, batch, step) -> statistics of one batch`.

    Args:
        apply: function `(params, batch) -> anything`.
        flags: which leaves to capture, in flattening order.
        statistic: as in `input_statistics`.

    Returns:
        Function of parameters, a batch, and None; or of parameters, a batch, and the step of the
        scan over the leaf, for the statistics of this copy alone.

    Example:
        >>> capture = capture_of(lambda p, x: x @ p["w"], (True,), squared_norms)
        >>> capture({"w": jnp.ones((2, 2))}, jnp.array([[1.0, 2.0]]), None)["w"].value.tolist()
        [[1.0, 4.0]]
    """

    def captured(params: Any, batch: Any, step: Any) -> dict[str, InputStatistics]:
        found, values = _capture_batch(apply, params, batch, flags, statistic, step)
        # An OrderedDict, because `jit` sorts the keys of a plain dict.
        return collections.OrderedDict(
            (path, InputStatistics(*values[path], found.uses[path])) for path in found.uses
        )

    return jax.jit(captured)


def scans_of(
    apply: Apply, params: Any, batch: Any, flags: tuple[bool, ...]
) -> dict[str, layouts.Scan | None]:
    """Finds which scan runs over the copies of each captured leaf; None: not exactly one.

    Args:
        apply: function `(params, batch) -> anything`.
        params: tree of arrays.
        batch: a batch.
        flags: which leaves to capture, in flattening order.

    Returns:
        Dict from path to `layouts.Scan` or None.

    Example:
        >>> def apply(params, x):
        ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]
        >>> scans_of(apply, {"w": jnp.ones((3, 2, 2))}, jnp.ones((1, 2)), (True,))["w"].length
        3
    """
    found: list[layouts.Found] = []

    def trace(params: Any, batch: Any) -> None:
        found.append(_capture_batch(apply, params, batch, flags, _nothing, None)[0])

    with meshes.entered(params):
        jax.eval_shape(trace, params, batch)
    return found[0].scans


def sum_over(
    batches: Iterable[Any],
    capture: Callable[..., dict[str, InputStatistics]],
    params: Any,
    step: np.int32 | None = None,
) -> dict[str, InputStatistics]:
    """Sums the statistics of all batches.

    Args:
        batches: iterable of batches.
        capture: from `capture_of`.
        params: tree of arrays.
        step: passed to `capture`.

    Returns:
        Dict from path to `InputStatistics`, in the order of use.

    Raises:
        ValueError: if there is no batch, or inputs are not finite.

    Example:
        >>> capture = capture_of(lambda p, x: x @ p["w"], (True,), squared_norms)
        >>> sum_over([jnp.ones((1, 2))] * 3, capture, {"w": jnp.ones((2, 2))})["w"].rows
        3
    """
    found: dict[str, InputStatistics] = {}
    values: dict[str, jax.Array] = {}
    rows = collections.Counter()  # on the host, where it cannot overflow
    for batch in batches:
        with meshes.entered(params):
            found = capture(params, batch, step)
            new = {path: inputs.value for path, inputs in found.items()}
            values = _add(values, new) if values else new
        rows.update({path: int(inputs.rows) for path, inputs in found.items()})
        found = {path: inputs._replace(value=None) for path, inputs in found.items()}
    if not found:
        raise ValueError("`batches` is empty; pass at least one batch of calibration data.")
    trees.raise_for(
        not_finite(values),
        "`batches` must give finite inputs whose squares do not overflow; check the calibration "
        "data and the parameters. These leaves have inputs that are not finite:",
    )
    return {
        path: InputStatistics(values[path], rows[path], inputs.arrangement)
        for path, inputs in found.items()
    }


def prunable_kernels(
    params: Any, prunable: trees.Prunable, stacked: trees.Stacked
) -> tuple[bool, ...]:
    """Decides for each leaf whether it is pruned; the default excludes vectors that are stacked."""
    flags = trees.prunable_flags(params, prunable)
    if prunable is not None:
        return flags
    return tuple(
        flag and jnp.ndim(leaf) - len(trees.stacked_axes(path, leaf, stacked)) >= 2
        for (path, leaf), flag in zip(trees.leaves_with_paths(params), flags, strict=True)
    )


def _check_stacked(params: Any, stacked: trees.Stacked, found: dict[str, InputStatistics]) -> None:
    """Raises for leaves whose `stacked` axes differ from the copies that the products show."""
    problems = []
    for path, leaf in trees.leaf_by_path(params).items() if stacked else ():
        if path in found:
            shown = getattr(found[path].arrangement.layout, "copies", ())
            said = trees.stacked_axes(path, leaf, stacked)
            if not set(said) <= set(shown):
                problems.append(
                    f"{path}: axes {said}, but the copies that `apply` uses are {shown}"
                )
    trees.raise_for(
        problems,
        "`stacked` must name axes that number copies of a kernel; change it, or omit it, because "
        "they are found without it:",
    )


def not_finite(leaves: dict[str, Any]) -> list[str]:
    """Returns the paths of arrays that contain NaN or infinities."""
    finite = jax.device_get(_finite(leaves))
    return [path for path in leaves if not finite[path]]


def _nothing(inputs: jax.Array) -> jax.Array:
    """Computes a statistic of no cost, for the order and the arrangement of leaves alone."""
    return jnp.zeros(len(inputs))


def _capture_batch(
    apply: Apply,
    params: Any,
    batch: Any,
    flags: tuple[bool, ...],
    statistic: Callable[[jax.Array], jax.Array],
    step: jax.Array | None,
) -> tuple[layouts.Found, dict[str, tuple[jax.Array, int]]]:
    """Returns what was found in `apply`, and statistics and rows of one batch; can be traced."""

    def take(use: layouts.Use) -> tuple[jax.Array, int]:
        def of_arrays(*arrays: jax.Array) -> jax.Array:
            count = len(use.operands)
            own = use._replace(operands=arrays[:count], index=next(iter(arrays[count:]), None))
            value, number = statistic_of(own, statistic)
            rows.append(number)
            return value

        rows: list[int] = []
        picks = [] if use.index is None else [use.index]
        return meshes.automatically(of_arrays, *use.operands, *picks), rows[-1]

    leaves, treedef = trees.leaf_by_path(params), jax.tree.structure(params)

    def call(leaves: dict[str, Any], batch: Any) -> Any:
        return apply(treedef.unflatten(list(leaves.values())), batch)

    wanted = [path for path, flag in zip(leaves, flags, strict=True) if flag]
    found = layouts.capture(call, leaves, batch, wanted, take, step=step)
    bad = {path for path, _ in found.problems}
    unused = [path for path in wanted if path not in found.uses and path not in bad]
    reasons = {f"{path}: {reason}" for path, reason in found.problems}
    trees.raise_for(
        sorted(reasons | {f"{path}: `apply` never multiplies it" for path in unused}),
        "each pruned leaf must be used as the kernel of products or convolutions only; exclude "
        "these with `prunable`:",
    )
    return found, {
        path: (meshes.on_this_mesh(value), count) for path, (value, count) in found.sums.items()
    }


# Each compiles once for all leaves.
_add = jax.jit(lambda old, new: jax.tree.map(jnp.add, old, new))
_finite = jax.jit(lambda leaves: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), leaves))
