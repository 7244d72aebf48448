"""The optimizer of a configuration: learning rate, SGD or AdamW, pruning, averaged parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxprune
from jaxprune import rewinding, training
from jaxprune.experiments.config import Config


def learning_rate(config: Config, steps: int) -> optax.Schedule:
    """Returns a linear warm-up, then what `schedule` names; the last rate holds after the end."""
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


def rewarmed(schedule: optax.Schedule, cut: int | None, steps: int) -> optax.Schedule:
    """Returns the schedule with a linear rise over `steps` steps from step `cut` on, if not 0."""
    if not cut or steps == 0:
        return schedule
    return lambda count: schedule(count) * jnp.clip((count - cut + 1) / steps, 0.0, 1.0)


def make_optimizer(
    config: Config, schedule: optax.Schedule, prune: optax.GradientTransformation | None
) -> optax.GradientTransformation:
    """Returns SGD or AdamW with weight decay on kernels, followed by pruning.

    The decay of SGD is part of its gradient, that of AdamW is not.
    """

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    transforms = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    decay = config.weight_decay
    if config.optimizer == "adamw":
        options: dict[str, Any] = {"b1": config.momentum, "b2": 0.95}
        transforms += [optax.adamw(schedule, weight_decay=decay, mask=kernels, **options)]
    else:
        transforms += [
            optax.add_decayed_weights(decay, mask=kernels),
            optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
        ]
    tx = jaxprune.chain(*transforms, *([] if prune is None else [prune]))
    return optax.chain(tx, training.average_parameters(config.ema)) if config.ema else tx
