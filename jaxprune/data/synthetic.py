"""Images of any shape made from a seed, for benchmarks and tests."""

import numpy as np

from jaxprune.data.splits import Split

_CELLS = 4  # each class is a pattern of 4 x 4 grey or coloured cells


def make_synthetic(
    *,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    train_size: int = 1024,
    test_size: int = 256,
    seed: int = 0,
) -> tuple[Split, Split, int]:
    """Makes images that a network can learn: each class has a coarse pattern under noise.

    A pixel is pattern // 2 + noise // 2, both uniform in 0 .. 255; labels are uniform. The same
    arguments give the same arrays on every machine and in every version of NumPy.

    Args:
        image_shape: height, width and channels.
        num_classes: number of classes.
        train_size: number of training images.
        test_size: number of test images.
        seed: 0 .. 2**64 - 1.

    Returns:
        The training split, the test split and `num_classes`.

    Raises:
        ValueError: if a number is out of range; it lists all of them.

    Example:
        >>> train, test, _ = make_synthetic(image_shape=(8, 8, 1), train_size=6, test_size=3)
        >>> train.images.shape, train.images.dtype, test.labels.shape
        ((6, 8, 8, 1), dtype('uint8'), (3,))
    """
    if len(image_shape) != 3:
        raise ValueError(f"`image_shape` must be (height, width, channels); got {image_shape}")
    sizes = {
        **dict(zip(("height", "width", "channels"), image_shape, strict=True)),
        "num_classes": num_classes,
        "train_size": train_size,
        "test_size": test_size,
    }
    bad = [f"`{name}` must be at least 1; got {size}" for name, size in sizes.items() if size < 1]
    if not 0 <= seed < 2**64:
        bad.append(f"`seed` must be in 0 .. 2**64 - 1; got {seed}")
    if bad:
        raise ValueError("; ".join(bad))
    patterns = _bytes(seed, 0, (num_classes, _CELLS, _CELLS, image_shape[2]))
    train = _split(patterns, seed, 1, train_size, image_shape)
    test = _split(patterns, seed, 3, test_size, image_shape)
    return train, test, num_classes


def _split(
    patterns: np.ndarray, seed: int, stream: int, size: int, image_shape: tuple[int, int, int]
) -> Split:
    """Makes labels from stream `stream` and noisy images from the next stream."""
    height, width, channels = image_shape
    draws = _philox(seed, stream).random_raw(size)
    labels = (draws % np.uint64(len(patterns))).astype(np.int32)
    rows = np.arange(height) * _CELLS // height
    columns = np.arange(width) * _CELLS // width
    images = _bytes(seed, stream + 1, (size, height, width, channels)) // 2
    # Add one image at a time: all patterns at full size could be larger than the data set.
    for image, label in zip(images, labels, strict=True):
        image += patterns[label][rows[:, None], columns[None, :]] // 2
    return Split(images, labels)


def _philox(seed: int, stream: int) -> np.random.Philox:
    """Returns one of many independent streams of a seed."""
    return np.random.Philox(key=np.array([seed, stream], np.uint64))


def _bytes(seed: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draws uniform uint8 numbers; Philox's raw output is the same in every version of NumPy."""
    count = int(np.prod(shape))
    words = _philox(seed, stream).random_raw(-(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count].reshape(shape)
