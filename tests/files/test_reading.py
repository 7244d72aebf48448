"""Schemas name what is wrong, JSON is read strictly, and no array is longer than its file."""

import io
import json
import zipfile

import numpy as np
import pytest

from jaxprune import files
from jaxprune.files import schemas

RUN = schemas.record(
    {
        "name": schemas.text,
        "steps": schemas.whole(low=1, high=9),
        "rows": schemas.each(schemas.each(schemas.whole(), length=2)),
        "by name": schemas.table(schemas.maybe(schemas.finite)),
    },
    optional={"kind": schemas.one_of("a", 1)},
)
GOOD = {"name": "x", "steps": 9, "rows": [[0, 1], (2, 3)], "by name": {"a": 1, "b": None}}


@pytest.mark.parametrize("more", [{}, {"kind": "a"}, {"kind": 1}, {"steps": 1}, {"rows": []}])
def test_what_fits_is_accepted(more):
    RUN(GOOD | more, "run.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"name": 3}, "`name` must be a text, but is 3"),
        ({"steps": 10}, "`steps` must be a whole number in 1 .. 9, but is 10"),
        ({"steps": True}, "`steps` must be a whole number in 1 .. 9, but is True"),
        ({"steps": 1.0}, "`steps` must be a whole number in 1 .. 9, but is 1.0"),
        ({"steps": np.int64(1)}, "`steps` must be a whole number in 1 .. 9, but is int64"),
        ({"rows": {}}, "`rows` must be a list, but is dict"),
        ({"rows": [[1, 2], [3]]}, "`rows/1` must have 2 entries, but has 1"),
        ({"rows": [[1, -2]]}, "`rows/0/1` must be a whole number of at least 0, but is -2"),
        ({"rows": [[1, 2**63]]}, "`rows/0/1` must be a whole number of at least 0, but is 9223"),
        ({"by name": {"a": float("nan")}}, "`by name/a` must be a finite number, but is nan"),
        ({"by name": {"a": False}}, "`by name/a` must be a number, but is False"),
        ({"by name": {"\ud800": ""}}, r"`by name/\ud800` must be a number, but is ''"),
        ({"by name": {3: 1}}, "the name 3 must be a text"),
        ({"by name": []}, "`by name` must be an object, but is list"),
        ({"kind": True}, "`kind` must be one of 'a', 1, but is True"),
        ({"kind": []}, "`kind` must be one of 'a', 1, but is list"),
        ({"other": 1}, "run.json must not have `other`"),
        ({"name": "x" * 10**6, "steps": "y" * 10**6}, "but is 'yyyyy"),
    ],
)
def test_what_does_not_fit_is_named(more, message):
    with pytest.raises(ValueError) as error:
        RUN(GOOD | more, "run.json")
    text = str(error.value)
    assert text.startswith("run.json") and message in text and len(text) < 300
    text.encode()  # it can be printed


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="run.json must have `steps`, but has `name`, `rows`, `by"):
        RUN({name: value for name, value in GOOD.items() if name != "steps"}, "run.json")
    with pytest.raises(ValueError, match="run.json must have `name`, but has nothing"):
        RUN({}, "run.json")
    with pytest.raises(ValueError, match="run.json must be an object, but is None"):
        RUN(None, "run.json")


# ---- JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting"),
        (b"\xff", "codec can't decode"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the name 'c' occurs twice"),
        (b"[" * 10**6, "nested too deeply"),
        (b'{"a":' * 10**5, "nested too deeply"),
        (b"9" * 5000, "4300 digits"),
    ],
)
def test_json_that_is_none(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        files.parse_json(content)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json is damaged \(.*{message}.*restore it from a"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", [{"b": [0.1, float("nan"), -0.0], "a": (1, 2)}, {3: {4: "5"}}])
def test_a_seal_outlives_json_and_another_order_of_names(content):
    sealed = files.seal(content)
    again = json.loads(json.dumps(sealed, sort_keys=True, indent=3))
    for one in (sealed, again):
        assert json.dumps(files.unseal(one, ""), sort_keys=True) == json.dumps(
            json.loads(json.dumps(content)), sort_keys=True
        )


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"a": 1},
        {"a": 1, "crc32": None},
        {"a": 1, "crc32": True},
        files.seal({"a": 1}) | {"a": 2},
        files.seal({"a": 1}) | {"a": 1.0},
        files.seal({"a": 1}) | {"b": 1},
        files.seal({"a": 1}) | {"a": object()},
    ],
)
def test_a_broken_seal_is_an_error(content):
    with pytest.raises(ValueError, match=r"a\.json is damaged: it"):
        files.unseal(content, "a.json")


def test_a_seal_takes_no_name():
    with pytest.raises(ValueError, match="`content` must not have the name 'crc32'"):
        files.seal(files.seal({"a": 1}))


# ---- arrays


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file


EXPECTED = {"a": ("float32", ("n", 2)), "b": ("int32", ("n",))}
A, B = np.ones((3, 2), np.float32), np.arange(3, dtype=np.int32)


def test_arrays_come_back():
    found = files.read_arrays(npz(b=B, a=A), EXPECTED)
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["a"], A, strict=True)
    np.testing.assert_array_equal(found["b"], B, strict=True)
    empty = files.read_arrays(npz(a=A[:0], b=B[:0]), EXPECTED)
    assert empty["a"].shape == (0, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": A}, "it must hold a.npy, b.npy, but holds a.npy"),
        ({}, "but holds nothing"),
        ({"a": A, "b": B, "c": B}, "but holds a.npy, b.npy, c.npy"),
        ({"a": A, "b": B[:2]}, r"`b` must have the shape \[3\], but has \[2\]"),
        ({"a": A[:, :1], "b": B}, r"`a` must have the shape \[n, 2\], but has \[3, 1\]"),
        ({"a": A[0], "b": B}, r"`a` must have the shape \[n, 2\], but has \[2\]"),
        ({"a": A, "b": B[None]}, r"`b` must have the shape \[3\], but has \[1, 3\]"),
        ({"a": A, "b": B.astype(np.int64)}, "`b` must be int32 in row-major order, but is int64"),
        ({"a": A, "b": B.astype(">i4")}, "`b` must be int32 in row-major order, but is >i4"),
        ({"a": np.asfortranarray(A), "b": B}, "`a` must be float32 in row-major order"),
        ({"a": np.array([None]), "b": B}, "`a` must be float32"),
    ],
)
def test_other_arrays_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        files.read_arrays(npz(**arrays), EXPECTED)


def test_headers_are_held_against_their_bytes():
    """NumPy would read fewer values, never see the end, and so not verify the checksum."""
    for shape in [(2,), (4,), (-3,), (-1, -3), (3, 1), (2**62,), ()]:
        header, file = io.BytesIO(), io.BytesIO()
        kind = {"descr": "<i4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, kind)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("b.npy", header.getvalue() + B.tobytes())
        with pytest.raises(ValueError, match="`b` "):
            files.read_arrays(file, {"b": ("int32", ("n",))})


def test_members_of_the_same_name_are_refused():
    file = npz(a=A, b=B)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(ValueError, match="but holds a.npy, b.npy, a.npy"):
        files.read_arrays(file, EXPECTED)
