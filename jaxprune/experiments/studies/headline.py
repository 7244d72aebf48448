"""Channels that go while a network trains, against every control on the same device and data.

    python scripts/study.py headline fashion_resnet20 --seeds 0 1 --workdir runs/headline \\
        --levers "--small-images 0.5 --small-until 0.25 --parts 4" -- --steps 900 --sparsity 0.47

What follows `--` goes to every run, `--levers` to a second set of runs of the main arms, `--rates`
to single arms. Runs share no compiled programs: each pays for all that it compiles. After a stop
the same command goes on. The workdir gets a folder for each run, with its story as report.html, and
results.jsonl, .md and .png.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune import checkpoints, logs, reports
from jaxprune.experiments.studies import jobs, ray_jobs

TRAIN = [sys.executable, "-m", "jaxprune.experiments.train"]
GOALS = {"parameters": 0.28, "accuracy": 0.992, "seconds": 0.32, "bytes": 0.35}
CLOSE = 0.992  # of the dense network's accuracy
SHRINKS = ["--granularity", "channels", "--compact"]
OWN = {"--method", "--granularity", "--compact", "--widths", "--seed", "--workdir", "--overwrite"}

Summaries = Mapping[str, Mapping[str, Any]]  # name of an arm -> summary.json of its run


class Arm(NamedTuple):
    """One way to train."""

    about: str
    needs: tuple[str, ...]  # arms that must be finished before
    options: Callable[[Summaries], list[str]]
    levers: bool = False


def arms(*, levers: bool) -> dict[str, Arm]:
    """All of them, in the order of the table; names with a + are those with levers."""
    found: dict[str, Arm] = {}
    for plus in ["", "+"] if levers else [""]:
        found |= {
            f"dense{plus}": Arm("the dense network", (), lambda _: method("none"), bool(plus)),
            f"agip{plus}": Arm(
                "channels go while it trains", (), lambda _: [*method("agip"), *SHRINKS], bool(plus)
            ),
            f"narrow{plus}": Arm(
                "the widths that agip ends with, from scratch",
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
                    "as agip, by length", (), lambda _: [*method("magnitude"), *SHRINKS]
                ),
                "random": Arm("as agip, by chance", (), lambda _: [*method("random"), *SHRINKS]),
                "agip, masks only": Arm(
                    "as agip, and nothing is removed", (), lambda _: [*method("agip"), *SHRINKS[:2]]
                ),
            }
    return found


def method(name: str) -> list[str]:
    """Options of train.py."""
    return ["--method", name]


def widths(summary: Mapping[str, Any]) -> list[str]:
    """Options of a network as wide as another one."""
    return ["--widths", json.dumps(summary["widths"])]


def steps_in_time(done: Summaries, plus: str) -> list[str]:
    """Options of a dense run that takes as long as agip did, compilation included."""
    dense, agip = done[f"dense{plus}"], done[f"agip{plus}"]
    clock = clock_of(dense)
    each = (dense[clock] - dense["startup"]) / dense["steps"]
    return ["--steps", str(max(1, round((agip[clock] - dense["startup"]) / each)))]


def clock_of(summary: Mapping[str, Any]) -> str:
    """By what runs take equally long: on CPU by their own time, whatever else the machine does."""
    return "cpu_seconds" if summary["device"].endswith("cpu") else "seconds"


def startup(records: Sequence[Mapping[str, Any]], clock: str) -> float:
    """Seconds before the first step, from the first two lines of metrics of training."""
    first, second = [record for record in records if "train_loss" in record][:2]
    each = (second[clock] - first[clock]) / (second["step"] - first["step"])
    return first[clock] - each * first["step"]


def main(args: Sequence[str]) -> None:
    """Runs what `study.py headline` is told to."""
    options = parse(list(args))
    try:
        if not options.report_only:
            record_command(options, shlex.join(["python", "scripts/study.py", "headline", *args]))
            study(options)
        elif not write_results(options.workdir):
            raise ValueError(f"`workdir` {options.workdir} holds no finished run of a study")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def parse(args: list[str]) -> argparse.Namespace:
    """The command line; `training` is what follows the `--`."""
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
    end = args.index("--") if "--" in args else len(args)
    options = parser.parse_args(args[:end])
    options.training = args[end + 1 :]
    options.levers = shlex.split(options.levers)
    given = {word.partition("=")[0] for word in [*options.training, *options.levers]}
    if own := sorted(OWN & given):
        parser.error(f"{', '.join(own)} may not be given to runs: the study sets it")
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


def record_command(options: argparse.Namespace, command: str) -> None:
    """Adds the command to study.json; an error if runs there had other options."""
    checkpoints.check_writable(options.workdir)
    path = options.workdir / "study.json"
    now = {"config": options.config, "options": options.training}
    now |= {"levers": options.levers, "rates": options.rates}
    saved = checkpoints.read_json(path) or now
    checkpoints.check_config(saved, now, str(options.workdir))
    commands = [*dict.fromkeys([*saved.get("commands", []), command])]
    checkpoints.write_json(path, now | {"commands": commands})


def study(options: argparse.Namespace) -> None:
    """Trains what is not finished, first what others need; exits with 1 if something failed."""
    workdir, failed = options.workdir, {}
    total = len(options.chosen) * len(options.seeds)

    def finished(name: str) -> str | None:
        write_results(workdir)
        summary = checkpoints.read_json(workdir / name / "summary.json")
        return summary and f"{summary['test_accuracy']:.2%} in {summary['seconds']:.0f} s"

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
    """Folder -> command of each run that can begin, and how many are finished."""
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
    """Refuses finished runs whose options no longer follow from the runs that they build on."""
    problems = []
    for name, arm in options.chosen.items():
        if name not in done or not done.keys() >= set(arm.needs):
            continue
        folder = options.workdir / folder_of(name, seed)
        saved, words = checkpoints.read_json(folder / "config.json") or {}, arm.options(done)
        for option, value in zip(words, words[1:], strict=False):
            had = saved.get(option.removeprefix("--"))
            if option in ("--widths", "--steps") and str(had) != value:
                problems.append(f"{folder}: {option} {had} there, {value} now")
    if problems:
        text = "\n  ".join(problems)
        raise ValueError(
            "runs were made for other runs than those that are there now; delete their folders, "
            f"and the same command trains them again:\n  {text}"
        )


def folder_of(arm: str, seed: int) -> str:
    """Of a run."""
    return f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def summaries(workdir: Path, seed: int) -> dict[str, Any]:
    """Arm -> summary of its run, if finished, with its seconds before the first step."""
    found, problems = {}, []
    for name in arms(levers=True):
        folder = workdir / folder_of(name, seed)
        summary = checkpoints.read_json(folder / "summary.json")
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

NOTE = f"""Accuracy: on the test images; SD: sample standard deviation over seeds. All that is
relative is to `dense` of the same seed. Seconds: of training with everything that is compiled and
every switch, without evaluations and checkpoints; CPU time: the same of the process, whatever else
the machine does, and on CPU what the plot, the goals and runs in the time of others go by. MACs:
of one image. Step bytes: the most that XLA
plans for a training step, without the data set, of all steps of a run. Process bytes: the most that
the process held, with Python, the data set and the compiler. Close: seconds until the test accuracy
first reached {CLOSE} of that of `dense` at its end."""


def write_results(workdir: Path) -> list[dict[str, Any]]:
    """Writes results.jsonl, .md and .png of all finished runs; returns the rows of the table."""
    known, seeds = (
        arms(levers=True),
        sorted(
            {
                int(path.parent.name.rpartition("seed")[2])
                for path in workdir.glob("*-seed*/config.json")
            }
        ),
    )
    runs = []
    for seed in seeds:
        done = summaries(workdir, seed)
        dense = done.get("dense")
        for name in known.keys() & done.keys() if dense else ():
            records = logs.read_records(workdir / folder_of(name, seed) / "metrics.jsonl")
            runs.append({"arm": name, "seed": seed} | measured(done[name], dense, records))
    if not runs:
        return []
    runs.sort(key=lambda run: (list(known).index(run["arm"]), run["seed"]))
    checkpoints.write_text(
        workdir / "results.jsonl", "".join(json.dumps(run) + "\n" for run in runs)
    )
    rows = aggregate(runs)
    clock = clock_of(runs[0])
    timed = [row | {"seconds": row[clock], "seconds SD": row[f"{clock} SD"]} for row in rows]
    reports.plot_tradeoffs(timed, workdir / "results.png")
    saved = checkpoints.read_json(workdir / "study.json") or {}
    facts = [f"- {name}: {known[name].about}" for name in known if name in {r["arm"] for r in rows}]
    facts += [f"- command: `{command}`" for command in saved.get("commands", [])]
    for run in runs:
        versions = ", ".join(" ".join(package) for package in run["versions"].items())
        facts += [f"- device: {run['device']}", f"- versions: {versions}"]
    table = [shown(row) for row in rows]
    parts = (
        reports.markdown_table(table, list(table[0])),
        reports.markdown_table([goals(row) for row in timed], ["arm", *map(str, GOALS), "all"]),
        NOTE,
        "\n".join(dict.fromkeys(facts)),
    )
    checkpoints.write_text(workdir / "results.md", "\n\n".join(parts) + "\n")
    return rows


def measured(
    summary: Mapping[str, Any], dense: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a run is compared by."""
    limit = CLOSE * dense["test_accuracy"]
    close = [r["seconds"] for r in records if r.get("test_accuracy", 0.0) >= limit]
    kept = "device", "versions", "steps", "switches"
    return {
        "accuracy": summary["test_accuracy"],
        "parameters": summary["parameters"],
        "macs": summary["macs"],
        "seconds": summary["seconds"],
        "cpu_seconds": summary["cpu_seconds"],
        "bytes": summary["step_peak_bytes"],
        "process_bytes": summary["process_peak_bytes"],
        "close": close[0] if close else None,
        "relative": {
            "accuracy": summary["test_accuracy"] / dense["test_accuracy"],
            "parameters": summary["parameters"] / dense["parameters"],
            "macs": summary["macs"] / dense["macs"],
            "seconds": summary["seconds"] / dense["seconds"],
            "cpu_seconds": summary["cpu_seconds"] / dense["cpu_seconds"],
            "bytes": summary["step_peak_bytes"] / dense["step_peak_bytes"],
            "process_bytes": summary["process_peak_bytes"] / dense["process_peak_bytes"],
        },
    } | {name: summary[name] for name in kept}


def aggregate(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm: means over seeds, and standard deviations under names with `SD`."""
    rows = []
    for name in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == name]
        row: dict[str, Any] = {"arm": name, "runs": len(own)}
        for key in own[0]["relative"]:
            values = [run["relative"][key] for run in own]
            row[key] = statistics.mean(values)
            row[f"{key} SD"] = statistics.stdev(values) if len(values) > 1 else None
        for key in ("accuracy", "parameters", "seconds", "bytes"):
            row[f"{key} itself"] = statistics.mean(run[key] for run in own)
        accuracies = [run["accuracy"] for run in own]
        row["accuracy itself SD"] = statistics.stdev(accuracies) if len(own) > 1 else None
        close = [run["close"] for run in own if run["close"] is not None]
        row |= {"close": statistics.mean(close) if close else None, "close runs": len(close)}
        rows.append(row)
    return rows


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row under the headings of the table."""

    def spread(key: str, form: str) -> str:
        deviation = row[f"{key} SD"]
        return f"{row[key]:{form}}" + ("" if deviation is None else f" ± {deviation:{form}}")

    close = row["close"] is not None and f"{row['close']:.0f} ({row['close runs']})"
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
        "close (runs)": close or None,
    }


def goals(row: Mapping[str, Any]) -> dict[str, str]:
    """Whether a row reaches each goal, and by how much it does or does not."""
    reached = {
        name: row[name] >= goal if name == "accuracy" else row[name] <= goal
        for name, goal in GOALS.items()
    }
    marks = {
        name: f"{'yes' if met else 'no'}: {row[name]:.3f} of {GOALS[name]:g}"
        for name, met in reached.items()
    }
    return {"arm": row["arm"]} | marks | {"all": "yes" if all(reached.values()) else "no"}
