"""Removes channels of trained ResNets for real, by several scores, and trains the smaller networks.

    python scripts/train.py digits_resnet8 --method none --workdir runs/dense-0
    python scripts/compact.py runs/dense-0 --scores l1 taylor --budgets 0.5 0.25

Takes finished dense runs of scripts/train.py that differ only in their seeds. For each score and
budget (the fraction of the MACs that is kept) a folder in the workdir gets plan.json, the smaller
parameters and statistics (network.npz, read by jaxprune.storage.load) and summary.json. There are
three controls: random scores; `scratch`, a new network with the widths that `l1` chose; and
`dense`, the whole network. All of them are trained for the same time on the same batches.

To resume after a stop, run the same command again; it may name more runs, scores and budgets.
results.jsonl, .md and .png always cover all finished networks.
"""

import argparse
import contextlib
import dataclasses
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxprune import checkpoints, files, models, storage, structure, training
from jaxprune.experiments import command, results
from jaxprune.experiments.command import plain_errors
from jaxprune.experiments.config import Config
from jaxprune.experiments.studies.compaction_results import write_results
from jaxprune.experiments.studies.networks import (
    SCORES,
    Dense,
    choose,
    compacted,
    fine_tune,
    from_scratch,
    read_dense,
    time_steps,
    unpruned,
    variables_of,
)

# What may differ between the runs. Only the seed changes a number of a dense run.
FREE = {"seed", "workdir", "overwrite", "data_dir", "source_dir", "sparsity"}
# What all networks of a workdir share, besides the configuration of the dense runs.
SHARED = "steps", "learning_rate", "warmup_steps", "score_batches", "floor", "multiple"


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    args = sys.argv[1:] if args is None else list(args)
    options = parse(args)
    with plain_errors():
        if options.report_only:
            command.check_results(write_results(options.workdir, [*SCORES]), options.workdir)
            return
        runs = read_runs(options)
        cells = {config.seed: cells_of(options, config.seed) for _, config in runs}
        sources: dict[int, str] = {}

        def check() -> None:
            sources.update({config.seed: source_of(path) for path, config in runs})
            check_cells(options.workdir, cells, sources)

        settings = checkpoints.fields(runs[0][1], FREE)
        settings |= {f"compact.py --{name}": getattr(options, name) for name in SHARED}
        words = ["python", "scripts/compact.py", *args]
        path = options.workdir / "config.json"
        checkpoints.check_writable(options.workdir)
        with files.locked(options.workdir, "`workdir`"):
            command.record_command(path, settings, words, check=check)
            compare(options, runs, cells, sources)


def parse(args: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    form = argparse.RawDescriptionHelpFormatter
    meanings = "".join(f"  {name:11} {what}\n" for name, what in SCORES.items())
    text = f"{__doc__}\nscores:\n{meanings}"
    parser = argparse.ArgumentParser(description=text, formatter_class=form)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="workdir of a dense run of train.py")
    add("--scores", nargs="+", default=[*SCORES], choices=SCORES, metavar="SCORE",
        help="default: all of them")  # fmt: skip
    add("--budgets", nargs="+", type=float, default=[0.5, 0.25], metavar="FRACTION",
        help="of the MACs that is kept; default: 0.5 0.25")  # fmt: skip
    add("--steps", type=int, default=300, help="training steps after compaction; default: 300")
    add("--learning-rate", type=float,
        help="the highest rate; default: a quarter of the dense run's")  # fmt: skip
    add("--warmup-steps", type=int, help="default: a tenth of the steps")
    add("--score-batches", type=int, default=8,
        help="training batches whose mean gradient `taylor` takes; default: 8")  # fmt: skip
    add("--floor", type=float, default=0.1, metavar="FRACTION",
        help="of its channels that each group keeps at least; default: 0.1")  # fmt: skip
    add("--multiple", type=int, default=1,
        help="widths are multiples of this; 8 makes steps faster; default: 1")  # fmt: skip
    add("--workdir", type=Path, default=Path("runs/compact"), help="default: runs/compact")
    add("--report-only", action="store_true", help="train nothing, rewrite the results")
    options = parser.parse_args(args)
    if not (options.runs or options.report_only):
        parser.error("RUN is missing: name the workdirs of dense runs of scripts/train.py")
    if not all(0 < budget < 1 for budget in options.budgets):
        parser.error("--budgets must lie in (0, 1)")
    if options.warmup_steps is None:
        options.warmup_steps = round(options.steps / 10)
    whole = options.steps, options.score_batches, options.multiple
    if min(whole) < 1 or not 0 <= options.warmup_steps < options.steps:
        parser.error(
            "--steps, --score-batches and --multiple must be at least 1, --warmup-steps less than "
            "--steps"
        )
    return options


def read_runs(options: argparse.Namespace) -> list[tuple[Path, Config]]:
    """Reads the dense runs and their configurations; the error lists all that is wrong."""
    problems, runs = [], []
    for path in options.runs:
        saved = command.read_config(path)
        if saved is None:
            problems.append(f"{path}: holds no run of scripts/train.py")
        elif not (path / "summary.json").exists():
            problems.append(f"{path}: is not finished; run the command that began it to resume")
        elif saved.get("method") != "none":
            problems.append(f"{path}: is pruned ({saved.get('method')}); train with --method none")
        else:
            names = {field.name for field in dataclasses.fields(Config)}
            config = Config(**{key: saved[key] for key in saved if key in names})
            _, first = runs[0] if runs else (path, config)
            ours, theirs = (checkpoints.fields(each, FREE) for each in (config, first))
            problems += [
                f"{path}: {key} is {value!r}, but {theirs[key]!r} in {runs[0][0]}"
                for key, value in ours.items()
                if value != theirs[key]
            ]
            if config.seed in [other.seed for _, other in runs]:
                problems.append(f"{path}: has seed {config.seed}, as an earlier one has")
            runs.append((path, config))
    if problems:
        text = "\n  ".join(problems)
        raise ValueError(f"runs must be finished, dense and differ only in their seeds:\n  {text}")
    if options.learning_rate is None:
        options.learning_rate = runs[0][1].learning_rate / 4
    return runs


def compare(
    options: argparse.Namespace,
    runs: Sequence[tuple[Path, Config]],
    cells: Mapping[int, Mapping[str, Any]],
    sources: Mapping[int, str],
) -> None:
    """Trains every cell that is not finished."""
    folders = [options.workdir / name for own in cells.values() for name in own]
    done = ended = sum((folder / "summary.json").exists() for folder in folders)
    began = time.perf_counter()
    print(f"{done} of {len(folders)} networks are finished already", flush=True)
    with checkpoints.stop_signals() as stopped:
        for path, config in runs:
            dense = None  # built only if a cell needs it
            for name, (score, budget) in cells[config.seed].items():
                if stopped or (options.workdir / name / "summary.json").exists():
                    continue
                dense = dense or open_run(options, path, config)
                source = sources[config.seed]
                record = run_cell(options, dense, name, score, budget, stopped, source)
                if record is None:
                    continue
                write_results(options.workdir, [*SCORES])
                ended += 1
                left = (time.perf_counter() - began) / (ended - done) * (len(folders) - ended)
                before, after = record["accuracy_before"], record["accuracy"]
                text = f"accuracy {after:.2%}" if before is None else f"{before:.2%} -> {after:.2%}"
                print(
                    f"{ended}/{len(folders)}  {name}  {text}  {record['seconds']:.0f} s  "
                    f"{left / 60:.1f} minutes left",
                    flush=True,
                )
    if stopped:
        print("stopped; run the same command to resume")
        sys.exit(128 + stopped[0])
    write_results(options.workdir, [*SCORES])
    print(f"\n{(options.workdir / 'results.md').read_text()}\nwritten to {options.workdir}")


def source_of(path: Path) -> str:
    """Returns what tells the trained networks of dense runs apart, wherever they lie."""
    with contextlib.closing(checkpoints.open_manager(path / "checkpoints")) as manager:
        return checkpoints.fingerprint(manager)


def check_cells(
    workdir: Path, cells: Mapping[int, Mapping[str, Any]], sources: Mapping[int, str]
) -> None:
    """Raises if finished networks were made from dense networks that are not those given now."""
    problems = []
    for seed, own in cells.items():
        for name in own:
            saved = checkpoints.read_json(workdir / name / "summary.json")
            if saved is not None and saved.get("source") != sources[seed]:
                problems.append(str(workdir / name))
    if problems:
        text = "\n  ".join(problems)
        raise ValueError(
            "networks were made from a different training of the same configuration; use a "
            f"different --workdir, or delete these folders:\n  {text}"
        )


def cells_of(options: argparse.Namespace, seed: int) -> dict[str, tuple[str, float]]:
    """Returns folder -> score and budget, in the order in which they run."""
    scores = [*dict.fromkeys(options.scores), "scratch"]
    pairs = [(score, budget) for budget in dict.fromkeys(options.budgets) for score in scores]
    cells = {f"{score}-{budget:g}-seed{seed}": (score, budget) for score, budget in pairs}
    return {f"dense-seed{seed}": ("dense", 1.0)} | cells


def open_run(options: argparse.Namespace, path: Path, config: Config) -> Dense:
    """Reads a trained network, to be trained further as the options say."""
    own = {name: getattr(options, name) for name in ("steps", "learning_rate", "warmup_steps")}
    dense = read_dense(path, dataclasses.replace(config, schedule="cosine", **own))
    for budget in options.budgets:  # refuse one below the floors before anything is trained
        plan_of(options, dense, "l1", budget)
    return dense


def plan_of(options: argparse.Namespace, dense: Dense, score: str, budget: float) -> structure.Plan:
    """Returns which channels stay."""
    limits: Any = {"floor": options.floor, "multiple": options.multiple}
    return choose(dense, score, budget, batches=options.score_batches, **limits)


def run_cell(
    options: argparse.Namespace,
    dense: Dense,
    name: str,
    score: str,
    budget: float,
    stopped: Sequence[Any],
    source: str,
) -> dict[str, Any] | None:
    """Makes a network smaller, trains it and writes its folder; returns None if it was stopped."""
    began = time.perf_counter()
    experiment = dense.experiment
    whole = plan = experiment.groups.plan({})
    if score == "dense":
        small = unpruned(dense)
    else:
        plan = plan_of(options, dense, "l1" if score == "scratch" else score, budget)
        small = from_scratch(dense, plan) if score == "scratch" else compacted(dense, plan)
    before = None  # of an untrained network
    if score != "scratch":
        before = small.steps.evaluate(small.state)["test_accuracy"]
    state = fine_tune(dense, small, stopped)
    if int(state.step) < options.steps:
        return None
    seconds, dense_seconds = time_steps(dense, small.steps, state)
    record = {
        "name": name,
        "score": score,
        "budget": budget,
        "seed": dense.config.seed,
        "source": source,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "macs": experiment.macs(plan),
        "dense_macs": experiment.macs(whole),
        "accuracy_before": before,
        "accuracy": small.steps.evaluate(state)["test_accuracy"],
        "difference": small.difference,
        "seconds_per_step": seconds,
        "dense_seconds_per_step": dense_seconds,
        "widths": models.widths_of(state.params)._asdict(),
    } | results.environment()
    record["seconds"] = time.perf_counter() - began
    write_cell(options.workdir / name, record, plan if score in SCORES else None, state)
    return record


def write_cell(
    folder: Path, record: dict[str, Any], plan: structure.Plan | None, state: training.TrainState
) -> None:
    """Writes the folder of a network, whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    for path in (partial, folder):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir()
    if plan is not None:
        plan.save(partial / "plan.json")
    variables = variables_of(state)
    storage.save(partial / "network.npz", variables, jax.tree.map(lambda _: True, variables))
    checkpoints.write_json(partial / "summary.json", record)
    partial.rename(folder)


if __name__ == "__main__":
    main()
