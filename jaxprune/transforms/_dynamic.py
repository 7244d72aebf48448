"""Dynamic sparse training: a fixed number of weights, some of which each mask update moves."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxprune import budgets, patterns, schedules, scores, timetables, trees
from jaxprune.transforms._base import checked, masking_transform

# function (index of the mask update, weights, gradients) -> scores by which weights are regrown
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
    budget: budgets.GivenBudget,
    pattern: patterns.PatternRule,
    prunable: trees.Prunable,
    stacked: trees.Stacked,
) -> optax.GradientTransformationExtraArgs:
    """Starts from random masks, then drops by magnitude and regrows by `growth`.

    Args:
        name: name of the public transformation, for errors.
        growth: function `(index, weights, gradients) -> scores`.
        sparsity: fraction of the prunable weights that are 0, in [0, 1).
        every: steps between mask updates.
        start: step of the first mask update.
        stop: step of the last mask update.
        drop: fraction of the kept weights that is dropped and regrown at `start`.
        seed: the seed of the initial masks.
        needs_gradient: whether `growth` reads gradients.
        budget: how many weights are kept.
        pattern: which weights are pruned together.
        prunable: which leaves are pruned.
        stacked: which axes number copies.

    Returns:
        An `optax.GradientTransformationExtraArgs`.
    """
    arguments = checked(name, every, start, stop, sparsity=sparsity, drop=drop)
    every, start, stop, fractions = arguments
    steps = schedules.mask_update_steps(start, stop, every)
    fraction = schedules.cosine(fractions["drop"], start, stop)

    def first(timetable: timetables.Timetable, weights: list[jax.Array]) -> list[jax.Array]:
        return timetables.select(timetable, 0, scores.random(seed)(weights, None))

    def choose(
        timetable: timetables.Timetable, index: Any, masks: Any, weights: Any, gradients: Any
    ) -> Any:
        grow = growth(index, weights, gradients)
        return timetables.renew(timetable, index, masks, scores.magnitude(weights), grow)

    return masking_transform(
        steps,
        [fractions["sparsity"]] * len(steps),
        choose,
        moved=[fraction(step) for step in steps],
        first=first,
        needs_gradient=needs_gradient,
        budget=budgets.erdos_renyi_kernel if budget is None else budget,
        pattern=pattern,
        prunable=prunable,
        stacked=stacked,
    )
