"""Kernels of several sizes in one: 7x7 to 5x5 to 3x3 by learned matrices."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Size of a window -> matrix float32 [size ** 2, size ** 2] that makes its kernel from the centre of
# the next larger one
Matrices = Mapping[str, Any]


class Kernel(NamedTuple):
    """A convolution kernel [height, width, in, out] whose window may shrink.

    Example:
        >>> Kernel("blocks/0/depthwise/kernel", (3, 5, 7)).key
        'blocks.0.depthwise.kernel'
    """

    path: str
    windows: tuple[int, ...]  # odd, from the smallest to the largest

    @property
    def key(self) -> str:
        """The name of its matrices: the path with dots, as some file formats split at a slash."""
        return self.path.replace("/", ".")


def identities(windows: Sequence[int]) -> dict[str, jax.Array]:
    """Makes the matrices that a kernel starts with: a small kernel is the centre of the large one.

    Args:
        windows: odd sizes, from the smallest to the largest.

    Returns:
        Size, as text -> float32 [size ** 2, size ** 2]; the largest has none.

    Example:
        >>> {size: matrix.shape for size, matrix in identities((3, 5, 7)).items()}
        {'3': (9, 9), '5': (25, 25)}
    """
    return {str(size): jnp.eye(size**2, dtype=jnp.float32) for size in windows[:-1]}


def shrunk(kernel: jax.Array, matrices: Matrices, windows: Sequence[int]) -> list[jax.Array]:
    """Makes the kernels of all windows from the largest one.

    With `C(w)` the centre of `w`, flattened over the window: `w5 = M5 C(w7)`, `w3 = M3 C(w5)`. The
    matrices are shared by all channels of a layer.

    Args:
        kernel: floating [k, k, in, out], k the largest window.
        matrices: see `identities`.
        windows: odd sizes, from the smallest to the largest.

    Returns:
        A kernel [size, size, in, out] for each window, in the same order.

    References:
        Cai et al. Once-for-All, section 3.3. arXiv:1908.09791.

    Example:
        >>> kernel = jnp.arange(25.0).reshape(5, 5, 1, 1)
        >>> small, large = shrunk(kernel, identities((3, 5)), (3, 5))
        >>> small[..., 0, 0].tolist()
        [[6.0, 7.0, 8.0], [11.0, 12.0, 13.0], [16.0, 17.0, 18.0]]
    """
    kernels = [kernel]
    for size in reversed(windows[:-1]):
        inner = cropped(kernels[0], size)
        flat = inner.reshape(size**2, -1)
        matrix = jnp.asarray(matrices[str(size)]).astype(flat.dtype)
        product = jnp.matmul(matrix, flat, precision=jax.lax.Precision.HIGHEST)
        kernels.insert(0, product.reshape(inner.shape))
    return kernels


def selected(
    kernel: jax.Array, matrices: Matrices, windows: Sequence[int], gate: jax.Array
) -> jax.Array:
    """Selects the kernel of one window as data, with zeros around it.

    Args:
        kernel: floating [k, k, in, out], k the largest window.
        matrices: see `identities`.
        windows: odd sizes, from the smallest to the largest.
        gate: bool [windows], True for the chosen one.

    Returns:
        [k, k, in, out]: the convolution pads as for the large window, so the small kernel lies in
        its centre.

    Example:
        >>> kernel = jnp.ones((5, 5, 1, 1))
        >>> gate = jnp.array([True, False])
        >>> float(selected(kernel, identities((3, 5)), (3, 5), gate).sum())
        9.0
    """
    whole = windows[-1]
    padded = []
    for own in shrunk(kernel, matrices, windows):
        margin = (whole - own.shape[0]) // 2
        padded.append(jnp.pad(own, [(margin, margin)] * 2 + [(0, 0)] * (own.ndim - 2)))
    total = padded[-1]
    for index, own in enumerate(padded[:-1]):
        total = jnp.where(gate[index], own, total)
    return total


def cropped(kernel: Any, size: int) -> Any:
    """Returns the centre of a kernel.

    Args:
        kernel: [k, k, ...].
        size: a window of at most k, odd like k.

    Returns:
        [size, size, ...].

    Example:
        >>> cropped(jnp.ones((7, 7, 1, 4)), 3).shape
        (3, 3, 1, 4)
    """
    start = (kernel.shape[0] - size) // 2
    return kernel[start : start + size, start : start + size]
