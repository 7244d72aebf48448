"""A byte-level decoder, pruned in several ways, against smaller decoders: equal time, equal size.

    python scripts/study.py text ~/texts --seeds 0 1 --workdir runs/text

The folder holds text files. Every arm trains for the time of the dense decoder: its number of steps
follows from how long its steps take, measured once, in turns, and kept in step_times.json. Masked
arms have 80 or 90 % zeros in the kernels of attention and MLP. Arms of channels remove heads, MLP
and residual channels while they train; small decoders are trained from scratch. Both have as many
parameters as the masked arms have non-zeros. To resume, run the same command again.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import checkpoints, files, reports
from jaxprune.experiments import command
from jaxprune.experiments.config import CONFIGS, Config
from jaxprune.experiments.experiment import Experiment
from jaxprune.experiments.pruning import pruning_of
from jaxprune.experiments.studies import jobs, tables
from jaxprune.files import schemas

TRAIN = [sys.executable, "-m", "jaxprune.experiments.train", "text_mini"]
NEEDS = ("test_loss", "parameters", "nonzeros", "macs", "cpu_seconds", "steps", "device")
STEP_TIMES = schemas.record(
    {"device": schemas.text, "seconds": schemas.table(schemas.finite), "rounds": schemas.whole(1)}
)
STOP = 0.3  # fraction of all steps after which arms of channels train the small network
# Zeros of the masked arms; for as many parameters, the share of heads and channels that AGIP
# removes, and width, heads, heads of keys and values, and MLP of a small decoder.
SIZES = ("0.8", "0.5", 64, (2, 2, 176)), ("0.9", "0.65", 48, (2, 2, 128))
METHODS = {"0.8": ("agip", "magnitude", "rigl", "random"), "0.9": ("agip", "magnitude", "rigl")}
CHANNELS = ["--granularity", "channels", "--compact", "--switches", "1", "--prune-stop", str(STOP)]
CHANNELS += ["--prune-every", "25"]


class Arm(NamedTuple):
    """One way to train."""

    about: str
    options: list[str]  # of train.py
    timed: Mapping[str, float]  # arm whose steps it takes -> fraction of its steps


def arms() -> dict[str, Arm]:
    """Returns all arms, in the order of the table."""
    found = {"dense": Arm("the dense decoder", ["--method", "none"], {"dense": 1.0})}
    for sparsity, share, width, layer in SIZES:
        for method in METHODS[sparsity]:
            name = f"{method} {sparsity}"
            options = ["--method", method, "--sparsity", sparsity]
            found[name] = Arm(f"{method}, {sparsity} of the weights are zero", options, {name: 1.0})
        small = f"small {sparsity}"
        found[f"channels {sparsity}"] = Arm(
            f"agip removes {share} of the heads and channels",
            ["--method", "agip", "--sparsity", share, *CHANNELS],
            {"dense": STOP, small: 1 - STOP},
        )
        about = f"a dense decoder with as many parameters as {sparsity} zeros leave"
        widths = json.dumps({"width": width, "layers": [layer] * 4})
        found[small] = Arm(about, ["--method", "none", "--widths", widths], {small: 1.0})
    return found


def main(args: Sequence[str]) -> None:
    """Runs the command line of `study.py text`."""
    options = parse(list(args))
    with command.plain_errors():
        if options.report_only:
            command.check_results(write_results(options.workdir), options.workdir)
            return
        words = ["python", "scripts/study.py", "text", *args]
        settings = {"steps": options.steps, "options": options.training}
        command.record_command(options.workdir / "study.json", settings, words)
        study(options)


def parse(args: list[str]) -> argparse.Namespace:
    """Parses the command line; `training` holds the options after `--`."""
    form = argparse.RawDescriptionHelpFormatter
    usage = "study.py text FOLDER [options] [-- options of train.py]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("folder", nargs="?", help="folder with text files")
    add("--steps", type=int, default=1500, help="steps of the dense decoder; default: 1500")
    add("--seeds", nargs="+", type=int, default=[0, 1], metavar="SEED")
    add("--arms", nargs="+", metavar="ARM", choices=arms(), help="only these")
    add("--workdir", type=Path, default=Path("runs/text"), help="default: runs/text")
    add("--report-only", action="store_true", help="train nothing, rewrite the results")
    options = command.parse(parser, args)
    command.refuse(parser, {"steps", "seed", "workdir", "overwrite", "method"}, options.training)
    if not (options.folder or options.report_only):
        parser.error("FOLDER is missing")
    if options.steps < 1 or min(options.seeds) < 0:
        parser.error("--steps must be at least 1, --seeds at least 0")
    return options


def study(options: argparse.Namespace) -> None:
    """Measures, then trains what is not finished; exits with 1 if something failed."""
    workdir = options.workdir
    chosen = {name: arm for name, arm in arms().items() if name in (options.arms or arms())}
    seconds = step_times(options)
    commands = {}
    for seed in options.seeds:
        for name, arm in chosen.items():
            folder = f"{name.replace(' ', '-')}-seed{seed}"
            steps = steps_in_time(options.steps, arm, seconds)
            own = ["--steps", str(steps), "--seed", str(seed), "--workdir", str(workdir / folder)]
            words = [*TRAIN, "--source-dir", options.folder, *arm.options]
            commands[folder] = [*words, *options.training, *own]
    failed = jobs.train_in_turn(
        commands,
        workdir,
        NEEDS,
        show=lambda summary: f"{bits(summary):.3f} bits per byte",
        finished=write_results,
    )
    if write_results(workdir):
        print(f"results: {workdir / 'results.md'}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; the same command tries them again")


def bits(summary: Mapping[str, Any]) -> float:
    """Returns the bits per byte on held-out text."""
    return summary["test_loss"] / float(np.log(2))


def steps_in_time(steps: int, arm: Arm, seconds: Mapping[str, float]) -> int:
    """Returns the steps of an arm that take as long as those of the dense decoder.

    A masked step computes what the dense one does and more: if it seems shorter, that is noise.

    Example:
        >>> steps_in_time(100, Arm("", [], {"dense": 0.5, "small": 0.5}), {"dense": 3, "small": 1})
        150
    """
    masked = "--sparsity" in arm.options and "--granularity" not in arm.options
    each = sum(share * seconds[name] for name, share in arm.timed.items())
    each = max(each, seconds["dense"]) if masked else each
    return max(1, round(steps * seconds["dense"] / each))


def step_times(options: argparse.Namespace, rounds: int = 9, calls: int = 5) -> dict[str, float]:
    """Returns arm -> seconds of a training step, measured in turns and kept in step_times.json.

    Each is the median over `rounds`; mask updates are left out. On CPU it is the time of this
    process on all cores, whatever else is running.
    """
    path = options.workdir / "step_times.json"
    if path.exists():
        record = files.parse_json(path.read_bytes())
        STEP_TIMES(record, str(path))
        return record["seconds"]
    timers = {}
    for name, arm in arms().items():
        if list(arm.timed) == [name]:
            timers[name] = stepper(config_of(options, arm))
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer(calls))
    seconds = {name: statistics.median(own) for name, own in times.items()}
    options.workdir.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0].device_kind
    checkpoints.write_json(path, {"device": device, "seconds": seconds, "rounds": rounds})
    return seconds


def config_of(options: argparse.Namespace, arm: Arm) -> Config:
    """Returns the configuration of an arm, to measure its steps."""
    import tyro

    words = ["text_mini", "--source-dir", options.folder, *arm.options, *options.training]
    words += ["--steps", str(options.steps), "--seed", "0"]
    return tyro.extras.overridable_config_cli(CONFIGS, args=words)


def stepper(config: Config) -> Any:
    """Compiles the step of a configuration; returns a function from a number to seconds a step."""
    experiment = Experiment(config, pruning_of)
    steps, state = experiment.dense, experiment.create(config.seed)
    batch = next(experiment.source.batches(config.seed, 0))
    rows, key = jax.tree.map(lambda x: x[None], batch), jax.random.key(0)
    state, _ = steps.run(state, None, rows, key)
    kept = [state]
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def timed(calls: int) -> float:
        began = clock()
        for _ in range(calls):
            kept[0], metrics = steps.run(kept[0], None, rows, key)
            jax.block_until_ready(metrics)
        return (clock() - began) / calls

    return timed


# ---- results

NOTE = """Bits per byte: on held-out text; ±: sample standard deviation over seeds. Every arm
trained for the time of the dense decoder: steps x seconds of a step, measured in turns. CPU time:
of whole runs, relative to the dense run of the same seed, with compilation and data."""


def write_results(workdir: Path) -> list[dict[str, Any]]:
    """Writes results.jsonl and .md of all finished runs; returns the rows of the table."""
    runs = []
    for path in sorted(workdir.glob("*-seed*/summary.json")):
        arm, _, seed = path.parent.name.rpartition("-seed")
        summary = command.read_summary(path.parent, NEEDS)
        if summary is not None and arm.replace("-", " ") in arms():
            runs.append({"arm": arm.replace("-", " "), "seed": int(seed)} | summary)
    if not runs:
        return []
    dense = {run["seed"]: run for run in runs if run["arm"] == "dense"}
    columns: dict[str, tables.Column] = {
        "bits": bits,
        "worse": lambda run: bits(run) - bits(dense[run["seed"]]) if run["seed"] in dense else None,
        "nonzeros": lambda run: run["nonzeros"],
        "macs": lambda run: run["macs"],
        "steps": lambda run: run["steps"],
        "time": lambda run: tables.ratio(
            run["cpu_seconds"], dense.get(run["seed"], {}).get("cpu_seconds")
        ),
    }
    order = list(arms())
    rows = tables.aggregate(sorted(runs, key=lambda run: order.index(run["arm"])), ["arm"], columns)
    table = [shown(row) for row in rows]
    facts = [f"{row['arm']}: {arms()[row['arm']].about}" for row in rows]
    facts += tables.facts(command.commands_in(workdir / "study.json"), runs)
    tables.write(workdir, runs, (reports.markdown_table(table, list(table[0])), NOTE), facts)
    return rows


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row as text, under the headings of the table."""

    def spread(key: str, form: str) -> str:
        if row[key] is None:
            return ""
        deviation = row[f"{key} SD"]
        return f"{row[key]:{form}}" + ("" if deviation is None else f" ± {deviation:.3f}")

    return {
        "arm": row["arm"],
        "runs": row["runs"],
        "bits per byte": spread("bits", ".3f"),
        "more than dense": spread("worse", "+.3f"),
        "non-zeros": f"{row['nonzeros']:,.0f}",
        "MMACs of a window": f"{row['macs'] / 1e6:.1f}",
        "steps": f"{row['steps']:,.0f}",
        "CPU time": "" if row["time"] is None else f"{row['time']:.2f}",
    }
