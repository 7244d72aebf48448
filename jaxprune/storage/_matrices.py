"""Pruned leaves as sparse matrices and back."""

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
        masks: as in `save`. None: floating-point leaves of two or more dimensions that hold a
            zero are pruned.

    Returns:
        Tree like `params`. A leaf of one or more dimensions whose mask has a False is a `BCOO`
        (no batch and no dense dimensions) with exactly the kept entries, in row-major order;
        other leaves are as they were.

    Raises:
        ValueError: as in `save`.

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
        The tree with dense arrays, bit for bit what `to_bcoo` was given.

    Example:
        >>> from_bcoo(to_bcoo([jnp.array([[0.0, 1.0]])]))[0].tolist()
        [[0.0, 1.0]]
    """
    return jax.tree.map(_dense, tree, is_leaf=_is_bcoo)


def _is_bcoo(node: Any) -> bool:
    """A sparse matrix counts as one leaf."""
    return isinstance(node, sparse.BCOO)


def _bcoo(values: np.ndarray, mask: np.ndarray) -> sparse.BCOO:
    """The kept entries; `numpy.nonzero` lists them in row-major order."""
    indices = np.stack(np.nonzero(mask), axis=-1).astype(np.int32)
    data = (jax_array(values[mask]), jnp.asarray(indices))
    return sparse.BCOO(data, shape=values.shape, indices_sorted=True, unique_indices=True)


def _dense(leaf: Any) -> Any:
    """The dense array of a sparse matrix; other leaves as they are."""
    if not _is_bcoo(leaf):
        return leaf
    if leaf.n_batch or leaf.n_dense or not leaf.unique_indices:
        return leaf.todense()
    # Not `todense`, which adds to zeros: -0.0 would come back as 0.0.
    zeros = jnp.zeros(leaf.shape, leaf.data.dtype)
    return zeros.at[tuple(leaf.indices.T)].set(leaf.data, unique_indices=True)
