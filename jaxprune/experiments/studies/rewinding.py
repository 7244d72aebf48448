"""Prunes a ResNet in rounds, trains it again in several ways, and compares these ways.

    python scripts/rewind.py digits_resnet8
    python scripts/rewind.py fashion_resnet20 --rounds 8 --seeds 0 1 2 --jobs 3 -- --epochs 20

A round prunes the smallest weights of the network that the previous round has trained, and trains
it again. Options after `--` change the configuration, as in train.py; the learning rate falls in
steps unless you give `--schedule cosine`. With --help after your options you see what they cost.

The command can be stopped at any time: run it again to resume; it ends with the same numbers. It
may name more methods, rounds and seeds. The workdir gets results.jsonl, .md and .png of all that is
finished, and a folder for each seed: the dense training, a folder for each method, and in networks/
each trained network as a sparse file (jaxprune.storage.load reads it).
"""

import argparse
import dataclasses
import functools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import jaxprune
from jaxprune import (
    budgets,
    checkpoints,
    patterns,
    processes,
    rewinding,
    scores,
    sharding,
    storage,
    training,
)
from jaxprune.experiments import command, results
from jaxprune.experiments.command import plain_errors
from jaxprune.experiments.config import CONFIGS, Config
from jaxprune.experiments.experiment import Experiment
from jaxprune.experiments.pruning import prunable_of
from jaxprune.experiments.studies import jobs
from jaxprune.experiments.studies.rewinding_results import write_results
from jaxprune.logs import show_progress

# Name of the driver -> what it does; the last three are controls.
METHODS = {
    "fine_tune": "train on at the last learning rate",
    "rewind_weights": "put weights and learning rate back to an early step",
    "rewind_learning_rate": "keep the weights, put the learning rate back",
    "lottery_ticket": "put the weights back to their initial values",
    "reinitialize": "give the kept weights new initial values (control)",
    "random_masks": "prune at random, put the learning rate back (control)",
    "retrain_dense": "prune nothing, put the learning rate back (control)",
}
RATE_REWOUND = ("rewind_learning_rate", "random_masks", "retrain_dense")
# Options of train.py that this command sets, or that have no effect here.
OWN = {
    "seed", "workdir", "overwrite", "method", "sparsity", "prune-start", "prune-stop",
    "prune-every", "budget", "decay", "regrow", "rate", "drop", "phase", "init-images",
    "save-every", "eval-every", "grow-from", "grow-at",
}  # fmt: skip
HOSTS = {"coordinator", "processes", "process", "host_timeout"}
# What may change when a comparison is resumed.
FREE = {"seed", "workdir", "data_dir", "source_dir", "workers", "threads", "mesh"} | HOSTS


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    args = sys.argv[1:] if args is None else list(args)
    with plain_errors():
        options = parse(args)
        if options.report_only:
            command.check_results(write_results(options.workdir, METHODS), options.workdir)
            return
        config = read_config(options)
        if options.jobs == 1:
            processes.start(
                config.coordinator, config.processes, config.process, timeout=config.host_timeout
            )
        elif config.coordinator or processes.is_cluster(os.environ):
            raise ValueError("`--jobs` must be 1 where several processes share each training")
    with processes.lost_is_an_error(), plain_errors():
        if options.jobs == 1:
            compare(options, config, args)
        else:  # without JAX: the devices are for the children
            begin(options, config, args)
            run_seeds(options, args)
            end(options)


def compare(options: argparse.Namespace, config: Config, args: Sequence[str]) -> None:
    """Runs all seeds, one after the other; of several processes the first writes and prints."""
    processes.check_same(identity(options, config) | {"rewind.py options": runs_of(options)})
    processes.on_first(lambda: begin(options, config, args))
    with checkpoints.stop_signals(*processes.signals()) as stopped:
        should_stop = processes.stop_together(stopped)
        try:
            for seed in options.seeds:
                run_seed(options, dataclasses.replace(config, seed=seed), should_stop)
        except (KeyboardInterrupt, rewinding.Stopped) as reason:
            processes.say(f"\n{str(reason) or 'stopped'}; run the same command to resume")
            interrupted = isinstance(reason, KeyboardInterrupt)
            heard = signal.SIGINT if interrupted else (stopped or [signal.SIGTERM])[0]
            sys.exit(128 + heard)
    processes.on_first(lambda: end(options))


def begin(options: argparse.Namespace, config: Config, args: Sequence[str]) -> None:
    """Records the command in config.json, and says what it costs."""
    if options.child:
        return
    price = cost(options, config)
    words = ["python", "scripts/rewind.py", *without_hosts(args)]
    command.record_command(options.workdir / "config.json", identity(options, config), words)
    print(price, flush=True)


def end(options: argparse.Namespace) -> None:
    """Writes and shows the results."""
    write_results(options.workdir, METHODS)
    print(f"\n{(options.workdir / 'results.md').read_text()}\nwritten to {options.workdir}")


def parse(args: list[str]) -> argparse.Namespace:
    """Parses the command line; `training` holds the options after `--`."""
    form = argparse.RawDescriptionHelpFormatter
    usage = "rewind.py CONFIG [options] [-- options of train.py]"
    meanings = "".join(f"  {name:22} {what}\n" for name, what in METHODS.items())
    text = f"{__doc__}\nmethods:\n{meanings}"
    parser = argparse.ArgumentParser(
        usage=usage, description=text, formatter_class=form, add_help=False
    )
    add = parser.add_argument
    default = "fine_tune rewind_weights rewind_learning_rate random_masks retrain_dense".split()
    add("config", nargs="?", choices=CONFIGS, metavar="CONFIG", help=", ".join(CONFIGS))
    add("--methods", nargs="+", default=default, choices=METHODS, metavar="METHOD",
        help=f"default: {' '.join(default)}")  # fmt: skip
    add("--rounds", type=int, default=8, help="default: 8")
    add("--rate", type=float, default=0.2,
        help="fraction of the kept weights that a round prunes; default: 0.2")  # fmt: skip
    add("--one-shot", action="store_true", help="each density straight from the dense network")
    add("--rewind-to", type=float, default=0.1, metavar="PART",
        help="rewind_weights: to this fraction of the training; default: 0.1")  # fmt: skip
    add("--schedule-to", type=float, default=0.0, metavar="PART",
        help="where a rewound learning rate starts; default: 0, the beginning")  # fmt: skip
    add("--pattern", choices=["weights", "channels"], default="weights", help="what is pruned")
    add("--guard", type=float, default=0.01, metavar="MARGIN",
        help="loss at density >= 0.5 from which rewind_learning_rate warns; 0.01")  # fmt: skip
    add("--switch", action="store_true", help="then rewind the weights, to --rewind-to")
    add("--seeds", nargs="+", type=int, default=[0, 1], metavar="SEED", help="default: 0 1")
    add("--jobs", type=int, default=1, help="seeds at once, each on its share of the cores")
    add("--workdir", type=Path, help="default: runs/rewind-CONFIG")
    add("--save-every", type=int, default=500, help="steps between checkpoints; default: 500")
    add("--report-only", action="store_true", help="train nothing, rewrite the results")
    add("--child", action="store_true", help=argparse.SUPPRESS)  # of a command with --jobs
    add("-h", "--help", action="store_true", help="show this, and what the options before it cost")
    options = command.parse(parser, args)
    options.methods = [*dict.fromkeys(options.methods)]
    options.jobs = min(options.jobs, len(options.seeds))  # one seed alone gets all cores
    options.workdir = options.workdir or Path(f"runs/rewind-{options.config}")
    if options.help:
        parser.print_help()
        if options.config:
            print(f"\nthis command:\n{cost(options, read_config(options))}")
        else:
            print("\nName a CONFIG before --help to see what it costs.")
        sys.exit()
    command.refuse(parser, OWN, options.training)
    if not (options.config or options.report_only):
        parser.error("CONFIG is missing")
    parts = options.rewind_to, options.schedule_to
    if not all(0 <= part < 1 for part in parts) or min(options.jobs, options.save_every) < 1:
        parser.error("parts must lie in [0, 1), --jobs and --save-every must be at least 1")
    return options


def read_config(options: argparse.Namespace) -> Config:
    """Returns the configuration with its options."""
    stepped = {
        name: (text, dataclasses.replace(config, schedule="steps", method="none"))
        for name, (text, config) in CONFIGS.items()
    }
    return tyro.extras.overridable_config_cli(stepped, args=[options.config, *options.training])


def identity(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Returns what must not change in a workdir."""
    names = "rate one_shot rewind_to schedule_to pattern guard switch".split()
    values = {f"rewind.py --{name}": getattr(options, name) for name in names}
    return {"config": options.config} | checkpoints.fields(config, FREE) | values


def runs_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what may change there, but must agree between processes."""
    return {name: getattr(options, name) for name in ("methods", "rounds", "seeds", "save_every")}


def without_hosts(args: Sequence[str]) -> list[str]:
    """Returns the command line without the options of one process, which change between starts."""
    kept, skip = [], False
    for word in args:
        name, equals, _ = word.partition("=")
        own = name.startswith("--") and name[2:].replace("-", "_") in HOSTS
        if not (own or skip):
            kept.append(word)
        skip = own and not equals
    return kept


def trainings(options: argparse.Namespace) -> float:
    """Returns the cost of one seed, in dense trainings."""
    part = {"rewind_weights": 1 - options.rewind_to}
    part |= dict.fromkeys(RATE_REWOUND, 1 - options.schedule_to)
    return 1 + options.rounds * sum(part.get(method, 1.0) for method in options.methods)


def cost(options: argparse.Namespace, config: Config) -> str:
    """Says in words how much will be trained."""
    length, unit = (config.steps, "steps") if config.steps else (config.epochs, "epochs")
    each, seeds = trainings(options), len(options.seeds)
    last = rewinding.densities(options.rounds, options.rate)[-1]
    return (
        f"{options.rounds} rounds to density {last:.3g} by {len(options.methods)} methods and the "
        f"dense network:\n{each:.4g} trainings of {length:g} {unit} a seed, "
        f"{each * seeds * length:,.0f} {unit} for {seeds} seeds."
    )


def run_seeds(options: argparse.Namespace, args: list[str]) -> None:
    """Runs one child process for each seed."""
    words, training = command.split(args)
    program = [sys.executable, "-m", "jaxprune.experiments.studies.rewinding"]
    commands = {}
    for seed in map(str, options.seeds):
        own = ["--seeds", seed, "--child", "--workdir", str(options.workdir)]
        commands[f"seed-{seed}"] = [*program, *words, *own, "--", *training]
    failed = []
    with checkpoints.stop_signals() as stopped:
        for name, code in jobs.run(commands, options.workdir, options.jobs, stopped):
            print(f"{name}: {'done' if code == 0 else f'FAILED with code {code}'}", flush=True)
            failed += [name] if code else []
    if stopped:
        sys.exit(128 + stopped[0])
    if failed:
        logs = ", ".join(str(options.workdir / name / "log.txt") for name in failed)
        raise ValueError(f"{len(failed)} seeds failed, see {logs}; the same command tries again")


def run_seed(options: argparse.Namespace, config: Config, should_stop: Callable[[], bool]) -> None:
    """Runs all methods for one seed; skips finished rounds."""
    workdir = options.workdir / f"seed-{config.seed}"
    experiment = Experiment(config, lambda *_: jaxprune.fixed_mask_transform())
    steps = experiment.steps
    early, to = (round(part * steps) for part in (options.rewind_to, options.schedule_to))
    if max(early, to) >= steps:
        raise ValueError(f"--rewind-to or --schedule-to leaves none of the {steps} steps to train")
    processes.check_same({"the images": experiment.source.fingerprint()})
    rounds = [rewinding.read_round(path) for path in workdir.glob("**/round.json")]
    finished = [one.steps for one in rounds if one is not None]
    total = round(trainings(options) * steps)
    device = f"{results.environment()['device']}, jax {jax.__version__}"
    progress = f"seed {config.seed}", total, sum(finished)
    with show_progress(*progress, write=processes.is_first()) as show:
        task = make_task(config, experiment, show, sum(finished), should_stop)

        def on_round(result: rewinding.Round, state: training.TrainState) -> None:
            processes.say(
                f"seed {config.seed}  {result.method} {result.number}  density "
                f"{result.density:.3f}  accuracy {result.score:.2%}"
            )
            name = f"{result.method}-{result.number}.npz"
            write_network(workdir / "networks" / name, state)

        shared: Any = {"save_every": options.save_every, "on_round": on_round}
        rewinding.train_dense(task, workdir, keep=[early], **shared)
        for method in options.methods:
            call = driver(options, config, method, early, to)
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always", UserWarning)
                rounds = call(task, workdir, **shared)
            for note in dict.fromkeys(str(note.message) for note in notes):
                processes.say(f"warning: {note}")
            record: Any = {"seed": config.seed, "epoch": experiment.epoch, "device": device}
            record |= {"rounds": [each._asdict() for each in rounds]}

            def write(path: Path = workdir / f"{method}.json", record: Any = record) -> None:
                checkpoints.write_json(path, record)
                write_results(options.workdir, METHODS)

            processes.on_first(write)


def driver(
    options: argparse.Namespace, config: Config, method: str, early: int, to: int
) -> Callable[..., list[rewinding.Round]]:
    """Returns the driver of a method with all its arguments but task and workdir."""
    own: dict[str, Any] = {"iterative": not options.one_shot}
    rule: dict[str, Any] = {"budget": budgets.global_budget(0)}
    if (prunable := prunable_of(config)) is not None:
        rule["prunable"] = prunable
    if options.pattern == "channels":
        rule["pattern"] = patterns.channels(axis=-1)
    if method == "random_masks":
        rule["score"] = scores.random(config.seed)
    if method != "retrain_dense":
        own["prune"] = functools.partial(jaxprune.prune, **rule)
        own["densities"] = rewinding.densities(options.rounds, options.rate)
    else:
        own["rounds"] = options.rounds
    if method == "rewind_weights":
        own["to"] = early
    if method in RATE_REWOUND:
        own["to"] = to
    if method == "rewind_learning_rate":
        fallback = early if options.switch else None
        own["guard"] = rewinding.Guard(options.guard, weights_from=fallback)
    return functools.partial(getattr(rewinding, method), **own)


def make_task(
    config: Config,
    experiment: Experiment,
    show: Callable[..., None],
    before: int,
    should_stop: Callable[[], bool],
) -> rewinding.Task:
    """Returns the project's training loop as a task."""
    trained = [before]

    def init(number: int) -> training.TrainState:
        return experiment.create(seed_of(config, number))

    def train(state: training.TrainState, start: int, stop: int, number: int) -> Any:
        batches = experiment.source.batches(seed_of(config, number), start)
        state = state._replace(step=sharding.replicate(np.int32(start), experiment.mesh))

        def log(step: int, state: training.TrainState, values: dict[str, float]) -> None:
            show(trained[0] + step - start, values)

        state = training.fit(
            state, stop, experiment.dense.run, experiment.train_set, batches,
            jax.random.fold_in(jax.random.key(config.seed), number), experiment.mesh,
            chunk=experiment.chunk, log_every=config.log_every, on_log=log,
            should_stop=should_stop,
        )  # fmt: skip
        reached = int(state.step)
        trained[0] += reached - start
        if reached < stop:
            raise rewinding.Stopped(state, reached)
        return state

    def evaluate(state: training.TrainState) -> float:
        return experiment.dense.evaluate(state)["test_accuracy"]

    # The description includes the seed, and the images themselves, wherever they lie.
    description: dict[str, Any] = checkpoints.fields(config, FREE - {"seed"})
    description |= {"images": experiment.source.fingerprint()}
    schedule, steps = experiment.schedule, experiment.steps
    return rewinding.Task(init, train, evaluate, schedule, steps, description)


def seed_of(config: Config, number: int) -> int:
    """Returns the seed of a round's weights and data order; round 0, the dense one, has its own."""
    return config.seed + 1_000_000 * number


def write_network(path: Path, state: training.TrainState) -> None:
    """Writes parameters and statistics as a sparse file."""
    everything: Any = {"params": state.params, "model_state": state.model_state}
    masks = jax.tree.map(lambda _: True, everything)
    masks |= {"params": jaxprune.get_masks(state.opt_state)}
    everything, masks = jax.tree.map(processes.on_host, (everything, masks))

    def write() -> None:
        path.parent.mkdir(exist_ok=True)
        storage.save(path, everything, masks, overwrite=True)

    processes.on_first(write)


if __name__ == "__main__":
    main()
