"""Trains, prunes, rewinds and trains again: fine-tuning, rewinding and lottery tickets as drivers.

A driver takes a `Task` (a training as functions), a workdir and densities. Its progress is on disk:
after a stop, the same call continues and ends with the same bits.

    task = rewinding.Task(init, train, evaluate, schedule, 10_000, description={"batch": 128})
    rounds = rewinding.rewind_learning_rate(task, "runs/a", rewinding.densities(8))

The optimizer of the task needs a learning-rate schedule and, last, a `fixed_mask_transform()`.
Checkpoints need Orbax (the extra `train`).
"""

from jaxprune.rewinding._drivers import (
    fine_tune,
    lottery_ticket,
    random_masks,
    reinitialize,
    retrain_dense,
    rewind_learning_rate,
    rewind_weights,
)
from jaxprune.rewinding._rounds import retrain, train_dense
from jaxprune.rewinding._stages import Options, Prune, read_round
from jaxprune.rewinding._steps import hold, set_step, steps_of
from jaxprune.rewinding._tasks import (
    Guard,
    Recipe,
    Round,
    Stopped,
    Task,
    densities,
    prune_globally,
)

__all__ = [
    "Guard",
    "Options",
    "Prune",
    "Recipe",
    "Round",
    "Stopped",
    "Task",
    "densities",
    "fine_tune",
    "hold",
    "lottery_ticket",
    "prune_globally",
    "random_masks",
    "read_round",
    "reinitialize",
    "retrain",
    "retrain_dense",
    "rewind_learning_rate",
    "rewind_weights",
    "set_step",
    "steps_of",
    "train_dense",
]
