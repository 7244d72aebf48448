"""Several processes that train together: they find each other, agree, and stop at the same step.

All of them run the same program on the same numbers; only the first one writes files and prints.
Everything here works for a single process, too. With several, every process must make each call, in
the same order.
"""

import contextlib
import itertools
import json
import os
import signal
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

LIMIT = 1 << 16  # bytes of what is compared


def on_first(call: Callable[[], Any]) -> Any:
    """Calls a function on the first process; all processes continue with what it returned.

    Read this way what decides how a run continues, so that all processes decide alike whatever
    their file systems show them at that moment. Write this way what others read: no process
    continues before the file is there.

    Args:
        call: returns what is ready for JSON. It must not wait for other processes.

    Returns:
        What it returned; with several processes as JSON gives it back.

    Raises:
        Exception: what it raised; on the others a ValueError with the same message.

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
    """The bytes of the first process, on all of them."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # Every size compiles, so round up to powers of two.
    padded = np.zeros(max(1024, 1 << (length - 1).bit_length()), np.uint8)
    if jax.process_index() == 0:
        padded[:length] = np.frombuffer(text, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)[:length])


def from_first(tree: Any) -> Any:
    """Arrays that each process has computed for itself, as the first one has them.

    Rounding can differ between machines, and so can a ranking.

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
    """All of an array, also of one that is spread over processes.

    Args:
        array: of numbers, on any devices.

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
    on the hosts of a TPU pod JAX finds the others by itself; elsewhere nothing happens.

    Args:
        coordinator: address of the first process, such as `"10.0.0.1:1234"`.
        processes: how many there are; only with `coordinator`.
        process: the number of this one, from 0; only with `coordinator`.
        timeout: seconds without a sign of life after which a process counts as lost.

    Raises:
        ValueError: the other processes were not found.

    Example:
        >>> start()  # alone: nothing to connect to
    """
    if coordinator:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=timeout
        )
    elif is_cluster(os.environ):
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=timeout)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"JAX has not found the other processes: {error}\nSay where the first one is with "
                "`coordinator`, `processes` and `process`. Where there is none but this one, start "
                "with TPU_SKIP_MDS_QUERY=1, or under SLURM with SLURM_NTASKS=1"
            ) from error


def is_cluster(environment: Mapping[str, str]) -> bool:
    """Whether SLURM started several tasks, or this may be one of several hosts of a TPU.

    A cluster of containers lists its hosts. Elsewhere a server knows them; JAX marks a machine with
    TPU chips, and one without such a server.
    """
    tasks = environment.get("SLURM_NTASKS", "1")
    names = environment.get("TPU_WORKER_HOSTNAMES")
    chips = "TPU_ML_PLATFORM" in environment and "TPU_SKIP_MDS_QUERY" not in environment
    of_tpu = chips if names is None else "," in names
    return (tasks.isdigit() and int(tasks) > 1) or of_tpu


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints, once for all processes."""
    if is_first():
        print(text, flush=True)


def check_same(values: Mapping[str, Any]) -> None:
    """An error on every process if they do not have the same values.

    Args:
        values: ready for JSON, under the names of the error.

    Raises:
        ValueError: some differ; it lists each with the processes that have it.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(values, sort_keys=True).encode()
    if len(text) > LIMIT:
        raise ValueError(f"values to compare are {len(text)} bytes; {LIMIT} is the most")
    padded = np.zeros(LIMIT, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    differing = differences([json.loads(bytes(row).rstrip(b"\0")) for row in rows])
    if differing:
        raise ValueError("processes of a run must agree:\n" + "\n".join(differing))


def differences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each name whose value is not the same on all processes."""
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
    """What this process listens to itself."""
    alone = jax.process_count() == 1
    return (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)


@contextlib.contextmanager
def lost_is_an_error() -> Iterator[None]:
    """Ends this process with a message when another one of the run is lost."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0][:200]
        print(
            f"error: process {jax.process_index()} cannot go on ({reason}). Most likely another "
            "one ended: see what it printed. The newest checkpoint is whole; the same command on "
            "all hosts goes on from there.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly end would wait for the lost one


def stop_together(stopped: Sequence[Any]) -> Callable[[], bool]:
    """A function that says whether to stop, after the same step on all processes.

    Args:
        stopped: signals that this process got. With several processes it is JAX that hears SIGTERM,
            and what else stops one of them is passed on as that.
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
