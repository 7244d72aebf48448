"""The folder that the page reads: trained networks, their .tflite files, images and outputs."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune import export, files, models, storage, structure
from jaxprune.files import schemas

Folder = str | os.PathLike[str]

NETWORKS, IMAGES = "networks.json", "images.npz"
STATE = "model_state"  # name of what a module has besides parameters
_WIDTH = schemas.whole(low=1)
_NETWORK = schemas.record(
    {
        "model": schemas.one_of("mobilenet_v1", "mobilenet_v2"),
        "widths": schemas.record(
            {"stem": _WIDTH, "blocks": schemas.each(schemas.each(_WIDTH))},
            optional={"head": schemas.maybe(_WIDTH)},
        ),
        "num_classes": _WIDTH,
        "padding": schemas.one_of("SAME", "SYMMETRIC"),
        "facts": schemas.table(schemas.anything),
    }
)


def save(folder: Folder, name: str, model: Any, variables: Any, facts: Mapping[str, Any]) -> None:
    """Saves a MobileNet, for `convert` in an environment that cannot train.

    Args:
        folder: it is made if it does not exist.
        name: begins the names of the files; letters, digits, `.`, `_` and `-`.
        model: a `models.MobileNet`; only its form is read.
        variables: `{"params": ..., "model_state": ...}` of this module, see `structure.from_nnx`.
        facts: JSON-ready; the page shows `title`, `accuracy` (a fraction) and `about`.

    Raises:
        ValueError: if `name` has other characters.

    Example:
        >>> import tempfile
        >>> widths = models.default_widths("mobilenet_v1", 0.05)
        >>> model = models.mobilenet_v1(num_classes=3, widths=widths, rngs=nnx.Rngs(0))
        >>> variables = structure.from_nnx(model, state="model_state").variables
        >>> folder = tempfile.mkdtemp()
        >>> save(folder, "dense", model, variables, {"title": "Dense"})
        >>> sorted(path.name for path in Path(folder).iterdir())
        ['dense.json', 'dense.npz']
    """
    if not name or not all(letter.isalnum() or letter in "._-" for letter in name):
        raise ValueError(f"`name` must be letters, digits, '.', '_' or '-', but is {name!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    form = {
        "model": model.name,
        "widths": model.widths._asdict(),
        "num_classes": model.num_classes,
        "padding": model.padding,
        "facts": dict(facts),
    }
    storage.save(folder / f"{name}.npz", variables, overwrite=True)
    _write_json(folder / f"{name}.json", form)


def write_images(folder: Folder, pixels: Any, inputs: Any, labels: Any) -> None:
    """Writes the images that the page shows and the networks get.

    Args:
        folder: the folder of `save`.
        pixels: uint8 [N, H, W, 1 or 3], as a person sees them.
        inputs: float32 [N, height, width, 3], as the networks get them.
        labels: int [N].

    Raises:
        ValueError: if a shape does not fit.

    Example:
        >>> import tempfile
        >>> pixels, inputs = np.zeros((2, 8, 8, 1)), np.zeros((2, 16, 16, 3))
        >>> write_images(tempfile.mkdtemp(), pixels, inputs, [0, 1])
    """
    pixels, inputs = np.asarray(pixels, np.uint8), np.asarray(inputs, np.float32)
    labels = np.asarray(labels, np.int32)
    problems = [
        f"`{name}` has shape {own.shape}"
        for name, own, rank in (("pixels", pixels, 4), ("inputs", inputs, 4), ("labels", labels, 1))
        if own.ndim != rank or len(own) != len(labels)
    ]
    if problems or not len(labels):
        raise ValueError(
            "`pixels` and `inputs` must be [N, height, width, channels] and `labels` [N], with the "
            f"same N of at least 1; {'; '.join(problems) or 'N is 0'}"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    with files.replacing(Path(folder) / IMAGES, "wb") as file:
        np.savez(file, pixels=pixels, inputs=inputs, labels=labels)


def convert(
    folder: Folder,
    names: Sequence[str],
    *,
    values: str = "float32",
    classes: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Converts saved networks to .tflite files, and writes what the page reads.

    Every file is run with LiteRT on this machine and compared with JAX.

    Args:
        folder: that of `save` and `write_images`.
        names: the networks, in the order of the page; others are compared with the first.
        values: as in `export.litert`.
        classes: names of the classes.
        say: gets a line for each network.

    Returns:
        A record for each network: name, file, bytes, whether sparse inference runs, and outputs.

    Raises:
        ValueError: if a file is damaged or missing, or a network is not converted.
        ModuleNotFoundError: if the extra `litert` is not installed.

    Example:
        >>> convert("no-such-folder", ["dense"])
        Traceback (most recent call last):
        ValueError: `folder` no-such-folder must hold images.npz; call `write_images` first
    """
    folder = Path(folder)
    if not (folder / IMAGES).exists():
        raise ValueError(f"`folder` {folder} must hold {IMAGES}; call `write_images` first")
    with np.load(folder / IMAGES, allow_pickle=False) as found:
        pixels, inputs, labels = found["pixels"], found["inputs"], found["labels"]
    records = []
    for name in names:
        model, variables, facts = load(folder, name)
        apply = structure.from_nnx(model, state=STATE).evaluate
        report = export.litert(
            apply, variables, inputs[:1], folder / f"{name}.tflite",
            values=values, check=inputs, overwrite=True,
        )  # fmt: skip
        logits = np.asarray(jax.jit(apply)(variables, jnp.asarray(inputs)))
        records.append(record_of(name, report, logits, facts))
        say(f"{name}: {report}")
    write_page_data(folder, records, pixels, inputs, labels, classes)
    return records


def record_of(
    name: str, report: export.LitertReport, logits: np.ndarray, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what the page knows of a network."""
    return dict(facts) | {
        "name": name,
        "file": Path(report.path).name,
        "bytes": report.bytes,
        "error": report.error,
        "sparse_inference": report.sparse.runs,
        "report": str(report.sparse),
        "logits": logits.astype(float).round(6).tolist(),
    }


def write_page_data(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    pixels: np.ndarray,
    inputs: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str] = (),
) -> None:
    """Writes networks.json and the raw arrays beside it."""
    for name, array in (("inputs.bin", inputs), ("pixels.bin", pixels)):
        with files.replacing(folder / name, "wb") as file:
            file.write(np.ascontiguousarray(array).tobytes())
    page = {
        "shape": list(inputs.shape[1:]),
        "pixels": list(pixels.shape[1:]),
        "labels": labels.tolist(),
        "classes": list(classes),
        "networks": list(records),
    }
    _write_json(folder / NETWORKS, page)


def load(folder: Folder, name: str) -> tuple[models.MobileNet, Any, dict[str, Any]]:
    """Reads a network of `save`.

    Args:
        folder: the folder of `save`.
        name: the network.

    Returns:
        A module in evaluation mode that holds shapes only, its variables, and the facts.

    Raises:
        ValueError: if there is no such network, or a file is damaged.

    Example:
        >>> load("no-such-folder", "dense")
        Traceback (most recent call last):
        ValueError: `names` must be networks in no-such-folder, but dense is none
    """
    folder = Path(folder)
    path = folder / f"{name}.json"
    try:
        form = files.parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"`names` must be networks in {folder}, but {name} is none") from None
    _NETWORK(form, str(path))
    model = nnx.eval_shape(
        lambda: models.MobileNet(
            form["model"],
            num_classes=form["num_classes"],
            widths=models.Widths(**form["widths"]),
            padding=form["padding"],
            rngs=nnx.Rngs(0),
        )
    )
    model.eval()
    like = structure.from_nnx(model, state=STATE).variables
    variables, _ = storage.load(folder / f"{name}.npz", like=like)
    return model, variables, form["facts"]


def _write_json(path: Path, value: Any) -> None:
    with files.replacing(path, "wb") as file:
        file.write(json.dumps(value, indent=1).encode())
