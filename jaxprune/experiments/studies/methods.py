"""Compares pruning methods: each method x sparsity x seed is a run of scripts/train.py.

    python scripts/study.py digits_resnet8 --methods agip random --sparsities 0.72 0.95 \\
        --seeds 0 1 2 --workdir runs/study --jobs 2 -- --steps 600 --batch-size 64

`study.py headline` is another study: networks that shrink while they train, against their controls
(`study.py headline --help`).

What follows `--` goes to every run. Each seed begins with its dense run, so that a part of a study
is already a comparison. After a stop or a failure the same command skips what is finished and goes
on with the rest; it may name more seeds, sparsities and methods. The workdir gets a folder for each
run (log.txt is what it printed) and results.jsonl, .md and .png, which always cover all of them.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from jaxprune import checkpoints, reports
from jaxprune.experiments.config import Method
from jaxprune.experiments.studies import headline, jobs, ray_jobs

TRAIN = [sys.executable, "-m", "jaxprune.experiments.train"]
METHODS = [name for name in get_args(Method) if name != "none"]
# What may differ between runs of a study. The last three change no number.
FREE = {"method", "sparsity", "seed", "workdir", "overwrite", "data_dir", "source_dir"}
OWN = {"--method", "--sparsity", "--seed", "--workdir", "--overwrite"}
NOTE = """Accuracy: on the test images. SD: sample standard deviation over seeds, in the same unit.
Relative: to the dense run (method none) of the same seed. Bytes: of a file with the parameters."""


def main(args: Sequence[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else list(args)
    if args[:1] == ["headline"]:
        headline.main(args[1:])
        return
    options = parse(args)
    try:
        if not options.report_only:
            record_command(options, shlex.join(["python", "scripts/study.py", *args]))
            study(options)
        elif not write_results(options.workdir):
            raise ValueError(f"`workdir` {options.workdir} holds no finished run of a study")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def parse(args: list[str]) -> argparse.Namespace:
    """The command line; `training` is what follows the `--`."""
    form = argparse.RawDescriptionHelpFormatter
    usage = "study.py CONFIG [options] [-- options of train.py]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("config", nargs="?", help="named configuration of train.py, such as digits_resnet8")
    add("--methods", nargs="+", default=METHODS, choices=METHODS, help="default: all of them")
    add("--sparsities", nargs="+", type=float, default=[0.72, 0.9, 0.95], metavar="FRACTION")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    add("--workdir", type=Path, default=Path("runs/study"), help="default: runs/study")
    add("--jobs", type=int, default=1, help="runs at once, each on its share of the cores")
    ray_jobs.add_options(parser)
    add("--report-only", action="store_true", help="train nothing, rewrite the results")
    end = args.index("--") if "--" in args else len(args)
    options = parser.parse_args(args[:end])
    options.training = args[end + 1 :]
    own = sorted(OWN & {option.partition("=")[0] for option in options.training})
    if not (options.config or options.report_only):
        parser.error("CONFIG is missing")
    if own:
        parser.error(f"{', '.join(own)} may not follow `--`: the study sets it")
    too_low = options.jobs < 1 or min(options.seeds) < 0
    if too_low or not all(0 <= sparsity < 1 for sparsity in options.sparsities):
        parser.error("--jobs must be at least 1, --seeds at least 0, --sparsities in [0, 1)")
    options.run = ray_jobs.chosen(parser, options)
    return options


def record_command(options: argparse.Namespace, command: str) -> None:
    """Adds the command to study.json; an error if the runs there had other training options."""
    checkpoints.check_writable(options.workdir)
    path = options.workdir / "study.json"
    now = {"config": options.config, "options": options.training}
    saved = checkpoints.read_json(path) or now
    if read_configs(options.workdir):  # where nothing was trained, it may have been mistyped
        checkpoints.check_config(saved, now, str(options.workdir))
    commands = [*dict.fromkeys([*saved.get("commands", []), command])]
    checkpoints.write_json(path, now | {"commands": commands})


def study(options: argparse.Namespace) -> None:
    """Trains what is not finished; exits with status 1 if something failed."""
    workdir, runs = options.workdir, plan(options)
    check_runs(workdir, runs)
    waiting = {k: v for k, v in runs.items() if not (workdir / k / "summary.json").exists()}
    done = len(runs) - len(waiting)
    print(f"{done} of {len(runs)} runs are finished already", flush=True)

    def finished(name: str) -> str | None:
        summary = write_results(workdir).get(name)
        return summary and f"test accuracy {summary['test_accuracy']:.2%}"

    commands = {name: command(options, name, own) for name, own in waiting.items()}
    count = {"done": done, "total": len(runs)}
    failed = jobs.follow(
        commands, workdir, options.jobs, **count, finished=finished, engine=options.run
    )
    print(f"results: {workdir / 'results.md'}" if write_results(workdir) else "no run is finished")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; the same command tries them again")


def check_runs(workdir: Path, runs: Mapping[str, Sequence[str]]) -> None:
    """Refuses folders that hold another run than their name says."""
    problems = []
    for name, words in runs.items():
        saved = checkpoints.read_json(workdir / name / "config.json")
        for option, wanted in zip(words[::2], words[1::2], strict=True) if saved else ():
            had = saved.get(option.removeprefix("--"))
            if (str(had) if isinstance(had, str | int) else f"{had}") != wanted:
                problems.append(f"{workdir / name}: {option} {had}")
    if problems:
        text = "\n  ".join(problems)
        raise ValueError(
            "folders hold other runs than their names say; move them away, and the same command "
            f"trains these runs:\n  {text}"
        )


def plan(options: argparse.Namespace) -> dict[str, list[str]]:
    """Folder of each run -> its options, in the order in which they run."""
    runs = {}
    for seed in map(str, options.seeds):
        runs[f"none-seed{seed}"] = ["--method", "none", "--seed", seed]
        for part, method in ((f"{s}", m) for s in options.sparsities for m in options.methods):
            arguments = ["--method", method, "--sparsity", part, "--seed", seed]
            runs[f"{method}-{part}-seed{seed}"] = arguments
    return runs


def command(options: argparse.Namespace, name: str, arguments: list[str]) -> list[str]:
    """The command line of a run."""
    folder = str(options.workdir / name)
    run = [*TRAIN, options.config, "--workdir", folder, *arguments]
    return run + options.training


def read_configs(workdir: Path) -> dict[str, dict[str, Any]]:
    """Folder -> configuration of all runs; an error if their training options differ."""
    configs = {p.parent.name: checkpoints.read_json(p) for p in workdir.glob("*/config.json")}
    for name, config in configs.items():
        first = next(iter(configs))
        fixed = {key: config.get(key) for key in {**config, **configs[first]} if key not in FREE}
        checkpoints.check_config(configs[first], fixed, f"{workdir} ({first} there, {name} now)")
    return dict(sorted(configs.items()))


def write_results(workdir: Path) -> dict[str, dict[str, Any]]:
    """Writes the results of all finished runs; returns folder -> record."""
    records = {}
    for name, config in read_configs(workdir).items():
        summary = checkpoints.read_json(workdir / name / "summary.json")
        if summary and Path(config["workdir"]).name == name:  # a copy of a run is not one more
            target = 0.0 if config["method"] == "none" else config["sparsity"]
            run = {"method": config["method"], "target_sparsity": target, "seed": config["seed"]}
            records[name] = run | summary
    if records:
        lines = (json.dumps(record) + "\n" for record in records.values())
        checkpoints.write_text(workdir / "results.jsonl", "".join(lines))
        rows = aggregate([*records.values()])
        reports.plot_accuracy(rows, workdir / "results.png")
        table = [{k: f"{x:.2%}" if isinstance(x, float) else x for k, x in r.items()} for r in rows]
        commands = (checkpoints.read_json(workdir / "study.json") or {}).get("commands", [])
        facts = [f"- command: `{command}`" for command in commands]
        for run in records.values():
            versions = ", ".join(" ".join(package) for package in run["versions"].items())
            facts += [f"- device: {run['device']}", f"- versions: {versions}"]
        parts = reports.markdown_table(table, list(rows[0])), NOTE, "\n".join(dict.fromkeys(facts))
        checkpoints.write_text(workdir / "results.md", "\n\n".join(parts) + "\n")
    return records


def aggregate(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and sparsity, dense first, under the headings of the table."""
    dense = {run["seed"]: run["test_accuracy"] for run in records if run["method"] == "none"}
    groups, rows = {}, []
    for run in records:
        key = ["none", *METHODS].index(run["method"]), run["target_sparsity"]
        groups.setdefault(key, []).append(run)
    for (_, sparsity), runs in sorted(groups.items()):
        row = {"method": runs[0]["method"], "sparsity": sparsity, "runs": len(runs)}
        pairs = [(run["test_accuracy"], dense.get(run["seed"])) for run in runs]
        relative = [accuracy / reference for accuracy, reference in pairs if reference]
        accuracies = [accuracy for accuracy, _ in pairs]
        for mean, sd, x in ("accuracy", "SD", accuracies), ("relative", "relative SD", relative):
            row[mean] = statistics.mean(x) if x else None
            row[sd] = statistics.stdev(x) if len(x) > 1 else None
        row["measured sparsity"] = statistics.mean(run["sparsity"] for run in runs)
        for name in ("sparse", "dense"):
            row[f"{name} bytes"] = round(statistics.mean(run[f"{name}_bytes"] for run in runs))
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
