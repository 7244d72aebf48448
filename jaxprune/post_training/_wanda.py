"""Wanda: scores weights by the norms of their inputs and compares them within each output."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import budgets, patterns, trees
from jaxprune.post_training._inputs import Apply, InputStatistics, squared_norms
from jaxprune.post_training._layers import NM, check_amount, largest, prune_layers
from jaxprune.post_training._matrices import from_matrices, to_matrices

__all__ = ["wanda"]


def wanda(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    sparsity: float | None = None,
    *,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
    n_m: NM | None = None,
    sequential: bool = False,
) -> tuple[Any, Any]:
    """Prunes a trained model in one shot, without changing the weights that are kept.

    The score is `|W_ji| * ||X_j||_2`, where `||X_j||_2` is the norm of input feature `j` over all
    rows of the calibration data. Of the weights of each output `i`, `keep_count(features,
    sparsity)` are kept; ties keep the lower index. Kernels are treated as matrices (features,
    outputs), see `input_statistics`.

    Inputs are those of the dense model. With `sequential`, the layers are pruned in the order in
    which `apply` uses them, and each sees inputs from layers that are already pruned, as in the
    authors' code (which prunes by transformer block). The data then run once for each leaf. Layers
    that a scan runs over are pruned one after the other as well, as if they were a list, and the
    data run once for each leaf and layer.

    Args:
        apply: function `(params, batch) -> anything`, in inference mode.
        params: tree of arrays.
        batches: iterable of batches, each a second argument of `apply`. They are kept in memory;
            the authors use 128 examples.
        sparsity: fraction of the weights of each output to set to zero, in [0, 1).
        prunable: which leaves are pruned, see `trees.prunable_flags`. Each must be the kernel of
            products or convolutions; an embedding that is looked up is not.
        stacked: see `input_statistics`. With or without it, each copy of a stacked layer is pruned
            as a separate layer, with its own inputs.
        n_m: instead of `sparsity`: (n, m) keeps n of every m consecutive input features of each
            output. For convolutions these are input channels of one window position, if m divides
            the number of channels.
        sequential: whether each layer sees the inputs of the model as pruned so far. Copies of a
            kernel that an index picks, or that batch dimensions number, are pruned together.

    Returns:
        The pruned parameters and the masks, a tree of bools like `params`.

    Raises:
        TypeError: if `batches` is a single array.
        ValueError: lists every leaf that cannot be pruned, with the reason; or if an argument or
            the data are invalid.

    References:
        Sun et al., A simple and effective pruning approach for large language models,
        arXiv:2306.11695.

    Example:
        >>> def apply(params, x):
        ...     return x @ params["kernel"]
        >>> params = {"kernel": jnp.array([[1.0, 3.0], [2.0, 2.0]])}
        >>> pruned, masks = wanda(apply, params, [jnp.array([[4.0, 1.0]])], 0.5)
        >>> pruned["kernel"].tolist()
        [[1.0, 3.0], [0.0, 0.0]]
    """
    check_amount(sparsity, n_m)
    return prune_layers(
        apply,
        params,
        batches,
        partial(_prune, sparsity=sparsity, n_m=n_m),
        statistic=squared_norms,
        n_m=n_m,
        prunable=prunable,
        stacked=stacked,
        sequential=sequential,
    )


@partial(jax.jit, static_argnames=("sparsity", "n_m"))
def _prune(
    leaf: jax.Array, inputs: InputStatistics, *, sparsity: float | None, n_m: NM | None
) -> tuple[jax.Array, jax.Array]:
    """Prunes one leaf; returns it and its mask."""
    matrices = to_matrices(leaf, inputs.arrangement).astype(jnp.float32)
    scores = jnp.abs(matrices) * jnp.sqrt(inputs.value)[:, :, None]
    if n_m is None:
        keep = budgets.keep_count(matrices.shape[1], sparsity or 0.0)
        of_outputs = jax.vmap(partial(largest, keep=keep), in_axes=1, out_axes=1)
        masks = jax.vmap(of_outputs)(scores)
    else:
        masks = patterns.n_m_mask(scores, *n_m, axis=-2)
    mask = from_matrices(masks, inputs.arrangement)
    return jnp.where(mask, leaf, jnp.zeros_like(leaf)), mask
