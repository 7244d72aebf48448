"""The results of `study.py headline`: what finished runs have measured, as tables and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import logs, reports
from jaxprune.experiments import command
from jaxprune.experiments.studies import pace, tables
from jaxprune.experiments.studies.headline_arms import clock_of, known_arms

# What is claimed, and what comes next: relative to the dense network.
GOALS = {"nonzeros": 0.28, "accuracy": 0.992, "seconds": 0.32, "bytes": 0.35}
NEXT_GOALS = {"nonzeros": 0.2, "accuracy": 1.0, "seconds": 0.25, "bytes": 0.25}
CLOSE = 0.992  # of the dense network's accuracy


def folder_of(arm: str, seed: int) -> str:
    """Returns the name of the folder of a run."""
    return f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def summaries(workdir: Path, seed: int) -> dict[str, Any]:
    """Returns arm -> summary of its finished run, with its seconds before the first step."""
    found, problems = {}, []
    for name in known_arms():
        folder = workdir / folder_of(name, seed)
        summary = command.read_summary(folder, NEEDS)
        if summary is not None:
            records = logs.read_records(folder / "metrics.jsonl")
            if (lost := summary.get("records", 0) - len(records)) > 0:
                problems.append(f"{folder}: {lost} records")
                continue
            own = summary.get("unseen_accuracy", summary["test_accuracy"])
            found[name] = summary | {"startup": startup(records, clock_of(summary)), "final": own}
    if problems:
        text = "\n  ".join(problems)
        raise ValueError(
            "metrics.jsonl of finished runs has lost lines, so their times are not known; delete "
            f"these folders, and the same command trains them again:\n  {text}"
        )
    return found


def startup(records: Sequence[Mapping[str, Any]], clock: str) -> float:
    """Returns the seconds before the first step, from the first two records of training."""
    first, second = [record for record in records if "train_loss" in record][:2]
    each = (second[clock] - first[clock]) / (second["step"] - first["step"])
    return first[clock] - each * first["step"]


NOTE = f"""Accuracy: on the test images, also where held-out training images are evaluated on while
networks train; those are the accuracies of the curves and of `held out`. ±: sample standard
deviation over seeds. Relative figures are relative to `dense` of the same seed. Seconds: of
training, with all compilation and every switch, without evaluations and checkpoints. CPU time: the
same of the process alone; on CPU the plots, the goals and the runs "time of ..." use it. Training
MACs: of the forward passes of all steps, which no machine changes. MACs: of one image. Non-zero:
parameters that are left, where masks do not remove them. Step bytes: the most that XLA plans for
any training step of a run, without the data set. Process bytes: the most that the process held,
with Python, the data set and the compiler. Files are relative to the dense parameters in float32:
masks as bits and zlib, with the values as they are, as bfloat16, and as int8. Close: seconds until
the test accuracy first reached {CLOSE} of that of `dense` at its end."""


def write_results(workdir: Path) -> list[dict[str, Any]]:
    """Writes results.jsonl, .md and .png of all finished runs; returns the rows of the table."""
    runs = finished_runs(workdir)
    if not runs:
        return []
    rows, clock = aggregate(runs), clock_of(runs[0])
    timed = [row | {"seconds": row[clock], "seconds SD": row[f"{clock} SD"]} for row in rows]
    reports.plot_tradeoffs(timed, workdir / "results.png")
    if curves := curves_of(runs, clock):
        label = "CPU time" if clock == "cpu_seconds" else "Time"
        # What networks reach is told by their last points; most of the first ones are far below.
        lowest = min(points[-1]["accuracy"] for points in curves.values()) - 0.08
        cost = f"{label}, relative to dense"
        reports.plot_fronts(curves, workdir / "curves.png", cost=cost, lowest=lowest)
    known = known_arms()
    facts = [f"{row['arm']}: {known[row['arm']].about}" for row in rows]
    facts += tables.facts(command.commands_in(workdir / "study.json"), runs)
    table, files = [shown(row) for row in rows], [files_of(row) for row in rows]
    parts = [reports.markdown_table(table, list(table[0]))]
    for own in (GOALS, NEXT_GOALS):
        reached = [goals(row, own) for row in timed]
        parts.append(reports.markdown_table(reached, ["arm", *own, "all"]))
    parts += [reports.markdown_table(files, list(files[0])), NOTE]
    kept = [{name: run[name] for name in run if name != "curve"} for run in runs]
    tables.write(workdir, kept, parts, facts)
    return rows


def finished_runs(workdir: Path) -> list[dict[str, Any]]:
    """Returns a record of each run that has a finished dense run of its seed, arm by arm."""
    order = list(known_arms())
    paths = workdir.glob("*-seed*/config.json")
    runs = []
    for seed in sorted({int(path.parent.name.rpartition("seed")[2]) for path in paths}):
        done = summaries(workdir, seed)
        dense = done.get("dense")
        if dense is None:
            continue
        work = pace.work(logs.read_records(workdir / folder_of("dense", seed) / "metrics.jsonl"))
        for name, summary in done.items():
            records = logs.read_records(workdir / folder_of(name, seed) / "metrics.jsonl")
            run = {"arm": name, "seed": seed} | measured(summary, dense, records)
            own = pace.work(records)
            run["work"] = own / work if own and work else None
            runs.append(run | {"curve": curve(records, dense)})
    return sorted(runs, key=lambda run: (order.index(run["arm"]), run["seed"]))


# Name of a figure in the results -> its name in summary.json.
FIGURES = {
    "accuracy": "final",
    "parameters": "parameters",
    "nonzeros": "nonzeros",
    "macs": "macs",
    "seconds": "seconds",
    "cpu_seconds": "cpu_seconds",
    "bytes": "step_peak_bytes",
    "process_bytes": "process_peak_bytes",
}
NEEDS = (
    *(name for name in FIGURES.values() if name != "final"), "test_accuracy", "device", "versions",
    "steps", "switches", "widths", "file_bytes", "dense_bytes",
)  # fmt: skip
FILES = ("exact", "bfloat16", "int8")


def measured(
    summary: Mapping[str, Any], dense: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the figures by which a run is compared, also relative to the dense run."""
    limit = CLOSE * dense["test_accuracy"]
    close = [r["seconds"] for r in records if r.get("test_accuracy", 0.0) >= limit]
    sizes = summary["file_bytes"]
    files = {
        name: None if sizes[name] is None else sizes[name] / dense["dense_bytes"] for name in FILES
    }
    return (
        {name: summary[key] for name, key in FIGURES.items()}
        | {"close": close[0] if close else None, "files": files}
        | {"held": summary["test_accuracy"] if "unseen_accuracy" in summary else None}
        | {"relative": {name: summary[key] / dense[key] for name, key in FIGURES.items()}}
        | {name: summary[name] for name in ("device", "versions", "steps", "switches")}
    )


def curve(
    records: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]
) -> list[tuple[int, float, float]]:
    """Returns step, time relative to the whole dense run, and accuracy, of all evaluations."""
    clock = clock_of(dense)
    return [
        (record["step"], record[clock] / dense[clock], record["test_accuracy"])
        for record in records
        if "test_accuracy" in record and clock in record
    ]


def curves_of(runs: Sequence[Mapping[str, Any]], clock: str) -> dict[str, list[dict[str, Any]]]:
    """Returns arm -> points of accuracy by time, means over the seeds that have reached a step."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        curves = [run["curve"] for run in runs if run["arm"] == arm]
        points = [
            {"step": step, "cost": cost, "accuracy": accuracy}
            for own in curves
            for step, cost, accuracy in own
        ]
        columns: dict[str, tables.Column] = {
            "cost": lambda point: point["cost"],
            "accuracy": lambda point: point["accuracy"],
        }
        rows = tables.aggregate(points, ["step"], columns)
        rows = [row | {"SD": row["accuracy SD"]} for row in rows if row["runs"] == len(curves)]
        if rows:
            found[arm] = rows
    return found


def aggregate(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each arm; `NAME` is relative to the dense run, `NAME itself` is not."""
    columns: dict[str, tables.Column] = {
        "close": lambda run: run["close"],
        "held": lambda run: run["held"],
        "work": lambda run: run["work"],
        "steps": lambda run: run["steps"],
    }
    for name in FIGURES:
        columns[name] = lambda run, name=name: run["relative"][name]
        columns[f"{name} itself"] = lambda run, name=name: run[name]
    for name in FILES:
        columns[f"file {name}"] = lambda run, name=name: run["files"][name]
    rows = tables.aggregate(runs, ["arm"], columns)
    close = [run["arm"] for run in runs if run["close"] is not None]
    return [row | {"close runs": close.count(row["arm"])} for row in rows]


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row as text, under the headings of the table."""

    def spread(key: str, form: str) -> str:
        deviation = row[f"{key} SD"]
        return f"{row[key]:{form}}" + ("" if deviation is None else f" ± {deviation:{form}}")

    close = None if row["close"] is None else f"{row['close']:.0f} ({row['close runs']})"
    return {
        "arm": row["arm"],
        "runs": row["runs"],
        "steps": f"{row['steps']:,.0f}",
        "accuracy": spread("accuracy itself", ".2%"),
        "relative": spread("accuracy", ".2%"),
        "held out": None if row["held"] is None else spread("held", ".2%"),
        "parameters": f"{row['parameters']:.3f}",
        "non-zero": f"{row['nonzeros']:.3f}",
        "MACs": f"{row['macs']:.3f}",
        "seconds": f"{row['seconds itself']:.0f}",
        "relative time": spread("seconds", ".3f"),
        "CPU time": spread("cpu_seconds", ".3f"),
        "training MACs": None if row["work"] is None else f"{row['work']:.3f}",
        "step bytes": f"{row['bytes']:.3f}",
        "process bytes": f"{row['process_bytes']:.3f}",
        "close (runs)": close,
    }


def files_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns what the saved network of an arm takes on disk."""
    shares = {name: row[f"file {name}"] for name in FILES}
    sizes = {f"file, {name}": "-" if x is None else f"{x:.3f}" for name, x in shares.items()}
    return {"arm": row["arm"], "non-zero": f"{row['nonzeros']:.3f}"} | sizes


def goals(row: Mapping[str, Any], wanted: Mapping[str, float]) -> dict[str, str]:
    """Says whether a row reaches each goal, with its figure beside the goal."""
    reached = {
        name: row[name] >= goal if name == "accuracy" else row[name] <= goal
        for name, goal in wanted.items()
    }
    marks = {
        name: f"{'yes' if met else 'no'}: {row[name]:.3f} of {wanted[name]:g}"
        for name, met in reached.items()
    }
    return {"arm": row["arm"]} | marks | {"all": "yes" if all(reached.values()) else "no"}
