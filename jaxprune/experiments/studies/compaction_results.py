"""Results of scripts/compact.py: the table and the plot of the records in its workdir."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import checkpoints, reports
from jaxprune.experiments import command
from jaxprune.experiments.studies import tables
from jaxprune.files import schemas

NOTE = """Before: accuracy on the test images of the cut network, not yet trained on; accuracy:
after it. SD: sample standard deviation over seeds. Relative: to the dense network of the same seed
that was trained on as long. MACs: of one image. Step: seconds of a training step; step ratio: to
the dense network's, timed in turns with it."""

_FIGURES = (
    "accuracy", "parameters", "macs", "dense_macs", "seconds_per_step", "dense_seconds_per_step",
    "budget", "seed",
)  # fmt: skip
NETWORK = schemas.record(
    {
        "name": schemas.text,
        "score": schemas.text,
        "accuracy_before": schemas.maybe(schemas.number),
        "difference": schemas.maybe(schemas.number),
        "device": schemas.text,
        **dict.fromkeys(_FIGURES, schemas.finite),
    },
    more=True,
)


def write_results(workdir: Path, scores: Sequence[str]) -> list[dict[str, Any]]:
    """Writes results.jsonl, .md and .png of all finished networks.

    Args:
        workdir: has a folder with summary.json for each.
        scores: in the order of the table.

    Returns:
        A row for each score and budget, dense first; empty if nothing is finished.
    """
    found = {path.parent.name: path for path in sorted(workdir.glob("*/summary.json"))}
    records = {name: checkpoints.read_json(path) for name, path in found.items()}
    for name, record in records.items():
        NETWORK(record, str(found[name]))
    # A copy of a folder, or one that was never moved to its place, is not one more network.
    runs = [record for name, record in records.items() if record["name"] == name]
    if not runs:
        return []
    rows = aggregate(runs, scores)
    reports.plot_compaction(rows, workdir / "results.png")
    facts = tables.facts(command.commands_in(workdir / "config.json"), runs)
    worst = max((run["difference"] or 0 for run in runs), default=0)
    facts.append(f"largest difference to the dense network with zeros, relative: {worst:.1e}")
    table = [shown(row) for row in rows]
    parts = reports.markdown_table(table, list(table[0])), NOTE
    tables.write(workdir, runs, parts, facts)
    return rows


def aggregate(runs: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each score and budget: dense, then large budgets first."""
    dense = {run["seed"]: run["accuracy"] for run in runs if run["score"] == "dense"}
    rows = tables.aggregate(
        runs,
        ["score", "budget"],
        {
            "before": lambda run: run["accuracy_before"],
            "accuracy": lambda run: run["accuracy"],
            "relative": lambda run: tables.ratio(run["accuracy"], dense.get(run["seed"])),
            "parameters": lambda run: run["parameters"],
            "count": lambda run: run["macs"],
            "macs": lambda run: run["macs"] / run["dense_macs"],
            "seconds_per_step": lambda run: run["seconds_per_step"],
            "dense_seconds_per_step": lambda run: run["dense_seconds_per_step"],
        },
    )
    order = ["dense", *scores, "scratch"]
    rows.sort(key=lambda row: (-row["budget"], order.index(row["score"])))
    for row in rows:
        row["method"] = "none" if row["score"] == "dense" else row["score"]
        row["SD"] = row["accuracy SD"]
        row["ratio"] = row["seconds_per_step"] / row["dense_seconds_per_step"]
    return rows


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row as text, under the headings of the table."""

    def share(key: str) -> str | None:
        return None if row[key] is None else f"{row[key]:.2%}"

    return {
        "score": row["score"],
        "budget": f"{row['budget']:g}",
        "runs": row["runs"],
        "parameters": round(row["parameters"]),
        "MACs": round(row["count"]),
        "before": share("before"),
        "before SD": share("before SD"),
        "accuracy": share("accuracy"),
        "SD": share("SD"),
        "relative": share("relative"),
        "relative SD": share("relative SD"),
        "step": f"{row['seconds_per_step']:.3f}",
        "step ratio": f"{row['ratio']:.2f}",
    }
