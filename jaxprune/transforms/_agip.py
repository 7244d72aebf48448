"""Adaptive gradient-informed pruning."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import budgets, counting, patterns, rates, schedules, scores, stats, timetables, trees
from jaxprune.transforms._agip_channels import channel_transform
from jaxprune.transforms._base import (
    check_line_search,
    check_window,
    held_for,
    project,
    put_masks,
    raw_gradients,
    split,
    timetable_once,
    update_masks,
    warn_of_zeros,
    zero_counters,
)


class AgipState(NamedTuple):
    """State of `agip_transform`.

    Example:
        >>> state = agip_transform(0.5, stop=10).init({"kernel": jnp.ones((2, 2))})
        >>> int(state.mask_updates), state.masks["kernel"].shape
        (0, (2, 2))
    """

    prune_step: jax.Array  # int32 [], optimizer updates seen
    mask_updates: jax.Array  # int32 [], mask updates that are done
    refused: jax.Array  # int32 [], steps at which a due mask update met something not finite
    masks: Any  # bool, like the parameters, True where a weight is kept; only of pruned leaves
    timetable_mark: jax.Array  # int32 [], the mask update that the masks come from
    gradient_average: Any  # `dtype`, like the pruned parameters; () without an own average
    densities: Any  # float32 [pruned leaves]; () without `rate`
    mean_statistics: Any  # float32 [pruned leaves]; () without `rate`


def agip_transform(
    sparsity: float | optax.Schedule,
    *,
    every: int = 100,
    start: int = 0,
    stop: int,
    decay: float | None = 0.99,
    dtype: Any = jnp.float32,
    score: scores.Score | None = None,
    budget: budgets.BudgetRule | None = None,
    pattern: patterns.PatternRule = None,
    regrow: float = 0.0,
    rate: rates.RateRule | None = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
    groups: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes while training, by what each weight's gradient has been lately.

    Put it last in the chain. Every update of a pruned weight is replaced by the one that makes
    it exactly 0, whatever optimizer came before. Four mechanisms, each with its own switch:

    1. Mask updates at `start`, every `every` steps, and at `stop`. In between the sparsity
       follows the cubic ramp of gradual pruning, or `sparsity` as a schedule.
    2. A statistic `S` of each weight's gradient: the bias-corrected exponential average of
       `|g|`. The weights with the lowest `score` go; by default `|w| * S`, the first-order
       change of the loss.
    3. Redistribution: leaves compete in one global ranking under `budget`, and a fraction
       `regrow` of the kept weights, falling to 0 along a cosine, is dropped and regrown where
       `S` is largest. Regrown weights start at 0.
    4. `rate` scales the updates of the survivors.

    With `groups` it switches channels off instead of weights, for `structure` to remove: the
    masks lie on the gates of each group (scales and biases of its norms, if it has any), and a
    channel may come back while it is only masked. The statistic is one number for each channel,
    the root of the average of `(sum of w g over its gates) ** 2`, and is its score. Regrowth goes
    where the root of the average squared gradient at the gates is largest. No square is taken of a
    single number, so gradients of 1e-18 rank as gradients of 1 do. Everything else is as above;
    the state has vectors only, and a step costs next to nothing.

    A group whose kept channels all score 0 has gates that have not moved from 0 (AdaLN-zero) or
    that no gradient reaches, and not channels without worth. They are ranked by the gradients at
    the gates, or if these are 0 by the norms, scaled to the mean score of the channels of all
    other groups. `unranked` in the state counts such groups at the last mask update; `init` warns
    of gates that are all 0.

    A layer that has never moved, because its gradients or its weights are all 0, has no such score.
    It is ranked within itself, by `|w|` or by `S`, and keeps its share at the density of the whole:
    frozen layers, positional tables and the zeros that LoRA starts from are not cut to nothing.

    AGIP is known from a news item only, with no paper behind it. This is our reading of it,
    not a reproduction. A gradient that is not finite never enters an average, and a mask
    update due at such a step leaves the masks as they are and is made up for at the next.

    Args:
        sparsity: fraction of the prunable weights that are 0 from `stop` on, in [0, 1); or an
            `optax.Schedule` from the step to that fraction, read at the mask updates only.
        every: steps between mask updates.
        start: step (counted in optimizer updates, from 0) of the first mask update.
        stop: step of the last mask update; masks are fixed from then on.
        decay: of the average, in [0, 1). None keeps no average and costs no state: `S` is the
            momentum of the optimizer before this transformation (SGD's `trace`, Adam's or Lion's
            `mu`, exactly one for each leaf) in a `jaxprune.chain`, the incoming update elsewhere.
        dtype: of the average; bfloat16 only for a `decay` up to 0.99, beyond which its steps
            are too small for bfloat16 to register.
        score: function `(params, statistics) -> scores`, see `jaxprune.scores`; None is
            `scores.taylor`. With `groups` it gets lists with a vector for each group, in the
            order of the groups: norms of the gates, and statistics; None is the statistic itself.
        budget: function `(shapes, sparsity) -> Budget`; None is
            `budgets.global_budget(0.1)`: a global ranking in which every leaf keeps at least a
            tenth of its uniform budget. With `groups` it counts channels, every group keeps at
            least one, and None is `budgets.uniform`, by which the final widths are known before.
        pattern: None for single weights, or a pattern of `jaxprune.patterns`, or a function
            `(path, leaf) -> pattern`.
        regrow: fraction of the kept weights that moves at `start`, in [0, 1).
        rate: a rule of `jaxprune.rates`, or None for the rate of the optimizer.
        prunable: which leaves are pruned, see `trees.prunable_flags`; None is the default rule.
        stacked: which axes of a leaf number copies of a layer, see `trees.stacked_axes`.
        groups: of channels, from `structure.find_groups`; None prunes weights. `sparsity` is
            then the fraction of the channels that are off; `pattern`, `rate`, `prunable`, `stacked`
            and `dtype` have no meaning.

    Returns:
        An `optax.GradientTransformationExtraArgs`. Its `update` needs `params`, takes the raw
        gradient as the extra argument `grad` (`jaxprune.chain` passes it by itself; without it
        the incoming update is averaged) and ignores other extra arguments.

    Raises:
        ValueError: if an argument is out of range; from `init`, if `prunable` matches nothing or
            a budget cannot be met; from `update`, if `params` is missing or of another structure,
            or `decay=None` meets a leaf with no momentum or with two.

    Warns:
        UserWarning: from `init`, unless traced, if a pruned leaf, or all gates of a group, are 0.

    References:
        Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878 (the ramp).
        Molchanov et al., Importance estimation for neural network pruning, arXiv:1906.10771.
        Evci et al., Rigging the lottery, arXiv:1911.11134 (regrowth by gradient).

    Example:
        >>> import jaxprune
        >>> optimizer = jaxprune.chain(
        ...     optax.sgd(0.1, momentum=0.9), jaxprune.agip_transform(0.75, every=2, stop=4))
        >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
        >>> state = optimizer.init(params)
        >>> for _ in range(5):
        ...     gradients = {"kernel": jnp.ones((2, 4))}
        ...     updates, state = optimizer.update(gradients, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> jaxprune.get_masks(state)["kernel"].tolist()
        [[False, False, False, False], [False, False, True, True]]
    """
    options = {"pattern": pattern, "rate": rate, "prunable": prunable, "stacked": stacked}
    _check(every, start, stop, decay, dtype, regrow, options if groups is not None else {})
    if groups is not None:
        return channel_transform(
            sparsity,
            groups,
            every=every,
            start=start,
            stop=stop,
            decay=decay,
            score=score,
            budget=budget,
            regrow=regrow,
        )
    score = scores.taylor if score is None else score
    steps = schedules.mask_update_steps(start, stop, every)
    sparsities = timetables.sparsities_at(sparsity, steps)
    fraction = schedules.cosine(regrow, start, stop)
    moved = [fraction(step) for step in steps]
    timetable_for = timetable_once(
        steps, sparsities, moved=moved, budget=budget, pattern=pattern, stacked=stacked
    )

    def init_fn(params: optax.Params) -> AgipState:
        flags = trees.prunable_flags(params, prunable, stacked)
        pruned = trees.pick(params, flags)
        if pruned:
            timetable_for(params, flags)  # a budget that cannot be met raises here
            warn_of_zeros(params, flags)
        zeros = [jnp.zeros_like(leaf, dtype=dtype) for leaf in pruned]
        return AgipState(
            **zero_counters(),
            masks=put_masks(params, flags, [jnp.ones_like(p, dtype=bool) for p in pruned]),
            gradient_average=() if decay is None else put_masks(params, flags, zeros),
            densities=() if rate is None else jnp.ones(len(pruned), jnp.float32),
            mean_statistics=() if rate is None else jnp.ones(len(pruned), jnp.float32),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates | None = None,
        inner_state: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        check_line_search(extra_args, inner_state)
        flags, weights, moves, masks = split(updates, state.masks, params, prunable, stacked)
        timetable = timetable_for(params, flags)

        # Gradients -> statistics.
        gradients, faults = [], []
        if decay is None:
            average, statistics = (), moves
            if inner_state is not None:
                paths = trees.pick(list(trees.leaf_by_path(params)), flags)
                statistics = stats.first_moment(inner_state, paths)
        else:
            raw = raw_gradients(grad, params, flags)
            if raw is None:
                # Updates are computed: as operands of the branch they would be written to memory
                # at every step. Their faults take a bit each.
                faults = [stats.faults(update) for update in moves]
            else:
                gradients = raw
            average = held_for(state.gradient_average, params, flags)
            average = stats.update_average(average, raw or moves, decay)
            statistics = average

        def settled(statistics: list[jax.Array]) -> list[jax.Array]:
            seen = state.prune_step + 1
            return statistics if decay is None else stats.unbias(statistics, decay, seen)

        # Statistics -> masks, at a mask update.
        def renew(index: jax.Array, carry: Any, buffers: Any) -> Any:
            (masks, survivors), (statistics, weights, _) = carry, buffers
            statistics = settled(statistics)
            scaled = stats.rescaled(statistics)
            growth = scores.gradient(None, scaled) if timetables.ever_grows(timetable) else None
            ranked, unmoved = scores.rank_unmoved(
                score(weights, scaled), weights, scaled, timetable.stacked
            )
            new = timetables.renew(timetable, index, masks, ranked, growth, unmoved)
            return new, _survivors(new, statistics) if rate is not None else survivors

        survivors = state.densities, state.mean_statistics
        (masks, survivors), counters = update_masks(
            timetable, state, (masks, survivors), (statistics, weights, gradients), renew, faults
        )
        densities, means = survivors

        # Masks -> updates.
        if rate is not None:
            statistics = settled(statistics)
            factors = [rate(*leaf) for leaf in zip(statistics, means, densities, strict=True)]
            moves = [_scale(u, factor) for u, factor in zip(moves, factors, strict=True)]
        moves = list(map(project, moves, masks, weights))
        return trees.put(updates, flags, moves), AgipState(
            **counters,
            masks=put_masks(params, flags, masks),
            gradient_average=() if decay is None else put_masks(params, flags, average),
            densities=densities,
            mean_statistics=means,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _survivors(masks: list[jax.Array], statistics: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Density and mean statistic of the kept weights, each float32 [pruned leaves]."""
    with counting.exact(masks):
        counts = jnp.maximum(counting.count_kept(masks).astype(jnp.float32), 1)
    sizes = jnp.array([mask.size for mask in masks], jnp.float32)
    sums = [
        jnp.sum(jnp.where(mask, jnp.abs(s.astype(jnp.float32)), 0))
        for mask, s in zip(masks, statistics, strict=True)
    ]
    return counts / sizes, jnp.stack(sums) / counts


def _scale(update: jax.Array, factor: jax.Array) -> jax.Array:
    """The update times its rate, in the dtype of the update."""
    return (update * factor).astype(update.dtype)


def _check(
    every: int,
    start: int,
    stop: int,
    decay: float | None,
    dtype: Any,
    regrow: float,
    only_for_weights: Mapping[str, Any],
) -> None:
    """Static checks of the arguments of `agip_transform`, raised together."""
    problems: list[str] = [
        f"`{name}` is of weights and must be None with `groups`, but is {value!r}"
        for name, value in only_for_weights.items()
        if value is not None
    ]
    if decay is not None and not 0 <= decay < 1:
        problems.append(f"`decay` must lie in [0, 1) or be None, but is {decay!r}")
    if not jnp.issubdtype(dtype, jnp.floating):
        problems.append(f"`dtype` must be a floating-point type, but is {dtype!r}")
    elif decay is not None and decay > 0.99 and jnp.dtype(dtype) == jnp.bfloat16:
        problems.append(f"`dtype` bfloat16 allows a `decay` up to 0.99, but it is {decay!r}")
    if not 0 <= regrow < 1:
        problems.append(f"`regrow` must lie in [0, 1), but is {regrow!r}")
    check_window("agip_transform", every, start, stop, *problems)
