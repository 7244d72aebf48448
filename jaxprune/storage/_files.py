"""Writes and reads one small file for parameters and masks; `_format` says what is in it."""

import contextlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxprune import files, trees
from jaxprune.storage import _coding, _packing
from jaxprune.storage._format import (
    Row,
    Saved,
    check_length,
    decode,
    encode,
    encode_packed,
    read,
)
from jaxprune.storage._leaves import is_stored, jax_array, placed_like

File = str | os.PathLike[str] | BinaryIO


def save(
    path: File,
    params: Any,
    masks: Any = None,
    *,
    values: str = "exact",
    compression: str | None = "auto",
    overwrite: bool = False,
) -> Saved:
    """Writes parameters and masks, without the masked weights, compressed.

    Before compression a leaf of n weights of b bytes, of which k are kept, takes n/8 + k b bytes
    and about 100 in the manifest; with float32 at sparsity s that is 1.03 - s of the dense leaf.
    With "exact" the values are stored bit for bit, -0.0 and NaN included; only a masked -0.0 is
    read back as 0.0.

    The file is complete or does not exist: it is written under a temporary name and then renamed.

    Args:
        path: a path, or a binary file open for writing (which is not renamed).
        params: any pytree of arrays of numbers or bools; 8-bit floats and 4-bit integers too. The
            functions and strings of a module are left out; numbers are stored.
        masks: tree of bools with the same paths, True where a weight is kept. Each has the shape of
            its leaf or is a scalar, also for a whole branch; True stands for a dense leaf and False
            for a mask full of False. None: in floating-point leaves of two or more dimensions zeros
            count as masked if that makes the file smaller; all other leaves are dense.
        values: "exact"; "bfloat16" for the floats of more than two bytes; or "int8" for the floats
            of two or more dimensions: round(w / scale), where the scale of each index of the last
            axis maps the largest weight to 127. Other wide floats are then bfloat16. `load` returns
            the dtypes of `params` in any case.
        compression: "zstd" (Python 3.14 or the package zstandard), "zlib", "auto" for the first of
            them that is here, or None for a file that NumPy alone can read; it is "exact".
        overwrite: whether to replace an existing file.

    Returns:
        A `Saved`: the length, and the error that `values` makes.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        ValueError: if a leaf cannot be stored, `masks` does not match, a masked weight is not 0, or
            a weight that becomes int8 is not finite; it lists every leaf.
        ModuleNotFoundError: if `compression` is "zstd" and nothing here has it.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> path = tempfile.mkdtemp() + "/pruned.npz"
        >>> params, masks = {"w": jnp.array([3.0, 0.0, 2.0])}, {"w": jnp.array([True, False, True])}
        >>> save(path, params, masks).values
        'exact'
        >>> params, masks = load(path)
        >>> params["w"].tolist(), masks["w"].tolist()
        ([3.0, 0.0, 2.0], [True, False, True])
    """
    _check_options(values, compression)
    is_path = isinstance(path, str | os.PathLike)
    if is_path and Path(path).exists() and not overwrite:
        raise FileExistsError(f"`path` {path} exists; take another name or `overwrite=True`.")
    if compression is None:
        arrays, saved = encode(params, masks)
    else:
        codec = _packing.best() if compression == "auto" else compression
        arrays, saved = encode_packed(params, masks, values, codec)
    if not is_path:
        np.savez(path, allow_pickle=False, **arrays)
        return saved
    with files.replacing(path, "wb") as handle:
        np.savez(handle, allow_pickle=False, **arrays)
    return saved


def _check_options(values: str, compression: str | None) -> None:
    """Raises unless values and compression are known and fit together."""
    if values not in _coding.VALUES:
        raise ValueError(
            f"`values` must be {', '.join(map(repr, _coding.VALUES))}, but is {values!r:.40}"
        )
    if compression not in ("auto", "zstd", "zlib", None):
        raise ValueError(
            f"`compression` must be 'auto', 'zstd', 'zlib' or None, but is {compression!r:.40}"
        )
    if compression is None and values != "exact":
        raise ValueError(
            f"`values` must be 'exact' in a file without compression, but is {values!r}; "
            "leave out `compression=None`"
        )


def load(path: File, like: Any = None) -> tuple[Any, Any]:
    """Reads a file written by `save`.

    Args:
        path: a path, or a binary file open for reading.
        like: tree of arrays or `jax.ShapeDtypeStruct` with the structure of the result. A sharding
            of either places the leaf and its mask: a model goes straight to its mesh. None: dicts
            nested at the slashes of the paths; lists, modules and integer keys become dicts with
            keys such as `"0"`, and empty containers are lost. The functions and strings of a module
            are copied to the result; where it has None, the file is not read.

    Returns:
        Parameters and masks, with the dtypes that were saved, on the default device unless `like`
            says where. Dense leaves
        have the scalar mask True. A 64-bit leaf is a NumPy array unless `jax_enable_x64` is set.

    Raises:
        ValueError: if the file is damaged or has a different format or version; if its leaves
            are not those of `like` (it lists all that are missing, unknown, or of a different shape
            or dtype); or if, without `like`, a path is a leaf and a dict at once, or the leaves are
            more than 1024 times as long as the file and longer than 64 MiB.
        ModuleNotFoundError: if the file is compressed with Zstandard and nothing here has it.

    Example:
        >>> import io
        >>> import jax.numpy as jnp
        >>> params, file = [jnp.eye(2, dtype=jnp.bfloat16), jnp.ones(2)], io.BytesIO()
        >>> _ = save(file, params)
        >>> restored, masks = load(file, like=params)
        >>> restored[0].dtype.name, [leaf.tolist() for leaf in masks]
        ('bfloat16', [[[True, False], [False, True]], True])
    """
    is_path = isinstance(path, str | os.PathLike)
    name = str(path) if is_path else repr(path)
    with open(path, "rb") if is_path else contextlib.nullcontext(path) as stream:
        try:
            stored = read(stream)
        except ValueError as error:
            raise ValueError(f"`path` {name} cannot be read: {error}") from error
    if like is not None:
        _check_like(stored.rows, like, name)
    try:
        if like is None:
            check_length(stored)
        leaves = decode(stored)
    except ValueError as error:
        raise ValueError(f"`path` {name} cannot be read: {error}") from error
    if like is not None:
        build = jax.tree.structure(like).unflatten
        order = [_restored(leaves.get(path), old) for path, old in trees.leaf_by_path(like).items()]
        return build([values for values, _ in order]), build([mask for _, mask in order])
    return (
        _nested({key: jax_array(values) for key, (values, _) in leaves.items()}, name),
        _nested({key: jax_array(mask) for key, (_, mask) in leaves.items()}, name),
    )


def _restored(saved: tuple[np.ndarray, np.ndarray] | None, like: Any) -> tuple[Any, Any]:
    """Returns values and mask of a leaf in the form of `like`: an array, a number, a function."""
    if saved is None:
        return like, jax_array(np.array(True))
    values, mask = saved
    is_number = not trees.is_array(like)
    if is_number:
        return type(like)(values.item()), jax_array(mask)
    return placed_like(values, like), placed_like(mask, like)


def _check_like(rows: dict[str, Row], like: Any, name: str) -> None:
    """Raises unless the leaves are those of `like`."""

    def kind(leaf: Any) -> str:
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        return f"{leaf.dtype.name}{list(leaf.shape)}"

    places = trees.places(like)
    stored = {path: leaf for path, leaf in trees.leaf_by_path(like).items() if is_stored(leaf)}
    wanted = {path: kind(leaf) for path, leaf in stored.items()}
    seen = {path: row.kind() for path, row in rows.items() if places.get(path, ...) is not None}
    bad = [f"{path}: missing in the file" for path in wanted if path not in seen]
    bad += [f"{path}: only in the file" for path in seen if path not in wanted]
    bad += [
        f"{path}: {seen[path]} in the file, {text} in `like`"
        for path, text in wanted.items()
        if seen.get(path, text) != text
    ]
    trees.raise_for(bad, f"`like` must have the leaves of `path` {name}:")


def _nested(leaves: dict[str, Any], name: str) -> Any:
    """Nests dicts at the slashes of the paths; a tree that is one leaf has the path ``."""
    if list(leaves) == [""]:
        return leaves[""]
    root: dict[str, Any] = {}
    bad = []
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node: Any = root
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or last in node:
            bad.append(path)
        else:
            node[last] = leaf
    trees.raise_for(bad, f"`like` is needed to read {name}: paths that are leaf and dict at once:")
    return root
