"""What every data set looks like once it is loaded."""

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
    """A training and a test split, and what `normalize` needs to know.

    Example:
        >>> Dataset._fields
        ('name', 'train', 'test', 'num_classes', 'mean', 'std')
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]  # per channel, of the training images / 255
    std: tuple[float, ...]  # per channel, of the training images / 255


def make_dataset(name: str, train: Split, test: Split, num_classes: int) -> Dataset:
    """Put two splits together with the mean and standard deviation of the training images.

    The sums are taken in integers, so the statistics do not depend on the order of the images.

    Args:
        name: what to call the data set.
        train: images uint8 [N, H, W, C] and labels int32 [N].
        test: the same, for testing.
        num_classes: labels are 0 .. num_classes - 1.

    Returns:
        The `Dataset`.

    Raises:
        ValueError: a shape, a type or a label does not fit; all of them are named.

    Example:
        >>> images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
        >>> split = Split(images, np.array([0, 1], np.int32))
        >>> make_dataset("two", split, split, 2).mean
        (0.5,)
    """
    bad = _problems("train", train, num_classes) + _problems("test", test, num_classes)
    if not bad and train.images.shape[1:] != test.images.shape[1:]:
        bad = [f"train is {train.images.shape[1:]} an image and test {test.images.shape[1:]}"]
    if bad:
        raise ValueError(f"data set `{name}` does not fit together: {'; '.join(bad)}")
    mean, std = _mean_and_std(train.images)
    return Dataset(name, train, test, num_classes, mean, std)


def _problems(name: str, split: Split, num_classes: int) -> list[str]:
    """What is wrong with one split, in words."""
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
    """Mean and standard deviation of images / 255, per channel."""
    count = images[..., 0].size
    axes = (0, 1, 2)
    mean = images.sum(axis=axes, dtype=np.uint64) / count
    # 255^2 fits in 16 bits: the squares take twice the memory of the images, not eight times.
    mean_square = np.square(images, dtype=np.uint16).sum(axis=axes, dtype=np.uint64) / count
    std = np.sqrt(np.maximum(mean_square - mean**2, 0.0))
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
