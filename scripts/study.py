"""Compares pruning methods: each method x sparsity x seed is a run of scripts/train.py.

    python scripts/study.py digits_resnet8 --methods agip random --sparsities 0.72 0.95 \\
        --seeds 0 1 2 --workdir runs/study --jobs 2 -- --steps 600 --batch-size 64

What follows `--` goes to every run. Each seed begins with its dense run, so that a part of a study
is already a comparison. A study can be stopped at any time: the same command skips what is finished
and goes on with the rest. A later command with the same --workdir may add seeds, sparsities and
methods; the results are those of all runs there:

    none-seed0/, agip-0.72-seed0/, ...       what train.py writes, and log.txt: what it printed
    results.jsonl, results.md, results.png   rewritten whenever a run is finished
"""

import argparse
import contextlib
import datetime
import fcntl
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import checkpoints, reports

TRAIN = Path(__file__).with_name("train.py")
# Marker, line and colour; by Okabe and Ito, told apart by readers with any colour vision.
STYLES = {
    "agip": ("o-", "#0072B2"),
    "gradient": ("s--", "#D55E00"),
    "magnitude": ("^-.", "#009E73"),
    "random": ("D:", "#CC79A7"),
}
# What may differ between runs of a study. The last three change no number.
FREE = {"method", "sparsity", "seed", "workdir", "overwrite", "data_dir", "source_dir"}


def main(args: Sequence[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else list(args)
    options = parse(args)
    try:
        if not options.report_only:
            study(options, shlex.join(["python", "scripts/study.py", *args]))
        elif not write_results(options.workdir):
            raise ValueError(f"`workdir` {options.workdir} holds no finished run of a study")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def parse(args: list[str]) -> argparse.Namespace:
    """The command line; `training` is what follows the `--`."""
    parser = argparse.ArgumentParser(
        usage="study.py CONFIG [options] [-- options of train.py]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add, names = parser.add_argument, list(STYLES)
    add("config", nargs="?", help="named configuration of train.py, such as digits_resnet8")
    add("--methods", nargs="+", default=names, choices=names, help="default: all of them")
    add("--sparsities", nargs="+", type=float, default=[0.72, 0.9, 0.95], metavar="FRACTION")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    add("--workdir", type=Path, default=Path("runs/study"), help="default: runs/study")
    add("--jobs", type=int, default=1, help="runs at once, each on its share of the cores")
    add("--report-only", action="store_true", help="train nothing, rewrite the results")
    end = args.index("--") if "--" in args else len(args)
    options = parser.parse_args(args[:end])
    options.training = args[end + 1 :]
    given = {option.partition("=")[0] for option in options.training}
    own = {f"--{name}" for name in FREE - {"data_dir", "source_dir"}} & given
    rules = {
        "CONFIG is missing": options.config or options.report_only,
        "--sparsities must be in [0, 1)": all(0 <= s < 1 for s in options.sparsities),
        "--seeds must be at least 0": min(options.seeds) >= 0,
        "--jobs must be at least 1": options.jobs >= 1,
        f"{', '.join(sorted(own))} may not follow `--`: the study sets it": not own,
    }
    if bad := [rule for rule, holds in rules.items() if not holds]:
        parser.error("; ".join(bad))
    return options


def study(options: argparse.Namespace, command: str) -> None:
    """Trains what is not finished; exits with status 1 if something failed."""
    from rich import progress

    workdir, failed, began = options.workdir, {}, time.perf_counter()
    record_command(options, command)
    write_results(workdir)
    runs = plan(options)
    waiting = [name for name in runs if not (workdir / name / "summary.json").exists()]
    done = len(runs) - len(waiting)
    print(f"{done} of {len(runs)} runs are finished", flush=True)
    columns = progress.BarColumn(), progress.MofNCompleteColumn(), "{task.description}"
    bar = progress.Progress(*columns, disable=not sys.stdout.isatty())  # prints go above it
    with contextlib.ExitStack() as stack:
        stopped = stack.enter_context(checkpoints.stop_signals())
        ended = stack.enter_context(contextlib.closing(train(waiting, runs, options, stopped)))
        task = stack.enter_context(bar).add_task("", total=len(runs), completed=done)
        for count, (name, problem) in enumerate(ended, start=1):
            if problem:
                failed[name] = f"{problem}; see {workdir / name / 'log.txt'}"
                text = "FAILED"
            else:
                text = f"test accuracy {write_results(workdir)[name]['test_accuracy']:.2%}"
            seconds = (time.perf_counter() - began) / count * (len(waiting) - count)
            left = f"{datetime.timedelta(seconds=round(seconds))} left"
            print(f"{done + count}/{len(runs)}  {name}  {text}  {left}", flush=True)
            bar.update(task, completed=done + count, description=left)
    for name, problem in failed.items():
        print(f"failed: {name}: {problem}")
    if write_results(workdir):
        print(f"results so far: {workdir / 'results.md'}")
    if stopped:
        print("stopped; the same command goes on from there")
        sys.exit(128 + stopped[0])  # as shells report it: the study is not complete
    sys.exit("error: some runs failed; the same command tries them again" if failed else 0)


def plan(options: argparse.Namespace) -> dict[str, list[str]]:
    """Folder of each run -> its options, in the order in which they run."""
    runs = {}
    for seed in options.seeds:
        runs[f"none-seed{seed}"] = ["--method", "none", "--seed", f"{seed}"]
        for sparsity, method in itertools.product(options.sparsities, options.methods):
            arguments = ["--method", method, "--sparsity", f"{sparsity}", "--seed", f"{seed}"]
            runs[f"{method}-{sparsity}-seed{seed}"] = arguments
    return runs


def record_command(options: argparse.Namespace, command: str) -> None:
    """Adds the command to study.json; an error if it gives the runs there other options."""
    checkpoints.check_writable(options.workdir)
    path = options.workdir / "study.json"
    now = {"config": options.config, "options": options.training}
    saved = checkpoints.read_json(path) or now | {"commands": []}
    commands = list(dict.fromkeys([*saved.pop("commands"), command]))
    if read_configs(options.workdir):  # where nothing was trained, it may have been mistyped
        check_same({"earlier commands": saved, "this command": now}, options.workdir)
    checkpoints.write_json(path, now | {"commands": commands})


def train(
    waiting: list[str], runs: Mapping[str, list[str]], options: argparse.Namespace, stopped: list
) -> Iterator[tuple[str, str]]:
    """Trains `--jobs` runs at once; yields each that ended with its problem, empty if none."""
    waiting = list(waiting)
    children: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    try:
        while (waiting or children) and not stopped:
            for slot in set(range(options.jobs)) - set(children) if waiting else ():
                name, *waiting = waiting or [""]
                try:
                    if name:
                        children[slot] = name, start(name, runs[name], slot, options)
                except BlockingIOError:
                    yield name, "another process is training it"
            time.sleep(0.1)
            for slot, (name, child) in list(children.items()):
                if child.poll() is not None:
                    del children[slot]
                    finished = (options.workdir / name / "summary.json").exists()
                    yield name, "" if finished else f"exit code {child.returncode}"
    finally:
        for _, child in children.values():
            child.terminate()  # it saves, then ends
        for _, child in children.values():
            child.wait()


def start(
    name: str, arguments: list[str], slot: int, options: argparse.Namespace
) -> subprocess.Popen[bytes]:
    """Starts a run; BlockingIOError if a child that outlived an earlier study still trains it."""
    folder = options.workdir / name
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(TRAIN), options.config, "--workdir", str(folder)]
    cache = str(options.workdir.absolute() / "compilation_cache")
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | os.environ
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    with (folder / "log.txt").open("ab") as log:
        # The child inherits the locked file as its output: the lock lives as long as it does.
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child = subprocess.Popen(
            [*command, *arguments, *options.training], env=environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if options.jobs > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        first, end = (len(cores) * i // options.jobs for i in (slot, slot + 1))
        with contextlib.suppress(ProcessLookupError):  # its threads, still to come, inherit this
            os.sched_setaffinity(child.pid, cores[first:end] or cores)
    return child


def read_configs(workdir: Path) -> dict[str, dict[str, Any]]:
    """Folder -> configuration of all runs; an error if their training options differ."""
    paths = sorted(workdir.glob("*/config.json"))
    configs = {path.parent.name: checkpoints.read_json(path) for path in paths}
    check_same({n: {k: c[k] for k in c if k not in FREE} for n, c in configs.items()}, workdir)
    return configs


def check_same(options: Mapping[str, Mapping[str, Any]], workdir: Path) -> None:
    """Raises with every field that is not the same everywhere, and two places that differ."""
    bad = {}
    for (a, first), (b, other) in itertools.product([*options.items()][:1], options.items()):
        for field in [f for f in first | other if first.get(f) != other.get(f)]:
            bad[field] = f"  {field}: {first.get(field)} in {a}, {other.get(field)} in {b}"
    if bad:
        raise ValueError(
            f"`workdir` {workdir} mixes different training options:\n" + "\n".join(bad.values())
            + "\nUse another --workdir, or those options to go on with its study."
        )  # fmt: skip


def write_results(workdir: Path) -> dict[str, dict[str, Any]]:
    """Writes the results of all finished runs; returns folder -> record of each."""
    records = {}
    for name, config in read_configs(workdir).items():
        if summary := checkpoints.read_json(workdir / name / "summary.json"):
            target = 0.0 if config["method"] == "none" else config["sparsity"]
            run = {"method": config["method"], "target_sparsity": target, "seed": config["seed"]}
            records[name] = run | summary
    if not records:
        return records
    lines = [json.dumps({"run": name, **record}) + "\n" for name, record in records.items()]
    checkpoints.write_text(workdir / "results.jsonl", "".join(lines))
    rows = aggregate(list(records.values()))
    checkpoints.write_text(workdir / "results.md", describe(rows, records, workdir))
    plot(rows, workdir / "results.png")
    return records


def aggregate(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method and sparsity, dense first: means and sample standard deviations."""
    dense = {r["seed"]: r["test_accuracy"] for r in records if r["method"] == "none"}
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["method"], record["target_sparsity"]), []).append(record)
    rows, order = [], ["none", *STYLES]
    for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        runs = groups[key]
        row = {"method": key[0].replace("none", "dense"), "sparsity": key[1], "runs": len(runs)}
        pairs = [(r["test_accuracy"], dense.get(r["seed"])) for r in runs]
        for name, values in {
            "accuracy": [accuracy for accuracy, _ in pairs],
            "relative": [accuracy / reference for accuracy, reference in pairs if reference],
        }.items():
            row[name] = statistics.mean(values) if values else None
            row[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        for name in ("sparsity", "sparse_bytes", "dense_bytes"):
            row[f"measured_{name}"] = statistics.mean(r[name] for r in runs)
        rows.append(row)
    return rows
