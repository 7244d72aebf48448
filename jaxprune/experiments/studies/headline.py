"""Channels removed while a network trains, against every control on the same device and data.

    python scripts/study.py headline fashion_resnet20 --seeds 0 1 --workdir runs/headline \\
        --levers "--small-images 0.5 --small-until 0.25 --parts 4" -- --steps 900 --sparsity 0.47

Options after `--` go to every run, `--levers` to a second set of runs of the main arms, `--rates`
to single arms. Runs share no compiled programs: each pays for all that it compiles. To resume after
a stop, run the same command again. The workdir gets a folder for each run, with its story as
report.html, and results.jsonl, .md and .png.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune import logs, reports
from jaxprune.experiments import command
from jaxprune.experiments.studies import jobs, ray_jobs, tables

TRAIN = [sys.executable, "-m", "jaxprune.experiments.train"]
GOALS = {"parameters": 0.28, "accuracy": 0.992, "seconds": 0.32, "bytes": 0.35}
CLOSE = 0.992  # of the dense network's accuracy
SHRINKS = ["--granularity", "channels", "--compact"]
OWN = {"method", "granularity", "compact", "widths", "seed", "workdir", "overwrite"}

Summaries = Mapping[str, Mapping[str, Any]]  # name of an arm -> summary.json of its run


class Arm(NamedTuple):
    """One way to train."""

    about: str
    needs: tuple[str, ...]  # arms that must be finished before
    options: Callable[[Summaries], list[str]]
    levers: bool = False


def arms(*, levers: bool) -> dict[str, Arm]:
    """Returns all arms in the order of the table; names with a + are those with levers."""
    found: dict[str, Arm] = {}
    for plus in ["", "+"] if levers else [""]:
        found |= {
            f"dense{plus}": Arm("the dense network", (), lambda _: method("none"), bool(plus)),
            f"agip{plus}": Arm(
                "channels are removed while it trains",
                (),
                lambda _: [*method("agip"), *SHRINKS],
                bool(plus),
            ),
            f"narrow{plus}": Arm(
                "a network with the final widths of agip, from scratch",
                (f"agip{plus}",),
                lambda done, plus=plus: [*method("none"), *widths(done[f"agip{plus}"])],
                bool(plus),
            ),
            f"dense{plus}, time of agip{plus}": Arm(
                "the dense network, stopped when agip is done",
                (f"dense{plus}", f"agip{plus}"),
                lambda done, plus=plus: [*method("none"), *steps_in_time(done, plus)],
                bool(plus),
            ),
        }
        if not plus:
            found |= {
                "magnitude": Arm(
                    "as agip, by magnitude", (), lambda _: [*method("magnitude"), *SHRINKS]
                ),
                "random": Arm("as agip, at random", (), lambda _: [*method("random"), *SHRINKS]),
                "agip, masks only": Arm(
                    "as agip, and nothing is removed", (), lambda _: [*method("agip"), *SHRINKS[:2]]
                ),
            }
    return found


def method(name: str) -> list[str]:
    """Returns the options of a method."""
    return ["--method", name]


def widths(summary: Mapping[str, Any]) -> list[str]:
    """Returns the options of a network as wide as that of a finished run."""
    return ["--widths", json.dumps(summary["widths"])]


def steps_in_time(done: Summaries, plus: str) -> list[str]:
    """Returns the options of a dense run that takes as long as agip did, with compilation."""
    dense, agip = done[f"dense{plus}"], done[f"agip{plus}"]
    clock = clock_of(dense)
    each = (dense[clock] - dense["startup"]) / dense["steps"]
    return ["--steps", str(max(1, round((agip[clock] - dense["startup"]) / each)))]


def clock_of(summary: Mapping[str, Any]) -> str:
    """Returns what time is measured by: on CPU that of the process, whatever else is running."""
    return "cpu_seconds" if summary["device"].endswith("cpu") else "seconds"


def startup(records: Sequence[Mapping[str, Any]], clock: str) -> float:
    """Returns the seconds before the first step, from the first two records of training."""
    first, second = [record for record in records if "train_loss" in record][:2]
    each = (second[clock] - first[clock]) / (second["step"] - first["step"])
    return first[clock] - each * first["step"]


def main(args: Sequence[str]) -> None:
    """Runs the command line of `study.py headline`."""
    options = parse(list(args))
    with command.plain_errors():
        if options.report_only:
            command.check_results(write_results(options.workdir), options.workdir)
        else:
            settings = {"config": options.config, "options": options.training}
            settings |= {"levers": options.levers, "rates": options.rates}
            words = ["python", "scripts/study.py", "headline", *args]
            command.record_command(options.workdir / "study.json", settings, words)
            study(options)


def parse(args: list[str]) -> argparse.Namespace:
    """Parses the command line; `training` holds the options after `--`."""
    form = argparse.RawDescriptionHelpFormatter
    usage = "study.py headline CONFIG [options] [-- options of train.py]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("config", nargs="?", help="named configuration of train.py, such as fashion_resnet20")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    add("--arms", nargs="+", metavar="ARM", help="only these, and what they need")
    add("--levers", default="", metavar="OPTIONS", help="options of train.py for the second set")
    add("--rates", nargs="+", default=[], metavar="ARM=RATE", help="learning rates of single arms")
    add("--workdir", type=Path, default=Path("runs/headline"), help="default: runs/headline")
    add("--jobs", type=int, default=1, help="runs at once, each on its share of the cores")
    ray_jobs.add_options(parser)
    add("--report-only", action="store_true", help="train nothing, rewrite the results")
    options = command.parse(parser, args)
    options.levers = shlex.split(options.levers)
    command.refuse(parser, OWN, [*options.training, *options.levers])
    if not (options.config or options.report_only):
        parser.error("CONFIG is missing")
    if options.jobs < 1 or min(options.seeds) < 0:
        parser.error("--jobs must be at least 1, --seeds at least 0")
    known = arms(levers=bool(options.levers))
    chosen = options.arms or list(known)
    rates = dict(rate.partition("=")[::2] for rate in options.rates)
    if unknown := [name for name in [*chosen, *rates] if name not in known]:
        parser.error(f"no arm is named {', '.join(unknown)}; there are: {', '.join(known)}")
    options.rates = rates
    needed = {need for name in chosen for need in known[name].needs} | set(chosen)
    options.chosen = {name: arm for name, arm in known.items() if name in needed}
    options.run = ray_jobs.chosen(parser, options)
    return options


def study(options: argparse.Namespace) -> None:
    """Trains what is not finished, in the order of needs; exits with 1 if something failed."""
    workdir, failed = options.workdir, {}
    total = len(options.chosen) * len(options.seeds)

    def finished(name: str) -> str | None:
        write_results(workdir)
        summary = command.read_summary(workdir / name, NEEDS)
        if summary is None:
            return None
        return f"{summary['test_accuracy']:.2%} in {summary['seconds']:.0f} s"

    while not failed:
        commands, done = ready(options)
        print(f"{done} of {total} runs are finished", flush=True)
        if not commands:
            break
        failed = jobs.follow(
            commands,
            workdir,
            options.jobs,
            done=done,
            total=total,
            finished=finished,
            engine=options.run,
            cached=False,
        )
    if write_results(workdir):
        print(f"results: {workdir / 'results.md'}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; the same command tries them again")


def ready(options: argparse.Namespace) -> tuple[dict[str, list[str]], int]:
    """Returns folder -> command of each run that can begin, and how many are finished."""
    commands, finished = {}, 0
    for seed in options.seeds:
        done = summaries(options.workdir, seed)
        check_arms(options, seed, done)
        finished += len(done.keys() & options.chosen.keys())
        for name, arm in options.chosen.items():
            if name in done or not done.keys() >= set(arm.needs):
                continue
            folder = folder_of(name, seed)
            words = [*TRAIN, options.config, *options.training]
            words += options.levers if arm.levers else []
            words += arm.options(done)
            words += ["--learning-rate", options.rates[name]] if name in options.rates else []
            words += ["--seed", str(seed), "--workdir", str(options.workdir / folder)]
            commands[folder] = words
    return commands, finished


def check_arms(options: argparse.Namespace, seed: int, done: Summaries) -> None:
    """Raises if options of a finished run no longer follow from the runs that it depends on."""
    problems = []
    for name, arm in options.chosen.items():
        if name not in done or not done.keys() >= set(arm.needs):
            continue
        folder = options.workdir / folder_of(name, seed)
        saved, words = command.read_config(folder) or {}, arm.options(done)
        for option, value in zip(words, words[1:], strict=False):
            had = saved.get(option.removeprefix("--"))
            if option in ("--widths", "--steps") and str(had) != value:
                problems.append(f"{folder}: {option} {had} there, {value} now")
    if problems:
        text = "\n  ".join(problems)
        raise ValueError(
            "runs depend on earlier versions of runs that are there now; delete their folders, and "
            f"the same command trains them again:\n  {text}"
        )


def folder_of(arm: str, seed: int) -> str:
    """Returns the name of the folder of a run."""
    return f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def summaries(workdir: Path, seed: int) -> dict[str, Any]:
    """Returns arm -> summary of its finished run, with its seconds before the first step."""
    found, problems = {}, []
    for name in arms(levers=True):
        folder = workdir / folder_of(name, seed)
        summary = command.read_summary(folder, NEEDS)
        if summary is not None:
            records = logs.read_records(folder / "metrics.jsonl")
            if (lost := summary.get("records", 0) - len(records)) > 0:
                problems.append(f"{folder}: {lost} records")
                continue
            found[name] = summary | {"startup": startup(records, clock_of(summary))}
    if problems:
        text = "\n  ".join(problems)
        raise ValueError(
            "metrics.jsonl of finished runs has lost lines, so their times are not known; delete "
            f"these folders, and the same command trains them again:\n  {text}"
        )
    return found


# ---- results

NOTE = f"""Accuracy: on the test images; ±: sample standard deviation over seeds. Relative figures
are relative to `dense` of the same seed. Seconds: of training, with all compilation and every
switch, without evaluations and checkpoints. CPU time: the same of the process alone; on CPU the
plot, the goals and the runs "time of ..." use it. MACs: of one image. Step bytes: the most that XLA
plans for any training step of a run, without the data set. Process bytes: the most that the process
held, with Python, the data set and the compiler. Close: seconds until the test accuracy first
reached {CLOSE} of that of `dense` at its end."""


def write_results(workdir: Path) -> list[dict[str, Any]]:
    """Writes results.jsonl, .md and .png of all finished runs; returns the rows of the table."""
    runs = finished_runs(workdir)
    if not runs:
        return []
    rows, clock = aggregate(runs), clock_of(runs[0])
    timed = [row | {"seconds": row[clock], "seconds SD": row[f"{clock} SD"]} for row in rows]
    reports.plot_tradeoffs(timed, workdir / "results.png")
    known = arms(levers=True)
    facts = [f"{row['arm']}: {known[row['arm']].about}" for row in rows]
    facts += tables.facts(command.commands_in(workdir / "study.json"), runs)
    table = [shown(row) for row in rows]
    parts = (
        reports.markdown_table(table, list(table[0])),
        reports.markdown_table([goals(row) for row in timed], ["arm", *map(str, GOALS), "all"]),
        NOTE,
    )
    tables.write(workdir, runs, parts, facts)
    return rows


def finished_runs(workdir: Path) -> list[dict[str, Any]]:
    """Returns a record of each run that has a finished dense run of its seed, arm by arm."""
    order = list(arms(levers=True))
    paths = workdir.glob("*-seed*/config.json")
    runs = []
    for seed in sorted({int(path.parent.name.rpartition("seed")[2]) for path in paths}):
        done = summaries(workdir, seed)
        dense = done.get("dense")
        if dense is None:
            continue
        for name, summary in done.items():
            records = logs.read_records(workdir / folder_of(name, seed) / "metrics.jsonl")
            runs.append({"arm": name, "seed": seed} | measured(summary, dense, records))
    return sorted(runs, key=lambda run: (order.index(run["arm"]), run["seed"]))


# Name of a figure in the results -> its name in summary.json.
FIGURES = {
    "accuracy": "test_accuracy",
    "parameters": "parameters",
    "macs": "macs",
    "seconds": "seconds",
    "cpu_seconds": "cpu_seconds",
    "bytes": "step_peak_bytes",
    "process_bytes": "process_peak_bytes",
}
NEEDS = (*FIGURES.values(), "device", "versions", "steps", "switches", "widths")


def measured(
    summary: Mapping[str, Any], dense: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the figures by which a run is compared, also relative to the dense run."""
    limit = CLOSE * dense["test_accuracy"]
    close = [r["seconds"] for r in records if r.get("test_accuracy", 0.0) >= limit]
    return (
        {name: summary[key] for name, key in FIGURES.items()}
        | {"close": close[0] if close else None}
        | {"relative": {name: summary[key] / dense[key] for name, key in FIGURES.items()}}
        | {name: summary[name] for name in ("device", "versions", "steps", "switches")}
    )


def aggregate(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each arm; `NAME` is relative to the dense run, `NAME itself` is not."""
    columns: dict[str, tables.Column] = {"close": lambda run: run["close"]}
    for name in FIGURES:
        columns[name] = lambda run, name=name: run["relative"][name]
        columns[f"{name} itself"] = lambda run, name=name: run[name]
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
        "accuracy": spread("accuracy itself", ".2%"),
        "relative": spread("accuracy", ".2%"),
        "parameters": f"{row['parameters']:.3f}",
        "MACs": f"{row['macs']:.3f}",
        "seconds": f"{row['seconds itself']:.0f}",
        "relative time": spread("seconds", ".3f"),
        "CPU time": spread("cpu_seconds", ".3f"),
        "step bytes": f"{row['bytes']:.3f}",
        "process bytes": f"{row['process_bytes']:.3f}",
        "close (runs)": close,
    }


def goals(row: Mapping[str, Any]) -> dict[str, str]:
    """Says whether a row reaches each goal, with its figure beside the goal."""
    reached = {
        name: row[name] >= goal if name == "accuracy" else row[name] <= goal
        for name, goal in GOALS.items()
    }
    marks = {
        name: f"{'yes' if met else 'no'}: {row[name]:.3f} of {GOALS[name]:g}"
        for name, met in reached.items()
    }
    return {"arm": row["arm"]} | marks | {"all": "yes" if all(reached.values()) else "no"}
