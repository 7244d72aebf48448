"""Arrays of NumPy archives, held against what is expected before memory is taken for them."""

import io
import math
import zipfile
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

# Name of an array -> its dtype and its shape. Sizes of the same name must be equal.
Expected = Mapping[str, tuple[str, tuple[int | str, ...]]]


def read_arrays(stream: BinaryIO, expected: Expected) -> dict[str, np.ndarray]:
    """Reads an uncompressed NumPy archive (`.npz`) of known arrays.

    The checksum of every member is verified, and no more memory is taken than the file is long:
    a compressed archive may hold a thousand times its size, so it is refused.

    Args:
        stream: the file, open for reading; it can seek.
        expected: name -> dtype and shape of each array. A text among the sizes, such as "n",
            stands for any size, the same wherever it occurs.

    Returns:
        Name -> read-only array.

    Raises:
        ValueError: if the file is damaged, or its arrays are not the expected ones.

    Example:
        >>> file = io.BytesIO()
        >>> np.savez(file, images=np.zeros((2, 4), np.uint8), labels=np.arange(2, dtype=np.int32))
        >>> expected = {"images": ("uint8", ("n", 4)), "labels": ("int32", ("n",))}
        >>> read_arrays(file, expected)["labels"]
        array([0, 1], dtype=int32)
    """
    try:
        members = _members(stream, [f"{name}.npy" for name in expected])
        found = {name: _array(members[f"{name}.npy"], name, expected[name][0]) for name in expected}
    # Damaged bytes may raise anything, and be shown: zipfile alone raises eight kinds of errors.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(reason if len(reason) < 300 else reason[:300] + "...") from error
    sizes: dict[str, int] = {}
    for name, (_, shape) in expected.items():
        own = found[name].shape
        wanted = [sizes.get(size, size) if isinstance(size, str) else size for size in shape]
        if len(own) != len(shape) or any(
            isinstance(want, int) and want != size for want, size in zip(wanted, own)
        ):
            text = ", ".join(map(str, wanted))
            raise ValueError(f"`{name}` must have the shape [{text}], but has {list(own)}")
        sizes |= {size: length for size, length in zip(shape, own) if isinstance(size, str)}
    return found


def _members(stream: BinaryIO, names: list[str]) -> dict[str, bytes]:
    """Reads the members of an archive; zipfile verifies their checksums."""
    total = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:
        infos = archive.infolist()
        if sorted(info.filename for info in infos) != sorted(names):
            present = ", ".join(ascii(info.filename)[1:-1][:60] for info in infos[:9]) or "nothing"
            raise ValueError(f"it must hold {', '.join(names)}, but holds {present}")
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError("its arrays must not be compressed; write them with `numpy.savez`")
        if sum(max(info.file_size, info.compress_size) for info in infos) > total:
            raise ValueError(f"its arrays must be shorter than the file, which has {total} bytes")
        return {info.filename: archive.read(info) for info in infos}


def _array(content: bytes, name: str, dtype: str) -> np.ndarray:
    """Makes an array of a member without a copy; the header must describe exactly its bytes."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"`{name}` must be an array in NumPy's format 1.0")
    shape, fortran, found = np.lib.format.read_array_header_1_0(stream)
    wanted = np.dtype(dtype)
    if found != wanted or (fortran and len(shape) > 1):
        raise ValueError(f"`{name}` must be {dtype} in row-major order, but is {found}")
    start = stream.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * wanted.itemsize != len(content) - start:
        raise ValueError(f"`{name}` of shape {list(shape)} must take {len(content) - start} bytes")
    return np.frombuffer(content, wanted, offset=start).reshape(shape)
