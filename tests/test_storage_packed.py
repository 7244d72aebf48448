"""Compressed files: their sizes, the error of their values, and that no file takes more memory."""

import io
import json
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxprune import files, storage
from jaxprune.storage import _format, _packing
from tests.support.mutations import changed, damaged

try:
    _packing.pack(b"", "zstd")
    CODECS = ["zlib", "zstd"]
except ModuleNotFoundError:
    CODECS = ["zlib"]


def dumped(params, masks=None, **options):
    file = io.BytesIO()
    saved = storage.save(file, params, masks, **options)
    return file.getvalue(), saved


def loaded(content, like=None):
    return storage.load(io.BytesIO(content), like)


def network(sparsity, seed=0):
    """Kernels of 300,000 weights and a hundredth as many in vectors, pruned by magnitude."""
    rng = np.random.default_rng(seed)
    params = {
        "kernels": [rng.normal(size=(3, 3, 64, 128)).astype(np.float32) * 0.05 for _ in range(4)],
        "scales": rng.normal(1, 0.1, 3000).astype(np.float32),
    }
    masks = {"kernels": [], "scales": np.array(True)}
    for kernel in params["kernels"]:
        kept = np.abs(kernel) >= np.quantile(np.abs(kernel), sparsity)
        kernel[~kept] = 0
        masks["kernels"].append(kept)
    return params, masks


# deploy.md has the goals: mask + values compressed, relative to all weights as float32.
GOALS = {
    ("exact", 0.8): 0.204,
    ("exact", 0.9): 0.107,
    ("bfloat16", 0.8): 0.095,
    ("bfloat16", 0.9): 0.051,
    ("int8", 0.8): 0.072,
    ("int8", 0.9): 0.043,
}


@pytest.mark.slow
@pytest.mark.skipif("zstd" not in CODECS, reason="zstandard is not installed")
@pytest.mark.parametrize(("values", "sparsity"), GOALS)
def test_sizes_reach_those_of_the_study(values, sparsity):
    params, masks = network(sparsity)
    content, saved = dumped(params, masks, values=values)
    dense = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert len(content) <= 1.03 * GOALS[values, sparsity] * dense
    assert 0 <= len(content) - saved.bytes < 700
    assert saved.compression == "zstd"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("values", ["exact", "bfloat16", "int8"])
def test_values_come_back_with_the_error_that_is_reported(values, codec):
    params, masks = network(0.9)
    content, saved = dumped(params, masks, values=values, compression=codec)
    again, kept = loaded(content, like=params)
    jax.tree.map(np.testing.assert_array_equal, kept["kernels"], masks["kernels"])
    assert jax.tree.map(lambda leaf: leaf.dtype, again) == jax.tree.map(lambda w: w.dtype, params)
    pairs = list(zip(jax.tree.leaves(params), map(np.asarray, jax.tree.leaves(again))))
    lost = sum(((old - new).astype(np.float64) ** 2).sum() for old, new in pairs)
    whole = sum((old.astype(np.float64) ** 2).sum() for old, _ in pairs)
    assert saved.error == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    # bfloat16 has 8 bits of mantissa; int8 127 steps up to the largest weight of an output.
    low, high = {"exact": (0, 0), "bfloat16": (1e-4, 2e-3), "int8": (1e-3, 8e-3)}[values]
    assert low <= saved.error <= high
    assert len(saved.errors) == (0 if values == "exact" else 5)
    assert values in str(saved) and ("relative error" in str(saved)) == (values != "exact")


def test_int8_is_what_the_formula_says():
    w = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    w[..., 1] = 0  # an output without weights has no scale
    again, _ = loaded(dumped({"w": w}, {"w": True}, values="int8")[0])
    scale = np.abs(w).max((0, 1)) / np.float32(127)
    wanted = np.round(w / np.where(scale > 0, scale, 1)) * scale
    np.testing.assert_array_equal(again["w"], wanted.astype(np.float32))


def test_only_wide_floats_are_coded():
    params = {
        "half": np.float16([[1.001, 2]]),
        "double": np.float64([1 + 2.0**-30]),
        "int": np.arange(4).reshape(2, 2),
        "bool": np.array([[True, False]]),
        "scalar": np.float32(1.001),
    }
    content, saved = dumped(params, values="int8")
    again, _ = loaded(content)
    assert set(saved.errors) == {"half", "double", "scalar"}
    assert again["double"].dtype == np.float64 and again["double"] == 1
    np.testing.assert_array_equal(again["int"], params["int"])
    np.testing.assert_array_equal(again["bool"], params["bool"])
    assert float(again["scalar"]) == float(jnp.bfloat16(1.001))


LEAVES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))


@given(leaves=st.lists(LEAVES, max_size=3), seed=st.integers(0, 9), codec=st.sampled_from(CODECS))
def test_exact_values_come_back_bit_for_bit(leaves, seed, codec):
    masks = [np.random.default_rng(seed).random(leaf.shape) < 0.5 for leaf in leaves]
    leaves = [np.where(mask, leaf, np.float32(0)) for leaf, mask in zip(leaves, masks)]
    again, kept = loaded(dumped(leaves, masks, compression=codec)[0], like=leaves)
    for old, new in zip(leaves, again, strict=True):
        assert np.asarray(new).tobytes() == old.tobytes()
    for old, new in zip(masks, kept, strict=True):
        assert not old.ndim or np.array_equal(old, new)


def test_values_that_are_not_finite_cannot_be_int8():
    params = {"a": np.float32([[1, np.inf]]), "b": np.ones((2, 2)), "c": np.float32([[np.nan]])}
    with pytest.raises(ValueError, match=r"(?s)must be finite to become int8.*\n  a\n  c$"):
        dumped(params, values="int8")
    again, _ = loaded(dumped(params, values="bfloat16")[0])
    assert np.isinf(again["a"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "float16"}, "`values` must be 'exact', 'bfloat16', 'int8', but is 'float16'"),
        ({"compression": "lzma"}, "`compression` must be 'auto', 'zstd', 'zlib' or None"),
        ({"compression": None, "values": "int8"}, "leave out `compression=None`"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dumped([np.ones(2)], **options)


def test_without_zstandard_zlib_is_taken_and_the_error_says_what_to_install(monkeypatch):
    content = dumped([np.ones((4, 4))])[0] if "zstd" in CODECS else None
    monkeypatch.setattr(_packing, "_zstd", lambda: None)
    assert dumped([np.ones((4, 4))])[1].compression == "zlib"
    with pytest.raises(ModuleNotFoundError, match="pip install 'jaxprune"):
        dumped([np.ones((4, 4))], compression="zstd")
    if content is not None:
        with pytest.raises(ModuleNotFoundError, match="needs Python 3.14 or the package zstandard"):
            loaded(content)


# ---- safe reading


PARAMS = {"a": np.float32([[1, 0, 2], [0, 0, -3]]), "b": np.float32([4, 5])}
MASKS = {"a": PARAMS["a"] != 0, "b": True}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("values", ["exact", "int8"])
def test_damaged_files_are_errors_or_whole(values, codec):
    content, _ = dumped(PARAMS, MASKS, values=values, compression=codec)
    whole = jax.tree.map(np.asarray, loaded(content))
    for seed in range(600):
        try:
            again = loaded(damaged(content, seed))
        except ValueError as error:
            assert "cannot be read: " in str(error), seed
        else:
            jax.tree.map(np.testing.assert_array_equal, whole, again)


def taken_apart(content):
    """Header, rows and the unpacked parts of a file."""
    arrays = np.load(io.BytesIO(content))
    header, data = json.loads(arrays["manifest"].tobytes()), arrays["data"].tobytes()
    parts, start = [], 0
    for part in header["parts"]:
        own = data[start : start + part["stored"]]
        parts.append(_packing.unpack(own, part["codec"], part["bytes"]))
        start += part["stored"]
    return header, json.loads(parts[0])["leaves"], parts


def put_together(header, rows, parts, codec="zlib", **changes):
    """A file of these parts; `changes` to the header's parts by index."""
    contents = [json.dumps({"leaves": rows}).encode(), *parts[1:]]
    packed = [_packing.pack(own, codec) for own in contents]
    listed = [
        {"codec": codec, "stored": len(own), "bytes": len(content)}
        for own, content in zip(packed, contents)
    ]
    for index, change in changes.items():
        listed[int(index[1:])] |= change
    text = json.dumps(header | {"parts": listed}).encode()
    file = io.BytesIO()
    data = np.frombuffer(b"".join(packed), np.uint8)
    np.savez(file, manifest=np.frombuffer(text, np.uint8), data=data)
    return file.getvalue()


def test_changed_rows_are_errors_or_whole():
    header, rows, parts = taken_apart(dumped(PARAMS, MASKS, values="int8")[0])
    loaded(put_together(header, rows, parts))
    for seed in range(400):
        new = changed(rows, seed)
        tracemalloc.start()
        try:
            loaded(put_together(header, new, parts))
        except ValueError as error:
            assert "cannot be read" in str(error) or "`like` is needed" in str(error), seed
        assert tracemalloc.get_traced_memory()[1] < 8_000_000, seed
        tracemalloc.stop()


REFUSED = {
    "another length": (dict(p2={"bytes": 21}), "of values, but its leaves take"),
    "longer than it says": (dict(p1={"bytes": 0}), "0 bytes of masks"),
    "a codec": (dict(p1={"codec": "lzma"}), "`parts/1/codec` must be one of"),
    "a negative size": (dict(p0={"bytes": -1}), "`parts/0/bytes` must be a whole number"),
    "beyond the data": (dict(p2={"stored": 10**6}), "its parts do not have the length of its data"),
    "a large manifest": (dict(p0={"bytes": 10**12}), "its manifest would take 1000000000000 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_do_not_fit_are_refused(name):
    changes, message = REFUSED[name]
    content = put_together(*taken_apart(dumped(PARAMS, MASKS)[0]), **changes)
    with pytest.raises(ValueError, match=message):
        loaded(content)


@pytest.mark.parametrize("codec", CODECS)
def test_a_small_file_takes_little_memory(codec):
    """Masks of 2**37 weights without one kept, and data that unpack to more than they say."""
    header, rows, parts = taken_apart(dumped(PARAMS, MASKS)[0])
    claim = rows[1] | {"shape": [2**37], "kept": None}
    empty = rows[1] | {"shape": [2**26], "kept": 0, "crc32": zlib.crc32(bytes(2**23))}
    bomb = bytes(2**26)
    cases = {
        "of values, but its leaves take": put_together(header, [claim], parts),
        "more than they say": put_together(header, rows, [b"", bomb, bomb], codec),
        "give\n? ?`like`": put_together(header, [empty], [b"", bytes(2**23), b""], codec),
    }
    cases["in place of|end where|but its leaves"] = cases.pop("more than they say")
    del bomb
    tracemalloc.start()
    try:
        for message, content in cases.items():
            assert len(content) < 200_000
            with pytest.raises(ValueError, match=message):
                loaded(content)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_what_is_expected_is_read_however_small_the_file_is():
    """With `like` its sizes are the limit; and the writer makes no file that it would refuse."""
    header, _, parts = taken_apart(dumped(PARAMS, MASKS)[0])
    size = 2**24
    row = {"path": "w", "dtype": "float32", "shape": [size], "kept": 0, "coding": "exact"}
    row["crc32"] = zlib.crc32(bytes(size // 8))
    content = put_together(header, [row], [b"", bytes(size // 8), b""])
    with pytest.raises(ValueError, match="may only hold"):
        loaded(content)
    again, _ = loaded(content, like={"w": jax.ShapeDtypeStruct((size,), jnp.float32)})
    assert not again["w"].any()
    params = {"w": jnp.zeros(size)}
    content, saved = dumped(params, {"w": False})
    assert saved.bytes >= size // 8
    assert not loaded(content)[0]["w"].any()


def test_files_of_version_2_are_read(tmp_path):
    """The bytes of a file that was written before compression."""
    text = (
        '{"format":"jaxprune.storage","version":2,"leaves":[{"path":"a","dtype":"float32",'
        '"shape":[2,3],"kept":3,"crc32":%d}]}'
    )
    bits, values = bytes([0b10100100]), np.float32([1, 2, -3]).tobytes()
    text = text % zlib.crc32(bits + values)
    np.savez(
        tmp_path / "old.npz",
        manifest=np.frombuffer(text.encode(), np.uint8),
        data=np.frombuffer(bits + values, np.uint8),
    )
    params, masks = storage.load(tmp_path / "old.npz")
    np.testing.assert_array_equal(params["a"], PARAMS["a"])
    np.testing.assert_array_equal(masks["a"], MASKS["a"])


def test_the_format_is_as_documented():
    """Version 3 taken apart with zlib and NumPy alone, int8 by its formula."""
    content, _ = dumped(PARAMS, MASKS, values="int8", compression="zlib")
    arrays = np.load(io.BytesIO(content))
    header = json.loads(arrays["manifest"].tobytes())
    assert (header["format"], header["version"]) == ("jaxprune.storage", _format._PACKED)
    data, parts = arrays["data"].tobytes(), []
    for part in header["parts"]:
        parts.append(zlib.decompress(data[: part["stored"]]))
        data = data[part["stored"] :]
    assert data == b""
    first, second = json.loads(parts[0])["leaves"]
    assert (first["coding"], second["coding"]) == ("int8", "bfloat16")
    assert parts[1] == bytes([0b10100100])
    planes = np.frombuffer(parts[2][:12], np.uint8).reshape(4, 3)
    scale = np.ascontiguousarray(planes.T).reshape(-1).view("<f4")
    np.testing.assert_allclose(scale, np.float32([1, 0, 3]) / np.float32(127))
    assert np.frombuffer(parts[2][12:15], np.int8).tolist() == [127, 85, -127]
    assert first["crc32"] == zlib.crc32(parts[1] + parts[2][:15])
    low, high = np.frombuffer(parts[2][15:], np.uint8).reshape(2, 2).astype(np.uint32)
    assert ((high << 24) | (low << 16)).view(np.float32).tolist() == [4, 5]
    assert files.parse_json(parts[0]) == json.loads(parts[0])
