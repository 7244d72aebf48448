"""Batches of ImageNet, decoded and augmented by Grain's workers, with a record of corrupt images.

A batch is one element of the pipeline. So a worker makes it from the number of its step alone, the
order does not depend on the number of workers, and OpenCV writes each image into its place in the
batch without a copy.
"""

import dataclasses
import functools
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from jaxprune.data import imagenet_augment as augment
from jaxprune.data.imagenet_files import Images

_SHARED_MEMORY = Path("/dev/shm")  # shared memory of processes under Linux


class Batch(NamedTuple):
    """A batch, or this process's part of one, in host memory.

    Example:
        >>> Batch._fields
        ('images', 'labels', 'weights')
    """

    images: np.ndarray  # uint8 [B, H, W, 3]
    labels: np.ndarray  # int32 [B]
    weights: np.ndarray  # float32 [B]: 1 for an example, 0 for padding


class Batches(Iterator[Batch]):
    """An iterator of batches from `train_batches` or `eval_batches`; `close` ends its workers.

    It is also a context manager that closes at its end. `corrupt` holds the images that could not
    be decoded so far: number in the split -> name.

    Example:
        >>> Batches(iter([]), Images((), *np.zeros((4, 0), int)), 0.0).corrupt
        {}
    """

    def __init__(self, source: Any, images: Images, max_corrupt: float) -> None:
        self.corrupt: dict[int, str] = {}
        self._source = source
        self._images = images
        self._limit = _limit(images, max_corrupt)

    def __next__(self) -> Batch:
        *arrays, corrupt = next(self._source)
        if new := [index for index in corrupt.tolist() if index not in self.corrupt]:
            self._report(new)
        # Grain's arrays are a subclass in shared memory that lives as long as a view of it.
        return Batch(*map(np.asarray, arrays))

    def __enter__(self) -> "Batches":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; no batches follow."""
        if hasattr(self._source, "close"):
            self._source.close()

    def _report(self, new: list[int]) -> None:
        """Records images that could not be decoded; raises if there are too many."""
        names = {index: self._images.name(index) for index in new}
        self.corrupt.update(names)
        shown = ", ".join(list(names.values())[:5])
        paths = {str(self._images.files[number]) for number in self._images.numbers[new]}
        what = f"{shown}{', ...' if len(names) > 5 else ''} in {', '.join(sorted(paths))}"
        if len(self.corrupt) > self._limit:
            self.close()
            raise ValueError(
                f"{what} cannot be decoded: {len(self.corrupt)} of {len(self._images)} images so "
                f"far, but `max_corrupt` allows {self._limit}. Get the tar again or raise it."
            )
        warnings.warn(
            f"{what} cannot be decoded and is left out ({len(self.corrupt)} so far; `max_corrupt` "
            f"allows {self._limit}).",
            stacklevel=3,
        )


def train_batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    image_size: int = 224,
    min_area: float = 0.08,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int | None = None,
    max_corrupt: float = 1e-4,
) -> Batches:
    """Iterates over batches of training images: shuffled, cropped at random, half of them mirrored.

    Step `s` takes the images of batch `s` of `index_batches(len(images), batch_size, seed=seed)`:
    each epoch is a fresh permutation cut into full batches, and the remaining images are skipped in
    that epoch. Process p of n gets the rows from p * batch_size / n on of every batch. See
    `random_box` for the crops. An image that cannot be decoded is replaced by the next image of the
    split that can.

    Args:
        images: `load(...).train`, or a part of it.
        batch_size: images per step, over all processes.
        seed: 0 .. 2**64 - 1; it decides order, crops and mirroring.
        start: number of the first step.
        stop: number of the step after the last one; None for no end.
        image_size: height and width of the results.
        min_area: smallest fraction of an image's area that a crop keeps.
        process_index: `jax.process_index()`.
        process_count: `jax.process_count()`, a divisor of `batch_size`.
        workers: number of processes that make batches; 0 uses threads of this process. Threads are
            cheaper to start and copy nothing; processes do not compete with this one for the
            interpreter lock.
        threads: number of threads in each such process; None for 1 with workers, 4 without. Each
            makes a whole batch, so memory grows with their number. OpenCV's own threads are off.
        max_corrupt: largest fraction of the images that may be undecodable.

    Returns:
        `Batches` of batch_size / process_count images; all weights are 1. `workers`, `threads` and
        `start` do not change the batch of a step.

    Raises:
        ValueError: if an argument is out of range (it lists all of them); while iterating, if too
            many images cannot be decoded or a tar has become shorter.
        OSError: while iterating, if a tar cannot be read.

    Example:
        >>> none = Images((), *np.zeros((4, 0), np.int64))
        >>> train_batches(none, 256, seed=0)
        Traceback (most recent call last):
        ValueError: `batch_size` must be in 1 .. the number of images (0); got 256
    """
    bad = []
    if not 1 <= batch_size <= len(images):
        bad.append(
            f"`batch_size` must be in 1 .. the number of images ({len(images)}); got {batch_size}"
        )
    if not 0 <= seed < 2**64:
        bad.append(f"`seed` must be in 0 .. 2**64 - 1; got {seed}")
    last = 2**62 if stop is None else stop
    if not 0 <= start <= last:
        bad.append(f"`start` must be at least 0 and at most `stop` ({stop}); got {start}")
    if not 0 < min_area <= 1:
        bad.append(f"`min_area` must be in (0, 1]; got {min_area}")
    rows = _rows(batch_size, process_index, process_count, bad)
    threads = (1 if workers else 4) if threads is None else threads
    _check(bad, image_size, workers, threads, max_corrupt, rows)
    make = _TrainBatch(
        images,
        image_size,
        rows,
        batch_size=batch_size,
        seed=seed,
        min_area=min_area,
        limit=_limit(images, max_corrupt),
    )
    return Batches(_iterate(make, start, last, workers, threads), images, max_corrupt)


def eval_batches(
    images: Images,
    batch_size: int,
    *,
    image_size: int = 224,
    resize: int = 256,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int | None = None,
    max_corrupt: float = 1e-4,
) -> Batches:
    """Iterates over all images once, in order: short side resized, centre cut out.

    All processes get the same number of batches. Rows after the last image, and rows of images that
    cannot be decoded, are black with label 0 and weight 0. So every image counts exactly once:
    accuracy is the sum of weights * hits over the sum of weights.

    Args:
        images: `load(...).test`, or held-out images.
        batch_size: images per step, over all processes.
        image_size: height and width of the results.
        resize: length of the short side before the centre is cut out.
        process_index: see `train_batches`, also for the arguments below.
        process_count: a divisor of `batch_size`.
        workers: number of processes that make batches.
        threads: number of threads in each process.
        max_corrupt: largest fraction of the images that may be undecodable.

    Returns:
        ceil(images / batch_size) `Batches` of batch_size / process_count images.

    Raises:
        ValueError: as for `train_batches`.
        OSError: while iterating, if the tar cannot be read.

    Example:
        >>> list(eval_batches(Images((), *np.zeros((4, 0), np.int64)), 8))
        []
    """
    bad = []
    if batch_size < 1:
        bad.append(f"`batch_size` must be at least 1; got {batch_size}")
    if resize < image_size:
        bad.append(f"`resize` must be at least `image_size` ({image_size}); got {resize}")
    rows = _rows(batch_size, process_index, process_count, bad)
    threads = (1 if workers else 4) if threads is None else threads
    _check(bad, image_size, workers, threads, max_corrupt, rows)
    make = _EvalBatch(images, image_size, rows, batch_size=batch_size, resize=resize)
    count = -(-len(images) // batch_size)
    return Batches(_iterate(make, 0, count, workers, threads), images, max_corrupt)


@dataclasses.dataclass(frozen=True, eq=False)
class _TrainBatch:
    """A function from a step to this process's part of its batch."""

    images: Images
    image_size: int
    rows: slice
    batch_size: int
    seed: int
    min_area: float
    limit: int  # more undecodable images than this end the batch, and then the run

    def __call__(self, step: int) -> tuple[np.ndarray, ...]:
        augment.one_thread()
        total = len(self.images)
        epoch, within = divmod(int(step), total // self.batch_size)
        first = within * self.batch_size
        order = _permutation(total, self.seed, epoch)[first : first + self.batch_size]
        draws = augment.random_draws(self.seed, int(step), self.batch_size)[self.rows].tolist()
        batch, corrupt = _empty(self.rows, self.image_size), set()
        for row, index in enumerate(order[self.rows].tolist()):
            while not augment.train_image(
                self.images.read(index), draws[row], batch.images[row], min_area=self.min_area
            ):
                corrupt.add(index)
                if len(corrupt) > self.limit:
                    return *batch, np.array(sorted(corrupt))
                # Images of a class are adjacent, so the replacement mostly has the same label.
                index = (index + 1) % total
            batch.labels[row] = self.images.labels[index]
            batch.weights[row] = 1
        return *batch, np.array(sorted(corrupt), np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class _EvalBatch:
    """A function from a batch number to this process's part of that batch."""

    images: Images
    image_size: int
    rows: slice
    batch_size: int
    resize: int

    def __call__(self, number: int) -> tuple[np.ndarray, ...]:
        augment.one_thread()
        batch, corrupt = _empty(self.rows, self.image_size), []
        first = int(number) * self.batch_size + self.rows.start
        for row, index in enumerate(range(first, min(first + len(batch.labels), len(self.images)))):
            data = self.images.read(index)
            if augment.eval_image(data, batch.images[row], resize=self.resize):
                batch.labels[row] = self.images.labels[index]
                batch.weights[row] = 1
            else:
                corrupt.append(index)
        return *batch, np.array(corrupt, np.int64)


def _empty(rows: slice, image_size: int) -> Batch:
    """Makes a black batch of weight 0."""
    size = rows.stop - rows.start
    images = np.zeros((size, image_size, image_size, 3), np.uint8)
    return Batch(images, np.zeros(size, np.int32), np.zeros(size, np.float32))


# Two permutations, as batches of this and of the next epoch are made at the same time.
@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of an epoch, the same as that of `index_batches`."""
    draws = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(size)
    return np.argsort(draws, kind="stable")


def _iterate(
    make: Callable[[int], Any], start: int, stop: int, workers: int, threads: int
) -> Iterator[Any]:
    """Calls `make` for each number of a range in order, ahead of time."""
    if start == stop:
        return iter(())
    import grain

    # Grain's defaults, 16 threads and 500 elements ahead, are for elements of kilobytes.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    dataset = grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options)
    if workers:
        from absl import flags

        # Grain's processes read an absl flag, which only programs run by absl have parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)


def _rows(batch_size: int, index: int, count: int, bad: list[str]) -> slice:
    """Returns the rows of a batch that belong to a process; adds problems to `bad`."""
    if count < 1 or batch_size % count:
        bad.append(f"`process_count` must divide `batch_size` ({batch_size}); got {count}")
        return slice(0, 0)
    if not 0 <= index < count:
        bad.append(f"`process_index` must be in 0 .. {count - 1}; got {index}")
    own = batch_size // count
    return slice(index * own, (index + 1) * own)


def _check(
    bad: list[str], image_size: int, workers: int, threads: int, max_corrupt: float, rows: slice
) -> None:
    """Raises one error that names all arguments out of range."""
    if image_size < 1:
        bad.append(f"`image_size` must be at least 1; got {image_size}")
    if workers < 0:
        bad.append(f"`workers` must be at least 0; got {workers}")
    if threads < 1:
        bad.append(f"`threads` must be at least 1; got {threads}")
    if not 0 <= max_corrupt <= 1:
        bad.append(f"`max_corrupt` must be in [0, 1]; got {max_corrupt}")
    # A worker that writes to full shared memory dies without any message.
    needed = (2 * max(0, workers) + 1) * (rows.stop - rows.start) * 3 * max(0, image_size) ** 2
    if workers > 0 and _SHARED_MEMORY.exists():
        free = shutil.disk_usage(_SHARED_MEMORY).free
        if needed > free:
            bad.append(
                f"`workers` {workers} need up to {needed / 1e6:.0f} MB for batches in "
                f"{_SHARED_MEMORY}, which has {free / 1e6:.0f} MB left: use fewer, or 0 and more "
                "`threads`, or give the container more (docker run --shm-size)"
            )
    if bad:
        raise ValueError("; ".join(bad))


def _limit(images: Images, max_corrupt: float) -> int:
    """Returns how many images may be undecodable: never all of them."""
    return min(int(max_corrupt * len(images)), len(images) - 1)
