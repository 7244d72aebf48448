"""ImageNet (ILSVRC 2012) from its two tars: batches of augmented images, whatever the number of
processes, workers and restarts.

    tars --offsets, once--> Images --shuffled by (seed, epoch)--> Grain workers: read, decode, crop
    --> uint8 batches in the host's memory --> the device, where `normalize` does the rest

    dataset = imagenet.load("/data/imagenet")
    batches = imagenet.train_batches(dataset.train, 256, seed=0, start=step, workers=8)
    for images, labels, _ in batches: ...

A batch depends on the data, the batch size, the seed and the number of the step, on nothing else:
a run that stopped goes on from the number of its next step.
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

# Of the training images / 255, per channel; the numbers that everybody uses.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_HOLD_OUT_KEY = 20240  # changing it changes what is held out


class ImageNet(NamedTuple):
    """Training and test images, and what `normalize` needs to know; fields as in `Dataset`.

    Example:
        >>> ImageNet._fields
        ('name', 'train', 'test', 'num_classes', 'mean', 'std')
    """

    name: str
    train: Images
    test: Images  # the validation images: nobody has the labels of the test images
    num_classes: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def load(
    source_dir: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    contents: Contents | None = None,
) -> ImageNet:
    """Find every image in the two tars; the first time this reads all headers, which takes minutes.

    Args:
        source_dir: folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.
        data_dir: folder that keeps where the images are (20 MB); default `$JAXPRUNE_DATA_DIR`, else
            `~/.cache/jaxprune`. A tar of another size or with other contents is read anew.
        contents: what the tars must hold; default: ILSVRC 2012. Others make subsets possible.

    Returns:
        The images of both tars, with labels as in TFDS's `imagenet2012`; nothing is decoded yet.

    Raises:
        FileNotFoundError: a tar is missing; says how to get it.
        ValueError: a tar is truncated, corrupt or has other contents; all of it is named.
        OSError: `data_dir` cannot be written.
        ModuleNotFoundError: the extra `imagenet` is not installed.

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
    """Set images aside, of all classes alike, to choose options by.

    Always the same ones: within each class images are put in a fixed random order, the classes
    follow one another, and `count` images evenly spaced along that list are set aside.

    Args:
        images: training images.
        count: how many, at least 1 and fewer than there are.

    Returns:
        The other images, and those set aside.

    Raises:
        ValueError: `count` is out of range.

    Example:
        >>> zeros = np.zeros(6, np.int64)
        >>> rest, held = hold_out(Images((), zeros, zeros, zeros, np.arange(6) // 3), 2)
        >>> rest.labels, held.labels
        (array([0, 0, 1, 1]), array([0, 1]))
    """
    if not 1 <= count < len(images):
        raise ValueError(
            f"`count` must be at least 1 and less than the {len(images)} images; got {count}"
        )
    order = np.random.Philox(key=_HOLD_OUT_KEY).random_raw(len(images))
    places = (2 * np.arange(count) + 1) * len(images) // (2 * count)
    held = np.zeros(len(images), bool)
    held[np.lexsort((order, images.labels))[places]] = True
    return images.select(np.flatnonzero(~held)), images.select(np.flatnonzero(held))
