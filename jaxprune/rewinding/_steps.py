"""Reads and sets the step of the learning-rate schedule in an optimizer state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

# States whose `count` is the step of a schedule: those of `scale_by_schedule`, which every Optax
# optimizer uses for its learning rate, of `inject_hyperparams`, and of scheduled weight decay. The
# counts of Adam and its relatives belong to their moments, which rewinding keeps: setting them back
# would scale the moments up.
_SCHEDULES = ("ScaleByScheduleState", "WrappedScheduleState", "WeightDecaySchedule")


def set_step(opt_state: Any, step: int) -> Any:
    """Sets the learning-rate schedule of an optimizer to a step; nothing else changes.

    Every Optax schedule is set, wherever it is: in a chain, in `inject_hyperparams`, inside
    `optax.masked`, `optax.partition` or `optax.MultiSteps` (there, a step is one that reaches the
    schedule). Optimizers of `optax.contrib` with counters of their own are not recognised.

    Args:
        opt_state: state of an Optax optimizer whose learning rate is a schedule.
        step: the next update uses the rate of this step.

    Returns:
        The state with all schedules at `step`; momentum and the rest are unchanged.

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
            "If the learning rate is a constant, give the optimizer a schedule, for example "
            "`optax.sgd(optax.piecewise_constant_schedule(0.1, {300: 0.1}))`."
        )

    # `optax.tree.set` would not do: it does not look below a state that has a `count` itself, such
    # as that of `inject_hyperparams` (optax 0.2.8).
    def at_step(node: Any) -> Any:
        return node._replace(count=jnp.full_like(node.count, step)) if _is_schedule(node) else node

    return jax.tree.map(at_step, opt_state, is_leaf=_is_schedule)


def steps_of(opt_state: Any) -> list[int]:
    """Returns the steps at which the schedules of an optimizer state stand.

    Args:
        opt_state: state of an Optax optimizer.

    Returns:
        One step for each schedule; empty if there is none.

    Example:
        >>> steps_of(optax.sgd(optax.linear_schedule(1.0, 0.0, 10)).init({}))
        [0]
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_schedule)
    return [int(node.count) for node in nodes if _is_schedule(node)]


def hold(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    """Makes a schedule that holds its last rate after the end of the training.

    Fine-tuning continues at the last rate of the original run. Build the optimizer with the
    schedule that this returns: training past the last step then continues at the last rate.

    Args:
        schedule: step -> learning rate.
        steps: length of the training; the last step is `steps - 1`.

    Returns:
        The schedule up to the last step, then its last rate.

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
    """Tells whether a node of an optimizer state is the state of a schedule."""
    return type(node).__name__ in _SCHEDULES
