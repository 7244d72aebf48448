"""When masks change, and how many weights each change keeps: tables of exact integers."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import budgets, schedules, trees


class Calendar(NamedTuple):
    """One entry for each mask update of a run; or one entry, read at a traced index."""

    total: Any  # int32 [entries], weights kept
    moved: Any  # int32 [entries], of these, dropped and regrown elsewhere
    floors: Any  # int32 [entries, pruned leaves], kept at least before regrowth


def make_calendar(
    shapes: Sequence[tuple[int, ...]],
    sparsities: Sequence[float],
    regrow: Sequence[float],
    budget: budgets.BudgetRule,
) -> Calendar:
    """Counts everything on the host, where integers are exact.

    Args:
        shapes: shapes of the pruned leaves.
        sparsities: sparsity after each mask update.
        regrow: fraction of the kept weights that each mask update moves.
        budget: how many weights each leaf keeps at a sparsity.

    Returns:
        A `Calendar`.
    """
    plan = [budget(shapes, sparsity) for sparsity in sparsities]
    total = np.array([entry.total for entry in plan], np.int64)
    floors = np.array([entry.floors for entry in plan], np.int64)
    moved = np.floor(total * np.asarray(regrow) + 0.5).astype(np.int64)
    size = sum(math.prod(shape) for shape in shapes)
    # Only weights that the last mask update left pruned can be regrown.
    moved = np.minimum(moved, size - np.concatenate([[size], total[:-1]]))
    # What is regrown may go to any leaf, so floors hold for the rest.
    floors = floors * (total - moved)[:, None] // np.maximum(total, 1)[:, None]
    return Calendar(*(table.astype(np.int32) for table in (total, moved, floors)))


def ever_grows(calendar: Calendar) -> bool:
    """Whether any entry brings weights back."""
    return bool(np.any(calendar.moved > 0) or np.any(np.diff(calendar.total) > 0))


def read_entry(calendar: Calendar, index: jax.Array) -> Calendar:
    """One entry, at a traced index."""
    return Calendar(*(jnp.asarray(table)[index] for table in calendar))


def entries_until(step: jax.Array, every: int, start: int, stop: int, count: int) -> jax.Array:
    """How many of the `count` entries lie at `step` or before it, int32 []."""
    passed = jnp.clip((step - start) // every + 1, 0, count - 1)
    return jnp.where(step >= stop, count, passed).astype(jnp.int32)


def sparsities_at(sparsity: float | Callable[[Any], Any], steps: Sequence[int]) -> list[float]:
    """Sparsity after each mask update: the cubic ramp to a number, or a schedule; checked."""
    schedule = sparsity
    if not callable(schedule):
        schedule = schedules.cubic(float(schedule), steps[0], steps[-1])
    values = [schedules.sparsity_at(schedule, step) for step in steps]
    bad = [f"{s} at step {t}" for t, s in zip(steps, values, strict=True) if not 0 <= s < 1]
    trees.raise_for(bad[-3:], "`sparsity`, a fraction of zeros, must lie in [0, 1), but is:")
    return values
