"""Gradual pruning: the sparsity rises, and pruned weights remain pruned."""

from typing import Any

import optax

from jaxprune import budgets, patterns, schedules, scores, timetables, trees
from jaxprune.transforms._base import checked, masking_transform


def gradual_transform(
    name: str,
    score: scores.Score,
    sparsity: float | optax.Schedule,
    *,
    every: int,
    start: int,
    stop: int,
    needs_gradient: bool = False,
    budget: budgets.GivenBudget,
    pattern: patterns.PatternRule,
    prunable: trees.Prunable,
    stacked: trees.Stacked,
) -> optax.GradientTransformationExtraArgs:
    """Drops the lowest scores among the kept weights, more of them at each mask update.

    Args:
        name: name of the public transformation, for errors.
        score: function `(weights, gradients) -> scores`.
        sparsity: final sparsity of the cubic ramp, or an `optax.Schedule` that does not fall.
        every: steps between mask updates.
        start: step of the first mask update.
        stop: step of the last mask update.
        needs_gradient: whether `score` reads gradients.
        budget: how many weights are kept.
        pattern: which weights are pruned together.
        prunable: which leaves are pruned.
        stacked: which axes number copies.

    Returns:
        An `optax.GradientTransformationExtraArgs`.
    """
    every, start, stop, _ = checked(name, every, start, stop)
    steps = schedules.mask_update_steps(start, stop, every)
    sparsities = timetables.sparsities_at(sparsity, steps)
    falls = [
        f"from {a} at step {s} to {b} at step {t}"
        for a, b, s, t in zip(sparsities, sparsities[1:], steps, steps[1:], strict=False)
        if b < a
    ]
    trees.raise_for(
        falls,
        f"`sparsity` must not fall, because {name} regrows no weight. Use `agip_transform` or "
        "`straight_through_transform`, or correct the schedule:",
    )

    def choose(
        timetable: timetables.Timetable, index: Any, masks: Any, weights: Any, gradients: Any
    ) -> Any:
        ranked, unmoved = score(weights, gradients), None
        if needs_gradient:
            ranked, unmoved = scores.rank_unmoved(ranked, weights, gradients, timetable.stacked)
        return timetables.renew(timetable, index, masks, ranked, unranked=unmoved)

    return masking_transform(
        steps,
        sparsities,
        choose,
        needs_gradient=needs_gradient,
        budget=budget,
        pattern=pattern,
        prunable=prunable,
        stacked=stacked,
    )
