"""Whatever is in a file, reading it gives what was written or a ValueError that names the file.

A few hundred mutations of a fixed seed are tried for each kind of file; `make test-faults` tries
JAXPRUNE_FUZZ_FILES of them, thousands.
"""

import dataclasses
import io
import json
import os
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import checkpoints, files, logs, rewinding, search, storage, structure
from jaxprune.data import fashion_mnist, imagenet_cache, imagenet_files, imagenet_tars
from jaxprune.data.splits import Split
from jaxprune.experiments import command
from jaxprune.rewinding import _stages
from jaxprune.search._journal import open_journal
from jaxprune.structure import _shrinking
from jaxprune.structure._traces import Model
from jaxprune.structure._values import Split as Dimension
from tests.support.mutations import changed, damaged
from tests.support.searching import synthetic

FEW = 200
MANY = int(os.environ.get("JAXPRUNE_FUZZ_FILES") or 3000)
SECONDS = 1.0  # of one reading; they take milliseconds
MEMORY = 3_000_000  # bytes beyond what a whole file takes


@dataclasses.dataclass
class Kind:
    """A kind of file: how it is written, and how it is read to something that can be compared."""

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    sealed: bool = False  # JSON with a checksum
    lenient: bool = False  # reading leaves out what is wrong
    folder: bool = False  # errors name the folder of the file
    claims: int = 0  # bytes that a changed value may ask for


# ---- what is written


def a_plan():
    shapes = {"a/w": (3, 8), "a/b": (8,), "out": (2, 4, 5)}
    factors = ((Dimension(3, (2, 4)), 1),)
    prunable, caches = frozenset({"a/w", "out"}), frozenset({"a/b"})
    model = Model(shapes, prunable, frozenset({(2, 1)}), caches, factors)
    rng = np.random.default_rng(0)
    kept = {path: [rng.random(size) < 0.6 for size in shape] for path, shape in shapes.items()}
    return structure.Plan(model, kept)


def bits(tree):
    """A tree as text that shows every bit."""
    if isinstance(tree, np.ndarray) or hasattr(tree, "dtype"):
        array = np.asarray(tree)
        return [str(array.dtype), list(array.shape), array.tobytes().hex()]
    if isinstance(tree, dict):
        return {name: bits(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    return repr(tree)


def read_plan(path):
    plan = structure.load_plan(path)
    return bits([plan.model.shapes, sorted(plan.model.parameters), plan.kept, plan.model.factors])


PARAMS = {
    "w": np.float32([[1, 0, 2], [0, 0, -3]]),
    "h": np.zeros((2, 2), jnp.bfloat16.dtype),
    "b": np.array([True, False]),
}
MASKS = {"w": PARAMS["w"] != 0, "h": np.zeros((2, 2), bool), "b": True}
RECORDS = [{"step": step, "train_loss": 1 / step, "macs": 3} for step in range(1, 9)]
CONTENTS = imagenet_tars.Contents(("n01440764", "n01443537"), ("n01443537",) * 3, 6)


def write_log(path):
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))


def write_tars(path):
    """The training tar of two classes."""

    def tar(path, members):
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
            for name, size in members.items():
                (path.parent / "member").write_bytes(bytes(size) if isinstance(size, int) else size)
                file.add(path.parent / "member", name)
        return path.read_bytes()

    inner = {}
    for wnid in CONTENTS.classes:
        members = {f"{wnid}_{number}.JPEG": 100 + 300 * number for number in range(3)}
        inner[f"{wnid}.tar"] = tar(path.parent / "inner", members)
    tar(path, inner)


def read_tars(path):
    images = imagenet_tars.index_train(path, CONTENTS)
    return bits([images.numbers, images.offsets, images.sizes, images.labels])


def write_index(path):
    offsets = 512 * np.arange(1, 7)
    labels = np.arange(6, dtype=np.int32) % 2
    numbers, sizes = np.zeros(6, np.int16), np.full(6, 9, np.int32)
    imagenet_files.write_index(path, imagenet_files.Images((), numbers, offsets, sizes, labels))


def read_index(path):
    images = imagenet_files.read_index(path, (Path("a.tar"),), 6, 2)
    return bits([images.numbers, images.offsets, images.sizes, images.labels])


SETTINGS = {"images": "12ab", "quality": 95, "short_side": 288, "per_file": 10}


def write_settings(path):
    imagenet_cache._claim(path.parent, SETTINGS)
    (path.parent / "settings.json").rename(path)


def read_settings(path):
    (path.parent / "settings.json").write_bytes(path.read_bytes())
    imagenet_cache._claim(path.parent, SETTINGS)


def write_fashion(path):
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28, 1)
    train = Split(images, np.int32([0, 9, 3]))
    fashion_mnist._write_npz(path, train, Split(images[:1], np.int32([5])))


def read_fashion(path):
    return bits([tuple(split) for split in fashion_mnist._read_npz(path)])


ROUND = rewinding.Round("fine_tune", 1, 0.8, 0.91, 600, 1200, 2_000_000)
STAGE = {"history": {"steps": "20", "initial w": ["float32[2]", 0.5], "rates": [0.1]}, "keep": [4]}
CHECKPOINT = {"record": {"cut": 30}, "leaves": {"w": [[2, 3], "float32", 7]}}
SUMMARY = {"test_accuracy": 0.9, "seconds": 3.0, "steps": 80, "device": "cpu", "switches": []}


def read_record(path):
    content = files.unseal(files.read_json(path), str(path))
    checkpoints._RECORD(content, str(path))
    return content


TIMINGS = {"kernel": search.Timing((4, 8), (6, 12), ((1e-6, 2e-6), (2e-6, 4e-6)), (2,), (3,))}


def write_journal(path):
    """The journal of a search that has scored three candidates."""
    if path.exists():
        path.unlink()
    problem = synthetic([np.array([4, 8])] * 2, sum, 12)
    with open_journal(path, problem, "random", {"seed": 0}) as book:
        for index, counts in enumerate([(4, 4), (8, 4), (4, 8)]):
            book.append(index, counts, index / 3)


KINDS = {
    # A plan has a flag for each index of a dimension that shrinks.
    "plan": Kind(lambda path: a_plan().save(path), read_plan, sealed=True, claims=3 * 2**28),
    "storage": Kind(
        lambda path: storage.save(path, PARAMS, MASKS), lambda path: bits(storage.load(path))
    ),
    "plain storage": Kind(
        lambda path: storage.save(path, PARAMS, MASKS, compression=None),
        lambda path: bits(storage.load(path)),
    ),
    "metrics": Kind(write_log, logs.read_records, lenient=True),
    "tars": Kind(write_tars, read_tars, lenient=True),
    "index": Kind(write_index, read_index),
    "settings": Kind(write_settings, read_settings, sealed=True, folder=True),
    "fashion_mnist": Kind(write_fashion, read_fashion),
    "round": Kind(
        lambda path: _stages.write_sealed(path, ROUND._asdict()), rewinding.read_round, sealed=True
    ),
    "stage": Kind(
        lambda path: _stages.write_sealed(path, STAGE),
        lambda path: _stages.read_sealed(path, _stages._STAGE),
        sealed=True,
    ),
    "record": Kind(
        lambda path: path.write_text(json.dumps(files.seal(CHECKPOINT))),
        read_record,
        sealed=True,
    ),
    "journal": Kind(write_journal, search.read_journal, lenient=True),  # a cut end is left out
    "latencies": Kind(
        lambda path: search.Latencies({"kind": "cpu"}, TIMINGS).save(path),
        lambda path: search.load_latencies(path, any_device=True),
        sealed=True,
    ),
    "summary": Kind(
        lambda path: checkpoints.write_json(path, SUMMARY),
        lambda path: command.read_summary(path.parent, ["steps"]),
        lenient=True,  # it has no checksum: people and programs read it
    ),
}


def attempt(kind, path, content, expected, loose=False):
    """Reads a damaged file; returns what is wrong with that, or None.

    `loose`: the content is another one on purpose, with its checksum.
    """
    path.write_bytes(content)
    began = time.process_time()
    tracemalloc.start()
    try:
        found = kind.read(path)
    except ValueError as error:
        named = str(path.parent if kind.folder else path) in str(error)
        problem = None if named and len(str(error)) < 2000 else f"the error {error}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        same = loose or kind.lenient or found == expected
        problem = None if same else f"gives something else: {found}"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if peak > MEMORY + kind.claims * loose:
        problem = f"takes {peak:,} bytes"
    if time.process_time() - began > SECONDS:
        problem = "takes long"
    return problem


def prepare(name, folder):
    kind, path = KINDS[name], folder / ("summary.json" if name == "summary" else "file")
    kind.write(path)
    return kind, path, path.read_bytes(), kind.read(path)


def check_bytes(name, folder, count):
    kind, path, content, expected = prepare(name, folder)
    problems = {}
    for seed in range(count):
        if problem := attempt(kind, path, damaged(content, seed), expected):
            problems[seed] = problem
    assert not problems, problems


@pytest.mark.parametrize("name", KINDS)
def test_damaged_bytes(name, tmp_path):
    check_bytes(name, tmp_path, FEW)


@pytest.mark.faults
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_bytes(name, tmp_path):
    check_bytes(name, tmp_path, MANY)


# ---- values that were changed, with the right checksum: by hand, or by another program


def check_values(name, folder, count):
    """What is read may be another plan or result, but never anything else than such a one."""
    kind, path, content, expected = prepare(name, folder)
    value = json.loads(content)
    value.pop("crc32", None)
    problems, refused = {}, 0
    for seed in range(count):
        other = changed(value, seed)
        other = files.seal(other) if isinstance(other, dict) and "crc32" not in other else other
        text = json.dumps(other).encode()
        if problem := attempt(kind, path, text, expected, loose=True):
            problems[seed] = problem
        try:
            kind.read(path)
        except ValueError:
            refused += 1
    assert not problems, problems
    assert refused > count / 10


JSON = [name for name, kind in KINDS.items() if kind.sealed or name == "summary"]


@pytest.mark.parametrize("name", JSON)
def test_changed_values(name, tmp_path):
    check_values(name, tmp_path, FEW)


@pytest.mark.faults
@pytest.mark.parametrize("name", JSON)
def test_many_changed_values(name, tmp_path):
    check_values(name, tmp_path, MANY)


def check_manifests(count):
    """Parameters whose manifest was changed: every leaf is whole, or there is an error."""
    file = io.BytesIO()
    storage.save(file, PARAMS, MASKS, compression=None)
    arrays = dict(np.load(io.BytesIO(file.getvalue())))
    manifest = json.loads(arrays["manifest"].tobytes())
    for seed in range(count):
        text = json.dumps(changed(manifest, seed)).encode()
        new = io.BytesIO()
        np.savez(new, manifest=np.frombuffer(text, np.uint8), data=arrays["data"])
        tracemalloc.start()
        try:
            params, _ = storage.load(io.BytesIO(new.getvalue()))
            assert isinstance(params, dict) or hasattr(params, "dtype"), seed
        except ValueError as error:
            assert "cannot be read" in str(error) or "`like` is needed" in str(error), seed
        assert tracemalloc.get_traced_memory()[1] < MEMORY, seed
        tracemalloc.stop()


def test_changed_manifests():
    check_manifests(FEW)


@pytest.mark.faults
def test_many_changed_manifests():
    check_manifests(MANY)


def check_switches(count):
    """The record of a run that shrinks, as `structure.Shrinking` reads it."""
    record = {
        "plan": None,
        "phase": 0,
        "cut": 7,
        "history": [{"step": 5, "cost": 2.0, "cost_before": 3.0, "widths": {"a": 3}}],
        "coming": {"step": 9, "keep": {"a:1": [0, 2]}, "phase": 0},
    }
    _shrinking._RECORD(record, "`record`")
    for seed in range(count):
        try:
            _shrinking._RECORD(changed(record, seed), "`record`")
        except ValueError as error:
            assert str(error).startswith("`record"), seed


def test_changed_records_of_switches():
    check_switches(FEW)


@pytest.mark.faults
def test_many_changed_records_of_switches():
    check_switches(MANY)


# ---- one by one: what was met


def resealed(path, change):
    content = files.unseal(json.loads(path.read_text()), "")
    change(content)
    path.write_text(json.dumps(files.seal(content)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["leaves"]["a/b"]["removed"][0].append(-1), "`leaves/a/b/removed/0/"),
        (lambda c: c["leaves"]["a/b"]["removed"][0].append(8), "in 0 .. 7, but is 8"),
        (lambda c: c["leaves"]["a/b"]["removed"][0].append(True), "a whole number"),
        (lambda c: c["leaves"]["a/b"]["removed"].append([]), "each of its 1 dimensions"),
        (lambda c: c["leaves"]["a/b"].update(shape=[None]), "`leaves/a/b/shape/0` must be a whole"),
        (lambda c: c["leaves"]["a/b"].update(shape=[2**40]), "at most 268435456 indices"),
        (lambda c: c["leaves"]["a/w"].update(shape=[2**40] * 2), "no array has the shape"),
        (lambda c: c["parameters"].append("c"), "`parameters` must be one of 'a/w', 'a/b', 'out'"),
        (lambda c: c["order"].append("c"), "`order` must name the same leaves as `leaves`"),
        (lambda c: c["order"].append("a/b"), "must hold each entry once, but has 'a/b' twice"),
        (lambda c: c["consumers"].append([3, 0]), "`consumers/1` must be a whole number in 0 .. 2"),
        (lambda c: c["consumers"].append([0, -1]), "`consumers/1/1` must be a whole number"),
        (lambda c: c["factors"].append([1, [2, 3], 2]), "`factors/1` must be a whole number in"),
        (lambda c: c["factors"].append([1, [0], 0]), "`factors/1/0` must be a whole number of at"),
        (lambda c: c.update(version=2), "a plan of version 2; this jaxprune reads 3"),
        (lambda c: c.pop("caches"), "must have `caches`"),
        (lambda c: c.update(more=1), "must not have `more`"),
    ],
)
def test_a_plan_that_says_something_impossible_is_refused(change, message, tmp_path):
    path = tmp_path / "plan.json"
    a_plan().save(path)
    resealed(path, change)
    with pytest.raises(ValueError) as error:
        structure.load_plan(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_flipped_bit_gives_no_other_plan(tmp_path):
    """Of the same shapes, even: every digit of the file is flipped."""
    path = tmp_path / "plan.json"
    a_plan().save(path)
    content, whole = path.read_bytes(), read_plan(path)
    for at, char in enumerate(content):
        if not 0x30 <= char <= 0x39:
            continue
        path.write_bytes(content[:at] + bytes([char ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"file|plan\.json"):
            structure.load_plan(path)
    path.write_bytes(content)
    assert read_plan(path) == whole


def test_a_plan_is_read_whole_again(tmp_path):
    plan = a_plan()
    plan.save(tmp_path / "plan.json")
    found = structure.load_plan(tmp_path / "plan.json")
    assert found.model == plan.model
    for path, flags in plan.kept.items():
        for own, seen in zip(flags, found.kept[path], strict=True):
            np.testing.assert_array_equal(own, seen)


@pytest.mark.parametrize("number", [0, 1])
def test_a_negative_size_in_a_tar_is_an_error(number, tmp_path):
    """The second one led back to the first header, for ever."""
    path = tmp_path / "train.tar"
    write_tars(path)
    content = bytearray(path.read_bytes())
    name = CONTENTS.classes[number].encode()
    at = content.index(name + b".tar\0")
    header = tarfile.TarInfo.frombuf(bytes(content[at : at + 512]), "utf-8", "strict")
    header.size = -at - 512
    content[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(content)
    message = rf"train\.tar is corrupt at byte {at}: {header.name} has -{at + 512} bytes: delete"
    with pytest.raises(ValueError, match=message):
        imagenet_tars.index_train(path, CONTENTS)


def test_an_index_that_lost_labels_is_corrupt(tmp_path):
    def write(**changes):
        images = imagenet_files.read_index(whole, (Path("a.tar"),), 6, 2)
        arrays = {n: getattr(images, n) for n in ("numbers", "offsets", "sizes", "labels")}
        np.savez(tmp_path / "other.npz", **(arrays | changes))

    whole = tmp_path / "index.npz"
    write_index(whole)
    labels = np.zeros(6, np.int32)
    for changes, message in [
        ({"labels": labels[:5]}, r"`labels` must have the shape \[6\], but has \[5\]"),
        ({"labels": labels.astype(np.int64)}, "`labels` must be int32"),
        ({"labels": labels + 2}, r"`labels` must be in 0 \.\. 1"),
        ({"labels": labels - 1}, r"`labels` must be in 0 \.\. 1"),
        ({"numbers": np.ones(6, np.int16)}, r"`numbers` must be in 0 \.\. 0"),
        ({"offsets": np.zeros(6, np.int64)}, "`offsets` must be in 512"),
        ({"sizes": np.full(6, -1, np.int32)}, "`sizes` must be in 0"),
    ]:
        write(**changes)
        with pytest.raises(ValueError, match=rf"other\.npz is corrupt \({message}"):
            imagenet_files.read_index(tmp_path / "other.npz", (Path("a.tar"),), 6, 2)
    with pytest.raises(ValueError, match="it must be of 7 images, but is of 6"):
        imagenet_files.read_index(whole, (Path("a.tar"),), 7, 2)
