"""Data sets as plain arrays, and the pipeline that batches and augments them.

Nothing here needs TensorFlow. tensorflow-datasets, Grain and scikit-learn are imported only when a
function that uses them is called, so each data set needs only the packages that it uses. ImageNet
does not fit into memory: `imagenet` reads it batch by batch, and `text` the files of a folder.
"""

import inspect
import os
from typing import Any

from jaxprune.data import imagenet, text
from jaxprune.data.digits import load_digits
from jaxprune.data.pipeline import augment, index_batches, normalize
from jaxprune.data.splits import Dataset, Split, make_dataset
from jaxprune.data.synthetic import make_synthetic

__all__ = [
    "Dataset",
    "Split",
    "augment",
    "imagenet",
    "index_batches",
    "load",
    "load_digits",
    "make_dataset",
    "make_synthetic",
    "normalize",
    "text",
]

_NAMES = ("digits", "fashion_mnist", "synthetic")


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source_dir: str | os.PathLike[str] | None = None,
    **synthetic: Any,
) -> Dataset:
    """Loads a data set by name, decoded, with mean and deviation of its training images.

    Args:
        name: `"digits"` (comes with scikit-learn), `"fashion_mnist"` (downloaded or taken from a
            folder, prepared once) or `"synthetic"` (made from a seed, any shape).
        data_dir: folder for prepared data; default `$JAXPRUNE_DATA_DIR`, else
            `~/.cache/jaxprune`. Only `fashion_mnist` writes there.
        source_dir: folder with the four Fashion-MNIST files. Read only if nothing is prepared yet.
        **synthetic: keywords of `make_synthetic`, for `"synthetic"` only.

    Returns:
        A `Dataset` whose images are uint8 [N, H, W, C] and whose labels are int32 [N].

    Raises:
        ValueError: if the name is unknown, a keyword is out of range, or a file is corrupt.
        TypeError: if this data set does not take a keyword.
        FileNotFoundError: if the files are absent and could not be downloaded.

    Example:
        >>> digits = load("digits")
        >>> digits.train.images.shape, digits.test.images.shape
        ((1437, 8, 8, 1), (360, 8, 8, 1))
        >>> load("synthetic", image_shape=(4, 6, 3), train_size=5, test_size=2).train.images.shape
        (5, 4, 6, 3)
    """
    if name not in _NAMES:
        raise ValueError(f"`name` must be one of {', '.join(_NAMES)}; got {name!r}")
    allowed = list(inspect.signature(make_synthetic).parameters) if name == "synthetic" else []
    unknown = sorted(set(synthetic) - set(allowed))
    if unknown:
        raise TypeError(
            f"`{name}` takes no keyword {', '.join(unknown)}; "
            f"it takes {', '.join(['data_dir', 'source_dir', *allowed])}"
        )
    if name == "synthetic":
        train, test, num_classes = make_synthetic(**synthetic)
    elif name == "digits":
        train, test, num_classes = load_digits()
    else:
        # The module defines a TFDS builder, and importing tensorflow-datasets takes half a second.
        from jaxprune.data import fashion_mnist

        train, test, num_classes = fashion_mnist.load_fashion_mnist(data_dir, source_dir)
    return make_dataset(name, train, test, num_classes)
