"""What the training scripts share: from a configuration to data, model, optimizer and step."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from configs import Config
from flax import nnx
from jax.sharding import Mesh

import jaxprune
from jaxprune import compaction, data, models, rewinding, structure, training

MakePruning = Callable[["Setting"], optax.GradientTransformation | None]


class Setting(NamedTuple):
    """What a pruning method may look at before training."""

    dataset: data.Dataset
    model: nnx.Module
    prepare: Callable[[jax.Array], jax.Array]  # uint8 images -> what the model takes
    steps: int
    groups: structure.Groups | None  # of the channels that are left, if channels are pruned


class Steps(NamedTuple):
    """How a network is trained and tested."""

    tx: optax.GradientTransformation
    run: Callable[..., tuple]  # see training.make_chunk_step
    evaluate: Callable[[training.TrainState], dict[str, float]]  # on the test images


class Functions(NamedTuple):
    """A network as functions of its variables, `{"params": ..., "model_state": ...}`."""

    evaluate: Callable[..., Any]  # (variables, images) -> logits
    train: Callable[..., Any]  # (variables, images) -> (logits, {"model_state": new values})


class Experiment(NamedTuple):
    """All parts of a run; the loop is `training.fit`."""

    mesh: Mesh
    train_set: data.Split  # on the devices
    test_set: data.Split
    epoch: int  # steps of one pass over the training images
    steps: int
    schedule: optax.Schedule
    create: Callable[[int], training.TrainState]  # seed -> state at step 0
    dense: Steps
    chunk: int  # steps per call
    # Where channels are pruned:
    functions: Functions
    groups: structure.Groups | None
    example: jax.Array  # a few images, prepared, to analyse and to compare with
    make_tx: Callable[[structure.Groups | None], optax.GradientTransformation]
    at: Callable[[compaction.Network], Steps]  # of a network at smaller widths
    macs: Callable[[structure.Plan], int] | None  # of one image

    @property
    def run(self) -> Callable[..., tuple]:
        """Training steps of the dense network."""
        return self.dense.run

    @property
    def evaluate(self) -> Callable[[training.TrainState], dict[str, float]]:
        """Test of the dense network."""
        return self.dense.evaluate


def build(config: Config, make_pruning: MakePruning) -> Experiment:
    """Everything that a run needs. Errors that a user can mend end the program with a message."""
    mesh = training.make_mesh()
    with plain_errors():
        for batch_size in (config.batch_size, config.eval_batch_size):
            training.check_batch(batch_size, mesh)
        dataset = load_data(config)
        # Only to check batch size and seed.
        data.index_batches(len(dataset.train.labels), config.batch_size, seed=config.seed)
    # Small sets live on every device; a batch is a row of indices.
    train_set, test_set = training.replicate((dataset.train, dataset.test), mesh)
    epoch = len(dataset.train.labels) // config.batch_size
    steps = config.steps or max(1, round(config.epochs * epoch))

    def prepare_test(images: jax.Array) -> jax.Array:
        return data.normalize(images, dataset.mean, dataset.std, config.dtype)

    def prepare_train(key: jax.Array, images: jax.Array) -> jax.Array:
        return prepare_test(data.augment(key, images, pad=config.pad, flip=config.flip))

    with plain_errors():
        model = make_model(config, dataset, config.seed)
        schedule = learning_rate(config, steps)
        model.train()
        graphdef, *states = nnx.split(model, nnx.Param, ...)
        functions = make_functions(graphdef)
        example = prepare_test(jnp.asarray(dataset.train.images[:8]))
        groups, macs = None, None
        if config.granularity == "channels":
            params, model_state = map(nnx.to_pure_dict, states)
            variables = {"params": params, "model_state": model_state}
            groups = find_groups(functions, variables, example)
            macs = structure.mac_cost(groups, functions.evaluate, variables, example[:1])
        setting = Setting(dataset, model, prepare_test, steps, groups)

    def make_tx(groups: structure.Groups | None) -> optax.GradientTransformation:
        return make_optimizer(config, schedule, make_pruning(setting._replace(groups=groups)))

    def make_steps(tx: optax.GradientTransformation, functions: Functions) -> Steps:
        def apply_train(params: Any, model_state: Any, images: jax.Array) -> tuple[jax.Array, Any]:
            variables = {"params": params, "model_state": model_state}
            logits, updates = functions.train(variables, images)
            return logits, updates["model_state"]

        def apply(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
            return functions.evaluate({"params": params, "model_state": model_state}, images)

        smoothing = config.label_smoothing
        step = training.make_train_step(apply_train, tx, prepare_train, label_smoothing=smoothing)
        evaluate = training.make_evaluate(apply, prepare_test, mesh)
        return Steps(
            tx,
            training.make_chunk_step(step, mesh),
            lambda state: evaluate(state, test_set, config.eval_batch_size),
        )

    def at(network: compaction.Network) -> Steps:
        wrapped = Functions(*map(network.plan.wrap, functions))
        return make_steps(make_tx(network.groups), wrapped)

    with plain_errors():
        tx = make_tx(groups)

    def create(seed: int) -> training.TrainState:
        own = model if seed == config.seed else make_model(config, dataset, seed)
        return training.create_state(own, tx, mesh)[1]

    chunk = 1 if jax.default_backend() == "cpu" else min(50, config.log_every)
    return Experiment(
        mesh=mesh,
        train_set=train_set,
        test_set=test_set,
        epoch=epoch,
        steps=steps,
        schedule=schedule,
        create=create,
        dense=make_steps(tx, functions),
        chunk=config.chunk or chunk,
        functions=functions,
        groups=groups,
        example=example,
        make_tx=make_tx,
        at=at,
        macs=macs,
    )


def make_functions(graphdef: nnx.GraphDef) -> Functions:
    """A network in evaluation and in training, as functions of all its values."""

    def merge(variables: Any) -> Any:
        return nnx.merge(graphdef, variables["params"], variables["model_state"])

    def evaluate(variables: Any, images: jax.Array) -> jax.Array:
        model = merge(variables)
        model.eval()
        return model(images)

    def train(variables: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        model = merge(variables)
        model.train()
        logits = model(images)
        return logits, {"model_state": nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))}

    return Functions(evaluate, train)


def find_groups(functions: Functions, variables: Any, images: jax.Array) -> structure.Groups:
    """What shrinks together in evaluation and in training."""
    traces = [
        structure.Trace(functions.evaluate, (images,)),
        structure.Trace(functions.train, (images,), updates=lambda output: output[1]),
    ]
    return structure.find_groups(traces, variables)


def make_model(config: Config, dataset: data.Dataset, seed: int) -> nnx.Module:
    """A new model of the configuration."""
    return getattr(models, config.model)(
        num_classes=dataset.num_classes,
        in_channels=dataset.train.images.shape[-1],
        widths=models.Widths(**json.loads(config.widths)) if config.widths else None,
        dtype=config.dtype,
        rngs=nnx.Rngs(seed),
    )


def load_data(config: Config) -> data.Dataset:
    """The data set; of synthetic images just enough for four batches."""
    folders = {"data_dir": config.data_dir or None, "source_dir": config.source_dir or None}
    if config.dataset != "synthetic":
        return data.load(config.dataset, **folders)
    shape = (config.image_size, config.image_size, 3)
    sizes = {"train_size": 4 * config.batch_size, "test_size": config.batch_size}
    return data.load("synthetic", image_shape=shape, num_classes=1000, **sizes)


def learning_rate(config: Config, steps: int) -> optax.Schedule:
    """Linear warm-up, then what `schedule` names; the rate of the last step holds after the end."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        first = 0.0 if warmup else peak
        schedule = optax.warmup_cosine_decay_schedule(first, peak, warmup, decay_steps=steps)
    else:
        drops = {max(0, round(steps * part) - warmup): 0.1 for part in (0.5, 0.75)}
        stairs = optax.piecewise_constant_schedule(peak, drops)
        ramp = optax.linear_schedule(0.0, peak, max(1, warmup))
        schedule = optax.join_schedules([ramp, stairs], [warmup])
    return rewinding.hold(schedule, steps)


def make_optimizer(
    config: Config, schedule: optax.Schedule, prune: optax.GradientTransformation | None
) -> optax.GradientTransformation:
    """SGD with momentum and weight decay on kernels, then pruning."""

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    transforms = [
        optax.add_decayed_weights(config.weight_decay, mask=kernels),
        optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    ]
    return jaxprune.chain(*transforms, *([prune] if prune else []))


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns errors that a user can mend into one message without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
