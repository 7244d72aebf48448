"""Runs commands as child processes, several at once, each in a folder and on cores of its own."""

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def run(
    commands: Mapping[str, Sequence[str]], workdir: Path, at_once: int, stopped: Sequence[Any]
) -> Iterator[tuple[str, int]]:
    """Yields `(name, exit code)` of each command that ended.

    Args:
        commands: name -> command line. `workdir/name/log.txt` is what it prints.
        workdir: of the folders, and of the compiled programs that they share.
        at_once: how many run at the same time, each on its share of the cores.
        stopped: as soon as this is not empty, children are asked to end and nothing is started.
    """
    waiting, children = list(commands), {}
    try:
        while (waiting or children) and not stopped:
            for slot in range(at_once):
                if slot in children and children[slot][1].poll() is not None:
                    name, child = children.pop(slot)
                    yield name, child.returncode
                if slot not in children and waiting and not stopped:
                    name = waiting.pop(0)
                    children[slot] = name, start(commands[name], workdir, name)
                    give_cores(children[slot][1], slot, at_once)
            time.sleep(0.1)
    finally:
        for _, child in children.values():
            child.terminate()  # it saves, then ends
        for _, child in children.values():
            child.wait()


def start(command: Sequence[str], workdir: Path, name: str) -> subprocess.Popen[bytes]:
    """Starts a command; an error if a child that outlived its parent still runs it."""
    folder = workdir / name
    folder.mkdir(exist_ok=True)
    cache = str(workdir.absolute() / "compilation_cache")
    environment = {"JAX_COMPILATION_CACHE_DIR": cache} | os.environ
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    with (folder / "log.txt").open("ab") as log:
        try:  # the child inherits the locked file as its output: the lock lives as long as it does
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training {folder}; wait or end it") from None
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, env=environment, **pipes)


def give_cores(child: subprocess.Popen[bytes], slot: int, slots: int) -> None:
    """Puts a child on its share of the cores, before it starts threads."""
    if slots > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(child.pid, cores[slot % len(cores) :: slots])
