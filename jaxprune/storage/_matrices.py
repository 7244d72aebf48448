"""Converts pruned leaves to sparse matrices and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from jaxprune import trees
from jaxprune.storage._leaves import jax_array, masked_leaves


def to_bcoo(params: Any, masks: Any = None) -> Any:
    """Turns pruned leaves into sparse matrices of `jax.experimental.sparse`.

    Args:
        params: any pytree of arrays; it is read on the host.
        masks: as in `save`. None: floating-point leaves of two or more dimensions with a zero count
            as pruned.

    Returns:
        Tree like `params`. A leaf of one or more dimensions whose mask has a False is a `BCOO` (no
        batch and no dense dimensions) with exactly the kept entries, in row-major order; other
        leaves are unchanged.

    Raises:
        ValueError: as for `save`.

    Example:
        >>> tree = to_bcoo({"kernel": jnp.array([[2.0, 0.0], [0.0, 3.0]]), "bias": jnp.zeros(2)})
        >>> tree["kernel"].nse
        2
        >>> (tree["kernel"] @ jnp.array([1.0, 10.0])).tolist()
        [2.0, 30.0]
    """
    masked = masked_leaves(params, masks)
    pruned = {
        path: _bcoo(values, mask)
        for path, (values, mask) in masked.items()
        if values.ndim and not mask.all()
    }
    leaves = trees.leaf_by_path(params).items()
    return jax.tree.structure(params).unflatten([pruned.get(path, leaf) for path, leaf in leaves])


def from_bcoo(tree: Any) -> Any:
    """Turns sparse matrices back into dense arrays.

    Args:
        tree: any pytree with `BCOO` in place of some leaves.

    Returns:
        The tree with dense arrays, bit for bit the argument of `to_bcoo`.

    Example:
        >>> from_bcoo(to_bcoo([jnp.array([[0.0, 1.0]])]))[0].tolist()
        [[0.0, 1.0]]
    """
    return jax.tree.map(_dense, tree, is_leaf=_is_bcoo)


def _is_bcoo(node: Any) -> bool:
    """Makes a sparse matrix count as one leaf."""
    return isinstance(node, sparse.BCOO)


def _bcoo(values: np.ndarray, mask: np.ndarray) -> sparse.BCOO:
    """Collects the kept entries; `numpy.nonzero` lists them in row-major order."""
    indices = np.stack(np.nonzero(mask), axis=-1).astype(np.int32)
    data = (jax_array(values[mask]), jnp.asarray(indices))
    return sparse.BCOO(data, shape=values.shape, indices_sorted=True, unique_indices=True)


def _dense(leaf: Any) -> Any:
    """Returns the dense array of a sparse matrix; other leaves are unchanged."""
    if not _is_bcoo(leaf):
        return leaf
    if leaf.n_batch or leaf.n_dense or not leaf.unique_indices:
        return leaf.todense()
    # `todense` would turn -0.0 into 0.0, as it adds to zeros.
    zeros = jnp.zeros(leaf.shape, leaf.data.dtype)
    return zeros.at[tuple(leaf.indices.T)].set(leaf.data, unique_indices=True)
