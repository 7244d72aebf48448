"""The networks of scripts/elastic.py: an elastic one, what is cut out of it, and its controls."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxprune import data, elastic, kernels, models, search, sharding, structure, training
from jaxprune.experiments.config import Config
from jaxprune.experiments.experiment import resized
from jaxprune.experiments.network import as_variables, pure_functions
from jaxprune.experiments.optimizer import learning_rate, make_optimizer
from jaxprune.experiments.sources import held_out, load_data
from jaxprune.experiments.studies.compaction import source_of
from jaxprune.models.widths import ARCHITECTURES

_BATCH = 250  # images that are measured together: the published code takes 200


class Study(NamedTuple):
    """What all networks of one seed share."""

    config: Config  # of data and optimizer; its model is not used
    dataset: data.Dataset  # training images without the held-out ones, and the test images
    judged: data.Split  # held-out training images, on which choices are judged
    space: elastic.Space
    phases: tuple[elastic.Phase, ...]
    recipe: elastic.Recipe
    cost: Callable[[elastic.Choice], float]
    macs: Callable[[elastic.Choice], int]  # of one image
    parameters: Callable[[elastic.Choice], int]
    mesh: Mesh


class Supernet(NamedTuple):
    """A trained elastic network."""

    study: Study
    trained: elastic.Trained
    source: str  # tells the results of different trainings apart
    evaluate: Callable[[elastic.Choice], float]  # accuracy on the held-out images
    train: Callable[..., Any]  # masked, in training mode
    calibration: list[Any]  # batches of training images


class Cut(NamedTuple):
    """A sub-network as a module, as it was cut out."""

    module: nnx.Module
    choice: elastic.Choice
    pixels: int | None  # height and width of its images, if they vary


def open_study(options: argparse.Namespace, seed: int) -> Study:
    """Opens the data of a seed, and describes its elastic network; trains nothing."""
    config = Config(
        dataset=options.dataset,
        data_dir=options.data_dir,
        source_dir=options.source_dir,
        image_size=options.image_size,
        seed=seed,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        pad=options.pad,
        flip=options.flip,
        nesterov=True,
        validation=options.validation,
    )
    whole = load_data(config)
    split = held_out(whole, options.validation)
    dataset = whole._replace(train=split.train)
    judged = data.Split(*(part[: options.judged] for part in split.test))
    height, _, channels = dataset.train.images.shape[1:]
    space = elastic.named(
        options.model,
        image_size=height,
        in_channels=channels,
        num_classes=dataset.num_classes,
        widths=options.widths,
        streams=options.streams,
        resolutions=options.resolutions,
        seed=seed,
    )
    phases = elastic.phases(
        space.decisions,
        options.steps,
        learning_rate=options.learning_rate,
        networks=options.networks,
        sandwich=options.sandwich,
    )
    recipe = elastic.Recipe(
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        pad=options.pad,
        flip=options.flip,
    )
    image = jax.ShapeDtypeStruct((1, height, height, channels), jnp.float32)
    macs, parameters = elastic.mac_cost(space, image), elastic.parameter_cost(space)
    cost = cost_of(options, space, image) if options.cost == "latency" else macs
    cost = parameters if options.cost == "parameters" else cost
    mesh = sharding.make_mesh()
    return Study(config, dataset, judged, space, phases, recipe, cost, macs, parameters, mesh)


def cost_of(
    options: argparse.Namespace, space: elastic.Space, image: Any
) -> Callable[[elastic.Choice], float]:
    """Returns the sum of the latencies of all layers, from a table measured once."""
    path = options.workdir / "latencies.json"
    if path.exists():
        table = search.load_latencies(path)
    else:
        print("measuring the latencies of all layers", flush=True)
        variables = jax.eval_shape(space.mask, space.variables, space.full())
        table = search.measure_latencies(search.find_layers(space.evaluate, variables, image))
        table.save(path)
    return elastic.plan_cost(space, table.cost)


def train_supernet(
    options: argparse.Namespace,
    study: Study,
    folder: Path,
    on_log: Callable[[int, Any], None],
    stopped: Sequence[Any],
) -> Supernet:
    """Trains the elastic network of a seed, or resumes it, or reads what it has become."""
    trained = elastic.train(
        study.space,
        study.dataset,
        workdir=folder,
        phases=study.phases,
        recipe=study.recipe,
        seed=study.config.seed,
        mesh=study.mesh,
        save_every=options.save_every,
        log_every=options.log_every,
        on_log=on_log,
        should_stop=lambda: bool(stopped),
    )
    space = study.space
    assert space.train is not None, "networks by name have it"
    calibration = batches_of(study, study.dataset.train.images[: options.calibration])
    labels = study.judged.labels
    pairs = [
        (images, jnp.asarray(labels[i * _BATCH : (i + 1) * _BATCH]))
        for i, images in enumerate(batches_of(study, study.judged.images))
    ]
    train, judge = (
        kernels.replace_depthwise(own, study.mesh) for own in (space.train, space.evaluate)
    )
    evaluate = elastic.make_accuracy(
        space, train, judge, trained.variables, calibration=calibration, batches=pairs
    )
    return Supernet(study, trained, source_of(folder), evaluate, space.masked(train), calibration)


def batches_of(study: Study, images: Any) -> list[Any]:
    """Returns images as normalized batches."""
    return [
        data.normalize(jnp.asarray(images[i : i + _BATCH]), study.dataset.mean, study.dataset.std)
        for i in range(0, len(images), _BATCH)
    ]


def cut_out(supernet: Supernet, choice: elastic.Choice) -> Cut:
    """Cuts out a sub-network with its own batch statistics."""
    space = supernet.study.space
    pixels = space.resolution(choice)
    images = [in_pixels(x, pixels) for x in supernet.calibration]
    variables = elastic.recalibrate(
        supernet.train, supernet.trained.variables, space.gates(choice), images
    )
    extracted = elastic.extract(space, variables, choice)
    return Cut(elastic.to_module(space, extracted), choice, pixels)


def from_scratch(study: Study, choice: elastic.Choice, seed: int) -> Cut:
    """Makes a new network of the same shape."""
    space = study.space
    extracted = elastic.extract(space, space.variables, choice)
    module = fresh(elastic.to_module(space, extracted), extracted.description, seed)
    return Cut(module, choice, space.resolution(choice))


def fresh(module: nnx.Module, description: dict[str, int], seed: int) -> nnx.Module:
    """Makes an ordinary, initialized module of the shape of another one.

    Args:
        module: a `ResNet` or an `MBConv`.
        description: name of a decision -> chosen option; depths are read from it.
        seed: of the initial parameters.
    """
    shared: dict[str, Any] = {"rngs": nnx.Rngs(seed)}
    if isinstance(module, models.MBConv):
        shared |= {"in_channels": module.in_channels, "num_classes": module.head.out_features}
        stem, last = (own.conv.out_features for own in (module.stem, module.last))
        return models.MBConv(module.shapes, stem=stem, head=last, **shared)
    assert isinstance(module, models.ResNet), type(module)
    shared |= {"in_channels": module.in_channels, "num_classes": module.head.out_features}
    stages = range(len(ARCHITECTURES[module.name].depths))
    depths = [1 + description.get(f"stage{own}", 0) for own in stages]
    return models.ResNet(module.name, widths=module.widths, depths=depths, **shared)


def test_accuracy(study: Study, cut: Cut) -> float:
    """Returns the accuracy of a module on the test images."""
    tx = make_optimizer(study.config, lambda _: 0.0, None)
    graphdef, state = training.create_state(cut.module, tx, study.mesh)
    return _tester(study, graphdef, cut.pixels)(state)


def train_alone(
    study: Study, cut: Cut, steps: int, rate: float, stopped: Sequence[Any]
) -> tuple[nnx.Module, float]:
    """Trains a module as an ordinary network; returns it with its accuracy on the test images.

    Args:
        study: data, augmentation and optimizer.
        cut: the module, which is not changed.
        steps: their number.
        rate: the highest learning rate, after a warm-up of a twentieth of the steps; it ends at 0.
        stopped: ends the training when it is not empty.
    """
    config = dataclasses.replace(
        study.config, learning_rate=rate, steps=steps, warmup_steps=steps // 20
    )
    tx = make_optimizer(config, learning_rate(config, steps), None)
    graphdef, state = training.create_state(cut.module, tx, study.mesh)
    train = kernels.replace_depthwise(pure_functions(cut.module).train, study.mesh)

    def apply(params: Any, model_state: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        logits, updates = train(as_variables(params, model_state), images)
        return logits, updates.get("model_state", {})

    def prepare(key: jax.Array, images: jax.Array) -> jax.Array:
        images = data.augment(key, images, pad=config.pad, flip=config.flip)
        return in_pixels(data.normalize(images, study.dataset.mean, study.dataset.std), cut.pixels)

    smoothing = study.recipe.label_smoothing
    step = training.make_train_step(apply, tx, prepare, label_smoothing=smoothing)
    train_set = sharding.replicate(study.dataset.train, study.mesh)
    state = training.fit(
        state,
        steps,
        training.make_chunk_step(step, study.mesh),
        train_set,
        data.index_batches(len(train_set.labels), config.batch_size, seed=config.seed),
        jax.random.fold_in(jax.random.key(config.seed), 2),
        study.mesh,
        chunk=1 if jax.default_backend() == "cpu" else 50,
        should_stop=lambda: bool(stopped),
    )
    module = nnx.merge(graphdef, state.params, state.model_state)
    module.eval()
    return module, _tester(study, graphdef, cut.pixels)(state)


def _tester(
    study: Study, graphdef: Any, pixels: int | None
) -> Callable[[training.TrainState], float]:
    mean, std = study.dataset.mean, study.dataset.std
    evaluate = training.make_evaluate(
        graphdef, lambda images: in_pixels(data.normalize(images, mean, std), pixels), study.mesh
    )
    test = sharding.replicate(study.dataset.test, study.mesh)
    return lambda state: evaluate(state, test, _BATCH * study.mesh.size)["test_accuracy"]


def in_pixels(images: jax.Array, pixels: int | None) -> jax.Array:
    """Resizes images to the resolution of a choice, if it has one."""
    return images if pixels is None else resized(images, (pixels, pixels))


def variables_of(module: nnx.Module) -> dict[str, Any]:
    """Returns the variables of a module as nested dicts."""
    return structure.from_nnx(module, state="model_state").variables


def passes_of_training(study: Study) -> float:
    """Returns what elastic training costs, in forward passes of the full network over one image.

    A step of training costs three forward passes, and the teacher costs one. Masked sub-networks
    cost as much as the full network.
    """
    passes = sum(own.steps * (3 * own.networks + own.teaches) for own in study.phases)
    return float(passes * study.recipe.batch_size)


def passes_of_measuring(options: argparse.Namespace, choices: int) -> float:
    """Returns what the measurement of some choices costs, in the same unit."""
    return float(choices * (options.calibration + options.judged))
