"""ImageNet (ILSVRC 2012) from its two tars, as batches of augmented images.

    tars --offsets, once--> Images --shuffled by (seed, epoch)--> Grain workers: read, decode, crop
    --> uint8 batches in the host's memory --> the device, where `normalize` does the rest

    dataset = imagenet.load("/data/imagenet")
    batches = imagenet.train_batches(dataset.train, 256, seed=0, start=step, workers=8)
    for images, labels, _ in batches: ...

A batch depends only on the data, the batch size, the seed and the step number, not on the number of
processes, workers or restarts: a stopped run continues from the number of its next step.
"""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxprune.data import imagenet_tars as tars
from jaxprune.data.imagenet_batches import Batch, Batches, eval_batches, train_batches
from jaxprune.data.imagenet_cache import cache_images
from jaxprune.data.imagenet_files import Images
from jaxprune.data.imagenet_tars import Contents

__all__ = [
    "MEAN",
    "STD",
    "Batch",
    "Batches",
    "Contents",
    "ImageNet",
    "Images",
    "cache_images",
    "eval_batches",
    "hold_out",
    "load",
    "train_batches",
]

# The mean of the training images / 255, per channel, as in common use.
MEAN = (0.485, 0.456, 0.406)
# Their standard deviation, likewise.
STD = (0.229, 0.224, 0.225)

_HOLD_OUT_KEY = 20240  # a different key holds out different images


class ImageNet(NamedTuple):
    """The training and test images with the statistics for `normalize`; fields as in `Dataset`.

    Example:
        >>> ImageNet._fields
        ('name', 'train', 'test', 'num_classes', 'mean', 'std')
    """

    name: str
    train: Images
    test: Images  # the validation images, as the labels of the test images are not published
    num_classes: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def load(
    source_dir: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    contents: Contents | None = None,
) -> ImageNet:
    """Finds every image in the two tars; the first call reads all headers, which takes minutes.

    Args:
        source_dir: folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.
        data_dir: folder for the index of the images (20 MB); default `$JAXPRUNE_DATA_DIR`, else
            `~/.cache/jaxprune`. A tar whose size or contents changed is indexed anew.
        contents: the expected contents of the tars; default: ILSVRC 2012. Give them to use subsets.

    Returns:
        The images of both tars, with labels as in TFDS's `imagenet2012`; nothing is decoded yet.

    Raises:
        FileNotFoundError: if a tar is missing; the message says how to get it.
        ValueError: if a tar is truncated or corrupt, or its contents are not the expected ones; it
            lists all that is wrong.
        OSError: if `data_dir` cannot be written.
        ModuleNotFoundError: if the extra `imagenet` is not installed.

    Example:
        >>> load("/no/files")
        Traceback (most recent call last):
        FileNotFoundError: `source_dir` /no/files must hold both tars of ImageNet; ...

    References:
        O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", arXiv:1409.0575.
    """
    absent = [name for name in ("cv2", "grain") if importlib.util.find_spec(name) is None]
    if absent:
        raise ModuleNotFoundError(
            f"ImageNet needs {' and '.join(absent)}: pip install 'jaxprune[imagenet]'"
        )
    source = Path(source_dir).expanduser()
    missing = [name for name in tars.TARS.values() if not (source / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"`source_dir` {source} must hold both tars of ImageNet; missing: "
            f"{', '.join(missing)}. {tars.HOW_TO_GET}"
        )
    contents = tars.official() if contents is None else contents
    default = os.environ.get("JAXPRUNE_DATA_DIR") or "~/.cache/jaxprune"
    folder = Path(default if data_dir is None else data_dir).expanduser()
    train, test = (
        tars.load_index(split, (source / name).resolve(), contents, folder)
        for split, name in tars.TARS.items()
    )
    return ImageNet("imagenet", train, test, len(contents.classes))


def hold_out(images: Images, count: int) -> tuple[Images, Images]:
    """Holds out training images, evenly from all classes, to choose options on.

    The choice is always the same: the images are ordered by class, in a fixed random order within a
    class, and `count` evenly spaced images of this list are held out.

    Args:
        images: training images.
        count: number of images to hold out, at least 1 and less than `len(images)`.

    Returns:
        The remaining images, and the held-out images.

    Raises:
        ValueError: if `count` is out of range.

    Example:
        >>> zeros = np.zeros(6, np.int64)
        >>> rest, held = hold_out(Images((), zeros, zeros, zeros, np.arange(6) // 3), 2)
        >>> rest.labels, held.labels
        (array([0, 0, 1, 1]), array([0, 1]))
    """
    if not 1 <= count < len(images):
        raise ValueError(
            f"`count` must be at least 1 and less than the {len(images)} images; got {count}."
        )
    order = np.random.Philox(key=_HOLD_OUT_KEY).random_raw(len(images))
    places = (2 * np.arange(count) + 1) * len(images) // (2 * count)
    held = np.zeros(len(images), bool)
    held[np.lexsort((order, images.labels))[places]] = True
    return images.select(np.flatnonzero(~held)), images.select(np.flatnonzero(held))
