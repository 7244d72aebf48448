"""The step that the learning-rate schedule stands at, inside an optimizer state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

# States whose `count` is the step of a schedule: of `scale_by_schedule`, which every Optax
# optimizer uses for its learning rate, of `inject_hyperparams`, and of scheduled weight decay. The
# counts of Adam and its kin belong to their moments, which rewinding keeps: set back, they would
# scale the moments up.
_SCHEDULES = ("ScaleByScheduleState", "WrappedScheduleState", "WeightDecaySchedule")


def set_step(opt_state: Any, step: int) -> Any:
    """Puts the learning-rate schedule of an optimizer to a step; nothing else changes.

    Every schedule of Optax is set, wherever it sits: in a chain, in `inject_hyperparams`, behind
    `optax.masked`, `optax.partition` or `optax.MultiSteps` (there, a step is one that reaches the
    schedule). Optimizers of `optax.contrib` that count on their own are not known here.

    Args:
        opt_state: state of an Optax optimizer whose learning rate is a schedule.
        step: the next update uses the rate of this step.

    Returns:
        The state with the schedules at `step`; momentum and all else as it was.

    Raises:
        ValueError: if `step` is negative, or no schedule is in the state.

    Example:
        >>> optimizer = optax.sgd(optax.linear_schedule(1.0, 0.0, 10))
        >>> params = jnp.zeros(())
        >>> state = set_step(optimizer.init(params), 4)
        >>> update, state = optimizer.update(jnp.ones(()), state, params)
        >>> print(f"{update:.1f}")
        -0.6
    """
    if step < 0:
        raise ValueError(f"`step` must be at least 0, but is {step}.")
    if not steps_of(opt_state):
        raise ValueError(
            "`opt_state` holds no step of a learning-rate schedule, so there is nothing to rewind. "
            "Where the learning rate is a constant, give the optimizer a schedule, for example "
            "`optax.sgd(optax.piecewise_constant_schedule(0.1, {300: 0.1}))`."
        )

    # Not `optax.tree.set`: it does not look below a state that has a `count` of its own, such as
    # that of `inject_hyperparams` (optax 0.2.8).
    def at_step(node: Any) -> Any:
        return node._replace(count=jnp.full_like(node.count, step)) if _is_schedule(node) else node

    return jax.tree.map(at_step, opt_state, is_leaf=_is_schedule)


def steps_of(opt_state: Any) -> list[int]:
    """The steps at which the schedules of an optimizer state stand.

    Args:
        opt_state: state of an Optax optimizer.

    Returns:
        One for each schedule; empty if there is none.

    Example:
        >>> steps_of(optax.sgd(optax.linear_schedule(1.0, 0.0, 10)).init({}))
        [0]
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_schedule)
    return [int(node.count) for node in nodes if _is_schedule(node)]


def hold(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    """A schedule that stays at its last rate after the training that it was made for.

    Fine-tuning trains on at the last rate of the original run. Build the optimizer with the
    schedule that this returns, and training on past the end is just that.

    Args:
        schedule: step -> learning rate.
        steps: length of the training; the last step is `steps - 1`.

    Returns:
        The schedule up to there, then constant.

    Raises:
        ValueError: if `steps` is less than 1.

    Example:
        >>> schedule = hold(optax.linear_schedule(1.0, 0.0, 10), 10)
        >>> [round(float(schedule(step)), 1) for step in (0, 5, 9, 10, 99)]
        [1.0, 0.5, 0.1, 0.1, 0.1]
    """
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, but is {steps}.")
    return lambda step: schedule(jnp.minimum(step, steps - 1))


def _is_schedule(node: Any) -> bool:
    """Whether a node of an optimizer state is the state of a schedule."""
    return type(node).__name__ in _SCHEDULES
