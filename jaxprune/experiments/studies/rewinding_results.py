"""Results of scripts/rewind.py: the table and the plot of the records in its workdir."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import checkpoints, reports, rewinding
from jaxprune.experiments import command
from jaxprune.experiments.studies import tables
from jaxprune.files import schemas

NOTE = """Accuracy: on the test images. SD: sample standard deviation over seeds. To dense: mean
difference to the dense network of the same seed. To retrained: the same to retrain_dense after as
many rounds. Compression: of the pruned leaves. Epochs: of all training that led to the network."""
_ROUND = {
    "method": schemas.text,
    "note": schemas.text,
    **dict.fromkeys(("number", "steps", "total_steps"), schemas.whole()),
    **dict.fromkeys(("density", "score"), schemas.finite),
}
METHOD = schemas.record(
    {
        "seed": schemas.whole(),
        "epoch": schemas.whole(low=1),
        "device": schemas.text,
        "rounds": schemas.each(schemas.record(_ROUND, more=True)),
    },
    more=True,
)
LOSSLESS = "largest compression without loss against dense"


def write_results(workdir: Path, methods: Iterable[str]) -> list[dict[str, Any]]:
    """Writes results.jsonl, .md and .png of all finished seeds and methods.

    Args:
        workdir: has a folder `seed-N` with a file `METHOD.json` for each.
        methods: in the order of the table.

    Returns:
        A row for each method and round, dense first; empty if nothing is finished.
    """
    found = [path for name in methods for path in sorted(workdir.glob(f"seed-*/{name}.json"))]
    records = {path: checkpoints.read_json(path) for path in found}
    for path, record in records.items():
        METHOD(record, str(path))
    stale = [path for path, record in records.items() if is_stale(path, record)]
    records = [record for path, record in records.items() if path not in stale]
    if not records:
        return []
    # The dense network is in the record of each method, and counts once.
    rounds = {
        (record["seed"], one["method"], one["number"]): (
            {"seed": record["seed"], "epochs": one["total_steps"] / record["epoch"]} | one
        )
        for record in records
        for one in record["rounds"]
    }
    rows = aggregate([*rounds.values()])
    reports.plot_retraining(rows, workdir / "results.png")
    facts = tables.facts(command.commands_in(workdir / "config.json"), records)
    notes = [
        f"seed {r['seed']}: {one['note']}" for r in records for one in r["rounds"] if one["note"]
    ]
    facts += dict.fromkeys(notes)
    facts += [f"left out, from another dense network: {p.relative_to(workdir)}" for p in stale]
    facts.append(f"checkpoints on disk: {checkpoint_bytes(workdir):,} bytes")
    table = [shown(row) for row in rows]
    parts = (
        reports.markdown_table(table, list(table[0])),
        NOTE,
        reports.markdown_table(lossless(rows), ["method", LOSSLESS]),
    )
    tables.write(workdir, rounds.values(), parts, facts)
    return rows


def is_stale(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a method started from a different dense network from the one that is there now."""
    dense = rewinding.read_round(path.parent / "dense" / "round.json")
    return dense is not None and dense.score != record["rounds"][0]["score"]


def aggregate(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each method and round, dense first."""
    scores = {(one["seed"], one["method"], one["number"]): one["score"] for one in rounds}

    def against(one: Mapping[str, Any], method: str, number: int) -> float | None:
        reference = scores.get((one["seed"], method, number))
        return None if reference is None else one["score"] - reference

    rows = tables.aggregate(
        rounds,
        ["method", "number"],
        {
            "density": lambda one: one["density"],
            "accuracy": lambda one: one["score"],
            "to_dense": lambda one: against(one, "dense", 0),
            "to_retrained": lambda one: against(one, "retrain_dense", one["number"]),
            "epochs": lambda one: one["epochs"],
        },
    )
    return [row | {"method": name_of(row), "SD": row["accuracy SD"]} for row in rows]


def name_of(row: Mapping[str, Any]) -> str:
    """Returns the method of a row; plots and tables call the dense network `none`."""
    return "none" if row["method"] == "dense" else row["method"]


def shown(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns a row as text, under the headings of the table."""
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
    """Finds for each method the smallest network that is as accurate as the dense one."""
    found = {row["method"]: 1.0 for row in rows if row["method"] not in ("none", "retrain_dense")}
    for row in rows:
        if row["method"] in found and row["to_dense"] >= 0:
            found[row["method"]] = max(found[row["method"]], 1 / row["density"])
    return [{"method": method, LOSSLESS: f"{most:.2f}"} for method, most in found.items()]


def checkpoint_bytes(workdir: Path) -> int:
    """Returns the bytes of all checkpoints: early and last steps, and each method's last round."""
    return sum(p.stat().st_size for p in workdir.glob("**/checkpoints/**/*") if p.is_file())
