"""The training step of a configuration as shapes: built without data or arrays, and compiled."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune import counting, data, programs, reports, sharding, structure, training, trees
from jaxprune.experiments.config import Config
from jaxprune.experiments.experiment import make_step, shapes_of_state
from jaxprune.experiments.network import find_groups, make_model, pure_functions
from jaxprune.experiments.optimizer import learning_rate, make_optimizer
from jaxprune.experiments.pruning import AT_INIT, pruning_while_training
from jaxprune.experiments.sources import Source

# Training images, shape of an image, classes; others have images of `image_size` in 1000 classes.
DATA_SETS = {"digits": (1437, (8, 8, 1), 10), "fashion_mnist": (60000, (28, 28, 1), 10)}
IMAGENET = 1281167
MULTIPLE = 8  # of widths after compaction, as in training on accelerators
OPTIMIZER = "optimizer"  # is in the names of all operations of the optimizer, pruning included


class Network(NamedTuple):
    """A network as functions and shapes."""

    functions: structure.FromNNX  # of the dense network
    stage: structure.Stage
    variables: Any  # {"params": ..., "model_state": ...} of jax.ShapeDtypeStruct
    macs: int  # of one image
    images: jax.ShapeDtypeStruct  # of a few images


class Program(NamedTuple):
    """A compiled training step; all numbers are those of one device."""

    seconds: float  # of compilation
    memory: reports.Memory
    flops: float
    bytes_accessed: float
    state: training.TrainState  # of programs.Argument
    collectives: list[programs.Collective]


def check_config(config: Config) -> None:
    """Raises if the step depends on data."""
    problems = []
    if config.method in AT_INIT:
        names = ", ".join(AT_INIT)
        problems.append(f"`method` must be none of {names}, which read images; got {config.method}")
    trees.raise_for(problems, "this step cannot be compiled ahead of time:")


def shapes_of(config: Config) -> Source:
    """Describes the data of a configuration without images; mean and deviation are arbitrary."""
    size = IMAGENET if config.dataset == "imagenet2012" else 4 * config.batch_size
    large = size, (config.image_size, config.image_size, 3), 1000
    size, shape, classes = DATA_SETS.get(config.dataset, large)
    if config.dataset == "text":
        size, shape, classes = 4 * config.batch_size, (config.length,), 256
    mean, deviation = (0.5,) * shape[-1], (0.25,) * shape[-1]

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        if config.dataset in ("imagenet2012", "text"):  # where images are decoded, or never
            return images
        return data.augment(key, images, pad=config.pad, flip=config.flip)

    def prepare(images: jax.Array) -> jax.Array:
        if config.dataset == "text":
            return images.astype(jnp.int32)
        return data.normalize(images, mean, deviation, config.dtype)

    def nothing(*_: Any) -> Any:
        raise AssertionError("there are no images")

    return Source(
        size=size - config.validation,
        shape=shape,
        num_classes=classes,
        train=None,
        test=None,
        batches=nothing,
        first=nothing,
        augment=augment,
        prepare=prepare,
        fingerprint=nothing,
        example=jax.eval_shape(prepare, jax.ShapeDtypeStruct((8, *shape), jnp.uint8)),
        label=shape if config.dataset == "text" else (),
    )


def dense_network(config: Config, source: Source) -> Network:
    """Returns the network that a configuration begins with."""
    model = nnx.eval_shape(lambda: make_model(config, source, config.seed))
    functions = pure_functions(model)
    groups = find_groups(functions, source.example)
    stage = structure.Stage(structure.dense_network(groups), source.shape[:2])
    return network_of(functions, stage, source.example)


def without_half(dense: Network) -> Network:
    """Returns the network without half of the channels of each group."""
    groups = dense.stage.groups
    keep = {name: np.arange(group.size) < group.size / 2 for name, group in groups.items()}
    plan = groups.plan(keep, multiple=MULTIPLE)
    smaller = dense.stage.network.smaller(plan)
    return network_of(dense.functions, dense.stage._replace(network=smaller, cut=0), dense.images)


def network_of(
    functions: structure.FromNNX, stage: structure.Stage, images: jax.ShapeDtypeStruct
) -> Network:
    """Returns the network of a stage, with its cost."""
    variables = jax.eval_shape(stage.network.plan.compact, functions.variables)
    image = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    macs = structure.count_macs(stage.wrap(functions.evaluate), variables, image)
    return Network(functions, stage, variables, macs, images)


def make_tx(config: Config, network: Network, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a training run; its operations have a name that programs show."""
    prune = pruning_while_training(config, steps, network.stage.groups)
    tx = make_optimizer(config, learning_rate(config, steps), prune)
    update = jax.named_scope(OPTIMIZER)(tx.update)
    return optax.GradientTransformationExtraArgs(tx.init, update)


def compile_step(
    config: Config, source: Source, network: Network, mesh: Mesh, **options: Any
) -> Program:
    """Compiles the step for a mesh of devices that need not exist; `options` are the compiler's."""
    steps = config.steps or max(1, round(config.epochs * (source.size // config.batch_size)))
    tx = make_tx(config, network, steps)

    # As many micro-batches for the smaller network, so that memory can be compared.
    train = network.stage.wrap(network.functions.train)
    step = make_step(config, source, train, tx, network.stage.phase, config.parts)
    state = shapes_of_state(network.variables, tx, mesh)
    own, everywhere = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    shapes = [(config.batch_size, *shape) for shape in (source.shape, source.label)]
    images, labels = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=own)
        for shape, dtype in zip(shapes, source.dtypes, strict=True)
    )
    key = jax.eval_shape(jax.random.key, 0)
    placed = (
        state,
        images,
        labels,
        jax.ShapeDtypeStruct((), key.dtype, sharding=everywhere),
    )
    places = jax.tree.map(lambda x: x.sharding, state)
    # As in training, but for unused arguments: all of them stay, to be told apart by position.
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere), keep_unused=True)
    with counting.for_devices(mesh.size):
        lowered = jitted.lower(*placed)
    began = time.perf_counter()
    compiled = lowered.compile(options)
    seconds = time.perf_counter() - began
    text = compiled.as_text() or ""
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
