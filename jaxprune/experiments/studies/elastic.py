"""Trains one elastic network, cuts out the best sub-network for each budget, and compares them.

    python scripts/elastic.py fashion_mnist resnet20 --steps 6000 --workdir runs/elastic
    python scripts/elastic.py --tiny --workdir runs/elastic-tiny    # a try, in minutes

For each seed: progressive shrinking as one training (`elastic.train`); random sub-networks measured
on held-out training images, an accuracy predictor, and evolution for each budget
(`elastic.specialise`); the best sub-network of each budget cut out and tested, and trained a little
longer. Two controls have the same shapes and are trained alone from scratch: `short` for the steps
of the elastic training divided by the number of budgets, `long` for as many as its full network.

To resume after a stop, run the same command again; it may name more budgets and seeds. The elastic
training resumes from its checkpoints, the search from its journal, and finished networks are not
trained again. results.jsonl, results.md and fronts.png always cover all finished networks; each has
a folder with summary.json, and the fine-tuned ones network.npz.
"""

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxprune import checkpoints, elastic, files, search, storage
from jaxprune.experiments import command, results
from jaxprune.experiments.command import plain_errors
from jaxprune.experiments.studies import compaction
from jaxprune.experiments.studies import elastic_networks as networks
from jaxprune.experiments.studies.elastic_networks import Study, Supernet
from jaxprune.experiments.studies.elastic_results import write_results
from jaxprune.logs import show_progress

DATASETS = ("digits", "fashion_mnist", "synthetic")
MODELS = ("resnet8", "resnet20", "resnet32", "resnet56", "mbconv")
KINDS = ("cut", "short", "long")  # networks of a budget, in the order in which they run
TINY = {
    "dataset": "digits", "model": "resnet8", "steps": 48, "networks": 2, "batch_size": 32,
    "budgets": [0.8, 0.6], "validation": 200, "judged": 200, "calibration": 128, "measured": 8,
    "verified": 1, "generations": 5, "population": 10, "tune_steps": 6, "save_every": 12,
    "log_every": 12,
}  # fmt: skip
# What may differ between the commands of one workdir.
_FREE = {
    "seeds",
    "budgets",
    "workdir",
    "data_dir",
    "source_dir",
    "report_only",
    "tiny",
    "log_every",
}


class _Stopped(Exception):
    """Ends the study when a signal has come; what is finished is on disk."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    args = sys.argv[1:] if args is None else list(args)
    options = parse(args)
    with plain_errors():
        if options.report_only:
            command.check_results(write_results(options.workdir), options.workdir)
            return
        settings = {f"elastic.py --{k}": v for k, v in vars(options).items() if k not in _FREE}
        checkpoints.check_writable(options.workdir)
        with files.locked(options.workdir, "`workdir`"):
            words = ["python", "scripts/elastic.py", *args]
            command.record_command(options.workdir / "config.json", settings, words)
            compare(options)


def parse(args: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("dataset", nargs="?", default="fashion_mnist", choices=DATASETS,
        help="default: fashion_mnist")  # fmt: skip
    add("model", nargs="?", default="resnet20", choices=MODELS, help="default: resnet20")
    add("--steps", type=int, default=6000, help="of the elastic training; default: 6000")
    add("--networks", type=int, default=4, help="most sub-networks of a step; default: 4")
    add("--sandwich", action="store_true", help="one phase with the sandwich rule, not shrinking")
    add("--widths", nargs="+", type=float, default=[0.5, 0.75, 1.0], metavar="FRACTION",
        help="of the channels inside a block; default: 0.5 0.75 1")  # fmt: skip
    add("--streams", nargs="+", type=float, default=[1.0], metavar="FRACTION",
        help="of the channels between blocks; default: 1")  # fmt: skip
    add("--resolutions", nargs="*", type=int, default=[], metavar="PIXELS",
        help="default: that of the data set")  # fmt: skip
    add("--budgets", nargs="+", type=float, default=[0.8, 0.6, 0.45, 0.35, 0.25], metavar="SHARE",
        help="of the cost of the full network; default: 0.8 0.6 0.45 0.35 0.25")  # fmt: skip
    add("--cost", default="macs", choices=["macs", "parameters", "latency"],
        help="what a budget limits; latency is measured on this device; default: macs")  # fmt: skip
    add("--measured", type=int, default=100, help="choices for the predictor; default: 100")
    add("--verified", type=int, default=4, help="choices measured for each budget; default: 4")
    add("--population", type=int, default=100, help="of the evolution; default: 100")
    add("--generations", type=int, default=100, help="of the evolution; default: 100")
    add("--validation", type=int, default=5000,
        help="training images to hold out; default: 5000")  # fmt: skip
    add("--judged", type=int, default=2000,
        help="held-out images that a choice is judged on; default: 2000")  # fmt: skip
    add("--calibration", type=int, default=1000,
        help="training images for batch statistics; default: 1000")  # fmt: skip
    add("--tune-steps", type=int, default=300, help="of fine-tuning; default: 300")
    add("--tune-rate", type=float, help="highest rate of it; default: a tenth of --learning-rate")
    add("--short-steps", type=int, help="default: --steps divided by the number of budgets")
    add("--long-steps", type=int, help="default: the steps of the phase of the full network")
    add("--controls", nargs="*", default=["short", "long"], choices=["short", "long"],
        help="default: both")  # fmt: skip
    add("--batch-size", type=int, default=128, help="default: 128")
    add("--learning-rate", type=float, default=0.1, help="highest rate; default: 0.1")
    add("--pad", type=int, default=2, help="shift images by up to this; default: 2")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of them")
    add("--image-size", type=int, default=32, help="synthetic: pixels; default: 32")
    add("--data-dir", default="", help="folder of prepared data")
    add("--source-dir", default="", help="folder with the data set's original files")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="default: 0")
    add("--save-every", type=int, default=500, help="steps between checkpoints; default: 500")
    add("--log-every", type=int, default=100, help="steps between two lines; default: 100")
    add("--workdir", type=Path, default=Path("runs/elastic"), help="default: runs/elastic")
    add("--tiny", action="store_true", help="small numbers everywhere, for a try")
    add("--report-only", action="store_true", help="train nothing, rewrite the results")
    if "--tiny" in args:
        parser.set_defaults(**TINY)
    options = parser.parse_args(args)
    if not all(0 < budget <= 1 for budget in options.budgets):
        parser.error("--budgets must lie in (0, 1]")
    whole = ("steps", "networks", "batch_size", "tune_steps", "judged", "calibration", "validation")
    bad = [name for name in whole if getattr(options, name) < 1]
    if bad:
        parser.error(f"--{', --'.join(bad).replace('_', '-')} must be at least 1")
    if options.tune_rate is None:
        options.tune_rate = options.learning_rate / 10
    if options.short_steps is None:
        options.short_steps = max(1, round(options.steps / len(set(options.budgets))))
    return options


def cells_of(options: argparse.Namespace, seed: int) -> dict[str, tuple[str, float]]:
    """Returns folder -> kind and budget, in the order in which they run."""
    kinds = [kind for kind in KINDS if kind == "cut" or kind in options.controls]
    budgets = sorted(set(options.budgets), reverse=True)
    return {f"{kind}-{own:g}-seed{seed}": (kind, own) for own in budgets for kind in kinds}


def compare(options: argparse.Namespace) -> None:
    """Trains what is not finished, for all seeds."""
    cells = {seed: cells_of(options, seed) for seed in dict.fromkeys(options.seeds)}
    total = sum(map(len, cells.values()))
    done = sum((options.workdir / name / "summary.json").exists() for own in cells.values()
               for name in own)  # fmt: skip
    print(f"{done} of {total} networks are finished already", flush=True)
    with checkpoints.stop_signals() as stopped:
        try:
            for seed, own in cells.items():
                waiting = [
                    name for name in own if not (options.workdir / name / "summary.json").exists()
                ]
                if waiting:
                    run_seed(options, seed, own, waiting, stopped)
        except (_Stopped, elastic.Stopped):
            print("stopped; run the same command to resume")
            sys.exit(128 + stopped[0])
    write_results(options.workdir)
    print(f"\n{(options.workdir / 'results.md').read_text()}\nwritten to {options.workdir}")


def run_seed(
    options: argparse.Namespace,
    seed: int,
    cells: Mapping[str, tuple[str, float]],
    waiting: Sequence[str],
    stopped: Sequence[Any],
) -> None:
    """Trains the elastic network of a seed, specialises it, and trains what it finds."""
    study = networks.open_study(options, seed)
    check_budgets(study, [budget for _, budget in cells.values()])
    supernet = train(options, study, stopped)
    compaction.check_cells(options.workdir, {seed: cells}, {seed: supernet.source})
    chosen = choices_of(options, supernet, cells, stopped)
    for name in waiting:
        kind, budget = cells[name]
        record = run_cell(options, supernet, kind, budget, chosen[budget], stopped)
        record |= {"name": name, "source": supernet.source} | results.environment()
        checkpoints.write_json(options.workdir / name / "summary.json", record)
        write_results(options.workdir)
        print(f"{name}  {words_of(record)}", flush=True)


def check_budgets(study: Study, budgets: Sequence[float]) -> None:
    """Refuses budgets that no sub-network meets, before anything is trained."""
    cheapest = elastic.find_cheapest(study.space.decisions, study.cost)
    share = study.cost(cheapest) / full_cost(study)
    bad = [f"{own:g}" for own in dict.fromkeys(budgets) if own < share]
    if bad:
        raise ValueError(
            f"`budgets` {', '.join(bad)} are met by no choice: the cheapest one has {share:.3f} of "
            f"the cost of the full network: {elastic.describe(study.space.decisions, cheapest)}"
        )


def full_cost(study: Study) -> float:
    """Returns the cost of the full network."""
    return study.cost(elastic.largest(study.space.decisions))


def train(options: argparse.Namespace, study: Study, stopped: Sequence[Any]) -> Supernet:
    """Trains the elastic network, and shows its progress."""
    folder = options.workdir / f"elastic-seed{study.config.seed}"
    total = sum(own.steps for own in study.phases)
    began = [time.perf_counter(), -1.0]
    with show_progress(folder.name, total) as show:

        def on_log(step: int, values: Mapping[str, Any]) -> None:
            now = time.perf_counter()
            shown = {"train_loss": values["loss"], "train_accuracy": values["accuracy"]}
            if began[1] >= 0:  # the first lines include compilation
                shown["seconds_per_step"] = (now - began[0]) / (step - began[1])
            else:
                began[:] = now, step
            show(step, shown)

        return networks.train_supernet(options, study, folder, on_log, stopped)


def choices_of(
    options: argparse.Namespace,
    supernet: Supernet,
    cells: Mapping[str, tuple[str, float]],
    stopped: Sequence[Any],
) -> dict[float, dict[str, Any]]:
    """Returns budget -> what specialisation found for it.

    The choice of a budget stays what it was when its first network was finished.
    """
    study, seed = supernet.study, supernet.study.config.seed
    path = options.workdir / f"elastic-seed{seed}" / "front.json"
    saved = checkpoints.read_json(path) or {"points": []}
    known = {own["share"]: own for own in saved["points"]}
    wanted = dict.fromkeys(budget for _, budget in cells.values())
    if set(wanted) <= set(known):
        return known
    full = full_cost(study)
    front = specialise(options, supernet, [own for own in wanted if own not in known], stopped)
    print(front, flush=True)
    found = front.to_dict()
    shares = {own * full: own for own in wanted}
    fresh = [own | {"share": shares[own["budget"]]} for own in found["points"]]
    known |= {own["share"]: own for own in fresh}
    record = (
        found | {"points": list(known.values()), "full_cost": full} | account(options, supernet)
    )
    _, evaluations = search.read_journal(path.with_name("journal.jsonl"))  # for all budgets
    record |= {"search_passes": networks.passes_of_measuring(options, len(evaluations))}
    checkpoints.write_json(path, record)
    return known


def specialise(
    options: argparse.Namespace,
    supernet: Supernet,
    budgets: Sequence[float],
    stopped: Sequence[Any],
) -> elastic.Front:
    """Searches for the sub-networks of budgets, with its journal in the folder of the seed."""
    study = supernet.study
    folder = options.workdir / f"elastic-seed{study.config.seed}"
    total = options.measured + options.verified * len(budgets)
    began = time.perf_counter()
    with show_progress(f"{folder.name}: choices", total) as show:

        def on_evaluation(number: int, own: elastic.Measured) -> None:
            if number % max(1, total // 10) == 0 or sys.stdout.isatty():
                seconds = (time.perf_counter() - began) / number
                show(number, {"test_accuracy": own.score, "seconds_per_step": seconds})
            if stopped:
                raise _Stopped

        return elastic.specialise(
            study.space.decisions,
            supernet.evaluate,
            study.cost,
            [own * full_cost(study) for own in budgets],
            measured=options.measured,
            verified=options.verified,
            seed=study.config.seed,
            evolution=elastic.Evolution(options.population, options.generations),
            journal=folder / "journal.jsonl",
            settings={"network": supernet.source},
            on_evaluation=on_evaluation,
        )


def account(options: argparse.Namespace, supernet: Supernet) -> dict[str, Any]:
    """Describes the elastic training and its cost."""
    study, full = supernet.study, elastic.largest(supernet.study.space.decisions)
    return {
        "kind": "elastic",
        "seed": study.config.seed,
        "source": supernet.source,
        "phases": [own._asdict() for own in supernet.trained.results],
        "sub_networks": elastic.count(study.space.decisions),
        "full_macs": study.macs(full),
        "full_parameters": study.parameters(full),
        "training_passes": networks.passes_of_training(study),
        "batch_size": options.batch_size,
    }


def run_cell(
    options: argparse.Namespace,
    supernet: Supernet,
    kind: str,
    budget: float,
    point: Mapping[str, Any],
    stopped: Sequence[Any],
) -> dict[str, Any]:
    """Cuts out a network and trains it further, or trains one of its shape alone."""
    study, choice = supernet.study, tuple(point["choice"])
    began = time.perf_counter()
    steps = {
        "cut": options.tune_steps,
        "short": options.short_steps,
        "long": options.long_steps or study.phases[0].steps,
    }[kind]
    rate = options.tune_rate if kind == "cut" else options.learning_rate
    before = None
    if kind == "cut":
        cut = networks.cut_out(supernet, choice)
        before = networks.test_accuracy(study, cut)
    else:
        cut = networks.from_scratch(study, choice, study.config.seed)
    module, accuracy = networks.train_alone(study, cut, steps, rate, stopped)
    if stopped:
        raise _Stopped
    folder = options.workdir / f"{kind}-{budget:g}-seed{study.config.seed}"
    folder.mkdir(exist_ok=True)
    variables = networks.variables_of(module)
    kept = jax.tree.map(lambda _: True, variables)
    storage.save(folder / "network.npz", variables, kept)
    macs, full = study.macs(choice), study.macs(elastic.largest(study.space.decisions))
    return {
        "kind": kind,
        "budget": budget,
        "seed": study.config.seed,
        "choice": list(choice),
        "options": point["options"],
        "share": point["cost"] / full_cost(study),
        "score": point["score"],
        "predicted": point["predicted"],
        "macs": macs,
        "full_macs": full,
        "parameters": study.parameters(choice),
        "accuracy_before": before,
        "accuracy": accuracy,
        "steps": steps,
        "learning_rate": rate,
        "passes": 3.0 * steps * options.batch_size,
        "seconds": time.perf_counter() - began,
    }


def words_of(record: Mapping[str, Any]) -> str:
    """Describes a finished network in one line."""
    before = record["accuracy_before"]
    text = "" if before is None else f"{before:.2%} -> "
    share = record["macs"] / record["full_macs"]
    return f"{text}{record['accuracy']:.2%}  {share:.1%} of the MACs  {record['seconds']:.0f} s"


if __name__ == "__main__":
    main()
