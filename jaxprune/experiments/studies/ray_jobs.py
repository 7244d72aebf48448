"""Runs commands as Ray tasks: on this machine, or on all machines of a cluster.

A task is a child process like those of jobs.py, with devices that Ray reserves for it. On a cluster
each machine needs jaxprune installed, with the same Python at the same path, and the workdir at the
same path.
"""

import argparse
import functools
import importlib.util
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxprune
from jaxprune import checkpoints, files
from jaxprune.experiments.studies import jobs

# Variables with these prefixes are taken from the program that asks for the run; all others, such
# as the devices that Ray chose, are those of the machine where it runs.
SETTINGS = ("JAX_", "XLA_", "LIBTPU_", "PYTHON", "OMP_")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how the runs of a study are started."""
    add = parser.add_argument
    add("--engine", choices=["processes", "ray"], default="processes", help="what starts the runs")
    where = "a running Ray, whose machines all have jaxprune installed; default: RAY_ADDRESS, "
    where += "or else a new Ray on this machine"
    add("--ray-address", metavar="ADDRESS", help=where)


def chosen(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> Callable[..., jobs.Ends]:
    """Returns `jobs.run` or `run`; ends the program if Ray is needed and not installed."""
    if options.engine == "processes":
        if options.ray_address:
            parser.error("--ray-address needs --engine ray")
        return jobs.run
    if importlib.util.find_spec("ray") is None:
        parser.error("--engine ray needs Ray, which is not installed: pip install 'jaxprune[ray]'")
    return functools.partial(run, address=options.ray_address or os.environ.get("RAY_ADDRESS"))


def run(
    commands: Mapping[str, Sequence[str]],
    workdir: Path,
    at_once: int,
    stopped: Sequence[Any],
    *,
    cached: bool = True,
    address: str | None = None,
) -> jobs.Ends:
    """Yields `(name, exit code)` of each command that ended.

    Args:
        commands: see `jobs.run`.
        workdir: see `jobs.run`.
        at_once: how many run at the same time, if there are enough devices.
        stopped: see `jobs.run`.
        cached: see `jobs.run`.
        address: that of a running Ray; None starts one here, and stops it at the end.

    Raises:
        ValueError: no Ray answers, it has no cores, or its machines cannot import jaxprune.
    """
    here: dict[str, Any] = {"directory": os.getcwd(), "variables": settings(), "cached": cached}
    if not commands or (ray := connect(address)) is None:
        return
    waiting, running = list(commands), {}
    free, nodes = list(range(at_once)), [node for node in ray.nodes() if node["Alive"]]
    here["slots"] = at_once if len(nodes) == 1 else 1  # elsewhere cores are not reserved
    try:
        needs = resources([node["Resources"] for node in nodes], at_once)
        task = ray.remote(max_retries=0, **needs)(train)  # a lost child may be alive
        while (waiting or running) and not stopped:
            while free and waiting:
                slot, name = free.pop(0), waiting.pop(0)
                begun = task.remote(commands[name], workdir, name, slot=slot, **here)
                running[begun] = slot, name
            for begun in ray.wait(list(running), timeout=0.1)[0]:
                slot, name = running.pop(begun)
                free.append(slot)
                yield name, exit_code(ray, begun, workdir / name)
    finally:
        for begun in running:
            ray.cancel(begun)  # the child saves, then ends
        if running:
            ray.wait(list(running), num_returns=len(running))
        ray.shutdown()


def connect(address: str | None) -> Any:
    """Connects to Ray; returns None if the program was told to stop before that."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports to its makers
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 would slow runs down, and only here
        options |= {"include_dashboard": False, "num_cpus": cores()}
        options["object_store_memory"] = 100_000_000  # of the shared memory; tasks return a number
    try:
        ray.init(address or "local", **options)
    except SystemExit:  # Ray's own handler, in place from its first moment
        signal.signal(signal.SIGTERM, handler)
        os.kill(os.getpid(), signal.SIGTERM)
        return None
    except Exception as error:  # Ray has no narrower class for what may happen here
        what = f"no Ray answers at {address}" if address else "Ray did not start"
        raise ValueError(f"{what}: {error}") from error
    signal.signal(signal.SIGTERM, handler)
    return ray


def cores() -> int:
    """Returns how many cores of this machine this process may use."""
    count = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0))
    return count or os.cpu_count() or 1


def settings() -> dict[str, str]:
    """Returns the variables that runs inherit from this process."""
    return {key: value for key, value in os.environ.items() if key.startswith(SETTINGS)}


def resources(nodes: Sequence[Mapping[str, float]], at_once: int) -> dict[str, Any]:
    """Returns what a task asks for, so that `at_once` of them fit on nodes with these resources.

    That is an accelerator, if there are any, and as many whole cores as fit, or a fraction of one.

    >>> resources([{"CPU": 8.0}], 2), resources([{"CPU": 8.0}, {"CPU": 8.0}], 3)
    ({'num_cpus': 4}, {'num_cpus': 4})
    >>> resources([{"CPU": 2.0}], 3)
    {'num_cpus': 0.6666}
    """
    kinds = [] if os.environ.get("JAX_PLATFORMS") == "cpu" else ["GPU", "TPU"]
    kind = next((kind for kind in kinds if any(kind in node for node in nodes)), None)
    counts = [int(node.get("CPU", 0)) for node in nodes if kind is None or kind in node]
    if not any(counts):
        raise ValueError("no machine of the Ray cluster has a core to run on")
    wholes = range(max(counts), 0, -1)
    fits = (n for n in wholes if sum(count // n for count in counts) >= at_once)
    needs = {"num_cpus": next(fits, math.floor(1e4 * sum(counts) / at_once) / 1e4)}
    return needs | {None: {}, "GPU": {"num_gpus": 1}, "TPU": {"resources": {"TPU": 1}}}[kind]


def train(
    command: Sequence[str],
    workdir: Path,
    name: str,
    *,
    slot: int,
    slots: int,
    directory: str,
    variables: Mapping[str, str],
    cached: bool,
) -> int:
    """Runs a child process as a task, and returns its exit code; if canceled, ends it first."""
    os.chdir(directory)
    for key in [key for key in os.environ if key.startswith(SETTINGS)]:
        del os.environ[key]
    os.environ.update(variables)
    with checkpoints.stop_signals() as stopped:  # Ray cancels as Ctrl-C does
        child = jobs.start(command, workdir, name, cached=cached)
        jobs.give_cores(child, slot, slots)
        while child.poll() is None and not stopped:
            time.sleep(0.1)
        if stopped:
            child.terminate()
        return child.wait()


def exit_code(ray: Any, task: Any, folder: Path) -> int:
    """Returns the exit code of a task that ended, and raises its own errors.

    If the task died, log.txt says how.
    """
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if "failed to import" in str(error.cause):  # Ray's words for a function that it cannot load
            raise ValueError(
                "a machine of the Ray cluster cannot import jaxprune, so it runs nothing; install "
                f"jaxprune[train,ray] {jaxprune.__version__} on every machine: {error.cause}"
            ) from None
        raise error.cause from None
    except ray.exceptions.RayError as error:
        folder.mkdir(exist_ok=True)
        with files.appending(folder / "log.txt") as log:
            log.write(f"Ray lost this run: {error}\n".encode())
        return -signal.SIGKILL
