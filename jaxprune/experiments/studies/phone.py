"""MobileNets with fine sparsity against narrower MobileNets: accuracy, to set beside latency.

    python scripts/study.py phone --seeds 0 1 --workdir runs/phone

Every arm trains MobileNetV1 for the same number of steps on Fashion-MNIST, enlarged to 56 pixels in
three channels. Pruned arms lose 80 or 90 % of the weights of their 1x1 convolutions, which is what
browsers and phones run faster; the narrow networks are dense.
At the end the networks are saved for a browser. benchmarks/browser.py measures them there, and

    python scripts/study.py phone --report-only --workdir runs/phone

then sets accuracy beside latency. To resume, run the same command again.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune import browser, checkpoints, models, reports
from jaxprune.experiments import command
from jaxprune.experiments.studies import jobs, tables
from jaxprune.experiments.trained_networks import save_runs
from jaxprune.files import schemas

TRAIN = [sys.executable, "-m", "jaxprune.experiments.train", "fashion_mobilenet"]
NEEDS = ("test_accuracy", "parameters", "nonzeros", "macs", "cpu_seconds", "steps", "device")
DENSE_WIDTH, NARROW = 0.5, (0.35, 0.25, 0.15)
SPARSITIES = ("0.8", "0.9")
# Milliseconds that benchmarks/browser.py measured, by runtime and network.
LATENCIES = schemas.table(schemas.table(schemas.each(schemas.finite)))


class Arm(NamedTuple):
    """One way to train."""

    about: str
    options: list[str]  # of train.py


def arms() -> dict[str, Arm]:
    """Returns all arms, in the order in which they run and are shown."""
    found = {"dense": Arm(f"dense, {DENSE_WIDTH} of the published widths", ["--method", "none"])}

    def pruned(method: str) -> None:
        for sparsity in SPARSITIES:
            about = f"{method}, {float(sparsity):.0%} of the weights of 1x1 convolutions are zero"
            found[f"{method} {sparsity}"] = Arm(about, ["--method", method, "--sparsity", sparsity])

    pruned("agip")
    for multiplier in NARROW:
        widths = json.dumps(models.default_widths("mobilenet_v1", multiplier)._asdict())
        about = f"dense, {multiplier} of the published widths"
        found[f"narrow {multiplier}"] = Arm(about, ["--method", "none", "--widths", widths])
    pruned("magnitude")
    return found


def main(args: Sequence[str]) -> None:
    """Runs the command line of `study.py phone`."""
    options = parse(list(args))
    with command.plain_errors():
        if options.report_only:
            command.check_results(write_results(options.workdir), options.workdir)
            return
        words = ["python", "scripts/study.py", "phone", *args]
        command.record_command(options.workdir / "study.json", {"options": options.training}, words)
        study(options)


def parse(args: list[str]) -> argparse.Namespace:
    """Parses the command line; `training` holds the options after `--`."""
    form = argparse.RawDescriptionHelpFormatter
    usage = "study.py phone [options] [-- options of train.py]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[0, 1], metavar="SEED")
    add("--arms", nargs="+", metavar="ARM", choices=arms(), help="only these")
    add("--workdir", type=Path, default=Path("runs/phone"), help="default: runs/phone")
    add("--report-only", action="store_true", help="train nothing, rewrite the results")
    options = command.parse(parser, args)
    own = {"seed", "workdir", "overwrite", "method", "sparsity", "widths", "padding", "prunable"}
    command.refuse(parser, own, options.training)
    if min(options.seeds) < 0:
        parser.error("--seeds must be at least 0")
    return options


def study(options: argparse.Namespace) -> None:
    """Trains what is not finished; exits with 1 if something failed."""
    workdir = options.workdir
    chosen = {name: arm for name, arm in arms().items() if name in (options.arms or arms())}
    commands = {}
    for seed in options.seeds:
        for name, arm in chosen.items():
            folder = f"{name.replace(' ', '-')}-seed{seed}"
            own = ["--seed", str(seed), "--workdir", str(workdir / folder)]
            commands[folder] = [*TRAIN, *arm.options, *options.training, *own]
    failed = jobs.train_in_turn(
        commands,
        workdir,
        NEEDS,
        show=lambda summary: f"test accuracy {summary['test_accuracy']:.2%}",
        finished=write_results,
    )
    if runs := read_runs(workdir):
        own = {run["folder"]: (workdir / run["folder"], run["arm"]) for run in runs}
        save_runs(workdir / "networks", own)
    if write_results(workdir):
        print(f"results: {workdir / 'results.md'}; networks: {workdir / 'networks'}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; the same command tries them again")


# ---- results

NOTE = """Accuracy: on the test images; ±: sample standard deviation over seeds, in points. Every
arm trained for the same number of steps. MMACs count zeros as well. CPU time: of whole runs,
relative to the dense run of the same seed. ms: LiteRT.js in headless Chromium, one thread, minimum
of rounds in turns, mean over seeds; speed-up: over the dense network of the same seed."""


def read_runs(workdir: Path) -> list[dict[str, Any]]:
    """Reads the summaries of all finished runs, with arm and seed, in the order of the arms."""
    runs, order = [], list(arms())
    for path in sorted(workdir.glob("*-seed*/summary.json")):
        name, _, seed = path.parent.name.rpartition("-seed")
        arm, summary = name.replace("-", " "), command.read_summary(path.parent, NEEDS)
        if summary is not None and arm in order:
            runs.append({"arm": arm, "seed": int(seed), "folder": path.parent.name} | summary)
    return sorted(runs, key=lambda run: (order.index(run["arm"]), run["seed"]))


def write_results(workdir: Path) -> list[dict[str, Any]]:
    """Writes results.jsonl and .md of all finished runs; returns the rows of the table."""
    runs = read_runs(workdir)
    if not runs:
        return []
    dense = {run["seed"]: run for run in runs if run["arm"] == "dense"}
    latency = read_latencies(workdir)

    def speedup(run: Mapping[str, Any]) -> float | None:
        first, own = (latency.get(r["folder"]) for r in (dense.get(run["seed"], run), run))
        return first / own if first and own and run["seed"] in dense else None

    columns: dict[str, tables.Column] = {
        "accuracy": lambda run: run["test_accuracy"],
        "relative": lambda run: tables.ratio(
            run["test_accuracy"], dense.get(run["seed"], {}).get("test_accuracy")
        ),
        "parameters": lambda run: run["parameters"],
        "nonzeros": lambda run: run["nonzeros"],
        "macs": lambda run: run["macs"],
        "time": lambda run: tables.ratio(
            run["cpu_seconds"], dense.get(run["seed"], {}).get("cpu_seconds")
        ),
    }
    columns |= {"ms": lambda run: latency.get(run["folder"]), "speedup": speedup}
    rows = tables.aggregate(runs, ["arm"], columns)
    plot(rows, workdir / "results.png")
    table = [shown(row) for row in rows]
    facts = [f"{row['arm']}: {arms()[row['arm']].about}" for row in rows]
    facts.append(f"steps: {', '.join(sorted({str(run['steps']) for run in runs}))}")
    facts += tables.facts(command.commands_in(workdir / "study.json"), runs)
    tables.write(workdir, runs, (reports.markdown_table(table, list(table[0])), NOTE), facts)
    return rows


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row as text, under the headings of the table."""
    deviation = row["accuracy SD"]
    accuracy = f"{row['accuracy']:.2%}"
    return {
        "arm": row["arm"],
        "runs": row["runs"],
        "accuracy": accuracy if deviation is None else f"{accuracy} ± {100 * deviation:.2f}",
        "of dense": "" if row["relative"] is None else f"{row['relative']:.1%}",
        "parameters": f"{row['parameters']:,.0f}",
        "non-zeros": f"{row['nonzeros']:,.0f}",
        "MMACs": f"{row['macs'] / 1e6:.1f}",
        "CPU time": "" if row["time"] is None else f"{row['time']:.2f}",
        "ms": "" if row["ms"] is None else f"{row['ms']:.3f}",
        "speed-up": "" if row["speedup"] is None else f"{row['speedup']:.2f}",
    }


def read_latencies(workdir: Path) -> dict[str, float]:
    """Returns folder of a run -> milliseconds in a browser, of what was measured."""
    path = workdir / "networks" / "latency.json"
    content = checkpoints.read_json(path)
    if content is None:
        return {}
    LATENCIES(content, str(path))
    times = content.get("browser", {})
    return {name: row["min"] for name, row in browser.summary(times).items()} if times else {}


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws accuracy against latency and size, where all of it is known."""
    dense = next((row for row in rows if row["arm"] == "dense"), None)
    if dense is None or any(row["speedup"] is None or row["relative"] is None for row in rows):
        return
    drawn = [
        {
            "arm": row["arm"],
            "accuracy": row["relative"],
            "accuracy SD": row["relative SD"],
            "latency": 1 / row["speedup"],
            "nonzeros": row["nonzeros"] / dense["nonzeros"],
        }
        for row in rows
    ]
    labels = {"latency": "Latency in a browser", "nonzeros": "Non-zero parameters"}
    reports.plot_tradeoffs(drawn, path, labels=labels)
