"""Table and plot of scripts/compact.py, from the records that it leaves in its workdir."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import checkpoints, reports

NOTE = """Before: accuracy on the test images of the cut network, not yet trained on; accuracy:
after it. SD: sample standard deviation over seeds. Relative: to the dense network of the same seed
that was trained on as long. MACs: of one image. Step: seconds of a training step; step ratio: to
the dense network's, timed in turns with it."""


def write_results(workdir: Path, scores: Sequence[str]) -> list[dict[str, Any]]:
    """Writes results.jsonl, .md and .png of all networks that are finished.

    Args:
        workdir: has a folder with summary.json for each.
        scores: in the order of the table.

    Returns:
        A row for each score and budget, dense first; empty if nothing is finished.
    """
    found = {path.parent.name: path for path in sorted(workdir.glob("*/summary.json"))}
    records = {name: checkpoints.read_json(path) for name, path in found.items()}
    # A copy of a folder, or one that was never moved to its place, is not one more network.
    runs = [record for name, record in records.items() if record["name"] == name]
    if not runs:
        return []
    lines = (json.dumps(run) + "\n" for run in runs)
    checkpoints.write_text(workdir / "results.jsonl", "".join(lines))
    rows = aggregate(runs, scores)
    reports.plot_compaction(rows, workdir / "results.png")
    commands = (checkpoints.read_json(workdir / "config.json") or {}).get("commands", [])
    facts = [f"- command: `{command}`" for command in commands]
    for run in runs:
        versions = ", ".join(" ".join(package) for package in run["versions"].items())
        facts += [f"- device: {run['device']}", f"- versions: {versions}"]
    worst = max((run["difference"] or 0 for run in runs), default=0)
    facts.append(f"- largest difference to the dense network with zeros, relative: {worst:.1e}")
    table = [shown(row) for row in rows]
    parts = reports.markdown_table(table, list(table[0])), NOTE, "\n".join(dict.fromkeys(facts))
    checkpoints.write_text(workdir / "results.md", "\n\n".join(parts) + "\n")
    return rows


def aggregate(runs: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each score and budget: dense, then large budgets first."""
    dense = {run["seed"]: run["accuracy"] for run in runs if run["score"] == "dense"}
    order = ["dense", *scores, "scratch"]
    groups: dict[tuple[float, int], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((-run["budget"], order.index(run["score"])), []).append(run)
    rows = []
    for _, own in sorted(groups.items()):
        name = own[0]["score"]
        row: dict[str, Any] = {"method": "none" if name == "dense" else name}
        row |= {"budget": own[0]["budget"], "runs": len(own)}
        pairs = [(run["accuracy"], dense.get(run["seed"])) for run in own]
        values = {
            "before": [run["accuracy_before"] for run in own if run["accuracy_before"] is not None],
            "accuracy": [run["accuracy"] for run in own],
            "relative": [accuracy / reference for accuracy, reference in pairs if reference],
        }
        for key, each in values.items():
            row[key] = statistics.mean(each) if each else None
            deviation = statistics.stdev(each) if len(each) > 1 else None
            row["SD" if key == "accuracy" else f"{key} SD"] = deviation
        for key in ("parameters", "macs", "seconds_per_step", "dense_seconds_per_step"):
            row[key] = statistics.mean(run[key] for run in own)
        row["count"] = row["macs"]
        row["macs"] = statistics.mean(run["macs"] / run["dense_macs"] for run in own)
        row["ratio"] = row["seconds_per_step"] / row["dense_seconds_per_step"]
        rows.append(row)
    return rows


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row under the headings of the table."""

    def share(key: str) -> str | None:
        return None if row[key] is None else f"{row[key]:.2%}"

    return {
        "score": "dense" if row["method"] == "none" else row["method"],
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
