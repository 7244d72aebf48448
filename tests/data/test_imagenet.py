"""ImageNet from tiny tars of the real layout: all of it, in order, to the pixel."""

import dataclasses
import importlib.util
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import warnings

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxprune.data import (
    imagenet,
    imagenet_batches,
    imagenet_cache,
    imagenet_tars,
    index_batches,
)
from jaxprune.data import imagenet_augment as augment
from tests.support import benchmarks

CLASSES = ("n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331")
PER_CLASS = 5
VALIDATION = 11
SIZE = 48  # of the results
RESIZE = 56
TRAIN, TEST = imagenet_tars.TARS.values()
# Heights and widths of all kinds: below the result's, odd, upright, wide, large enough to be
# decoded at 1/2, 1/4 and 1/8.
SIDES = ((40, 33), (97, 131), (150, 64), (61, 300), (260, 201), (420, 517))


# --- Tars like the real ones ----------------------------------------------------------------------


def picture(rng, height, width):
    """An image whose amplitudes fall with frequency as those of photographs do: as its inverse."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])[..., None]
    noise = rng.normal(size=(height, width, 1)) + 0.3 * rng.normal(size=(height, width, 3))
    noise = np.fft.rfft2(noise, axes=(0, 1))
    pixels = np.fft.irfft2(noise / np.maximum(frequency, 1 / 400), (height, width), axes=(0, 1))
    return np.clip(rng.integers(90, 160, 3) + 45 * pixels / pixels.std(), 0, 255).astype(np.uint8)


def encode(pixels, kind="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    if kind == "JPEG":
        options = {"quality": 92} | options
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    return exif


# The odd ones of the real set, and a few that it may have: number in the training split -> options.
ODD = {
    3: {"mode": "L"},
    8: {"mode": "CMYK"},
    12: {"kind": "PNG"},
    17: {"exif": rotated()},
    21: {"progressive": True, "subsampling": 0},
}


def write_tar(target, members):
    """Writes `name -> bytes` as a tar to a path, or returns the tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    if target is not None:
        target.write_bytes(file.getvalue())
    return file.getvalue()


def write_source(folder, train, validation):
    """Writes both tars: `class -> {name: bytes}`, and `name -> bytes`."""
    folder.mkdir(exist_ok=True)
    tars = {f"{wnid}.tar": write_tar(None, images) for wnid, images in train.items()}
    write_tar(folder / TRAIN, tars)
    write_tar(folder / TEST, validation)
    return folder


@pytest.fixture(scope="module")
def originals():
    """The encoded images, before they go into tars."""
    rng, train = np.random.default_rng(0), {}
    for label, wnid in enumerate(CLASSES):
        train[wnid] = {}
        for i in range(PER_CLASS):
            number = label * PER_CLASS + i
            pixels = picture(rng, *SIDES[number % len(SIDES)])
            train[wnid][f"{wnid}_{i + 2}.JPEG"] = encode(pixels, **ODD.get(number, {}))
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(VALIDATION)]
    sides = [SIDES[i % len(SIDES)] for i in range(VALIDATION)]
    validation = {name: encode(picture(rng, *own)) for name, own in zip(names, sides, strict=True)}
    return train, validation


@pytest.fixture(scope="module")
def contents():
    wnids = tuple(CLASSES[i * 5 % len(CLASSES)] for i in range(VALIDATION))
    return imagenet.Contents(CLASSES, wnids, len(CLASSES) * PER_CLASS)


@pytest.fixture
def source(originals, tmp_path, monkeypatch):
    """A folder with both tars; in the tars nothing is in the order of its name."""
    monkeypatch.setenv("JAXPRUNE_DATA_DIR", str(tmp_path / "prepared"))
    train, validation = originals
    backwards = {w: dict(reversed(images.items())) for w, images in reversed(train.items())}
    return write_source(tmp_path / "source", backwards, dict(reversed(validation.items())))


@pytest.fixture
def dataset(source, contents):
    return imagenet.load(source, contents=contents)


def flat(train):
    """All training images in the order of their names."""
    return [data for images in train.values() for data in images.values()]


def damaged(originals, numbers, how=lambda data: data[: len(data) // 2]):
    """The originals with some training images cut short."""
    train, validation = originals
    names = [(wnid, name) for wnid, images in train.items() for name in images]
    train = {wnid: dict(images) for wnid, images in train.items()}
    for number in numbers:
        wnid, name = names[number]
        train[wnid][name] = how(train[wnid][name])
    return train, validation


def train_batches(images, batch_size=8, *, seed=3, **options):
    options = {"image_size": SIZE, "threads": 1, "max_corrupt": 0.5} | options
    return imagenet.train_batches(images, batch_size, seed=seed, **options)


def eval_batches(images, batch_size=4, **options):
    options = {"image_size": SIZE, "resize": RESIZE, "threads": 1, "max_corrupt": 0.5} | options
    return imagenet.eval_batches(images, batch_size, **options)


def same(first, second):
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


# --- References -----------------------------------------------------------------------------------


def opened(data, reduction=1):
    """Pixels by Pillow; JPEGs at a fraction of their size by its own way into libjpeg."""
    image = Image.open(io.BytesIO(data))
    if reduction > 1:
        width, height = image.size
        image.draft("RGB", (width // reduction, height // reduction))
        assert image.size == (-(-width // reduction), -(-height // reduction))
    return np.asarray(image.convert("RGB"))


def bilinear(pixels, height, width):
    """Samples between the four nearest pixels, at the centres of the new ones."""

    def weights(old, new):
        places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.minimum(places.astype(int), max(0, old - 2))
        matrix = np.zeros((new, old))
        matrix[np.arange(new), low] = 1 - (places - low)
        matrix[np.arange(new), np.minimum(low + 1, old - 1)] += places - low
        return matrix

    rows, columns = weights(pixels.shape[0], height), weights(pixels.shape[1], width)
    return columns @ np.tensordot(rows, pixels.astype(float), 1)


def reference_box(height, width, draws):
    """Area and log-ratio uniform, ten tries, then the centre: with NumPy, all tries at once."""
    area = height * width * (0.08 + 0.92 * draws[0:20:2])
    ratio = np.exp(np.log(3 / 4) + draws[1:20:2] * (np.log(4 / 3) - np.log(3 / 4)))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = np.flatnonzero((w >= 1) & (w <= width) & (h >= 1) & (h <= height))
    if len(fits):
        h, w = int(h[fits[0]]), int(w[fits[0]])
        return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    if width / height < 3 / 4:
        h, w = round(width / (3 / 4)), width
    else:
        h, w = height, round(height * 4 / 3)
    return (height - h) // 2, (width - w) // 2, h, w


def reference_train(data, draws, size):
    height, width = opened(data).shape[:2]
    top, left, h, w = reference_box(height, width, draws)
    jpeg = data[:2] == b"\xff\xd8"
    r = max(f for f in (1, 2, 4, 8) if f == 1 or (jpeg and min(h, w) >= f * size))
    pixels = opened(data, r)
    top, left, h, w = (round(n / r) for n in (top, left, h, w))
    top, left = min(top, pixels.shape[0] - h), min(left, pixels.shape[1] - w)
    result = bilinear(pixels[top : top + h, left : left + w], size, size)
    return result[:, ::-1] if draws[22] >= 0.5 else result


def reference_eval(data, size, resize):
    height, width = opened(data).shape[:2]
    short = min(height, width)
    r = max(f for f in (1, 2, 4, 8) if f == 1 or short >= f * resize)
    pixels = bilinear(opened(data, r), resize * height // short, resize * width // short)
    top, left = (round((n - size) / 2) for n in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def reference_draws(seed, step, count):
    generator = np.random.Philox(key=np.array([seed, step], np.uint64), counter=2**192)
    return np.random.Generator(generator).random((count, 23))


# --- Where the images are -------------------------------------------------------------------------


def test_every_image_is_found_with_its_label_in_the_order_of_the_names(
    dataset, originals, contents
):
    train, validation = originals
    assert dataset.name == "imagenet" and dataset.num_classes == 6
    assert [dataset.train.read(i) for i in range(len(dataset.train))] == flat(train)
    np.testing.assert_array_equal(dataset.train.labels, np.repeat(np.arange(6), PER_CLASS))
    names = [name for images in train.values() for name in images]
    assert [dataset.train.name(i) for i in range(30)] == names
    assert [dataset.test.read(i) for i in range(len(dataset.test))] == list(validation.values())
    assert [CLASSES[label] for label in dataset.test.labels] == list(contents.validation)
    assert dataset.train.labels.dtype == dataset.test.labels.dtype == np.int32


def test_headers_are_read_once(source, contents, monkeypatch):
    first = imagenet.load(source, contents=contents)
    monkeypatch.setattr(imagenet_tars, "walk", None)  # would raise if it were called
    again = imagenet.load(source, contents=contents)
    for name in ("numbers", "offsets", "sizes", "labels"):
        np.testing.assert_array_equal(getattr(first.train, name), getattr(again.train, name))
        np.testing.assert_array_equal(getattr(first.test, name), getattr(again.test, name))
    # Other contents are read anew, in a place of their own.
    with pytest.raises(TypeError):
        imagenet.load(source, contents=contents._replace(train_size=31))


def test_a_tar_that_was_replaced_by_one_of_the_same_size_is_read_anew(source, contents, originals):
    imagenet.load(source, contents=contents)
    size = (source / TRAIN).stat().st_size
    write_source(source, *originals)  # in another order
    assert (source / TRAIN).stat().st_size == size
    images = imagenet.load(source, contents=contents).train
    assert [images.read(i) for i in range(30)] == flat(originals[0])


def test_headers_with_other_sizes_are_noticed(dataset):
    assert dataset.train.matches_headers()
    for change in ({"sizes": dataset.train.sizes + 1}, {"offsets": dataset.train.offsets + 512}):
        assert not dataclasses.replace(dataset.train, **change).matches_headers()


def test_tars_of_other_programs_are_read(originals, contents, source):
    """With folders, extra headers, and no empty blocks at the end."""

    def packed(members):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            folder = tarfile.TarInfo("./images")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name, content in members.items():
                header = tarfile.TarInfo(f"./images/{name}")
                header.size, header.mtime = len(content), 0.5
                tar.addfile(header, io.BytesIO(content))
            end = tar.offset
        return file.getvalue()[:end]

    train, validation = originals
    inner = {f"{wnid}.tar": packed(images) for wnid, images in train.items()}
    (source / TRAIN).write_bytes(packed(inner))
    (source / TEST).write_bytes(packed(validation))
    dataset = imagenet.load(source, contents=contents)
    assert [dataset.train.read(i) for i in range(30)] == flat(train)
    assert dataset.test.name(3) == "./images/ILSVRC2012_val_00000004.JPEG"


def test_images_are_shared_with_processes_without_their_open_files(dataset):
    data = dataset.train.read(0)
    copy = pickle.loads(pickle.dumps(dataset.train))
    assert dataset.train.open_files._descriptors and not copy.open_files._descriptors
    assert copy.read(0) == data
    # And an index of the real size is no burden to send.
    many = dataset.train.select(np.zeros(1_000_000, int))
    assert len(pickle.dumps(many)) < 19_000_000


def test_the_official_contents_are_those_of_tfds():
    contents = imagenet_tars.official()
    assert len(contents.classes) == 1000 and list(contents.classes) == sorted(contents.classes)
    assert len(contents.validation) == 50_000 and contents.train_size == 1_281_167
    assert np.unique(contents.validation, return_counts=True)[1].tolist() == [50] * 1000
    # What everybody knows: the first validation image is a snake, the second skis.
    assert [contents.classes.index(wnid) for wnid in contents.validation[:3]] == [65, 970, 230]


def test_hold_out_takes_of_all_classes_alike_and_always_the_same(dataset):
    rest, held = imagenet.hold_out(dataset.train, 12)
    np.testing.assert_array_equal(np.bincount(held.labels), [2] * 6)
    both = np.concatenate([rest.offsets, held.offsets])
    np.testing.assert_array_equal(np.sort(both), np.sort(dataset.train.offsets))
    assert len(rest) == 18 and len(np.unique(both)) == 30
    same_again = imagenet.hold_out(dataset.train, 12)[1]
    np.testing.assert_array_equal(held.offsets, same_again.offsets)
    for count in (0, 30):
        with pytest.raises(ValueError, match=f"`count` .*less than the 30 images; got {count}"):
            imagenet.hold_out(dataset.train, count)


# --- Faults of the tars ---------------------------------------------------------------------------


def test_missing_tars_are_all_named_with_the_way_to_get_them(source, contents):
    (source / TRAIN).unlink()
    with pytest.raises(FileNotFoundError, match=f"missing: {TRAIN}. Register at https") as caught:
        imagenet.load(source, contents=contents)
    assert TEST not in str(caught.value)
    (source / TEST).unlink()
    with pytest.raises(FileNotFoundError, match=f"`source_dir` .*: {TRAIN}, {TEST}. Register"):
        imagenet.load(source, contents=contents)


@pytest.fixture(scope="module")
def whole(originals, tmp_path_factory):
    """Both tars, and a folder to damage them in."""
    folder = write_source(tmp_path_factory.mktemp("whole"), *originals)
    return folder, {name: (folder / name).read_bytes() for name in (TRAIN, TEST)}


@given(share=st.floats(0, 1), split=st.sampled_from([TRAIN, TEST]))
def test_wherever_a_tar_is_cut_off_it_is_refused(whole, contents, share, split):
    folder, tars = whole
    # A tar is padded with empty blocks, which may be lost.
    last = len(tars[split].rstrip(b"\0"))
    (folder / split).write_bytes(tars[split][: int(share * (last - 1))])
    index = imagenet_tars.index_train if split == TRAIN else imagenet_tars.index_validation
    with pytest.raises(ValueError, match=rf"{split} (is |has wrong ).*get it again"):
        index(folder / split, contents)


def test_what_is_no_tar_or_has_a_damaged_header_is_refused(source, contents):
    whole = (source / TRAIN).read_bytes()
    second = 512 + tarfile.TarInfo.frombuf(whole[:512], "utf-8", "strict").size
    flipped = bytearray(whole)
    flipped[second + 20] ^= 1
    for content, at in ((bytes(flipped), second), (os.urandom(5000), 0), (b"\x1f\x8b" + whole, 0)):
        (source / TRAIN).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{TRAIN} is corrupt at byte {at} \(.*get it again"):
            imagenet.load(source, contents=contents)
    inner = bytearray(whole)
    inner[512 + 20] ^= 1
    (source / TRAIN).write_bytes(inner)
    with pytest.raises(ValueError, match=rf"n01496331.tar in .*{TRAIN} is corrupt at byte 512"):
        imagenet.load(source, contents=contents)
    assert not (source.parent / "prepared").exists()


def test_all_faults_of_the_contents_are_named_together(originals, contents, source):
    train = {wnid: dict(images) for wnid, images in originals[0].items()}
    train["n99999999"] = {"n99999999_1.JPEG": b"?"}
    train["n01440764"] = {}
    train["n01443537"]["n01484850_77.JPEG"] = b"?"
    train["n01491361"]["n01494475_3.JPEG"] = b"?"
    del train["n01496331"]
    write_source(source, train, {"only.JPEG": b"?"})
    with pytest.raises(ValueError) as caught:
        imagenet.load(source, contents=contents)
    for fault in (
        f"{TRAIN} has wrong contents",
        "tars of unknown classes: n99999999.tar",
        "missing classes: n01496331;",
        "classes without images: n01440764.tar;",
        "different class: n01484850_77.JPEG in n01443537.tar, n01494475_3.JPEG in n01491361.tar;",
        "of the same name: n01494475_3.JPEG;",
        "22 images, but there must be 30. Delete it and get it again",
    ):
        assert fault in str(caught.value)
    write_source(source, *originals)
    write_tar(source / TEST, dict(list(originals[1].items())[1:]))
    with pytest.raises(ValueError, match=f"{TEST} has .*: 10 images, but there must be 11"):
        imagenet.load(source, contents=contents)
    strange = contents._replace(validation=("n00000000", *contents.validation[1:]))
    with pytest.raises(ValueError, match="images of an unknown class: n00000000"):
        imagenet_tars.index_validation(source / TEST, strange)


def test_many_faults_of_a_kind_are_counted(source, contents):
    write_tar(source / TRAIN, {})
    with pytest.raises(ValueError, match=r"missing classes: n01440764, .*n01494475 and 1 more;"):
        imagenet.load(source, contents=contents)


def test_a_class_that_is_there_twice(originals, source, contents):
    inner = {f"{wnid}.tar": write_tar(None, images) for wnid, images in originals[0].items()}
    again = {"again/n01440764.tar": write_tar(None, {})}
    write_tar(source / TRAIN, inner | again)
    with pytest.raises(ValueError, match="classes that occur more than once: n01440764;"):
        imagenet.load(source, contents=contents)


def test_a_damaged_index_is_an_error_with_the_fix(dataset, source, contents, tmp_path):
    (index,) = (tmp_path / "prepared").glob("imagenet-train-*.npz")
    whole = index.read_bytes()
    for content in (b"", whole[:-100], whole[:200] + b"x" + whole[201:]):
        index.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{index.name} is corrupt .*: delete it and load ag"):
            imagenet.load(source, contents=contents)


def test_a_failure_while_the_index_is_written_leaves_nothing(
    source, contents, tmp_path, monkeypatch
):
    def full_disk(file, **_):
        file.write(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full_disk)
        with pytest.raises(OSError, match="`data_dir` .*No space left.*JAXPRUNE_DATA_DIR"):
            imagenet.load(source, contents=contents)
    assert list((tmp_path / "prepared").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"`data_dir` .*file/x failed .*JAXPRUNE_DATA_DIR"):
        imagenet.load(source, data_dir=tmp_path / "file/x", contents=contents)


def test_a_tar_that_shrinks_or_goes_while_it_is_read(dataset, source):
    copy = pickle.loads(pickle.dumps(dataset.train))
    with (source / TRAIN).open("rb+") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=f"{TRAIN} has become shorter.*get it again"):
        next(train_batches(dataset.train))
    (source / TRAIN).unlink()
    with pytest.raises(FileNotFoundError, match=TRAIN):
        next(train_batches(copy))


@pytest.mark.parametrize("absent", ["cv2", "grain", "tensorflow_datasets"])
def test_a_missing_extra_is_named(source, monkeypatch, absent):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == absent else find(name)
    )
    what = "tensorflow-datasets" if absent == "tensorflow_datasets" else absent
    with pytest.raises(ModuleNotFoundError, match=rf"{what}.*pip install 'jaxprune\[imagenet\]'"):
        imagenet.load(source)


@pytest.mark.slow
def test_importing_needs_no_extra_and_nothing_imports_tensorflow(source, contents):
    script = """
import json, sys
from jaxprune.data import imagenet
extras = {"tensorflow_datasets", "grain", "cv2", "PIL"} & set(sys.modules)
assert not extras, extras
imagenet.tars.official()
contents = imagenet.Contents(*json.loads(sys.argv[2]))
dataset = imagenet.load(sys.argv[1], contents=contents)
next(imagenet.train_batches(dataset.train, 4, seed=0))
assert {"grain", "cv2"} <= set(sys.modules)
assert not {"tensorflow", "tensorflow_datasets"} & set(sys.modules)
"""
    arguments = [sys.executable, "-c", script, str(source), json.dumps(contents)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "ignored" not in result.stderr  # files are closed without a word at the end


# --- Decoding -------------------------------------------------------------------------------------


def test_sizes_are_read_from_all_kinds_of_headers(originals):
    train, validation = originals
    for data in (*flat(train), *validation.values()):
        height, width = opened(data).shape[:2]
        assert augment.full_size(data) == (height, width)
        if data[:2] == b"\xff\xd8":
            assert augment.image_size(data) == (height, width)
    filled = flat(train)[0]
    # Filler, and three segments that could be taken for one with the size.
    for extra in (b"\xff", *(b"\xff%c\0\x08012345" % marker for marker in (0xC4, 0xC8, 0xCC))):
        assert augment.image_size(filled[:2] + extra + filled[2:]) == SIDES[0]


@given(data=st.binary(max_size=40), number=st.integers(0, 29), changes=st.binary(max_size=4))
def test_damaged_headers_never_do_more_than_fail(originals, data, number, changes):
    image = bytearray(flat(originals[0])[number])
    for i, byte in enumerate(changes):
        image[(byte * 7 + i * 31) % 700 % len(image)] = byte
    out = np.zeros((8, 8, 3), np.uint8)
    for content in (data, b"\xff\xd8" + data, bytes(image)):
        assert augment.eval_image(content, out, resize=9) in (True, False)


def test_pixels_of_all_kinds_of_images(originals):
    train = flat(originals[0])
    for number, data in enumerate(train):
        seen = augment.decode(data)
        assert seen.dtype == np.uint8
        error = np.abs(seen.astype(int) - opened(data))
        assert error.max() <= 1, number  # of CMYK; the others are equal
    assert (augment.decode(train[3]) == augment.decode(train[3])[..., :1]).all()
    assert train[12][:4] == b"\x89PNG"
    assert augment.decode(train[17]).shape[:2] == SIDES[17 % 6]  # not turned


@given(number=st.integers(0, 29), share=st.floats(0, 1), reduction=st.sampled_from([1, 2, 4, 8]))
def test_an_image_that_is_cut_off_anywhere_is_not_decoded(originals, number, share, reduction):
    data = flat(originals[0])[number]
    cut = data[: int(share * (len(data) - 1))]
    assert augment.decode(cut, reduction) is None
    out = np.full((8, 8, 3), 7, np.uint8)
    assert not augment.eval_image(cut, out, resize=9)
    assert not augment.train_image(cut, [0.5] * augment.DRAWS, out)
    assert (out == 7).all()


def test_reductions_are_used_where_enough_is_left_and_only_for_jpegs(monkeypatch):
    assert [augment.reduction_for(side, 10) for side in (9, 19, 20, 39, 40, 80, 1000)] == [
        1, 1, 2, 2, 4, 8, 8,
    ]  # fmt: skip
    pixels = picture(np.random.default_rng(1), 400, 500)
    seen, decode = [], augment.decode
    monkeypatch.setattr(
        augment,
        "decode",
        lambda data, reduction=1: seen.append(reduction) or decode(data, reduction),
    )
    out = np.zeros((48, 48, 3), np.uint8)
    for kind, expected in (("JPEG", [8]), ("PNG", [1, 1])):
        seen.clear()
        assert augment.eval_image(encode(pixels, kind), out, resize=50)
        assert seen == expected


def test_a_reduced_image_is_close_to_one_that_is_resized_by_averaging():
    """Closer than the whole image resized without averaging, which is what it replaces."""
    pixels = picture(np.random.default_rng(2), 900, 1100)
    data, size = encode(pixels), (244, 200)
    averaged = np.asarray(Image.fromarray(augment.decode(data)).resize(size, Image.BILINEAR))
    errors = {}
    for reduction in (1, 2, 4):
        seen = cv2.resize(augment.decode(data, reduction), size, interpolation=cv2.INTER_LINEAR)
        errors[reduction] = np.abs(seen.astype(int) - averaged).mean()
    assert errors[4] < errors[1] / 3 and errors[4] < errors[2] < errors[1]


# --- Crops ----------------------------------------------------------------------------------------


@given(
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    seed=st.integers(0, 2**64 - 1),
)
def test_boxes_are_those_of_the_reference_and_inside_the_image(height, width, seed):
    for draws in reference_draws(seed, 0, 5):
        box = augment.random_box(height, width, draws.tolist())
        assert box == reference_box(height, width, draws)
        assert 0 <= box.top <= height - box.height and 0 <= box.left <= width - box.width
        assert box.height >= 1 and box.width >= 1


def test_areas_ratios_and_places_have_the_right_distribution():
    """Against crops drawn without limits, of which those that fit are kept."""
    height, width, count = 375, 500, 20_000
    draws = reference_draws(5, 0, count)
    boxes = np.array([augment.random_box(height, width, row.tolist()) for row in draws])
    top, left, h, w = boxes.T
    area, ratio = h * w / (height * width), w / h
    assert area.min() > 0.079 and area.max() <= 1 and 0.74 < ratio.min() and ratio.max() < 1.35
    rng = np.random.default_rng(9)
    free_area = rng.uniform(0.08, 1, 10 * count)
    free_ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 10 * count))
    size = np.sqrt(free_area * height * width * np.stack([free_ratio, 1 / free_ratio]))
    fits = (size[0] < width) & (size[1] < height)
    levels, even = np.linspace(0.05, 0.95, 19), np.linspace(0, 1, 1001)
    # A quantile of 20,000 is off by 0.0035 of the range, or less, in two of three cases.
    for seen, expected, tolerance in (
        (area, free_area[fits], 0.02),
        (np.log(ratio), np.log(free_ratio[fits]), 0.02),
        ((top + 0.5) / (height - h + 1), even, 0.02),
        ((left + 0.5) / (width - w + 1), even, 0.02),
    ):
        np.testing.assert_allclose(
            np.quantile(seen, levels), np.quantile(expected, levels), atol=tolerance
        )
    small = np.array([augment.random_box(height, width, r.tolist(), (0.5, 1.0)) for r in draws])
    assert (small[:, 2] * small[:, 3] / (height * width)).min() > 0.495


def test_narrow_images_give_the_largest_central_box():
    for size, expected in (((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))):
        assert augment.random_box(*size, [0.99] * augment.DRAWS) == expected


def test_draws_are_uniform_and_depend_on_seed_and_step():
    draws = augment.random_draws(7, 11, 500)
    np.testing.assert_array_equal(draws, reference_draws(7, 11, 500))
    assert 0 <= draws.min() and draws.max() < 1
    assert np.abs(np.quantile(draws, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.01
    first = {float(augment.random_draws(s, t, 1)[0, 0]) for s in range(5) for t in range(5)}
    assert len(first) == 25
    # Not those that the order of an epoch is made of.
    order = np.random.Philox(key=np.array([7, 11], np.uint64)).random_raw(500)
    assert not set((order >> 11) * 2.0**-53) & set(draws.ravel())


# --- Training batches -----------------------------------------------------------------------------


def test_a_batch_is_the_reference_of_seed_and_step(dataset, originals):
    encoded = flat(originals[0])
    order = index_batches(30, 8, seed=3)
    batches = train_batches(dataset.train)
    mirrored, reduced = 0, 0
    for step in range(6):  # two epochs: three full batches each
        batch, indices = next(batches), next(order)
        assert batch.images.shape == (8, SIZE, SIZE, 3) and batch.images.dtype == np.uint8
        assert batch.labels.dtype == np.int32 and batch.weights.dtype == np.float32
        assert type(batch.images) is np.ndarray
        np.testing.assert_array_equal(batch.labels, indices // PER_CLASS)
        np.testing.assert_array_equal(batch.weights, 1)
        draws = reference_draws(3, step, 8)
        mirrored += (draws[:, 22] >= 0.5).sum()
        for image, index, row in zip(batch.images, indices, draws, strict=True):
            expected = reference_train(encoded[index], row, SIZE)
            assert np.abs(image - expected).max() < 2.1, (step, index)
            box = reference_box(*opened(encoded[index]).shape[:2], row)
            reduced += min(box[2:]) >= 2 * SIZE
    assert 15 < mirrored < 33 and reduced > 10
    assert batches.corrupt == {}


def test_an_epoch_has_every_image_at_most_once(dataset):
    sizes = []
    for batch_size in (1, 7, 30):
        batches = train_batches(dataset.train.select(np.arange(0, 30, 3)), min(batch_size, 10))
        per_epoch = 10 // min(batch_size, 10)
        labels = np.concatenate([next(batches).labels for _ in range(per_epoch)])
        sizes.append(len(labels))
        assert np.bincount(labels).max() <= 2
    assert sizes == [10, 7, 10]


@given(start=st.integers(0, 9), length=st.integers(0, 5), threads=st.integers(1, 4))
def test_a_run_goes_on_from_the_number_of_a_step(module_dataset, start, length, threads):
    images, expected = module_dataset
    stop = start + length
    batches = train_batches(images, start=start, stop=stop, threads=threads)
    same(list(batches), expected[start:stop])


@pytest.fixture(scope="module")
def module_dataset(originals, contents, tmp_path_factory):
    """Training images and their first 15 batches, for tests with many examples."""
    folder = tmp_path_factory.mktemp("module")
    source = write_source(folder / "source", *originals)
    images = imagenet.load(source, data_dir=folder, contents=contents).train
    return images, list(train_batches(images, stop=15))


@given(count=st.sampled_from([1, 2, 4, 8]), start=st.integers(0, 6))
def test_processes_share_a_batch_without_overlap(module_dataset, count, start):
    images, expected = module_dataset
    parts = [
        next(train_batches(images, start=start, process_index=i, process_count=count))
        for i in range(count)
    ]
    assert all(len(part.labels) == 8 // count for part in parts)
    same([map(np.concatenate, zip(*parts, strict=True))], [expected[start]])


@pytest.mark.slow
def test_worker_processes_change_nothing(dataset, module_dataset):
    with train_batches(dataset.train, stop=7, workers=2, threads=2) as batches:
        seen = list(batches)
        same(seen, module_dataset[1][:7])
    with train_batches(dataset.train, start=5, workers=1) as batches:
        kept = [next(batches) for _ in range(3)]
    # Shared memory outlives its worker.
    same(kept, module_dataset[1][5:8])
    assert all(type(array) is np.ndarray for batch in kept for array in batch)
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_seeds_and_epochs_differ(dataset, module_dataset):
    first = module_dataset[1]
    other = list(train_batches(dataset.train, seed=4, stop=3))
    images = [batch.images.tobytes() for batch in (*first, *other)]
    assert len(set(images)) == 18


def test_options_of_training_batches(dataset):
    whole = next(train_batches(dataset.train, min_area=1.0, image_size=20))
    assert whole.images.shape == (8, 20, 20, 3)
    assert (whole.images != next(train_batches(dataset.train, image_size=20)).images).any()


def test_mirroring_mirrors_and_nothing_else(originals):
    data, out = flat(originals[0])[1], np.zeros((2, SIZE, SIZE, 3), np.uint8)
    for image, last in zip(out, (0.49, 0.51), strict=True):
        assert augment.train_image(data, [0.3] * (augment.DRAWS - 1) + [last], image)
    np.testing.assert_array_equal(out[0], out[1][:, ::-1])
    assert (out[0] != out[1]).any()


# --- Test batches ---------------------------------------------------------------------------------


def test_evaluation_is_the_reference(dataset, originals, contents):
    batches = list(eval_batches(dataset.test))
    images, labels, weights = map(np.concatenate, zip(*batches, strict=True))
    assert len(batches) == 3 and images.shape == (12, SIZE, SIZE, 3) and images.dtype == np.uint8
    for image, data in zip(images, originals[1].values(), strict=False):
        assert np.abs(image - reference_eval(data, SIZE, RESIZE)).max() < 1.6
    assert [CLASSES[label] for label in labels[:11]] == list(contents.validation)
    np.testing.assert_array_equal(weights, [1] * 11 + [0])
    assert not images[11].any() and labels[11] == 0
    assert labels.dtype == np.int32 and weights.dtype == np.float32


def test_the_centre_is_where_others_cut_it_out():
    """A half is rounded to even, as torchvision does: 4.5 to 4, 5.5 to 6."""
    for width, left in ((57, 4), (59, 6)):
        data, out = (
            encode(picture(np.random.default_rng(3), 56, width)),
            np.zeros((48, 48, 3), "u1"),
        )
        assert augment.eval_image(data, out, resize=56)
        np.testing.assert_array_equal(out, opened(data)[4:52, left : left + 48])


@given(
    size=st.integers(1, 11),
    own=st.integers(1, 7),
    count=st.integers(1, 4),
    threads=st.integers(1, 3),
)
def test_every_image_is_tested_exactly_once_over_all_processes(
    module_test_images, size, own, count, threads
):
    images, expected = module_test_images
    few = images.select(np.arange(size))
    options = {"process_count": count, "threads": threads}
    parts = [list(eval_batches(few, own * count, process_index=i, **options)) for i in range(count)]
    assert {len(part) for part in parts} == {math.ceil(size / (own * count))}
    in_order = [part[b] for b in range(len(parts[0])) for part in parts]
    seen, labels, weights = map(np.concatenate, zip(*in_order, strict=True))
    np.testing.assert_array_equal(weights, np.arange(len(weights)) < size)
    np.testing.assert_array_equal(seen[:size], expected[:size])
    np.testing.assert_array_equal(labels[:size], few.labels)
    assert not seen[size:].any()


@pytest.fixture(scope="module")
def module_test_images(originals, contents, tmp_path_factory):
    """Test images and what becomes of them."""
    folder = tmp_path_factory.mktemp("module")
    source = write_source(folder / "source", *originals)
    images = imagenet.load(source, data_dir=folder, contents=contents).test
    return images, next(eval_batches(images, 11)).images


@pytest.mark.slow
def test_worker_processes_change_nothing_in_evaluation(dataset):
    # More workers than batches.
    with eval_batches(dataset.test.select(np.arange(4)), workers=2) as batches:
        same(list(batches), eval_batches(dataset.test.select(np.arange(4))))


# --- Images that cannot be decoded ----------------------------------------------------------------


@pytest.fixture
def bad_dataset(originals, contents, source):
    """Training images 4, 5, 6 and 29 are cut off; 29 is the last one."""
    write_source(source, *damaged(originals, (4, 5, 6, 29)))
    return imagenet.load(source, contents=contents)


def test_the_next_image_takes_the_place_of_one_that_cannot_be_decoded(
    bad_dataset, module_dataset, originals
):
    order, batches = index_batches(30, 8, seed=3), train_batches(bad_dataset.train)
    met = set()
    for step in range(6):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batch = next(batches)
        indices = next(order)
        new = [i for i in indices if i in (4, 5, 6, 29) and i not in met]
        # The next ones may be met on the way.
        assert len(caught) == bool(new)
        for own in caught:
            assert f"in {bad_dataset.train.files[0]} cannot be decoded" in str(own.message)
            assert own.filename == __file__
        met |= {4, 5, 6, 29} & set(batches.corrupt)
        draws = reference_draws(3, step, 8)
        for row, index in enumerate(indices):
            instead = {4: 7, 5: 7, 6: 7, 29: 0}.get(int(index), int(index))
            assert batch.labels[row] == instead // PER_CLASS
            expected = reference_train(flat(originals[0])[instead], draws[row], SIZE)
            assert np.abs(batch.images[row] - expected).max() < 2.1
        np.testing.assert_array_equal(batch.weights, 1)
    assert (
        batches.corrupt
        == {number: f"{CLASSES[number // 5]}_{number % 5 + 2}.JPEG" for number in sorted(met)}
        or set(batches.corrupt) == met
    )
    assert met == {4, 5, 6, 29}


def test_each_bad_image_is_reported_once(bad_dataset):
    with train_batches(bad_dataset.train, 30) as batches:
        with pytest.warns(UserWarning, match=r"JPEG.*cannot be decoded and is left out \(4 so far"):
            next(batches)
        next(batches)  # warnings are errors
    assert batches.corrupt[29] == "n01496331_6.JPEG" and set(batches.corrupt) == {4, 5, 6, 29}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_are_an_error(bad_dataset, workers):
    options = {"workers": workers, "max_corrupt": 0.1}
    with pytest.raises(ValueError, match=rf"in .*{TRAIN} cannot be decoded: .* of 30 .* allows 3"):
        for _ in train_batches(bad_dataset.train, stop=4, **options):
            pass
    batches = train_batches(bad_dataset.train, 30, max_corrupt=4 / 30 + 1e-9)
    assert len(batches.corrupt) == 0 and len(next(batches).labels) == 30


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_nothing_but_bad_images_is_an_error_not_a_loop(originals, contents, source):
    write_source(source, *damaged(originals, range(30)))
    dataset = imagenet.load(source, contents=contents)
    with pytest.raises(ValueError, match="30 of 30 images so far, but `max_corrupt` allows 29"):
        next(train_batches(dataset.train, max_corrupt=1.0))


def test_bad_images_have_no_weight_in_evaluation(originals, contents, source, module_test_images):
    names = list(originals[1])
    validation = originals[1] | {names[5]: b"", names[8]: originals[1][names[8]][:-2]}
    write_source(source, originals[0], validation)
    bad = imagenet.load(source, contents=contents).test
    with eval_batches(bad, 11) as batches:
        with pytest.warns(UserWarning, match=f"{names[5]}, {names[8]} in .* left out .2 so far"):
            (batch,) = batches
    good = np.array([i not in (5, 8) for i in range(11)])
    np.testing.assert_array_equal(batch.weights, good)
    np.testing.assert_array_equal(batch.labels, bad.labels * good)
    expected = module_test_images[1] * good[:, None, None, None]
    np.testing.assert_array_equal(batch.images, expected)
    assert batches.corrupt == {5: names[5], 8: names[8]}
    with pytest.raises(ValueError, match="2 of 11 images so far, but `max_corrupt` allows 1"):
        list(eval_batches(bad, 11, max_corrupt=0.1))


# --- Arguments ------------------------------------------------------------------------------------


def test_all_bad_arguments_are_named(dataset):
    with pytest.raises(ValueError) as caught:
        train_batches(
            dataset.train, 31, seed=-1, start=3, stop=2, min_area=0.0, process_count=2,
            image_size=0, workers=-1, threads=0, max_corrupt=2.0,
        )  # fmt: skip
    for fault in (
        r"`batch_size` must be in 1 .. the number of images (30); got 31",
        "`seed` must be in 0 .. 2**64 - 1; got -1",
        "`start` must be at least 0 and at most `stop` (2); got 3",
        "`min_area` must be in (0, 1]; got 0.0",
        "`process_count` must divide `batch_size` (31); got 2",
        "`image_size` must be at least 1; got 0",
        "`workers` must be at least 0; got -1",
        "`threads` must be at least 1; got 0",
        "`max_corrupt` must be in [0, 1]; got 2.0",
    ):
        assert fault in str(caught.value)
    with pytest.raises(ValueError, match="`process_index` must be in 0 .. 1; got 2"):
        train_batches(dataset.train, process_index=2, process_count=2)
    with pytest.raises(ValueError, match=r"`batch_size` .*got 0; `resize` .*\(48\); got 47"):
        eval_batches(dataset.test, 0, resize=47)


def test_workers_have_one_thread_each_unless_told(dataset, monkeypatch):
    seen = []
    monkeypatch.setattr(
        imagenet_batches, "_iterate", lambda *args: seen.append(args[-2:]) or iter(())
    )
    for options in ({}, {"workers": 2}, {"workers": 2, "threads": 3}):
        train_batches(dataset.train, **{"threads": None} | options)
        eval_batches(dataset.test, **{"threads": None} | options)
    assert seen == [(0, 4)] * 2 + [(2, 1)] * 2 + [(2, 3)] * 2


def test_workers_need_room_in_shared_memory(dataset, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(imagenet_batches, "_SHARED_MEMORY", imagenet_batches.Path("/"))
    with pytest.raises(ValueError, match="`workers` 2 need up to 0 MB .*--shm-size"):
        train_batches(dataset.train, workers=2)
    train_batches(dataset.train, workers=1)
    train_batches(dataset.train, workers=0, threads=90)


# --- The cache ------------------------------------------------------------------------------------


def cache(images, folder, **options):
    return imagenet.cache_images(images, folder, **{"short_side": 90, "per_file": 12} | options)


def test_a_cache_has_the_same_images_smaller(dataset, originals, tmp_path):
    small = cache(dataset.train, tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        "00000000.tar", "00000012.tar", "00000024.tar", "index.npz", "settings.json",
    ]  # fmt: skip
    np.testing.assert_array_equal(small.labels, dataset.train.labels)
    copied = 0
    for number, data in enumerate(flat(originals[0])):
        assert small.name(number) == dataset.train.name(number)
        pixels, seen = opened(data), augment.decode(small.read(number))
        short = min(pixels.shape[:2])
        if short <= 90:
            assert small.read(number) == data
            copied += 1
            continue
        height, width = (90 * side // short for side in pixels.shape[:2])
        assert seen.shape == (height, width, 3)
        expected = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        error = np.abs(seen.astype(int) - expected).mean()
        assert error < 4, number  # of pixels from 0 to 255: a JPEG of a JPEG
    assert 5 < copied < 25
    assert sum(small.sizes) < 0.7 * sum(dataset.train.sizes)
    # Read as ever, in the same order.
    batch, order = next(train_batches(small)), next(index_batches(30, 8, seed=3))
    np.testing.assert_array_equal(batch.labels, order // PER_CLASS)


def test_images_that_are_as_small_already_are_copied(dataset, tmp_path):
    small = cache(dataset.train, tmp_path / "cache", short_side=SIDES[1][0])
    assert small.read(1) == dataset.train.read(1)
    assert small.read(4) != dataset.train.read(4)


def test_a_cache_keeps_the_place_of_images_that_cannot_be_decoded(bad_dataset, tmp_path):
    small = cache(bad_dataset.train, tmp_path / "cache")
    assert [small.read(i) for i in (4, 29)] == [bad_dataset.train.read(i) for i in (4, 29)]
    with pytest.warns(UserWarning, match="cannot be decoded"):
        batches = train_batches(small, 30)
        next(batches)
    assert set(batches.corrupt) == {4, 5, 6, 29}


def test_a_cache_that_was_interrupted_goes_on(dataset, tmp_path, monkeypatch):
    folder, write, calls = tmp_path / "cache", imagenet_cache._write_tar, []

    def dies(path, images, numbers, *options):
        calls.append(path.name)
        if len(calls) == 2:
            monkeypatch.setattr(imagenet_cache.os, "fsync", None)
        write(path, images, numbers, *options)

    with monkeypatch.context() as patch:
        patch.setattr(imagenet_cache, "_write_tar", dies)
        with pytest.raises(TypeError):
            cache(dataset.train, folder)
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == ["00000000.tar", "settings.json"]
    first = (folder / "00000000.tar").stat()
    small = cache(dataset.train, folder)
    second = (folder / "00000000.tar").stat()
    assert (first.st_ino, first.st_mtime_ns) == (second.st_ino, second.st_mtime_ns)
    expected = cache(dataset.train, tmp_path / "another")
    for path in (tmp_path / "another").glob("*.tar"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert [small.read(i) for i in range(30)] == [expected.read(i) for i in range(30)]


def test_a_cache_that_is_complete_is_only_opened(dataset, source, tmp_path):
    first = cache(dataset.train, tmp_path / "cache")
    source.rename(tmp_path / "gone")
    again = cache(dataset.train, tmp_path / "cache")
    assert [again.read(i) for i in range(30)] == [first.read(i) for i in range(30)]


def test_a_cache_of_something_else_is_an_error(dataset, tmp_path):
    cache(dataset.train, tmp_path / "cache")
    with pytest.raises(ValueError, match="holds a cache that differs in short_side: give another"):
        cache(dataset.train, tmp_path / "cache", short_side=91)
    with pytest.raises(ValueError, match="differs in images, quality: give another"):
        cache(dataset.test, tmp_path / "cache", quality=3)


def test_a_damaged_cache_is_an_error(dataset, tmp_path):
    cache(dataset.train, tmp_path / "cache")
    tar = tmp_path / "cache/00000012.tar"
    tar.write_bytes(b"\0" * tar.stat().st_size)
    with pytest.raises(ValueError, match="cache is damaged: delete the folder and make it again"):
        cache(dataset.train, tmp_path / "cache")
    (tmp_path / "cache/index.npz").unlink()
    with pytest.raises(ValueError, match="00000012.tar.* must hold 30 images together; got 18"):
        cache(dataset.train, tmp_path / "cache")
    tar.unlink()
    cache(dataset.train, tmp_path / "cache")


def test_bad_arguments_of_a_cache(dataset, tmp_path):
    with pytest.raises(ValueError, match="`short_side` .*got 0; `per_file` .*got 0; `quality`"):
        cache(dataset.train, tmp_path / "cache", short_side=0, per_file=0, quality=101)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="`folder` .*file/x cannot be written .*give another one"):
        cache(dataset.train, tmp_path / "file/x")


# --- The benchmark --------------------------------------------------------------------------------


@pytest.mark.scripts
def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    record, loader = tmp_path / "record.json", benchmarks.load("loader")
    monkeypatch.setattr(loader.os, "cpu_count", lambda: 1)  # worker processes are tested above
    monkeypatch.setattr(sys, "argv", ["loader.py", "--quick", "--json", str(record)])
    loader.main()
    results = json.loads(record.read_text())
    for name in ("stages", "stages, large"):
        times = {row["stage"]: row["us"] for row in results[name]}
        assert times.pop("all") == pytest.approx(sum(times.values()))
        assert set(times) == set(loader.STAGES) and min(times.values()) > 0
    for name in ("ways", "ways, large"):
        differences = {row["way"]: row["difference"] for row in results[name]}
        assert differences.pop("Pillow, antialiased") == 0
        assert 0 < min(differences.values()) and max(differences.values()) < 40
    assert all(row["images/s"] > 0 for row in results["pipelines"])
    assert "0 workers, 1 threads, cache 288" in capsys.readouterr().out
