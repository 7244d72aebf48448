"""The form of every data set in memory: two splits of images and labels."""

from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Images and their labels, decoded, in host memory.

    Example:
        >>> Split(np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int32)).labels.shape
        (2,)
    """

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]


class Dataset(NamedTuple):
    """A training and a test split, with the statistics for `normalize`.

    Example:
        >>> Dataset._fields
        ('name', 'train', 'test', 'num_classes', 'mean', 'std')
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]  # of the training images / 255, per channel
    std: tuple[float, ...]  # of the training images / 255, per channel


def make_dataset(name: str, train: Split, test: Split, num_classes: int) -> Dataset:
    """Makes a data set of two splits and computes mean and deviation of the training images.

    The sums are taken in integers, so the statistics do not depend on the order of the images.

    Args:
        name: name of the data set.
        train: images uint8 [N, H, W, C] and labels int32 [N].
        test: images and labels for testing, of the same form.
        num_classes: labels are 0 .. num_classes - 1.

    Returns:
        The `Dataset`.

    Raises:
        ValueError: if a shape, a dtype or a label does not fit; it lists all of them.

    Example:
        >>> images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
        >>> split = Split(images, np.array([0, 1], np.int32))
        >>> make_dataset("two", split, split, 2).mean
        (0.5,)
    """
    bad = _problems("train", train, num_classes) + _problems("test", test, num_classes)
    if not bad and train.images.shape[1:] != test.images.shape[1:]:
        bad = [f"train images are {train.images.shape[1:]}, test images {test.images.shape[1:]}"]
    if bad:
        raise ValueError(f"data set `{name}` does not fit together: {'; '.join(bad)}")
    mean, std = _mean_and_std(train.images)
    return Dataset(name, train, test, num_classes, mean, std)


def _problems(name: str, split: Split, num_classes: int) -> list[str]:
    """Lists what is wrong with one split."""
    images, labels = split
    if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
        return [f"{name} images must be uint8 [N, H, W, C]; got {images.dtype} {images.shape}"]
    if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
        return [f"{name} labels must be int32 [{len(images)}]; got {labels.dtype} {labels.shape}"]
    if labels.min() < 0 or labels.max() >= num_classes:
        seen = f"{labels.min()} .. {labels.max()}"
        return [f"{name} labels must be 0 .. {num_classes - 1}; got {seen}"]
    return []


def _mean_and_std(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes mean and standard deviation of images / 255, per channel."""
    count = images[..., 0].size
    axes = (0, 1, 2)
    mean = images.sum(axis=axes, dtype=np.uint64) / count
    # 255**2 fits in 16 bits, so the squares take twice the memory of the images, not eight times.
    mean_square = np.square(images, dtype=np.uint16).sum(axis=axes, dtype=np.uint64) / count
    std = np.sqrt(np.maximum(mean_square - mean**2, 0.0))
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
