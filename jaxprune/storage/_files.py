"""Writes and reads one small file for parameters and masks.

A file is an uncompressed NumPy archive (`.npz`) of two arrays of bytes. `manifest` is JSON: the
format, its version and, for each leaf, path, dtype, shape, the number of weights that its mask
keeps (null for the scalar mask True) and a CRC-32. `data` holds the bytes of the leaves one after
another: the mask, one bit per weight (left out if it keeps all), then the kept values in row-major
order, little-endian. A separate array for each leaf would cost some 250 bytes more.

A mask that keeps nothing has its bits, too: so the weights of a leaf are at most eight times the
bytes of the file, and no small file makes `load` take much memory. (Version 1 left them out.)
"""

import contextlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import files, trees
from jaxprune.files import schemas
from jaxprune.storage._leaves import (
    is_stored,
    jax_array,
    masked_leaves,
    pack_mask,
    placed_like,
    unpack_mask,
)

_FORMAT = "jaxprune.storage"
_VERSION = 2
_ARRAYS = {"manifest": ("uint8", ("bytes of the manifest",)), "data": ("uint8", ("bytes",))}
_SIZE = schemas.whole()
_ROW = {
    "path": schemas.text,
    "dtype": schemas.text,
    "shape": schemas.each(_SIZE),
    "kept": schemas.maybe(_SIZE),
    "crc32": schemas.whole(high=2**32 - 1),
}
_MANIFEST = schemas.record(
    {
        "format": schemas.one_of(_FORMAT),
        "version": schemas.one_of(_VERSION),
        "leaves": schemas.each(schemas.record(_ROW)),
    }
)

File = str | os.PathLike[str] | BinaryIO


def save(path: File, params: Any, masks: Any = None, *, overwrite: bool = False) -> None:
    """Writes parameters and masks, without the masked weights.

    A leaf of n weights of b bytes, of which k are kept, takes n/8 + k b bytes and about 100 in the
    manifest; with float32 at sparsity s that is 1.03 - s of the dense leaf. The values are stored
    bit for bit, -0.0 and NaN included; only a masked -0.0 is read back as 0.0.

    The file is complete or does not exist: it is written under a temporary name and then renamed.

    Args:
        path: a path, or a binary file open for writing (which is not renamed).
        params: any pytree of arrays of numbers or bools; 8-bit floats and 4-bit integers too. The
            functions and strings of a module are left out; numbers are stored.
        masks: tree of bools with the same paths, True where a weight is kept. Each has the shape of
            its leaf or is a scalar, also for a whole branch; True stands for a dense leaf and False
            for a mask full of False. None: in floating-point leaves of two or more dimensions zeros
            count as masked if that makes the file smaller; all other leaves are dense.
        overwrite: whether to replace an existing file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        ValueError: if a leaf cannot be stored, `masks` does not match, or a masked weight is not 0;
            it lists every leaf.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> path = tempfile.mkdtemp() + "/pruned.npz"
        >>> save(path, {"w": jnp.array([3.0, 0.0, 2.0])}, {"w": jnp.array([True, False, True])})
        >>> params, masks = load(path)
        >>> params["w"].tolist(), masks["w"].tolist()
        ([3.0, 0.0, 2.0], [True, False, True])
    """
    if not isinstance(path, str | os.PathLike):
        np.savez(path, allow_pickle=False, **_encode(params, masks))
        return
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"`path` {path} exists; take another name or `overwrite=True`.")
    arrays = _encode(params, masks)
    with files.replacing(path, "wb") as handle:
        np.savez(handle, allow_pickle=False, **arrays)


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
        says where. Dense leaves have the scalar mask True. A 64-bit leaf is a NumPy array unless
        `jax_enable_x64` is set.

    Raises:
        ValueError: if the file is damaged or has a different format or version; if its leaves
            are not those of `like` (it lists all that are missing, unknown, or of a different shape
            or dtype); or if, without `like`, a path is a leaf and a dict at once.

    Example:
        >>> import io
        >>> import jax.numpy as jnp
        >>> params, file = [jnp.eye(2, dtype=jnp.bfloat16), jnp.ones(2)], io.BytesIO()
        >>> save(file, params)
        >>> restored, masks = load(file, like=params)
        >>> restored[0].dtype.name, [leaf.tolist() for leaf in masks]
        ('bfloat16', [[[True, False], [False, True]], True])
    """
    is_path = isinstance(path, str | os.PathLike)
    name = str(path) if is_path else repr(path)
    with open(path, "rb") if is_path else contextlib.nullcontext(path) as stream:
        try:
            rows, data = _read(stream)
        except ValueError as error:
            raise ValueError(f"`path` {name} cannot be read: {error}") from error
    if like is not None:
        _check_like(rows, like, name)
    try:
        leaves = _decode(rows, data)
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


def _encode(params: Any, masks: Any) -> dict[str, np.ndarray]:
    """Encodes parameters and masks as the two arrays of a file."""
    rows, pieces = [], []
    for path, (values, mask) in masked_leaves(params, masks).items():
        dense = mask.ndim < values.ndim or (masks is None and not _pays(values, mask))
        kept = values.size if dense else int(np.count_nonzero(mask))
        bits = pack_mask(mask if kept < values.size else np.ones(0, bool))
        # Boolean indexing copies; avoid that for a dense leaf.
        raw = (values if kept == values.size else values[mask]).reshape(-1).view(np.uint8)
        rows.append(
            {
                "path": path,
                "dtype": values.dtype.name,
                "shape": values.shape,
                "kept": None if dense else kept,
                "crc32": zlib.crc32(raw.data, zlib.crc32(bits.data)),
            }
        )
        pieces += [bits, raw]
    manifest = {"format": _FORMAT, "version": _VERSION, "leaves": rows}
    text = json.dumps(manifest, separators=(",", ":"))
    data = np.concatenate([np.empty(0, np.uint8), *pieces])
    return {"manifest": np.frombuffer(text.encode(), np.uint8), "data": data}


class _Row(NamedTuple):
    """What the manifest says of a leaf, and where its bytes lie."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    kept: int | None
    crc32: int
    start: int  # of the bits of the mask
    middle: int  # of the values
    stop: int

    def kind(self) -> str:
        """Returns dtype and shape, as errors show them."""
        return f"{self.dtype.name}{list(self.shape)}"


def _read(stream: Any) -> tuple[dict[str, _Row], np.ndarray]:
    """Reads a file: the rows of its manifest by path, held against the bytes that are there."""
    arrays = files.read_arrays(stream, _ARRAYS)
    manifest, data = files.parse_json(arrays["manifest"].tobytes()), arrays["data"]
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != _VERSION and isinstance(version, int) and manifest.get("format") == _FORMAT:
        newer = "update jaxprune" if version > _VERSION else "save it again with this jaxprune"
        raise ValueError(f"its version is {version}, but this jaxprune reads {_VERSION}: {newer}")
    _MANIFEST(manifest, "its manifest")
    rows: dict[str, _Row] = {}
    start = 0
    for row in manifest["leaves"]:
        path, shape, kept = row["path"], tuple(row["shape"]), row["kept"]
        dtype, size = _dtype(row["dtype"], path), math.prod(shape)
        count = size if kept is None else kept
        if count > size or path in rows:
            what = "occurs twice" if path in rows else f"keeps {count} of {size} weights"
            raise ValueError(f"its leaf {ascii(path)} {what}")
        middle = start + (-(-size // 8) if count < size else 0)
        stop = middle + count * dtype.itemsize
        rows[path] = _Row(path, dtype, shape, kept, row["crc32"], start, middle, stop)
        start = stop
    if start != data.size:
        raise ValueError(f"it holds {data.size} bytes of data, but its leaves take {start}")
    return rows, data


def _dtype(name: str, path: str) -> np.dtype:
    """Returns the dtype of numbers or bools with a name; `np.dtype` knows many other kinds."""
    try:
        dtype = np.dtype(name)
    except Exception as error:  # TypeError, SyntaxError and others
        raise ValueError(f"its leaf {ascii(path)} has the dtype {ascii(name)[:60]}") from error
    is_known = dtype.kind == "b" or jnp.issubdtype(dtype, jnp.number)
    if not is_known or dtype.name != name or dtype.char in "gG":
        raise ValueError(f"its leaf {ascii(path)} has the dtype {ascii(name)[:60]}")
    return dtype


def _decode(rows: dict[str, _Row], data: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Maps paths to values and masks."""
    trees.raise_for(
        [
            row.path
            for row in rows.values()
            if zlib.crc32(data[row.start : row.stop].data) != row.crc32
        ],
        "the checksums of these leaves differ from when they were saved:",
    )
    return {path: _leaf(row, data) for path, row in rows.items()}


def _leaf(row: _Row, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and mask of a leaf."""
    # A copy is aligned, a slice may not be.
    values = data[row.middle : row.stop].copy().view(row.dtype)
    if row.dtype.kind == "b" and values.view(np.uint8).max(initial=0) > 1:
        raise ValueError(f"its leaf {ascii(row.path)} has bools that are neither 0 nor 1")
    if row.kept is None:
        return values.reshape(row.shape), np.array(True)
    if row.start == row.middle:
        return values.reshape(row.shape), np.ones(row.shape, bool)
    mask = unpack_mask(data[row.start : row.middle], row.shape)
    if np.count_nonzero(mask) != row.kept:
        raise ValueError(f"its leaf {ascii(row.path)} has another number of weights than its mask")
    whole = np.zeros(row.shape, row.dtype)
    whole[mask] = values
    return whole, mask


def _pays(values: np.ndarray, mask: np.ndarray) -> bool:
    """Tells whether the mask and the kept values are smaller than the leaf."""
    lost = values.size - int(np.count_nonzero(mask))
    return lost * values.itemsize > -(-values.size // 8)


def _restored(saved: tuple[np.ndarray, np.ndarray] | None, like: Any) -> tuple[Any, Any]:
    """Returns values and mask of a leaf in the form of `like`: an array, a number, a function."""
    if saved is None:
        return like, jax_array(np.array(True))
    values, mask = saved
    is_number = not trees.is_array(like)
    if is_number:
        return type(like)(values.item()), jax_array(mask)
    return placed_like(values, like), placed_like(mask, like)


def _check_like(rows: dict[str, _Row], like: Any, name: str) -> None:
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
