"""Schedules over steps: the sparsity, and the fraction of weights that are dropped and regrown."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = ["cosine", "cubic", "mask_update_steps", "number", "sparsity_at", "whole"]

Schedule = Callable[[Any], Any]


def cubic(final: float, start: int, stop: int, *, initial: float = 0.0) -> Schedule:
    """Makes the sparsity ramp of gradual pruning, which rises fast at first and slowly at the end.

    With the step `t`, the initial sparsity `s_i` and the final sparsity `s_f`,
    `s(t) = s_f + (s_i - s_f) * (1 - (t - start) / (stop - start)) ** 3` between `start` and
    `stop`; it is constant before and after.

    Args:
        final: sparsity from `stop` on.
        start: step at which the ramp leaves `initial`.
        stop: step at which it reaches `final`.
        initial: sparsity until `start`.

    Returns:
        An `optax.Schedule`. It maps a Python integer to a double, and an array to a float32 array.

    References:
        Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878.

    Example:
        >>> ramp = cubic(0.8, start=100, stop=200)
        >>> [round(float(ramp(step)), 3) for step in (0, 100, 150, 200, 999)]
        [0.0, 0.0, 0.7, 0.8, 0.8]
    """

    def schedule(step: Any) -> Any:
        left = (1 - _progress(step, start, stop)) ** 3
        return final * (1 - left) + initial * left

    return schedule


def cosine(initial: float, start: int, stop: int) -> Schedule:
    """Makes a fraction that falls from `initial` at `start` to 0 at `stop` along half a cosine.

    `f(t) = initial / 2 * (1 + cos(pi * (t - start) / (stop - start)))`, as in RigL.

    Args:
        initial: value until `start`.
        start: step at which the fall begins.
        stop: step from which the value is 0.

    Returns:
        An `optax.Schedule`.

    References:
        Evci et al., Rigging the lottery, arXiv:1911.11134.

    Example:
        >>> fraction = cosine(0.3, start=0, stop=100)
        >>> [round(float(fraction(step)), 3) for step in (0, 50, 100)]
        [0.3, 0.15, 0.0]
    """

    def schedule(step: Any) -> Any:
        cos = jnp.cos if isinstance(step, jax.Array) else math.cos
        return initial / 2 * (1 + cos(math.pi * _progress(step, start, stop)))

    return schedule


def mask_update_steps(start: int, stop: int, every: int) -> list[int]:
    """Lists the steps at which masks change: every `every` steps from `start`, and `stop`.

    Args:
        start: first step.
        stop: last step; it is always included, so that the target is reached.
        every: distance in steps.

    Returns:
        Ascending list of steps.

    Example:
        >>> mask_update_steps(0, 250, 100)
        [0, 100, 200, 250]
    """
    return [*range(start, stop, every), stop]


def sparsity_at(schedule: Schedule, step: int) -> float:
    """Evaluates a sparsity schedule on the host, as the decimal number that was meant.

    Optax schedules compute in float32, where 0.72 becomes 0.7200000286; the shortest decimal number
    with the same float32 value is 0.72 again.

    Args:
        schedule: an `optax.Schedule`.
        step: the step at which it is evaluated.

    Returns:
        A Python float.

    Example:
        >>> sparsity_at(lambda step: jnp.float32(0.72), 0)
        0.72
    """
    with jax.ensure_compile_time_eval():
        return number("sparsity", schedule(step))


def number(name: str, value: Any) -> float:
    """Returns an argument as the decimal number that was meant; an array may hold it.

    Args:
        name: name of the argument, for the error.
        value: a number, or an array with one.

    Returns:
        A Python float.

    Raises:
        ValueError: if the value is no single number, or is not known because it is traced.

    Example:
        >>> number("sparsity", jnp.float32(0.72)), number("sparsity", np.array([[0.5]])[0, 0])
        (0.72, 0.5)
    """
    if isinstance(value, Tracer):
        raise ValueError(
            f"`{name}` must be known before the first step, because weights are counted exactly, "
            "but it is traced; make the transformation outside of `jax.jit`, and name the argument "
            "in the `static_args` of `optax.inject_hyperparams`."
        )
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        kinds = jnp.integer, jnp.floating
        if jnp.ndim(value) == 0 and any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
            return float(str(np.asarray(value)[()]))
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise ValueError(f"`{name}` must be one number, but is {value!r}.")


def whole(name: str, value: Any) -> int:
    """Returns an argument as an integer; 1e5 and an array with one number are as good as 100000.

    Args:
        name: name of the argument, for the error.
        value: a whole number, or an array with one.

    Returns:
        A Python int.

    Raises:
        ValueError: if the value is no whole number, or is not known because it is traced.

    Example:
        >>> whole("stop", 1e5), whole("every", np.int64(100))
        (100000, 100)
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    meant = number(name, value)
    if not meant.is_integer():
        raise ValueError(f"`{name}` must be a whole number, but is {value!r}.")
    return int(meant)


def _progress(step: Any, start: int, stop: int) -> Any:
    """Returns the share of the window that has passed, between 0 and 1."""
    passed = step - start + 1.0 if start == stop else (step - start) / (stop - start)
    if isinstance(step, (jax.Array, np.ndarray)):
        return (jnp if isinstance(step, jax.Array) else np).clip(passed, 0.0, 1.0)
    return min(max(passed, 0.0), 1.0)  # a hundred times as fast for a Python number
