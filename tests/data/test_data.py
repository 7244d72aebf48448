"""Data sets are fixed, checked and complete; the pipeline's order survives a restart."""

import functools
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import data
from jaxprune.data import digits, fashion_mnist
from jaxprune.data import fashion_mnist_files as official

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # as written in the package's file list


# --- What every data set promises -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keywords", "shape", "sizes"),
    [
        ("digits", {}, (8, 8, 1), (1437, 360)),
        (
            "synthetic",
            {"image_shape": (5, 7, 2), "train_size": 300, "test_size": 90},
            (5, 7, 2),
            (300, 90),
        ),
    ],
)
def test_shapes_types_ranges_and_statistics(name, keywords, shape, sizes):
    loaded = data.load(name, **keywords)
    assert loaded.name == name and loaded.num_classes == 10
    for split, size in zip((loaded.train, loaded.test), sizes, strict=True):
        assert split.images.shape == (size, *shape) and split.images.dtype == np.uint8
        assert split.labels.shape == (size,) and split.labels.dtype == np.int32
        assert set(split.labels) == set(range(10))
    assert loaded.train.images.min() < 5 and loaded.train.images.max() > 250
    scaled = loaded.train.images / 255
    np.testing.assert_allclose(loaded.mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(loaded.std, scaled.std(axis=(0, 1, 2)), rtol=1e-9)
    assert all(type(x) is float for x in (*loaded.mean, *loaded.std))


@pytest.mark.parametrize(("name", "least"), [("digits", 0.85), ("synthetic", 0.99)])
def test_labels_belong_to_their_images(name, least):
    train, test = data.load(name)[1:3]
    flat = [split.images.reshape(len(split.images), -1).astype(float) for split in (train, test)]
    centres = np.stack([flat[0][train.labels == label].mean(axis=0) for label in range(10)])
    nearest = ((flat[1][:, None] - centres) ** 2).sum(axis=-1).argmin(axis=-1)
    assert (nearest == test.labels).mean() > least


def test_make_dataset_names_every_problem():
    good = data.Split(np.zeros((2, 3, 3, 1), np.uint8), np.zeros(2, np.int32))
    floats = good._replace(images=np.zeros((2, 3, 3, 1)))
    with pytest.raises(ValueError, match=r"train images.*float64.*; test labels must be 0 \.\. 1"):
        data.make_dataset("x", floats, good._replace(labels=np.array([0, 2], np.int32)), 2)
    with pytest.raises(ValueError, match=r"test labels must be int32 \[2\]; got int64"):
        data.make_dataset("x", good, good._replace(labels=np.zeros(2, np.int64)), 2)
    smaller = data.Split(np.zeros((2, 2, 3, 1), np.uint8), good.labels)
    with pytest.raises(ValueError, match=r"train images are \(3, 3, 1\), test images \(2, 3, 1\)"):
        data.make_dataset("x", good, smaller, 2)


def test_load_rejects_unknown_names_and_keywords():
    with pytest.raises(ValueError, match="`name` must be one of digits.*got 'mnist'"):
        data.load("mnist")
    with pytest.raises(TypeError, match="`digits` takes no keyword train_size"):
        data.load("digits", train_size=3)
    with pytest.raises(TypeError, match="`synthetic` takes no keyword sise.*image_shape"):
        data.load("synthetic", sise=3)


# --- Digits ---------------------------------------------------------------------------------------


def test_digits_split_is_disjoint_stratified_and_never_changes():
    from sklearn.datasets import load_digits

    labels = load_digits().target.astype(np.int32)
    train, test = digits._split_indices(labels)
    assert sorted([*train, *test]) == list(range(1797)) and len(test) == 360
    share = np.bincount(labels[test]) - np.bincount(labels) / 5
    assert np.abs(share).max() < 1
    seen = hashlib.sha256(test.astype("<i4").tobytes()).hexdigest()
    assert seen == "7124a96532245247e781f10d98252665e58717afa0e5b262bc315eedc96c0a10"


def test_digits_pixels_are_scaled_to_the_whole_range():
    from sklearn.datasets import load_digits

    sixteenths = load_digits().images
    test = digits._split_indices(load_digits().target.astype(np.int32))[1]
    seen = data.load("digits").test.images[..., 0]
    np.testing.assert_array_equal(seen, np.floor(sixteenths[test] * 255 / 16 + 0.5))


# --- Synthetic ------------------------------------------------------------------------------------


def test_synthetic_depends_on_the_seed_only():
    make = functools.partial(data.load, "synthetic", image_shape=(6, 6, 3), train_size=20)
    first, again, other = make(seed=3), make(seed=3), make(seed=4)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.train.images != other.train.images).mean() > 0.9
    assert (first.train.images[:20] != first.test.images[:20]).mean() > 0.9
    # Fixed for good: a benchmark of next year runs on the images of today.
    seen = hashlib.sha256(first.train.images.tobytes() + first.train.labels.tobytes()).hexdigest()
    assert seen == "c2fc85129116464ffef20d9784f2cb0cc9550a2a04b09e17683722a062fc91ba"


def test_synthetic_names_every_bad_argument():
    with pytest.raises(ValueError, match="`height`.*got 0; `num_classes`.*got -1; `seed`.*got -2"):
        data.load("synthetic", image_shape=(0, 1, 1), num_classes=-1, seed=-2)
    with pytest.raises(ValueError, match=r"`image_shape` must be .*got \(8, 8\)"):
        data.load("synthetic", image_shape=(8, 8))


# --- Fashion-MNIST --------------------------------------------------------------------------------


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with small files in Debian's form, and checksums of their official form."""
    rng = np.random.default_rng(0)
    folder, arrays, files = tmp_path / "source", {}, {}
    folder.mkdir()
    for count, names in ((12, official.TRAIN), (5, official.TEST)):
        arrays[names[0]] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[names[1]] = rng.integers(0, 10, count, dtype=np.uint8)
    for name, array in arrays.items():
        stripped = gzip.compress(idx(array), mtime=0)
        (folder / name).write_bytes(stripped)
        body = b"\x1f\x8b\x08\x08" + b"\x2e\x86\xa7\x59" + b"\x00\x03"
        whole = body + name[:-3].encode() + b"\x00" + stripped[10:]
        assert gzip.decompress(whole) == idx(array)
        files[name] = official.Official(hashlib.sha256(whole).hexdigest(), 0x59A7862E)
    monkeypatch.setattr(official, "FILES", files)
    monkeypatch.setattr(official, "DEBIAN_DIR", tmp_path / "absent")
    monkeypatch.setattr(official, "URL", "http://127.0.0.1:9/")  # nobody listens there
    monkeypatch.setenv("JAXPRUNE_DATA_DIR", str(tmp_path / "prepared"))
    return folder, arrays


def assert_loaded(loaded, arrays):
    for split, names in ((loaded.train, official.TRAIN), (loaded.test, official.TEST)):
        np.testing.assert_array_equal(split.images[..., 0], arrays[names[0]])
        np.testing.assert_array_equal(split.labels, arrays[names[1]])


def test_fashion_mnist_is_prepared_once_in_the_order_of_the_files(tiny, tmp_path):
    folder, arrays = tiny
    assert_loaded(data.load("fashion_mnist", source_dir=folder), arrays)
    written = {path.name for path in (tmp_path / "prepared").iterdir()}
    assert written == {"fashion_mnist", "fashion_mnist-1.0.0.npz", "downloads"}
    # Neither the files nor the records are read again.
    folder.rename(tmp_path / "gone")
    assert_loaded(data.load("fashion_mnist", source_dir=folder), arrays)
    # The records alone are enough to make the arrays again.
    (tmp_path / "prepared/fashion_mnist-1.0.0.npz").unlink()
    assert_loaded(data.load("fashion_mnist"), arrays)


def test_fashion_mnist_folders(tiny, tmp_path, monkeypatch):
    folder, arrays = tiny
    monkeypatch.setattr(official, "DEBIAN_DIR", folder)
    assert_loaded(data.load("fashion_mnist", data_dir=tmp_path / "explicit"), arrays)
    assert (tmp_path / "explicit/fashion_mnist-1.0.0.npz").exists()
    monkeypatch.delenv("JAXPRUNE_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert_loaded(data.load("fashion_mnist"), arrays)
    assert (tmp_path / "home/.cache/jaxprune/fashion_mnist-1.0.0.npz").exists()


def test_fashion_mnist_is_downloaded_by_tfds(tiny, tmp_path, monkeypatch):
    folder, arrays = tiny
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        try:
            port = server.stdout.readline().split("port ")[1].split()[0]
            monkeypatch.setattr(official, "URL", f"http://127.0.0.1:{port}/")
            assert_loaded(data.load("fashion_mnist"), arrays)
        finally:
            server.terminate()
    assert len(list((tmp_path / "prepared/downloads").rglob("*.gz"))) == 4


def test_absent_files_say_how_to_get_them(tiny, tmp_path):
    ways = "apt-get install dataset-fashion-mnist.*`source_dir`.*internet"
    with pytest.raises(FileNotFoundError, match=f"download from http.*failed.*{ways}"):
        data.load("fashion_mnist")
    (tiny[0] / official.TEST[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"`source_dir` .*missing: {official.TEST[1]}"):
        data.load("fashion_mnist", source_dir=tiny[0])
    with pytest.raises(FileNotFoundError, match=ways):
        data.load("fashion_mnist", source_dir=tmp_path / "nowhere")


def test_corrupt_files_are_all_named_and_nothing_is_prepared(tiny, tmp_path):
    folder, arrays = tiny
    good = {}
    for name in (official.TRAIN[0], official.TEST[1]):
        good[name] = (folder / name).read_bytes()
        broken = bytearray(good[name])
        broken[-9] ^= 1
        (folder / name).write_bytes(broken)
    with pytest.raises(ValueError, match="corrupt.*Delete them") as caught:
        data.load("fashion_mnist", source_dir=folder)
    for name in good:
        broken = official.restore_header((folder / name).read_bytes(), name[:-3], 0x59A7862E)
        seen = hashlib.sha256(broken).hexdigest()
        expected = official.FILES[name].sha256
        assert f"{folder / name}: expected SHA-256 {expected}, got {seen}" in str(caught.value)
    assert official.TRAIN[1] + ": expected" not in str(caught.value)
    for name, content in good.items():
        (folder / name).write_bytes(content)
    assert_loaded(data.load("fashion_mnist", source_dir=folder), arrays)


@pytest.mark.slow
def test_killed_in_the_middle_prepares_afresh(tiny, tmp_path):
    folder, arrays = tiny
    script = """
import json, os, sys
from jaxprune import data
from jaxprune.data import fashion_mnist, fashion_mnist_files as official
official.FILES = {k: official.Official(*v) for k, v in json.loads(sys.argv[1]).items()}
whole = fashion_mnist.FashionMnist._generate_examples
def killed(self, *args):
    for number, example in whole(self, *args):
        if number == 3:
            os.kill(os.getpid(), 9)
        yield number, example
fashion_mnist.FashionMnist._generate_examples = killed
data.load("fashion_mnist", source_dir=sys.argv[2])
"""
    arguments = [sys.executable, "-c", script, json.dumps(official.FILES), str(folder)]
    assert subprocess.run(arguments, capture_output=True, timeout=60).returncode == -9
    assert list((tmp_path / "prepared/fashion_mnist").iterdir())  # it did leave something
    assert_loaded(data.load("fashion_mnist", source_dir=folder), arrays)


def test_failure_while_the_arrays_are_written_leaves_no_cache(tiny, tmp_path, monkeypatch):
    folder, arrays = tiny

    def full_disk(file, **_):
        file.write(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full_disk)
        with pytest.raises(OSError, match="No space left"):
            data.load("fashion_mnist", source_dir=folder)
    assert {path.name for path in (tmp_path / "prepared").iterdir()} == {
        "fashion_mnist",
        "downloads",
    }
    assert_loaded(data.load("fashion_mnist", source_dir=folder), arrays)


def test_two_runs_that_prepare_at_once_both_get_the_data(tiny, monkeypatch):
    folder, arrays = tiny
    whole = fashion_mnist.FashionMnist._generate_examples

    def overtaken(self, *args):
        monkeypatch.setattr(fashion_mnist.FashionMnist, "_generate_examples", whole)
        assert_loaded(data.load("fashion_mnist", source_dir=folder), arrays)
        (Path(os.environ["JAXPRUNE_DATA_DIR"]) / "fashion_mnist-1.0.0.npz").unlink()
        yield from whole(self, *args)

    monkeypatch.setattr(fashion_mnist.FashionMnist, "_generate_examples", overtaken)
    assert_loaded(data.load("fashion_mnist", source_dir=folder), arrays)


def test_damaged_prepared_data_is_an_error_with_the_fix(tiny, tmp_path):
    folder, arrays = tiny
    data.load("fashion_mnist", source_dir=folder)
    cache = tmp_path / "prepared/fashion_mnist-1.0.0.npz"
    whole = cache.read_bytes()
    flipped = bytearray(whole)
    flipped[3000] ^= 1  # inside the training images
    for damaged in (bytes(flipped), whole[:-3000], b""):
        cache.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{cache.name} is corrupt .*: delete it"):
            data.load("fashion_mnist")
    cache.unlink()
    (records,) = (tmp_path / "prepared/fashion_mnist/1.0.0").glob("*-train.array_record*")
    whole = records.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        records.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read .*: delete this folder"):
            data.load("fashion_mnist")
    records.write_bytes(whole)
    for name in ("dataset_info.json", "features.json"):
        path = records.with_name(name)
        content, refused = path.read_bytes(), 0
        for damaged in (content[: len(content) // 2], b"", b"[1]", b"\xff"):
            path.write_bytes(damaged)
            try:
                assert_loaded(data.load("fashion_mnist"), arrays)  # TFDS did not need it
                cache.unlink()
            except ValueError as error:
                assert "delete this folder and load again" in str(error)
                refused += 1
        assert refused or name != "dataset_info.json"
        path.write_bytes(content)
    records.unlink()
    with pytest.raises(ValueError, match="cannot be read .*: delete this folder"):
        data.load("fashion_mnist")
    assert not cache.exists()


def test_unwritable_data_dir(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"`data_dir` .*file/x failed .*JAXPRUNE_DATA_DIR"):
        data.load("fashion_mnist", data_dir=tmp_path / "file/x", source_dir=tiny[0])


@given(content=st.binary(max_size=300), name=st.text("abc-", min_size=1), mtime=st.integers(0))
def test_restored_header_states_name_and_time(content, name, mtime):
    mtime %= 2**32
    restored = official.restore_header(gzip.compress(content, mtime=0), name, mtime)
    assert gzip.decompress(restored) == content
    assert restored[:4] == b"\x1f\x8b\x08\x08" and restored[8:10] == b"\x00\x03"
    assert int.from_bytes(restored[4:8], "little") == mtime
    assert restored[10:].startswith(name.encode() + b"\x00")
    assert official.restore_header(restored, "other", 0) == restored


def test_checksums_are_those_that_tfds_knows():
    registered = Path(tfds.__file__).parent / "url_checksums/fashion_mnist.txt"
    rows = [line.split("\t") for line in registered.read_text().splitlines()]
    assert {row[0]: row[2] for row in rows} == {
        official.URL + name: entry.sha256 for name, entry in official.FILES.items()
    }


@pytest.mark.skipif(not DEBIAN.exists(), reason="package dataset-fashion-mnist is not installed")
def test_debian_files_become_the_official_ones():
    assert official.find_source(None) == DEBIAN
    files = official.read_official({name: DEBIAN / name for name in official.FILES})
    shapes = [official.parse_idx(files[name]).shape for name in (*official.TRAIN, *official.TEST)]
    assert shapes == [(60000, 28, 28), (60000,), (10000, 28, 28), (10000,)]


@pytest.mark.slow
def test_nothing_imports_tensorflow_and_the_package_imports_no_extra(tiny):
    script = """
import json, sys
from jaxprune import data
extras = {"tensorflow_datasets", "grain", "sklearn", "PIL"} & set(sys.modules)
assert not extras, extras
from jaxprune.data import fashion_mnist_files as official
official.FILES = {k: official.Official(*v) for k, v in json.loads(sys.argv[1]).items()}
for name in ("digits", "synthetic", "fashion_mnist"):
    data.load(name, source_dir=sys.argv[2])
next(data.index_batches(4, 2, seed=0))
assert {"tensorflow_datasets", "grain", "sklearn", "PIL"} <= set(sys.modules)
assert "tensorflow" not in sys.modules
"""
    arguments = [sys.executable, "-c", script, json.dumps(official.FILES), str(tiny[0])]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# --- Batches --------------------------------------------------------------------------------------


def sizes_and_batch_sizes():
    return st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(sizes=sizes_and_batch_sizes(), seed=st.integers(0, 2**64 - 1))
def test_every_epoch_has_every_example_at_most_once_in_full_batches(sizes, seed):
    size, batch_size = sizes
    batches = data.index_batches(size, batch_size, seed=seed)
    for _ in range(3):
        epoch = [next(batches) for _ in range(size // batch_size)]
        assert all(batch.shape == (batch_size,) and batch.dtype == np.int32 for batch in epoch)
        indices = np.concatenate(epoch)
        assert len(np.unique(indices)) == len(indices) == size - size % batch_size
        assert indices.min() >= 0 and indices.max() < size


def test_epochs_and_seeds_differ_and_dropped_examples_come_back():
    def epochs(seed, count=40):
        batches = data.index_batches(103, 20, seed=seed)
        return [np.concatenate([next(batches) for _ in range(5)]) for _ in range(count)]

    first = epochs(0)
    np.testing.assert_array_equal(first, epochs(0))
    orders = {tuple(order) for seed in range(3) for order in epochs(seed)}
    assert len(orders) == 120  # seed 0, epoch 1 is not seed 1, epoch 0 either
    dropped = [set(range(103)) - set(order) for order in first]
    assert all(len(three) == 3 for three in dropped)
    assert len(set().union(*dropped)) > 50
    # A shuffle, not a rotation or a swap of neighbours: positions are spread evenly.
    mean = np.mean([np.argsort(order)[:100] for order in first], axis=0)
    assert np.abs(mean - 49.5).max() < 25


def test_order_never_changes():
    batches = data.index_batches(60000, 128, seed=7)
    digest = hashlib.sha256()
    for _ in range(1000):
        digest.update(next(batches).astype("<i4").tobytes())
    assert digest.hexdigest() == "a821b07ad6e201cdcedd01dea540e30035cc93f9a5fd1ca87dd3ff178bc7cfa3"


@given(sizes=sizes_and_batch_sizes(), before=st.integers(0, 40), overrun=st.integers(0, 5))
def test_state_restores_the_continuation(sizes, before, overrun):
    batches = data.index_batches(*sizes, seed=1)
    for _ in range(before):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(7)]
    fresh = data.index_batches(*sizes, seed=1)
    for _ in range(overrun):
        next(fresh)
    for iterator in (fresh, batches):
        iterator.set_state(state)
        assert iterator.get_state() == state
        np.testing.assert_array_equal([next(iterator) for _ in range(7)], expected)


def test_writing_into_a_batch_changes_no_other():
    batches, untouched = (data.index_batches(6, 3, seed=0) for _ in range(2))
    state = batches.get_state()
    next(batches)[:] = -1
    batches.set_state(state)
    np.testing.assert_array_equal(next(batches), next(untouched))


def test_index_batches_names_every_bad_argument():
    with pytest.raises(ValueError, match=r"`batch_size` must be in 1 \.\. size \(4\); got 5: .*ch"):
        data.index_batches(4, 5, seed=0)
    with pytest.raises(ValueError, match="`batch_size` .*got 0: .*; `seed` .*got -1"):
        data.index_batches(4, 0, seed=-1)
    with pytest.raises(ValueError, match="`size` .*got 0"):
        data.index_batches(0, 1, seed=0)


# --- Augmentation ---------------------------------------------------------------------------------


def window(image, pad, row, column, mirrored):
    """The NumPy reference for one image."""
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    cut = padded[row : row + image.shape[0], column : column + image.shape[1]]
    return cut[:, ::-1] if mirrored else cut


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize(("pad", "flip"), [(4, True), (2, False), (0, True)])
def test_augment_equals_the_reference_with_the_same_draws(pad, flip, dtype):
    images = np.random.default_rng(0).integers(1, 256, (16, 9, 7, 3)).astype(dtype)
    key = jax.random.key(5)
    crop, mirror = jax.random.split(key)
    offsets = np.asarray(jax.random.randint(crop, (16, 2), 0, 2 * pad + 1))
    mirrored = np.asarray(jax.random.bernoulli(mirror, 0.5, (16, 1, 1, 1))).ravel() & flip
    expected = [window(i, pad, *o, m) for i, o, m in zip(images, offsets, mirrored, strict=True)]
    step = functools.partial(data.augment, pad=pad, flip=flip)
    for function in (step, jax.jit(step)):
        seen = function(key, jnp.asarray(images))
        assert seen.dtype == dtype
        np.testing.assert_array_equal(seen, np.stack(expected))


def test_augment_reaches_every_window_and_mirror_and_nothing_else():
    image = np.random.default_rng(0).integers(1, 256, (4, 5, 1), dtype=np.uint8)
    batch = jnp.asarray(np.repeat(image[None], 1000, axis=0))
    seen = np.asarray(data.augment(jax.random.key(0), batch, pad=1, flip=True))
    variants, counts = np.unique(seen.reshape(1000, -1), axis=0, return_counts=True)
    possible = {
        window(image, 1, row, column, mirrored).tobytes()
        for row in range(3)
        for column in range(3)
        for mirrored in (False, True)
    }
    assert {variant.tobytes() for variant in variants} == possible
    assert counts.min() > 25 and counts.max() < 100  # 55.6 of each expected


def test_augment_without_pad_and_flip_is_the_identity():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8))
    seen = data.augment(jax.random.key(0), images, pad=0, flip=False)
    np.testing.assert_array_equal(seen, images)


def test_augment_compiles_once_and_draws_by_key():
    images = jnp.arange(2 * 8 * 8, dtype=jnp.float32).reshape(2, 8, 8, 1)
    step = jax.jit(functools.partial(data.augment, pad=3, flip=True))
    results = {np.asarray(step(jax.random.key(seed), images)).tobytes() for seed in range(8)}
    assert len(results) == 8 and step._cache_size() == 1


def test_augment_rejects_bad_arguments():
    with pytest.raises(ValueError, match="`pad` must be at least 0; got -1"):
        data.augment(jax.random.key(0), jnp.ones((1, 2, 2, 1)), pad=-1, flip=False)
    with pytest.raises(ValueError, match=r"`images` must be \[B, H, W, C\]; got shape \(2, 2, 1\)"):
        data.augment(jax.random.key(0), jnp.ones((2, 2, 1)), pad=0, flip=False)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalize_equals_the_formula(dtype):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    mean, std = (0.49, 0.45, 0.3), (0.2, 0.21, 0.3)
    expected = (images / 255 - np.array(mean)) / np.array(std)
    step = functools.partial(data.normalize, mean=mean, std=std, dtype=dtype)
    for function in (step, jax.jit(step)):
        for kind in (np.uint8, np.float32):
            seen = function(jnp.asarray(images.astype(kind)))
            assert seen.dtype == dtype
            tolerance = 2e-6 if dtype == jnp.float32 else 0.01
            np.testing.assert_allclose(seen.astype(jnp.float32), expected, atol=tolerance)


def test_normalized_training_images_have_zero_mean_and_unit_variance():
    loaded = data.load("digits")
    seen = np.asarray(data.normalize(jnp.asarray(loaded.train.images), loaded.mean, loaded.std))
    assert abs(seen.mean(dtype=np.float64)) < 1e-6 and abs(seen.std(dtype=np.float64) - 1) < 1e-6


def test_normalize_names_every_bad_argument():
    with pytest.raises(ValueError, match=r"`mean` .*\(1\); got 2; `std` must be positive; .*0\.0"):
        data.normalize(jnp.ones((1, 2, 2, 1)), (0.5, 0.5), (0.0,))
