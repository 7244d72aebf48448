"""Compresses bytes with Zstandard or zlib, and unpacks no more than was announced."""

import importlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

# What a file may unpack to: this many times its own length, or a size that is harmless anyway.
RATIO, HARMLESS = 1024, 2**26
CODECS = ("zstd", "zlib", "none")
# Levels of Zstandard. Level 19 finds repetitions in masks (0.49 of the bits at 90 % zeros, level 1
# 0.51) at 2 s for each MB. Values have none, and level 1 is the smallest (0.843; level 19 0.844).
_PATIENT, _QUICK, _LARGE = 19, 1, 2**22
_INSTALL = "install it with `pip install 'jaxprune[export]'`"


class _Codec(NamedTuple):
    pack: Callable[[bytes, bool], bytes]  # content, and whether it may repeat
    unpack: Callable[[bytes, int], bytes]  # content, and the length it must have


def best() -> str:
    """Returns "zstd" where Python or the package zstandard has it, otherwise "zlib"."""
    return "zlib" if _zstd() is None else "zstd"


def pack(content: bytes, codec: str, repeats: bool = True) -> bytes:
    """Compresses bytes.

    Args:
        content: any bytes.
        codec: one of `CODECS`.
        repeats: whether to look for repetitions, which takes longer.

    Returns:
        The compressed bytes.

    Raises:
        ModuleNotFoundError: if `codec` is "zstd" and nothing here has it.

    Example:
        >>> unpack(pack(b"a" * 1000, "zlib"), "zlib", 1000) == b"a" * 1000
        True
    """
    return _codec(codec).pack(content, repeats)


def unpack(content: bytes, codec: str, size: int) -> bytes:
    """Decompresses bytes to a length that is known, and takes no more memory than that.

    Args:
        content: from `pack`.
        codec: one of `CODECS`.
        size: the length of the result.

    Returns:
        `size` bytes.

    Raises:
        ValueError: if the content is damaged or has another length.
        ModuleNotFoundError: if `codec` is "zstd" and nothing here has it.

    Example:
        >>> unpack(b"ab", "none", 3)
        Traceback (most recent call last):
        ValueError: it holds 2 bytes in place of 3
    """
    found = _codec(codec).unpack(content, size)
    if len(found) != size:
        raise ValueError(f"it holds {len(found)} bytes in place of {size}")
    return found


def is_allowed(size: int, stored: int) -> bool:
    """Tells whether a file of `stored` bytes may unpack to `size` bytes."""
    return size <= HARMLESS + RATIO * stored


def _codec(name: str) -> _Codec:
    if name == "zlib":
        return _Codec(lambda content, repeats: zlib.compress(content, 6), _inflate)
    if name == "none":
        return _Codec(lambda content, repeats: content, lambda content, size: content)
    found = _zstd()
    if found is None:
        raise ModuleNotFoundError(
            "the file is compressed with Zstandard, which needs Python 3.14 or the package "
            f"zstandard; {_INSTALL}",
            name="zstandard",
        )
    return found


def _inflate(content: bytes, size: int) -> bytes:
    worker = zlib.decompressobj()
    try:
        found = worker.decompress(content, size + 1)
    except zlib.error as error:
        raise ValueError(f"it is damaged ({error})") from error
    if not worker.eof or worker.unused_data:
        raise ValueError("it is damaged (its compressed bytes do not end where they should)")
    return found


def _zstd() -> _Codec | None:
    """Returns Zstandard from the standard library or the package, or None."""
    for name, make in (("compression.zstd", _from_python), ("zstandard", _from_package)):
        try:
            return make(importlib.import_module(name))
        except ImportError:
            continue
    return None


def _from_python(module: Any) -> _Codec:
    """Makes the codec of Python 3.14's own module."""

    def unpack(content: bytes, size: int) -> bytes:
        worker = module.ZstdDecompressor()
        try:
            found = worker.decompress(content, max_length=size + 1)
        except module.ZstdError as error:
            raise ValueError(f"it is damaged ({error})") from error
        if not worker.eof or worker.unused_data:
            raise ValueError("it is damaged (its compressed bytes do not end where they should)")
        return found

    return _Codec(
        lambda content, repeats: module.compress(content, level=_level(content, repeats)), unpack
    )


def _from_package(module: Any) -> _Codec:
    """Makes the codec of the package zstandard."""

    def unpack(content: bytes, size: int) -> bytes:
        # The window is what it takes beside the result; 128 MiB is what the command line allows.
        worker = module.ZstdDecompressor(max_window_size=2**27).decompressobj(
            read_across_frames=False
        )
        try:
            announced = module.frame_content_size(content)
            if announced != size:
                raise ValueError(f"it holds {announced} bytes in place of {size}")
            found = worker.decompress(content)
        except module.ZstdError as error:
            raise ValueError(f"it is damaged ({error})") from error
        if worker.unused_data or not worker.eof:
            raise ValueError("it is damaged (its compressed bytes do not end where they should)")
        return found

    def pack(content: bytes, repeats: bool) -> bytes:
        return module.ZstdCompressor(level=_level(content, repeats)).compress(content)

    return _Codec(pack, unpack)


def _level(content: bytes, repeats: bool) -> int:
    return _PATIENT if repeats and len(content) < _LARGE else _QUICK
