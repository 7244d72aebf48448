"""Training steps that get cheaper while scripts/train.py runs: what is now, and what is next.

A stage is a network at its present widths and a size of its images. After each mask update, and
when images are to grow, `decide` asks what pays; the steps of the next stage are compiled in the
background while training goes on, and `switch` replaces the stage a few steps later. The record of
a checkpoint says which stage its state is of.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jaxprune
from jaxprune import (
    budgets,
    reports,
    schedules,
    scores,
    sharding,
    structure,
    training,
    trees,
)
from jaxprune.experiments.config import Config
from jaxprune.experiments.experiment import Experiment, Stage, Steps, parts_of


class Compiled(NamedTuple):
    """Training steps that are ready to run."""

    run: Callable[..., tuple]  # see training.make_chunk_step
    peak_bytes: int  # of a step, as XLA plans it, without the data set


class Present(NamedTuple):
    """A stage of a run."""

    stage: Stage
    steps: Steps
    peak_bytes: int
    history: tuple[Mapping[str, Any], ...]  # of switches, for the summary


class Next(NamedTuple):
    """A switch that was decided on."""

    step: int  # at which it happens
    stage: Stage
    steps: Steps
    keep: Mapping[str, np.ndarray] | None  # channels; None: all of them
    grows: bool  # whether images do
    compiled: Future[Compiled]


def pruning(
    config: Config, steps: int, groups: structure.Groups
) -> optax.GradientTransformationExtraArgs:
    """The transformation that masks channels; `method` says by what score."""
    start, stop = prune_window(config, steps)
    ranked = {"magnitude": scores.magnitude, "random": scores.random(config.seed)}
    rules = {"global": budgets.global_budget(), "uniform": budgets.uniform}
    return jaxprune.agip_transform(
        config.sparsity,
        groups=groups,
        every=config.prune_every,
        start=start,
        stop=stop,
        decay=config.decay,
        score=ranked.get(config.method),
        budget=rules.get(config.budget),
        regrow=config.regrow,
    )


# ---- what is now


def first(experiment: Experiment) -> Stage:
    """The dense network, on images of the first size."""
    network = None if experiment.groups is None else structure.start(experiment.groups)
    return Stage(network, experiment.small_size)


def begin(
    config: Config,
    experiment: Experiment,
    stage: Stage,
    history: tuple[Mapping[str, Any], ...] = (),
) -> Present:
    """Compiles the steps of a stage that a run begins with, or goes on with."""
    steps = experiment.at(stage)
    compiled = compile_steps(config, experiment, steps)
    return Present(stage, steps._replace(run=compiled.run), compiled.peak_bytes, history)


def to_record(present: Present, coming: Next | None) -> dict[str, Any]:
    """What a checkpoint says of its stage."""
    network, size, cut = present.stage
    return {
        "plan": None if network is None or cut is None else network.plan.to_dict(),
        "image_size": None if size is None else list(size),
        "cut": cut,
        "history": list(present.history),
        "coming": None if coming is None else coming_record(coming),
    }


def coming_record(coming: Next) -> dict[str, Any]:
    """A decision as plain values: masks may change before it is carried out."""
    keep = coming.keep and {name: np.flatnonzero(own).tolist() for name, own in coming.keep.items()}
    return {"step": coming.step, "keep": keep, "grows": coming.grows}


def from_record(experiment: Experiment, record: Mapping[str, Any]) -> Stage:
    """The stage that a checkpoint is of."""
    size = record["image_size"] and tuple(record["image_size"])
    if record["plan"] is None:
        return first(experiment)._replace(image_size=size)
    plan = structure.plan_of(record["plan"], "the checkpoint")
    network = structure.Network(plan, experiment.groups.compact(plan))
    return Stage(network, size, record["cut"])


def costs(config: Config, experiment: Experiment, present: Present) -> dict[str, float]:
    """What a step costs now, for the metrics."""
    network, size, _ = present.stage
    plan = None if network is None else network.plan
    known: dict[str, float] = {"peak_bytes": present.peak_bytes, "macs": experiment.macs(plan)}
    if network is not None:
        known["parameters"] = structure.count_parameters(network.plan)
    if experiment.small_size is not None:
        known["image_height"] = (size or experiment.source.image_shape[:2])[0]
    if config.parts > 1:
        known["parts"] = parts_of(config, present.stage, experiment.source.image_shape[:2])
    return known


def sparsity_of(experiment: Experiment, present: Present, state: training.TrainState) -> float:
    """Fraction of the dense network's parameters that are gone, or go with what is masked."""
    network = present.stage.network
    keep = structure.masked_channels(network.groups, state.opt_state)
    left = network.plan.then(network.groups.plan(keep, multiple=1))
    dense = experiment.groups.plan({})
    return 1 - structure.count_parameters(left) / structure.count_parameters(dense)


def unranked_groups(state: training.TrainState) -> int:
    """How many groups had scores of 0 only at the last mask update, see `agip_transform`."""
    return sum(int(own) for own in trees.state_fields(state.opt_state, "unranked"))


def describe(present: Present) -> str:
    """One line about the last switch."""
    last = present.history[-1]
    height, width = last["image_size"]
    parts = [f"step {last['step']}: images of {height} x {width}"]
    if last["parameters"] is not None:
        parts.append(f"{last['parameters']:,} parameters, {last['macs']:,} MACs an image")
    parts.append(f"{last['seconds']:.1f} s for the switch")
    if last["rounded"]:
        rounded = ", ".join(last["rounded"][:3]) + (", ..." if len(last["rounded"]) > 3 else "")
        parts.append(f"masked channels stay, to fill up widths, in {rounded}")
    return "; ".join(parts)


# ---- what is next


def next_pause(
    config: Config, experiment: Experiment, present: Present, step: int, coming: Next | None
) -> int:
    """The next step at which something may change, or the end."""
    steps = experiment.steps
    if coming is not None:
        return min(coming.step, steps)
    return min(
        [after for after in decisions(config, experiment, present) if after > step] + [steps]
    )


def decisions(config: Config, experiment: Experiment, present: Present) -> list[int]:
    """Steps after which a switch may be decided on."""
    changes = mask_updates(config, experiment.steps) if config.compact else []
    if experiment.small_size is not None and present.stage.image_size is not None:
        changes.append(growth_step(config, experiment.steps))
    return changes


def mask_updates(config: Config, steps: int) -> list[int]:
    """Steps after which masks have changed."""
    start, stop = prune_window(config, steps)
    return [step + 1 for step in schedules.mask_update_steps(start, stop, config.prune_every)]


def prune_window(config: Config, steps: int) -> tuple[int, int]:
    """First and last mask update."""
    start, stop = (
        min(round(steps * part), steps - 1) for part in (config.prune_start, config.prune_stop)
    )
    return start, stop


def growth_step(config: Config, steps: int) -> int:
    """From when on images may grow; with the last mask update if both end at the same fraction."""
    return min(round(steps * config.small_until), steps - 1) + 1


def decide(
    config: Config, experiment: Experiment, present: Present, state: training.TrainState
) -> Next | None:
    """A switch, if one pays now: to fewer channels, to images of full size, or to both."""
    step = int(state.step)
    grows = present.stage.image_size is not None and step >= growth_step(config, experiment.steps)
    keep = masked_enough(config, experiment, present, state) if config.compact else None
    if not grows and keep is None:
        return None
    later = step + config.switch_delay
    return plan_switch(config, experiment, present, keep, grows=grows, step=later)


def masked_enough(
    config: Config, experiment: Experiment, present: Present, state: training.TrainState
) -> dict[str, np.ndarray] | None:
    """The channels to keep, if removing all others pays."""
    network = present.stage.network
    keep = structure.masked_channels(network.groups, state.opt_state)
    plan = network.plan.then(network.groups.plan(keep, multiple=multiple_of(config)))
    dense, now, then = map(experiment.macs, (experiment.groups.plan({}), network.plan, plan))
    policy = structure.Policy(config.switch_steps, config.switches, config.saving)
    relative = {"cost": now / dense, "smaller": then / dense}
    step = int(state.step)
    left = experiment.steps - step
    changing = max(0, mask_updates(config, experiment.steps)[-1] - step)
    done = sum(entry["macs"] != entry["macs_before"] for entry in present.history)
    pays = structure.pays(policy, **relative, left=left, done=done, changing=changing)
    return keep if pays else None


def coming_of(
    config: Config,
    experiment: Experiment,
    present: Present,
    state: training.TrainState,
    record: Mapping[str, Any],
) -> Next | None:
    """The switch that was decided on when a checkpoint was saved, or right after that."""
    saved = record["coming"]
    if saved is None:
        due = int(state.step) in decisions(config, experiment, present)
        return decide(config, experiment, present, state) if due else None
    keep = saved["keep"]
    if keep is not None:
        sizes = {name: group.size for name, group in present.stage.network.groups.items()}
        keep = {name: np.isin(np.arange(sizes[name]), own) for name, own in keep.items()}
    step, grows = saved["step"], saved["grows"]
    return plan_switch(config, experiment, present, keep, grows=grows, step=step)


def plan_switch(
    config: Config,
    experiment: Experiment,
    present: Present,
    keep: Mapping[str, Any] | None,
    *,
    grows: bool,
    step: int,
) -> Next:
    """Compiles the training step of the next stage in the background."""
    stage = present.stage
    if grows:
        stage = stage._replace(image_size=None)
    if keep is not None:
        network = stage.network
        plan = network.groups.plan(keep, multiple=multiple_of(config))
        smaller = structure.Network(network.plan.then(plan), network.groups.compact(plan))
        stage = stage._replace(network=smaller, cut=step)
    steps = experiment.at(stage)
    pool = ThreadPoolExecutor(1)
    compiled = pool.submit(compile_steps, config, experiment, steps)
    pool.shutdown(wait=False)
    return Next(step, stage, steps, keep, grows, compiled)


def compile_steps(config: Config, experiment: Experiment, steps: Steps) -> Compiled:
    """The training step for chunks of one length, ready to run; of other lengths it compiles."""
    mesh = experiment.mesh
    split = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    size = experiment.chunk, config.batch_size
    rows: Any = jax.ShapeDtypeStruct(size, jnp.int32, sharding=split)
    if experiment.train_set is None:
        shape = *size, *experiment.source.image_shape
        rows = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split), rows
    key = sharding.replicate(jax.random.key(0), mesh)
    compiled = steps.run.lower(steps.like, experiment.train_set, rows, key).compile()
    data_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(experiment.train_set))
    memory = reports.measure_memory(compiled)

    def run(state: Any, data: Any, indices: Any, key: Any) -> tuple:
        own = compiled if jax.tree.leaves(indices)[0].shape[:2] == size else steps.run
        return own(state, data, indices, key)

    return Compiled(run, memory.peak - data_bytes)


def switch(
    config: Config,
    experiment: Experiment,
    present: Present,
    coming: Next,
    state: training.TrainState,
) -> tuple[Present, training.TrainState]:
    """The next stage and its state; an error leaves both as they were."""
    began = time.perf_counter()
    before, after = costs(config, experiment, present), {"rounded": [], "restarted": []}
    if coming.keep is not None:
        state = sharding.replicate(state, experiment.mesh)  # what is left may be split otherwise
        done = structure.shrink(
            present.stage.network,
            coming.keep,
            {experiment.functions.train: (experiment.example,)},
            lambda groups: experiment.make_tx(
                coming.stage._replace(network=structure.Network(coming.stage.network.plan, groups))
            ),
            variables_of(state),
            state.opt_state,
            multiple=multiple_of(config),
        )
        state = training.TrainState(
            state.step, done.variables["params"], done.variables["model_state"], done.opt_state
        )
        places = jax.tree.map(lambda x: x.sharding, coming.steps.like)
        state = jax.tree.map(sharding.put, state, places)
        after["widths"] = {name: group.size for name, group in done.network.groups.items()}
        after |= {"rounded": list(done.rounded), "restarted": list(done.restarted)}
        after["difference"] = done.difference
    compiled = coming.compiled.result()
    steps = coming.steps._replace(run=compiled.run)
    present = Present(coming.stage, steps, compiled.peak_bytes, present.history)
    now = costs(config, experiment, present)
    entry = {"step": int(state.step), "image_size": image_size(experiment, present.stage)}
    for name in ("parameters", "macs", "peak_bytes"):
        entry |= {name: now.get(name), f"{name}_before": before.get(name)}
    entry |= after | {"seconds": time.perf_counter() - began}
    return present._replace(history=(*present.history, entry)), state


def image_size(experiment: Experiment, stage: Stage) -> list[int]:
    """Height and width of training images."""
    return list(stage.image_size or experiment.source.image_shape[:2])


def variables_of(state: Any) -> dict[str, Any]:
    """What the functions of a network take."""
    return {"params": state.params, "model_state": state.model_state}


def multiple_of(config: Config) -> int | None:
    """Of the widths; None leaves it to the device."""
    return config.multiple or None
