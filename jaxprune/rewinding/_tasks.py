"""What the drivers need of a training, and what they say of each round."""

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
    """A training as functions, of any model and any loop.

    One step of `train` is one step of the schedule (behind `optax.MultiSteps`, one update).

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
        ...     description={"data": "digits", "batch": 128, "weight_decay": 1e-4},
        ... )
    """

    init: Callable[[int], Any]  # number of a round -> state before step 0
    # (state, step to start from, step to stop before, number of the round) -> state. Round 0 is
    # the dense training; the others should see the data in another order. May raise `Stopped`.
    train: Callable[[Any, int, int, int], Any]
    evaluate: Callable[[Any], float]  # state -> accuracy, or another score where more is better
    schedule: optax.Schedule  # step -> learning rate, the one in the optimizer
    steps: int  # length of the dense training
    # Everything else that decides the numbers: data, loss, batch size, weight decay, momentum. What
    # the three functions do cannot be seen, so results on disk count as those of this task if the
    # description, the schedule, `steps` and the state from `init(0)` are the same. Plain values and
    # arrays, by name.
    description: Mapping[str, Any] | str


class Stopped(Exception):
    """What `Task.train` raises to end before it is done; the driver saves the state and ends.

    The same call of the driver goes on from there. Of several processes all must raise it, after
    the same step.

    Args:
        state: as `train` would return it.
        step: `train` would go on with this one.

    Example:
        >>> Stopped(state={}, step=7).step
        7
    """

    def __init__(self, state: Any, step: int) -> None:
        """Keeps both as attributes."""
        super().__init__(f"stopped at step {step}")
        self.state, self.step = state, step


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

    # In units of `Task.evaluate`: a larger loss against the dense network is reported ...
    margin: float = 0.01
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


def keep_all(params: Any, sparsity: float, *, masks: Any) -> tuple[Any, Any]:
    """Prunes nothing."""
    del sparsity
    return params, masks


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
    if isinstance(state, dict):
        replaced = copy.copy(state)  # of the same kind and in the same order
        replaced.update(fields)
        return replaced
    if isinstance(state, Mapping):
        make: Any = type(state)
        return make({**state, **fields})
    if hasattr(state, "_replace"):
        return state._replace(**fields)
    return dataclasses.replace(state, **fields)


def checked_recipe(task: Task, recipe: Recipe) -> Recipe:
    """The recipe in Python integers; refuses what cannot be trained, before anything is."""
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
                f"training goes on to step {beyond}, past the {end} steps of the schedule, where "
                f"its rate must stay {last:g} but is {rate:g} at step {step}. Build the optimizer "
                "and the task with `rewinding.hold(schedule, steps)`."
            )
    return Recipe(source, start, steps)


def whole(name: str, value: Any) -> int:
    """A number of steps; refuses fractions and what is no number."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    raise ValueError(f"`{name}` must be a number of steps, but is {value!r}.")


def check_densities(densities: Sequence[float]) -> None:
    """Refuses densities that do not fall."""
    targets = [float(density) for density in densities]
    falling = all(a > b for a, b in zip([1.0, *targets], targets, strict=False))
    if not (targets and falling and targets[-1] > 0):
        raise ValueError(
            f"`densities` must fall from below 1 to above 0, but are {targets}. "
            "`rewinding.densities` gives those of the usual rounds."
        )


def density_of(masks: Any) -> float:
    """The kept fraction of all weights that have a mask."""
    own = [mask for mask in jax.tree.leaves(masks) if jnp.ndim(mask)]
    kept = sum(int(mask.sum(dtype=jnp.int32)) for mask in own)
    return kept / sum(mask.size for mask in own)
