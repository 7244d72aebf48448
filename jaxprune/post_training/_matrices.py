"""Arranges a kernel as matrices [groups, features, outputs], and back."""

import math
from typing import Any

import numpy as np

from jaxprune.layouts import Arrangement

__all__ = ["from_matrices", "to_matrices"]


def to_matrices(leaf: Any, arrangement: Arrangement) -> Any:
    """Arranges a leaf as matrices.

    Args:
        leaf: NumPy or JAX array of shape `arrangement.shape`: a kernel or its mask.
        arrangement: from `input_statistics`.

    Returns:
        Array [groups, features, outputs] of the same kind.

    Example:
        >>> kernel = np.arange(6).reshape(2, 3)
        >>> stored = Arrangement((2, 3), (), (), inputs=((1, 1, 3),), outputs=((0, 1, 2),))
        >>> to_matrices(kernel, stored).tolist()
        [[[0, 3], [1, 4], [2, 5]]]
    """
    split, order = _order(arrangement)
    return leaf.reshape(split).transpose(order).reshape(arrangement.end)


def from_matrices(matrices: Any, arrangement: Arrangement) -> Any:
    """Arranges matrices in the shape of the leaf; undoes `to_matrices`.

    Args:
        matrices: NumPy or JAX array [groups, features, outputs].
        arrangement: from `input_statistics`.

    Returns:
        Array of shape `arrangement.shape`.

    Example:
        >>> stored = Arrangement((2, 3), (), (), inputs=((1, 1, 3),), outputs=((0, 1, 2),))
        >>> from_matrices(to_matrices(np.arange(6).reshape(2, 3), stored), stored).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    split, order = _order(arrangement)
    moved = matrices.reshape([split[axis] for axis in order])
    return moved.transpose(np.argsort(order).tolist()).reshape(arrangement.shape)


def _order(arrangement: Arrangement) -> tuple[list[int], list[int]]:
    """Returns the factors of the leaf's axes, and their permutation that makes the matrices."""
    wanted = [tuple(atom) for part in arrangement.parts for atom in part]
    stored = sorted(wanted, key=lambda atom: (atom[0], -atom[1]))
    split = [size for _, _, size in stored]
    assert math.prod(split) == math.prod(arrangement.shape), arrangement
    return split, [stored.index(atom) for atom in wanted]
