"""How a kernel becomes matrices [groups, features, outputs], and back."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

__all__ = ["Layout", "from_matrices", "to_matrices"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """The steps from a parameter leaf to matrices that multiply rows of input features.

    A dense layer is one group. The kernels of a grouped convolution, or of a product with batch
    dimensions (experts, stacked layers), are one matrix for each group.

    Args:
        shape: shape of the leaf.
        steps: pairs of a permutation of the axes and the shape to give to the result. The last
            shape is (groups, features, outputs).

    Example:
        >>> layout = Layout((4, 3)).then((1, 0), (1, 3, 4))
        >>> layout.end
        (1, 3, 4)
    """

    shape: tuple[int, ...]
    steps: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def end(self) -> tuple[int, ...]:
        """Shape after the last step."""
        return self.steps[-1][1] if self.steps else self.shape

    def then(self, permutation: tuple[int, ...], shape: tuple[int, ...]) -> "Layout":
        """The same with one more step: a transposition, and then a reshape."""
        assert math.prod(shape) == math.prod(self.shape), (shape, self)
        return Layout(self.shape, (*self.steps, (tuple(permutation), tuple(shape))))


def to_matrices(leaf: Any, layout: Layout) -> Any:
    """Brings a leaf into matrices.

    Args:
        leaf: NumPy or JAX array of shape `layout.shape`: a kernel or its mask.
        layout: from `input_statistics`.

    Returns:
        Array [groups, features, outputs] of the same kind.

    Example:
        >>> kernel = np.arange(6).reshape(2, 3)
        >>> to_matrices(kernel, Layout((2, 3)).then((1, 0), (1, 3, 2))).tolist()
        [[[0, 3], [1, 4], [2, 5]]]
    """
    for permutation, shape in layout.steps:
        leaf = leaf.transpose(permutation).reshape(shape)
    return leaf


def from_matrices(matrices: Any, layout: Layout) -> Any:
    """Brings matrices back into the shape of the leaf; undoes `to_matrices`.

    Args:
        matrices: NumPy or JAX array [groups, features, outputs].
        layout: from `input_statistics`.

    Returns:
        Array of shape `layout.shape`.

    Example:
        >>> layout = Layout((2, 3)).then((1, 0), (1, 3, 2))
        >>> from_matrices(to_matrices(np.arange(6).reshape(2, 3), layout), layout).tolist()
        [[0, 1, 2], [3, 4, 5]]
    """
    starts = [layout.shape, *(shape for _, shape in layout.steps)]
    for start, (permutation, _) in zip(reversed(starts[:-1]), reversed(layout.steps), strict=True):
        permuted = tuple(start[axis] for axis in permutation)
        matrices = matrices.reshape(permuted).transpose(np.argsort(permutation).tolist())
    return matrices


def agree(one: Layout, other: Layout) -> bool:
    """Whether two layouts of a leaf put every weight at the same place."""
    if one == other:
        return True
    places = np.arange(math.prod(one.shape)).reshape(one.shape)
    return np.array_equal(to_matrices(places, one), to_matrices(places, other))
