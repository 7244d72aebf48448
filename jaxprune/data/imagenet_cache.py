"""Smaller copies of all images, for machines whose processors decode too slowly.

A cache is a folder of tars of JPEGs, in the order of the images that it was made from, so the same
seed gives the same batches from it, at a lower resolution.
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

from jaxprune import files
from jaxprune.data import imagenet_augment as augment
from jaxprune.data.imagenet_files import Images, index_tars, read_index, write_index

_AT_ONCE = 256  # images that are in memory at the same time


def cache_images(
    images: Images,
    folder: str | os.PathLike[str],
    *,
    short_side: int = 288,
    quality: int = 95,
    threads: int | None = None,
    per_file: int = 10_000,
) -> Images:
    """Write images again with a shorter short side, or find those that an earlier call wrote.

    Images whose short side is not longer are copied as they are, and so are those that cannot be
    decoded, so that numbers and labels stay. Each file is renamed when it is complete and the index
    comes last: a call that is killed goes on at the file where it was.

    Args:
        images: of `load`.
        folder: where the files go: one folder for each split and choice of options.
        short_side: pixels; the long side is rounded down.
        quality: of the JPEGs, 1 .. 100.
        threads: images that are worked on at once; None: one for each processor.
        per_file: images in a file.

    Returns:
        The smaller images, for `train_batches` and `eval_batches`.

    Raises:
        ValueError: an argument is out of range, or the folder holds a cache of other images or
            options, or a damaged one.
        OSError: the folder cannot be written, or an image cannot be read.

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
    cached = read_index(index, paths)
    if len(cached) != len(images) or not cached.matches_headers():
        raise ValueError(f"the cache in {root} is damaged: delete the folder and make it again")
    return cached


def _fingerprint(images: Images) -> str:
    """Tells sets of images apart, wherever their files lie."""
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
                file.write(json.dumps(dict(settings)))
    except OSError as error:
        raise OSError(f"`folder` {root} cannot be written ({error}): give another one") from error
    found = json.loads(record.read_text())
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
    """The image with a shorter short side, or as it is."""
    import cv2

    full = augment.full_size(data)
    if full is None or min(full) <= short_side:
        return data
    # Made once, so decoding all of it and averaging are worth their time.
    pixels = augment.decode(data)
    if pixels is None:
        return data
    height, width = (short_side * side // min(full) for side in full)
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return encoded.tobytes()


def _batched(numbers: range, size: int) -> Iterator[range]:
    """Ranges of `size` numbers, the last one shorter."""
    return itertools.takewhile(len, (numbers[i : i + size] for i in itertools.count(0, size)))
