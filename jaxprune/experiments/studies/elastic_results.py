"""Results of scripts/elastic.py: table, plot and costs of the records in its workdir."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import checkpoints, reports
from jaxprune.experiments import command
from jaxprune.experiments.studies import tables
from jaxprune.files import schemas

NOTE = """Accuracies are on the test images. Cut: the sub-network as cut out, with its own batch
statistics; tuned: after the fine-tuning; short: a new network of the same shape, trained alone for
the steps of the elastic training divided by the number of budgets; long: the same for as many steps
as the full network had. Held out: accuracy on the images of the search; predicted: that of the
predictor. SD: sample standard deviation over seeds."""

_FIGURES = (
    "budget", "seed", "share", "score", "predicted", "macs", "full_macs", "parameters", "accuracy",
    "steps", "passes",
)  # fmt: skip
NETWORK = schemas.record(
    {
        "name": schemas.text,
        "kind": schemas.text,
        "accuracy_before": schemas.maybe(schemas.number),
        "device": schemas.text,
        **dict.fromkeys(_FIGURES, schemas.finite),
    },
    more=True,
)
FRONT = schemas.record(
    {
        "seed": schemas.finite,
        "phases": schemas.each(schemas.table(schemas.anything)),
        "spearman": schemas.maybe(schemas.finite),
        "kendall": schemas.maybe(schemas.finite),
        "error": schemas.finite,
        "full_macs": schemas.finite,
        "training_passes": schemas.finite,
        "search_passes": schemas.finite,
    },
    more=True,
)
_LABELS = {
    "cut": "as cut out",
    "tuned": "fine-tuned",
    "short": "alone, short",
    "long": "alone, long",
}


def write_results(workdir: Path) -> list[dict[str, Any]]:
    """Writes results.jsonl, results.md and fronts.png of all finished networks.

    Args:
        workdir: has a folder with summary.json for each, and elastic-seedN/front.json.

    Returns:
        A row for each budget; empty if nothing is finished.
    """
    records = _read(workdir, "*/summary.json", NETWORK)
    runs = [record for name, record in records.items() if record["name"] == name]
    if not runs:
        return []
    fronts = [*_read(workdir, "elastic-seed*/front.json", FRONT).values()]
    rows = aggregate(runs)
    lines = {
        _LABELS[kind]: [
            {"cost": row["macs"], "accuracy": row[kind], "SD": row[f"{kind} SD"]}
            for row in rows
            if row[kind] is not None
        ]
        for kind in _LABELS
    }
    reports.plot_fronts(lines, workdir / "fronts.png")
    facts = [fact for own in fronts for fact in words_of(own)]
    facts += costs_of(runs, fronts)
    facts += tables.facts(command.commands_in(workdir / "config.json"), runs)
    table = [shown(row) for row in rows]
    parts = reports.markdown_table(table, list(table[0])), NOTE
    tables.write(workdir, runs, parts, facts)
    return rows


def aggregate(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each budget, large budgets first."""
    merged: dict[tuple[float, int], dict[str, Any]] = {}
    for run in runs:
        row = merged.setdefault((run["budget"], run["seed"]), {"budget": run["budget"]})
        row |= {key: run[key] for key in ("score", "predicted", "parameters")}
        row["macs"] = run["macs"] / run["full_macs"]
        if run["kind"] == "cut":
            row |= {"cut": run["accuracy_before"], "tuned": run["accuracy"]}
        else:
            row[run["kind"]] = run["accuracy"]
    names = ("macs", "parameters", "predicted", "score", *_LABELS)
    columns: dict[str, tables.Column] = {
        name: (lambda row, name=name: row.get(name)) for name in names
    }
    rows = tables.aggregate(merged.values(), ["budget"], columns)
    return sorted(rows, key=lambda row: -row["budget"])


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row as text, under the headings of the table."""

    def share(key: str) -> str | None:
        return None if row[key] is None else f"{row[key]:.2%}"

    cells: dict[str, Any] = {
        "budget": f"{row['budget']:g}",
        "runs": row["runs"],
        "MACs": f"{row['macs']:.1%}",
        "parameters": round(row["parameters"]),
        "predicted": share("predicted"),
        "held out": share("score"),
    }
    for kind in _LABELS:
        cells |= {kind: share(kind), f"{kind} SD": share(f"{kind} SD")}
    return cells


def words_of(front: Mapping[str, Any]) -> list[str]:
    """Describes an elastic training and its predictor."""
    phases = ", ".join(
        f"{own['name']} {own['full_accuracy']:.2%} (smallest {own['smallest_accuracy']:.2%})"
        for own in front["phases"]
    )
    ranks = [f"{name} {'-' if front[name] is None else f'{front[name]:.3f}'}"
             for name in ("spearman", "kendall")]  # fmt: skip
    seed = f"seed {front['seed']:g}"
    return [
        f"{seed}: accuracy of the full network after each phase: {phases}",
        f"{seed}: predictor on unseen choices: {', '.join(ranks)}, error {front['error']:.2%}",
    ]


def costs_of(runs: Sequence[Mapping[str, Any]], fronts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compares what all trainings cost, in multiply-accumulates.

    A network for a budget costs its fine-tuning; the elastic training and its search are paid once.
    So n budgets cost `elastic + n * tuned` against `n * alone`.
    """
    if not fronts:
        return []

    def mean(kind: str) -> float | None:
        own = [run["passes"] * run["macs"] for run in runs if run["kind"] == kind]
        return statistics.mean(own) if own else None

    training, search = (
        statistics.mean(own[name] * own["full_macs"] for own in fronts)
        for name in ("training_passes", "search_passes")
    )
    tuned = mean("cut") or 0.0
    facts = [
        "training MACs (a step counts three forward passes, a masked sub-network as the full one): "
        f"elastic training {training:.3g}, search {search:.3g}, fine-tuning {tuned:.3g} a budget"
    ]
    for kind in ("short", "long"):
        alone = mean(kind)
        if alone is not None:
            pays = break_even(training + search, tuned, alone)
            words = "never" if pays is None else f"from {pays} budgets on"
            facts.append(f"alone, {kind}: {alone:.3g} a budget; the elastic network pays {words}")
    return facts


def break_even(once: float, each: float, alone: float) -> int | None:
    """Returns the least number of budgets for which one elastic training costs less.

    Args:
        once: cost of the elastic training.
        each: cost of a budget after it.
        alone: cost of training a network for one budget alone.

    Returns:
        The number, or None if it never costs less.

    Example:
        >>> break_even(100.0, 2.0, 22.0), break_even(100.0, 2.0, 2.0)
        (6, None)
    """
    return math.floor(once / (alone - each)) + 1 if alone > each else None


def _read(workdir: Path, pattern: str, schema: schemas.Schema) -> dict[str, Any]:
    """Returns folder -> content of its file."""
    found = {}
    for path in sorted(workdir.glob(pattern)):
        found[path.parent.name] = checkpoints.read_json(path)
        schema(found[path.parent.name], str(path))
    return found
