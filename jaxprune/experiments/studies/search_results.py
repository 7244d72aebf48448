"""Results of scripts/search.py: the table and the plot of the records in its workdir."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import checkpoints, reports
from jaxprune.experiments import command
from jaxprune.experiments.studies import tables
from jaxprune.files import schemas

NOTE = """Score: accuracy on the images of the search. Before: accuracy on the test images of the
compacted network, not yet trained on; then after each way of training it. SD: sample standard
deviation over runs and seeds of the search. Relative: to the dense network of the same run. Own:
the search's own seconds, as a share of those of its evaluations."""

_FIGURES = (
    "score", "dense_accuracy", "budget", "share", "macs", "parameters", "evaluate_seconds",
    "search_seconds", "run", "seed", "evaluations",
)  # fmt: skip
_NETWORK = schemas.record(
    {
        "name": schemas.text,
        "search": schemas.text,
        "cost": schemas.text,
        "device": schemas.text,
        "accuracy_before": schemas.maybe(schemas.finite),
        "accuracies": schemas.table(schemas.finite),
        "best": schemas.each(schemas.number),
        "latency_errors": schemas.each(schemas.finite),
        **dict.fromkeys(_FIGURES, schemas.finite),
    },
    more=True,
)


def write_results(workdir: Path, searches: Sequence[str]) -> list[dict[str, Any]]:
    """Writes results.jsonl, .md and .png of all finished networks.

    Args:
        workdir: has a folder with summary.json for each.
        searches: in the order of the table.

    Returns:
        A row for each search and budget; empty if nothing is finished.
    """
    found = {path.parent.name: path for path in sorted(workdir.glob("*/summary.json"))}
    records = {name: checkpoints.read_json(path) for name, path in found.items()}
    for name, record in records.items():
        _NETWORK(record, str(found[name]))
    runs = [record for name, record in records.items() if record["name"] == name]
    if not runs:
        return []
    rows = aggregate(runs, searches)
    for budget in dict.fromkeys(run["budget"] for run in runs):
        histories: dict[str, list[Any]] = {}
        for name in searches:
            own = [r["best"] for r in runs if (r["search"], r["budget"]) == (name, budget)]
            if own and name != "scratch":
                histories[name] = own
        if histories:
            reports.plot_searches(histories, workdir / f"searches-{budget:g}.png")
    facts = tables.facts(command.commands_in(workdir / "config.json"), runs)
    dense = sorted({(run["run"], run["dense_accuracy"]) for run in runs})
    facts += [f"dense network of run {run}: accuracy {value:.2%}" for run, value in dense]
    facts += _of_latencies(runs)
    shown_rows = [shown(row) for row in rows]
    columns = list(dict.fromkeys(key for row in shown_rows for key in row))
    tables.write(workdir, runs, (reports.markdown_table(shown_rows, columns), NOTE), facts)
    return rows


def aggregate(runs: Sequence[Mapping[str, Any]], searches: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each search and budget, large budgets first."""
    ways = list(dict.fromkeys(way for run in runs for way in run["accuracies"]))
    columns: dict[str, tables.Column] = {
        "score": lambda run: run["score"],
        "before": lambda run: run["accuracy_before"],
    }
    for way in ways:
        columns[way] = lambda run, way=way: run["accuracies"].get(way)
        columns[f"{way} relative"] = lambda run, way=way: (
            tables.ratio(run["accuracies"][way], run["dense_accuracy"])
            if way in run["accuracies"]
            else None
        )
    columns |= {
        "evaluations": lambda run: run["evaluations"],
        "share": lambda run: run["share"],
        "macs": lambda run: run["macs"],
        "parameters": lambda run: run["parameters"],
        "minutes": lambda run: run["evaluate_seconds"] / 60,
        "own": lambda run: tables.ratio(run["search_seconds"], run["evaluate_seconds"]),
    }
    rows = tables.aggregate(runs, ["search", "budget"], columns)
    rows.sort(key=lambda row: (-row["budget"], searches.index(row["search"])))
    return [row | {"ways": ways} for row in rows]


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row as text, under the headings of the table."""

    def share(key: str) -> str | None:
        return None if row[key] is None else f"{row[key]:.2%}"

    cells = {
        "search": row["search"],
        "budget": f"{row['budget']:g}",
        "runs": row["runs"],
        "evaluations": round(row["evaluations"]),
    }
    for key in ("score", "before", *row["ways"]):
        cells |= {key: share(key), f"{key} SD": share(f"{key} SD")}
    cells |= {f"{way} relative": share(f"{way} relative") for way in row["ways"]}
    return cells | {
        "cost": f"{row['share']:.1%}",
        "MACs": f"{row['macs']:.1%}",
        "parameters": round(row["parameters"]),
        "minutes": None if row["minutes"] is None else f"{row['minutes']:.1f}",
        "own": share("own"),
    }


def _of_latencies(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says how far sums of measured layers are from whole networks."""
    found = [run["latency_errors"] for run in runs if run["latency_errors"]]
    if not found:
        return []
    errors = ", ".join(f"{error:+.1%}" for error in found[0])
    return [f"sum of the table of latencies against whole networks, dense to narrow: {errors}"]
