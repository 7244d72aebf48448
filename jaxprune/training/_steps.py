"""Builds the state of a training, its step, and its evaluation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune import sharding
from jaxprune.sharding import replicate
from jaxprune.training import _accumulation as accumulation
from jaxprune.training._teaching import distillation

PyTree = Any
Metrics = dict[str, float]


class TrainState(NamedTuple):
    """The values that a step changes, as a pytree that can be donated and checkpointed.

    Example:
        >>> TrainState._fields
        ('step', 'params', 'model_state', 'opt_state')
    """

    step: jax.Array  # int32 [], number of steps taken
    params: PyTree  # nested dict of the model's nnx.Param values
    model_state: PyTree  # nested dict of all other values, such as running statistics
    opt_state: PyTree  # holds masks and gradient statistics too


def create_state(
    model: nnx.Module, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits an NNX model into its structure and a train state at step 0.

    Args:
        model: the model; it is put into training mode. Its arrays are copied, so it remains usable.
        tx: the optimizer, pruning transformation included.
        mesh: devices for the state, placed as `sharding.shardings_for` says.

    Returns:
        `(graphdef, state)`; parameters and statistics are nested dicts of arrays.

    Example:
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> _, state = create_state(model, optax.sgd(0.1), sharding.make_mesh())
        >>> state.params["kernel"].shape
        (3, 2)
    """
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def init(params: PyTree, model_state: PyTree) -> TrainState:
        # Without the copies jit returns its inputs, and donating the state would delete the model.
        params, model_state = jax.tree.map(jnp.copy, (params, model_state))
        return TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params))

    values = replicate((nnx.to_pure_dict(params), nnx.to_pure_dict(rest)), mesh)
    shapes = jax.eval_shape(init, *values)
    places = sharding.shardings_for(shapes, mesh, params=shapes.params)
    return graphdef, jax.jit(init, out_shardings=places)(*values)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Computes the softmax cross-entropy of each label, with optional label smoothing.

    Args:
        logits: float [B, num_classes], or with more axes in the place of B.
        labels: integers [B], or with the same axes.
        smoothing: share of the target spread evenly over all classes, in [0, 1).

    Returns:
        float32, as `labels`, in nats.

    Example:
        >>> loss = cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
        >>> print(f"{loss[0]:.4f}")  # log 4
        1.3863
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def make_train_step(
    graphdef: nnx.GraphDef | Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]],
    tx: optax.GradientTransformation,
    prepare: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    label_smoothing: float = 0.0,
    parts: int = 1,
    remat: bool = False,
    teach: Callable[[PyTree, Any], jax.Array] | None = None,
    teacher_weight: float = 0.5,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Makes one step of gradient descent as a pure function, not yet jitted.

    The raw gradient is also passed to the optimizer as the extra argument `grad`, for pruning.

    Args:
        graphdef: from `create_state`; or a function `(params, model_state, inputs) -> (logits,
            new model_state)` to train instead of a module, such as a compacted one.
        tx: the optimizer that made the state.
        prepare: `(key, uint8 images [B, H, W, C]) -> float images`: augmentation and normalisation;
            or what else turns a batch into the inputs of the model, such as tokens [B, T].
        label_smoothing: see `cross_entropy`.
        parts: number of micro-batches that a batch is split into. More take less memory; batch
            statistics are then those of a micro-batch.
        remat: whether to keep only results of convolutions and matrix products for the backward
            pass. This takes less memory and a little more time. XLA:CPU undoes it.
        teach: `(teacher, inputs) -> logits` of a network in evaluation mode, which sees what the
            trained one sees. The loss is then `(1 - teacher_weight) * cross-entropy +
            teacher_weight * distillation`. The step takes `teacher`, any tree of arrays, as a
            keyword argument; it gets no gradient.
        teacher_weight: in [0, 1]; used only with `teach`.

    Returns:
        `step(state, images, labels, key, **given) -> (state, {"train_loss", "train_accuracy"})`,
        float32 scalars. There may be a label for each token: [B, T] for logits [B, T, C]. `key` is
        the run's key; the step folds its number into it. `given` are keyword arguments of a
        function in place of `graphdef`, such as the `indices` of `kernels.wrap`. It raises
        ValueError if `parts` does not divide the batch, and TypeError if `teacher` is missing.

    Raises:
        ValueError: if `teacher_weight` is out of range.

    References:
        Hinton, Vinyals, Dean. Distilling the knowledge in a neural network. arXiv:1503.02531.

    Example:
        >>> tx = optax.sgd(0.1)
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> graphdef, state = create_state(model, tx, sharding.make_mesh())
        >>> step = make_train_step(graphdef, tx, lambda key, images: images / 255)
        >>> batch = jnp.ones((4, 2)), jnp.zeros(4, jnp.int32)
        >>> state, metrics = jax.jit(step)(state, *batch, jax.random.key(0))
        >>> int(state.step), sorted(metrics)
        (1, ['train_accuracy', 'train_loss'])
    """
    if not 0 <= teacher_weight <= 1:
        raise ValueError(f"`teacher_weight` must lie in [0, 1], but is {teacher_weight!r}.")
    tx = optax.with_extra_args_support(tx)
    apply = graphdef if callable(graphdef) else partial(_train, graphdef)
    if remat:
        apply = jax.checkpoint(apply, policy=accumulation.is_product)

    def loss_fn(given: Any, teacher: Any, params: Any, model_state: Any, inputs: Any, labels: Any):
        logits, model_state = apply(params, model_state, inputs, **given)
        loss = cross_entropy(logits, labels, label_smoothing).mean()
        if teach is not None:
            taught = distillation(logits, teach(teacher, inputs)).mean()
            loss = (1 - teacher_weight) * loss + teacher_weight * taught
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return loss, ({"train_loss": loss, "train_accuracy": accuracy}, model_state)

    def step(state: TrainState, images: Any, labels: Any, key: jax.Array, **given: Any):
        if teach is not None and "teacher" not in given:
            raise TypeError("`teacher` is missing: pass what `teach` takes, `step(..., teacher=)`.")
        teacher = given.pop("teacher") if teach is not None else None
        inputs = prepare(jax.random.fold_in(key, state.step), images)
        grad = jax.grad(partial(loss_fn, given, teacher), has_aux=True)
        grad_fn = accumulation.over_parts(grad, parts)
        grads, (metrics, model_state) = grad_fn(state.params, state.model_state, inputs, labels)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, grad=grads)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, model_state, opt_state), metrics

    return step


def make_chunk_step(
    step: Callable[..., tuple], mesh: Mesh, places: PyTree = None
) -> Callable[..., tuple]:
    """Jits several steps as one call.

    Args:
        step: from `make_train_step`.
        mesh: batches are split over its devices.
        places: shardings of the state, from `sharding.shardings_for`; None replicates all of it.

    Returns:
        `run(state, data, rows, key, **given) -> (state, metrics)`. `given` are passed to the step.
        `data` has `images` [N, H, W, C] and
        `labels` [N] on the devices, and `rows` is int32 [steps, batch]; or `data` is None, and
        `rows` has images [steps, batch, ...] and labels. Each metric is float32 [steps]. `state` is
        donated. One row runs without `lax.scan`: on CPU a convolution in a loop is 12 times slower.

    Example:
        >>> from jaxprune.data import Split
        >>> mesh, tx = sharding.make_mesh(), optax.sgd(0.1)
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> graphdef, state = create_state(model, tx, mesh)
        >>> step = make_train_step(graphdef, tx, lambda key, images: images / 255)
        >>> run = make_chunk_step(step, mesh)
        >>> split = Split(jnp.ones((9, 2)), jnp.zeros(9, jnp.int32))
        >>> state, metrics = run(state, split, jnp.zeros((5, 8), jnp.int32), jax.random.key(0))
        >>> int(state.step), metrics["train_loss"].shape
        (5, (5,))
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def one(state: TrainState, data: Any, row: Any, key: jax.Array, given: Any):
        return step(state, *_batch(data, row, mesh), key, **given)

    def run(state: TrainState, data: Any, rows: Any, key: jax.Array, **given: Any):
        first = jax.tree.map(lambda x: x[0], rows)
        if len(jax.tree.leaves(rows)[0]) == 1:
            state, metrics = one(state, data, first, key, given)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda state, row: one(state, data, row, key, given), state, rows)

    out = everywhere if places is None else places, everywhere
    return jax.jit(run, donate_argnums=0, out_shardings=out)


def make_evaluate(
    graphdef: nnx.GraphDef | Callable[[PyTree, PyTree, jax.Array], jax.Array],
    prepare: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
) -> Callable[[TrainState, Any, int], Metrics]:
    """Makes a function for loss and accuracy over a whole split, exact for any number of examples.

    Args:
        graphdef: from `create_state`; or a function `(params, model_state, inputs) -> logits`.
        prepare: `uint8 images [B, H, W, C] -> float images`, normalisation only.
        mesh: batches are split over its devices.

    Returns:
        `evaluate(state, data, batch_size) -> {"test_loss", "test_accuracy"}`, Python floats. The
        last batch is padded with examples of weight 0, so splits of all sizes share one
        compilation. `data` may be a function that yields this process's part of (images, labels,
        valid).

    Example:
        >>> from jaxprune.data import Split
        >>> mesh = sharding.make_mesh()
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> graphdef, state = create_state(model, optax.sgd(0.1), mesh)
        >>> evaluate = make_evaluate(graphdef, lambda images: images / 255, mesh)
        >>> split = Split(jnp.zeros((9, 2)), jnp.zeros(9, jnp.int32))
        >>> evaluate(state, split, 8)["test_accuracy"]  # equal logits: the first class wins
        1.0
    """
    split_batch = sharding.batch_sharding(mesh)
    apply = graphdef if callable(graphdef) else partial(_evaluate, graphdef)

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def one(state: TrainState, data: Any, row: Any, valid: jax.Array):
        images, labels = _batch(data, row, mesh)
        logits = apply(state.params, state.model_state, prepare(images))
        valid = jnp.broadcast_to(jax.lax.expand_dims(valid, range(1, labels.ndim)), labels.shape)
        losses = jnp.where(valid, cross_entropy(logits, labels), 0.0)
        correct = jnp.sum(valid & (jnp.argmax(logits, -1) == labels), dtype=jnp.int32)
        return losses.sum(), correct, valid.sum(dtype=jnp.int32)

    def evaluate(state: TrainState, data: Any, batch_size: int) -> Metrics:
        state = state._replace(opt_state=())
        read: Any = data
        if callable(data):
            parts = (from_parts(batch, split_batch) for batch in read())
            sums = [one(state, None, (images, labels), valid) for images, labels, valid in parts]
        else:
            sums = []
            for first in range(0, len(data.labels), batch_size):
                indices = np.arange(first, first + batch_size, dtype=np.int32)
                valid = indices < len(data.labels)
                row = sharding.put((np.where(valid, indices, 0), valid), split_batch)
                sums.append(one(state, data, *row))
        loss, correct, count = np.asarray(jax.device_get(sums), np.float64).sum(0)
        return {"test_loss": float(loss / count), "test_accuracy": float(correct / count)}

    return evaluate


def _batch(data: Any, row: Any, mesh: Mesh) -> Any:
    """Returns images and labels, split over all devices."""
    split = sharding.batch_sharding(mesh)
    row = jax.lax.with_sharding_constraint(row, split)
    if data is None:
        return row
    return jax.lax.with_sharding_constraint((data.images[row], data.labels[row]), split)


def from_parts(tree: PyTree, where: NamedSharding) -> PyTree:
    """Makes global arrays of which each process holds its part."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), tree)


def _train(graphdef: nnx.GraphDef, params: PyTree, model_state: PyTree, inputs: jax.Array):
    """Computes logits and the new statistics in training mode."""
    model = nnx.merge(graphdef, params, model_state)
    return model(inputs), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))


def _evaluate(graphdef: nnx.GraphDef, params: PyTree, model_state: PyTree, inputs: jax.Array):
    """Computes logits in evaluation mode."""
    model = nnx.merge(graphdef, params, model_state)
    model.eval()
    return model(inputs)
