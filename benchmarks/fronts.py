"""Draws accuracy against MACs of networks found by searches, by AGIP and by once-for-all.

    python benchmarks/fronts.py --searches runs/searches/resnet20-macs --elastic runs/elastic

Reads what benchmarks/search.py and scripts/elastic.py have left for a ResNet-20 on Fashion-MNIST,
trains the same network with AGIP on channels at several sparsities, as one run each, and writes
fronts.png and fronts.md to `--workdir`. It resumes where it was stopped.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import checkpoints, reports
from jaxprune.experiments.studies import tables

ROOT = Path(__file__).parents[1]
SEARCHES = ("amc", "cross_entropy", "random", "uniform")
AGIP = (
    "--method agip --granularity channels --compact --multiple 4 --prune-start 0.03 "
    "--prune-stop 0.3 --prune-every 50 --eval-every 100000"
)
Points = list[dict[str, Any]]  # of one line: `cost`, `accuracy`, `SD`, `runs`


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--searches", type=Path, required=True, help="folder of scripts/search.py")
    add("--elastic", type=Path, required=True, help="folder of scripts/elastic.py")
    add("--workdir", type=Path, default=Path("runs/fronts"), help="default: runs/fronts")
    add("--sparsities", type=float, nargs="+", default=[0.25, 0.4, 0.5, 0.6], metavar="FRACTION",
        help="of the channels; default: 0.25 0.4 0.5 0.6")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0], help="of the runs of AGIP; default: 0")
    add("--steps", type=int, default=2150, help="of AGIP; default: 2150, as dense and fine-tuned")
    options = parser.parse_args(args)
    agip = [
        train(options, sparsity, seed) for sparsity in options.sparsities for seed in options.seeds
    ]
    lines = lines_of(
        [*map(json.loads, (options.searches / "results.jsonl").read_text().splitlines())],
        [*map(json.loads, (options.elastic / "results.jsonl").read_text().splitlines())],
        agip,
    )
    reports.plot_fronts(lines, options.workdir / "fronts.png")
    rows = [
        {
            "networks": label,
            "runs": point["runs"],
            "MACs": f"{point['cost']:.1%}",
            "accuracy": f"{point['accuracy']:.2%}",
            "SD": "-" if point["SD"] is None else f"{point['SD']:.2%}",
        }
        for label, points in lines.items()
        for point in sorted(points, key=lambda point: -point["cost"])
    ]
    table = reports.markdown_table(rows, list(rows[0]))
    checkpoints.write_text(options.workdir / "fronts.md", table + "\n")
    print(table)


def train(options: argparse.Namespace, sparsity: float, seed: int) -> dict[str, Any]:
    """Trains one network with AGIP, unless it is there; returns its sparsity and summary."""
    folder = options.workdir.absolute() / f"agip-{sparsity:g}-seed{seed}"
    words = ["python", "scripts/train.py", "fashion_resnet20", *AGIP.split()]
    words += ["--sparsity", str(sparsity), "--steps", str(options.steps), "--seed", str(seed)]
    words += ["--workdir", str(folder)]
    if not (folder / "summary.json").exists():
        print(shlex.join(words), flush=True)
        code = subprocess.run([sys.executable, *words[1:]], cwd=ROOT).returncode
        if code:
            sys.exit(code)
    return {"sparsity": sparsity} | json.loads((folder / "summary.json").read_text())


def lines_of(
    searches: Sequence[Mapping[str, Any]],
    elastic: Sequence[Mapping[str, Any]],
    agip: Sequence[Mapping[str, Any]],
) -> dict[str, Points]:
    """Returns label -> points, each the mean over seeds.

    Args:
        searches: records of scripts/search.py.
        elastic: records of scripts/elastic.py.
        agip: summaries of scripts/train.py with `sparsity`, as `train` returns them.

    Returns:
        Points with their MACs relative to the dense network.
    """
    full = elastic[0]["full_macs"]
    found = {
        f"search: {name.replace('_', ' ')}": points(
            [record for record in searches if record["search"] == name],
            "budget",
            lambda record: record["macs"],
            lambda record: record["accuracies"]["fine_tune"],
        )
        for name in SEARCHES
    }
    # Several budgets may have found the same network: it is one point, at the smallest of them.
    cut = [record for record in elastic if record["kind"] == "cut"]
    cut.sort(key=lambda record: -record["budget"])
    cut = list({(record["seed"], record["macs"]): record for record in cut}.values())
    share = ("budget", lambda record: record["macs"] / full)
    found["once-for-all, as cut"] = points(cut, *share, lambda record: record["accuracy_before"])
    found["once-for-all, fine-tuned"] = points(cut, *share, lambda record: record["accuracy"])
    found["AGIP while it trains"] = points(
        agip,
        "sparsity",
        lambda record: record["macs"] / full,
        lambda record: record["test_accuracy"],
    )
    return {label: own for label, own in found.items() if own}


def points(
    records: Sequence[Mapping[str, Any]],
    key: str,
    cost: tables.Column,
    accuracy: tables.Column,
) -> Points:
    """Returns a point for each value of a field, the mean over its records."""
    rows = tables.aggregate(records, [key], {"cost": cost, "accuracy": accuracy})
    return [row | {"SD": row["accuracy SD"]} for row in rows]


if __name__ == "__main__":
    main()
