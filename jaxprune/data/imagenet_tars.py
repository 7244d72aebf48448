"""The two tars of ImageNet (ILSVRC 2012): their expected contents, and an index of their images.

    ILSVRC2012_img_train.tar    1000 tars n01440764.tar, ... of JPEGs n01440764_10026.JPEG, ...
    ILSVRC2012_img_val.tar      50,000 JPEGs ILSVRC2012_val_00000001.JPEG, ...

The builder in TFDS needs TensorFlow and writes all images a second time. Here the header of each
image is read once, 512 of every 110,000 bytes.
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
    "Register at https://image-net.org/download-images, download both and put them there; "
    "the terms of use do not allow passing them on."
)
_SHOWN = 5  # largest number of faults of a kind that an error names


class Contents(NamedTuple):
    """The expected contents of the tars.

    Example:
        >>> Contents(("n01440764", "n01443537"), ("n01443537",), 3).classes.index("n01443537")
        1
    """

    classes: tuple[str, ...]  # WordNet ids, ascending; a label is an index into this list
    validation: tuple[str, ...]  # class of each validation image, in the order of their names
    train_size: int  # number of training images


def official() -> Contents:
    """Reads the contents of ILSVRC 2012 from two lists that come with tensorflow-datasets.

    The validation tar has no labels. The lists are read as plain files; neither tensorflow-datasets
    nor TensorFlow is imported. The labels are those of TFDS's `imagenet2012`.

    Returns:
        1000 classes, the classes of 50,000 validation images, and 1,281,167 training images.

    Raises:
        ModuleNotFoundError: if tensorflow-datasets is not installed.

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
    """Indexes the training tar: every image of every class tar in it, ordered by name.

    Args:
        path: the tar.
        contents: its expected contents.

    Returns:
        The `Images`.

    Raises:
        FileNotFoundError: if the tar does not exist.
        ValueError: if it is truncated or corrupt, a class is unknown, missing or without images, an
            image lies in the tar of a different class, or there are too few or too many images. It
            lists all faults except the first two kinds.

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
        ("tars of unknown classes", unknown),
        (
            "classes that occur more than once",
            [name for name, count in seen.items() if count > 1],
        ),
        ("missing classes", [name for name in contents.classes if name not in seen]),
        ("classes without images", empty),
        ("images in the tar of a different class", astray),
        ("images of the same name", _repeated(member.name for _, member in found)),
    ]
    _check(path, faults, len(found), contents.train_size)
    return make_images([path], [(0, member) for _, member in found], [label for label, _ in found])


def index_validation(path: Path, contents: Contents) -> Images:
    """Indexes the validation tar, ordered by name like the list of its classes.

    Args:
        path: the tar.
        contents: its expected contents.

    Returns:
        The `Images`.

    Raises:
        FileNotFoundError: if the tar does not exist.
        ValueError: if it is truncated or corrupt, a class is unknown, or there are too few or too
            many images.

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
    """Loads the index of a tar that an earlier run wrote, or makes and writes it.

    Args:
        split: "train" or "test".
        path: the tar.
        contents: its expected contents.
        folder: folder of the index (about 20 MB), which is written atomically.

    Returns:
        The `Images`.

    Raises:
        FileNotFoundError: if the tar does not exist.
        ValueError: as for `index_train` and `index_validation`, or if the index is corrupt.
        OSError: if `folder` cannot be written.

    Example:
        >>> load_index("train", Path("/no/train.tar"), Contents((), (), 0), Path("/no"))
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: '/no/train.tar'
    """
    key = hashlib.sha256(json.dumps([1, split, path.stat().st_size, contents]).encode())
    index = folder / f"imagenet-{split}-{key.hexdigest()[:12]}.npz"
    if index.exists():
        count = contents.train_size if split == "train" else len(contents.validation)
        images = read_index(index, (path,), count, len(contents.classes))
        if images.matches_headers():
            return images
    images = (index_train if split == "train" else index_validation)(path, contents)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_index(index, images)
    except OSError as error:
        raise OSError(
            f"`data_dir` must be writable, but writing to {folder} failed ({error}): "
            "give a different folder or set JAXPRUNE_DATA_DIR."
        ) from error
    return images


def _repeated(names: Iterable[str]) -> list[str]:
    """Lists the names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def _check(path: Path, faults: list[tuple[str, list[str]]], count: int, expected: int) -> None:
    """Raises one error that names all faults."""
    bad = []
    for kind, names in faults:
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            bad.append(f"{kind}: {', '.join(names[:_SHOWN])}{more}")
    if count != expected:
        bad.append(f"{count} images, but there must be {expected}")
    if bad:
        raise ValueError(
            f"{path} has wrong contents: {'; '.join(bad)}. Delete it and get it again. {HOW_TO_GET}"
        )
