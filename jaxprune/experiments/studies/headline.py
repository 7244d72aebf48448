"""Channels removed while a network trains, against every control on the same device and data.

    python scripts/study.py headline fashion_resnet20 --time 0.32 --workdir runs/headline \\
        --levers "--small-images 0.5 --small-until 0.5 --parts 4" -- --steps 3000 --sparsity 0.5

With `--time`, every arm but `dense` gets that share of the dense network's training time and as
many steps as fit into it: a short run of each arm, started first, says what its steps cost. Without
it, all arms take the same number of steps.

Options after `--` go to every run, `--levers` to a second set of runs of the main arms, `--rates`
to single arms. Runs share no compiled programs: each pays for all that it compiles. To resume after
a stop, run the same command again; numbers of steps that were chosen are kept. The workdir gets a
folder for each run, with its story as report.html, and results.jsonl, .md, .png and curves.png.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxprune import checkpoints, logs
from jaxprune.experiments import command
from jaxprune.experiments.config import Config
from jaxprune.experiments.studies import jobs, ray_jobs
from jaxprune.experiments.studies import pace as paces
from jaxprune.experiments.studies.headline_arms import Arm, Summaries, arms
from jaxprune.experiments.studies.headline_results import (
    NEEDS,
    folder_of,
    summaries,
    write_results,
)

TRAIN = [sys.executable, "-m", "jaxprune.experiments.train"]
OWN = {"method", "granularity", "compact", "seed", "workdir", "overwrite"}
OWN |= {"grow-from", "grow-at", "teacher"}
CLOCKS = {"cpu": "cpu_seconds", "wall": "seconds", "macs": "macs"}


def main(args: Sequence[str]) -> None:
    """Runs the command line of `study.py headline`."""
    options = parse(list(args))
    with command.plain_errors():
        if options.report_only:
            command.check_results(write_results(options.workdir), options.workdir)
        else:
            settings = {"config": options.config, "options": options.training}
            settings |= {"levers": options.levers, "rates": options.rates}
            settings |= {"time": options.time, "clock": options.clock}
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
    add("--time", type=float, metavar="SHARE", help="of the dense training, for all other arms")
    add("--clock", choices=CLOCKS, default="cpu", help="of --time: the process, the wall, or "
        "multiply-accumulates, which no machine changes; default: cpu")  # fmt: skip
    add("--probe-steps", type=int, default=200, help="of the runs that measure steps; default: 200")
    add("--rates", nargs="+", default=[], metavar="ARM=RATE", help="learning rates of single arms")
    add("--workdir", type=Path, default=Path("runs/headline"), help="default: runs/headline")
    add("--jobs", type=int, default=1, help="runs at once, each on its share of the cores")
    ray_jobs.add_options(parser)
    add("--report-only", action="store_true", help="train nothing, rewrite the results")
    options = command.parse(parser, args)
    options.levers = shlex.split(options.levers)
    command.refuse(parser, OWN, options.training)
    command.refuse(parser, OWN | {"widths"}, options.levers)  # all arms prune the same network
    if not (options.config or options.report_only):
        parser.error("CONFIG is missing")
    if options.jobs < 1 or min(options.seeds) < 0 or options.probe_steps < 20:
        parser.error("--jobs must be at least 1, --seeds at least 0, --probe-steps at least 20")
    options.steps = None
    if options.time is not None:
        if not 0 < options.time <= 1:
            parser.error(f"--time must lie in (0, 1]; got {options.time}")
        options.steps = _value_of("--steps", options.training)
        if options.steps is None and not options.report_only:
            parser.error("--time needs the steps of the dense network: add --steps after --")
    known = arms(levers=bool(options.levers), timed=options.time is not None)
    chosen = options.arms or list(known)
    rates = dict(rate.partition("=")[::2] for rate in options.rates)
    if unknown := [name for name in [*chosen, *rates] if name not in known]:
        parser.error(f"no arm is named {', '.join(unknown)}; there are: {', '.join(known)}")
    options.rates = rates
    needed = {need for name in chosen for need in known[name].needs} | set(chosen)
    options.chosen = {name: arm for name, arm in known.items() if name in needed}
    options.run = ray_jobs.chosen(parser, options)
    return options


def _value_of(option: str, words: Sequence[str]) -> int | None:
    """Returns the whole number that an option of train.py has, or None."""
    found = [words[i + 1] for i, word in enumerate(words[:-1]) if word == option]
    found += [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    return int(found[-1]) if found and found[-1].isdigit() else None


def study(options: argparse.Namespace) -> None:
    """Trains what is not finished, in the order of needs; exits with 1 if something failed."""
    workdir, failed = options.workdir, {}
    total = len(options.chosen) * len(options.seeds) + len(probes_of(options))

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
    commands: dict[str, list[str]] = {}
    chosen_steps, finished = steps_by_arm(options), 0
    unknown = {name for name in probes_of(options) if not _is_finished(options.workdir / name)}
    for seed in options.seeds:
        done = summaries(options.workdir, seed)
        check_arms(options, seed, done)
        finished += len(done.keys() & options.chosen.keys())
        for name, arm in options.chosen.items():
            if name in done or not done.keys() >= set(arm.needs):
                continue
            is_first = seed == options.seeds[0]
            if is_first and probe_of(name) in unknown and name not in chosen_steps:
                commands[probe_of(name)] = probe_words(options, name, arm, done)
            words = words_of(options, name, arm, done)
            if options.time is not None and name != "dense":
                if name not in chosen_steps:
                    continue
                words += ["--steps", str(chosen_steps[name])]
            folder = folder_of(name, seed)
            words += ["--seed", str(seed), "--workdir", str(options.workdir / folder)]
            commands[folder] = words
    probes = [folder for folder in probes_of(options) if _is_finished(options.workdir / folder)]
    # Short runs come first, all at the same time of the day.
    order = sorted(commands, key=lambda folder: not folder.startswith("probe-"))
    return {folder: commands[folder] for folder in order}, finished + len(probes)


def words_of(options: argparse.Namespace, name: str, arm: Arm, done: Summaries) -> list[str]:
    """Returns the command of an arm, without its seed and its folder."""
    words = [*TRAIN, options.config, *options.training]
    words += options.levers if arm.levers else []
    words += arm.options(done)
    return words + (["--learning-rate", options.rates[name]] if name in options.rates else [])


def probe_of(arm: str) -> str:
    """Returns the name of the folder of the short run that measures the steps of an arm."""
    arm = arm.removesuffix(", same time")  # its steps are those of the same arm in full length
    return f"probe-{folder_of(arm, 0).removesuffix('-seed0')}"


def probes_of(options: argparse.Namespace) -> set[str]:
    """Returns the folders of all short runs."""
    return set() if options.time is None else {probe_of(name) for name in options.chosen}


def _is_finished(folder: Path) -> bool:
    """Tells whether a folder holds a run that has ended."""
    return (folder / "summary.json").exists()


def probe_words(options: argparse.Namespace, name: str, arm: Arm, done: Summaries) -> list[str]:
    """Returns the command of a short run of an arm."""
    steps = str(options.probe_steps)
    words = [*words_of(options, name, arm, done), "--steps", steps, "--warmup-steps", "10"]
    words += ["--log-every", "5", "--eval-every", steps, "--save-every", steps, "--seed", "0"]
    return [*words, "--workdir", str(options.workdir / probe_of(name))]


def steps_by_arm(options: argparse.Namespace) -> dict[str, int]:
    """Returns how many steps each arm takes; what was chosen once is read from steps.json."""
    if options.time is None:
        return {}
    path = options.workdir / "steps.json"
    chosen: dict[str, int] = checkpoints.read_json(path) or {}
    known = len(chosen)
    dense = measured_pace(options, "dense")
    if dense is not None:
        pace, config = dense
        chosen.setdefault("dense", options.steps)
        budget = options.time * paces.cost(pace, config, options.steps)
        for name in options.chosen:
            own = measured_pace(options, name) if name not in chosen else None
            if own is not None:
                chosen[name] = paces.steps_within(*own, budget)
    if len(chosen) > known:
        checkpoints.write_json(path, chosen)
        print("steps: " + ", ".join(f"{name} {steps:,}" for name, steps in chosen.items()))
    return chosen


def measured_pace(options: argparse.Namespace, name: str) -> tuple[paces.Pace, Config] | None:
    """Returns what the steps of an arm cost, and its options; None before its short run."""
    folder = options.workdir / probe_of(name)
    saved = command.read_config(folder)
    if saved is None or command.read_summary(folder, NEEDS) is None:
        return None
    config = paces.config_of(saved)
    records = logs.read_records(folder / "metrics.jsonl")
    return paces.measure(config, records, CLOCKS[options.clock]), config


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
