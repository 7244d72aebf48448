"""Smaller copies of all images, for machines whose processors decode too slowly.

A cache is a folder of tars of JPEGs in the order of the original images, so the same seed gives the
same batches at a lower resolution.
"""

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxprune import files
from jaxprune.data import imagenet_augment as augment
from jaxprune.data.imagenet_files import Images, index_tars, read_index, write_index

_MOST_FILES = 32_767  # what `Images.numbers` can hold
_AT_ONCE = 256  # number of images in memory at the same time


def cache_images(
    images: Images,
    folder: str | os.PathLike[str],
    *,
    short_side: int = 288,
    quality: int = 95,
    threads: int | None = None,
    per_file: int = 10_000,
) -> Images:
    """Writes images again with a shorter short side, or finds those that an earlier call wrote.

    Images whose short side is no longer than `short_side` are copied unchanged, and so are images
    that cannot be decoded, so numbers and labels do not change. Each file is renamed when complete
    and the index is written last: after a kill, the next call continues with the unfinished file.

    Args:
        images: images from `load`.
        folder: folder for the files, one for each split and choice of options.
        short_side: length of the short side in pixels; the long side is rounded down.
        quality: quality of the JPEGs, 1 .. 100.
        threads: number of images processed at once; None for one per processor.
        per_file: number of images in a file.

    Returns:
        The smaller images, for `train_batches` and `eval_batches`.

    Raises:
        ValueError: if an argument is out of range, or the folder holds a damaged cache or one of
            different images or options.
        OSError: if the folder cannot be written, or an image cannot be read.

    Example:
        >>> import numpy as np
        >>> cache_images(Images((), *np.zeros((4, 0), np.int64)), "/no", quality=0)
        Traceback (most recent call last):
        ValueError: `quality` must be in 1 .. 100; got 0
    """
    options = {"short_side": short_side, "per_file": per_file}
    bad = [f"`{name}` must be at least 1; got {n}" for name, n in options.items() if n < 1]
    if not 1 <= quality <= 100:
        bad.append(f"`quality` must be in 1 .. 100; got {quality}")
    if not bad and len(images) > per_file * _MOST_FILES:
        least = -(-len(images) // _MOST_FILES)
        bad.append(f"`per_file` must be at least {least} for {len(images)} images; got {per_file}")
    if bad:
        raise ValueError("; ".join(bad))
    root = Path(folder).expanduser()
    _claim(root, {"images": _fingerprint(images), "quality": quality} | options)
    starts = range(0, len(images), per_file)
    paths = tuple(root / f"{start:08d}.tar" for start in starts)
    index = root / "index.npz"
    if not index.exists():
        augment.one_thread()
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            for path, start in zip(paths, starts, strict=True):
                if not path.exists():
                    numbers = range(start, min(start + per_file, len(images)))
                    _write_tar(path, images, numbers, short_side, quality, pool)
        write_index(index, index_tars(paths, images.labels))
    cached = read_index(index, paths, len(images), int(images.labels.max(initial=-1)) + 1)
    if not np.array_equal(cached.labels, images.labels) or not cached.matches_headers():
        raise ValueError(f"the cache in {root} is damaged: delete the folder and make it again.")
    return cached


def _fingerprint(images: Images) -> str:
    """Returns a hash that identifies a set of images, wherever its files lie."""
    digest = hashlib.sha256()
    for array in (images.numbers, images.offsets, images.sizes, images.labels):
        digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()


def _claim(root: Path, settings: Mapping[str, object]) -> None:
    """Makes the folder, or checks that it is of the same settings."""
    record = root / "settings.json"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            with files.replacing(record) as file:
                file.write(json.dumps(files.seal(settings)))
    except OSError as error:
        raise OSError(f"`folder` {root} cannot be written ({error}): give another one") from error
    try:
        found = files.unseal(files.read_json(record), str(record))
    except ValueError as error:
        raise ValueError(
            f"the cache in {root} is damaged ({error}): delete the folder and make it again."
        ) from error
    if found != dict(settings):
        names = [name for name in settings if found.get(name) != settings[name]]
        raise ValueError(
            f"`folder` {root} holds a cache that differs in {', '.join(names)}: give another "
            "folder or delete this one"
        )


def _write_tar(
    path: Path,
    images: Images,
    numbers: range,
    short_side: int,
    quality: int,
    pool: ThreadPoolExecutor,
) -> None:
    """Writes some of the images to a tar, which appears when it is complete."""

    def work(number: int) -> tuple[str, bytes]:
        return images.name(number), _shrunk(images.read(number), short_side, quality)

    with (
        files.replacing(path, "wb") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for some in _batched(numbers, _AT_ONCE):
            for name, data in pool.map(work, some):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def _shrunk(data: bytes, short_side: int, quality: int) -> bytes:
    """Returns the image with a shorter short side, or unchanged if that is short already."""
    import cv2

    full = augment.full_size(data)
    if full is None or min(full) <= short_side:
        return data
    # This runs once per image, so decoding at full size and averaging are worth their time.
    pixels = augment.decode(data)
    if pixels is None:
        return data
    height, width = (short_side * side // min(full) for side in full)
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return encoded.tobytes()


def _batched(numbers: range, size: int) -> Iterator[range]:
    """Cuts a range into ranges of `size` numbers; the last one may be shorter."""
    return itertools.takewhile(len, (numbers[i : i + size] for i in itertools.count(0, size)))
