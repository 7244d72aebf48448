"""One user of a folder at a time; a lock that a killed process had is free."""

import json
import os
import signal
import subprocess
import sys

import pytest

from jaxprune import files

HOLDER = """
import sys, time
from jaxprune import files

with files.locked(sys.argv[1]):
    print("here", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_locked_until_the_block_ends(tmp_path):
    message = rf"the run .*{tmp_path.name} is in use by process {os.getpid()} on .* since 20"
    for _ in range(2):
        with files.locked(tmp_path) as lock:
            lock.check()
            own = json.loads((tmp_path / ".lock").read_text())
            assert own["process"] == os.getpid()
            with pytest.raises(ValueError, match=message), files.locked(tmp_path, "the run"):
                pass
            lock.check()
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), files.locked(tmp_path):
        raise KeyError
    with files.locked(tmp_path):
        pass


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_free(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stdout.readline() == "here\n"
        with pytest.raises(ValueError, match=f"is in use by process {child.pid} on"):
            with files.locked(tmp_path):
                pass
        child.send_signal(signal.SIGKILL)
    assert (tmp_path / ".lock").exists()
    with files.locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[", "[]", '{"process": 1}', "\0" * 2000])
def test_whatever_a_lock_file_says(content, tmp_path):
    (tmp_path / ".lock").write_text(content)
    with files.locked(tmp_path):
        (tmp_path / ".lock").write_text(content)
        with pytest.raises(ValueError, match="is in use by another process; wait"):
            with files.locked(tmp_path):
                pass


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_is_deleted_or_replaced_is_noticed(replaced, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with files.locked(folder, "`workdir`") as lock:
        folder.rename(tmp_path / "away")
        if replaced:
            folder.mkdir()
            (folder / ".lock").write_text("of another one")
        with pytest.raises(ValueError, match="`workdir` .*run was deleted, moved or replaced"):
            lock.check()
    assert (folder / ".lock").exists() == replaced


def test_a_lock_follows_no_link(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "other")
    with pytest.raises(OSError), files.locked(tmp_path):
        pass
    assert (tmp_path / "other").read_text() == "mine"


def test_where_there_are_no_locks_none_is_held(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def fails(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", fails)
    with files.locked(tmp_path), files.locked(tmp_path):
        pass
    left = tmp_path / f".a.{'0' * 32}.tmp"
    left.write_text("perhaps somebody is writing")
    os.utime(left, (0, 0))
    with files.replacing(tmp_path / "a"):
        pass
    assert left.exists()
