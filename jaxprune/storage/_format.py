"""What the bytes of a file of parameters and masks mean.

A file is an uncompressed NumPy archive (`.npz`) of two arrays of bytes, `manifest` and `data`.

In version 3 `manifest` is a JSON header: format, version, and three parts of `data`, each with its
codec, its length here and its length unpacked. The first part is JSON: for each leaf path, dtype,
shape, the number of weights that its mask keeps (null for the scalar mask True), how the values are
coded, and a CRC-32 of its bytes. The second holds the masks of all leaves, one bit for each weight
in row-major order (left out if all are kept). The third holds the kept values, little-endian, the
first bytes of all values of a leaf before the second ones; with int8 after the float32 scales.

Version 2, which `compression=None` writes, is not compressed: `manifest` is the JSON of the leaves,
`data` has for each leaf the bits of its mask and then its values. A mask that keeps nothing has its
bits, too: so the weights of a leaf are at most eight times the bytes of the file, and no small file
makes `load` take much memory. A file of version 3 may unpack to 1024 times its length, or to 64
MiB; with `like` to what that takes. (Version 1 left out the bits of empty masks.)
"""

import json
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune import files, trees
from jaxprune.files import schemas
from jaxprune.storage import _coding, _packing
from jaxprune.storage._leaves import masked_leaves, pack_mask, unpack_mask

_FORMAT = "jaxprune.storage"
_PLAIN, _PACKED = 2, 3  # versions
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
        "version": schemas.one_of(_PLAIN),
        "leaves": schemas.each(schemas.record(_ROW)),
    }
)
_PART = {"codec": schemas.one_of(*_packing.CODECS), "stored": _SIZE, "bytes": _SIZE}
_HEADER = schemas.record(
    {
        "format": schemas.one_of(_FORMAT),
        "version": schemas.one_of(_PACKED),
        "parts": schemas.each(schemas.record(_PART), length=3),
    }
)
_CODED_ROW = _ROW | {"coding": schemas.one_of(*_coding.VALUES)}
_LEAVES = schemas.record({"leaves": schemas.each(schemas.record(_CODED_ROW))})
_AS_THEY_ARE = "as they are"  # the coding of version 2, whose bytes are those of memory


class Saved(NamedTuple):
    """What `save` wrote; `print` shows it.

    Example:
        >>> print(Saved(46_800, "zstd", "int8", 0.0041, {"head/kernel": 0.0041}))
        46,800 bytes (zstd); values as int8: relative error 0.41%, largest 0.41% in head/kernel
    """

    bytes: int  # of the content, without about 600 of the archive
    compression: str  # "zstd", "zlib" or "none"
    values: str
    error: float  # root mean square of the errors over that of the values, of all coded leaves
    errors: dict[str, float]  # the same for each coded leaf, by path

    def __str__(self) -> str:
        """Shows the size, and the error if there is one."""
        text = f"{self.bytes:,} bytes ({self.compression}); values as {self.values}"
        if not self.errors:
            return text
        worst = max(self.errors, key=lambda path: self.errors[path])
        return (
            f"{text}: relative error {self.error:.2%}, largest {self.errors[worst]:.2%} in {worst}"
        )


def encode(params: Any, masks: Any) -> tuple[dict[str, np.ndarray], Saved]:
    """Encodes parameters and masks as the two arrays of a file of version 2."""
    rows, pieces = [], []
    for path, leaf in _kept_leaves(params, masks).items():
        raw = leaf.kept.view(np.uint8)
        rows.append(_row(path, leaf, raw))
        pieces += [leaf.bits, raw]
    manifest = {"format": _FORMAT, "version": _PLAIN, "leaves": rows}
    arrays = _arrays(manifest, np.concatenate([np.empty(0, np.uint8), *pieces]))
    return arrays, Saved(_length(arrays), "none", "exact", 0.0, {})


def encode_packed(
    params: Any, masks: Any, values: str, codec: str
) -> tuple[dict[str, np.ndarray], Saved]:
    """Encodes parameters and masks as the two arrays of a file of version 3."""
    leaves = _kept_leaves(params, masks)
    codings = {path: _coding.coding_of(leaf.values, values) for path, leaf in leaves.items()}
    trees.raise_for(
        [
            path
            for path, leaf in leaves.items()
            if codings[path] == "int8" and not np.isfinite(leaf.kept.astype(np.float32)).all()
        ],
        '`params` must be finite to become int8; use `values="bfloat16"`, or mend these leaves:',
    )
    rows, bits, raws, errors, pairs = [], [], [], {}, []
    for path, leaf in leaves.items():
        coding, width = codings[path], leaf.values.shape[-1] if leaf.values.ndim else 1
        outputs = _outputs(leaf.values.shape, leaf.mask) if coding == "int8" else np.empty(0, int)
        raw = _coding.encode(leaf.kept, outputs, width, coding)
        rows.append(_row(path, leaf, raw) | {"coding": coding})
        bits.append(leaf.bits)
        raws.append(raw)
        if coding != "exact" and np.isfinite(leaf.kept).all():
            again = _coding.decode(raw, outputs, width, coding, leaf.kept.dtype)
            pairs.append((leaf.kept.astype(np.float64), again.astype(np.float64)))
            errors[path] = _coding.relative_error(pairs[-1:])
    contents = [
        json.dumps({"leaves": rows}, separators=(",", ":")).encode(),
        *(np.concatenate([np.empty(0, np.uint8), *own]).tobytes() for own in (bits, raws)),
    ]
    packed = [_packing.pack(own, codec, repeats=k < 2) for k, own in enumerate(contents)]
    codecs = [codec] * 3
    whole = sum(leaf.values.nbytes + leaf.values.size for leaf in leaves.values())
    if not _packing.is_allowed(whole, sum(map(len, packed))):  # `load` would refuse it
        packed[1:], codecs[1:] = contents[1:], ["none"] * 2
    parts = [
        {"codec": own, "stored": len(part), "bytes": len(content)}
        for own, part, content in zip(codecs, packed, contents, strict=True)
    ]
    header = {"format": _FORMAT, "version": _PACKED, "parts": parts}
    arrays = _arrays(header, np.frombuffer(b"".join(packed), np.uint8))
    error = _coding.relative_error(pairs)
    return arrays, Saved(_length(arrays), codec, values, error, errors)


def _arrays(manifest: dict[str, Any], data: np.ndarray) -> dict[str, np.ndarray]:
    text = json.dumps(manifest, separators=(",", ":"))
    return {"manifest": np.frombuffer(text.encode(), np.uint8), "data": data}


def _length(arrays: dict[str, np.ndarray]) -> int:
    return sum(own.nbytes for own in arrays.values())


class _Kept(NamedTuple):
    """A leaf as it is stored."""

    values: np.ndarray
    mask: np.ndarray | None  # None: a dense leaf
    bits: np.ndarray  # uint8, empty if all weights are kept
    kept: np.ndarray  # [count]


def _kept_leaves(params: Any, masks: Any) -> dict[str, _Kept]:
    """Maps paths to leaves with what is kept of them."""
    found = {}
    for path, (values, mask) in masked_leaves(params, masks).items():
        dense = mask.ndim < values.ndim or (masks is None and not _pays(values, mask))
        kept = values.size if dense else int(np.count_nonzero(mask))
        bits = pack_mask(mask if kept < values.size else np.ones(0, bool))
        # Boolean indexing copies; avoid that for a dense leaf.
        own = (values if kept == values.size else values[mask]).reshape(-1)
        found[path] = _Kept(values, None if dense else mask, bits, own)
    return found


def _row(path: str, leaf: _Kept, raw: np.ndarray) -> dict[str, Any]:
    """Returns what the manifest says of a leaf."""
    return {
        "path": path,
        "dtype": leaf.values.dtype.name,
        "shape": leaf.values.shape,
        "kept": None if leaf.mask is None else leaf.kept.size,
        "crc32": zlib.crc32(raw.data, zlib.crc32(leaf.bits.data)),
    }


class Row(NamedTuple):
    """What the manifest says of a leaf, and where its bytes lie."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    kept: int | None
    crc32: int
    coding: str
    bits: slice  # of the bytes of masks
    raw: slice  # of the bytes of values

    def kind(self) -> str:
        """Returns dtype and shape, as errors show them."""
        return f"{self.dtype.name}{list(self.shape)}"


class Stored(NamedTuple):
    """A file: its rows by path, and its bytes, which are unpacked when they are asked for."""

    rows: dict[str, Row]
    length: int
    bytes: Callable[[], tuple[np.ndarray, np.ndarray]]  # of masks and of values


def read(stream: Any) -> Stored:
    """Reads a file: the rows of its manifest by path, held against the bytes that are there."""
    arrays = files.read_arrays(stream, _ARRAYS)
    manifest, data = files.parse_json(arrays["manifest"].tobytes()), arrays["data"]
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if (
        version not in (_PLAIN, _PACKED)
        and isinstance(version, int)
        and manifest.get("format") == _FORMAT
    ):
        newer = "update jaxprune" if version > _PACKED else "save it again with this jaxprune"
        raise ValueError(
            f"its version is {version}, but this jaxprune reads {_PLAIN} and {_PACKED}: {newer}"
        )
    if version == _PACKED:
        return _read_packed(manifest, data)
    _MANIFEST(manifest, "its manifest")
    rows, sizes = _rows(manifest["leaves"], apart=False)
    if sum(sizes) != data.size:
        raise ValueError(f"it holds {data.size} bytes of data, but its leaves take {sum(sizes)}")
    return Stored(rows, data.size, lambda: (data, data))


def _read_packed(header: dict[str, Any], data: np.ndarray) -> Stored:
    """Reads a file of version 3; only its manifest is unpacked."""
    _HEADER(header, "its manifest")
    parts = header["parts"]
    if sum(part["stored"] for part in parts) != data.size:
        raise ValueError("its parts do not have the length of its data")
    starts = [0, parts[0]["stored"], parts[0]["stored"] + parts[1]["stored"]]

    def part(index: int) -> bytes:
        own, start = parts[index], starts[index]
        content = data[start : start + own["stored"]].tobytes()
        return _packing.unpack(content, own["codec"], own["bytes"])

    if parts[0]["bytes"] > _packing.RATIO * (parts[0]["stored"] + 64):
        raise ValueError(f"its manifest would take {parts[0]['bytes']} bytes")
    manifest = files.parse_json(part(0))
    _LEAVES(manifest, "its manifest")
    rows, sizes = _rows(manifest["leaves"], apart=True)
    announced = [own["bytes"] for own in parts[1:]]
    if sizes != announced:
        raise ValueError(
            f"it holds {announced[0]} bytes of masks and {announced[1]} of values, but its leaves "
            f"take {sizes[0]} and {sizes[1]}"
        )

    def unpacked() -> tuple[np.ndarray, np.ndarray]:
        masks, values = (np.frombuffer(part(index), np.uint8) for index in (1, 2))
        return masks, values

    return Stored(rows, data.size, unpacked)


def _rows(leaves: list[dict[str, Any]], apart: bool) -> tuple[dict[str, Row], list[int]]:
    """Returns the rows by path, and the bytes of masks and of values.

    The bytes of masks and values lie apart, or those of each leaf one after the other.
    """
    rows: dict[str, Row] = {}
    sizes = [0, 0]
    for row in leaves:
        path, shape, kept = row["path"], tuple(row["shape"]), row["kept"]
        dtype, size = _dtype(row["dtype"], path), math.prod(shape)
        coding = row.get("coding", _AS_THEY_ARE)
        count = size if kept is None else kept
        if count > size or path in rows:
            what = "occurs twice" if path in rows else f"keeps {count} of {size} weights"
            raise ValueError(f"its leaf {ascii(path)} {what}")
        if coding not in ("exact", _AS_THEY_ARE) and coding not in (
            _coding.coding_of(np.empty((1,) * len(shape), dtype), own) for own in _coding.VALUES
        ):
            raise ValueError(f"its leaf {ascii(path)} of {dtype.name} cannot be {coding}")
        own = [
            -(-size // 8) if count < size else 0,
            _coding.coded_size(coding, dtype, shape, count),
        ]
        starts = sizes if apart else [sum(sizes), sum(sizes) + own[0]]
        bits, raw = (slice(start, start + n) for start, n in zip(starts, own, strict=True))
        rows[path] = Row(path, dtype, shape, kept, row["crc32"], coding, bits, raw)
        sizes = [sizes[0] + own[0], sizes[1] + own[1]]
    return rows, sizes


def check_length(stored: Stored) -> None:
    """Raises if a small file would take much memory."""
    whole = sum(math.prod(row.shape) * (row.dtype.itemsize + 1) for row in stored.rows.values())
    if not _packing.is_allowed(whole, stored.length):
        raise ValueError(
            f"its leaves take {whole} bytes, but a file of {stored.length} may only hold "
            f"{_packing.HARMLESS + _packing.RATIO * stored.length}; if it is what you expect, give "
            "`like`"
        )


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


def decode(stored: Stored) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Maps paths to values and masks.

    Raises:
        ValueError: if bytes have changed since they were written; it lists every leaf.
    """
    masks, values = stored.bytes()
    rows = stored.rows
    trees.raise_for(
        [
            path
            for path, row in rows.items()
            if zlib.crc32(values[row.raw].data, zlib.crc32(masks[row.bits].data)) != row.crc32
        ],
        "the checksums of these leaves differ from when they were saved:",
    )
    return {path: _leaf(row, masks[row.bits], values[row.raw]) for path, row in rows.items()}


def _leaf(row: Row, bits: np.ndarray, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and mask of a leaf."""
    mask = np.array(True) if row.kept is None else np.ones(row.shape, bool)
    if bits.size:
        mask = unpack_mask(bits, row.shape)
        if np.count_nonzero(mask) != row.kept:
            raise ValueError(
                f"its leaf {ascii(row.path)} has another number of weights than its mask"
            )
    values = _values(row, mask, raw)
    if row.dtype.kind == "b" and values.view(np.uint8).max(initial=0) > 1:
        raise ValueError(f"its leaf {ascii(row.path)} has bools that are neither 0 nor 1")
    if not bits.size:
        return values.reshape(row.shape), mask
    whole = np.zeros(row.shape, row.dtype)
    whole[mask] = values
    return whole, mask


def _values(row: Row, mask: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Returns the kept values of a leaf, [count]."""
    if row.coding == _AS_THEY_ARE:
        return raw.copy().view(row.dtype)  # a copy is aligned, a slice may not be
    width, outputs = row.shape[-1] if row.shape else 1, np.empty(0, int)
    if row.coding == "int8":
        outputs = _outputs(row.shape, mask)
    return _coding.decode(raw, outputs, width, row.coding, row.dtype)


def _outputs(shape: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray:
    """Returns the index of each kept value along the last axis, int [count]."""
    if mask is None or mask.ndim < len(shape) or mask.all():
        return np.tile(np.arange(shape[-1]), math.prod(shape[:-1]))
    return np.nonzero(mask)[-1]


def _pays(values: np.ndarray, mask: np.ndarray) -> bool:
    """Tells whether the mask and the kept values are smaller than the leaf."""
    lost = values.size - int(np.count_nonzero(mask))
    return lost * values.itemsize > -(-values.size // 8)
