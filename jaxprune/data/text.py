"""Text as bytes: windows of the files of a folder, some of them held out.

    corpus = text.open_folder("~/texts")
    train, test = text.split(corpus, length=256)
    for tokens, following in text.train_batches(corpus, train, 32, seed=0):  # uint8 [32, 256]
        ...

The files of a folder follow one another in the order of their paths, like one long file. It is cut
into blocks; every twentieth block is held out, and training never sees a byte of it. A window is an
example: `length` bytes, and for each of them the byte that follows. The windows of a block follow
one another, and the last byte of the block only follows.
"""

import bisect
import itertools
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxprune.data.pipeline import batches_of_indices

if TYPE_CHECKING:
    import grain

__all__ = [
    "Corpus",
    "Windows",
    "examples",
    "fingerprint",
    "open_folder",
    "read",
    "split",
    "train_batches",
]

BLOCK = 2**16  # bytes that are held out together, if there is enough text
EVERY = 20  # one block in so many is held out
HEAD = 2**13  # bytes of a file that tell whether it is text


class Corpus(NamedTuple):
    """The text files of a folder, as one sequence of bytes.

    Example:
        >>> Corpus(("a.txt", "b.txt"), (0, 5, 12)).size
        12
    """

    files: tuple[str, ...]  # paths in order
    starts: tuple[int, ...]  # where each file begins; one more entry, the number of all bytes

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.starts[-1]


class Windows(NamedTuple):
    """The windows of one part of a corpus; window `i` begins at byte `start(i)`.

    Example:
        >>> train = Windows(size=38, length=10, per_block=2, held_out=False)
        >>> train.block, [train.start(i) for i in (0, 1, 2, 37)]
        (21, [0, 10, 21, 388])
        >>> [train._replace(held_out=True).start(i) for i in (0, 1, 2)]  # blocks 19 and 39
        [399, 409, 819]
    """

    size: int  # number of windows
    length: int  # bytes of a window
    per_block: int  # windows of a block
    held_out: bool  # whether the blocks are those that training never sees

    @property
    def block(self) -> int:
        """Bytes of a block."""
        return self.per_block * self.length + 1

    def start(self, index: int) -> int:
        """Returns the first byte of a window."""
        block, within = divmod(int(index), self.per_block)
        block = EVERY * block + EVERY - 1 if self.held_out else block + block // (EVERY - 1)
        return block * self.block + within * self.length


def open_folder(folder: str | os.PathLike[str]) -> Corpus:
    """Lists the text files below a folder; files with a zero byte in their first 8 KiB are no text.

    Args:
        folder: hidden files and folders are left out; links to files are followed.

    Returns:
        The corpus; nothing but the beginning of each file has been read.

    Raises:
        ValueError: if this is no folder, or there is no text in it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "a.txt").write_text("hello")
        ...     open_folder(folder).size
        5
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(f"`folder` must be a folder with text files; {root} is none")
    found, seen = [], 0
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or not path.is_file():
            continue
        seen += 1
        with path.open("rb") as file:
            head = file.read(HEAD)
        if head and b"\0" not in head:
            found.append(path)
    if not found:
        raise ValueError(f"`folder` {root} has no text: {seen} files, all empty or binary")
    starts = itertools.accumulate((path.stat().st_size for path in found), initial=0)
    return Corpus(tuple(map(str, found)), tuple(starts))


def fingerprint(corpus: Corpus) -> int:
    """Returns a CRC-32 of the sizes of all files, and of their first and last 8 KiB.

    Example:
        >>> fingerprint(Corpus((), (0,)))
        0
    """
    crc = 0
    for path, start, stop in zip(corpus.files, corpus.starts, corpus.starts[1:], strict=False):
        with open(path, "rb") as file:
            crc = zlib.crc32(file.read(HEAD), zlib.crc32(str(stop - start).encode(), crc))
            file.seek(max(0, stop - start - HEAD))
            crc = zlib.crc32(file.read(HEAD), crc)
    return crc


def split(corpus: Corpus, length: int) -> tuple[Windows, Windows]:
    """Divides a corpus into windows for training and windows that are held out, about one in 20.

    Args:
        corpus: from `open_folder`.
        length: bytes of a window.

    Returns:
        `(train, test)`. What does not fill a window or a block at the end is left out.

    Raises:
        ValueError: if `length` is less than 1, or there is too little text to hold any out.

    Example:
        >>> train, test = split(Corpus(("a",), (0, 10_040)), length=50)
        >>> train.size, test.size
        (190, 10)
    """
    if length < 1:
        raise ValueError(f"`length` must be at least 1; got {length}")
    per_block = max(1, min(BLOCK, corpus.size // (2 * EVERY)) // length)
    blocks = corpus.size // (per_block * length + 1)
    if blocks < EVERY:
        raise ValueError(
            f"`length` {length} needs {EVERY * (length + 1)} bytes of text, so that one window in "
            f"{EVERY} can be held out; there are {corpus.size}"
        )
    held = blocks // EVERY
    parts = ((blocks - held, False), (held, True))
    train, test = (Windows(n * per_block, length, per_block, own) for n, own in parts)
    return train, test


def read(corpus: Corpus, start: int, count: int) -> np.ndarray:
    """Reads bytes of a corpus.

    Args:
        corpus: from `open_folder`.
        start: number of the first byte.
        count: how many bytes.

    Returns:
        uint8 [count].

    Raises:
        ValueError: if a file has become shorter since `open_folder`, or the corpus ends earlier.

    Example:
        >>> read(Corpus((), (0,)), 0, 0).shape
        (0,)
    """
    parts, at = [], bisect.bisect_right(corpus.starts, start) - 1
    missing = count
    while missing and at < len(corpus.files):
        wanted = min(missing, corpus.starts[at + 1] - start)
        with open(corpus.files[at], "rb") as file:
            file.seek(start - corpus.starts[at])
            parts.append(file.read(wanted))
        if len(parts[-1]) != wanted:
            raise ValueError(f"{corpus.files[at]} has become shorter: put it back or start again")
        start, missing, at = start + wanted, missing - wanted, at + 1
    if missing:
        raise ValueError(f"byte {start} is the end of the text; {missing} more were asked for")
    return np.frombuffer(b"".join(parts), np.uint8)


def examples(
    corpus: Corpus, windows: Windows, indices: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reads windows: uint8 [N, length], and the bytes that follow, uint8 [N, length].

    Example:
        >>> windows = Windows(size=1, length=3, per_block=1, held_out=False)
        >>> tokens, following = examples(Corpus((), (0,)), windows, [])
        >>> tokens.shape
        (0, 3)
    """
    rows = [read(corpus, windows.start(index), windows.length + 1) for index in indices]
    table = np.stack(rows) if rows else np.zeros((0, windows.length + 1), np.uint8)
    return table[:, :-1], table[:, 1:]


def train_batches(
    corpus: Corpus,
    windows: Windows,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> "grain.DatasetIterator[Any]":
    """Iterates forever over shuffled batches of windows, in the order of `index_batches`.

    Args:
        corpus: from `open_folder`.
        windows: those for training, from `split`.
        batch_size: windows of a batch, over all processes.
        seed: of the order.
        start: number of the first batch.
        process_index: number of this process.
        process_count: number of processes; each gets its rows of every batch.

    Returns:
        A Grain iterator over `(tokens, following)`, uint8 [batch_size / process_count, length]
        each, read ahead by threads.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "a.txt").write_text("hello world " * 20)
        ...     corpus = open_folder(folder)
        ...     train, _ = split(corpus, length=8)
        ...     tokens, following = next(train_batches(corpus, train, 4, seed=0))
        >>> tokens.shape, bool((tokens[:, 1:] == following[:, :-1]).all())
        ((4, 8), True)
    """
    import grain

    if batch_size % process_count:
        raise ValueError(
            f"`batch_size` must be a multiple of `process_count` ({process_count}); "
            f"got {batch_size}"
        )
    share = batch_size // process_count
    own = slice(process_index * share, (process_index + 1) * share)

    def make(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return examples(corpus, windows, indices[own])

    dataset = batches_of_indices(windows.size, batch_size, seed=seed).map(make)
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    found = iter(dataset.to_iter_dataset(ahead))
    found.set_state({"next_index": start})
    return found
