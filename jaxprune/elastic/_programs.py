"""The compiled programs of elastic training: three for any number of sub-networks and phases."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune import data, kernels, sharding, training
from jaxprune.elastic._gates import Space

PyTree = Any
PARAMETERS = ("params", "transforms")  # the entries of variables that are trained


class Recipe(NamedTuple):
    """How a step is trained, in all phases alike.

    Example:
        >>> Recipe().momentum
        0.9
    """

    batch_size: int = 128
    learning_rate: float = 0.1  # peak for the full network
    momentum: float = 0.9  # of Nesterov's momentum; it starts at 0 in each phase
    weight_decay: float = 5e-4  # of arrays with two or more dimensions
    label_smoothing: float = 0.0
    distillation: float = 1.0  # weight of the loss that compares with the teacher
    pad: int = 2  # augmentation: images are shifted by up to this many pixels
    flip: bool = True  # augmentation: half of the images are mirrored


class State(NamedTuple):
    """What training changes, as a pytree that is checkpointed.

    Example:
        >>> State._fields
        ('step', 'params', 'state', 'opt_state')
    """

    step: jax.Array  # int32 [], number of steps over all phases
    params: PyTree  # dict with "params" and perhaps "transforms"
    state: PyTree  # dict of the rest, such as running statistics of the full network
    opt_state: PyTree


class Programs(NamedTuple):
    """Compiled functions of a training.

    Example:
        >>> Programs._fields[:2]
        ('place', 'prepare')
    """

    place: Callable[[PyTree, PyTree], State]  # (params, state) -> a state with a new optimizer
    prepare: Callable[..., tuple[jax.Array, jax.Array]]  # (row, step) -> (images, labels)
    teach: Callable[..., jax.Array]  # (params, state, images, pixels) -> logits
    # (sums, params, state, gates, images, labels, targets, weight, pixels) -> (sums, metrics, new)
    accumulate: Callable[..., tuple[PyTree, PyTree, PyTree]]
    zeros: Callable[[], PyTree]  # sums of no gradients
    # (state, sums, rate) -> (state, zeros)
    update: Callable[..., tuple[State, PyTree]]
    evaluate: Callable[..., dict[str, float]]  # (params, state, gates, split, pixels)
    # (variables, (gates, images)) -> (logits, updates); one object, which compiles once
    train: Callable[..., Any]


def make_programs(
    space: Space, dataset: data.Dataset, recipe: Recipe, mesh: Mesh, seed: int
) -> Programs:
    """Builds the programs of a training; each compiles at its first call.

    The gradient of one sub-network is a program, and its gates are data. The host calls it k times
    a step and adds up what it returns. So the number of sub-networks and of phases does not matter,
    and the activations of only one sub-network live at a time. With several resolutions there is
    one program for each of them.

    Args:
        space: the elastic network.
        dataset: its training images live on the devices.
        recipe: losses, augmentation and optimizer.
        mesh: batches are split over its devices.
        seed: of the augmentation.

    Returns:
        The `Programs`.

    Example:
        >>> from jaxprune.elastic import named
        >>> digits = data.load("digits")
        >>> mesh = sharding.make_mesh()
        >>> programs = make_programs(named("resnet8", image_size=8), digits, Recipe(), mesh, 0)
        >>> callable(programs.accumulate)
        True
    """
    assert space.train is not None, "checked by `train`"
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = sharding.batch_sharding(mesh)
    key = sharding.replicate(jax.random.key(seed), mesh)
    images_of = sharding.replicate(dataset.train, mesh)
    start = sharding.replicate(jnp.zeros((), jnp.int32), mesh)
    params, state = parts(space.variables)
    tx = optax.chain(
        optax.add_decayed_weights(
            recipe.weight_decay, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
        ),
        optax.trace(recipe.momentum, nesterov=True),
    )
    train = kernels.replace_depthwise(space.masked(space.train), mesh)
    evaluate = kernels.replace_depthwise(space.masked(space.evaluate), mesh)

    def make_state(params: PyTree, state: PyTree) -> State:
        params, state = jax.tree.map(jnp.copy, (params, state))
        return State(jnp.zeros((), jnp.int32), params, state, tx.init(params))

    shapes = jax.eval_shape(make_state, params, state)
    places = sharding.shardings_for(shapes, mesh, params=shapes.params)

    def prepare(split_images: data.Split, row: jax.Array, step: jax.Array) -> Any:
        row = jax.lax.with_sharding_constraint(row, split)
        own, labels = split_images.images[row], split_images.labels[row]
        own = jax.lax.with_sharding_constraint(own, split)
        own = data.augment(jax.random.fold_in(key, step), own, pad=recipe.pad, flip=recipe.flip)
        return data.normalize(own, dataset.mean, dataset.std), labels

    def teach(params: PyTree, state: PyTree, images: jax.Array, pixels: int | None) -> jax.Array:
        return train({**params, **state}, space.full(), resized(images, pixels))[0]

    def loss_of(
        params: PyTree,
        state: PyTree,
        gates: PyTree,
        images: jax.Array,
        labels: jax.Array,
        targets: jax.Array,
        weight: jax.Array,
    ) -> Any:
        logits, new = train({**params, **state}, gates, images)
        loss = training.cross_entropy(logits, labels, recipe.label_smoothing).mean()
        taught = training.distillation(logits, targets).mean()
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return loss + weight * taught, ({"loss": loss, "accuracy": accuracy}, new)

    def accumulate(
        sums: PyTree,
        params: PyTree,
        state: PyTree,
        gates: PyTree,
        images: jax.Array,
        labels: jax.Array,
        targets: jax.Array,
        weight: jax.Array,
        pixels: int | None,
    ) -> Any:
        images = resized(images, pixels)
        grads, (metrics, new) = jax.grad(loss_of, has_aux=True)(
            params, state, gates, images, labels, targets, weight
        )
        return jax.tree.map(jnp.add, sums, grads), metrics, {**state, **new}

    def update(own: State, sums: PyTree, rate: jax.Array) -> tuple[State, PyTree]:
        updates, opt_state = tx.update(sums, own.opt_state, own.params)
        params = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, own.params, updates)
        return State(own.step + 1, params, own.state, opt_state), jax.tree.map(jnp.zeros_like, sums)

    def apply(params: PyTree, state: PyTree, images: jax.Array) -> jax.Array:
        own, gates = params
        return evaluate({**own, **state}, gates, images)

    @functools.cache
    def tester(pixels: int | None) -> Any:
        def normal(images: jax.Array) -> jax.Array:
            return resized(data.normalize(images, dataset.mean, dataset.std), pixels)

        return training.make_evaluate(apply, normal, mesh)

    def test(
        params: PyTree, state: PyTree, gates: Any, own: data.Split, pixels: int | None
    ) -> dict[str, float]:
        whole = training.TrainState(start, (params, gates), state, ())
        return tester(pixels)(whole, own, 512)

    def measured(variables: PyTree, batch: tuple[Any, jax.Array]) -> tuple[jax.Array, PyTree]:
        logits, new = train(variables, *batch)
        return logits, jax.lax.with_sharding_constraint(new, everywhere)

    prepare = jax.jit(prepare, out_shardings=split)
    return Programs(
        place=jax.jit(make_state, out_shardings=places),
        prepare=functools.partial(prepare, images_of),
        teach=jax.jit(teach, static_argnums=3, out_shardings=split),
        accumulate=jax.jit(
            accumulate,
            static_argnums=8,
            donate_argnums=0,
            out_shardings=(places.params, everywhere, places.state),
        ),
        zeros=jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.params),
            out_shardings=places.params,
        ),
        update=jax.jit(update, donate_argnums=(0, 1), out_shardings=(places, places.params)),
        evaluate=test,
        train=measured,
    )


def parts(variables: Mapping[str, PyTree]) -> tuple[PyTree, PyTree]:
    """Splits variables into what is trained and the rest.

    Example:
        >>> parts({"params": 1, "model_state": 2})
        ({'params': 1}, {'model_state': 2})
    """
    own = {name: tree for name, tree in variables.items() if name in PARAMETERS}
    return own, {name: tree for name, tree in variables.items() if name not in PARAMETERS}


def resized(images: jax.Array, pixels: int | None) -> jax.Array:
    """Resizes images [B, H, W, C] to a height and width; each pixel averages those it covers.

    Example:
        >>> resized(jnp.ones((2, 8, 8, 1)), 6).shape
        (2, 6, 6, 1)
    """
    if pixels is None or images.shape[1:3] == (pixels, pixels):
        return images
    shape = (images.shape[0], pixels, pixels, images.shape[3])
    return jax.image.resize(images, shape, "linear", antialias=True)
