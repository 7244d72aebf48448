"""Adaptive gradient-informed pruning."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import budgets, rates, schedules, scores, selection, stats, trees


class AgipState(NamedTuple):
    """State of `agip_transform`.

    Example:
      >>> state = jaxprune.agip_transform(0.5, stop=10).init({"kernel": jnp.ones((2, 2))})
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


class _Calendar(NamedTuple):
    """What each mask update has to reach, in exact integers."""

    total: np.ndarray  # int32 [mask updates], weights kept
    moved: np.ndarray  # int32 [mask updates], of these, dropped and regrown elsewhere
    floors: np.ndarray  # int32 [mask updates, pruned leaves], kept at least before regrowth


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
    sparsities = _sparsities(sparsity, steps)
    fractions = schedules.cosine(regrow, start, stop)
    rule = budgets.global_budget() if budget is None else budget

    def calendar(shapes: Sequence[tuple[int, ...]]) -> _Calendar:
        plan = [rule(shapes, s) for s in sparsities]
        totals = np.array([total for total, _ in plan], np.int64)
        floors = np.array([floors for _, floors in plan], np.int64)
        moved = np.floor(totals * [fractions(step) for step in steps] + 0.5).astype(np.int64)
        # What is regrown is free to go to any leaf, so that floors hold for the rest.
        floors = floors * (totals - moved)[:, None] // np.maximum(totals, 1)[:, None]
        return _Calendar(*(table.astype(np.int32) for table in (totals, moved, floors)))

    def init_fn(params: optax.Params) -> AgipState:
        leaves, treedef = jax.tree.flatten(params)
        flags = trees.prunable_flags(params, prunable)
        pruned = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
        if pruned:
            calendar([leaf.shape for leaf in pruned])  # raises here rather than in a step
        average = [
            jnp.zeros_like(leaf, dtype=dtype) if flag else optax.MaskedNode()
            for leaf, flag in zip(leaves, flags, strict=True)
        ]
        return AgipState(
            prune_step=jnp.zeros([], jnp.int32),
            mask_updates=jnp.zeros([], jnp.int32),
            refused=jnp.zeros([], jnp.int32),
            masks=jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params),
            gradient_average=() if decay is None else jax.tree.unflatten(treedef, average),
            densities=() if rate is None else jnp.ones(len(pruned)),
            mean_statistics=() if rate is None else jnp.ones(len(pruned)),
        )

    def update_fn(
        updates: optax.Updates,
        state: AgipState,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates | None = None,
        inner_state: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AgipState]:
        del extra_args
        if params is None:
            raise ValueError(
                "`params` is missing: pruning needs the parameters. Call "
                "`optimizer.update(gradients, state, params)`."
            )
        trees.check_same_structure("updates", updates, params)
        flags = trees.prunable_flags(params, prunable)

        def pick(leaves: Sequence[Any]) -> list[Any]:
            return [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

        leaves, treedef = jax.tree.flatten(params)
        update_leaves, mask_leaves = jax.tree.leaves(updates), jax.tree.leaves(state.masks)
        weights, masks = pick(leaves), pick(mask_leaves)
        raw = trees.leaves_like(params, grad)
        if decay is None:
            signal = trees.leaves_like(params, stats.first_moment(inner_state)) or update_leaves
            signal, average = pick(signal), []
            statistics, finite = signal, None
        else:
            signal = pick(update_leaves if raw is None else raw)
            average = jax.tree.leaves(state.gradient_average)
            average = stats.update_average(average, signal, decay)
            statistics = average
            # An update is computed, not stored: as an operand of the `cond` below it would be
            # written to memory at every step.
            finite = stats.all_finite(signal) if raw is None else None

        done = _calendar_entries(state.prune_step, every, start, stop, len(steps))
        due = done > state.mask_updates
        # Raw buffers only: what is computed outside of a `cond` for its branch costs a pass
        # over memory at every step.
        operands = (
            masks,
            (state.densities, state.mean_statistics),
            statistics,
            weights,
            signal if finite is None else (),
        )

        def recompute(masks: Any, survivors: Any, statistics: Any, weights: Any, check: Any) -> Any:
            if decay is not None:
                statistics = stats.unbias(statistics, decay, state.prune_step + 1)
            entry = jax.tree.map(lambda x: jnp.asarray(x)[done - 1], calendar(_shapes(weights)))
            ok = stats.all_finite((weights, check)) & (True if finite is None else finite)
            new = _new_masks(masks, statistics, weights, entry, score, grows)
            new = [jnp.where(ok, n, m) for n, m in zip(new, masks, strict=True)]
            if rate is not None:
                measured = _survivors(new, statistics)
                survivors = jax.tree.map(lambda n, o: jnp.where(ok, n, o), measured, survivors)
            return new, survivors, ok

        grows = _ever_grows(calendar(_shapes(weights)))
        masks, survivors, ok = jax.lax.cond(
            due, recompute, lambda m, s, *_: (m, s, jnp.array(True)), *operands
        )
        densities, means = survivors

        new_updates, new_masks, i = list(update_leaves), list(mask_leaves), 0
        for j, flag in enumerate(flags):
            if flag:
                factor = None
                if rate is not None:
                    statistic = statistics[i]
                    if decay is not None:
                        statistic = stats.unbias(statistic, decay, state.prune_step + 1)
                    factor = rate(statistic, means[i], densities[i])
                new_updates[j] = _project(update_leaves[j], masks[i], leaves[j], factor)
                new_masks[j] = masks[i]
                i += 1
        new_state = AgipState(
            prune_step=optax.safe_increment(state.prune_step),
            mask_updates=jnp.where(ok, done, state.mask_updates),
            refused=state.refused + (due & ~ok),
            masks=jax.tree.unflatten(jax.tree.structure(state.masks), new_masks),
            gradient_average=jax.tree.unflatten(
                jax.tree.structure(state.gradient_average), average
            ),
            densities=densities,
            mean_statistics=means,
        )
        return jax.tree.unflatten(jax.tree.structure(updates), new_updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _new_masks(
    masks: list[jax.Array],
    statistics: list[jax.Array],
    weights: list[jax.Array],
    entry: _Calendar,
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


def _survivors(
    masks: list[jax.Array], statistics: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Density and mean statistic of the kept weights of each leaf."""
    counts = jnp.maximum(selection.count_kept(masks), 1).astype(jnp.float32)
    sums = [jnp.sum(jnp.where(m, jnp.abs(s), 0)) for m, s in zip(masks, statistics, strict=True)]
    sizes = jnp.array([mask.size for mask in masks], jnp.float32)
    return counts / sizes, jnp.stack(sums).astype(jnp.float32) / counts


def _project(
    update: jax.Array, mask: jax.Array, weight: jax.Array, factor: jax.Array | None
) -> jax.Array:
    """The update that leaves a kept weight its step and takes a pruned weight to exactly 0."""
    # In the wider of both dtypes: -w rounded to a narrower one would leave a residue.
    dtype = jnp.promote_types(update.dtype, weight.dtype)
    step = update.astype(dtype)
    if factor is not None:
        step = (step * factor).astype(dtype)
    return jnp.where(mask, step, -weight.astype(dtype))


def _calendar_entries(
    step: jax.Array, every: int, start: int, stop: int, n_entries: int
) -> jax.Array:
    """How many mask updates should be done by the end of this step, int32 []."""
    passed = jnp.clip((step - start) // every + 1, 0, n_entries - 1)
    return jnp.where(step >= stop, n_entries, passed)


def _ever_grows(calendar: _Calendar) -> bool:
    """Whether any mask update brings weights back."""
    return bool(np.any(calendar.moved > 0) or np.any(np.diff(calendar.total) > 0))


def _shapes(leaves: Sequence[jax.Array]) -> list[tuple[int, ...]]:
    """Shapes of arrays."""
    return [leaf.shape for leaf in leaves]


def _sparsities(sparsity: float | Callable[[Any], Any], steps: list[int]) -> list[float]:
    """Sparsity at each mask update, checked."""
    schedule = sparsity
    if not callable(schedule):
        schedule = schedules.cubic(float(sparsity), steps[0], steps[-1])  # type: ignore[arg-type]
    values = [schedules.sparsity_at(schedule, step) for step in steps]
    trees.raise_for(
        [
            f"{value} at step {step}"
            for step, value in zip(steps, values, strict=True)
            if not 0 <= value < 1
        ][-3:],
        "`sparsity` must lie in [0, 1), as a fraction of zeros, but is:",
    )
    return values


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
