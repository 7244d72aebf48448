"""The training step of a configuration as shapes: built without data or arrays, and compiled."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune import data, programs, reports, sharding, structure, training, trees
from jaxprune.experiments import stages
from jaxprune.experiments.config import Config
from jaxprune.experiments.experiment import (
    Functions,
    Stage,
    find_groups,
    learning_rate,
    make_functions,
    make_model,
    make_optimizer,
    make_step,
    shapes_of_state,
)
from jaxprune.experiments.sources import Source
from jaxprune.experiments.train import AT_INIT, gradual_pruning

# Training images, shape of an image, classes; others have images of `image_size` in 1000 classes.
DATA_SETS = {"digits": (1437, (8, 8, 1), 10), "fashion_mnist": (60000, (28, 28, 1), 10)}
IMAGENET = 1281167
MULTIPLE = 8  # of widths after compaction, as in training on accelerators
OPTIMIZER = "optimizer"  # is in the names of all operations of the optimizer, pruning included


class Network(NamedTuple):
    """A network as functions of shapes."""

    functions: Functions
    variables: Any  # {"params": ..., "model_state": ...} of jax.ShapeDtypeStruct
    groups: structure.Groups
    macs: int  # of one image


class Program(NamedTuple):
    """A compiled training step; all numbers are those of one device."""

    seconds: float  # of compilation
    memory: reports.Memory
    flops: float
    bytes_accessed: float
    state: training.TrainState  # of programs.Argument
    collectives: list[programs.Collective]


def check_config(config: Config) -> None:
    """Refuses what needs data."""
    problems = []
    if config.method in AT_INIT:
        names = ", ".join(AT_INIT)
        problems.append(f"`method` must be none of {names}, which read images; got {config.method}")
    trees.raise_for(problems, "this step cannot be compiled ahead of time:")


def shapes_of(config: Config) -> Source:
    """The data of a configuration without images. Mean and deviation are any: constants."""
    size = IMAGENET if config.dataset == "imagenet2012" else 4 * config.batch_size
    large = size, (config.image_size, config.image_size, 3), 1000
    size, shape, classes = DATA_SETS.get(config.dataset, large)
    mean, deviation = (0.5,) * shape[-1], (0.25,) * shape[-1]

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        if config.dataset == "imagenet2012":  # where images are decoded
            return images
        return data.augment(key, images, pad=config.pad, flip=config.flip)

    def nothing(*_: Any) -> Any:
        raise AssertionError("there are no images")

    return Source(
        size=size - config.validation,
        image_shape=shape,
        num_classes=classes,
        train=None,
        test=None,
        batches=nothing,
        first=nothing,
        augment=augment,
        prepare=lambda images: data.normalize(images, mean, deviation, config.dtype),
        fingerprint=nothing,
    )


def dense_network(config: Config, source: Source) -> Network:
    """The network that a configuration begins with."""
    model = nnx.eval_shape(lambda: make_model(config, source, config.seed))
    model.train()
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, model_state = map(nnx.to_pure_dict, states)
    functions, variables = make_functions(graphdef), {"params": params, "model_state": model_state}
    image = source.image_shape
    groups = find_groups(functions, variables, jax.ShapeDtypeStruct((8, *image), config.dtype))
    return Network(functions, variables, groups, count_macs(config, functions, variables, image))


def without_half(config: Config, dense: Network, image: tuple[int, ...]) -> Network:
    """What is left without half of the channels of each group, as scripts/shrinking.py has it."""
    keep = {name: np.arange(group.size) < group.size / 2 for name, group in dense.groups.items()}
    before = structure.start(dense.groups)
    plan = before.groups.plan(keep, multiple=MULTIPLE)
    after = structure.Network(before.plan.then(plan), before.groups.compact(plan))
    functions = Functions(*map(after.plan.wrap, dense.functions))
    variables = jax.eval_shape(plan.compact, dense.variables)
    macs = count_macs(config, functions, variables, image)
    return Network(functions, variables, after.groups, macs)


def count_macs(config: Config, functions: Functions, variables: Any, image: Any) -> int:
    """Multiply-accumulates of one image."""
    images = jax.ShapeDtypeStruct((1, *image), config.dtype)
    return structure.count_macs(functions.evaluate, variables, images)


def make_tx(config: Config, network: Network, steps: int) -> optax.GradientTransformation:
    """The optimizer of scripts/train.py; its operations have a name that programs show."""
    if config.method == "none":
        prune = None
    elif config.granularity == "channels":
        prune = stages.pruning(config, steps, network.groups)
    else:
        prune = gradual_pruning(config, steps)
    tx = make_optimizer(config, learning_rate(config, steps), prune)
    update = jax.named_scope(OPTIMIZER)(tx.update)
    return optax.GradientTransformationExtraArgs(tx.init, update)


def compile_step(
    config: Config, source: Source, network: Network, mesh: Mesh, **options: Any
) -> Program:
    """Compiles the step for a mesh of devices that need not exist; `options` are the compiler's."""
    steps = config.steps or max(1, round(config.epochs * (source.size // config.batch_size)))
    tx = make_tx(config, network, steps)

    # As many parts of a batch for the smaller network, so that memory can be compared.
    step = make_step(config, source, network.functions, tx, Stage())
    state = shapes_of_state(network.variables, tx, mesh)
    own, everywhere = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    images, labels = (config.batch_size, *source.image_shape), (config.batch_size,)
    key = jax.eval_shape(jax.random.key, 0)
    placed = (
        state,
        jax.ShapeDtypeStruct(images, jnp.uint8, sharding=own),
        jax.ShapeDtypeStruct(labels, jnp.int32, sharding=own),
        jax.ShapeDtypeStruct((), key.dtype, sharding=everywhere),
    )
    places = jax.tree.map(lambda x: x.sharding, state)
    # As in training, but for unused arguments: all of them stay, to be told apart by position.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere), keep_unused=True)
    lowered = jitted.lower(*placed)
    began = time.perf_counter()
    compiled = lowered.compile(options)
    seconds = time.perf_counter() - began
    text = compiled.as_text()
    costs = compiled.cost_analysis() or programs.costs(text)  # XLA has none of absent GPUs
    arguments = jax.tree.unflatten(jax.tree.structure(placed), programs.arguments(text))
    return Program(
        seconds=seconds,
        memory=reports.measure_memory(compiled),
        flops=costs["flops"],
        bytes_accessed=costs["bytes accessed"],
        state=arguments[0],
        collectives=programs.collectives(text),
    )
