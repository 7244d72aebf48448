"""What the training scripts share: from a configuration to data, model, optimizer and step."""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import jaxprune
from jaxprune import models, rewinding, sharding, structure, training
from jaxprune.experiments.command import plain_errors
from jaxprune.experiments.config import Config
from jaxprune.experiments.sources import Source, open_source

MakePruning = Callable[["Setting"], optax.GradientTransformation | None]


class Setting(NamedTuple):
    """What a pruning method may look at before training."""

    source: Source
    model: nnx.Module
    steps: int
    groups: structure.Groups | None  # of the channels that are left, if channels are pruned


class Stage(NamedTuple):
    """What changes while a run goes on."""

    network: structure.Network | None = None  # at its present widths; None: weights are pruned
    image_size: tuple[int, int] | None = None  # in training; None: that of the data
    cut: int | None = None  # step of the last switch to a smaller network


class Steps(NamedTuple):
    """How a network is trained and tested."""

    tx: optax.GradientTransformation
    run: Callable[..., tuple]  # see training.make_chunk_step
    like: training.TrainState  # shapes of the state, and where its arrays lie
    evaluate: Callable[[training.TrainState], dict[str, float]]  # on the test images


class Functions(NamedTuple):
    """A network as functions of its variables, `{"params": ..., "model_state": ...}`."""

    evaluate: Callable[..., Any]  # (variables, images) -> logits
    train: Callable[..., Any]  # (variables, images) -> (logits, {"model_state": new values})


class Experiment(NamedTuple):
    """All parts of a run; the loop is `training.fit`."""

    mesh: Mesh
    source: Source
    epoch: int  # steps of one pass over the training images
    steps: int
    schedule: optax.Schedule
    create: Callable[[int], training.TrainState]  # seed -> state at step 0
    dense: Steps  # of the network as it is at first, with images of the data's size
    at: Callable[[Stage], Steps]
    chunk: int  # steps per call
    small_size: tuple[int, int] | None  # of the images at first, if they grow
    # Where channels are pruned:
    functions: Functions
    groups: structure.Groups | None
    example: jax.Array  # a few images, prepared, to analyse and to compare with
    make_tx: Callable[[Stage], optax.GradientTransformation]
    macs: Callable[[structure.Plan | None], int]  # of one image of the data's size; None: dense

    @property
    def train_set(self) -> Any:
        """Training images on the devices, see `Source`."""
        return self.source.train

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
    with plain_errors():
        axes = sharding.parse_mesh(config.mesh) if config.mesh else {"data": jax.device_count()}
        mesh = sharding.make_mesh(axes)
        for batch_size in (config.batch_size, config.eval_batch_size):
            sharding.check_batch(batch_size, mesh)
        source = open_source(config, mesh)
    epoch = source.size // config.batch_size
    steps = config.steps or max(1, round(config.epochs * epoch))

    full = source.image_shape[:2]
    with plain_errors():
        model = make_model(config, source, config.seed)
        schedule = learning_rate(config, steps)
        small = small_size(config, full)
        model.train()
        graphdef, *states = nnx.split(model, nnx.Param, ...)
        functions = make_functions(graphdef)
        images = jnp.asarray(source.first(8).images)
        example = sharding.replicate(source.prepare(images), mesh)
        params, model_state = map(nnx.to_pure_dict, states)
        variables, groups = {"params": params, "model_state": model_state}, None
        if config.granularity == "channels":
            groups = find_groups(functions, variables, example)
            cost = structure.mac_cost(groups, functions.evaluate, variables, example[:1])
        else:
            dense_macs = structure.count_macs(functions.evaluate, variables, example[:1])
        setting = Setting(source, model, steps, groups)

    def make_tx(stage: Stage) -> optax.GradientTransformation:
        own = setting._replace(groups=None if stage.network is None else stage.network.groups)
        rates = rewarmed(schedule, stage.cut, config.rewarm_steps)
        return make_optimizer(config, rates, make_pruning(own))

    def make_steps(
        stage: Stage, tx: optax.GradientTransformation, functions: Functions = functions
    ) -> Steps:
        def apply(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
            return functions.evaluate({"params": params, "model_state": model_state}, images)

        evaluate = training.make_evaluate(apply, source.prepare, mesh)
        own = variables
        if stage.cut is not None:
            own = jax.eval_shape(stage.network.plan.compact, variables)
        step = make_step(config, source, functions, tx, stage)
        like = shapes_of_state(own, tx, mesh)
        return Steps(
            tx,
            training.make_chunk_step(step, mesh, jax.tree.map(lambda x: x.sharding, like)),
            like,
            lambda state: evaluate(
                state._replace(params=training.with_averages(state.params, state.opt_state)),
                source.test,
                config.eval_batch_size,
            ),
        )

    def macs(plan: structure.Plan | None) -> int:
        return dense_macs if plan is None else cost(plan)

    def at(stage: Stage) -> Steps:
        if stage.cut is None:  # nothing is removed
            return make_steps(stage, tx)
        wrapped = Functions(*map(stage.network.plan.wrap, functions))
        return make_steps(stage, make_tx(stage), wrapped)

    first = Stage(None if groups is None else structure.start(groups))
    with plain_errors():
        tx = make_tx(first)

    def create(seed: int) -> training.TrainState:
        own = model if seed == config.seed else make_model(config, source, seed)
        return training.create_state(own, tx, mesh)[1]

    chunk = 1 if jax.default_backend() == "cpu" else min(50, config.log_every)
    return Experiment(
        mesh=mesh,
        source=source,
        epoch=epoch,
        steps=steps,
        schedule=schedule,
        create=create,
        dense=make_steps(first, tx),
        at=at,
        chunk=config.chunk or chunk,
        small_size=small,
        functions=functions,
        groups=groups,
        example=example,
        make_tx=make_tx,
        macs=macs,
    )


def make_step(
    config: Config,
    source: Source,
    functions: Functions,
    tx: optax.GradientTransformation,
    stage: Stage,
) -> Callable[..., tuple]:
    """One training step, see `training.make_train_step`."""
    full = source.image_shape[:2]

    def prepare(key: jax.Array, images: jax.Array) -> jax.Array:
        images = source.prepare(source.augment(key, images))
        return resized(images, stage.image_size or full)

    def apply(params: Any, model_state: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "model_state": model_state}
        logits, updates = functions.train(variables, images)
        return logits, updates["model_state"]

    return training.make_train_step(
        apply,
        tx,
        prepare,
        label_smoothing=config.label_smoothing,
        parts=parts_of(config, stage, full),
        remat=config.remat,
    )


def shapes_of_state(
    variables: Any, tx: optax.GradientTransformation, mesh: Mesh
) -> training.TrainState:
    """Shapes of a state with these variables, arrays or shapes, and the places of all arrays."""

    def init(variables: Any) -> training.TrainState:
        params, model_state = variables["params"], variables["model_state"]
        return training.TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params))

    state = jax.eval_shape(init, variables)
    places = sharding.shardings_for(state, mesh, params=state.params)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )


def small_size(config: Config, full: tuple[int, int]) -> tuple[int, int] | None:
    """Height and width of the images at first; None if they never grow."""
    if config.small_images == 1 or config.small_until == 0:
        return None
    height, width = (round(side * config.small_images) for side in full)
    if min(height, width) < 4:
        raise ValueError(
            f"`small_images` {config.small_images} makes images of {height} x {width} pixels of "
            f"{full[0]} x {full[1]}; at least 4 x 4 must be left"
        )
    return height, width


def resized(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Images [B, H, W, C] at another size; pixels are averages of those that they cover."""
    if images.shape[1:3] == size:
        return images
    shape = (len(images), *size, images.shape[-1])
    return jax.image.resize(images, shape, "linear", antialias=True)


def parts_of(config: Config, stage: Stage, full: tuple[int, int]) -> int:
    """Parts of a batch: as many as keep activations at what `parts` of the dense network have."""
    share = math.prod(stage.image_size or full) / math.prod(full)
    if stage.network is not None:
        sizes = [(group.size, group.full) for group in stage.network.groups.values()]
        share *= sum(size for size, _ in sizes) / sum(full for _, full in sizes)
    enough = (n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0)
    return next(n for n in enough if n >= config.parts * share - 1e-9)


def rewarmed(schedule: optax.Schedule, cut: int | None, steps: int) -> optax.Schedule:
    """The schedule, with a linear rise over so many steps from step `cut` on."""
    if cut is None or steps == 0:
        return schedule
    return lambda count: schedule(count) * jnp.clip((count - cut + 1) / steps, 0.0, 1.0)


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


def make_model(config: Config, source: Source, seed: int) -> nnx.Module:
    """A new model of the configuration."""
    return getattr(models, config.model)(
        num_classes=source.num_classes,
        in_channels=source.image_shape[-1],
        widths=models.Widths(**json.loads(config.widths)) if config.widths else None,
        dtype=config.dtype,
        rngs=nnx.Rngs(seed),
    )


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
    tx = jaxprune.chain(*transforms, *([prune] if prune else []))
    return optax.chain(tx, training.average_parameters(config.ema)) if config.ema else tx
