"""The contract of a training (`Task`), and the results of the drivers (`Round`)."""

import contextlib
import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import budgets, trees
from jaxprune.one_shot import prune


class Task(NamedTuple):
    """A training as functions, for any model and any loop.

    One step of `train` is one step of the schedule (inside `optax.MultiSteps`, one update).

    A state is a pytree with the fields `params` and `opt_state`: a NamedTuple such as
    `training.TrainState`, a dataclass such as Flax's `TrainState`, or a dict. The optimizer has a
    learning-rate schedule and a `fixed_mask_transform()`.

    All randomness must derive from the arguments, and two calls of `train` in a row must return the
    same as one call over all their steps. Then a run that was killed and continues ends with the
    same bits.

    Example:
        >>> schedule = optax.constant_schedule(0.1)
        >>> task = Task(
        ...     init=lambda number: make_state(seed=number),
        ...     train=lambda state, start, stop, number: my_loop(state, start, stop, seed=number),
        ...     evaluate=lambda state: accuracy(state),
        ...     schedule=schedule,
        ...     steps=10_000,
        ...     description={"data": "digits", "batch": 128, "weight_decay": 1e-4},
        ... )
    """

    init: Callable[[int], Any]  # number of a round -> state before step 0
    # (state, step to start from, step to stop before, number of the round) -> state. Round 0 is
    # the dense training; other rounds should use a different order of the data. May raise
    # `Stopped`.
    train: Callable[[Any, int, int, int], Any]
    evaluate: Callable[[Any], float]  # state -> accuracy, or a different score where more is better
    schedule: optax.Schedule  # step -> learning rate, the one in the optimizer
    steps: int  # length of the dense training
    # Name -> plain values and arrays, for everything else that decides the numbers: data, loss,
    # batch size, weight decay, momentum. The code of the three functions is not compared: results
    # on disk count as those of this task if the description, the schedule, `steps` and the state
    # from `init(0)` are the same.
    description: Mapping[str, Any] | str


class Stopped(Exception):
    """An exception that `Task.train` raises to stop early; the driver saves the state and stops.

    The same call of the driver continues from there. With several processes, all must raise it
    after the same step.

    Args:
        state: the state, as `train` would return it.
        step: the next step to train.

    Example:
        >>> Stopped(state={}, step=7).step
        7
    """

    def __init__(self, state: Any, step: int) -> None:
        """Keeps both as attributes."""
        super().__init__(f"stopped at step {step}")
        self.state, self.step = state, step


class Recipe(NamedTuple):
    """The way in which a pruned network is trained again.

    Example:
        >>> rewind_to_500 = Recipe(weights_from=500, schedule_from=500, steps=9_500)
    """

    # "trained": the trained state, momentum and statistics included; a step: the whole state of the
    # dense training at that step; "new": a new initialisation.
    weights_from: int | Literal["trained", "new"]
    schedule_from: int  # step of the schedule to start from; the last rate is held after its end
    steps: int  # number of steps to train


class Guard(NamedTuple):
    """The condition under which learning-rate rewinding counts as harmful, and what to do then.

    On wide networks it was found to lose accuracy even at low sparsity, where weight rewinding did
    not (arXiv:2109.09670).

    Example:
        >>> Guard(margin=0.005, weights_from=500).density
        0.5
    """

    # Warn if the score is lower than that of the dense network by more than this margin ...
    margin: float = 0.01
    density: float = 0.5  # ... in a round of at least this density
    weights_from: int | None = None  # then rewind weights to this step; None: only warn


class Round(NamedTuple):
    """One trained network.

    Example:
        >>> 1 / Round("fine_tune", 1, 0.8, 0.91, 600, 1200, 2_000_000).density
        1.25
    """

    method: str
    number: int  # 0 is the dense network
    density: float  # kept weights over all weights that the optimizer has masks for
    score: float  # result of `evaluate`
    steps: int  # steps of this round
    total_steps: int  # steps of all training up to this network, the dense training included
    checkpoint_bytes: int  # bytes of the arrays in the checkpoints kept at its end
    note: str = ""  # the warning of the guard


def densities(rounds: int, rate: float = 0.2) -> tuple[float, ...]:
    """Computes the density after each round if every round prunes the same fraction.

    Args:
        rounds: number of rounds.
        rate: fraction of the remaining weights that each round prunes, in (0, 1).

    Returns:
        `(1 - rate) ** n` for n from 1 to `rounds`.

    Raises:
        ValueError: if `rounds` is less than 1 or `rate` outside (0, 1).

    Example:
        >>> [round(density, 3) for density in densities(8)]
        [0.8, 0.64, 0.512, 0.41, 0.328, 0.262, 0.21, 0.168]
    """
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, but is {rounds}.")
    if not 0 < rate < 1:
        raise ValueError(f"`rate` must lie in (0, 1), but is {rate!r}.")
    return tuple((1 - rate) ** n for n in range(1, rounds + 1))


def prune_globally(params: Any, sparsity: float, *, masks: Any = None) -> tuple[Any, Any]:
    """Prunes by global magnitude without a floor, as the authors of rewinding do.

    Args:
        params: tree of arrays.
        sparsity: fraction of the prunable weights to set to zero, in [0, 1).
        masks: earlier masks; weights pruned in them remain pruned.

    Returns:
        The pruned parameters and the masks, as from `jaxprune.prune`.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, 0.5]])}
        >>> prune_globally(params, 0.5, masks={"kernel": True})[0]["kernel"].tolist()
        [[3.0, 0.0], [2.0, 0.0]]
    """
    return prune(params, sparsity, budget=budgets.global_budget(0), masks=masks)


def keep_all(params: Any, sparsity: float, *, masks: Any) -> tuple[Any, Any]:
    """Prunes nothing."""
    del sparsity
    return params, masks


def get(state: Any, name: str) -> Any:
    """Returns a field of a state."""
    if isinstance(state, Mapping) and name in state:
        return state[name]
    if not hasattr(state, name):
        raise ValueError(
            f"the state of a `Task` must have the fields `params` and `opt_state`, but "
            f"{type(state).__name__} has no `{name}`. Use `jaxprune.training.TrainState`, Flax's "
            "`TrainState`, any other NamedTuple or dataclass, or a dict."
        )
    return getattr(state, name)


def replace(state: Any, **fields: Any) -> Any:
    """Returns the state with some fields replaced."""
    if isinstance(state, dict):
        replaced = copy.copy(state)  # keeps the type of the dict and the order of its keys
        replaced.update(fields)
        return replaced
    if isinstance(state, Mapping):
        make: Any = type(state)
        return make({**state, **fields})
    if hasattr(state, "_replace"):
        return state._replace(**fields)
    return dataclasses.replace(state, **fields)


def checked_recipe(task: Task, recipe: Recipe) -> Recipe:
    """Returns the recipe in Python integers; raises before any training if it does not fit."""
    source, end = recipe.weights_from, operator.index(task.steps)
    if source not in ("trained", "new"):
        source = whole("weights_from", source)
    start, steps = whole("schedule_from", recipe.schedule_from), whole("steps", recipe.steps)
    problems = []
    if isinstance(source, int) and not 0 <= source <= end:
        problems.append(f"weights from step {source}: it has no such step")
    if not 0 <= start <= end:
        problems.append(f"schedule from step {start}: it has no such step")
    if steps < 1:
        problems.append(f"training for {steps} steps: must be at least 1")
    trees.raise_for(problems, f"the dense training has {end} steps, and this does not fit it:")
    last, beyond = jnp.asarray(task.schedule(end - 1)).item(), start + steps - 1
    for step in sorted({end, (end + beyond) // 2, beyond}):
        rate = jnp.asarray(task.schedule(step)).item()
        if beyond >= step >= end and rate != last:
            raise ValueError(
                f"training continues to step {beyond}, past the {end} steps of the schedule, where "
                f"its rate must remain {last:g} but is {rate:g} at step {step}. Build the "
                "optimizer and the task with `rewinding.hold(schedule, steps)`."
            )
    return Recipe(source, start, steps)


def whole(name: str, value: Any) -> int:
    """Returns a number of steps as an integer; raises for fractions and other values."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise ValueError(f"`{name}` must be a number of steps, but is {value!r}.")


def check_densities(densities: Sequence[float]) -> None:
    """Raises if densities do not decrease."""
    targets = [float(density) for density in densities]
    falling = all(a > b for a, b in zip([1.0, *targets], targets, strict=False))
    if not (targets and falling and targets[-1] > 0):
        raise ValueError(
            f"`densities` must decrease from below 1 to above 0, but are {targets}. "
            "`rewinding.densities` makes the usual ones."
        )


def density_of(masks: Any) -> float:
    """Computes the kept fraction of all weights that have a mask."""
    own = [mask for mask in jax.tree.leaves(masks) if jnp.ndim(mask)]
    kept = sum(int(mask.sum(dtype=jnp.int32)) for mask in own)
    return kept / sum(mask.size for mask in own)
