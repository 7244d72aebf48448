"""Writes weights as safetensors, with masks and the plan in files beside them."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune import files, trees
from jaxprune import masks as masks_of
from jaxprune.export._functions import free_path
from jaxprune.export._packages import load

_USER = "export.safetensors"
_KNOWN = {
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64",
}  # fmt: skip


class SafetensorsReport(NamedTuple):
    """The files that were written; `print` shows them.

    Example:
        >>> print(SafetensorsReport({"net.safetensors": 128}, 2))
        net.safetensors: 128 bytes; 2 tensors
    """

    files: dict[str, int]  # path -> bytes; the weights come first
    tensors: int

    def __str__(self) -> str:
        """Lists the files with their sizes."""
        listed = ", ".join(f"{path}: {size:,} bytes" for path, size in self.files.items())
        return f"{listed}; {self.tensors} tensors"


def safetensors(
    variables: Any,
    path: str | os.PathLike[str],
    *,
    masks: Any = None,
    plan: Any = None,
    overwrite: bool = False,
) -> SafetensorsReport:
    """Writes every leaf as a tensor named by its path, such as "params/head/kernel".

    Args:
        variables: tree of arrays; functions and strings of a module are left out.
        path: the file to write, such as "net.safetensors".
        masks: tree of bools like `variables`, True where a weight is kept. The weights are set to 0
            where it is False, and it is written beside them as "net.masks.safetensors"; scalar
            masks remain scalars.
        plan: a plan of `structure`, written beside them as "net.plan.json".
        overwrite: whether to replace existing files.

    Returns:
        A `SafetensorsReport`.

    Raises:
        ValueError: if `masks` does not fit or a leaf has a dtype that the format lacks; it lists
            every leaf.
        FileExistsError: if one of the files exists and `overwrite` is False; nothing is written.
        OSError: if a file cannot be written; an existing one then stays as it is.
        ModuleNotFoundError: if safetensors is not installed.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from safetensors.numpy import load_file
        >>> path = tempfile.mkdtemp() + "/net.safetensors"
        >>> _ = safetensors({"layers": [{"w": jnp.ones(2)}]}, path)
        >>> {name: tensor.tolist() for name, tensor in load_file(path).items()}
        {'layers/0/w': [1.0, 1.0]}
    """
    path = Path(path)
    stem = path.name.removesuffix(".safetensors")
    beside = {
        "weights": path,
        "masks": path.with_name(f"{stem}.masks.safetensors"),
        "plan": path.with_name(f"{stem}.plan.json"),
    }
    written = ["weights", *(["masks"] if masks is not None else [])]
    for name in [*written, *(["plan"] if plan is not None else [])]:
        free_path(beside[name], overwrite)
    library = load("safetensors.numpy", "export", _USER)
    trees.check_known("variables", variables, _USER)
    if masks is not None:
        variables = masks_of.apply_masks(variables, masks)
    content = {"weights": variables, "masks": masks}
    tensors = {name: _tensors(content[name], name) for name in written}
    sizes = {}
    for name in written:
        raw = library.save(tensors[name], metadata={"format": "np"})
        with files.replacing(beside[name], "wb") as file:
            file.write(raw)
        sizes[str(beside[name])] = len(raw)
    if plan is not None:
        plan.save(beside["plan"])
        sizes[str(beside["plan"])] = beside["plan"].stat().st_size
    return SafetensorsReport(sizes, len(tensors["weights"]))


def _tensors(tree: Any, name: str) -> dict[str, np.ndarray]:
    """Maps paths to contiguous arrays on the host."""
    found = {
        path: np.asarray(leaf, order="C")
        for path, leaf in trees.leaf_by_path(tree).items()
        if trees.is_numeric(leaf)
    }
    argument = "masks" if name == "masks" else "variables"
    trees.raise_for(
        [f"{path}: {leaf.dtype}" for path, leaf in found.items() if leaf.dtype.name not in _KNOWN],
        f"`{argument}` must have dtypes that safetensors knows; convert these leaves first:",
    )
    return found
