"""Train a ResNet, or a language model, and prune it while it learns.

    python scripts/train.py digits_resnet8
    python scripts/train.py fashion_resnet8 --sparsity 0.9 --seed 1
    python scripts/train.py text_mini --source-dir ~/texts --method agip --sparsity 0.8
    python scripts/train.py digits_resnet8 --help      # lists every option with its value there

`python -m jaxprune.experiments.train` is the same command without a checkout. You can stop a run at
any time; the same command resumes it and ends with the same numbers. A run that is stopped ends
with status 130 (Ctrl-C) or 143 (SIGTERM). It writes into --workdir:

    config.json     the resolved configuration
    metrics.jsonl   one record a line: loss, accuracy, sparsity, speed, test accuracy
    checkpoints/    state, data position and configuration of the newest steps (Orbax)
    teacher.npz     with --teacher: the network before its first cut, which a resumed run needs
    tensorboard/    the same metrics for TensorBoard
    summary.json    accuracy, counts, bytes and times of the finished run; summary.txt is a table
    report.html     the whole run in one file: curves, switches and widths; needs no network
    training.png, densities.png
"""

import contextlib
import dataclasses
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxprune
from jaxprune import checkpoints, files, processes, training, trees
from jaxprune.experiments import command, results, teacher
from jaxprune.experiments.command import plain_errors
from jaxprune.experiments.config import CONFIGS, Config
from jaxprune.experiments.experiment import Experiment
from jaxprune.experiments.optimizer import rewarmed
from jaxprune.experiments.pruning import prunable_of, pruning_of
from jaxprune.experiments.stages import Stages, refused_updates, unranked_groups
from jaxprune.files import schemas
from jaxprune.logs import MetricsLog, show_progress

# A run ends after this number of steps at which a due mask update was refused.
MAX_REFUSED = 100
# Options that may change when a run is resumed; all others must be the same.
FREE = {"workdir", "overwrite", "data_dir", "source_dir", "workers", "threads", "mesh"}
FREE |= {"coordinator", "processes", "process", "host_timeout"}
SECONDS = "seconds", "cpu_seconds"  # of training, without evaluations and checkpoints
# What --overwrite deletes. config.json comes last, as it says that the folder holds a run.
OUTPUTS = (
    "summary.json", "summary.txt", "report.html", "training.png", "densities.png",
    "metrics.jsonl", "checkpoints", "tensorboard", teacher.NAME, "config.json",
)  # fmt: skip
# Of checkpoints. 1: before 0.1.0; names in the optimizer state and the record of a stage changed.
# 2: their records had no checksum.
FORMAT = 3
_NUMBERS = schemas.table(schemas.maybe(schemas.number))
# What this command says of a checkpoint, besides what `structure.Shrinking` checks itself.
RECORD = schemas.record(
    {
        "config": schemas.table(schemas.anything),
        "stage": schemas.anything,
        "seconds": schemas.finite,
        "cpu_seconds": schemas.finite,
    },
    optional={"peaks": _NUMBERS, "records": schemas.whole(), "sparse": schemas.anything},
    more=True,
)


def train(config: Config) -> dict[str, Any]:
    """Trains one run, from the configuration to the summary; resumes one that was stopped."""
    run = Run(config)
    with run.locked():
        summary = run.open()
        if summary is not None:
            return summary
        state = run.restore()
        with run.logging():
            state = run.loop(state)
        run.close(state)
        return results.write(run, state)


class Run:
    """One training run in its folder: what it has reached, and how it is saved.

    The methods are called in this order, inside of `locked`: `open`, `restore`, `loop` inside of
    `logging`, `close`.

    Args:
        config: the configuration.
    """

    def __init__(self, config: Config) -> None:
        """Starts the clock; touches nothing."""
        self.began = clock()
        self.config, self.workdir = config, Path(config.workdir or default_workdir(config))
        self.teacher = self.workdir / teacher.NAME  # exists after the first cut, with `--teacher`
        self.options = checkpoints.fields(config, leave_out=FREE) | {"format": FORMAT}
        self.earlier = np.zeros(2)  # seconds of training before this process
        self.aside: list[Any] = []  # seconds of evaluations and checkpoints
        self.peaks: dict[str, Any] = {}  # bytes, of this process and those before it
        self.refused = 0  # steps at which a mask update was refused, up to the last record
        self.stuck = 0  # steps in a row at which it was refused
        self.expected = 0  # records of metrics up to the step that it starts from
        self.lock: files.Lock | None = None  # of the folder, on the first process

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs away from the folder, which is made if it does not exist."""
        with contextlib.ExitStack() as stack:

            def lock() -> None:
                checkpoints.check_writable(self.workdir)
                self.lock = stack.enter_context(files.locked(self.workdir, "`workdir`"))

            with plain_errors():
                processes.on_first(lock)
            yield

    def check_folder(self) -> None:
        """Raises if the folder is not the one that was locked."""
        if self.lock is not None:
            self.lock.check()

    def open(self) -> dict[str, Any] | None:
        """Checks the folder and builds the experiment; returns the summary of a finished run."""
        config, workdir = self.config, self.workdir
        with plain_errors():
            processes.check_same(self.options | {"mesh": config.mesh})
            if config.overwrite:
                processes.on_first(lambda: delete_run(workdir))
            saved = processes.on_first(lambda: command.read_config(workdir))
            summary = processes.on_first(lambda: command.read_summary(workdir))
            if saved is not None:
                check_same_run(saved, self.options, workdir)
            if summary is not None:
                processes.say((workdir / "summary.txt").read_text())
                processes.say(f"{workdir} is finished; --overwrite trains it again.")
                return summary
            self.experiment = Experiment(config, pruning_of)
            self.images = {"the images": self.experiment.source.fingerprint()}
            processes.check_same(self.images)
        resolved = {"workdir": str(workdir), "resolved_steps": self.experiment.steps}
        self.resolved = dataclasses.asdict(config) | resolved | {"format": FORMAT}
        return None

    def restore(self) -> training.TrainState:
        """Returns the state of the newest checkpoint, or a new one, and compiles its step."""
        experiment, workdir = self.experiment, self.workdir
        with plain_errors():
            checkpoints.delete_unfinished(workdir / "checkpoints")
            self.manager = checkpoints.open_manager(workdir / "checkpoints")
            state = checkpoints.read_newest(self.manager, self.read, say=processes.say)
            if state is None:
                self.stages = Stages(experiment, teacher=self.teacher)
                state = self.stages.create()
                # Methods that are sparse from the start have masks already.
                params = jaxprune.apply_masks(state.params, self.masks(state))
                state = state._replace(params=params)
            else:
                processes.say(f"{workdir}: resumes at step {int(state.step)}")
            self.stages.begin(state)
        path = self.workdir / "config.json"
        processes.on_first(lambda: checkpoints.write_json(path, self.resolved))
        self.start, self.refused = int(state.step), refused_updates(state)
        return state

    def read(self, step: int) -> training.TrainState:
        """Reads a checkpoint: its state, and what else a run continues with."""
        where = f"checkpoint {self.workdir / 'checkpoints' / str(step)}"
        record = checkpoints.read_record(self.manager, step)
        RECORD(record, f"{where}: its record")
        saved = self.images | record["config"] | record
        check_same_run(saved, self.options | self.images, self.workdir)
        parts = record["stage"], record.get("sparse"), self.teacher
        self.stages = Stages(self.experiment, *parts)
        state, _ = checkpoints.restore(self.manager, self.stages.like(), step)
        self.earlier = np.array([record[name] for name in SECONDS])
        self.peaks, self.expected = record.get("peaks", {}), record.get("records", 0)
        return state

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Opens what a run writes while it trains, and listens to signals."""
        is_first, steps = processes.is_first(), self.experiment.steps
        with contextlib.ExitStack() as stack:
            with plain_errors():
                log = MetricsLog(self.workdir, self.start, expected=self.expected, write=is_first)
            self.metrics = stack.enter_context(log)
            show = show_progress(self.config.model, steps, self.start, write=is_first)
            self.show = stack.enter_context(show)
            # With several processes JAX handles SIGTERM, so that all of them stop.
            stop = checkpoints.stop_signals(*processes.signals())
            self.stopped = stack.enter_context(stop)
            yield

    def loop(self, state: training.TrainState) -> training.TrainState:
        """Trains to the end, or to the step at which it is stopped, and saves."""
        config, experiment, stages = self.config, self.experiment, self.stages
        steps, should_stop = experiment.steps, processes.stop_together(self.stopped)
        batches = experiment.source.batches(config.seed, int(state.step))
        hooks = [
            training.Hook(config.eval_every, self.test),
            training.Hook(config.save_every, self.save),
        ]
        while int(state.step) < steps and not should_stop():
            pause = stages.shrinking.next_step(int(state.step))
            state = training.fit(
                state, pause, stages.steps.run, experiment.train_set, batches,
                jax.random.key(config.seed), experiment.mesh,
                chunk=experiment.chunk, log_every=config.log_every, on_log=self.log, hooks=hooks,
                should_stop=should_stop, is_pause=pause < steps,
            )  # fmt: skip
            if should_stop() or int(state.step) == steps:
                continue
            switches = len(stages.shrinking.history)
            with plain_errors():
                state = stages.advance(state)
            if len(stages.shrinking.history) > switches:
                processes.say(stages.describe_last())
                self.save(int(state.step), state)
        if int(state.step) == steps and results.is_untested(self.metrics, steps):
            self.test(steps, state)
        self.save(int(state.step), state)
        self.total = self.spent()
        return state

    def close(self, state: training.TrainState) -> None:
        """Closes the checkpoints; ends the program if the run was stopped before its end."""
        self.manager.close()
        if int(state.step) < self.experiment.steps:
            processes.say(
                f"stopped and saved at step {int(state.step)}; the same command resumes from there"
            )
            # As shells report a program that a signal ends: what comes after `&&` does not run.
            sys.exit(128 + (signal.SIGINT if signal.SIGINT in self.stopped else signal.SIGTERM))
        with plain_errors():
            processes.on_first(self.check_complete)

    def check_complete(self) -> None:
        """Raises if files of the run are gone at its end."""
        self.check_folder()
        last = f"checkpoints/{self.experiment.steps}"
        names = [name for name in ("config.json", "metrics.jsonl", last)
                 if not (self.workdir / name).exists()]  # fmt: skip
        if names:
            raise ValueError(
                f"`workdir` {self.workdir} has lost {', '.join(names)} while the run was going on: "
                "something else deletes files there. Train again with `--overwrite`, or in a "
                "different folder."
            )

    # ---- while it trains

    def log(self, step: int, state: training.TrainState, values: dict[str, float]) -> None:
        """Writes the metrics of the last steps."""
        config, stage = self.config, self.stages.stage
        values |= self.spent()
        self.peaks = results.peaks(self.stages.peak_bytes, self.peaks)
        values["sparsity"] = self.sparsity(state)
        rates = rewarmed(self.experiment.schedule, stage.cut, config.rewarm_steps)
        values["learning_rate"] = float(np.asarray(rates(step - 1)))
        values |= self.stages.costs()
        if unranked := unranked_groups(state):
            values["unranked"] = unranked
            processes.say(
                f"step {step}: {unranked} groups had no statistic at the last mask update and "
                "were ranked by gradients or norms; a later --prune-start gives them more steps"
            )
        if refused := refused_updates(state):
            values["refused"] = refused
        self.show(step, values)
        if not math.isfinite(values["train_loss"]):
            sys.exit(
                f"error: the loss is {values['train_loss']} at step {step}; lower "
                f"`learning_rate` ({config.learning_rate}). Earlier checkpoints are kept."
            )
        more, self.refused = refused - self.refused, refused
        self.stuck = self.stuck + more if more >= config.log_every else 0
        if self.stuck >= MAX_REFUSED:
            sys.exit(
                f"error: a mask update was due at each of the last {self.stuck} steps up to step "
                f"{step}, but a gradient or a weight is not finite, so masks can no longer change; "
                f"lower `learning_rate` ({config.learning_rate}). Earlier checkpoints are kept."
            )
        self.metrics.write(step, values)

    def test(self, step: int, state: training.TrainState) -> None:
        """Evaluates on the test images."""
        values = self.spent()
        with timed(self.aside):
            values |= self.stages.steps.evaluate(state) | self.stages.size()
        self.show(step, values)
        self.metrics.write(step, values)

    def save(self, step: int, state: training.TrainState) -> None:
        """Writes a checkpoint with all that a resumed run needs."""
        self.peaks = results.peaks(self.stages.peak_bytes, self.peaks)
        record = {"data": {"next_index": step}, "config": self.resolved}
        record |= self.images | self.spent()
        record |= {"stage": self.stages.to_record(), "peaks": self.peaks}
        record |= {"records": self.metrics.count}
        if self.stages.sparse is not None:
            record |= {"sparse": self.stages.sparse.to_record()}
        with timed(self.aside), plain_errors():
            processes.on_first(self.check_folder)
            self.metrics.sync()  # a resumed run needs the records that this checkpoint counts
            checkpoints.save(self.manager, step, state, record)

    def spent(self) -> dict[str, float]:
        """Returns the seconds of training so far, those of earlier processes included."""
        seconds = self.earlier + clock() - self.began - sum(self.aside)
        return dict(zip(SECONDS, seconds.tolist(), strict=True))

    def masks(self, state: training.TrainState) -> Any:
        """Returns the masks; all True for a dense run."""
        if self.config.method == "none":
            return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), state.params)
        return jaxprune.get_masks(state.opt_state)

    def sparsity(self, state: training.TrainState) -> float:
        """Returns the fraction of weights, or of parameters in channels, that is pruned."""
        if self.config.granularity == "channels" and self.config.method != "none":
            return self.stages.sparsity(state)
        return sparsity_of(state.params, self.masks(state), prunable_of(self.config))


def check_same_run(saved: Mapping[str, Any], options: Mapping[str, Any], workdir: Path) -> None:
    """Raises if a folder holds a run with other options, or of a version with other names."""
    if saved.get("format", 1) != FORMAT:
        raise ValueError(
            f"`workdir` {workdir} holds a run of format {saved.get('format', 1)}, and this version "
            f"reads format {FORMAT} (what checkpoints hold has changed, see CHANGELOG.md); name "
            "another --workdir, finish the run with the version that began it, or replace it with "
            "`--overwrite`"
        )
    try:
        checkpoints.check_config(saved, options, str(workdir))
    except ValueError as error:
        raise ValueError(f"{error} `--overwrite` deletes it and trains again.") from None


def default_workdir(config: Config) -> str:
    """Names a folder in runs/ after the options that tell most runs apart."""
    kind = "-channels" if config.granularity == "channels" else ""
    method = "none" if config.method == "none" else f"{config.method}{kind}-{config.sparsity:g}"
    method = method if config.grow_from == 1 else f"grow-{config.grow_from:g}"
    return f"runs/{config.dataset}-{config.model}-{method}-seed{config.seed}"


def clock() -> np.ndarray:
    """Returns the seconds of the wall clock, and those of this process on all cores."""
    return np.array([time.perf_counter(), time.process_time()])


@contextlib.contextmanager
def timed(durations: list[Any]) -> Iterator[None]:
    """Appends the duration of the block, as `clock` counts it."""
    began = clock()
    try:
        yield
    finally:
        durations.append(clock() - began)


def is_run(workdir: Path) -> bool:
    """Tells whether a folder holds a run, or what a killed or damaged one has left."""
    saved = workdir.glob("checkpoints/*/record/metadata")
    return (workdir / "config.json").exists() or any(saved)


def delete_run(workdir: Path) -> None:
    """Deletes the outputs of an earlier run and nothing else, if there is a run."""
    for path in [workdir / name for name in OUTPUTS if is_run(workdir)]:
        is_folder = path.is_dir() and not path.is_symlink()
        shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)


def sparsity_of(params: Any, masks: Any, prunable: trees.Prunable = None) -> float:
    """Returns the fraction of the prunable weights that is masked."""
    flags = trees.prunable_flags(params, prunable)
    by_path = trees.leaf_by_path(masks)
    kernels = [by_path[path] for path, flag in zip(trees.leaf_by_path(params), flags) if flag]
    kept = sum(int(count) for count in jax.device_get(count_true(kernels)))
    return 1 - kept / sum(mask.size for mask in kernels)


@jax.jit
def count_true(masks: list[jax.Array]) -> list[jax.Array]:
    """Counts the weights that each mask keeps, in one dispatch."""
    return [mask.sum(dtype=jnp.int32) for mask in masks]


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    with plain_errors():
        config = tyro.extras.overridable_config_cli(CONFIGS, description=__doc__, args=args)
        processes.start(
            config.coordinator, config.processes, config.process, timeout=config.host_timeout
        )
    # Wherever the system refuses something, such as room on a disk, it is the user's to mend.
    with processes.lost_is_an_error(), plain_errors(OSError):
        train(config)


if __name__ == "__main__":
    main()
