"""Adaptive gradient-informed pruning."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import budgets, rates, schedules, scores, selection, stats, trees
from jaxprune.transforms._calendar import (
    Calendar,
    entries_until,
    ever_grows,
    make_calendar,
    read_entry,
    sparsities_at,
)


class AgipState(NamedTuple):
    """State of `agip_transform`.

    Example:
        >>> state = agip_transform(0.5, stop=10).init({"kernel": jnp.ones((2, 2))})
        >>> int(state.mask_updates), state.masks["kernel"].shape
        (0, (2, 2))
    """

    prune_step: jax.Array  # int32 [], optimizer updates seen
    mask_updates: jax.Array  # int32 [], entries of the mask-update calendar that are done
    refused: jax.Array  # int32 [], steps at which a due mask update met something not finite
    masks: Any  # bool, like the parameters, True where a weight is kept
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
    score: scores.Score = scores.taylor,
    budget: budgets.BudgetRule | None = None,
    regrow: float = 0.0,
    rate: rates.RateRule | None = None,
    prunable: trees.Prunable = None,
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

    AGIP is known from a news item only, with no paper behind it. This is our reading of it,
    not a reproduction. A gradient that is not finite never enters an average, and a mask
    update due at such a step leaves the masks as they are and is made up for at the next.

    Args:
        sparsity: fraction of the prunable weights that are 0 from `stop` on, in [0, 1); or an
            `optax.Schedule` from the step to that fraction, read at the mask updates only.
        every: steps between mask updates.
        start: step (counted in optimizer updates, from 0) of the first mask update.
        stop: step of the last mask update; masks are fixed from then on.
        decay: of the average, in [0, 1). None keeps no average: `S` is the momentum of the
            optimizer before this transformation (SGD's `trace`, Adam's or Lion's `mu`) if
            `jaxprune.chain` hands it on, else the incoming update, and costs no state.
        dtype: of the average; bfloat16 only for a `decay` up to 0.99, beyond which its steps
            are too small for bfloat16 to register.
        score: function `(params, statistics) -> scores`; see `jaxprune.scores`.
        budget: function `(shapes, sparsity) -> Budget`; None is
            `budgets.global_budget(0.1)`: a global ranking in which every leaf keeps at least a
            tenth of its uniform budget.
        regrow: fraction of the kept weights that moves at `start`, in [0, 1).
        rate: a rule of `jaxprune.rates`, or None for the rate of the optimizer.
        prunable: None for floating-point leaves of two or more dimensions that are not named
            `bias` or `scale`; or a predicate `(path, leaf) -> bool`; or a tree of bools.

    Returns:
        An `optax.GradientTransformationExtraArgs`. Its `update` needs `params`, takes the raw
        gradient as the extra argument `grad` (`jaxprune.chain` passes it by itself; without it
        the incoming update is averaged) and ignores other extra arguments.

    Raises:
        ValueError: if an argument is out of range; from `init`, if `prunable` matches nothing or
            a budget cannot be met; from `update`, if `params` is missing or of another structure.

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
    _check(every, start, stop, decay, dtype, regrow)
    steps = schedules.mask_update_steps(start, stop, every)
    sparsities = sparsities_at(sparsity, steps)
    fraction = schedules.cosine(regrow, start, stop)
    rule = budgets.global_budget() if budget is None else budget

    @functools.lru_cache(maxsize=4)
    def calendar_for(shapes: tuple[tuple[int, ...], ...]) -> Calendar:
        return make_calendar(shapes, sparsities, [fraction(t) for t in steps], rule)

    def init_fn(params: optax.Params) -> AgipState:
        flags = trees.prunable_flags(params, prunable)
        pruned = trees.pick(params, flags)
        if pruned:
            calendar_for(_shapes(pruned))  # a budget that cannot be met raises here
        zeros = [jnp.zeros_like(leaf, dtype=dtype) for leaf in pruned]
        rest = jax.tree.map(lambda _: optax.MaskedNode(), params)
        return AgipState(
            prune_step=jnp.zeros([], jnp.int32),
            mask_updates=jnp.zeros([], jnp.int32),
            refused=jnp.zeros([], jnp.int32),
            masks=jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params),
            gradient_average=() if decay is None else trees.put(params, flags, zeros, rest),
            densities=() if rate is None else jnp.ones(len(pruned)),
            mean_statistics=() if rate is None else jnp.ones(len(pruned)),
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
        del extra_args
        if params is None:
            raise ValueError(
                "`params` is missing: pruning needs the parameters. Call "
                "`optimizer.update(gradients, state, params)`."
            )
        trees.check_same_structure("updates", updates, params)
        flags = trees.prunable_flags(params, prunable)
        weights, moves = trees.pick(params, flags), trees.pick(updates, flags)
        masks = trees.pick(state.masks, flags)
        calendar = calendar_for(_shapes(weights))

        # Gradients -> statistics.
        if decay is None:
            moment = trees.leaves_like(params, stats.first_moment(inner_state))
            statistics = moves if moment is None else trees.pick(moment, flags)
            average, evidence = (), ([], [])
        else:
            raw = trees.leaves_like(params, grad)
            gradients = moves if raw is None else trees.pick(raw, flags)
            average = stats.update_average(
                jax.tree.leaves(state.gradient_average), gradients, decay
            )
            statistics = average
            # Gradients are buffers, but updates are computed: as operands of the `cond` they
            # would be written to memory at every step. Their faults take a bit each.
            evidence = ([], [stats.faults(u) for u in moves]) if raw is None else (gradients, [])

        def settled(statistics: list[jax.Array]) -> list[jax.Array]:
            seen = state.prune_step + 1
            return statistics if decay is None else stats.unbias(statistics, decay, seen)

        # Statistics -> masks, at a mask update.
        done = entries_until(state.prune_step, every, start, stop, len(steps))
        due = done > state.mask_updates

        def renew(masks: Any, survivors: Any, statistics: Any, weights: Any, evidence: Any) -> Any:
            arrays, faults = evidence
            ok = stats.all_finite((weights, statistics, arrays))
            ok &= ~jnp.any(jnp.array([jnp.any(bits > 0) for bits in faults], bool))
            statistics = settled(statistics)
            entry = read_entry(calendar, done - 1)
            new = _new_masks(masks, statistics, weights, entry, score, ever_grows(calendar))
            new_survivors = _survivors(new, statistics) if rate is not None else survivors
            return *_choose(ok, (new, new_survivors), (masks, survivors)), ok

        masks, survivors, ok = jax.lax.cond(
            due,
            renew,
            lambda masks, survivors, *_: (masks, survivors, jnp.array(True)),
            # Raw buffers only: what is computed out here for the branch costs every step.
            *(masks, (state.densities, state.mean_statistics), statistics, weights, evidence),
        )
        densities, means = survivors

        # Masks -> updates.
        if rate is not None:
            statistics = settled(statistics)
            factors = [rate(*leaf) for leaf in zip(statistics, means, densities, strict=True)]
            moves = [_scale(u, factor) for u, factor in zip(moves, factors, strict=True)]
        moves = [_project(*leaf) for leaf in zip(moves, masks, weights, strict=True)]
        return trees.put(updates, flags, moves), AgipState(
            prune_step=jnp.asarray(optax.safe_increment(state.prune_step)),
            mask_updates=jnp.where(ok, done, state.mask_updates),
            refused=state.refused + (due & ~ok),
            masks=trees.put(state.masks, flags, masks),
            gradient_average=jax.tree.unflatten(
                jax.tree.structure(state.gradient_average), average
            ),
            densities=densities,
            mean_statistics=means,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _new_masks(
    masks: list[jax.Array],
    statistics: list[jax.Array],
    weights: list[jax.Array],
    entry: Calendar,
    score: scores.Score,
    grows: bool,
) -> list[jax.Array]:
    """Drops the lowest scores among the kept weights and regrows the largest statistics."""
    size = sum(mask.size for mask in masks)
    alive = jnp.sum(selection.count_kept(masks))
    moved = jnp.minimum(entry.moved, size - alive)
    keep = jnp.minimum(entry.total - moved, alive)
    kept = selection.largest(score(weights, statistics), keep, floors=entry.floors, among=masks)
    if not grows:
        return kept
    gone = [~mask for mask in masks]
    grown = selection.largest(scores.gradient(None, statistics), entry.total - keep, among=gone)
    return [a | b for a, b in zip(kept, grown, strict=True)]


def _survivors(masks: list[jax.Array], statistics: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Density and mean statistic of the kept weights, each float32 [pruned leaves]."""
    counts = jnp.maximum(selection.count_kept(masks), 1).astype(jnp.float32)
    sizes = jnp.array([mask.size for mask in masks], jnp.float32)
    sums = [
        jnp.sum(jnp.where(mask, jnp.abs(s.astype(jnp.float32)), 0))
        for mask, s in zip(masks, statistics, strict=True)
    ]
    return counts / sizes, jnp.stack(sums) / counts


def _scale(update: jax.Array, factor: jax.Array) -> jax.Array:
    """The update times its rate, in the dtype of the update."""
    return (update * factor).astype(update.dtype)


def _project(update: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
    """The update that leaves a kept weight its step and takes a pruned weight to exactly 0."""
    # In the wider of both dtypes: -w rounded to a narrower one would leave a residue.
    dtype = jnp.promote_types(update.dtype, weight.dtype)
    return jnp.where(mask, update.astype(dtype), -weight.astype(dtype))


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    """One of two trees, by a scalar condition."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _shapes(leaves: Sequence[jax.Array]) -> tuple[tuple[int, ...], ...]:
    """Shapes of arrays."""
    return tuple(leaf.shape for leaf in leaves)


def _check(
    every: int, start: int, stop: int, decay: float | None, dtype: Any, regrow: float
) -> None:
    """Static checks of the arguments of `agip_transform`, raised together."""
    problems = []
    if every < 1:
        problems.append(f"`every` must be at least 1 step, but is {every!r}")
    if start < 0:
        problems.append(f"`start` must not be negative, but is {start!r}")
    if stop < start:
        problems.append(f"`stop` must not be before `start`, but {stop!r} < {start!r}")
    if decay is not None and not 0 <= decay < 1:
        problems.append(f"`decay` must lie in [0, 1) or be None, but is {decay!r}")
    if not jnp.issubdtype(dtype, jnp.floating):
        problems.append(f"`dtype` must be a floating-point type, but is {dtype!r}")
    elif decay is not None and decay > 0.99 and jnp.dtype(dtype) == jnp.bfloat16:
        problems.append(f"`dtype` bfloat16 allows a `decay` up to 0.99, but it is {decay!r}")
    if not 0 <= regrow < 1:
        problems.append(f"`regrow` must lie in [0, 1), but is {regrow!r}")
    trees.raise_for(problems, "agip_transform cannot run with these arguments:")
