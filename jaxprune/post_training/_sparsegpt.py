"""SparseGPT: prunes one input feature after another and corrects the later ones."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import budgets, patterns, trees
from jaxprune.post_training._inputs import Apply, InputStatistics, gram
from jaxprune.post_training._layers import NM, check_amount, largest, prune_layers
from jaxprune.post_training._matrices import from_matrices, to_matrices

__all__ = ["sparsegpt"]


def sparsegpt(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    sparsity: float | None = None,
    *,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
    n_m: NM | None = None,
    block: int = 128,
    damping: float = 0.01,
    sequential: bool = False,
) -> tuple[Any, Any]:
    """Prunes a trained model in one shot, and corrects the weights that are kept.

    Each layer keeps `||X W - X W'||` small, where `X` are its inputs on the calibration data:
    `H = 2 X^T X / n`, with `damping * mean(diag H)` added to its diagonal, has the inverse `H^-1 =
    U^T U` with `U` upper triangular. Input features are processed in blocks. Of a block's features
    x outputs weights, those with the `keep_count` largest `w^2 / U_jj^2` are kept; ties keep the
    lower index. Then, feature by feature, the later features are corrected for the pruned weights:
    with `e_j = (w_j - q_j) / U_jj`, where `q_j` is `w_j` with its pruned weights set to 0, the
    weights of each later feature `k` become `w_k - U_jk e_j`. If a feature `j` is 0 in all
    calibration data, its weights are set to 0, whether they are pruned or not, and `H_jj = 1`.

    Inputs are those of the dense model. With `sequential`, the layers are pruned in the order in
    which `apply` uses them, and each sees inputs from layers that are already pruned, as in the
    paper (which prunes by transformer block). The data then run once for each leaf, and the Gram
    matrix of one leaf, 4 bytes x features^2, is in memory instead of all. Layers that a scan runs
    over are pruned one after the other as well, as if they were a list: the data run once for each
    leaf and layer, and memory holds the Gram matrix of one leaf of one layer.

    Args:
        apply: function `(params, batch) -> anything`, in inference mode.
        params: tree of arrays.
        batches: iterable of batches, each a second argument of `apply`. They are kept in memory;
            the authors use 128 examples.
        sparsity: fraction of the weights of each block to set to zero, in [0, 1).
        prunable: which leaves are pruned, see `trees.prunable_flags`. Each must be the kernel of
            products or convolutions; an embedding that is looked up is not.
        stacked: see `input_statistics`. With or without it, each copy of a stacked layer is pruned
            as a separate layer, with its own inputs.
        n_m: instead of `sparsity`: (n, m) keeps n of every m consecutive input features of each
            output, chosen when the sweep reaches them. For convolutions these are input channels
            of one window position, if m divides the number of channels.
        block: number of input features that are compared with each other, and processed before the
            rest is updated. A multiple of m.
        damping: share of the mean of the Hessian's diagonal that is added to the diagonal, above 0.
        sequential: whether each layer sees the inputs of the model as pruned so far. Copies of a
            kernel that an index picks, or that batch dimensions number, are pruned together.

    Returns:
        The pruned and corrected parameters and the masks, a tree of bools like `params`.

    Raises:
        TypeError: if `batches` is a single array.
        ValueError: lists every leaf that cannot be pruned, with the reason; or if an argument or
            the data are invalid.

    References:
        Frantar and Alistarh, SparseGPT: massive language models can be accurately pruned in
        one-shot, arXiv:2301.00774.

    Example:
        >>> def apply(params, x):
        ...     return x @ params["kernel"]
        >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
        >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0]])  # the second feature can replace the first
        >>> pruned, masks = sparsegpt(apply, params, [x], 0.5, damping=1e-4)
        >>> pruned["kernel"].round(2).tolist(), masks["kernel"].tolist()
        ([[0.0], [3.0]], [[False], [True]])
    """
    check_amount(sparsity, n_m)
    if block < 1 or (n_m is not None and block % n_m[1]):
        raise ValueError(
            f"`block` must be a positive multiple of m, but is {block} with `n_m` {n_m}."
        )
    if not damping > 0:
        raise ValueError(f"`damping` must be above 0, but is {damping!r}.")
    return prune_layers(
        apply,
        params,
        batches,
        partial(_prune, damping=damping, sparsity=sparsity, n_m=n_m, block=block),
        statistic=gram,
        n_m=n_m,
        prunable=prunable,
        stacked=stacked,
        sequential=sequential,
    )


@partial(jax.jit, static_argnames=("sparsity", "n_m", "block"))
def _prune(
    leaf: jax.Array,
    inputs: InputStatistics,
    *,
    damping: jax.Array | float,
    sparsity: float | None,
    n_m: NM | None,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Prunes one leaf; returns it and its mask."""

    def one(matrix: jax.Array, hessian: jax.Array) -> tuple[jax.Array, jax.Array]:
        dead = jnp.diagonal(hessian) == 0
        matrix = jnp.where(dead[:, None], 0.0, matrix)
        factor = _factor(hessian + jnp.diag(dead.astype(hessian.dtype)), damping)
        return _sweep(matrix, factor, sparsity=sparsity, n_m=n_m, block=block)

    matrices = to_matrices(leaf, inputs.arrangement).astype(jnp.float32)
    pruned, masks = jax.vmap(one)(matrices, 2 / inputs.rows * inputs.value)
    pruned = from_matrices(pruned, inputs.arrangement).astype(leaf.dtype)
    return pruned, from_matrices(masks, inputs.arrangement)


def _factor(hessian: jax.Array, damping: jax.Array | float) -> jax.Array:
    """Returns the upper triangular `U` for which `U^T U` is the inverse of the damped Hessian."""
    eye = jnp.eye(hessian.shape[0], dtype=hessian.dtype)
    hessian = hessian + damping * jnp.mean(jnp.diagonal(hessian)) * eye
    # With rows and columns reversed, the lower Cholesky factor is an upper R with H = R R^T, and
    # U = R^-1: one factorisation, whereas "invert, then factorise" takes three.
    upper = jnp.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, eye)


def _sweep(
    matrix: jax.Array, factor: jax.Array, *, sparsity: float | None, n_m: NM | None, block: int
) -> tuple[jax.Array, jax.Array]:
    """Prunes and corrects the rows of a matrix [features, outputs] in order."""
    features, outputs = matrix.shape
    block = min(block, features)
    starts = range(0, features, block)
    sizes = [min(block, features - start) * outputs for start in starts]
    keep = jnp.array([budgets.keep_count(size, sparsity or 0.0) for size in sizes], jnp.int32)
    # Rows of zeros pad the last block. They come last, so they lose every tie.
    total = len(starts) * block
    matrix = jnp.pad(matrix, ((0, total - features), (0, 0)))
    factor = jnp.eye(total, dtype=factor.dtype).at[:features, :features].set(factor)
    column = jnp.arange(total)[None, :]

    def choose(scores: jax.Array, index: jax.Array) -> jax.Array:
        if n_m is not None:
            return patterns.n_m_mask(scores, *n_m, axis=-2)
        return largest(scores.reshape(-1), keep[index]).reshape(scores.shape)

    def sweep_block(index: jax.Array, carry: Any) -> Any:
        matrix, masks = carry
        start = index * block
        factor_rows = _rows(factor, start, block)
        square = jax.lax.dynamic_slice_in_dim(factor_rows, start, block, axis=1)
        rows, mask, errors = _sweep_block(
            _rows(matrix, start, block),
            square,
            lambda scores: choose(scores, index),
            width=block if n_m is None else n_m[1],
        )
        later = jnp.where(column >= start + block, factor_rows, 0.0)
        matrix = _put_rows(matrix, jnp.where(mask, rows, 0.0), start)
        matrix = matrix - jnp.matmul(later.T, errors, precision=jax.lax.Precision.HIGHEST)
        return matrix, _put_rows(masks, mask, start)

    carry = (matrix, jnp.zeros(matrix.shape, bool))
    matrix, masks = jax.lax.fori_loop(0, len(starts), sweep_block, carry)
    return matrix[:features], masks[:features]


def _sweep_block(
    rows: jax.Array, factor: jax.Array, choose: Callable[[jax.Array], jax.Array], *, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns corrected rows [block, outputs], masks, chosen `width` rows at a time, and errors."""
    diagonal = jnp.diagonal(factor)[:, None]

    def sweep_group(index: jax.Array, carry: Any) -> Any:
        rows, mask, errors = carry
        start = index * width
        scores = (_rows(rows, start, width) / _rows(diagonal, start, width)) ** 2
        mask = _put_rows(mask, choose(scores), start)

        def sweep_row(offset: jax.Array, carry: Any) -> Any:
            rows, errors = carry
            here = start + offset
            error = jnp.where(mask[here], 0.0, rows[here] / diagonal[here])
            # The factor is triangular, so this does not change earlier rows.
            rows = rows - factor[here][:, None] * error[None, :]
            return rows, errors.at[here].set(error)

        rows, errors = jax.lax.fori_loop(0, width, sweep_row, (rows, errors))
        return rows, mask, errors

    carry = (rows, jnp.zeros(rows.shape, bool), jnp.zeros_like(rows))
    return jax.lax.fori_loop(0, len(rows) // width, sweep_group, carry)


def _rows(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns `size` rows of a matrix."""
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _put_rows(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """Replaces rows of a matrix."""
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, axis=0)
