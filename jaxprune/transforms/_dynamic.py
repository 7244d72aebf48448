"""Dynamic sparse training: a fixed number of weights, some of which move at each mask update."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxprune import budgets, patterns, schedules, scores, timetables, trees
from jaxprune.transforms._base import check_window, masking_transform

# function (index of the mask update, weights, gradients) -> scores of what may grow
Growth = Callable[[jax.Array, list[jax.Array], Any], list[jax.Array]]


def dynamic_transform(
    name: str,
    growth: Growth,
    sparsity: float,
    *,
    every: int,
    start: int,
    stop: int,
    drop: float,
    seed: int,
    needs_gradient: bool,
    budget: budgets.BudgetRule | None,
    pattern: patterns.PatternRule,
    prunable: trees.Prunable,
    stacked: trees.Stacked,
) -> optax.GradientTransformationExtraArgs:
    """Starts from random masks, then drops by magnitude and grows by `growth`.

    Args:
        name: of the public transformation, for errors.
        growth: function `(index, weights, gradients) -> scores`.
        sparsity: as in `set_transform`, and all that follows.
        every: steps between mask updates.
        start: first mask update.
        stop: last mask update.
        drop: fraction of the kept weights that moves at `start`.
        seed: of the first masks.
        needs_gradient: whether `growth` reads gradients.
        budget: how many weights stay.
        pattern: which weights fall together.
        prunable: which leaves are pruned.
        stacked: which axes number copies.

    Returns:
        An `optax.GradientTransformationExtraArgs`.
    """
    check_window(
        name,
        every,
        start,
        stop,
        None if 0 <= sparsity < 1 else f"`sparsity` must lie in [0, 1), but is {sparsity!r}",
        None if 0 <= drop < 1 else f"`drop` must lie in [0, 1), but is {drop!r}",
    )
    steps = schedules.mask_update_steps(start, stop, every)
    fraction = schedules.cosine(drop, start, stop)

    def first(timetable: timetables.Timetable, weights: list[jax.Array]) -> list[jax.Array]:
        return timetables.select(timetable, 0, scores.random(seed)(weights, None))

    def choose(
        timetable: timetables.Timetable, index: Any, masks: Any, weights: Any, gradients: Any
    ) -> Any:
        grow = growth(index, weights, gradients)
        return timetables.renew(timetable, index, masks, scores.magnitude(weights), grow)

    return masking_transform(
        steps,
        [float(sparsity)] * len(steps),
        choose,
        moved=[fraction(step) for step in steps],
        first=first,
        needs_gradient=needs_gradient,
        budget=budgets.erdos_renyi_kernel if budget is None else budget,
        pattern=pattern,
        prunable=prunable,
        stacked=stacked,
    )
