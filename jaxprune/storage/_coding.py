"""Values of a leaf as bytes: as they are, as bfloat16, or as int8 with a scale for each output."""

from typing import Any

import jax.numpy as jnp
import numpy as np

VALUES = ("exact", "bfloat16", "int8")
_BFLOAT16 = np.dtype(jnp.bfloat16)


def coding_of(values: np.ndarray, wanted: str) -> str:
    """Returns how a leaf is stored where `wanted` is asked for.

    Floats wider than the coding are coded; int8 needs an axis of outputs, so vectors, such as
    biases and statistics, become bfloat16.

    Args:
        values: the leaf.
        wanted: one of `VALUES`.

    Returns:
        One of `VALUES`.

    Example:
        >>> kernel, bias = np.ones((3, 2), np.float32), np.ones(2, np.float32)
        >>> coding_of(kernel, "int8"), coding_of(bias, "int8"), coding_of(np.arange(2), "int8")
        ('int8', 'bfloat16', 'exact')
    """
    if wanted == "exact" or not jnp.issubdtype(values.dtype, jnp.floating):
        return "exact"
    if wanted == "int8" and values.ndim > 1 and values.size and values.dtype.itemsize > 1:
        return "int8"
    return "bfloat16" if values.dtype.itemsize > 2 else "exact"


def coded_size(coding: str, dtype: np.dtype, shape: tuple[int, ...], count: int) -> int:
    """Returns how many bytes `count` values of a leaf take."""
    if coding == "int8":
        return 4 * shape[-1] + count
    return count * (2 if coding == "bfloat16" else dtype.itemsize)


def encode(kept: np.ndarray, outputs: np.ndarray, width: int, coding: str) -> np.ndarray:
    """Encodes the kept values of a leaf.

    Bytes of the same significance lie together: those of exponents repeat, and compress.

    Args:
        kept: float or any [count]: the values.
        outputs: int [count]: the index of each along the last axis of the leaf; for int8 only.
        width: the size of that axis.
        coding: one of `VALUES`.

    Returns:
        uint8 array of the size that `coded_size` says.

    Example:
        >>> kept, outputs = np.array([1.27, -0.5, 2.54], np.float32), np.array([0, 0, 1])
        >>> decode(encode(kept, outputs, 2, "int8"), outputs, 2, "int8", kept.dtype).tolist()
        [1.2699999809265137, -0.5, 2.5399999618530273]
    """
    if coding == "int8":
        largest = np.zeros(width, np.float32)
        np.maximum.at(largest, outputs, np.abs(kept.astype(np.float32)))
        scale = largest / np.float32(127)
        steps = kept.astype(np.float32) / np.where(scale > 0, scale, 1)[outputs]
        whole = np.clip(np.round(steps), -127, 127).astype(np.int8)
        return np.concatenate([_planes(scale), whole.view(np.uint8)])
    return _planes(kept.astype(_BFLOAT16) if coding == "bfloat16" else kept)


def decode(
    raw: np.ndarray, outputs: np.ndarray, width: int, coding: str, dtype: np.dtype
) -> np.ndarray:
    """Decodes what `encode` returns to values of a dtype."""
    if coding == "int8":
        scale = _values(raw[: 4 * width], np.dtype(np.float32))
        return (raw[4 * width :].view(np.int8) * scale[outputs]).astype(dtype)
    if coding == "bfloat16":
        return _values(raw, _BFLOAT16).astype(dtype)
    return _values(raw, dtype)


def _planes(values: np.ndarray) -> np.ndarray:
    """Returns the first bytes of all values, then the second ones, and so on."""
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return np.ascontiguousarray(raw.reshape(-1, values.dtype.itemsize).T).reshape(-1)


def _values(planes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the values of `_planes`."""
    raw = planes.reshape(dtype.itemsize, -1).T
    return np.ascontiguousarray(raw).reshape(-1).view(dtype)


def relative_error(pairs: list[tuple[Any, Any]]) -> float:
    """Returns the root mean square of the errors of values over that of the values; 0 for none."""
    lost = sum(float(np.sum((old - new) ** 2)) for old, new in pairs)
    whole = sum(float(np.sum(old**2)) for old, _ in pairs)
    return (lost / whole) ** 0.5 if whole else 0.0
