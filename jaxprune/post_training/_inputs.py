"""What arrives at each kernel of a model, summed over calibration data."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import trees
from jaxprune.post_training._interpreter import Apply, InputStatistics, capture_batch

__all__ = ["gram", "input_statistics", "not_finite", "squared_norms"]


def gram(inputs: jax.Array) -> jax.Array:
    """`X^T X`, from which SparseGPT takes its Hessian.

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
    """`||X_j||^2` of every feature: the diagonal of `gram`, at a small part of its cost.

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
) -> dict[str, InputStatistics]:
    """Runs calibration data through a model and sums a statistic of the inputs of every kernel.

    Supported are the kernels of `dot_general` (any contracting and batch dimensions) and
    `conv_general_dilated` (any strides, padding, dilation and groups), behind casts,
    transpositions and reshapes, also inside `jit`, `remat` and custom derivatives. Features are
    in the order of `kernel.reshape(features, outputs)` for kernels (in, out) and (height, width,
    in, out); kernels stored in another order are brought into this one by `layout`. The uses of a
    leaf that is used more than once add up.

    Memory: a convolution writes its patches, height x width times its input, for one batch at a
    time; make batches smaller if that is too much.

    Args:
        apply: function `(params, batch) -> anything`, in inference mode.
        params: tree of arrays.
        batches: iterable of batches, each what `apply` takes as its second argument: an array
            or a tree of arrays. Read once.
        statistic: function of one layer's inputs, float32 [groups, rows, features], to an array
            that is summed over batches: `gram` or `squared_norms`.
        prunable: which leaves to capture, see `trees.prunable_flags`.

    Returns:
        Dict from leaf path to `InputStatistics`, in the order in which `apply` uses the leaves.

    Raises:
        TypeError: if `batches` is a single array.
        ValueError: lists every leaf that `apply` uses in another way or never, and every leaf
            whose inputs are not finite; or if there is no batch.

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
        "`params` must hold arrays only; take the rest out of the tree (`nnx.split`, "
        "`equinox.partition`):",
    )
    flags = trees.prunable_flags(params, prunable)
    capture = jax.jit(lambda params, batch: capture_batch(apply, params, batch, flags, statistic))
    found: dict[str, InputStatistics] = {}
    values: dict[str, jax.Array] = {}
    rows = collections.Counter()  # on the host, where it cannot overflow
    for batch in batches:
        found = capture(params, batch)
        new = {path: inputs.value for path, inputs in found.items()}
        values = _add(values, new) if values else new
        rows.update({path: int(inputs.rows) for path, inputs in found.items()})
    if not found:
        raise ValueError("`batches` is empty; pass at least one batch of calibration data.")
    trees.raise_for(
        not_finite(values),
        "`batches`: the inputs of these leaves are not finite, or their squares overflow; check "
        "the calibration data and the parameters:",
    )
    return {
        path: InputStatistics(values[path], rows[path], inputs.layout)
        for path, inputs in found.items()
    }


def not_finite(leaves: dict[str, Any]) -> list[str]:
    """The paths of arrays that hold NaN or infinities."""
    finite = jax.device_get(_finite(leaves))
    return [path for path in leaves if not finite[path]]


# One compilation for all leaves.
_add = jax.jit(lambda old, new: jax.tree.map(jnp.add, old, new))
_finite = jax.jit(lambda leaves: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), leaves))
