"""Searches how many channels each layer of trained networks keeps, by AMC and simpler searches.

    python scripts/train.py digits_resnet8 --method none --validation 300 --workdir runs/dense-0
    python scripts/search.py runs/dense-0 --budgets 0.5 --evaluations 100 --seeds 0 1 2

Takes finished dense runs of scripts/train.py that differ only in their seeds. Each search scores
candidates by their accuracy on training images: those that the dense run held out with
--validation, or else the last --images training images. Its best network is compacted, tested, and
trained further in two ways. The control `scratch` is a new network with the widths of `uniform`,
trained as long as the dense one.

To resume after a stop, run the same command again; it may name more runs, searches, budgets and
seeds. Each evaluation is on disk as soon as it is made. results.jsonl, results.md and
searches-SHARE.png always cover all finished networks; each has a folder with its journal, plan.json
and summary.json.
"""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxprune import checkpoints, files, models, search
from jaxprune.experiments import command, results
from jaxprune.experiments.command import plain_errors
from jaxprune.experiments.config import Config
from jaxprune.experiments.studies import compaction
from jaxprune.experiments.studies.search_networks import (
    RETRAINING,
    Searched,
    accuracy_of,
    open_searched,
    problem_of,
    retrain,
    scratch,
)
from jaxprune.experiments.studies.search_results import write_results
from jaxprune.logs import show_progress

SEARCHES = {
    "uniform": "the same fraction everywhere (control)",
    "ranking": "one ranking of all channels by their scores (control)",
    "random": "random fractions under the wall (control)",
    "cross_entropy": "the cross-entropy method",
    "greedy": "many small cuts, each where it costs least, as NetAdapt",
    "knapsack": "scores against costs by dynamic programming, as HALP",
    "measured_knapsack": "the same with measured accuracies in place of scores",
    "amc": "AMC: an agent that learns by DDPG",
    "scratch": "a new network with the widths of uniform (control)",
}
_SEEDED = {"random", "cross_entropy", "amc"}  # the others have no randomness
_SHARED = (
    "cost", "batch", "images", "calibration", "floor", "multiple", "steps", "learning_rate",
    "warmup_steps", "rewind_steps",
)  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    args = sys.argv[1:] if args is None else list(args)
    options = parse(args)
    with plain_errors():
        if options.report_only:
            command.check_results(write_results(options.workdir, [*SEARCHES]), options.workdir)
            return
        runs = compaction.read_runs(options)
        sources = {config.seed: compaction.source_of(path) for path, config in runs}
        cells = {config.seed: cells_of(options, config.seed) for _, config in runs}
        settings = checkpoints.fields(runs[0][1], compaction.FREE)
        settings |= {f"search.py --{name}": getattr(options, name) for name in _SHARED}
        words = ["python", "scripts/search.py", *args]
        checkpoints.check_writable(options.workdir)
        with files.locked(options.workdir, "`workdir`"):
            command.record_command(
                options.workdir / "config.json",
                settings,
                words,
                check=lambda: compaction.check_cells(options.workdir, cells, sources),
            )
            compare(options, runs, cells, sources)


def parse(args: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    form = argparse.RawDescriptionHelpFormatter
    meanings = "".join(f"  {name:18} {what}\n" for name, what in SEARCHES.items())
    text = f"{__doc__}\nsearches:\n{meanings}"
    parser = argparse.ArgumentParser(description=text, formatter_class=form)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="workdir of a dense run of train.py")
    add("--searches", nargs="+", default=[*SEARCHES], choices=SEARCHES, metavar="SEARCH",
        help="default: all of them")  # fmt: skip
    add("--budgets", nargs="+", type=float, default=[0.5], metavar="SHARE",
        help="of the dense cost that may be spent; default: 0.5")  # fmt: skip
    add("--cost", default="macs", choices=["macs", "parameters", "latency"],
        help="what is spent; latency is measured on this device; default: macs")  # fmt: skip
    add("--batch", type=int, default=1, help="latency: images of a batch; default: 1")
    add("--evaluations", type=int, default=200, help="of each search; default: 200")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED",
        help="of searches that draw; default: 0")  # fmt: skip
    add("--images", type=int, default=1000,
        help="training images to score with, if the run held none out; default: 1000")  # fmt: skip
    add("--calibration", type=int, default=300,
        help="images to fit kernels on by least squares; 0 fits none; default: 300")  # fmt: skip
    add("--floor", type=float, default=0.2, metavar="FRACTION",
        help="of its channels that each group keeps at least; default: 0.2")  # fmt: skip
    add("--multiple", type=int, help="widths are multiples of this; default: 8")
    add("--retrain", nargs="*", default=[*RETRAINING], choices=RETRAINING, metavar="WAY",
        help=f"ways to train the found networks; default: {' '.join(RETRAINING)}")  # fmt: skip
    add("--steps", type=int, default=300, help="of fine-tuning; default: 300")
    add("--rewind-steps", type=int, help="last steps of the dense schedule; default: all")
    add("--learning-rate", type=float,
        help="the highest of fine-tuning; default: a quarter of the dense run's")  # fmt: skip
    add("--warmup-steps", type=int, help="of fine-tuning; default: a tenth of the steps")
    add("--workdir", type=Path, default=Path("runs/search"), help="default: runs/search")
    add("--report-only", action="store_true", help="search nothing, rewrite the results")
    options = parser.parse_args(args)
    if not (options.runs or options.report_only):
        parser.error("RUN is missing: name the workdirs of dense runs of scripts/train.py")
    if not all(0 < budget < 1 for budget in options.budgets):
        parser.error("--budgets must lie in (0, 1)")
    if options.warmup_steps is None:
        options.warmup_steps = round(options.steps / 10)
    whole = options.steps, options.evaluations, options.images, options.batch
    if min(whole) < 1 or options.calibration < 0:
        parser.error(
            "--steps, --evaluations, --images and --batch must be at least 1, --calibration at "
            "least 0"
        )
    return options


def cells_of(options: argparse.Namespace, run: int) -> dict[str, tuple[str, float, int]]:
    """Returns folder -> search, budget and seed of the search, in the order in which they run."""
    cells = {}
    for budget in dict.fromkeys(options.budgets):
        for name in dict.fromkeys(options.searches):
            for seed in dict.fromkeys(options.seeds) if name in _SEEDED else (0,):
                cells[f"{name}-{budget:g}-run{run}-seed{seed}"] = name, budget, seed
    return cells


def compare(
    options: argparse.Namespace,
    runs: Sequence[tuple[Path, Config]],
    cells: Mapping[int, Mapping[str, tuple[str, float, int]]],
    sources: Mapping[int, str],
) -> None:
    """Runs every search that is not finished, and trains what it finds."""
    folders = [options.workdir / name for own in cells.values() for name in own]
    done = sum((folder / "summary.json").exists() for folder in folders)
    print(f"{done} of {len(folders)} networks are finished already", flush=True)
    with checkpoints.stop_signals() as stopped:
        for path, config in runs:
            searched = None  # opened only if a cell needs it
            for name, cell in cells[config.seed].items():
                if stopped or (options.workdir / name / "summary.json").exists():
                    continue
                searched = searched or open_searched(options, path, config)
                try:
                    record = run_cell(options, searched, name, *cell, stopped)
                except _Stopped:
                    break
                record |= {"source": sources[config.seed]} | results.environment()
                checkpoints.write_json(options.workdir / name / "summary.json", record)
                write_results(options.workdir, [*SEARCHES])
                done += 1
                print(f"{done}/{len(folders)}  {name}  {words_of(record)}", flush=True)
    if stopped:
        print("stopped; run the same command to resume")
        sys.exit(128 + stopped[0])
    write_results(options.workdir, [*SEARCHES])
    print(f"\n{(options.workdir / 'results.md').read_text()}\nwritten to {options.workdir}")


class _Stopped(Exception):
    """Ends a search when a signal has come; its journal keeps what it has evaluated."""


def run_cell(
    options: argparse.Namespace,
    searched: Searched,
    name: str,
    kind: str,
    budget: float,
    seed: int,
    stopped: Sequence[Any],
) -> dict[str, Any]:
    """Searches, makes the network smaller, tests it and trains it further."""
    folder = options.workdir / name
    folder.mkdir(exist_ok=True)
    began = time.perf_counter()
    problem = problem_of(options, searched, budget)
    found = find(options, searched, problem, folder, kind, seed, stopped)
    assert found.plan is not None
    found.plan.save(folder / "plan.json")
    plan, record = found.plan, {"name": name, "search": kind, "budget": budget, "seed": seed}
    dense = searched.dense
    if kind == "scratch":
        before, accuracies = None, {"scratch": scratch(searched, plan, stopped)}
    else:
        before = accuracy_of(searched, plan)
        accuracies = {way: retrain(searched, way, plan, stopped) for way in options.retrain}
    small = jax.eval_shape(plan.compact, searched.variables)["params"]
    if stopped:
        raise _Stopped
    return record | {
        "run": dense.config.seed,
        "dense_accuracy": searched.accuracy,
        "score": found.score,
        "accuracy_before": before,
        "accuracies": accuracies,
        "cost": options.cost,
        "share": found.cost / found.dense,
        "macs": dense.experiment.macs(plan) / dense.experiment.macs(searched.whole),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(small)),
        "widths": models.widths_of(small)._asdict(),
        "kept": found.kept,
        "evaluations": len(found.history),
        "best": found.best,
        "held_out": searched.held_out,
        "evaluate_seconds": found.seconds,
        "search_seconds": found.own_seconds,
        "latency_errors": searched.latency_errors,
        "seconds": time.perf_counter() - began,
    }


def find(
    options: argparse.Namespace,
    searched: Searched,
    problem: search.Problem,
    folder: Path,
    kind: str,
    seed: int,
    stopped: Sequence[Any],
) -> search.Found:
    """Runs one search, with its journal in the folder; raises `_Stopped` between evaluations."""
    count = options.evaluations
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(show_progress(folder.name, count))
        began, counter = time.perf_counter(), iter(range(1, 2**62))

        def on_evaluation(own: search.Evaluation, best: search.Evaluation) -> None:
            number = next(counter)
            seconds = (time.perf_counter() - began) / number
            if number % max(1, count // 20) == 0 or sys.stdout.isatty():
                show(number, {"test_accuracy": best.score, "seconds_per_step": seconds})
            if stopped:
                raise _Stopped

        journal = folder / "journal.jsonl"
        shared: Any = {"journal": journal, "on_evaluation": on_evaluation}
        evaluate = searched.evaluate
        calls = {
            "uniform": lambda: search.uniform(problem, evaluate, **shared),
            "scratch": lambda: search.uniform(problem, evaluate, **shared),
            "ranking": lambda: search.ranking(problem, evaluate, **shared),
            "knapsack": lambda: search.knapsack(problem, evaluate, **shared),
            "greedy": lambda: search.greedy(problem, evaluate, evaluations=count, **shared),
            "measured_knapsack": lambda: search.knapsack(
                problem, evaluate, evaluations=count, **shared
            ),
            "random": lambda: search.random(
                problem, evaluate, evaluations=count, seed=seed, **shared
            ),
            "cross_entropy": lambda: search.cross_entropy(
                problem, evaluate, evaluations=count, seed=seed, **shared
            ),
            "amc": lambda: search.amc(problem, evaluate, episodes=count, seed=seed, **shared),
        }
        return calls[kind]()


def words_of(record: Mapping[str, Any]) -> str:
    """Describes a finished network in one line."""
    before = record["accuracy_before"]
    parts = [f"score {record['score']:.2%}"]
    parts += [] if before is None else [f"test {before:.2%}"]
    parts += [f"{way} {value:.2%}" for way, value in record["accuracies"].items()]
    return "  ".join([*parts, f"{record['share']:.1%} of the cost", f"{record['seconds']:.0f} s"])


if __name__ == "__main__":
    main()
