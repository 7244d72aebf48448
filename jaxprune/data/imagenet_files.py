"""Images inside tars: where each of them lies, and how it is read.

A tar stores files as they are, so the offset and the size of each image are all that random access
needs: there is no second copy of the data, and nothing to unpack.
"""

import dataclasses
import os
import posixpath
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxprune.files import replacing

_BLOCK = 512  # a tar is made of blocks of so many bytes


class OpenFiles:
    """Files that stay open from the first read on; pickles as none open.

    Example:
        >>> OpenFiles().read(Path(__file__), 3, 15)
        b'Images inside t'
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OpenFiles, ()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # `os` may be empty already when the interpreter ends.
        for descriptor in self._descriptors.values():
            close(descriptor)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Bytes of a file from `offset` on; fewer than `size` where it ends."""
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            mine = os.open(path, os.O_RDONLY)
            # Two threads may be here: one descriptor stays.
            descriptor = self._descriptors.setdefault(path, mine)
            if descriptor != mine:
                os.close(mine)
            elif hasattr(os, "posix_fadvise"):
                # Reading ahead would fetch what lies between headers: all the images.
                os.posix_fadvise(mine, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(descriptor, size, offset)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Encoded images in tars and their labels, to be read one by one in any order.

    Processes and threads may share it. Pickled it takes 18 bytes an image.

    Example:
        >>> none = np.zeros(0, np.int64)
        >>> len(Images((), none, none, none, none))
        0
    """

    files: tuple[Path, ...]
    numbers: np.ndarray  # int16 [N]: in which of the files
    offsets: np.ndarray  # int64 [N]: where the image begins, in bytes
    sizes: np.ndarray  # int32 [N]: bytes
    labels: np.ndarray  # int32 [N]
    open_files: OpenFiles = dataclasses.field(default_factory=OpenFiles, repr=False)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def select(self, indices: np.ndarray) -> "Images":
        """The images of some numbers, in that order."""
        names = ("numbers", "offsets", "sizes", "labels")
        return dataclasses.replace(self, **{name: getattr(self, name)[indices] for name in names})

    def read(self, index: int) -> bytes:
        """The encoded image; ValueError if the file has become shorter, OSError if it is gone."""
        path, offset, size = self._place(index)
        data = self.open_files.read(path, offset, size)
        if len(data) < size:
            raise ValueError(f"{path} has become shorter while it was read: get it again")
        return data

    def name(self, index: int) -> str:
        """The image's name in its tar."""
        path, offset, _ = self._place(index)
        return _header(self.open_files.read(path, offset - _BLOCK, _BLOCK)).name

    def matches_headers(self, count: int = 64) -> bool:
        """Whether `count` of the tars' headers, evenly spread, still say what is on record."""
        for index in np.linspace(0, len(self) - 1, min(count, len(self))).astype(int):
            path, offset, size = self._place(index)
            try:
                header = _header(self.open_files.read(path, offset - _BLOCK, _BLOCK))
            except tarfile.HeaderError:
                return False
            if header.size != size or not header.isreg():
                return False
        return True

    def _place(self, index: int) -> tuple[Path, int, int]:
        file = self.files[self.numbers[index]]
        return file, int(self.offsets[index]), int(self.sizes[index])


class Member(NamedTuple):
    """A file in a tar.

    Example:
        >>> Member("n01440764_10026.JPEG", 1024, 13697).size
        13697
    """

    name: str  # without folders
    offset: int  # where its bytes begin
    size: int


def index_tars(paths: Iterable[Path], labels: np.ndarray) -> Images:
    """Index plain tars of images, in the order in which they lie there.

    Args:
        paths: the tars.
        labels: int32 [N], of all their images.

    Returns:
        The `Images`.

    Raises:
        ValueError: a tar is truncated or corrupt, or the number of images is not N.

    Example:
        >>> index_tars([], np.zeros(1, np.int32))
        Traceback (most recent call last):
        ValueError:  must hold 1 images together; got 0: delete them and make them again
    """
    files = tuple(paths)
    found = [(number, member) for number, path in enumerate(files) for member in walk(path)]
    if len(found) != len(labels):
        raise ValueError(
            f"{', '.join(map(str, files))} must hold {len(labels)} images together; "
            f"got {len(found)}: delete them and make them again"
        )
    return make_images(files, found, labels)


def write_index(path: Path, images: Images) -> None:
    """Writes an index, whole or not at all.

    Args:
        path: the .npz file.
        images: what to write, without the paths.

    Example:
        >>> write_index(Path("/dev/null/x"), Images((), *np.zeros((4, 0), np.int64)))
        Traceback (most recent call last):
        NotADirectoryError: ...
    """
    with replacing(path, "wb") as file:
        np.savez(
            file,
            numbers=images.numbers,
            offsets=images.offsets,
            sizes=images.sizes,
            labels=images.labels,
        )


def read_index(path: Path, files: tuple[Path, ...]) -> Images:
    """Read an index.

    Args:
        path: the .npz file.
        files: the tars that it speaks of.

    Returns:
        The `Images`.

    Raises:
        ValueError: the index is corrupt.

    Example:
        >>> read_index(Path("/dev/null"), ())
        Traceback (most recent call last):
        ValueError: /dev/null is corrupt (...): delete it and load again
    """
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return Images(files, *(arrays[n] for n in ("numbers", "offsets", "sizes", "labels")))
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is corrupt ({error}): delete it and load again") from error


def walk(path: Path, start: int = 0, stop: int | None = None, inside: str = "") -> Iterator[Member]:
    """Find the files in a tar, or in a tar that lies in a tar, by reading headers only.

    Args:
        path: the outermost tar.
        start: first byte of the one to look into.
        stop: the byte after its last one; None: the end of the file.
        inside: what errors say before the path.

    Yields:
        Each regular file, in order.

    Raises:
        ValueError: a header is corrupt, or a file reaches beyond the end.

    Example:
        >>> next(walk(Path(__file__)))
        Traceback (most recent call last):
        ValueError: ...imagenet_files.py is corrupt at byte 0 (...), where the header of a file ...
    """
    open_files, at = OpenFiles(), start
    end = path.stat().st_size if stop is None else stop
    # A tar that ends without its two empty blocks is taken: who counts notices what is lost.
    while at < end:
        block = open_files.read(path, at, _BLOCK)
        if len(block) == _BLOCK and not any(block):
            return
        try:
            header = _header(block)
        except tarfile.HeaderError as error:
            raise ValueError(
                f"{inside}{path} is corrupt at byte {at} ({error}), where the header of a file "
                "must be: delete this tar and get it again"
            ) from error
        offset = at + _BLOCK
        if offset + header.size > end:
            raise ValueError(
                f"{inside}{path} is truncated: {header.name} must reach to byte "
                f"{offset + header.size}, and there are {end}: delete this tar and get it again"
            )
        # Folders and the extra headers that some programs write are no images.
        if header.isreg():
            yield Member(posixpath.basename(header.name), offset, header.size)
        at = offset + -(-header.size // _BLOCK) * _BLOCK


def make_images(
    files: Sequence[Path], members: Sequence[tuple[int, Member]], labels: Iterable[int]
) -> Images:
    """Put together what was found.

    Args:
        files: the tars.
        members: of each image, in which of the files it lies, and where.
        labels: of each image.

    Returns:
        The `Images`.

    Example:
        >>> make_images([Path("a.tar")], [(0, Member("b.JPEG", 512, 9))], [7]).sizes
        array([9], dtype=int32)
    """
    return Images(
        tuple(files),
        np.array([number for number, _ in members], np.int16),
        np.array([member.offset for _, member in members], np.int64),
        np.array([member.size for _, member in members], np.int32),
        np.asarray(labels, np.int32),
    )


def _header(block: bytes) -> tarfile.TarInfo:
    """What a block says; tarfile.HeaderError if it is none."""
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
