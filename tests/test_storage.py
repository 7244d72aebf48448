"""Files come back bit for bit or not at all, are small, and never half written."""

import dataclasses
import io
import json
import math
import os
import re
import stat
import tracemalloc
import zipfile
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.experimental import sparse
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import models, storage, trees

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
BOOLS = SHAPES.flatmap(lambda shape: hnp.arrays(bool, shape))
FLOATS = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"]
DTYPES = [*FLOATS, "int32", "uint8", "int4", "bool", "complex64", "float64", "int64", ">f4"]


def _dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def _values(rng, dtype, shape):
    """Random bytes, so NaN of any kind, infinities and -0.0 are among the floats."""
    if dtype.kind in "iub" or dtype.name == "int4":
        return rng.integers(-8 if dtype.kind == "i" else 0, 2, shape).astype(dtype)
    return np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


@st.composite
def masked_leaf(draw):
    """An array and a mask that fits it: full, or the scalar True."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype, shape = _dtype(draw(st.sampled_from(DTYPES))), draw(SHAPES)
    values = _values(rng, dtype, shape)
    if draw(st.booleans()):
        return values, np.array(True)
    mask = rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    return np.where(mask, values, np.zeros((), dtype)).astype(dtype), np.asarray(mask)


def _dumped(params, masks=None, **options):
    file = io.BytesIO()
    storage.save(file, params, masks, **options)
    return file.getvalue()


def _plain(params, masks=None):
    """The file without compression, whose bytes tests take apart."""
    return _dumped(params, masks, compression=None)


def _loaded(content, like=None):
    return storage.load(io.BytesIO(content), like)


def _assert_same_bits(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for seen, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        seen, wanted = np.asarray(seen), np.asarray(wanted)
        assert (seen.dtype.name, seen.shape) == (wanted.dtype.name, wanted.shape)
        seen, wanted = (x.astype(x.dtype.newbyteorder("="), copy=False) for x in (seen, wanted))
        assert seen.tobytes() == wanted.tobytes()


def _network(name="resnet20", density=0.28):
    """A network with random weights whose kernels are pruned at random, and its masks."""
    model = nnx.eval_shape(lambda: getattr(models, name)(rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def mask(leaf):
        order = rng.permutation(leaf.size).reshape(leaf.shape)
        return order < round(density * leaf.size) if leaf.ndim > 1 else np.ones(leaf.shape, bool)

    shapes = nnx.state(model, nnx.Param)
    masks = jax.tree.map(mask, shapes)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    return params, masks, _zeroed(params, masks)


def _zeroed(params, masks):
    return jax.tree.map(lambda leaf, mask: np.where(mask, leaf, np.zeros_like(leaf)), params, masks)


# ---- bits


@given(mask=BOOLS)
def test_bits_are_one_a_weight_and_come_back(mask):
    bits = storage.pack_mask(mask)
    flat = [*mask.reshape(-1).tolist(), *[False] * (-mask.size % 8)]
    expected = [
        sum(flag << (7 - j) for j, flag in enumerate(flat[i : i + 8]))
        for i in range(0, len(flat), 8)
    ]
    assert bits.dtype == np.uint8
    assert bits.tolist() == expected
    unpacked = storage.unpack_mask(bits, mask.shape)
    assert unpacked.dtype == bool
    np.testing.assert_array_equal(unpacked, mask, strict=True)


def test_bits_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="`mask` must be bool, but has dtype float32"):
        storage.pack_mask(np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"uint8\[2\] for a mask of shape \(3, 3\).*uint8\[3\]"):
        storage.unpack_mask(np.zeros(3, np.uint8), (3, 3))
    with pytest.raises(ValueError, match=r"but is int32\[2\]"):
        storage.unpack_mask(np.zeros(2, np.int32), (3, 3))


# ---- round trips


@pytest.mark.slow
@given(leaves=st.lists(masked_leaf(), max_size=4))
def test_every_bit_comes_back(leaves):
    params = {"list": [values for values, _ in leaves], "none": None, "empty": {}}
    masks = {"list": [mask for _, mask in leaves], "none": None, "empty": {}}
    restored = _loaded(_dumped(params, masks), like=params)
    _assert_same_bits(restored, (params, masks))


@given(leaves=st.lists(masked_leaf(), min_size=1, max_size=4))
def test_without_masks_every_bit_comes_back(leaves):
    params = {str(i): values for i, (values, _) in enumerate(leaves)}
    restored, masks = _loaded(_dumped(params))
    content = _plain(params)
    _assert_same_bits(_loaded(content), (restored, masks))
    _assert_same_bits(restored, params)
    for path, values in params.items():
        values, mask = np.asarray(values), np.asarray(masks[path])
        assert mask.shape in ((), values.shape)
        assert not values[np.broadcast_to(~mask, values.shape)].any()
    stored = np.load(io.BytesIO(content))["data"].size
    assert stored <= sum(np.asarray(values).nbytes for values in params.values())


def test_zeros_decide_only_where_they_tell_something():
    eye = np.eye(8, dtype=np.float32)
    params = {
        "bias": np.zeros(64, np.float32),
        "kernel": eye,
        "table": eye.astype(np.int32),
        "full": eye + 1,
        "one_zero": np.where(np.arange(64).reshape(8, 8) == 3, 0, eye + 1),
    }
    _, masks = _loaded(_dumped(params))
    assert masks["kernel"].tolist() == (eye > 0).tolist()
    assert {path for path, mask in masks.items() if mask.ndim} == {"kernel"}
    assert all(bool(masks[path]) for path in ("bias", "table", "full", "one_zero"))


def test_kept_minus_zero_and_nan_stay_and_masked_minus_zero_is_zero():
    payload = np.array([0x7FC00123, 0x80000000, 0x80000000, 0x3F800000], np.uint32)
    params = {"w": payload.view(np.float32)}
    (restored, _) = _loaded(_dumped(params, {"w": np.array([True, True, False, True])}))
    assert np.asarray(restored["w"]).view(np.uint32).tolist() == [
        0x7FC00123,
        0x80000000,
        0,
        0x3F800000,
    ]
    kernel = {"w": np.where(np.eye(8) > 0, np.float32(-0.0), np.float32(0))}
    restored, masks = _loaded(_dumped(kernel))
    _assert_same_bits(restored, kernel)
    assert masks["w"].tolist() == (np.eye(8) > 0).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e5m2"])
def test_signalling_nan_comes_back_without_a_warning(dtype):
    dtype = _dtype(dtype)
    bits = {1: 0x7D, 2: 0x7F81 if dtype.name == "bfloat16" else 0x7C01, 4: 0x7F800001}
    leaf = np.full((8, 8), bits[dtype.itemsize], f"u{dtype.itemsize}").view(dtype)
    with np.errstate(invalid="ignore"):
        assert np.isnan(leaf).all()
    _assert_same_bits(_loaded(_dumped({"w": leaf}))[0], {"w": leaf})
    _assert_same_bits(_loaded(_dumped({"w": leaf}, {"w": np.ones((8, 8), bool)}))[0], {"w": leaf})


def test_float8_without_a_zero_is_not_taken_for_sparse():
    tiny = np.zeros((8, 8), np.uint8).view(_dtype("float8_e8m0fnu"))
    restored, masks = _loaded(_dumped([tiny]))
    _assert_same_bits(restored, {"0": tiny})
    assert masks["0"].shape == ()


def test_scalar_masks():
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros((2, 3)), "c": jnp.zeros(())}
    restored, masks = _loaded(_dumped(params, {"a": True, "b": jnp.array(False), "c": False}))
    _assert_same_bits(restored, params)
    expected = {"a": np.array(True), "b": np.zeros((2, 3), bool), "c": np.array(False)}
    _assert_same_bits(masks, expected)


def test_scalar_masks_of_whole_branches():
    params = {"m": {"a": jnp.zeros((4, 4)), "b": jnp.zeros(4)}, "h": {"k": jnp.eye(4)}}
    same = {"m": {"a": False, "b": False}, "h": {"k": True}}
    files = io.BytesIO(), io.BytesIO()
    for file, masks in zip(files, ({"m": False, "h": True}, same), strict=True):
        storage.save(file, params, masks)
    assert files[0].getvalue() == files[1].getvalue()
    files[0].seek(0)
    _, masks = storage.load(files[0], like=params)
    assert masks["h"]["k"].shape == () and masks["m"]["a"].shape == (4, 4)
    with pytest.raises(ValueError, match="h/k: 4 of 16"):
        storage.save(io.BytesIO(), params, {"m": True, "h": False})
    with pytest.raises(ValueError, match="new: a mask without a parameter"):
        storage.save(io.BytesIO(), params, {"m": True, "h": True, "new": True})


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """Its own tree of parameters, as in Equinox."""

    weight: Any
    layers: Any


def _trees():
    kernel = jnp.arange(12.0).reshape(3, 4) % 3
    model = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0))])
    return {
        "leaf": kernel,
        "nested": {"a": [kernel, (jnp.ones(2), {})], "b/c": {3: jnp.zeros((2, 0))}},
        "named tuple": Pair(kernel, Pair(None, jnp.ones(()))),
        "module": Module(kernel, [Module(kernel, []), Module(jnp.ones(1), None)]),
        "nnx": nnx.state(model, nnx.Param),
        "nothing": {},
    }


@pytest.mark.parametrize("name", _trees())
@pytest.mark.parametrize("abstract", [False, True])
def test_any_tree_comes_back_with_like(name, abstract, tmp_path):
    params = _trees()[name]
    masks = jax.tree.map(lambda leaf: leaf != 0, params)
    storage.save(tmp_path / "file", params, masks)
    like = jax.eval_shape(lambda: params) if abstract else params
    restored = storage.load(tmp_path / "file", like)
    _assert_same_bits(restored, (params, masks))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_without_like_paths_become_dicts():
    leaf = jnp.ones(2)
    restored, masks = _loaded(_dumped({"a": [leaf, {"b/c": leaf}], "d": leaf}))
    _assert_same_bits(restored, {"a": {"0": leaf, "1": {"b": {"c": leaf}}}, "d": leaf})
    assert masks["a"]["1"]["b"]["c"].tolist() is True
    _assert_same_bits(_loaded(_dumped(leaf))[0], leaf)
    _assert_same_bits(_loaded(_dumped({})), ({}, {}))
    for clash in (
        {"a": leaf, "a/b": leaf, "ok": leaf},
        {"a": {"b": leaf}, "a/b/c": leaf},
        {"a": {"b": {"c": leaf}}, "a/b": leaf},
    ):
        with pytest.raises(ValueError, match="`like` is needed to read .*leaf and dict at once"):
            _loaded(_dumped(clash))
        _assert_same_bits(_loaded(_dumped(clash), clash)[0], clash)


def test_views_are_saved_in_row_major_order():
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    params = {"strided": whole[0, ::2], "transposed": whole.T, "backwards": whole[::-1, ::-2]}
    masks = jax.tree.map(lambda leaf: leaf > 0, params)
    for kept in (None, masks, jax.tree.map(lambda _: True, params)):
        _assert_same_bits(_loaded(_dumped(params, kept))[0], params)


def test_64_bits_stay_64_bits():
    params = {"f": np.array([1 / 3]), "i": np.array([2**40])}
    restored, _ = _loaded(_dumped(params))
    _assert_same_bits(restored, params)
    with jax.enable_x64(True):
        restored, _ = _loaded(_dumped(params))
        _assert_same_bits(restored, params)
        assert isinstance(restored["f"], jax.Array)


def test_sharded_leaves_are_saved_whole():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    leaf = jax.device_put(np.eye(16, dtype=np.float32), sharding)
    assert _dumped([leaf], [leaf > 0]) == _dumped([np.asarray(leaf)], [np.eye(16) > 0])


@pytest.mark.parametrize("abstract", [True, False])
def test_leaves_and_masks_go_where_like_says(abstract):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"pruned": P("data", "model"), "dense": P(None, "model"), "bias": P("model")}
    sizes = {"pruned": (8, 8), "dense": (8, 8), "bias": (8,)}
    params = {n: np.arange(1.0, 1 + np.prod(s), dtype="f4").reshape(s) for n, s in sizes.items()}
    masks = {"pruned": params["pruned"] % 3 == 0, "dense": True, "bias": True}
    params["pruned"] = np.where(masks["pruned"], params["pruned"], np.float32(0))
    placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in params.items()}
    like = placed
    if abstract:
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
        )
    file = io.BytesIO(_dumped(params, masks))
    restored, kept = storage.load(file, like=like)
    for name, leaf in restored.items():
        assert leaf.sharding == placed[name].sharding, name
        np.testing.assert_array_equal(leaf, params[name])
    assert kept["pruned"].sharding == placed["pruned"].sharding
    np.testing.assert_array_equal(kept["pruned"], masks["pruned"])
    assert kept["dense"].shape == ()
    # An array that nobody has placed may go anywhere, and so may what is like it.
    (free,), _ = storage.load(io.BytesIO(_dumped([np.ones(4, "f4")])), like=[jnp.zeros(4)])
    assert not free.committed


# ---- the file


def test_a_sparse_network_takes_less_than_a_third(tmp_path):
    params, masks, pruned = _network()
    flags = trees.prunable_flags(params)
    kernels = trees.pick(masks, flags)
    sparsity = 1 - sum(int(mask.sum()) for mask in kernels) / sum(mask.size for mask in kernels)
    assert sparsity == pytest.approx(0.72, abs=1e-3)
    storage.save(tmp_path / "dense", params, compression=None)
    storage.save(tmp_path / "masked", pruned, masks, compression=None)
    storage.save(tmp_path / "zeros", pruned, compression=None)
    dense, masked, zeros = (
        (tmp_path / name).stat().st_size for name in ("dense", "masked", "zeros")
    )
    assert max(masked, zeros) <= 0.33 * dense
    bits, kept = (
        sum(mask.size for mask in kernels) / 8,
        sum(m.sum() for m in jax.tree.leaves(masks)),
    )
    assert 0 < masked - (bits + 4 * kept) < 110 * len(flags) + 1000
    _assert_same_bits(storage.load(tmp_path / "masked", params), (pruned, masks))


def _read_by_the_book(path):
    """Leaves and masks from the documented format alone, with NumPy."""
    file = np.load(path, allow_pickle=False)
    manifest, data = json.loads(file["manifest"].tobytes()), file["data"].tobytes()
    assert (manifest["format"], manifest["version"]) == ("jaxprune.storage", 2)
    assert sorted(file.files) == ["data", "manifest"]
    leaves = {}
    for row in manifest["leaves"]:
        size = math.prod(row["shape"])
        kept = size if row["kept"] is None else row["kept"]
        bits = b"" if kept == size else data[: math.ceil(size / 8)]
        values, data = data[len(bits) : len(bits) + 4 * kept], data[len(bits) + 4 * kept :]
        assert row["dtype"] == "float32"
        assert row["crc32"] == zlib.crc32(bits + values)
        text = "".join(f"{byte:08b}" for byte in bits)[:size] or "01"[kept > 0] * size
        left = iter(np.frombuffer(values, "<f4").tolist())
        flat = [next(left) if bit == "1" else 0.0 for bit in text]
        assert not list(left)
        leaves[row["path"]] = np.array(flat, np.float32).reshape(row["shape"])
    assert data == b""
    return leaves


def test_the_format_is_as_documented(tmp_path):
    params, masks, _ = _network("resnet8")
    head = masks["head"]
    head["kernel"][...], head["bias"][...] = np.zeros_like(head["kernel"][...]), np.array(True)
    pruned = _zeroed(params, masks)
    storage.save(tmp_path / "file.npz", pruned, masks, compression=None)
    leaves = _read_by_the_book(tmp_path / "file.npz")
    assert list(leaves) == list(trees.leaf_by_path(params))
    for path, leaf in trees.leaf_by_path(pruned).items():
        np.testing.assert_array_equal(leaves[path], leaf, strict=True)


def test_the_same_parameters_give_the_same_bytes(tmp_path):
    params = {"w": jnp.eye(5)}
    storage.save(tmp_path / "a", params)
    assert (tmp_path / "a").read_bytes() == _dumped(params) == _dumped(_loaded(_dumped(params))[0])


def test_an_existing_file_is_kept_unless_told(tmp_path):
    path = tmp_path / "file.npz"
    storage.save(path, [jnp.zeros(2)])
    with pytest.raises(FileExistsError, match=r"`path` .*file\.npz exists.*overwrite=True"):
        storage.save(path, [jnp.ones(2)])
    assert storage.load(str(path))[0]["0"].tolist() == [0, 0]
    storage.save(str(path), [jnp.ones(2)], overwrite=True)
    assert storage.load(path)[0]["0"].tolist() == [1, 1]
    assert os.listdir(tmp_path) == ["file.npz"]


def test_the_umask_decides_who_may_read(tmp_path):
    old = os.umask(0o027)
    try:
        storage.save(tmp_path / "file", [jnp.zeros(2)])
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def _half_written(file, **_):
    file.write(b"half")
    raise OSError("disk full")


def _interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("module", "name", "failure", "error"),
    [
        (np, "savez", _half_written, OSError),
        (np, "savez", _interrupted, KeyboardInterrupt),
        (os, "fsync", _interrupted, KeyboardInterrupt),
        (os, "replace", _interrupted, KeyboardInterrupt),
    ],
)
def test_a_failed_save_leaves_the_old_file(
    there, module, name, failure, error, tmp_path, monkeypatch
):
    path = tmp_path / "file"
    if there:
        storage.save(path, [jnp.zeros(2)])
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    monkeypatch.setattr(module, name, failure)
    with pytest.raises(error):
        storage.save(path, [jnp.ones(2)], overwrite=True)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_the_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def replaced(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        events.append(("replace", os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    storage.save(tmp_path / "file", [jnp.zeros(2)])
    size = (tmp_path / "file").stat().st_size
    assert events[:2] == [("fsync", size), ("replace", size)]


# ---- damage


def _small_file():
    params = {"a": np.float32([[1, 0, 2], [0, 0, -3]]), "b": np.float32([4, 5])}
    masks = {"a": params["a"] != 0, "b": True}
    return _plain(params, masks), (params, masks)


def test_every_cut_is_an_error():
    content, _ = _small_file()
    for length in range(len(content)):
        with pytest.raises(ValueError, match="`path` .* cannot be read: ."):
            _loaded(content[:length])


@pytest.mark.parametrize("flip", [0x01, 0x10, 0xFF])
def test_every_flipped_byte_is_an_error_or_harmless(flip):
    content, expected = _small_file()
    data = np.load(io.BytesIO(content))
    harmless = set()
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= flip
        try:
            restored = _loaded(bytes(damaged))
        except ValueError as error:
            assert "cannot be read: " in str(error)
        else:
            _assert_same_bits(restored, expected)
            harmless.add(i)
    # Time stamps and the like may be; never the manifest or the data.
    for name in ("manifest", "data"):
        start = content.index(data[name].tobytes())
        assert not harmless & set(range(start, start + data[name].nbytes))


def _repacked(content, manifest=None, data=None, **more):
    """The file with other arrays and right checksums of the archive."""
    file = np.load(io.BytesIO(content))
    old = json.loads(file["manifest"].tobytes())
    text = json.dumps(old | (manifest or {})).encode()
    data = file["data"] if data is None else data
    return _savez(manifest=np.frombuffer(text, np.uint8), data=data, **more)


def test_leaves_with_another_checksum_are_named(tmp_path):
    content, expected = _small_file()
    _assert_same_bits(_loaded(_repacked(content)), expected)
    data = np.load(io.BytesIO(content))["data"]
    both = data.copy()
    both[[0, -1]] ^= 1
    (tmp_path / "file").write_bytes(_repacked(content, data=both))
    with pytest.raises(ValueError, match=r"(?s)`path` .*file cannot be read.*checksum.*  a\n  b$"):
        storage.load(tmp_path / "file")
    both[0] ^= 1
    with pytest.raises(ValueError, match=r"saved:\n  b$"):
        _loaded(_repacked(content, data=both))
    with pytest.raises(ValueError, match=f"holds {data.size - 1} bytes .* take {data.size}"):
        _loaded(_repacked(content, data=data[:-1]))
    with pytest.raises(ValueError, match=f"holds {data.size + 1} bytes .* take {data.size}"):
        _loaded(_repacked(content, data=np.append(data, data[:1])))


def _savez(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def test_other_files_are_refused():
    content, _ = _small_file()
    old = {"version": 1}
    manifest = np.load(io.BytesIO(content))["manifest"]
    names = "must hold manifest.npy, data.npy, but holds "
    cases = {
        "File is not a zip file": [b"", b"text", _npy(np.ones(2)), _npy(np.array(None))],
        f"{names}kernel.npy": [_savez(kernel=np.ones(2))],
        f"{names}manifest.npy": [_savez(manifest=manifest)],
        f"{names}manifest.npy, data.npy, more.npy": [_repacked(content, more=np.ones(2))],
        "`format` must be one of 'jaxprune.storage', but is 'other'": [
            _repacked(content, {"format": "other"}),
            _repacked(content, {"format": "other", "version": 1}),
        ],
        "version is 4, but this jaxprune reads 2 and 3: update": [
            _repacked(content, {"version": 4})
        ],
        "version is 1, but this jaxprune reads 2 and 3: save it again": [_repacked(content, old)],
        "`manifest` must be uint8": [
            _savez(manifest=np.array(None), data=manifest),
            _savez(manifest=np.ones(3), data=manifest),
            _savez(manifest=np.array(b"[]"), data=manifest),
        ],
        "its manifest must be an object, but is list": [
            _savez(manifest=np.frombuffer(b"[]", np.uint8), data=manifest)
        ],
        "nested too deeply": [
            _savez(manifest=np.frombuffer(b"[" * 10**6, np.uint8), data=manifest)
        ],
    }
    for reason, files in cases.items():
        for file in files:
            with pytest.raises(ValueError, match=re.escape(reason)):
                _loaded(file)


def _changed(content, index, **changes):
    """The file with another row in its manifest, and the right checksums."""
    file = np.load(io.BytesIO(content))
    rows = json.loads(file["manifest"].tobytes())["leaves"]
    rows[index] |= changes
    return _repacked(content, {"leaves": rows})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": [2, -3]}, "`leaves/0/shape/1` must be a whole number of at least 0, but is -3"),
        ({"shape": [2, True]}, "`leaves/0/shape/1` must be a whole number"),
        ({"shape": [2, 3.0]}, "`leaves/0/shape/1` must be a whole number"),
        ({"shape": None}, "`leaves/0/shape` must be a list, but is None"),
        ({"shape": [10**9, 1]}, "bytes of data, but its leaves take 125000020"),
        ({"shape": [10**9, 1], "kept": 0}, "bytes of data, but its leaves take 125000008"),
        ({"kept": 7}, "leaf 'a' keeps 7 of 6 weights"),
        ({"kept": -1}, "`leaves/0/kept` must be a whole number"),
        ({"kept": True}, "`leaves/0/kept` must be a whole number"),
        ({"path": "b"}, "leaf 'b' occurs twice"),
        ({"path": 3}, "`leaves/0/path` must be a text, but is 3"),
        ({"crc32": -1}, "`leaves/0/crc32` must be a whole number in 0 .. 4294967295, but is -1"),
        ({"dtype": "object"}, "leaf 'a' has the dtype 'object'"),
        ({"dtype": "f4"}, "leaf 'a' has the dtype 'f4'"),
        ({"dtype": "U5"}, "leaf 'a' has the dtype 'U5'"),
        ({"dtype": "(2,)f4"}, "leaf 'a' has the dtype '(2,)f4'"),
        ({"dtype": "datetime64"}, "leaf 'a' has the dtype 'datetime64'"),
        ({"dtype": "longdouble"}, "leaf 'a' has the dtype 'longdouble'"),
        ({"dtype": "{"}, "leaf 'a' has the dtype '{'"),
        ({"more": 1}, "`leaves/0` must not have `more`"),
    ],
)
def test_rows_that_do_not_fit_are_named(changes, reason):
    content, _ = _small_file()
    with pytest.raises(ValueError) as error:
        _loaded(_changed(content, 0, **changes))
    assert "`path` " in str(error.value) and " cannot be read: " in str(error.value)
    assert reason in str(error.value)


def test_one_value_does_not_stand_for_all():
    """NumPy would give one value to all three weights that the mask keeps."""
    data = np.load(io.BytesIO(_small_file()[0]))["data"]
    short = np.concatenate([data[:5], data[13:]])  # the mask, and one of three values
    crc = zlib.crc32(short[:5])
    content = _changed(_small_file()[0], 0, kept=1, crc32=crc)
    with pytest.raises(ValueError, match="leaf 'a' has another number of weights than its mask"):
        _loaded(_repacked(content, data=short))


def test_bools_are_0_or_1():
    content = _plain([np.array([True, False])])
    data = np.uint8([1, 2])
    with pytest.raises(ValueError, match="bools that are neither 0 nor 1"):
        _loaded(_repacked(_changed(content, 0, crc32=zlib.crc32(data)), data=data))


def test_a_small_file_takes_little_memory():
    """An archive that unpacks to 200 MB, and leaves that claim more bytes than there are."""
    bomb = io.BytesIO()
    zeros = np.zeros(200_000_000, np.uint8)
    np.savez_compressed(bomb, manifest=zeros, data=zeros[:1])
    content, _ = _small_file()
    claims = [
        _changed(content, 0, shape=[10**9, 1], kept=0),
        _changed(content, 1, shape=[10**9], kept=0),
        _changed(content, 1, shape=[2**40]),
        _npz_header(content, 2**40),
    ]
    del zeros
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="must not be compressed"):
            _loaded(bomb.getvalue())
        for claim in claims:
            with pytest.raises(ValueError, match="cannot be read"):
                _loaded(claim)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def _npz_header(content, size):
    """The file whose data have another size in their header, with the archive's right checksum."""
    file = np.load(io.BytesIO(content))
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w") as archive:
        archive.writestr("manifest.npy", _npy(file["manifest"]))
        header = io.BytesIO()
        kind = {"descr": "|u1", "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(header, kind)
        archive.writestr("data.npy", header.getvalue() + file["data"].tobytes())
    return new.getvalue()


def test_a_leaf_without_a_kept_weight_has_its_bits():
    """Its size is held against the bytes of the file, like that of any other leaf."""
    params, masks = [jnp.zeros((4, 100))], [False]
    content = _plain(params, masks)
    assert np.load(io.BytesIO(content))["data"].tolist() == [0] * 50
    _assert_same_bits(_loaded(content)[0], {"0": params[0]})


def test_a_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.load(tmp_path / "nowhere.npz")
    with pytest.raises(FileNotFoundError):
        storage.save(tmp_path / "nowhere" / "file.npz", [jnp.ones(2)])


# ---- errors that name every leaf


def test_another_tree_is_refused_and_named(tmp_path):
    leaf = jnp.ones((2, 3))
    storage.save(tmp_path / "file", {"good": leaf, "old": leaf, "shape": leaf, "type": leaf})
    like = {"good": leaf, "new": leaf, "shape": leaf.T, "type": leaf.astype(jnp.bfloat16)}
    with pytest.raises(ValueError) as caught:
        storage.load(tmp_path / "file", like)
    assert str(caught.value).splitlines() == [
        f"`like` must have the leaves of `path` {tmp_path / 'file'}:",
        "  new: missing in the file",
        "  old: only in the file",
        "  shape: float32[2, 3] in the file, float32[3, 2] in `like`",
        "  type: float32[2, 3] in the file, bfloat16[2, 3] in `like`",
    ]


@pytest.mark.parametrize("function", [_dumped, storage.to_bcoo])
def test_masks_that_do_not_fit_are_named(function):
    params = {name: np.zeros((2, 2)) for name in ("good", "shape", "dtype", "missing")}
    masks = {
        "good": np.zeros((2, 2), bool),
        "shape": np.ones((4, 1), bool),
        "dtype": np.ones((2, 2), np.float32),
        "extra": np.ones(1, bool),
    }
    with pytest.raises(ValueError) as caught:
        function(params, masks)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: has no mask",
        "  extra: a mask without a parameter",
        "  dtype: its mask has dtype float32",
        "  shape: has shape (2, 2), its mask (4, 1)",
    ]


@pytest.mark.parametrize("function", [_dumped, storage.to_bcoo])
def test_masked_weights_that_are_not_zero_are_named(function):
    params = {
        "a": np.ones((2, 3)),
        "b": np.zeros(3),
        "c": np.array([np.nan, -0.0]),
        "d": np.ones(2),
    }
    masks = {"a": np.eye(2, 3) > 0, "b": False, "c": False, "d": True}
    with pytest.raises(ValueError, match=r"`jaxprune\.apply_masks` first") as caught:
        function(params, masks)
    assert str(caught.value).splitlines()[1:] == ["  a: 4 of 6", "  c: 1 of 2"]


def test_leaves_that_are_not_numbers_are_named(tmp_path):
    params = {
        "key": jax.random.key(0),
        "long": np.ones(2, np.longdouble),
        "object": np.array([None]),
        "spec": jax.ShapeDtypeStruct((2,), jnp.float32),
        "when": np.array(["2020-01-01"], "datetime64[D]"),
        "w": jnp.ones(2),
        "data": jax.random.key_data(jax.random.key(0)),
    }
    with pytest.raises(ValueError, match=r"`params` .*`jax\.random\.key_data`") as caught:
        storage.save(tmp_path / "file", params)
    named = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert named == ["key", "long", "object", "spec", "when"]
    assert os.listdir(tmp_path) == []


# ---- whole modules


def _module():
    """Leaves as a module of Equinox has them: arrays, functions, strings and settings."""
    leaves = {"act": jax.nn.relu, "mode": "same", "rate": 0.5, "train": False, "width": 2}
    return leaves | {"weight": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "bias": jnp.zeros(2)}


def _masks_of(module):
    return jax.tree.map(lambda _: True, module) | {"weight": module["weight"] != 0}


def _is_same(a, b):
    return type(a) is type(b) and (bool((a == b).all()) if hasattr(a, "shape") else a == b)


@pytest.mark.parametrize("masks", [None, "whole", "arrays"])
def test_a_whole_module_comes_back(masks):
    module = _module()
    whole = _masks_of(module)
    arrays = {key: mask if hasattr(module[key], "shape") else None for key, mask in whole.items()}
    content = _dumped(module, {None: None, "whole": whole, "arrays": arrays}[masks])
    restored, kept = _loaded(content, module)
    assert all(_is_same(restored[key], module[key]) for key in module)
    assert {key: bool(np.all(mask)) for key, mask in kept.items()} == {
        key: key != "weight" for key in module
    }
    # Without `like` there is nothing that functions and strings could come from.
    assert set(_loaded(content)[0]) == set(module) - {"act", "mode"}
    # Only the arrays, as `equinox.filter` gives them.
    only = {key: leaf if hasattr(leaf, "shape") else None for key, leaf in module.items()}
    restored, kept = _loaded(content, only)
    assert jax.tree.structure(restored) == jax.tree.structure(kept) == jax.tree.structure(only)
    _assert_same_bits(restored, only)
    _assert_same_bits(
        _loaded(_dumped(only), module | {"rate": None, "train": None} | {"width": None})[0][
            "weight"
        ],
        module["weight"],
    )


def test_a_whole_module_as_sparse_matrices():
    module = _module()
    tree = storage.to_bcoo(module, _masks_of(module))
    assert tree["weight"].nse == 2 and tree["act"] is module["act"] and tree["rate"] == 0.5
    assert all(_is_same(storage.from_bcoo(tree)[key], module[key]) for key in module)


@pytest.mark.slow
def test_files_of_a_whole_equinox_module():
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.Sequential(
        [eqx.nn.MLP(3, 4, 8, 2, key=jax.random.key(0)), eqx.nn.Dropout(0.25)]
    )
    pruned, masks = jaxprune.prune(module, 0.5)
    restored, kept = _loaded(_dumped(pruned, masks), module)
    x = jnp.arange(3.0)
    assert (restored(x, key=jax.random.key(1)) == pruned(x, key=jax.random.key(1))).all()
    assert jax.tree.structure(restored) == jax.tree.structure(module)
    assert sum(int((~mask).sum()) for mask in jax.tree.leaves(kept)) == (3 * 8 + 8 * 8 + 8 * 4) // 2


# ---- sparse matrices


@pytest.mark.slow
@given(leaves=st.lists(masked_leaf(), max_size=3))
def test_bcoo_holds_what_is_kept_and_comes_back(leaves):
    leaves = [leaf for leaf in leaves if leaf[0].dtype.itemsize <= 4]
    params, masks = [values for values, _ in leaves], [mask for _, mask in leaves]
    tree = storage.to_bcoo(params, masks)
    for matrix, values, mask in zip(tree, params, masks, strict=True):
        if not values.ndim or mask.all():
            assert matrix is values
            continue
        assert isinstance(matrix, sparse.BCOO)
        assert (matrix.n_batch, matrix.n_dense, matrix.shape) == (0, 0, values.shape)
        assert matrix.indices.tolist() == np.argwhere(mask).tolist()
        assert matrix.indices_sorted and matrix.unique_indices
        _assert_same_bits(matrix.data, values[mask])
    _assert_same_bits(storage.from_bcoo(tree), params)


@pytest.mark.parametrize(("rows", "columns", "density"), [(4, 6, 0.4), (5, 1, 0.6), (3, 2, 0.0)])
def test_sparse_products_are_the_dense_ones(rows, columns, density):
    rng = np.random.default_rng(0)
    mask = rng.random((rows, columns)) < density
    kernel = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    (matrix,) = storage.to_bcoo([kernel], [mask])
    right = jnp.asarray(rng.normal(size=(columns, 3)), jnp.float32)
    left = jnp.asarray(rng.normal(size=(3, rows)), jnp.float32)
    product = jax.jit(lambda a, b: a @ b)
    np.testing.assert_allclose(product(matrix, right), kernel @ right, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(product(left, matrix), left @ kernel, rtol=1e-5, atol=1e-6)


def test_without_masks_kernels_with_zeros_become_sparse():
    minus = np.where(np.eye(3) > 0, np.float32(-0.0), np.float32(0))
    params = {
        "bias": jnp.zeros(3),
        "count": jnp.zeros((2, 2), int),
        "k": minus,
        "f": jnp.ones((2, 2)),
    }
    tree = storage.to_bcoo(params)
    assert [path for path, leaf in tree.items() if isinstance(leaf, sparse.BCOO)] == ["k"]
    assert tree["k"].nse == 3
    _assert_same_bits(storage.from_bcoo(tree), params)


@pytest.mark.slow
def test_a_model_goes_to_bcoo_and_back():
    layers = [nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(1))]
    params = nnx.state(nnx.List(layers), nnx.Param)
    masks = jax.tree.map(lambda leaf: leaf > 0 if leaf.ndim > 1 else leaf == 0, params)
    pruned = jaxprune.apply_masks(params, masks)
    tree = storage.to_bcoo(pruned, masks)
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, sparse.BCOO))
    kept = [leaf.nse for leaf in leaves if isinstance(leaf, sparse.BCOO)]
    assert kept == [int(mask.sum()) for mask in jax.tree.leaves(masks) if mask.ndim > 1]
    _assert_same_bits(storage.from_bcoo(tree), pruned)


def test_other_sparse_matrices_become_dense_too():
    data, rows = jnp.array([1.0, 2.0]), jnp.array([[0], [0]])
    twice = sparse.BCOO((data, rows), shape=(2,))
    batched = sparse.BCOO((data[:, None], rows[:, None]), shape=(2, 2), unique_indices=True)
    padded = sparse.BCOO((data, jnp.array([[1], [2]])), shape=(2,), unique_indices=True)
    dense = storage.from_bcoo({"twice": twice, "batched": batched, "padded": padded, "rest": data})
    assert jax.tree.map(lambda leaf: leaf.tolist(), dense) == {
        "twice": [3.0, 0.0],
        "batched": [[1.0, 0.0], [2.0, 0.0]],
        "padded": [0.0, 1.0],
        "rest": [1.0, 2.0],
    }
