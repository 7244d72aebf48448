"""`files.replacing` leaves the old file or the whole new one: errors, kills, several writers."""

import os
import stat
import subprocess
import sys
import threading
import time

import pytest

from jaxprune import files


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(("mode", "content"), [("w", "5 ± 1\n"), ("wb", b"\x00\xff\n")])
def test_the_content_is_what_was_written(mode, content, tmp_path):
    path = tmp_path / "a"
    for _ in range(2):  # a new file, and one that is there
        with files.replacing(path, mode) as file:
            file.write(content)
        found = path.read_bytes()
        assert found == (content.encode("utf-8") if mode == "w" else content)
    assert names(tmp_path) == ["a"]


def test_a_path_may_be_a_string_and_nothing_may_be_written(tmp_path):
    (tmp_path / "a").write_text("old")
    with files.replacing(str(tmp_path / "a")):
        pass
    assert (tmp_path / "a").read_text() == ""


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_leaves_the_old_file_and_no_litter(there, error, tmp_path):
    path = tmp_path / "a"
    if there:
        path.write_text("old")
    with pytest.raises(error), files.replacing(path) as file:
        file.write("half")
        raise error("stopped")
    assert names(tmp_path) == (["a"] if there else [])
    assert not there or path.read_text() == "old"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_an_error_of_the_system_leaves_the_old_file_and_no_litter(name, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, name, fails)
    with pytest.raises(OSError, match="disk full"), files.replacing(path) as file:
        file.write("new")
    assert (names(tmp_path), path.read_text()) == (["a"], "old")


def test_the_content_is_on_disk_before_it_takes_its_name_and_then_the_name_is(
    tmp_path, monkeypatch
):
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        kind = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(kind.st_mode) else kind.st_size)
        fsync(descriptor)

    def replaced(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with files.replacing(tmp_path / "a", "wb") as file:
        file.write(b"new")
    assert events == [3, "replace", "folder"]


# Stops at the point that is named, with all of the new content on disk, until it is killed.
WRITER = """
import os, sys, time
from jaxprune import files

path, name = sys.argv[1:]

def wait(*_):
    print("here", flush=True)
    time.sleep(60)

setattr(os, name, wait)
with files.replacing(path) as file:
    file.write("new" * 100_000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_kill_before_the_rename_leaves_the_old_file(name, tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    command = [sys.executable, "-c", WRITER, str(path), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stdout.readline() == "here\n"
        child.kill()
    assert path.read_text() == "old"
    left = [entry for entry in names(tmp_path) if entry != "a"]
    assert len(left) == 1 and left[0].startswith(".a.") and left[0].endswith(".tmp")
    with files.replacing(path) as file:  # what the killed writer left is in nobody's way
        file.write("newer")
    assert path.read_text() == "newer"


def test_permissions_are_those_of_open(tmp_path):
    path = tmp_path / "a"
    old = os.umask(0o027)
    try:
        with files.replacing(path):
            pass
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o600)
        with files.replacing(path):
            pass
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, "a file that is there keeps its own"
    finally:
        os.umask(old)


@pytest.mark.slow
def test_readers_beside_several_writers_always_see_a_whole_file(tmp_path):
    path = tmp_path / "a"
    whole = {letter * 50_000 for letter in "abc"}
    path.write_text("a" * 50_000)
    stop = time.monotonic() + 1

    def write(text):
        while time.monotonic() < stop:
            with files.replacing(path) as file:
                file.write(text[:25_000])
                file.write(text[25_000:])

    writers = [threading.Thread(target=write, args=[text]) for text in whole]
    for writer in writers:
        writer.start()
    seen = set()
    while time.monotonic() < stop:
        seen.add(path.read_text())
    for writer in writers:
        writer.join()
    assert seen <= whole and len(seen) > 1
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("mode", ["a", "r", "x", "w+", ""])
def test_other_modes_are_refused(mode, tmp_path):
    message = f"`mode` must be 'w' or 'wb'; got {mode!r}"
    with pytest.raises(ValueError) as error, files.replacing(tmp_path / "a", mode):
        pass
    assert str(error.value) == message
    assert names(tmp_path) == []


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "no" / "a"):
        pass


# ---- what killed writers leave


def old(path, content=""):
    path.write_text(content)
    os.utime(path, (0, 0))
    return path


def test_the_next_writer_deletes_what_killed_ones_left(tmp_path):
    code = "0123456789abcdef" * 2
    left = [old(tmp_path / f".a.{code}.tmp"), old(tmp_path / f".a.{code[::-1]}.tmp")]
    others = [
        old(tmp_path / name)
        for name in (f".b.{code}.tmp", f".a.b.{code}.tmp", ".a.mine.tmp", f"a.{code}.tmp", ".a.tmp")
    ]
    (tmp_path / f".a.{'f' * 32}.tmp").symlink_to(others[0])
    with files.replacing(tmp_path / "a") as file:
        file.write("new")
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)
    assert (tmp_path / "a").read_text() == "new"


def test_what_is_being_written_is_left_alone(tmp_path):
    with files.replacing(tmp_path / "a") as file:
        file.write("first")
        file.flush()
        (mine,) = tmp_path.iterdir()
        os.utime(mine, (0, 0))
        with files.replacing(tmp_path / "a") as other:
            other.write("second")
        assert mine.exists() and (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first"
    assert names(tmp_path) == ["a"]


def test_a_link_at_the_name_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").write_text("mine")
    (tmp_path / "folder" / "a").symlink_to(tmp_path / "other")
    with files.replacing(tmp_path / "folder" / "a") as file:
        file.write("new")
    assert (tmp_path / "other").read_text() == "mine"
    assert (tmp_path / "folder" / "a").read_text() == "new"


def test_appending_follows_no_link(tmp_path):
    for text in (b"one\n", b"two\n"):
        with files.appending(tmp_path / "log.txt") as file:
            file.write(text)
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"
    (tmp_path / "link").symlink_to(tmp_path / "log.txt")
    with pytest.raises(ValueError, match=r"link must be a file, but is a symbolic link to .*log"):
        files.appending(tmp_path / "link")
    with pytest.raises(FileNotFoundError):
        files.appending(tmp_path / "no" / "log.txt")
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"
