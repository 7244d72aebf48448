"""Coordinates processes that train together: they connect, agree, and stop at the same step.

All of them run the same program on the same numbers; only the first one writes files and prints.
Everything here works for a single process, too. With several, every process must make each call, in
the same order.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = [
    "check_same",
    "from_first",
    "is_cluster",
    "is_first",
    "lost_is_an_error",
    "on_first",
    "on_host",
    "say",
    "signals",
    "start",
    "stop_together",
]

LIMIT = 1 << 16  # largest number of bytes that `check_same` compares


def on_first(call: Callable[[], Any]) -> Any:
    """Calls a function on the first process and returns its result on all of them.

    Read files with it that decide how a run continues: all processes then decide alike, whatever
    their file systems show at that moment. Write files with it that others read: no process
    continues before the file exists.

    Args:
        call: a function whose result is ready for JSON. It must not wait for other processes.

    Returns:
        The result of `call`; with several processes, after a trip through JSON.

    Raises:
        Exception: if `call` raised: the same error on the first process, and a ValueError with the
            same message on the others.

    Example:
        >>> on_first(lambda: {"step": 3})
        {'step': 3}
    """
    if jax.process_count() == 1:
        return call()
    text, raised = "", None
    if jax.process_index() == 0:
        try:
            text = json.dumps([call(), None])
        except Exception as error:  # send the error, or the others would hang
            text, raised = json.dumps([None, str(error)]), error
    value, message = json.loads(_broadcast(text.encode()))
    if raised is not None:
        raise raised
    if message is not None:
        raise ValueError(message)
    return value


def _broadcast(text: bytes) -> bytes:
    """Returns the bytes of the first process on all of them."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # Every size compiles, so round up to powers of two.
    padded = np.zeros(max(1024, 1 << (length - 1).bit_length()), np.uint8)
    if jax.process_index() == 0:
        padded[:length] = np.frombuffer(text, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)[:length])


def from_first(tree: Any) -> Any:
    """Replaces arrays that each process computed by those of the first process.

    Rounding can differ between machines, and so can a ranking of the results.

    Args:
        tree: arrays of the same shapes and dtypes on all processes.

    Returns:
        The tree of the first process.

    Example:
        >>> from_first({"mask": np.array([True, False])})["mask"].tolist()
        [True, False]
    """
    if jax.process_count() == 1:
        return tree
    return multihost_utils.broadcast_one_to_all(jax.tree.map(on_host, tree))


def on_host(array: Any) -> np.ndarray:
    """Copies an array to the host, also one that is spread over processes.

    Args:
        array: array of numbers on any devices.

    Returns:
        A NumPy array.

    Example:
        >>> import jax.numpy as jnp
        >>> on_host(jnp.arange(3)).tolist()
        [0, 1, 2]
    """
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def start(
    coordinator: str = "", processes: int = 1, process: int = 0, *, timeout: int = 100
) -> None:
    """Connects to the other processes of a run, if there are any.

    Call it before anything else uses JAX. With `coordinator` it connects as told; under SLURM and
    on the hosts of a TPU pod JAX finds the other processes itself; elsewhere nothing happens.

    Args:
        coordinator: address of the first process, such as `"10.0.0.1:1234"`.
        processes: number of processes; used only with `coordinator`.
        process: number of this process, from 0; used only with `coordinator`.
        timeout: seconds without a heartbeat after which a process counts as lost.

    Raises:
        ValueError: if the other processes were not found.

    Example:
        >>> start()  # alone: nothing to connect to
    """
    if coordinator:
        _shorten_stderr()
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=timeout
        )
    elif is_cluster(os.environ):
        _shorten_stderr()
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=timeout)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"JAX has not found the other processes: {error}\nSay where the first one is with "
                "`coordinator`, `processes` and `process`. If there is only this process, set "
                "TPU_SKIP_MDS_QUERY=1, or SLURM_NTASKS=1 under SLURM."
            ) from error


# Reads what a process prints to stderr, and passes it on without what JAX prints before it aborts
# because another process is lost. Lines after the first hint are held back until it is known.
_FILTER = r"""
import signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name, signal.SIGINT), signal.SIG_IGN)
hints = b"coordination_service", b"preemption_sync_manager"  # the files of JAX that notice it first
held, lost = None, False
for line in sys.stdin.buffer:
    lost = lost or b"the JAX distributed service detected fatal errors" in line
    if held is None and (lost or any(hint in line for hint in hints)):
        held = []
    if held is None:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
    else:
        held.append(line)
own = [line for line in held or [] if line.startswith(b"error: ")]
shown = (own or [sys.argv[1].encode()]) if lost else held or []
sys.stderr.buffer.writelines(shown)
"""
_GO_ON = (
    "The newest checkpoint is complete; run the same command on all hosts to continue from there."
)


def _shorten_stderr() -> None:
    """Lets this process print one line, not a stack of C++, when JAX aborts it.

    JAX ends a process from a thread of its own as soon as another one is lost. Its client takes a
    function to call instead, but jaxlib 0.10 cannot call one of Python (`std::bad_cast`).
    """
    text = f"error: a different process of this run ended: see what it printed. {_GO_ON}\n"
    words = [sys.executable, "-I", "-S", "-c", _FILTER, text]
    child = subprocess.Popen(words, stdin=subprocess.PIPE)
    assert child.stdin is not None
    sys.stderr.flush()
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()
    child.returncode = 0  # it ends after this process, so nobody waits for it


def is_cluster(environment: Mapping[str, str]) -> bool:
    """Tells whether SLURM started several tasks, or this may be one of several hosts of a TPU.

    A cluster of containers lists its hosts in a variable. Elsewhere a metadata server knows them,
    so a machine with TPU chips may be one of several unless a variable says to skip that server.

    Args:
        environment: the environment variables, such as `os.environ`.

    Returns:
        True if JAX should look for other processes.

    Example:
        >>> is_cluster({"SLURM_NTASKS": "4"}), is_cluster({"TPU_WORKER_HOSTNAMES": "localhost"})
        (True, False)
    """
    tasks = environment.get("SLURM_NTASKS", "1")
    names = environment.get("TPU_WORKER_HOSTNAMES")
    chips = "TPU_ML_PLATFORM" in environment and "TPU_SKIP_MDS_QUERY" not in environment
    of_tpu = chips if names is None else "," in names
    return (tasks.isdigit() and int(tasks) > 1) or of_tpu


def is_first() -> bool:
    """Tells whether this process is the one that writes files and prints.

    Returns:
        True on process 0.

    Example:
        >>> is_first()
        True
    """
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints on the first process only.

    Args:
        text: the line to print.

    Example:
        >>> say("step 3")
        step 3
    """
    if is_first():
        print(text, flush=True)


def check_same(values: Mapping[str, Any]) -> None:
    """Raises on every process if the processes do not have the same values.

    Args:
        values: name -> value that is ready for JSON; at most `LIMIT` bytes of JSON together.

    Raises:
        ValueError: if values differ; it lists each value with the processes that have it.

    Example:
        >>> check_same({"seed": 0})  # a single process agrees with itself
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(values, sort_keys=True).encode()
    if len(text) > LIMIT:
        raise ValueError(f"`values` must be at most {LIMIT} bytes of JSON, but are {len(text)}.")
    padded = np.zeros(LIMIT, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    differing = differences([json.loads(bytes(row).rstrip(b"\0")) for row in rows])
    if differing:
        raise ValueError("processes of a run must agree:\n" + "\n".join(differing))


def differences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Makes a line for each name whose value is not the same on all processes.

    Args:
        found: the values of each process, in order.

    Example:
        >>> differences([{"seed": 0}, {"seed": 1}, {"seed": 0}])
        ['  seed: 0 on process 0, 2; 1 on process 1']
    """
    lines = []
    for name in sorted(set().union(*found)):
        values = [json.dumps(own.get(name)) for own in found]
        if len(set(values)) > 1:
            parts = []
            for value in dict.fromkeys(values):
                own = ", ".join(str(i) for i, other in enumerate(values) if other == value)
                parts.append(f"{value} on process {own}")
            lines.append(f"  {name}: {'; '.join(parts)}")
    return lines


def signals() -> tuple[signal.Signals, ...]:
    """Lists the signals that this process must handle itself.

    Returns:
        SIGTERM and SIGINT for a single process. With several, JAX handles SIGTERM.

    Example:
        >>> signal.SIGINT in signals()
        True
    """
    alone = jax.process_count() == 1
    return (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)


@contextlib.contextmanager
def lost_is_an_error() -> Iterator[None]:
    """Ends this process with a message when a different process of the run is lost.

    Example:
        >>> with lost_is_an_error():
        ...     total = 1 + 1  # training
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0][:200]
        print(
            f"error: process {jax.process_index()} cannot continue ({reason}). Most likely a "
            f"different process ended: see what it printed. {_GO_ON}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly exit would wait for the lost process


def stop_together(stopped: Sequence[Any]) -> Callable[[], bool]:
    """Makes a function that tells whether to stop, true after the same step on all processes.

    Args:
        stopped: a list to which the signals of this process are appended, such as from
            `checkpoints.stop_signals`. With several processes JAX handles SIGTERM, and any other
            signal of one process is passed on as SIGTERM.

    Returns:
        A function without arguments, to be called once after each step.

    Example:
        >>> stopped = []
        >>> should_stop = stop_together(stopped)
        >>> before = should_stop()
        >>> stopped.append(signal.SIGTERM)
        >>> before, should_stop()
        (False, True)
    """
    if jax.process_count() == 1:
        return lambda: bool(stopped)
    calls, decided, passed_on = itertools.count(), [], []

    def should_stop() -> bool:
        if stopped and not passed_on:
            passed_on.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        if not decided and multihost_utils.reached_preemption_sync_point(next(calls)):
            decided.append(True)
        return bool(decided)

    return should_stop
