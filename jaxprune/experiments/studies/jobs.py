"""Runs commands as child processes, several at once, each with a folder and cores of its own."""

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import checkpoints, files
from jaxprune.experiments import command

# Yields name and exit code of each command that ended; closing it stops the others.
Ends = Generator[tuple[str, int], None, None]


def follow(
    commands: Mapping[str, Sequence[str]],
    workdir: Path,
    at_once: int,
    *,
    done: int,
    total: int,
    finished: Callable[[str], str | None],
    engine: Callable[..., Ends],
    cached: bool = True,
) -> dict[str, str]:
    """Runs commands and shows their progress; a signal ends the program when they have saved.

    Args:
        commands: see `run`.
        workdir: see `run`.
        at_once: see `run`.
        done: how many of the total are finished already.
        total: how many there are in all.
        finished: function from a name to what to print, or None if the command failed.
        engine: `run`, or what starts commands in a different way.
        cached: see `run`.

    Returns:
        Name -> message of each command that failed.
    """
    from rich import progress

    failed, began = {}, time.perf_counter()
    columns = progress.BarColumn(), progress.MofNCompleteColumn(), "{task.description}"
    bar = progress.Progress(*columns, disable=not sys.stdout.isatty())  # prints go above it
    task = bar.add_task("", total=total, completed=done)
    with checkpoints.stop_signals() as stopped, bar:
        running = engine(commands, workdir, at_once, stopped, cached=cached)
        with contextlib.closing(running) as ends:
            for ended, (name, code) in enumerate(ends, start=1):
                text = finished(name)
                if text is None:
                    text = failed[name] = f"FAILED with code {code}"
                seconds = (time.perf_counter() - began) / ended * (len(commands) - ended)
                left = f"{seconds / 60:.1f} minutes left"
                print(f"{done + ended}/{total}  {name}  {text}  {left}", flush=True)
                bar.update(task, completed=done + ended, description=left)
    for name, text in failed.items():
        print(f"{name} {text}; see {workdir / name / 'log.txt'}")
    if stopped:
        print("stopped; run the same command to resume")
        sys.exit(128 + stopped[0])  # as shells report it: the study is not complete
    return failed


def train_in_turn(
    commands: Mapping[str, Sequence[str]],
    workdir: Path,
    needs: Sequence[str],
    *,
    show: Callable[[Mapping[str, Any]], str],
    finished: Callable[[Path], Any],
) -> dict[str, str]:
    """Runs commands of train.py one after the other, but for those that are finished already.

    Args:
        commands: see `run`.
        workdir: see `run`.
        needs: what summary.json of a finished run has.
        show: function from it to what to print.
        finished: called with `workdir` after each run, such as to write results.

    Returns:
        Name -> message of each command that failed.
    """
    waiting = {
        name: words
        for name, words in commands.items()
        if command.read_summary(workdir / name, needs) is None
    }

    def text_of(name: str) -> str | None:
        finished(workdir)
        summary = command.read_summary(workdir / name, needs)
        return None if summary is None else show(summary)

    done, total = len(commands) - len(waiting), len(commands)
    print(f"{done} of {total} runs are finished already", flush=True)
    return follow(waiting, workdir, 1, done=done, total=total, finished=text_of, engine=run)


def run(
    commands: Mapping[str, Sequence[str]],
    workdir: Path,
    at_once: int,
    stopped: Sequence[Any],
    *,
    cached: bool = True,
) -> Ends:
    """Yields `(name, exit code)` of each command that ended.

    Args:
        commands: name -> command line. It prints into `workdir/name/log.txt`.
        workdir: gets these folders, and the compiled programs that the commands share.
        at_once: how many run at the same time, each on its share of the cores.
        stopped: as soon as this is not empty, children are asked to end and nothing is started.
        cached: whether compiled programs are shared; if not, each command compiles its own.
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
                    children[slot] = name, start(commands[name], workdir, name, cached=cached)
                    give_cores(children[slot][1], slot, at_once)
            time.sleep(0.1)
    finally:
        for _, child in children.values():
            child.terminate()  # it saves, then ends
        for _, child in children.values():
            child.wait()


def start(
    words: Sequence[str], workdir: Path, name: str, *, cached: bool = True
) -> subprocess.Popen[bytes]:
    """Starts a command; raises if a child that outlived its parent is still running it.

    Raises:
        ValueError: such a child is there, or log.txt is a symbolic link.
    """
    folder = workdir / name
    folder.mkdir(exist_ok=True)
    cache = str(workdir.absolute() / "compilation_cache")
    environment = {"JAX_COMPILATION_CACHE_DIR": cache} | os.environ
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment |= {} if cached else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    with files.appending(folder / "log.txt") as log:
        try:  # the child inherits the locked file as its output: the lock lives as long as it does
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training {folder}; wait or end it") from None
        return subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def give_cores(child: subprocess.Popen[bytes], slot: int, slots: int) -> None:
    """Restricts a child to its share of the cores, before it starts threads."""
    if slots > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(child.pid, cores[slot % len(cores) :: slots])
