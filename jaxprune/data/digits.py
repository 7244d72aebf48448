"""scikit-learn's handwritten digits: real images that need no download."""

import numpy as np

from jaxprune.data.splits import Split

# A different key gives a different split and makes every reported accuracy incomparable.
_SPLIT_KEY = 20240
_TEST_EVERY = 5


def load_digits() -> tuple[Split, Split, int]:
    """Loads the 1797 digits of 8 x 8 pixels, split into 1437 for training and 360 for testing.

    Pixels 0 .. 16 are scaled to 0 .. 255. The split is always the same: the images are ordered by
    class, in a fixed random order within a class, and every fifth of this list is a test image. So
    the test split has a fifth of each class, give or take one image. Images of one writer may be in
    both splits.

    Returns:
        The training split, the test split and the number of classes, 10.

    Example:
        >>> train, test, num_classes = load_digits()
        >>> train.images.shape, test.labels.shape, num_classes
        ((1437, 8, 8, 1), (360,), 10)

    References:
        E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
        Learning Repository, 1998 (its test set).
    """
    from sklearn.datasets import load_digits as load_from_wheel

    pixels, labels = load_from_wheel(return_X_y=True)
    grey = (pixels.astype(np.int64) * 255 + 8) // 16
    images = grey.astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    train, test = _split_indices(labels)
    return Split(images[train], labels[train]), Split(images[test], labels[test]), 10


def _split_indices(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the training and of the test images, ascending."""
    # The raw output of Philox is the same in every version of NumPy; shuffles and scikit-learn's
    # splitters do not promise that.
    order = np.random.Philox(key=_SPLIT_KEY).random_raw(len(labels))
    is_test = np.zeros(len(labels), bool)
    is_test[np.lexsort((order, labels))[::_TEST_EVERY]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)
