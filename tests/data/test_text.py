"""Windows of text: read right across files, held out without overlap, in an order that resumes."""

import os
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune.data import text


@pytest.fixture
def folder(tmp_path):
    """Files of all kinds, out of order; the text is what `TEXT` says."""
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


FILES = {
    "z.txt": b"last " * 60,
    "a.md": b"first" * 50,
    "b/c": bytes(range(1, 256)),
    "empty": b"",
    "image.png": b"\x89PNG\0\0 is no text",
    ".hidden": b"hidden",
    ".git/config": b"hidden",
}
TEXT = FILES["a.md"] + FILES["b/c"] + FILES["z.txt"]


def test_files_follow_one_another_in_the_order_of_paths(folder):
    corpus = text.open_folder(folder)
    names = [os.path.relpath(path, folder) for path in corpus.files]
    assert names == ["a.md", os.path.join("b", "c"), "z.txt"]
    assert corpus.size == len(TEXT)
    assert text.read(corpus, 0, corpus.size).tobytes() == TEXT


@given(start=st.integers(0, len(TEXT)), count=st.integers(0, len(TEXT)))
def test_bytes_are_read_across_files(tmp_path_factory, start, count):
    root = tmp_path_factory.getbasetemp() / "across"
    for name, content in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    corpus = text.open_folder(root)
    if start + count > len(TEXT):
        with pytest.raises(ValueError, match="is the end of the text"):
            text.read(corpus, start, count)
    else:
        found = text.read(corpus, start, count)
        assert found.dtype == np.uint8 and found.tobytes() == TEXT[start : start + count]


@given(size=st.integers(21, 4_000_000), length=st.integers(1, 2000))
def test_training_never_sees_what_is_held_out(size, length):
    corpus = text.Corpus(("a",), (0, size))
    if size < text.EVERY * (length + 1):
        with pytest.raises(ValueError, match="`length`"):
            text.split(corpus, length)
        return
    train, test = text.split(corpus, length)
    share = test.size / (train.size + test.size)
    assert 1 / (2 * text.EVERY) < share <= 1 / text.EVERY
    assert train.size + test.size >= (size // (length + 1)) * (1 - 2 / text.EVERY) - 1
    every = max(1, (train.size + test.size) // 500)
    places = [[own.start(i) for i in range(0, own.size, every)] for own in (train, test)]
    for own, part in zip(places, (train, test), strict=True):
        assert own == sorted(set(own)) and own[-1] + length + 1 <= size
        # The last byte that is read is the one that follows the window.
        blocks = {place // part.block for start in own for place in (start, start + length)}
        assert all((block % text.EVERY == text.EVERY - 1) == part.held_out for block in blocks)


def test_windows_tile_each_block_but_for_its_last_byte():
    train, test = text.split(text.Corpus(("a",), (0, 40_040)), 50)
    starts = sorted([*map(train.start, range(train.size)), *map(test.start, range(test.size))])
    assert train.block == 1001
    assert starts == [
        block + place for block in range(0, 40_040, 1001) for place in range(0, 1000, 50)
    ]


def test_a_small_corpus_is_held_out_in_small_blocks():
    _, test = text.split(text.Corpus(("a",), (0, 220)), 10)
    assert (test.size, test.start(0)) == (1, 209)
    _, large = text.split(text.Corpus(("a",), (0, 10**8)), 1000)
    assert large.block == 65_001  # whole windows in 2**16 bytes, and a byte that follows


def test_each_byte_has_the_one_that_follows(folder):
    corpus = text.open_folder(folder)
    train, _ = text.split(corpus, 16)
    tokens, following = text.examples(corpus, train, [0, train.size - 1])
    for row, index in enumerate([0, train.size - 1]):
        start = train.start(index)
        assert tokens[row].tobytes() == TEXT[start : start + 16]
        assert following[row].tobytes() == TEXT[start + 1 : start + 17]


def batches(corpus, windows, count, **options):
    found = text.train_batches(corpus, windows, 4, seed=3, **options)
    return [np.concatenate(next(found), axis=1) for _ in range(count)]


def test_an_epoch_has_each_window_once_and_resumes_anywhere(folder):
    corpus = text.open_folder(folder)
    train, _ = text.split(corpus, 16)
    epoch = train.size // 4
    all_of_them = batches(corpus, train, 2 * epoch)
    expected = {TEXT[train.start(i) : train.start(i) + 16] for i in range(train.size)}
    seen = [row[:16].tobytes() for batch in all_of_them[:epoch] for row in batch]
    assert len(seen) >= train.size - 3 and set(seen) <= expected
    assert not all(map(np.array_equal, all_of_them[:epoch], all_of_them[epoch:]))
    for start in (1, epoch + 1):
        np.testing.assert_array_equal(
            batches(corpus, train, 2, start=start), all_of_them[start : start + 2]
        )


def test_each_process_gets_its_rows(folder):
    corpus = text.open_folder(folder)
    train, _ = text.split(corpus, 16)
    whole = batches(corpus, train, 3)
    parts = [batches(corpus, train, 3, process_index=i, process_count=2) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    with pytest.raises(ValueError, match=r"`batch_size` must be a multiple.*got 4"):
        text.train_batches(corpus, train, 4, seed=0, process_count=3)


def test_the_fingerprint_sees_changes_of_content_and_size(folder):
    corpus = text.open_folder(folder)
    found = {text.fingerprint(corpus)}
    for content in (b"First" + FILES["a.md"][5:], FILES["a.md"][:-1] + b"!", FILES["a.md"] + b"!"):
        (folder / "a.md").write_bytes(content)
        found.add(text.fingerprint(text.open_folder(folder)))
    assert len(found) == 4


def test_a_file_that_has_become_shorter_is_an_error(folder):
    corpus = text.open_folder(folder)
    (folder / "z.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"z\.txt has become shorter"):
        text.read(corpus, 0, corpus.size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "absent", "`folder` must be a folder with text files"),
        (lambda root: root / "a.md", "`folder` must be a folder with text files"),
        (lambda root: root / "b" / "only", "has no text: 1 files, all empty or binary"),
    ],
)
def test_folders_without_text(folder, make, message):
    (folder / "b" / "only").mkdir()
    (folder / "b" / "only" / "image").write_bytes(b"\0")
    with pytest.raises(ValueError, match=re.escape(message)):
        text.open_folder(make(folder))


def test_too_little_text_says_how_much_is_needed():
    with pytest.raises(ValueError, match=r"`length` 10 needs 220 bytes of text.*there are 200"):
        text.split(text.Corpus(("a",), (0, 200)), 10)
    with pytest.raises(ValueError, match="`length` must be at least 1; got 0"):
        text.split(text.Corpus(("a",), (0, 200)), 0)
