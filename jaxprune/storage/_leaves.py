"""Packs masks into bits, and collects parameters with their masks on the host."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees


def pack_mask(mask: Any) -> np.ndarray:
    """Packs a mask into one bit per weight.

    Args:
        mask: bool array of any shape.

    Returns:
        uint8 array of `ceil(mask.size / 8)` bytes: weights in row-major order, the first in the
        highest bit, padded with 0.

    Raises:
        ValueError: if the mask is not bool.

    Example:
        >>> pack_mask([[True, False, False], [False, False, True]]).tolist()
        [132]
    """
    mask = np.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(f"`mask` must be bool, but has dtype {mask.dtype}.")
    return np.packbits(mask)


def unpack_mask(bits: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Unpacks the bits of `pack_mask` into a mask.

    Args:
        bits: uint8 array from `pack_mask`.
        shape: shape of the mask.

    Returns:
        bool array of this shape.

    Raises:
        ValueError: if `bits` is not uint8 or does not have the length for this shape.

    Example:
        >>> unpack_mask(pack_mask([True, False, True]), (3,)).tolist()
        [True, False, True]
    """
    bits, size = np.asarray(bits), math.prod(shape)
    if bits.dtype != np.uint8 or bits.shape != (-(-size // 8),):
        raise ValueError(
            f"`bits` must be uint8[{-(-size // 8)}] for a mask of shape {tuple(shape)}, but is "
            f"{bits.dtype}{list(bits.shape)}."
        )
    return np.unpackbits(bits, count=size).view(bool).reshape(shape)


def masked_leaves(params: Any, masks: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Maps paths to values and masks on the host; a mask has the shape of its leaf or is True.

    The functions and strings among the leaves of modules are left out.
    """
    trees.check_known("params", params, "storage.save")
    trees.check_known("masks", masks, "storage.save")
    leaves = {path: leaf for path, leaf in trees.leaf_by_path(params).items() if is_stored(leaf)}
    values = {path: _host_array(leaf) for path, leaf in leaves.items()}
    trees.raise_for(
        [
            f"{path}: {getattr(leaf, 'dtype', None) or type(leaf).__name__}"
            for path, leaf in leaves.items()
            if values[path].dtype == object
        ],
        "`params` must hold arrays of numbers; remove these leaves "
        "(a random key can be stored as its `jax.random.key_data`):",
    )
    if masks is None:
        return {path: (leaf, _mask_of_zeros(leaf)) for path, leaf in values.items()}
    kept = _checked_masks(masks, values, params)
    lost = {path: np.count_nonzero(_nonzero(leaf) & ~kept[path]) for path, leaf in values.items()}
    trees.raise_for(
        [f"{path}: {count} of {values[path].size}" for path, count in lost.items() if count],
        "`params` must be 0 where they are masked; call `jaxprune.apply_masks` first. "
        "Masked weights that are not 0:",
    )
    return {path: (leaf, kept[path]) for path, leaf in values.items()}


def is_stored(leaf: Any) -> bool:
    """Tells whether a leaf is stored: all except the functions and strings of a module."""
    return trees.is_array(leaf) or not (callable(leaf) or isinstance(leaf, (str, bytes)))


def jax_array(values: np.ndarray) -> Any:
    """Returns a JAX array, or the NumPy array if JAX would change its dtype."""
    keeps = jax.dtypes.canonicalize_dtype(values.dtype) == values.dtype
    return jnp.asarray(values) if keeps else values


def placed_like(values: np.ndarray, like: Any) -> Any:
    """Returns a JAX array where a leaf, an array or its shape, says that it lies.

    An array that JAX may move, because nobody has placed it, says nothing.
    """
    sharding = getattr(like, "sharding", None)
    is_free = isinstance(like, jax.Array) and not like.committed
    # A scalar mask stands for a dense leaf; a leaf that JAX would change remains a NumPy array.
    changes = jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype
    if sharding is None or is_free or changes or values.shape != like.shape:
        return jax_array(values)
    return jax.device_put(values, sharding)


def _host_array(leaf: Any) -> np.ndarray:
    """Returns a leaf in row-major and native order; dtype object if it is no array of numbers."""
    if jnp.issubdtype(getattr(leaf, "dtype", bool), jax.dtypes.extended):
        return np.array(None)
    values = np.asarray(leaf, order="C")
    known = values.dtype == bool or jnp.issubdtype(values.dtype, jnp.number)
    if not known or values.dtype.char in "gG":  # JAX has no long double
        return np.array(None)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _nonzero(values: np.ndarray) -> np.ndarray:
    """Returns True where values are not 0; NumPy would warn at a signalling NaN."""
    with np.errstate(invalid="ignore"):
        return values != 0


def _mask_of_zeros(values: np.ndarray) -> np.ndarray:
    """Derives the mask of a weight matrix from its zeros; in other leaves zeros mean nothing."""
    if values.ndim < 2 or not jnp.issubdtype(values.dtype, jnp.floating):
        return np.array(True)
    # Keep -0.0, whose bytes are not all zero; comparing bytes also serves float8 without a zero.
    raw = values.reshape(-1, 1).view(np.uint8)
    return _nonzero(values) | raw.any(axis=1).reshape(values.shape)


def _checked_masks(masks: Any, values: dict[str, np.ndarray], params: Any) -> dict[str, np.ndarray]:
    """Maps paths to masks on the host; a scalar False gets the shape of its leaf."""
    own, places = trees.spread(masks, params), trees.places(params)
    given = {
        path: np.asarray(True if mask is None else mask)
        for path, mask in own.items()
        if path in values and (mask is None or trees.is_numeric(mask))
    }
    bad = [f"{path}: has no mask" for path in values if path not in given]
    bad += [
        f"{path}: a mask without a parameter"
        for path, mask in own.items()
        if path not in values and (path not in places or not trees.keeps_leaf(mask))
    ]
    for path, leaf in values.items():
        mask = given.get(path, np.array(True))
        if mask.dtype != bool:
            bad.append(f"{path}: its mask has dtype {mask.dtype}")
        elif mask.shape not in ((), leaf.shape):
            bad.append(f"{path}: has shape {leaf.shape}, its mask {mask.shape}")
        elif not mask.ndim and not mask:
            given[path] = np.zeros(leaf.shape, bool)
    trees.raise_for(bad, "`masks` must be a tree of bools like `params`, True where kept:")
    return given
