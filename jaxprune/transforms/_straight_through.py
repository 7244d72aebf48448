"""Straight-through training: the model is sparse, but all weights are trained."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import budgets, patterns, schedules, scores, timetables, trees
from jaxprune.transforms._base import (
    check_line_search,
    checked,
    held_for,
    put_masks,
    split,
    timetable_once,
    update_masks,
    update_of,
    widened,
    zero_counters,
)


class StraightThroughState(NamedTuple):
    """The state of `straight_through_transform`.

    Example:
        >>> transform = straight_through_transform(0.5, stop=10)
        >>> state = transform.init({"kernel": jnp.ones((2, 2))})
        >>> state.dense["kernel"].tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """

    prune_step: jax.Array  # int32 [], number of optimizer updates so far
    mask_updates: jax.Array  # int32 [], number of mask updates done
    refused: jax.Array  # int32 [], due mask updates refused because a value was not finite
    masks: Any  # bool, like the parameters, True where a weight is used; only for pruned leaves
    timetable_mark: jax.Array  # int32 [], the mask update that the masks come from
    dense: Any  # like the pruned parameters: the values of all their weights, used or not


def straight_through_transform(
    sparsity: float | optax.Schedule,
    *,
    every: int = 1,
    start: int = 0,
    stop: int,
    score: scores.Score | None = None,
    budget: budgets.GivenBudget = None,
    pattern: patterns.PatternRule = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains dense weights through a sparse network, by straight-through gradients.

    Put it last in the chain. The parameters that the model sees are sparse at every step. The state
    holds the values of all weights, which receive every update as if the mask had the gradient 1.
    At a mask update the largest of them come into use, in that same step. Therefore a weight can
    come back with the value that it has learned.

    With `scores.magnitude` this is top-k; with `scores.random(seed)` the mask is random and does
    not depend on training. Differs from the usual form: weight decay in the optimizer sees only the
    parameters, so unused values do not decay.

    Args:
        sparsity: fraction of the prunable weights that are 0 from `stop` on, in [0, 1), reached
            along the cubic ramp; or an `optax.Schedule` from the step to that fraction, such as
            `optax.constant_schedule(0.8)`.
        every: steps between mask updates. 1 is usual; 10 or 100 is cheaper.
        start: step of the first mask update.
        stop: step of the last mask update; masks are fixed from then on.
        score: function `(weights, statistics) -> scores` of the dense values; statistics are
            None; None is `scores.magnitude`.
        budget: function `(shapes, sparsity) -> Budget`, or a dict of sparsities by the names of
            leaves, see `budgets.rule_of`; None is `budgets.erdos_renyi_kernel`. A global ranking
            may starve layers at high sparsity, because weights come back.
        pattern: None for single weights, or a pattern of `jaxprune.patterns`, or a function
            `(path, leaf) -> pattern`.
        prunable: which leaves are pruned, see `trees.prunable_flags`.
        stacked: which axes of a leaf number copies of a layer, see `trees.stacked_axes`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its `update` needs `params`.

    Raises:
        ValueError: as `magnitude_transform`.

    References:
        Bengio, Leonard and Courville, Estimating or propagating gradients through stochastic
        neurons, arXiv:1308.3432.
        Jayakumar et al., Top-KAST, arXiv:2106.03517 (top-k masks of dense weights).

    Example:
        >>> import jaxprune
        >>> optimizer = optax.chain(optax.sgd(1.0), straight_through_transform(0.5, stop=9))
        >>> params = {"kernel": jnp.array([[3.0, 2.0]])}
        >>> state = optimizer.init(params)
        >>> for _ in range(12):  # the second weight learns while it is hidden
        ...     gradients = {"kernel": jnp.array([[0.0, -1.0]])}
        ...     updates, state = optimizer.update(gradients, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params["kernel"].tolist()
        [[0.0, 14.0]]
    """
    every, start, stop, _ = checked("straight_through_transform", every, start, stop)
    score = scores.magnitude if score is None else score
    scores.check_score(score)
    steps = schedules.mask_update_steps(start, stop, every)
    sparsities = timetables.sparsities_at(sparsity, steps)
    rule = budgets.erdos_renyi_kernel if budget is None else budget
    timetable_for = timetable_once(steps, sparsities, budget=rule, pattern=pattern, stacked=stacked)

    def init_fn(params: optax.Params) -> StraightThroughState:
        flags = trees.prunable_flags(params, prunable, stacked)
        weights = trees.pick(params, flags)
        if not trees.is_placeholder(params):
            timetable_for(params, flags)  # a budget that cannot be met raises here
        return StraightThroughState(
            **zero_counters(),
            masks=put_masks(params, flags, [jnp.ones_like(w, dtype=bool) for w in weights]),
            dense=put_masks(params, flags, list(map(_copied, weights))),
        )

    @update_of(StraightThroughState)
    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        check_line_search(extra_args)
        params = trees.without_settings(params, updates)
        parts = split(updates, state.masks, params, prunable, stacked)
        timetable = timetable_for(params, parts.flags)
        values = held_for(state.dense, params, parts.flags)
        dense = [
            jnp.add(*widened(value, update)).astype(value.dtype)
            for value, update in zip(values, parts.updates, strict=True)
        ]

        def renew(index: jax.Array, masks: list[jax.Array], dense: Any) -> list[jax.Array]:
            del masks
            return timetables.select(timetable, index, score(dense, None))

        masks, counters = update_masks(timetable, state, parts.masks, dense, renew)
        moves = map(_move, parts.updates, masks, parts.weights, dense)
        state = StraightThroughState(
            **counters,
            masks=put_masks(params, parts.flags, masks),
            dense=put_masks(params, parts.flags, dense),
        )
        return trees.put(updates, parts.flags, list(moves)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _copied(weight: Any) -> Any:
    """Returns a copy of a weight; a shape remains one, as its values are not known."""
    return weight if isinstance(weight, jax.ShapeDtypeStruct) else jnp.array(weight)


def _move(update: jax.Array, mask: jax.Array, weight: jax.Array, dense: jax.Array) -> jax.Array:
    """Returns the update of one leaf: the given one, or one to the dense value, or one to 0."""
    update, weight, dense = widened(update, weight, dense)
    # A newly used weight is recognised by its value 0; reading the old mask would force a copy.
    return jnp.where(mask, jnp.where(weight == 0, dense, update), -weight)
