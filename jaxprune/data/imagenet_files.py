"""Images inside tars: an index of their places, and random access to them.

A tar stores files unchanged, so random access needs only the offset and size of each image: there
is no second copy of the data, and nothing to unpack.
"""

import dataclasses
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxprune.files import read_arrays, replacing

_BLOCK = 512  # bytes in a block of a tar
_INDEX = {
    "numbers": ("int16", ("n",)),
    "offsets": ("int64", ("n",)),
    "sizes": ("int32", ("n",)),
    "labels": ("int32", ("n",)),
}


class OpenFiles:
    """A set of files that remain open after their first read; pickling closes them.

    Example:
        >>> OpenFiles().read(Path(__file__), 3, 15)
        b'Images inside t'
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OpenFiles, ()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # `close` is a default argument because `os` may be empty when the interpreter ends.
        for descriptor in self._descriptors.values():
            close(descriptor)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Reads `size` bytes of a file from `offset` on, or fewer where the file ends."""
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            mine = os.open(path, os.O_RDONLY)
            # Two threads may get here at once: only one descriptor is kept.
            descriptor = self._descriptors.setdefault(path, mine)
            if descriptor != mine:
                os.close(mine)
            elif hasattr(os, "posix_fadvise"):
                # Reading ahead between headers would fetch all the images.
                os.posix_fadvise(mine, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(descriptor, size, offset)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Encoded images in tars and their labels, for random access.

    Processes and threads may share it. Pickled, it takes 18 bytes per image.

    Example:
        >>> none = np.zeros(0, np.int64)
        >>> len(Images((), none, none, none, none))
        0
    """

    files: tuple[Path, ...]
    numbers: np.ndarray  # int16 [N]: index into `files`
    offsets: np.ndarray  # int64 [N]: first byte of the image
    sizes: np.ndarray  # int32 [N]: size in bytes
    labels: np.ndarray  # int32 [N]
    open_files: OpenFiles = dataclasses.field(default_factory=OpenFiles, repr=False)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.labels)

    def select(self, indices: np.ndarray) -> "Images":
        """Returns the images with the given numbers, in that order."""
        names = ("numbers", "offsets", "sizes", "labels")
        return dataclasses.replace(self, **{name: getattr(self, name)[indices] for name in names})

    def read(self, index: int) -> bytes:
        """Reads an encoded image; ValueError if the file became shorter, OSError if it is gone."""
        path, offset, size = self._place(index)
        data = self.open_files.read(path, offset, size)
        if len(data) < size:
            raise ValueError(f"{path} has become shorter since it was indexed: get it again.")
        return data

    def name(self, index: int) -> str:
        """Returns the name of an image in its tar."""
        path, offset, _ = self._place(index)
        return _header(self.open_files.read(path, offset - _BLOCK, _BLOCK)).name

    def matches_headers(self, count: int = 64) -> bool:
        """Tells whether `count` evenly spread headers of the tars still agree with the index."""
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
    offset: int  # its first byte
    size: int


def index_tars(paths: Iterable[Path], labels: np.ndarray) -> Images:
    """Indexes plain tars of images, in the order of the images in the tars.

    Args:
        paths: the tars.
        labels: int32 [N], labels of all their images.

    Returns:
        The `Images`.

    Raises:
        ValueError: if a tar is truncated or corrupt, or the number of images is not N.

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


def read_index(path: Path, files: tuple[Path, ...], count: int, classes: int) -> Images:
    """Reads an index.

    Args:
        path: the .npz file.
        files: the tars that it indexes.
        count: the number of images in them.
        classes: the number of classes.

    Returns:
        The `Images`.

    Raises:
        ValueError: if the index is corrupt: a checksum differs, or a number is out of its range.

    Example:
        >>> read_index(Path("/dev/null"), (), 0, 0)
        Traceback (most recent call last):
        ValueError: /dev/null is corrupt (...): delete it and load again.
    """
    try:
        with path.open("rb") as file:
            arrays = read_arrays(file, _INDEX)
        numbers, offsets, sizes, labels = (arrays[name] for name in _INDEX)
        images = Images(files, numbers, offsets, sizes, labels)
        ranges = {
            "numbers": (0, len(files) - 1),
            "offsets": (_BLOCK, np.iinfo(np.int64).max),
            "sizes": (0, np.iinfo(np.int32).max),
            "labels": (0, classes - 1),
        }
        for name, (low, high) in ranges.items():
            own = getattr(images, name)
            if len(own) and not low <= own.min() <= own.max() <= high:
                raise ValueError(f"`{name}` must be in {low} .. {high}")
        if len(images) != count:
            raise ValueError(f"it must be of {count} images, but is of {len(images)}")
    except ValueError as error:
        raise ValueError(f"{path} is corrupt ({error}): delete it and load again.") from error
    return images


def walk(path: Path, start: int = 0, stop: int | None = None, inside: str = "") -> Iterator[Member]:
    """Finds the files in a tar, or in a tar inside a tar, by reading headers only.

    Args:
        path: the outermost tar.
        start: first byte of the tar to read.
        stop: the byte after its last one; None for the end of the file.
        inside: text before the path in errors.

    Yields:
        Each regular file, in order.

    Raises:
        ValueError: if a header is corrupt, or a file has a negative size or reaches beyond the end.

    Example:
        >>> next(walk(Path(__file__)))
        Traceback (most recent call last):
        ValueError: ...imagenet_files.py is corrupt at byte 0 (...), where the header of a file ...
    """
    open_files, at = OpenFiles(), start
    end = path.stat().st_size if stop is None else stop
    # A tar without its two empty blocks at the end is accepted: counting finds lost images.
    while at < end:
        block = open_files.read(path, at, _BLOCK)
        if len(block) == _BLOCK and not any(block):
            return
        try:
            header = _header(block)
        except tarfile.HeaderError as error:
            raise ValueError(
                f"{inside}{path} is corrupt at byte {at} ({error}), where the header of a file "
                "must be: delete this tar and get it again."
            ) from error
        offset = at + _BLOCK
        if header.size < 0:  # it would lead back, and round and round
            raise ValueError(
                f"{inside}{path} is corrupt at byte {at}: {header.name} has {header.size} bytes: "
                "delete this tar and get it again."
            )
        if offset + header.size > end:
            raise ValueError(
                f"{inside}{path} is truncated: {header.name} must reach to byte "
                f"{offset + header.size}, but there are {end}: delete this tar and get it again."
            )
        # Skip folders and the extra headers that some programs write.
        if header.isreg():
            yield Member(posixpath.basename(header.name), offset, header.size)
        at = offset + -(-header.size // _BLOCK) * _BLOCK


def make_images(
    files: Sequence[Path], members: Sequence[tuple[int, Member]], labels: Iterable[int]
) -> Images:
    """Makes `Images` from the members found in tars.

    Args:
        files: the tars.
        members: for each image, the index of its tar in `files` and its member there.
        labels: the label of each image.

    Returns:
        The `Images`.

    Raises:
        ValueError: if an image has 2 GiB or more, or there are more than 32,767 tars.

    Example:
        >>> make_images([Path("a.tar")], [(0, Member("b.JPEG", 512, 9))], [7]).sizes
        array([9], dtype=int32)
    """
    large = [member.name for _, member in members if member.size > np.iinfo(np.int32).max]
    if large:
        raise ValueError(f"images must have less than 2 GiB, but {large[0]} has more")
    if len(files) > np.iinfo(np.int16).max:
        raise ValueError(f"images must lie in at most 32,767 files, but there are {len(files)}")
    return Images(
        tuple(files),
        np.array([number for number, _ in members], np.int16),
        np.array([member.offset for _, member in members], np.int64),
        np.array([member.size for _, member in members], np.int32),
        np.asarray(labels, np.int32),
    )


def _header(block: bytes) -> tarfile.TarInfo:
    """Parses a block as a header; tarfile.HeaderError if it is none. Any name can be printed."""
    return tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
