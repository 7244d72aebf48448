"""Networks that get smaller while scripts/train.py trains them: what is now, and what is next.

A network is its plan from the dense one and the steps that are compiled for it. After each mask
update `decide` asks whether fewer channels pay; if so, the smaller steps are compiled in the
background while training goes on, and `switch` replaces the network a few steps later. The record
of a checkpoint says which network its state is of.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from configs import Config
from experiment import Experiment, Steps
from jax.sharding import NamedSharding, PartitionSpec

import jaxprune
from jaxprune import budgets, compaction, schedules, scores, structure, training


class Present(NamedTuple):
    """A network at its present widths."""

    network: Any  # a compaction.Network; None where weights are pruned
    steps: Steps
    history: tuple[Mapping[str, Any], ...]  # of switches, for the summary


class Next(NamedTuple):
    """A switch that was decided on."""

    step: int  # at which it happens
    keep: Mapping[str, np.ndarray]
    compiled: Future[Callable[..., tuple]]  # the training step of the smaller network


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


def first(experiment: Experiment) -> Present:
    """The dense network."""
    network = experiment.groups and compaction.start(experiment.groups)
    return Present(network, experiment.dense, ())


def to_record(present: Present, coming: Next | None) -> dict[str, Any]:
    """What a checkpoint says of its network."""
    return {
        "plan": present.network.plan.to_dict() if present.history else None,
        "history": list(present.history),
        "switch_at": coming.step if coming else None,
    }


def from_record(experiment: Experiment, record: Mapping[str, Any]) -> Present:
    """The network that a checkpoint is of."""
    if record["plan"] is None:
        return first(experiment)
    plan = structure.plan_of(record["plan"], "the checkpoint")
    network = compaction.Network(plan, experiment.groups.compact(plan))
    return Present(network, experiment.at(network), tuple(record["history"]))


def coming_of(
    config: Config,
    experiment: Experiment,
    present: Present,
    state: training.TrainState,
    record: Mapping[str, Any],
) -> Next | None:
    """The switch that was decided on when a checkpoint was saved; masks are as they were then."""
    if record["switch_at"] is None:
        return None
    keep = compaction.masked_channels(present.network.groups, state.opt_state)
    return plan_switch(config, experiment, present, state, keep, record["switch_at"])


def next_pause(config: Config, step: int, steps: int, coming: Next | None) -> int:
    """The next step at which something may change, or the end."""
    if not config.compact:
        return steps
    if coming is not None:
        return min(coming.step, steps)
    return min([after for after in mask_updates(config, steps) if after > step] + [steps])


def sparsity_of(experiment: Experiment, present: Present, state: training.TrainState) -> float:
    """Fraction of the dense network's parameters that are gone, or go with what is masked."""
    network = present.network
    keep = compaction.masked_channels(network.groups, state.opt_state)
    left = network.plan.then(network.groups.plan(keep, multiple=1))
    dense = experiment.groups.plan({})
    return 1 - structure.count_parameters(left) / structure.count_parameters(dense)


def describe(present: Present) -> str:
    """One line about the last switch."""
    last = present.history[-1]
    return (
        f"step {last['step']}: {last['parameters']:,} parameters, {last['macs']:,} MACs an image; "
        f"{last['seconds']:.1f} s for the switch"
    )


def empty_state(experiment: Experiment, present: Present, seed: int) -> training.TrainState:
    """A state of the shapes of a network, to restore into."""
    state = experiment.create(seed)
    if not present.history:
        return state
    small = present.network.plan.compact(variables_of(state))
    opt_state = present.steps.tx.init(small["params"])
    return training.TrainState(state.step, small["params"], small["model_state"], opt_state)


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


def decide(
    config: Config, experiment: Experiment, present: Present, state: training.TrainState, last: int
) -> Next | None:
    """A switch, if the channels that are masked now are worth one."""
    network, step = present.network, int(state.step)
    keep = compaction.masked_channels(network.groups, state.opt_state)
    plan = network.plan.then(network.groups.plan(keep, multiple=multiple_of(config)))
    dense, now, then = map(experiment.macs, (experiment.groups.plan({}), network.plan, plan))
    policy = compaction.Policy(config.switch_steps, config.switches, config.saving)
    relative = {"cost": now / dense, "smaller": then / dense}
    left, done = last - step, len(present.history)
    if not compaction.pays(policy, **relative, left=left, done=done):
        return None
    return plan_switch(config, experiment, present, state, keep, step + config.switch_delay)


def plan_switch(
    config: Config,
    experiment: Experiment,
    present: Present,
    state: training.TrainState,
    keep: Mapping[str, Any],
    step: int,
) -> Next:
    """Compiles the smaller training step in the background."""
    network = present.network
    plan = network.groups.plan(keep, multiple=multiple_of(config))
    smaller = compaction.Network(network.plan.then(plan), network.groups.compact(plan))
    steps = experiment.at(smaller)
    small = jax.eval_shape(plan.compact, variables_of(state))
    opt_state = jax.eval_shape(steps.tx.init, small["params"])
    shapes = training.TrainState(state.step, small["params"], small["model_state"], opt_state)
    pool = ThreadPoolExecutor(1)
    compiled = pool.submit(compile_run, config, experiment, steps, shapes)
    pool.shutdown(wait=False)
    return Next(step, keep, compiled)


def compile_run(
    config: Config, experiment: Experiment, steps: Steps, shapes: training.TrainState
) -> Callable[..., tuple]:
    """The training step of a network for batches of one length, ready to run."""
    everywhere = NamedSharding(experiment.mesh, PartitionSpec())
    split = NamedSharding(experiment.mesh, PartitionSpec(None, "batch"))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
    )
    size = experiment.chunk, config.batch_size
    rows = jax.ShapeDtypeStruct(size, jnp.int32, sharding=split)
    compiled = steps.run.lower(state, experiment.train_set, rows, jax.random.key(0)).compile()

    def run(state: Any, data: Any, indices: Any, key: Any) -> tuple:
        own = compiled if indices.shape == size else steps.run
        return own(state, data, indices, key)

    return run


def switch(
    config: Config,
    experiment: Experiment,
    present: Present,
    coming: Next,
    state: training.TrainState,
) -> tuple[Present, training.TrainState]:
    """The smaller network and its state; an error leaves both as they were."""
    began = time.perf_counter()
    done = compaction.shrink(
        present.network,
        coming.keep,
        {experiment.functions.train: (experiment.example,)},
        experiment.make_tx,
        variables_of(state),
        state.opt_state,
        multiple=multiple_of(config),
    )
    steps = experiment.at(done.network)._replace(run=coming.compiled.result())
    entry = {
        "step": int(state.step),
        "macs": experiment.macs(done.network.plan),
        "parameters": structure.count_parameters(done.network.plan),
        "widths": {name: group.size for name, group in done.network.groups.items()},
        "restarted": list(done.restarted),
        "rounded": list(done.rounded),
        "difference": done.difference,
        "seconds": time.perf_counter() - began,
    }
    small = training.TrainState(
        state.step, done.variables["params"], done.variables["model_state"], done.opt_state
    )
    small = training.replicate(small, experiment.mesh)
    return Present(done.network, steps, (*present.history, entry)), small


def variables_of(state: Any) -> dict[str, Any]:
    """What the functions of a network take."""
    return {"params": state.params, "model_state": state.model_state}


def multiple_of(config: Config) -> int | None:
    """Of the widths; None leaves it to the device."""
    return config.multiple or None
