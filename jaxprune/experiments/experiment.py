"""From a configuration to data, network, optimizer and training step: all that a run needs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxprune import kernels, sharding, structure, training
from jaxprune.experiments.config import Config
from jaxprune.experiments.kernels import wrap_network
from jaxprune.experiments.network import (
    as_variables,
    is_decoder,
    make_model,
    make_network,
    narrow_plan,
)
from jaxprune.experiments.optimizer import learning_rate, make_optimizer, rewarmed
from jaxprune.experiments.pruning import window_of
from jaxprune.experiments.sources import Size, Source, image_sizes, open_source, step_after


class Steps(NamedTuple):
    """How a network is trained and tested."""

    tx: optax.GradientTransformation
    run: Callable[..., tuple]  # see training.make_chunk_step
    like: training.TrainState  # shapes of the state, and where its arrays lie
    evaluate: Callable[..., dict[str, float]]  # (state[, images]), on the test images by default
    # The network with sparse kernels, whose indices are the argument `indices` of `run`; or None.
    wrapped: kernels.Wrapped | None = None


MakePruning = Callable[["Experiment", structure.Stage], optax.GradientTransformation | None]


class Experiment:
    """All parts of a run; the loop is `training.fit`.

    The stage of a run is a network at its present widths, and the size of its training images. Only
    with the granularity `channels` does a network have groups of channels that can be removed.

    Args:
        config: the configuration; from here on, its parts travel instead.
        make_pruning: function from this object and a stage to the transformation that prunes.

    Raises:
        ValueError: the data, the mesh or the network do not fit the configuration.
        OSError: data cannot be read.
    """

    def __init__(self, config: Config, make_pruning: MakePruning = lambda *_: None) -> None:
        """Opens the data and builds the dense network; trains nothing."""
        self.config, self._make_pruning = config, make_pruning
        axes = sharding.parse_mesh(config.mesh) if config.mesh else None
        self.mesh: Mesh = sharding.make_mesh(axes)
        if config.kernels != "off" and self.mesh.size > 1:
            raise ValueError(
                f"`kernels` {config.kernels} needs one device, but the mesh has {self.mesh.size}; "
                "omit it"
            )
        for batch_size in (config.batch_size, config.eval_batch_size):
            sharding.check_batch(batch_size, self.mesh)
        self.source: Source = open_source(config, self.mesh)
        self.epoch = self.source.size // config.batch_size  # steps of a pass over the images
        self.steps = config.steps or max(1, round(config.epochs * self.epoch))
        self.phases = image_sizes(config, self.image_size, self.steps)
        self.window = window_of(config, self.steps)
        chunk = 1 if jax.default_backend() == "cpu" else min(50, config.log_every)
        self.chunk = config.chunk or chunk  # steps per call

        self.schedule = learning_rate(config, self.steps)
        self.model, self.functions, self.groups, self.macs = make_network(config, self.source)
        whole = structure.Stage(structure.dense_network(self.groups), self.image_size)
        self._tx = self.make_optimizer(whole)
        self.dense = self.at(whole)  # the network before any channel is removed

    @property
    def image_size(self) -> Size:
        """Height and width of the images of the data set, or the length of text."""
        return self.source.shape[:2]

    @property
    def example(self) -> jax.Array:
        """A few prepared images, to compare the network with a smaller one."""
        return self.source.example

    @property
    def train_set(self) -> Any:
        """Training images on the devices, see `Source`."""
        return self.source.train

    def create(self, seed: int) -> training.TrainState:
        """Returns the state at step 0, of the whole network."""
        config = self.config
        model = self.model if seed == config.seed else make_model(config, self.source, seed)
        return training.create_state(model, self._tx, self.mesh)[1]

    def growth(self) -> structure.Growth | None:
        """Returns what the network begins without; None if it begins whole.

        The small network is a part of the whole one as it is initialized, and grows by the rest.

        Raises:
            ValueError: there is nothing to add.
        """
        if self.config.grow_from == 1:
            return None
        return structure.Growth(
            step_after(self.steps, self.config.grow_at),
            narrow_plan(self.groups, self.config),
            lambda: sharding.replicate(self.functions.variables, self.mesh),
        )

    def make_optimizer(self, stage: structure.Stage) -> optax.GradientTransformation:
        """Returns the optimizer of a stage."""
        rates = rewarmed(self.schedule, stage.cut, self.config.rewarm_steps)
        return make_optimizer(self.config, rates, self._make_pruning(self, stage))

    def at(self, stage: structure.Stage) -> Steps:
        """Returns how the network of a stage is trained and tested; compiles nothing."""
        evaluate = kernels.replace_depthwise(stage.wrap(self.functions.evaluate), self.mesh)
        train = stage.wrap(self.functions.train)
        variables, tx = self.functions.variables, self._tx
        if stage.cut is not None:
            variables = jax.eval_shape(stage.network.plan.compact, variables)
            tx = self.make_optimizer(stage)

        def apply(params: Any, model_state: Any, images: jax.Array) -> jax.Array:
            return evaluate(as_variables(params, model_state), images)

        def prepare(images: jax.Array) -> jax.Array:
            return resized(self.source.prepare(images), stage.phase)  # as they are trained on

        test = training.make_evaluate(apply, prepare, self.mesh)

        def evaluate_averages(state: training.TrainState, images: Any = None) -> dict[str, float]:
            averages = training.with_averages(state.params, state.opt_state)
            own = state._replace(params=averages)
            images = self.source.test if images is None else images
            found = test(own, images, self.config.eval_batch_size)
            if self.config.dataset == "text":
                found["bits_per_byte"] = found["test_loss"] / math.log(2)
            return found

        wrapped, parts = None, self.parts(stage)
        if self.config.kernels != "off":
            rest = self.example.shape[1 + len(stage.phase) :]
            shape = self.config.batch_size // parts, *stage.phase, *rest
            inputs = jax.ShapeDtypeStruct(shape, self.example.dtype)
            train = wrapped = wrap_network(train, variables, tx, inputs)
        else:
            train = kernels.replace_depthwise(train, self.mesh)
        teach = None
        if self.is_taught(stage):
            teach = kernels.replace_depthwise(self.functions.evaluate, self.mesh)
        step = make_step(self.config, self.source, train, tx, stage.phase, parts, teach)
        like = shapes_of_state(variables, tx, self.mesh)
        places = jax.tree.map(lambda x: x.sharding, like)
        run = training.make_chunk_step(step, self.mesh, places)
        return Steps(tx, run, like, evaluate_averages, wrapped)

    def is_taught(self, stage: structure.Stage) -> bool:
        """Tells whether the whole network teaches the network of a stage.

        Its steps then take `teacher`, the variables of the whole network, as an argument.
        """
        return bool(self.config.teacher and stage.cut)

    def parts(self, stage: structure.Stage) -> int:
        """Returns in how many micro-batches the network of a stage takes a batch."""
        share = math.prod(stage.phase) / math.prod(self.image_size)
        return micro_batches(self.config.parts, self.config.batch_size, share * kept_share(stage))


def kept_share(stage: structure.Stage) -> float:
    """Returns the fraction of all channels that the network of a stage has."""
    sizes = [(group.size, group.full) for group in stage.groups.values()]
    return sum(size for size, _ in sizes) / sum(full for _, full in sizes) if sizes else 1.0


def micro_batches(parts: int, batch_size: int, share: float) -> int:
    """Returns how many micro-batches keep activations at what `parts` of the whole network need.

    Args:
        parts: micro-batches of the dense network on images of full size.
        batch_size: it is divided evenly.
        share: size of the activations, relative to that network.
    """
    enough = (n for n in range(1, batch_size + 1) if batch_size % n == 0)
    return next(n for n in enough if n >= parts * share - 1e-9)


def make_step(
    config: Config,
    source: Source,
    train: Callable[..., Any],
    tx: optax.GradientTransformation,
    size: Size,
    parts: int,
    teach: Callable[..., Any] | None = None,
) -> Callable[..., tuple]:
    """Returns one training step on images of a size, see `training.make_train_step`."""

    def prepare(key: jax.Array, images: jax.Array) -> jax.Array:
        return resized(source.prepare(source.augment(key, images)), size)

    def apply(
        params: Any, model_state: Any, images: jax.Array, **given: Any
    ) -> tuple[jax.Array, Any]:
        logits, updates = train(as_variables(params, model_state), images, **given)
        return logits, updates.get("model_state", {})

    options: dict[str, Any] = {"label_smoothing": config.label_smoothing}
    options |= {"remat": config.remat and not is_decoder(config.model)}  # a decoder does it itself
    options |= {"teach": teach, "teacher_weight": config.teacher}
    return training.make_train_step(apply, tx, prepare, parts=parts, **options)


def shapes_of_state(
    variables: Any, tx: optax.GradientTransformation, mesh: Mesh
) -> training.TrainState:
    """Returns the shapes of a state with these variables, and the places of all arrays."""

    def init(variables: Any) -> training.TrainState:
        params, model_state = variables["params"], variables.get("model_state", {})
        return training.TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params))

    state = jax.eval_shape(init, variables)
    places = sharding.shardings_for(state, mesh, params=state.params)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )


def resized(images: jax.Array, size: Size) -> jax.Array:
    """Resizes images [B, H, W, C]; each pixel is the average of those that it covers."""
    if images.shape[1:3] == size:
        return images
    shape = (len(images), *size, images.shape[-1])
    return jax.image.resize(images, shape, "linear", antialias=True)
