"""AGIP: adaptive gradient-informed pruning."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxprune import (
    budgets,
    counting,
    meshes,
    patterns,
    rates,
    schedules,
    scores,
    stats,
    timetables,
    trees,
)
from jaxprune.transforms._agip_channels import channel_transform
from jaxprune.transforms._base import (
    Arguments,
    check_line_search,
    checked,
    held_for,
    named_leaves,
    project,
    put_masks,
    raw_gradients,
    split,
    timetable_once,
    update_masks,
    update_of,
    warn_of_zeros,
    widened,
    zero_counters,
)


class AgipState(NamedTuple):
    """The state of `agip_transform`.

    Example:
        >>> state = agip_transform(0.5, stop=10).init({"kernel": jnp.ones((2, 2))})
        >>> int(state.mask_updates), state.masks["kernel"].shape
        (0, (2, 2))
    """

    prune_step: jax.Array  # int32 [], number of optimizer updates so far
    mask_updates: jax.Array  # int32 [], number of mask updates done
    refused: jax.Array  # int32 [], due mask updates refused because a value was not finite
    masks: Any  # bool, like the parameters, True where a weight is kept; only for pruned leaves
    timetable_mark: jax.Array  # int32 [], the mask update that the masks come from
    gradient_average: Any  # `dtype`, like the pruned parameters; () if `decay` is None
    densities: Any  # float32 [pruned leaves]; () without `rate`
    mean_statistics: Any  # float32 [pruned leaves]; () without `rate`


def agip_transform(
    sparsity: float | optax.Schedule,
    *,
    every: int = 100,
    start: int = 0,
    stop: int,
    decay: float | None = 0.99,
    dtype: Any = "float32",
    score: scores.Score | None = None,
    budget: budgets.GivenBudget = None,
    pattern: patterns.PatternRule = None,
    regrow: float = 0.0,
    rate: rates.RateRule | None = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
    groups: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes during training, by the recent size of each weight's gradient.

    Put it last in the chain. Every update of a pruned weight is replaced by the update that makes
    it exactly 0, whatever optimizer came before. There are four mechanisms, each of which can be
    switched separately:

    1. Mask updates at `start`, every `every` steps, and at `stop`. In between, the sparsity
       follows the cubic ramp of gradual pruning, or `sparsity` if that is a schedule.
    2. A statistic `S` of each weight's gradient: the bias-corrected exponential average of
       `|g|`. The weights with the lowest `score` are pruned; by default the score is `|w| * S`,
       the first-order change of the loss.
    3. Redistribution: leaves compete in one global ranking under `budget`, and a fraction
       `regrow` of the kept weights, falling to 0 along a cosine, is dropped and regrown where
       `S` is largest. Regrown weights start at 0.
    4. `rate` scales the updates of the kept weights.

    With `groups` it masks channels instead of weights, which `structure` can then remove: the masks
    are on the gates of each group (scales and biases of its norms, if it has any), and a channel
    may come back while it is only masked. The statistic is one number for each channel, the root of
    the average of `(sum of w g over its gates) ** 2`, and is its score. Channels are regrown where
    the root of the average squared gradient at the gates is largest. No single number is squared,
    so gradients of 1e-18 are ranked as gradients of 1 are. Everything else is as above; the state
    contains vectors only, and a step costs next to nothing.

    A masked channel right before a ReLU gets no gradient, because the slope of `jax.nn.relu` at 0
    is 0. It is ranked by what its average, or the momentum, remembers from before it was masked, so
    that of equal channels the one masked last comes back first.

    If all kept channels of a group have the score 0, their gates have not moved from 0 (AdaLN-zero)
    or no gradient reaches them; it does not mean that the channels are worthless. They are ranked
    by the gradients at the gates, or by the norms if these gradients are 0, scaled to the mean
    score of the channels of all other groups. `unranked` in the state counts such groups at the
    last mask update; `init` warns of gates that are all 0.

    A layer that has never moved, because its gradients or its weights are all 0, has no useful
    score either. It is ranked within itself, by `|w|` or by `S`, and keeps its share at the overall
    density. Frozen layers, positional tables and the zeros that LoRA starts from are therefore not
    pruned away.

    AGIP is known only from a news item, without a paper. This is our interpretation, not a
    reproduction. A gradient that is not finite never enters an average. If a mask update is due at
    such a step, the masks do not change and the update is made at the next step.

    Args:
        sparsity: fraction of the prunable weights that are 0 from `stop` on, in [0, 1); or an
            `optax.Schedule` from the step to that fraction, read only at mask updates.
        every: steps between mask updates.
        start: step (counted in optimizer updates, from 0) of the first mask update.
        stop: step of the last mask update; masks are fixed from then on.
        decay: the decay of the average, in [0, 1). None keeps no average and needs no state: in a
            `jaxprune.chain`, `S` is the momentum of the optimizer before this transformation (SGD's
            `trace`, Adam's or Lion's `mu`, exactly one for each leaf); elsewhere it is the incoming
            update.
        dtype: dtype of the average; bfloat16 only for a `decay` up to 0.99, because the steps of a
            slower average are too small for bfloat16.
        score: function `(params, statistics) -> scores`, see `jaxprune.scores`; None is
            `scores.taylor`. With `groups` it gets lists with one vector for each group, in the
            order of the groups: norms of the gates, and statistics; None is the statistic itself.
        budget: function `(shapes, sparsity) -> Budget`, or a dict of sparsities by the names of
            leaves, see `budgets.rule_of`; None is `budgets.global_budget(0.1)`: a global ranking in
            which every leaf keeps at least a tenth of its uniform budget. With `groups` it counts
            channels, every group keeps at least one, and None is `budgets.uniform`, so that the
            final widths are known in advance.
        pattern: None for single weights, or a pattern of `jaxprune.patterns`, or a function
            `(path, leaf) -> pattern`.
        regrow: fraction of the kept weights that is dropped and regrown at `start`, in [0, 1).
        rate: a rule of `jaxprune.rates`, or None for the rate of the optimizer.
        prunable: which leaves are pruned, see `trees.prunable_flags`; None is the default rule.
        stacked: which axes of a leaf number copies of a layer, see `trees.stacked_axes`.
        groups: groups of channels, from `structure.find_groups`; None prunes weights. With groups,
            `sparsity` is the fraction of the channels that are masked; `pattern`, `rate`,
            `prunable` and `stacked` must be None, and `dtype` is not used.

    Returns:
        An `optax.GradientTransformationExtraArgs`. Its `update` needs `params`, takes the raw
        gradient as the extra argument `grad` (`jaxprune.chain` passes it automatically; without it
        the incoming update is averaged) and ignores other extra arguments.

    Raises:
        ValueError: if an argument is out of range; from `init`, if `prunable` matches no leaf or
            a budget cannot be met; from `update`, if `params` is missing or has a different
            structure, or if with `decay=None` a leaf has no momentum or more than one.

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
    only_for_weights = options if groups is not None else {}
    arguments = _checked(every, start, stop, decay, dtype, regrow, only_for_weights)
    every, start, stop, fractions = arguments
    regrow = fractions["regrow"]
    if groups is not None:
        if not isinstance(groups, Mapping):
            raise ValueError(
                "`groups` must be the groups that `jaxprune.structure.find_groups(function, "
                f"params, *args)` returns, but is {groups!r}."
            )
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
    scores.check_score(score)
    if rate is not None:
        form = "(statistic, mean, density) -> factor"
        trees.check_function("rate", rate, form, "Write `rate=jaxprune.rates.by_density()`.")
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

    @update_of(AgipState)
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
        params = trees.without_settings(params, updates)
        flags, weights, moves, masks = split(updates, state.masks, params, prunable, stacked)
        timetable = timetable_for(params, flags)

        # Gradients -> statistics, at every step.
        gradients, faults = [], []
        if decay is None:
            average, statistics = (), moves
            if inner_state is not None:
                statistics = stats.first_moment(inner_state, named_leaves(params, flags))
        else:
            raw = raw_gradients(grad, params, flags)
            if raw is None:
                # The update is not a stored array, so passing it into the branch would write it to
                # memory at every step. One bit per weight (is it finite?) is passed instead.
                faults = [stats.faults(update) for update in moves]
            else:
                gradients = raw
            average = held_for(state.gradient_average, params, flags)
            average = stats.update_average(average, raw or moves, decay)
            statistics = average

        def scale() -> Any:  # not computed at steps that do not read it
            seen = jnp.asarray(optax.safe_increment(state.prune_step))
            return 1.0 if decay is None else stats.unbiasing(decay, seen)

        # Statistics -> masks, at a mask update.
        def renew(index: jax.Array, carry: Any, buffers: Any) -> Any:
            (masks, survivors), (statistics, weights, _) = carry, buffers
            scaled = stats.rescaled(statistics, scale(), timetable.stacked)
            growth = scores.gradient(None, scaled) if timetables.ever_grows(timetable) else None
            ranked, unmoved = scores.rank_unmoved(
                score(weights, scaled), weights, statistics, timetable.stacked
            )
            new = timetables.renew(timetable, index, masks, ranked, growth, unmoved)
            if rate is not None:
                survivors = _survivors(new, statistics, scale(), survivors)
            return new, survivors

        survivors = state.densities, state.mean_statistics
        (masks, survivors), counters = update_masks(
            timetable, state, (masks, survivors), (statistics, weights, gradients), renew, faults
        )
        densities, means = survivors

        # Masks -> updates, at every step.
        if rate is not None:
            factor = scale()
            statistics = [s.astype(jnp.float32) * factor for s in statistics]
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


def _survivors(
    masks: list[jax.Array], statistics: list[jax.Array], scale: Any, like: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns density and mean statistic of the kept weights, each float32 [pruned leaves]."""
    with counting.exact(masks):
        counts = counting.count_kept(masks).astype(jnp.float32)
    sizes = jnp.array([mask.size for mask in masks], jnp.float32)
    sums = [
        jnp.sum(jnp.where(mask, jnp.abs(s.astype(jnp.float32)), 0))
        for mask, s in zip(masks, statistics, strict=True)
    ]
    counts, sizes, sums = meshes.total((counts, sizes, jnp.stack(sums)), like)
    counts = jnp.maximum(counts, 1)
    return counts / sizes, scale * sums / counts


def _scale(update: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies an update by its factor, in the dtype of the update."""
    return (widened(update, factor)[0] * factor).astype(update.dtype)


def _checked(
    every: Any,
    start: Any,
    stop: Any,
    decay: Any,
    dtype: Any,
    regrow: Any,
    only_for_weights: Mapping[str, Any],
) -> Arguments:
    """Checks the arguments of `agip_transform`; raises one error for all problems."""
    problems: list[str] = [
        f"`{name}` applies to weights and must be None with `groups`, but is {value!r}"
        for name, value in only_for_weights.items()
        if value is not None
    ]
    # A traced decay is computed with, but cannot be compared.
    known = None if isinstance(decay, Tracer) else decay
    if known is not None and not 0 <= known < 1:
        problems.append(f"`decay` must lie in [0, 1) or be None, but is {decay!r}")
    if not _is_float(dtype):
        problems.append(f"`dtype` must be a floating-point type, but is {dtype!r}")
    elif known is not None and known > 0.99 and jnp.dtype(dtype) == jnp.bfloat16:
        problems.append(f"`dtype` bfloat16 allows a `decay` up to 0.99, but it is {decay!r}")
    return checked("agip_transform", every, start, stop, *problems, regrow=regrow)


def _is_float(dtype: Any) -> bool:
    """Returns whether an argument is a floating-point type."""
    if isinstance(dtype, jax.Array):
        return False
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False
