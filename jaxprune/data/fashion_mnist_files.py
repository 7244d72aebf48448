"""The four official Fashion-MNIST files: finds, checks and parses them."""

import gzip
import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Where the Debian and Ubuntu package `dataset-fashion-mnist` puts the files.
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"


class Official(NamedTuple):
    """The checksum and time stamp that identify one of the files.

    Example:
        >>> FILES["train-labels-idx1-ubyte.gz"].mtime
        1504176606
    """

    sha256: str  # of the compressed file
    mtime: int  # in its gzip header, seconds since 1970


TRAIN = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
TEST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
FILES = {
    TRAIN[0]: Official(
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 1504176606
    ),
    TRAIN[1]: Official(
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 1504176606
    ),
    TEST[0]: Official(
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 1504176627
    ),
    TEST[1]: Official(
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 1504176627
    ),
}
HOW_TO_GET = (
    "To get Fashion-MNIST, either install the Debian/Ubuntu package `dataset-fashion-mnist` "
    "(apt-get install dataset-fashion-mnist), or give `source_dir`, a folder that holds "
    f"{', '.join(FILES)}, or run once where there is internet and keep the data folder."
)


def find_source(source_dir: str | os.PathLike[str] | None) -> Path | None:
    """Decides which folder the files are read from.

    Args:
        source_dir: a folder that must hold all four files; None looks in `DEBIAN_DIR`.

    Returns:
        The folder, or None if the files must be downloaded.

    Raises:
        FileNotFoundError: if `source_dir` lacks a file.

    Example:
        >>> find_source("/no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: `source_dir` /no/such/folder must hold all four files; ...
    """
    folder = DEBIAN_DIR if source_dir is None else Path(source_dir).expanduser()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if not missing:
        return folder
    if source_dir is None:
        return None
    raise FileNotFoundError(
        f"`source_dir` {folder} must hold all four files; missing: {', '.join(missing)}. "
        f"{HOW_TO_GET}"
    )


def read_official(paths: Mapping[str, os.PathLike[str]]) -> dict[str, bytes]:
    """Reads the files, restores their headers, checks and decompresses them.

    Args:
        paths: name of each file in `FILES` -> its path.

    Returns:
        Name -> decompressed idx data.

    Raises:
        ValueError: if the SHA-256 of a file is not the official one; it lists all such files.

    Example:
        >>> read_official({name: Path("/dev/null") for name in FILES})
        Traceback (most recent call last):
        ValueError: Fashion-MNIST files are corrupt or not the official ones: ...
    """
    files, bad = {}, []
    for name, official in FILES.items():
        raw = Path(paths[name]).read_bytes()
        data = restore_header(raw, name.removesuffix(".gz"), official.mtime)
        seen = hashlib.sha256(data).hexdigest()
        if seen != official.sha256:
            bad.append(f"{paths[name]}: expected SHA-256 {official.sha256}, got {seen}")
        else:
            files[name] = gzip.decompress(data)
    if bad:
        raise ValueError(
            "Fashion-MNIST files are corrupt or not the official ones: "
            + "; ".join(bad)
            + f". Delete them and get them again. {HOW_TO_GET}"
        )
    return files


def restore_header(data: bytes, name: str, mtime: int) -> bytes:
    """Restores the name and time that the header of a gzip file had before it was repackaged.

    Debian stores the files without them, which changes the checksum. The compressed data does not
    change, so the result equals the official file byte for byte.

    Args:
        data: a gzip file. If its header has optional fields already, it is returned unchanged.
        name: the name of the file before compression.
        mtime: seconds since 1970.

    Returns:
        The gzip file with the header 1f 8b 08 08 <mtime> 00 03 <name> 00.

    Example:
        >>> restored = restore_header(gzip.compress(b"wool", mtime=0), "coat", 1504176606)
        >>> restored[10:14], gzip.decompress(restored)
        (b'coat', b'wool')
    """
    if data[:4] != b"\x1f\x8b\x08\x00":
        return data
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", mtime) + b"\x00\x03"
    return header + name.encode() + b"\x00" + data[10:]


def parse_idx(data: bytes) -> np.ndarray:
    """Reads an idx file of bytes: two zeros, type 8, the number of axes, their sizes, the values.

    Args:
        data: the decompressed file.

    Returns:
        A read-only uint8 array of the shape given in the file.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 7, 8, 9]))
        array([[7, 8, 9]], dtype=uint8)
    """
    axes = data[3]
    shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
