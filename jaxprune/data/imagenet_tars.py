"""The two tars of ImageNet (ILSVRC 2012): what they must hold, and where each image lies in them.

    ILSVRC2012_img_train.tar    1000 tars n01440764.tar, ... of JPEGs n01440764_10026.JPEG, ...
    ILSVRC2012_img_val.tar      50,000 JPEGs ILSVRC2012_val_00000001.JPEG, ...

TFDS's builder would need TensorFlow to write all of it a second time. Here the header of each image
is read once, 512 bytes of every 110,000.
"""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jaxprune.data.imagenet_files import Images, make_images, read_index, walk, write_index

TARS = {"train": "ILSVRC2012_img_train.tar", "test": "ILSVRC2012_img_val.tar"}
HOW_TO_GET = (
    "Register at https://image-net.org/download-images, download both and put them there: "
    "nobody may hand them on."
)
_SHOWN = 5  # so many faults of a kind are named


class Contents(NamedTuple):
    """What the tars must hold.

    Example:
        >>> Contents(("n01440764", "n01443537"), ("n01443537",), 3).classes.index("n01443537")
        1
    """

    classes: tuple[str, ...]  # WordNet ids, ascending; a label is the place in this list
    validation: tuple[str, ...]  # class of each validation image, in the order of their names
    train_size: int  # number of training images


def official() -> Contents:
    """What ILSVRC 2012 holds: from two lists that come with tensorflow-datasets.

    The validation tar does not say what its images show. The lists are read as plain files; neither
    tensorflow-datasets nor TensorFlow is imported. The labels are those of TFDS's `imagenet2012`.

    Returns:
        1000 classes, the classes of 50,000 validation images, and 1,281,167.

    Raises:
        ModuleNotFoundError: tensorflow-datasets is not installed.

    Example:
        >>> contents = official()
        >>> contents.classes[:2], len(contents.validation), contents.validation[0]
        (('n01440764', 'n01443537'), 50000, 'n01751748')
    """
    spec = importlib.util.find_spec("tensorflow_datasets")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the classes of the validation images come with tensorflow-datasets, which is not "
            "installed: pip install 'jaxprune[imagenet]'"
        )
    folder = Path(spec.origin).parent / "datasets/imagenet2012"
    names = ("labels.txt", "validation_labels.txt")
    classes, validation = (tuple((folder / name).read_text().split()) for name in names)
    return Contents(classes, validation, 1_281_167)


def index_train(path: Path, contents: Contents) -> Images:
    """Index the training tar: every image of every class tar in it, ordered by name.

    Args:
        path: the tar.
        contents: what it must hold.

    Returns:
        The `Images`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is truncated or corrupt, a class is unknown, missing or without images, an
            image lies in a class that is not its own, or images are too few or too many. All
            faults but the first two kinds are collected.

    Example:
        >>> index_train(Path("/no/train.tar"), Contents(("n01440764",), (), 1))
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: '/no/train.tar'
    """
    labels = {name: label for label, name in enumerate(contents.classes)}
    seen: Counter[str] = Counter()
    unknown, empty, astray, found = [], [], [], []
    for tar in walk(path):
        wnid = tar.name.removesuffix(".tar")
        seen[wnid] += 1
        if wnid not in labels:
            unknown.append(tar.name)
            continue
        members = list(walk(path, tar.offset, tar.offset + tar.size, f"{tar.name} in "))
        if not members:
            empty.append(tar.name)
        astray += [f"{m.name} in {tar.name}" for m in members if not m.name.startswith(f"{wnid}_")]
        found += [(labels[wnid], member) for member in members]
    found.sort(key=lambda entry: entry[1].name)
    faults = [
        ("tars that are of no known class", unknown),
        (
            "classes that are there more than once",
            [name for name, count in seen.items() if count > 1],
        ),
        ("missing classes", [name for name in contents.classes if name not in seen]),
        ("classes without images", empty),
        ("images in a class that is not their own", astray),
        ("images of the same name", _repeated(member.name for _, member in found)),
    ]
    _check(path, faults, len(found), contents.train_size)
    return make_images([path], [(0, member) for _, member in found], [label for label, _ in found])


def index_validation(path: Path, contents: Contents) -> Images:
    """Index the validation tar, ordered by name, as the list of its classes is.

    Args:
        path: the tar.
        contents: what it must hold.

    Returns:
        The `Images`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is truncated or corrupt, a class is unknown, or images are too few or too
            many.

    Example:
        >>> index_validation(Path("/no/val.tar"), Contents(("n01440764",), (), 1))
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: '/no/val.tar'
    """
    labels = {name: label for label, name in enumerate(contents.classes)}
    found = sorted(walk(path))
    faults = [
        ("images of the same name", _repeated(member.name for member in found)),
        ("images of an unknown class", sorted(set(contents.validation) - set(labels))),
    ]
    _check(path, faults, len(found), len(contents.validation))
    own = [labels[wnid] for wnid in contents.validation]
    return make_images([path], [(0, member) for member in found], own)


def load_index(split: str, path: Path, contents: Contents, folder: Path) -> Images:
    """The images of a tar: from the index of an earlier run if that still fits, else made anew.

    Args:
        split: "train" or "test".
        path: the tar.
        contents: what it must hold.
        folder: keeps the index, about 20 MB. It is written under another name and renamed.

    Returns:
        The `Images`.

    Raises:
        FileNotFoundError: the tar is not there.
        ValueError: see `index_train` and `index_validation`; or the index is corrupt.
        OSError: `folder` cannot be written.

    Example:
        >>> load_index("train", Path("/no/train.tar"), Contents((), (), 0), Path("/no"))
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: '/no/train.tar'
    """
    key = hashlib.sha256(json.dumps([1, split, path.stat().st_size, contents]).encode())
    index = folder / f"imagenet-{split}-{key.hexdigest()[:12]}.npz"
    if index.exists():
        images = read_index(index, (path,))
        if images.matches_headers():
            return images
    images = (index_train if split == "train" else index_validation)(path, contents)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_index(index, images)
    except OSError as error:
        raise OSError(
            f"`data_dir` {folder} cannot be written ({error}): "
            "give another one or set JAXPRUNE_DATA_DIR"
        ) from error
    return images


def _repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def _check(path: Path, faults: list[tuple[str, list[str]]], count: int, expected: int) -> None:
    """Raises one error that names all faults."""
    bad = []
    for kind, names in faults:
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            bad.append(f"{kind}: {', '.join(names[:_SHOWN])}{more}")
    if count != expected:
        bad.append(f"{count} images where {expected} must be")
    if bad:
        raise ValueError(
            f"{path} is not what it must be: {'; '.join(bad)}. Delete it and get it again. "
            f"{HOW_TO_GET}"
        )
