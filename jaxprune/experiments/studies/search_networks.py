"""The networks of scripts/search.py: a trained one, what is searched in it, and smaller ones."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import rewinding, search, structure, training
from jaxprune.experiments.config import Config
from jaxprune.experiments.studies import networks
from jaxprune.experiments.studies.networks import Dense, Small, variables_of

RETRAINING = {
    "fine_tune": "train on at a small learning rate",
    "rewind": "put the learning rate back to an earlier step of the dense training",
}
_BATCH = 500  # images that are scored together on CPU, where a convolution must be in no loop
_CALIBRATION_BATCH = 50  # patches of 3x3 convolutions take nine times the memory of their images


class Searched(NamedTuple):
    """A trained network, and all that searches of it share."""

    dense: Dense  # to be fine-tuned
    rewound: Dense  # at an earlier step of its own schedule
    variables: Any
    whole: structure.Plan
    layers: tuple[search.Layer, ...]
    cost: Callable[[structure.Plan], float]
    evaluate: Callable[[Any], Any]
    refit: Callable[[Any, structure.Plan], Any] | None
    accuracy: float  # of the dense network, on the test images
    held_out: bool  # whether the dense training has not seen the images of `evaluate`
    latency_errors: list[float]  # of the table, for the dense network and two uniform ones


def open_searched(options: argparse.Namespace, path: Path, config: Config) -> Searched:
    """Reads a trained network, and prepares its searches."""
    # All training images, and the test images for tests: the search has images of its own.
    full = dataclasses.replace(config, validation=0)
    tuning = {name: getattr(options, name) for name in ("steps", "learning_rate", "warmup_steps")}
    dense = networks.read_dense(path, dataclasses.replace(full, schedule="cosine", **tuning))
    # As before the options: `read_runs` fills in rates only where the command line has none.
    rewound = networks.read_dense(path, full)
    total = rewound.experiment.steps
    start = max(0, total - (options.rewind_steps or total))
    state = rewound.state
    state = state._replace(
        step=jnp.full_like(state.step, start), opt_state=rewinding.set_step(state.opt_state, start)
    )
    rewound = rewound._replace(state=state, config=dataclasses.replace(rewound.config, steps=total))
    experiment = dense.experiment
    evaluate, variables = experiment.functions.evaluate, variables_of(dense.state)
    batch = options.batch if options.cost == "latency" else 1
    images = jnp.zeros((batch, *experiment.source.shape), experiment.example.dtype)
    layers = search.find_layers(evaluate, variables, images)
    whole = experiment.groups.plan({})
    cost, errors = cost_of(options, dense, variables, layers, images)
    count = config.validation or options.images
    return Searched(
        dense,
        rewound,
        variables,
        whole,
        layers,
        cost,
        make_evaluate(dense, count),
        make_refit(dense, variables, options.calibration),
        experiment.dense.evaluate(dense.state)["test_accuracy"],
        bool(config.validation),
        errors,
    )


def cost_of(
    options: argparse.Namespace,
    dense: Dense,
    variables: Any,
    layers: tuple[search.Layer, ...],
    images: jax.Array,
) -> tuple[Callable[[structure.Plan], float], list[float]]:
    """Returns what a plan costs and, of measured latencies, their errors for whole networks."""
    groups = dense.experiment.groups
    if options.cost == "macs":
        return dense.experiment.macs, []
    if options.cost == "parameters":
        return structure.count_parameters, []
    path = options.workdir / f"latencies-{options.batch}.json"
    if path.exists():
        table = search.load_latencies(path)
    else:
        print("measuring the latencies of all layers", flush=True)
        table = search.measure_latencies(layers)
        table.save(path)
    scores = structure.filter_norms(groups, variables)
    plans = [groups.plan(structure.keep_uniform(groups, scores, own)) for own in (1.0, 0.7, 0.5)]
    checks = search.check_latencies(
        table, plans, dense.experiment.functions.evaluate, variables, images
    )
    return table.cost, [own.error for own in checks]


def problem_of(options: argparse.Namespace, searched: Searched, budget: float) -> search.Problem:
    """Makes the problem of one budget."""
    return search.channels(
        searched.dense.experiment.groups,
        searched.variables,
        searched.layers,
        cost=searched.cost,
        budget=budget,
        floor=options.floor,
        multiple=options.multiple,
        refit=searched.refit,
    )


def make_evaluate(dense: Dense, count: int) -> Callable[[Any], Any]:
    """Returns the accuracy on the last training images, as a function of variables."""
    source, evaluate = dense.experiment.source, dense.experiment.functions.evaluate
    images, labels = (part[-count:] for part in dense.experiment.train_set)

    def correct(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = evaluate(variables, source.prepare(images))
        return jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.int32)

    compiled = jax.jit(correct)
    parts = [slice(i, i + _BATCH) for i in range(0, len(labels), _BATCH)]
    if jax.default_backend() != "cpu":
        return lambda variables: compiled(variables, images, labels) / len(labels)

    def accuracy(variables: Any) -> float:
        return sum(int(compiled(variables, images[own], labels[own])) for own in parts) / len(
            labels
        )

    return accuracy


def make_refit(
    dense: Dense, variables: Any, count: int
) -> Callable[[Any, structure.Plan], Any] | None:
    """Returns the reconstruction on the first training images; None without any."""
    if not count:
        return None
    source, evaluate = dense.experiment.source, dense.experiment.functions.evaluate
    images = source.prepare(jnp.asarray(source.first(count).images))
    batches = [images[i : i + _CALIBRATION_BATCH] for i in range(0, count, _CALIBRATION_BATCH)]
    inputs = search.find_inputs(evaluate, variables, batches, dense.experiment.groups)
    return lambda variables, plan: search.reconstruct(variables, plan, inputs)


def accuracy_of(searched: Searched, plan: structure.Plan) -> float:
    """Returns the accuracy of a plan on the test images, by the program of the dense network."""
    dense = fitted(searched, searched.dense, plan)
    masked = plan.mask(variables_of(dense.state))
    return dense.experiment.dense.evaluate(dense.state._replace(**masked))["test_accuracy"]


def fitted(searched: Searched, dense: Dense, plan: structure.Plan) -> Dense:
    """Returns a dense network whose kernels are fitted to what a plan keeps."""
    if searched.refit is None:
        return dense
    params = searched.refit(searched.variables, plan)["params"]
    return dense._replace(state=dense.state._replace(params=params))


def retrain(searched: Searched, way: str, plan: structure.Plan, stopped: Sequence[Any]) -> float:
    """Trains the network of a plan further; returns its accuracy on the test images."""
    dense = searched.rewound if way == "rewind" else searched.dense
    small = networks.compacted(fitted(searched, dense, plan), plan)
    return _trained(dense, small, stopped)


def scratch(searched: Searched, plan: structure.Plan, stopped: Sequence[Any]) -> float:
    """Trains a new network with the widths of a plan, as long as the dense one."""
    return _trained(searched.rewound, networks.from_scratch(searched.rewound, plan), stopped)


def _trained(dense: Dense, small: Small, stopped: Sequence[Any]) -> float:
    state: training.TrainState = networks.fine_tune(dense, small, stopped)
    return small.steps.evaluate(state)["test_accuracy"]
