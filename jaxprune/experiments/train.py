"""Train a ResNet and prune it while it learns.

    python scripts/train.py digits_resnet8
    python scripts/train.py fashion_resnet8 --sparsity 0.9 --seed 1
    python scripts/train.py digits_resnet8 --help      # every option with its value there

A run can be stopped at any time; the same command goes on where it was and ends with the same
numbers. Everything that it writes is in --workdir:

    config.json     the resolved configuration
    metrics.jsonl   one record a line: loss, accuracy, sparsity, speed, test accuracy
    checkpoints/    Orbax: state, data position and configuration of the newest steps
    tensorboard/    the same metrics for TensorBoard
    summary.json    accuracy, counts, bytes and times of the finished run; summary.txt is the table
    report.html     the story of the run in one file: curves, switches, widths; opens anywhere
    training.png, densities.png
"""

import contextlib
import dataclasses
import logging
import math
import operator
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import jaxprune
from jaxprune import (
    at_init,
    budgets,
    checkpoints,
    patterns,
    processes,
    rates,
    scores,
    training,
    trees,
)
from jaxprune.experiments import results, stages
from jaxprune.experiments.command import plain_errors
from jaxprune.experiments.config import CONFIGS, Config
from jaxprune.experiments.experiment import Setting, build, rewarmed
from jaxprune.logs import MetricsLog, show_progress

AT_INIT = ("snip", "grasp", "synflow")
# What may change when a run goes on; all else must be as it was.
FREE = {"workdir", "overwrite", "data_dir", "source_dir", "workers", "threads", "mesh"}
FREE |= {"coordinator", "processes", "process", "host_timeout"}
SECONDS = "seconds", "cpu_seconds"  # of training, without evaluations and checkpoints
# What --overwrite deletes, config.json last: it is what says that the folder holds a run.
OUTPUTS = (
    "summary.json", "summary.txt", "report.html", "training.png", "densities.png",
    "metrics.jsonl", "checkpoints", "tensorboard", "config.json",
)  # fmt: skip


def train(config: Config) -> dict[str, Any]:
    """One run, from the configuration to the summary; goes on where an earlier one stopped."""
    began = clock()
    workdir = Path(config.workdir or default_workdir(config))
    options = checkpoints.fields(config, leave_out=FREE)
    with plain_errors():
        checkpoints.check_writable(workdir)
        processes.check_same(options | {"mesh": config.mesh})
        if config.overwrite:
            processes.on_first(lambda: delete_run(workdir))
        saved = processes.on_first(lambda: checkpoints.read_json(workdir / "config.json"))
        summary = processes.on_first(lambda: checkpoints.read_json(workdir / "summary.json"))
        if saved is not None:
            checkpoints.check_config(saved, options, str(workdir))
        if summary is not None:
            processes.say((workdir / "summary.txt").read_text())
            processes.say(f"{workdir} is finished; --overwrite trains it anew.")
            return summary

    def make_pruning(setting: Setting) -> optax.GradientTransformation | None:
        if config.method in AT_INIT:
            masks = processes.from_first(masks_at_init(config, setting))
            return jaxprune.fixed_mask_transform(masks)
        if config.method == "none":
            return None
        if setting.groups is not None:
            return stages.pruning(config, setting.steps, setting.groups)
        return gradual_pruning(config, setting.steps)

    experiment = build(config, make_pruning)
    steps = experiment.steps
    stage, history, coming = stages.first(experiment), (), None
    with plain_errors():
        images = {"the images": experiment.source.fingerprint()}
        processes.check_same(images)
        state = experiment.create(config.seed)
    # Methods that are sparse from the start have masks already.
    state = state._replace(params=jaxprune.apply_masks(state.params, masks_of(config, state)))

    # Restore.
    earlier = np.zeros(2)  # seconds of training before this process
    peaks: dict[str, Any] = {}  # bytes, of this process and those before it
    expected = 0  # records of metrics
    with plain_errors():
        manager = checkpoints.open_manager(workdir / "checkpoints")
        record = None
        if manager.latest_step() is not None:
            record = checkpoints.read_record(manager)
            now = options | images
            checkpoints.check_config(images | record["config"] | record, now, str(workdir))
            stage = stages.from_record(experiment, record["stage"])
            state, record = checkpoints.restore(manager, experiment.at(stage).like)
            history = tuple(record["stage"]["history"])
            earlier = np.array([record[name] for name in SECONDS])
            peaks, expected = record.get("peaks", {}), record.get("records", 0)
            processes.say(f"{workdir}: going on from step {int(state.step)}")
        present = stages.begin(config, experiment, stage, history)
        if record is not None:
            coming = stages.coming_of(config, experiment, present, state, record["stage"])
    resolved = dataclasses.asdict(config) | {"workdir": str(workdir), "resolved_steps": steps}
    processes.on_first(lambda: checkpoints.write_json(workdir / "config.json", resolved))
    batches = experiment.source.batches(config.seed, int(state.step))
    aside: list[Any] = []  # seconds of evaluations and checkpoints

    def spent() -> dict[str, float]:
        return dict(zip(SECONDS, (earlier + clock() - began - sum(aside)).tolist(), strict=True))

    def save(step: int, state: training.TrainState) -> None:
        record = {"data": {"next_index": step}, "config": resolved} | images | spent()
        record["stage"] = stages.to_record(present, coming)
        record |= {"peaks": peaks, "records": metrics.count}
        with timed(aside), plain_errors():
            metrics.sync()  # what a checkpoint goes on from is not lost
            checkpoints.save(manager, step, state, record)

    # Loop.
    with (
        MetricsLog(
            workdir, int(state.step), expected=expected, write=processes.is_first()
        ) as metrics,
        show_progress(config.model, steps, int(state.step), write=processes.is_first()) as show,
        # Of several processes JAX hears SIGTERM, so that all of them stop.
        checkpoints.stop_signals(*processes.signals()) as stopped,
    ):
        should_stop = processes.stop_together(stopped)

        def sparsity(state: training.TrainState) -> float:
            if config.granularity == "channels" and config.method != "none":
                return stages.sparsity_of(experiment, present, state)
            return sparsity_of(state.params, masks_of(config, state))

        def log(step: int, state: training.TrainState, values: dict[str, float]) -> None:
            values |= spent()
            peaks.update(results.peaks(present, peaks))
            values["sparsity"] = sparsity(state)
            rates = rewarmed(experiment.schedule, present.stage.cut, config.rewarm_steps)
            values["learning_rate"] = float(rates(step - 1))
            values |= stages.costs(config, experiment, present)
            if unranked := stages.unranked_groups(state):
                values["unranked"] = unranked
                processes.say(
                    f"step {step}: {unranked} groups had no statistic at the last mask update and "
                    "were ranked by gradients or norms; a later --prune-start has more to go by"
                )
            show(step, values)
            if not math.isfinite(values["train_loss"]):
                sys.exit(
                    f"error: the loss is {values['train_loss']} at step {step}; lower "
                    f"`learning_rate` ({config.learning_rate}). Earlier checkpoints are kept."
                )
            metrics.write(step, values)

        def test(step: int, state: training.TrainState) -> None:
            values = spent()
            with timed(aside):
                values |= present.steps.evaluate(state)
            show(step, values)
            metrics.write(step, values)

        hooks = [training.Hook(config.eval_every, test), training.Hook(config.save_every, save)]
        while int(state.step) < steps and not should_stop():
            pause = stages.next_pause(config, experiment, present, int(state.step), coming)
            state = training.fit(
                state, pause, present.steps.run, experiment.train_set, batches,
                jax.random.key(config.seed), experiment.mesh,
                chunk=experiment.chunk, log_every=config.log_every, on_log=log, hooks=hooks,
                should_stop=should_stop, is_pause=pause < steps,
            )  # fmt: skip
            if should_stop() or int(state.step) == steps:
                continue
            if coming is None:
                coming = stages.decide(config, experiment, present, state)
            elif int(state.step) == coming.step:
                with plain_errors():
                    present, state = stages.switch(config, experiment, present, coming, state)
                    # Masks may have changed while it was being prepared.
                    coming = stages.decide(config, experiment, present, state)
                processes.say(stages.describe(present))
                save(int(state.step), state)
        if int(state.step) == steps and results.is_untested(metrics, steps):
            test(steps, state)
        save(int(state.step), state)
        total = spent()
    manager.close()
    if int(state.step) < steps:
        processes.say(
            f"stopped and saved at step {int(state.step)}; the same command goes on from there"
        )
        sys.exit(130 if signal.SIGINT in stopped else 0)

    measured = {"sparsity": sparsity(state)} | total | results.peaks(present, peaks)
    return results.write_results(
        config, experiment, present, state, masks_of(config, state), metrics, measured, workdir
    )


def default_workdir(config: Config) -> str:
    """runs/ and what tells most runs apart."""
    kind = "-channels" if config.granularity == "channels" else ""
    method = "none" if config.method == "none" else f"{config.method}{kind}-{config.sparsity:g}"
    return f"runs/{config.dataset}-{config.model}-{method}-seed{config.seed}"


def clock() -> np.ndarray:
    """Seconds of the wall clock and of this process on all cores."""
    return np.array([time.perf_counter(), time.process_time()])


@contextlib.contextmanager
def timed(durations: list[Any]) -> Iterator[None]:
    """Appends how long the block took, as `clock` counts."""
    began = clock()
    try:
        yield
    finally:
        durations.append(clock() - began)


def delete_run(workdir: Path) -> None:
    """Removes what an earlier run wrote and nothing else; nothing at all where there was no run."""
    for path in (workdir / name for name in OUTPUTS if (workdir / "config.json").exists()):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def gradual_pruning(config: Config, steps: int) -> optax.GradientTransformation:
    """The transformation of a method that prunes while training."""
    start, stop = stages.prune_window(config, steps)
    options: dict[str, Any] = {"every": config.prune_every, "start": start, "stop": stop}
    options |= {"budget": budget_of(config)}
    method = config.method
    if config.pattern != "weights":
        options |= {"pattern": pattern_of(config)}
    if method in ("agip", "gradient"):
        rules = {"none": None, "density": rates.by_density(), "statistic": rates.by_statistic()}
        options |= {"decay": config.decay, "regrow": config.regrow, "rate": rules[config.rate]}
        options |= {"score": scores.taylor if method == "agip" else scores.gradient}
        method = "agip"
    elif method in ("set", "rigl"):
        options |= {"drop": config.drop, "seed": config.seed}
    elif method == "random":
        options |= {"seed": config.seed}
    elif method == "acdc":
        options |= {"every": max(1, round(steps * config.phase))}
    return getattr(jaxprune, f"{method}_transform")(config.sparsity, **options)


def masks_at_init(config: Config, setting: Setting) -> Any:
    """The masks of a method that prunes before training."""
    source, model = setting[:2]
    if config.method == "synflow":
        model.eval()
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = map(nnx.to_pure_dict, states)
    # The last norm of a residual branch starts with the scale 0; no weight before it would count.
    params = jax.tree.map_with_path(
        lambda path, x: jnp.ones_like(x) if trees.path_string(path).endswith("scale") else x, params
    )
    images, labels = map(jnp.asarray, source.first(config.init_images))
    images = source.prepare(images)

    def apply(params: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest)(images)

    def loss(params: Any, temperature: float) -> jax.Array:
        return jnp.mean(training.cross_entropy(apply(params, images) / temperature, labels))

    budget = budget_of(config)
    if config.method == "synflow":
        score = jax.jit(lambda params: at_init.synflow(apply, params, images[:1]))
        return jaxprune.prune_in_rounds(params, config.sparsity, score, budget=budget)[1]
    # The temperature of GraSP's authors, and none for SNIP.
    temperature = 200.0 if config.method == "grasp" else 1.0
    score = jax.jit(lambda params: getattr(at_init, config.method)(loss, params, temperature))
    return jaxprune.prune(params, config.sparsity, score=score(params), budget=budget)[1]


def budget_of(config: Config) -> budgets.BudgetRule | None:
    """The budget rule; None is the method's own."""
    rules = {"global": budgets.global_budget(), "uniform": budgets.uniform}
    return (rules | {"erdos_renyi_kernel": budgets.erdos_renyi_kernel}).get(config.budget)


def pattern_of(config: Config) -> patterns.PatternRule:
    """Which weights of a kernel [..., inputs, outputs] fall together."""
    if config.pattern == "filters":
        return patterns.channels(axis=-1)
    # Weights of layers that do not fit, such as the first one, go one by one.
    if ":" in config.pattern:
        n, m = map(int, config.pattern.split(":"))
        return lambda path, leaf: patterns.n_m(n, m, axis=-2) if leaf.shape[-2] % m == 0 else None
    size = tuple(map(int, config.pattern.split("x")))

    def blocks(path: str, leaf: Any) -> patterns.Pattern:
        fits = all(map(operator.ge, leaf.shape[-2:], size))
        return patterns.blocks((None,) * (leaf.ndim - 2) + size) if fits else None

    return blocks


def masks_of(config: Config, state: training.TrainState) -> Any:
    """The masks; all True for a dense run."""
    if config.method == "none":
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), state.params)
    return jaxprune.get_masks(state.opt_state)


def sparsity_of(params: Any, masks: Any) -> float:
    """Fraction of the prunable weights that is masked."""
    flags = trees.prunable_flags(params)
    kernels = [mask for mask, flag in zip(jax.tree.leaves(masks), flags, strict=True) if flag]
    kept = sum(int(count) for count in jax.device_get(count_true(kernels)))
    return 1 - kept / sum(mask.size for mask in kernels)


@jax.jit
def count_true(masks: list[jax.Array]) -> list[jax.Array]:
    """How many weights each mask keeps; one dispatch for all."""
    return [mask.sum(dtype=jnp.int32) for mask in masks]


def main(args: Sequence[str] | None = None) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)
    with plain_errors():
        config = tyro.extras.overridable_config_cli(CONFIGS, description=__doc__, args=args)
        processes.start(
            config.coordinator, config.processes, config.process, timeout=config.host_timeout
        )
    with processes.lost_is_an_error():
        train(config)


if __name__ == "__main__":
    main()
