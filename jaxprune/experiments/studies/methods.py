"""Compares pruning methods: each method x sparsity x seed is a run of scripts/train.py.

    python scripts/study.py digits_resnet8 --methods agip random --sparsities 0.72 0.95 \\
        --seeds 0 1 2 --workdir runs/study --jobs 2 -- --steps 600 --batch-size 64

Three studies differ: `study.py headline` compares networks that shrink while they train with
controls, `study.py text` decoders of text at equal time, `study.py phone` sparse MobileNets with
narrow ones (`--help` says more).

Options after `--` go to every run. Each seed begins with its dense run, so that a part of a study
is already a comparison. To resume after a stop or a failure, run the same command again: it skips
finished runs, and may name more seeds, sparsities and methods. The workdir gets a folder for each
run (log.txt is what it printed) and results.jsonl, .md and .png, which always cover all of them.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from jaxprune import checkpoints, reports
from jaxprune.experiments import command
from jaxprune.experiments.config import Method
from jaxprune.experiments.studies import headline, jobs, phone, ray_jobs, tables, text
from jaxprune.files import schemas

TRAIN = [sys.executable, "-m", "jaxprune.experiments.train"]
METHODS = [name for name in get_args(Method) if name != "none"]
# What may differ between runs of a study. The last three change no number.
FREE = {"method", "sparsity", "seed", "workdir", "overwrite", "data_dir", "source_dir"}
OWN = {"method", "sparsity", "seed", "workdir", "overwrite"}
CONFIG = schemas.record(
    {
        "method": schemas.one_of(*get_args(Method)),
        "sparsity": schemas.finite,
        "seed": schemas.whole(),
        "workdir": schemas.text,
    },
    more=True,
)
NEEDS = ("test_accuracy", "sparsity", "sparse_bytes", "dense_bytes", "device")
NOTE = """Accuracy: on the test images. SD: sample standard deviation over seeds, in the same unit.
Relative: to the dense run (method none) of the same seed. Bytes: of a file with the parameters."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line, or that of `study.py headline`, `text` or `phone`."""
    args = sys.argv[1:] if args is None else list(args)
    others = {"headline": headline.main, "text": text.main, "phone": phone.main}
    if args and args[0] in others:
        others[args[0]](args[1:])
        return
    options = parse(args)
    with command.plain_errors():
        if options.report_only:
            command.check_results(write_results(options.workdir), options.workdir)
        else:
            command.record_command(
                options.workdir / "study.json",
                {"config": options.config, "options": options.training},
                ["python", "scripts/study.py", *args],
                # If nothing was trained, the options may have been mistyped.
                binding=bool(read_configs(options.workdir)),
            )
            study(options)


def parse(args: list[str]) -> argparse.Namespace:
    """Parses the command line; `training` holds the options after `--`."""
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
    options = command.parse(parser, args)
    if not (options.config or options.report_only):
        parser.error("CONFIG is missing")
    command.refuse(parser, OWN, options.training)
    too_low = options.jobs < 1 or min(options.seeds) < 0
    if too_low or not all(0 <= sparsity < 1 for sparsity in options.sparsities):
        parser.error("--jobs must be at least 1, --seeds at least 0, --sparsities in [0, 1)")
    options.run = ray_jobs.chosen(parser, options)
    return options


def study(options: argparse.Namespace) -> None:
    """Trains what is not finished; exits with status 1 if something failed."""
    workdir, runs = options.workdir, plan(options)
    check_runs(workdir, runs)
    waiting = {k: v for k, v in runs.items() if not (workdir / k / "summary.json").exists()}
    done = len(runs) - len(waiting)
    print(f"{done} of {len(runs)} runs are finished already", flush=True)

    def finished(name: str) -> str | None:
        summary = write_results(workdir).get(name)
        return None if summary is None else f"test accuracy {summary['test_accuracy']:.2%}"

    failed = jobs.follow(
        {name: command_line(options, name, own) for name, own in waiting.items()},
        workdir,
        options.jobs,
        done=done,
        total=len(runs),
        finished=finished,
        engine=options.run,
    )
    print(f"results: {workdir / 'results.md'}" if write_results(workdir) else "no run is finished")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; the same command tries them again")


def check_runs(workdir: Path, runs: Mapping[str, Sequence[str]]) -> None:
    """Raises if a folder holds a different run from the one that its name says."""
    problems = []
    for name, words in runs.items():
        saved = command.read_config(workdir / name) or {}
        for option, wanted in zip(words[::2], words[1::2], strict=True) if saved else ():
            had = saved.get(option.removeprefix("--"))
            if (str(had) if isinstance(had, str | int) else f"{had}") != wanted:
                problems.append(f"{workdir / name}: {option} {had}")
    if problems:
        text = "\n  ".join(problems)
        raise ValueError(
            "folders hold different runs from those that their names say; move them away, and the "
            f"same command trains these runs:\n  {text}"
        )


def plan(options: argparse.Namespace) -> dict[str, list[str]]:
    """Returns folder -> options of each run, in the order in which they run."""
    runs = {}
    for seed in map(str, options.seeds):
        runs[f"none-seed{seed}"] = ["--method", "none", "--seed", seed]
        for part, method in ((f"{s}", m) for s in options.sparsities for m in options.methods):
            arguments = ["--method", method, "--sparsity", part, "--seed", seed]
            runs[f"{method}-{part}-seed{seed}"] = arguments
    return runs


def command_line(options: argparse.Namespace, name: str, own: list[str]) -> list[str]:
    """Returns the command of a run."""
    folder = str(options.workdir / name)
    return [*TRAIN, options.config, "--workdir", folder, *own, *options.training]


def read_configs(workdir: Path) -> dict[str, dict[str, Any]]:
    """Reads folder -> configuration of all runs; raises if their training options differ."""
    folders = [path.parent for path in workdir.glob("*/config.json")]
    configs = {folder.name: command.read_config(folder) or {} for folder in folders}
    for name, config in configs.items():
        CONFIG(config, str(workdir / name / "config.json"))
    for name, config in configs.items():
        first = next(iter(configs))
        fixed = {key: config.get(key) for key in {**config, **configs[first]} if key not in FREE}
        checkpoints.check_config(configs[first], fixed, f"{workdir} ({first} there, {name} now)")
    return dict(sorted(configs.items()))


def write_results(workdir: Path) -> dict[str, dict[str, Any]]:
    """Writes the results of all finished runs; returns folder -> record."""
    records = {}
    for name, config in read_configs(workdir).items():
        summary = command.read_summary(workdir / name, NEEDS)
        if summary and Path(config["workdir"]).name == name:  # a copy of a run does not count
            target = 0.0 if config["method"] == "none" else config["sparsity"]
            run = {"method": config["method"], "target_sparsity": target, "seed": config["seed"]}
            records[name] = run | summary
    if records:
        rows = aggregate([*records.values()])
        reports.plot_accuracy(rows, workdir / "results.png")
        table = [shown(row) for row in rows]
        facts = tables.facts(command.commands_in(workdir / "study.json"), records.values())
        parts = reports.markdown_table(table, list(table[0])), NOTE
        tables.write(workdir, records.values(), parts, facts)
    return records


def aggregate(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each method and sparsity, dense first."""
    dense = {run["seed"]: run["test_accuracy"] for run in records if run["method"] == "none"}
    rows = tables.aggregate(
        records,
        ["method", "target_sparsity"],
        {
            "accuracy": lambda run: run["test_accuracy"],
            "relative": lambda run: tables.ratio(run["test_accuracy"], dense.get(run["seed"])),
            "measured sparsity": lambda run: run["sparsity"],
            "sparse bytes": lambda run: run["sparse_bytes"],
            "dense bytes": lambda run: run["dense_bytes"],
        },
    )
    order = ["none", *METHODS]
    rows.sort(key=lambda row: (order.index(row["method"]), row["target_sparsity"]))
    return [row | {"sparsity": row["target_sparsity"], "SD": row["accuracy SD"]} for row in rows]


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row as text, under the headings of the table."""
    share = ("sparsity", "accuracy", "SD", "relative", "relative SD", "measured sparsity")
    text = {key: None if row[key] is None else f"{row[key]:.2%}" for key in share}
    counts = {key: round(row[key]) for key in ("sparse bytes", "dense bytes")}
    return {"method": row["method"], "sparsity": text["sparsity"], "runs": row["runs"]} | (
        text | counts
    )


if __name__ == "__main__":
    main()
