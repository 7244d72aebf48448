"""Runs a compiled step up to a given step; calls hooks that log, test and save."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune import sharding
from jaxprune.sharding import check_batch, replicate
from jaxprune.training._steps import Metrics, TrainState, from_parts


class Hook(NamedTuple):
    """A function `call(step, state)` to call after every `every`-th step and after the last one.

    Example:
        >>> Hook(every=100, call=lambda step, state: print(step)).every
        100
    """

    every: int
    call: Callable[[int, TrainState], None]


def fit(
    state: TrainState,
    stop: int,
    run: Callable[..., tuple],
    data: Any,
    batches: Iterator[np.ndarray],
    key: jax.Array,
    mesh: Mesh,
    *,
    chunk: int = 1,
    log_every: int = 50,
    on_log: Callable[[int, TrainState, Metrics], None] | None = None,
    hooks: Sequence[Hook] = (),
    should_stop: Callable[[], bool] = lambda: False,
    is_pause: bool = False,
) -> TrainState:
    """Trains from the state's step to step `stop`; the host waits only when it logs.

    Chunks never cross a step at which a log or hook is due; the remaining steps run one by one.

    Args:
        state: the train state; it is donated, so use the returned one.
        stop: train until `state.step` equals this.
        run: from `make_chunk_step`.
        data: the training split, on the devices; or None.
        batches: yields int32 [batch] indices, all of them on each process; without `data` it yields
            this process's part of (images, labels).
        key: the run's random key.
        mesh: batches are split over its devices.
        chunk: steps per call; use 1 on CPU.
        log_every: steps between two calls of `on_log`.
        on_log: called with `(step, state, metrics)`. The metrics are means over the steps since the
            last call, and `seconds_per_step` and `images_per_second`, both without the time for
            compilation and hooks.
        hooks: called after `on_log`, in order.
        should_stop: called after each chunk; True ends the loop early.
        is_pause: whether training continues after `stop`, so that hooks are not called just
            because it is the last step.

    Returns:
        The new state.

    Raises:
        ValueError: if the batch does not divide by the number of devices.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from flax import nnx
        >>> from jaxprune import training
        >>> from jaxprune.data import Split
        >>> mesh, tx = sharding.make_mesh(), optax.sgd(0.1)
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> graphdef, state = training.create_state(model, tx, mesh)
        >>> step = training.make_train_step(graphdef, tx, lambda key, images: images / 255)
        >>> run = training.make_chunk_step(step, mesh)
        >>> split = Split(jnp.ones((9, 2)), jnp.zeros(9, jnp.int32))
        >>> batches = iter([np.zeros(8, np.int32)] * 7)
        >>> state = fit(state, 7, run, split, batches, jax.random.key(0), mesh)
        >>> int(state.step)
        7
    """
    split = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    key = replicate(key, mesh)
    periods = [log_every, *(hook.every for hook in hooks)]
    step, timed, pending, since, warm = int(state.step), 0, [], time.perf_counter(), set()
    while step < stop and not should_stop():
        due = min([stop, *((step // every + 1) * every for every in periods)])
        count = chunk if step + chunk <= due else 1
        rows = jax.tree.map(lambda *each: np.stack(each), *[next(batches) for _ in range(count)])
        size = jax.tree.leaves(rows)[0].shape[1] * (jax.process_count() if data is None else 1)
        check_batch(size, mesh)
        rows = from_parts(rows, split) if data is None else sharding.put(rows, split)
        state, metrics = run(state, data, rows, key)
        step += count
        pending.append(metrics)
        if count in warm:
            timed += count
        else:  # the first call of each length compiles: exclude it from the step time
            jax.block_until_ready(metrics)
            warm.add(count)
            timed, since = 0, time.perf_counter()
        if step % log_every == 0 or step == stop:
            fetched = jax.device_get(pending)
            means = {k: float(np.concatenate([m[k] for m in fetched]).mean()) for k in fetched[0]}
            if timed:
                means["seconds_per_step"] = (time.perf_counter() - since) / timed
                means["images_per_second"] = size / means["seconds_per_step"]
            if on_log is not None:
                on_log(step, state, means)
            pending, timed, since = [], 0, time.perf_counter()
        is_end = step == stop and not is_pause
        if called := [hook for hook in hooks if step % hook.every == 0 or is_end]:
            jax.block_until_ready(metrics)  # steps still running count as step time, not hook time
            begun = time.perf_counter()
            for hook in called:
                hook.call(step, state)
            since += time.perf_counter() - begun
    return state
