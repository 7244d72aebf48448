"""What the drivers need of a training, and what they say of each round."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import budgets, trees
from jaxprune.masks import prune


class Task(NamedTuple):
    """A training as functions, of any model and any loop.

    A state is a pytree with the fields `params` and `opt_state`: a NamedTuple such as
    `training.TrainState`, a dataclass such as Flax's `TrainState`, or a dict. The optimizer has a
    learning-rate schedule and a `fixed_mask_transform()`.

    All randomness must derive from the arguments, and two calls of `train` in a row must give what
    one call over all their steps gives: then a run that was killed ends with the same bits.

    Example:
        >>> schedule = optax.constant_schedule(0.1)
        >>> task = Task(
        ...     init=lambda number: make_state(seed=number),
        ...     train=lambda state, start, stop, number: my_loop(state, start, stop, seed=number),
        ...     evaluate=lambda state: accuracy(state),
        ...     schedule=schedule,
        ...     steps=10_000,
        ... )
    """

    init: Callable[[int], Any]  # number of a round -> state before step 0
    # (state, step to start from, step to stop before, number of the round) -> state. Round 0 is
    # the dense training; the others should see the data in another order.
    train: Callable[[Any, int, int, int], Any]
    evaluate: Callable[[Any], float]  # state -> accuracy, or another score where more is better
    schedule: optax.Schedule  # step -> learning rate, the one in the optimizer
    steps: int  # length of the dense training


class Recipe(NamedTuple):
    """How a pruned network is trained again.

    Example:
        >>> rewind_to_500 = Recipe(weights_from=500, schedule_from=500, steps=9_500)
    """

    # "trained": as they are, momentum and statistics included; a step: the whole state of the dense
    # training then; "new": a fresh initialisation.
    weights_from: int | Literal["trained", "new"]
    schedule_from: int  # step of the schedule to begin with; the last rate is held after the end
    steps: int  # how long


class Guard(NamedTuple):
    """When learning-rate rewinding counts as harmful, and what to do then.

    On wide networks it was seen to lose accuracy at low sparsity already, where weight rewinding
    did not (arXiv:2109.09670).

    Example:
        >>> Guard(margin=0.005, weights_from=500).density
        0.5
    """

    margin: float = 0.01  # a larger loss against the dense network is reported ...
    density: float = 0.5  # ... in rounds of at least this density
    weights_from: int | None = None  # None: go on; a step: rewind the weights to it from there on


class Round(NamedTuple):
    """One trained network.

    Example:
        >>> 1 / Round("fine_tune", 1, 0.8, 0.91, 600, 1200, 2_000_000).density
        1.25
    """

    method: str
    number: int  # 0 is the dense network
    density: float  # kept weights over all weights that the optimizer has masks for
    score: float  # what `evaluate` says
    steps: int  # of this round
    total_steps: int  # of all training that led here, the dense one included
    checkpoint_bytes: int  # on disk, of the checkpoints that were kept when it was done
    note: str = ""  # what the guard said


def densities(rounds: int, rate: float = 0.2) -> tuple[float, ...]:
    """What is left after each round that prunes the same fraction of the remaining weights.

    Args:
        rounds: how many.
        rate: fraction of the remaining weights that one round prunes, in (0, 1).

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
    """Global magnitude pruning without a floor, as by the authors of rewinding.

    Args:
        params: tree of arrays.
        sparsity: fraction of the prunable weights to set to zero, in [0, 1).
        masks: what was pruned before and stays pruned.

    Returns:
        The pruned parameters and the masks, as `jaxprune.prune`.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, 0.5]])}
        >>> prune_globally(params, 0.5, masks={"kernel": True})[0]["kernel"].tolist()
        [[3.0, 0.0], [2.0, 0.0]]
    """
    return prune(params, sparsity, budget=budgets.global_budget(0), masks=masks)


def get(state: Any, name: str) -> Any:
    """A field of a state."""
    if isinstance(state, Mapping) and name in state:
        return state[name]
    if not hasattr(state, name):
        raise ValueError(
            f"the state of a `Task` must have the fields `params` and `opt_state`, but "
            f"{type(state).__name__} has no `{name}`. Use `jaxprune.training.TrainState`, Flax's "
            "`TrainState`, another NamedTuple or dataclass, or a dict."
        )
    return getattr(state, name)


def replace(state: Any, **fields: Any) -> Any:
    """The state with other fields."""
    if isinstance(state, Mapping):
        return {**state, **fields}
    if hasattr(state, "_replace"):
        return state._replace(**fields)
    return dataclasses.replace(state, **fields)


def check_recipe(task: Task, recipe: Recipe) -> None:
    """Refuses what cannot be trained, before anything is."""
    end, start = task.steps, recipe.schedule_from
    problems = []
    if isinstance(recipe.weights_from, int) and not 0 <= recipe.weights_from <= end:
        problems.append(f"weights from step {recipe.weights_from}: it has no such step")
    if not 0 <= start <= end:
        problems.append(f"schedule from step {start}: it has no such step")
    if recipe.steps < 1:
        problems.append(f"training for {recipe.steps} steps: must be at least 1")
    trees.raise_for(problems, f"the dense training has {end} steps, and this does not fit it:")
    last = start + recipe.steps - 1
    rates = [jnp.asarray(task.schedule(step)).item() for step in (end - 1, max(last, end - 1))]
    if rates[0] != rates[1]:
        raise ValueError(
            f"training goes on to step {last}, past the {end} steps of the schedule, where its "
            f"rate must stay {rates[0]:g} but is {rates[1]:g}. Build the optimizer and the task "
            "with `rewinding.hold(schedule, steps)`."
        )


def check_densities(densities: Sequence[float]) -> None:
    """Refuses densities that do not fall."""
    falling = all(a > b for a, b in zip([1.0, *densities], densities, strict=False))
    if not (densities and falling and densities[-1] > 0):
        raise ValueError(
            f"`densities` must fall from below 1 to above 0, but are {list(densities)}. "
            "`rewinding.densities` gives those of the usual rounds."
        )


def density_of(masks: Any) -> float:
    """The kept fraction of all weights that have a mask."""
    own = [mask for mask in jax.tree.leaves(masks) if jnp.ndim(mask)]
    kept = sum(int(mask.sum(dtype=jnp.int32)) for mask in own)
    return kept / sum(mask.size for mask in own)
