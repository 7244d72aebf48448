"""Table and plot of scripts/rewind.py, from the records that it leaves in its workdir."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import checkpoints, reports

NOTE = """Accuracy: on the test images. SD: sample standard deviation over seeds. To dense: mean
difference to the dense network of the same seed. To retrained: the same to retrain_dense after as
many rounds. Compression: of the pruned leaves. Epochs: of all training that led to the network."""
LOSSLESS = "largest compression without loss against dense"


def write_results(workdir: Path, methods: Iterable[str]) -> list[dict[str, Any]]:
    """Writes results.jsonl, .md and .png of all seeds and methods that are done.

    Args:
        workdir: has a folder `seed-N` with a file `METHOD.json` for each.
        methods: in the order of the table.

    Returns:
        A row for each method and round, dense first; empty if nothing is done.
    """
    found = [path for name in methods for path in sorted(workdir.glob(f"seed-*/{name}.json"))]
    records = [checkpoints.read_json(path) for path in found]
    stale = [path for path, record in zip(found, records, strict=True) if is_stale(path, record)]
    records = [r for path, r in zip(found, records, strict=True) if path not in stale]
    if not records:
        return []
    lines = [
        json.dumps({"seed": record["seed"], "epochs": one["total_steps"] / record["epoch"]} | one)
        for record in records
        for one in record["rounds"]
    ]
    lines = [*dict.fromkeys(lines)]  # the dense network is in each record
    checkpoints.write_text(workdir / "results.jsonl", "\n".join(lines) + "\n")
    rows = aggregate([json.loads(line) for line in lines])
    reports.plot_retraining(rows, workdir / "results.png")
    commands = (checkpoints.read_json(workdir / "config.json") or {}).get("commands", [])
    facts = [f"- command: `{command}`" for command in commands]
    facts += [f"- device: {record['device']}" for record in records]
    facts += [
        f"- seed {r['seed']}: {one['note']}" for r in records for one in r["rounds"] if one["note"]
    ]
    facts += [f"- left out, from another dense network: {p.relative_to(workdir)}" for p in stale]
    facts.append(f"- checkpoints on disk: {checkpoint_bytes(workdir):,} bytes")
    table = [shown(row) for row in rows]
    parts = [
        reports.markdown_table(table, list(table[0])),
        NOTE,
        reports.markdown_table(lossless(rows), ["method", LOSSLESS]),
        "\n".join(dict.fromkeys(facts)),
    ]
    checkpoints.write_text(workdir / "results.md", "\n\n".join(parts) + "\n")
    return rows


def is_stale(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a method started from another dense network than the one that is there now."""
    dense = checkpoints.read_json(path.parent / "dense" / "round.json")
    return dense is not None and dense["score"] != record["rounds"][0]["score"]


def shown(row: Mapping[str, Any]) -> dict[str, str]:
    """A row as text, under the headings of the table."""
    return {
        "method": row["method"],
        "density": f"{row['density']:.3f}",
        "compression": f"{1 / row['density']:.2f}",
        "runs": str(row["runs"]),
        "accuracy": f"{row['accuracy']:.2%}",
        "SD": "" if row["SD"] is None else f"{row['SD']:.2%}",
        "to dense": f"{row['to_dense']:+.2%}",
        "to retrained": "" if row["to_retrained"] is None else f"{row['to_retrained']:+.2%}",
        "epochs": f"{row['epochs']:.2f}",
    }


def lossless(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For each method the smallest network that is at least as accurate as the dense one."""
    found = {row["method"]: 1.0 for row in rows if row["method"] not in ("none", "retrain_dense")}
    for row in rows:
        if row["method"] in found and row["to_dense"] >= 0:
            found[row["method"]] = max(found[row["method"]], 1 / row["density"])
    return [{"method": method, LOSSLESS: f"{most:.2f}"} for method, most in found.items()]


def checkpoint_bytes(workdir: Path) -> int:
    """What is kept to go on with: early and last steps, and the last round of each method."""
    return sum(p.stat().st_size for p in workdir.glob("**/checkpoints/**/*") if p.is_file())


def aggregate(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and round, dense first."""
    dense = {run["seed"]: run["score"] for run in results if run["number"] == 0}
    control = {
        (run["seed"], run["number"]): run["score"]
        for run in results
        if run["method"] == "retrain_dense"
    }
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for run in results:
        groups.setdefault((run["method"], run["number"]), []).append(run)

    def mean(values: list[float]) -> float | None:
        return statistics.mean(values) if values else None

    rows = []
    for (method, _), runs in groups.items():
        scores = [run["score"] for run in runs]
        pairs = [(run["score"], control.get((run["seed"], run["number"]))) for run in runs]
        rows.append(
            {
                "method": "none" if method == "dense" else method,
                "density": mean([run["density"] for run in runs]),
                "runs": len(runs),
                "accuracy": mean(scores),
                "SD": statistics.stdev(scores) if len(scores) > 1 else None,
                "to_dense": mean([run["score"] - dense[run["seed"]] for run in runs]),
                "to_retrained": mean([a - b for a, b in pairs if b is not None]),
                "epochs": mean([run["epochs"] for run in runs]),
            }
        )
    return rows
