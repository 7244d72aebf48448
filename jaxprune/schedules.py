"""Schedules over steps: the sparsity, and the fraction of weights that are dropped and regrown."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["cosine", "cubic", "mask_update_steps", "sparsity_at"]

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
        value = np.asarray(schedule(step))
    return float(str(value[()]))


def _progress(step: Any, start: int, stop: int) -> Any:
    """Returns the share of the window that has passed, between 0 and 1."""
    clip = jnp.clip if isinstance(step, jax.Array) else np.clip
    if start == stop:
        return clip(step - start + 1, 0, 1) * 1.0
    return clip((step - start) / (stop - start), 0.0, 1.0)
