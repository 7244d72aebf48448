"""The named ways to train a pruned network again; each is one recipe of `retrain`."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from jaxprune import budgets, one_shot, scores
from jaxprune.rewinding._rounds import retrain, rewound, run_rounds
from jaxprune.rewinding._stages import Options
from jaxprune.rewinding._tasks import Guard, Recipe, Round, Task, keep_all, whole

_GUARD = Guard()


def fine_tune(
    task: Task,
    workdir: str | Path,
    densities: Sequence[float],
    *,
    steps: int | None = None,
    **options: Unpack[Options],
) -> list[Round]:
    """Continues to train the pruned network at the last rate of the schedule.

    Args:
        task: the training. Its schedule must hold its last rate after the end; see `hold`.
        workdir: see `retrain`.
        densities: see `retrain`.
        steps: number of steps per round; default as many as the dense training.
        **options: see `Options`.

    Returns:
        See `retrain`.

    Raises:
        ValueError: see `retrain`.

    Example:
        >>> rounds = fine_tune(task, workdir, [0.5, 0.25], steps=5)
        >>> [one.total_steps for one in rounds]
        [20, 25, 30]
    """
    options.setdefault("name", "fine_tune")
    steps = task.steps if steps is None else steps
    return retrain(task, workdir, Recipe("trained", task.steps, steps), densities, **options)


def rewind_learning_rate(
    task: Task,
    workdir: str | Path,
    densities: Sequence[float],
    *,
    to: int = 0,
    guard: Guard | None = _GUARD,
    **options: Unpack[Options],
) -> list[Round]:
    """Trains the pruned network again with the rates of the dense training; keeps its weights.

    Momentum and statistics are kept too: only the step of the schedule changes. With `to=0`, a
    round costs as much as the dense training.

    Args:
        task: the training.
        workdir: see `retrain`.
        densities: see `retrain`.
        to: step to rewind the schedule to; it then runs to its end.
        guard: when to warn that this harms, and to rewind weights instead; None for never.
        **options: see `Options`.

    Returns:
        See `retrain`.

    Raises:
        ValueError: see `retrain`.

    References:
        Renda, Frankle and Carbin, Comparing rewinding and fine-tuning in neural network pruning,
        ICLR 2020, arXiv:2003.02389.

    Example:
        >>> rounds = rewind_learning_rate(task, workdir, [0.5, 0.25])
        >>> [one.density for one in rounds]
        [1.0, 0.5, 0.25]
    """
    options.setdefault("name", "rewind_learning_rate")
    recipe = _rate_rewound(task, to)
    return retrain(task, workdir, recipe, densities, guard=guard, **options)


def rewind_weights(
    task: Task,
    workdir: str | Path,
    densities: Sequence[float],
    *,
    to: int,
    **options: Unpack[Options],
) -> list[Round]:
    """Rewinds the kept weights to an early step and trains from there.

    The whole state of that step is restored: weights, momentum, statistics and the step of the
    schedule. A tenth of the training is a good choice; step 0 is clearly worse on large networks.

    Args:
        task: the training.
        workdir: see `retrain`. The dense training keeps a checkpoint of step `to`.
        densities: see `retrain`.
        to: step to rewind to.
        **options: see `Options`.

    Returns:
        See `retrain`.

    Raises:
        ValueError: see `retrain`.

    References:
        Frankle et al., Linear mode connectivity and the lottery ticket hypothesis, ICML 2020,
        arXiv:1912.05671; Renda et al., arXiv:2003.02389.

    Example:
        >>> rounds = rewind_weights(task, workdir, [0.5, 0.25], to=2)
        >>> [one.total_steps for one in rounds]
        [20, 38, 56]
    """
    options.setdefault("name", "rewind_weights")
    return retrain(task, workdir, rewound(task, whole("to", to)), densities, **options)


def lottery_ticket(
    task: Task,
    workdir: str | Path,
    densities: Sequence[float],
    **options: Unpack[Options],
) -> list[Round]:
    """Rewinds the kept weights to their initial values and trains them: a lottery ticket.

    This is `rewind_weights` with `to=0`.

    Args:
        task: the training.
        workdir: see `retrain`.
        densities: see `retrain`.
        **options: see `Options`.

    Returns:
        See `retrain`.

    Raises:
        ValueError: see `retrain`.

    References:
        Frankle and Carbin, The lottery ticket hypothesis, ICLR 2019, arXiv:1803.03635.

    Example:
        >>> rounds = lottery_ticket(task, workdir, [0.5, 0.25])
        >>> [one.steps for one in rounds]
        [20, 20, 20]
    """
    options.setdefault("name", "lottery_ticket")
    return rewind_weights(task, workdir, densities, to=0, **options)


def reinitialize(
    task: Task,
    workdir: str | Path,
    densities: Sequence[float],
    **options: Unpack[Options],
) -> list[Round]:
    """Trains the pruned network from new initial values: a control for the value of the weights.

    Args:
        task: the training; `init` called with the number of the round gives the new values.
        workdir: see `retrain`.
        densities: see `retrain`.
        **options: see `Options`.

    Returns:
        See `retrain`.

    Raises:
        ValueError: see `retrain`.

    Example:
        >>> rounds = reinitialize(task, workdir, [0.5, 0.25])
        >>> rounds[-1].density
        0.25
    """
    options.setdefault("name", "reinitialize")
    return retrain(task, workdir, Recipe("new", 0, task.steps), densities, **options)


def random_masks(
    task: Task,
    workdir: str | Path,
    densities: Sequence[float],
    *,
    to: int = 0,
    seed: int = 0,
    **options: Unpack[Options],
) -> list[Round]:
    """Prunes at random and rewinds the learning rate: a control for the value of the score.

    Args:
        task: the training.
        workdir: see `retrain`.
        densities: see `retrain`.
        to: step to rewind the schedule to.
        seed: seed of the random masks.
        **options: see `Options`.

    Returns:
        See `retrain`.

    Raises:
        ValueError: see `retrain`.

    Example:
        >>> rounds = random_masks(task, workdir, [0.5], seed=1)
        >>> rounds[-1].density
        0.5
    """
    options.setdefault("name", "random_masks")
    rule = {"score": scores.random(seed), "budget": budgets.global_budget(0)}
    options.setdefault("prune", functools.partial(one_shot.prune, **rule))
    return retrain(task, workdir, _rate_rewound(task, to), densities, **options)


def retrain_dense(
    task: Task,
    workdir: str | Path,
    rounds: int,
    *,
    to: int = 0,
    **options: Unpack[Options],
) -> list[Round]:
    """Rewinds the learning rate and prunes nothing: a control for the value of longer training.

    Args:
        task: the training.
        workdir: see `retrain`.
        rounds: number of rounds; they cost as much as those of `rewind_learning_rate`.
        to: step to rewind the schedule to.
        **options: see `Options`.

    Returns:
        See `retrain`; every density is 1.

    Raises:
        ValueError: see `retrain`.

    Example:
        >>> rounds = retrain_dense(task, workdir, rounds=2)
        >>> [one.density for one in rounds]
        [1.0, 1.0, 1.0]
    """
    options.setdefault("name", "retrain_dense")
    if whole("rounds", rounds) < 1:
        raise ValueError(f"`rounds` must be at least 1, but is {rounds}.")
    options["prune"] = keep_all
    recipe = _rate_rewound(task, to)
    return run_rounds(task, workdir, recipe, [1.0] * rounds, **options)


def _rate_rewound(task: Task, to: int) -> Recipe:
    """Makes the recipe of trained weights and the schedule from a step to its end."""
    return Recipe("trained", to, task.steps - whole("to", to))
