"""The networks of scripts/compact.py: a trained one, made smaller by each score, trained further.

Everything that changes a network is a call of jaxprune.structure, as in docs/structure.md.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import checkpoints, data, models, rewinding, structure, training
from jaxprune.experiments.config import Config
from jaxprune.experiments.experiment import Experiment, Steps
from jaxprune.experiments.network import variables_of

SCORES = {
    "l1": "sums of the absolute values of filters",
    "l2": "Euclidean norms of filters",
    "linf": "largest absolute values in filters",
    "norm_scale": "scales of batch normalization",
    "taylor": "changes of the loss, estimated from gradients at batch normalization",
    "fpgm": "distances of a filter to all others in its layer",
    "random": "random numbers (control)",
}
# Between the compacted and the masked network; 28 layers whose statistics have seen four batches
# make 1e-4 of rounding, and a wrong channel makes about 1.
_TOLERANCE = 1e-3
ROUNDS = 9  # in which steps of the small and of the dense network are timed in turns


class Dense(NamedTuple):
    """A trained network, and what it shares with all smaller ones."""

    config: Config  # of the training to come
    experiment: Experiment
    state: training.TrainState  # as trained, but at step 0 of a new schedule
    next_batch: Any  # position in the order of the data


class Small(NamedTuple):
    """A network to be trained."""

    state: training.TrainState
    steps: Steps
    difference: float | None = None  # of outputs, from those of the dense network with zeros


def read_dense(path: Path, config: Config) -> Dense:
    """Reads a trained network from the workdir of scripts/train.py, and groups its channels.

    Raises:
        ValueError: its data set does not live in memory.
    """
    if config.dataset in ("imagenet2012", "text"):
        raise ValueError(
            f"{path} is a run on {config.dataset}, and this command needs a data set in memory, "
            "such as digits or fashion_mnist. docs/structure.md removes channels of any network."
        )
    config = dataclasses.replace(config, granularity="channels")
    experiment = Experiment(config)  # prunes nothing while it trains
    manager = checkpoints.open_manager(path / "checkpoints")
    state, record = checkpoints.restore(manager, experiment.create(config.seed))
    manager.close()
    # The momentum stays, as with any optimizer whose state is sliced: it fades within the warm-up.
    opt_state = rewinding.set_step(state.opt_state, 0)
    state = state._replace(step=jnp.zeros_like(state.step), opt_state=opt_state)
    return Dense(config, experiment, state, record["data"])


def choose(
    dense: Dense, score: str, budget: float, *, floor: float, multiple: int, batches: int
) -> structure.Plan:
    """Keeps as many channels with the highest scores as the budget of MACs allows."""
    groups, macs = dense.experiment.groups, dense.experiment.macs
    scores = structure.normalized(channel_scores(dense, score, batches))
    limit = budget * macs(groups.plan({}))
    keep = structure.keep_within(groups, scores, limit, macs, floor=floor, multiple=multiple)
    return groups.plan(keep, multiple=multiple)


def channel_scores(dense: Dense, score: str, batches: int) -> dict[str, np.ndarray]:
    """Returns the scores of the channels of each group; larger ones are kept."""
    groups, variables = dense.experiment.groups, variables_of(dense.state)
    orders = {"l1": 1, "l2": 2, "linf": np.inf}
    if score in orders:
        return structure.filter_norms(groups, variables, orders[score])
    if score == "norm_scale":
        return structure.norm_scales(groups, variables)
    if score == "fpgm":
        return structure.fpgm(groups, variables)
    if score == "taylor":
        return structure.taylor(groups, variables, mean_gradients(dense, batches))
    assert score == "random", score
    generator = np.random.default_rng(dense.config.seed)
    return {name: generator.uniform(size=group.size) for name, group in groups.items()}


def mean_gradients(dense: Dense, count: int) -> dict[str, Any]:
    """Averages the gradients of the loss over training batches; running statistics get zeros."""
    config, (images, labels) = dense.config, dense.experiment.train_set
    evaluate, state = dense.experiment.functions.evaluate, dense.state

    @jax.jit
    def gradient(params: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            variables = {"params": params, "model_state": state.model_state}
            logits = evaluate(variables, dense.experiment.source.prepare(images))
            return training.cross_entropy(logits, labels).mean()

        return jax.grad(loss)(params)

    batches = data.index_batches(len(labels), config.batch_size, seed=config.seed)
    rows = [next(batches) for _ in range(count)]
    found = [gradient(state.params, images[row], labels[row]) for row in rows]
    mean = jax.tree.map(lambda *each: sum(each) / count, *found)
    return {"params": mean, "model_state": jax.tree.map(jnp.zeros_like, state.model_state)}


def unpruned(dense: Dense) -> Small:
    """Returns the dense network itself."""
    return Small(jax.tree.map(jnp.copy, dense.state), dense.experiment.dense)


def compacted(dense: Dense, plan: structure.Plan) -> Small:
    """Returns the dense network without the channels that a plan removes."""
    experiment, variables = dense.experiment, variables_of(dense.state)
    evaluate, train = experiment.functions.evaluate, experiment.functions.train
    images, tolerance = experiment.example, _TOLERANCE
    difference = max(
        plan.verify(evaluate, variables, images, tolerance=tolerance),
        plan.verify(train, variables, images, updates=lambda out: out[1], tolerance=tolerance),
    )
    step, params, _, opt_state = dense.state
    opt_state, restarted = structure.compact_state(
        plan, experiment.dense.tx, opt_state, params, under="params"
    )
    assert not restarted, restarted  # the state of SGD mirrors the parameters
    small = plan.compact(variables)
    state = training.TrainState(step, small["params"], small["model_state"], opt_state)
    network = structure.dense_network(experiment.groups).smaller(plan)
    stage = structure.Stage(network, experiment.image_size, cut=0)
    # Copied: training donates the state, and unsliced arrays belong to the dense network, too.
    return Small(jax.tree.map(jnp.copy, state), experiment.at(stage), difference)


def from_scratch(dense: Dense, plan: structure.Plan) -> Small:
    """Returns a new network with the widths that a plan leaves: an ordinary, initialized module."""
    widths = models.widths_of(plan.compact(variables_of(dense.state))["params"])
    own = {"widths": json.dumps(widths._asdict()), "granularity": "weights"}
    experiment = Experiment(dataclasses.replace(dense.config, **own))
    return Small(experiment.create(dense.config.seed), experiment.dense)


def fine_tune(dense: Dense, small: Small, stopped: Sequence[Any]) -> training.TrainState:
    """Trains a network on the batches that follow those of the dense training."""
    config, experiment = dense.config, dense.experiment
    size = len(experiment.train_set.labels)
    batches = data.index_batches(size, config.batch_size, seed=config.seed)
    batches.set_state(dense.next_batch)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return training.fit(
        small.state, config.steps, small.steps.run, experiment.train_set, batches, key,
        experiment.mesh, chunk=experiment.chunk, log_every=config.log_every,
        should_stop=lambda: bool(stopped),
    )  # fmt: skip


def time_steps(dense: Dense, steps: Steps, state: training.TrainState) -> tuple[float, float]:
    """Times a training step of a network and of the dense one: medians over calls in turns."""
    experiment, chunk = dense.experiment, dense.experiment.chunk
    rows = np.arange(chunk * dense.config.batch_size) % len(experiment.train_set.labels)
    indices = jnp.asarray(rows.reshape(chunk, -1), jnp.int32)
    runs = [steps.run, experiment.dense.run]
    states = [jax.tree.map(jnp.copy, own) for own in (state, dense.state)]
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):
        for index, run in enumerate(runs):
            began = time.perf_counter()
            states[index], _ = run(states[index], experiment.train_set, indices, jax.random.key(0))
            jax.block_until_ready(states[index])
            seconds[index].append((time.perf_counter() - began) / chunk)
    small, whole = (statistics.median(own[1:]) for own in seconds)  # the first round may compile
    return small, whole
