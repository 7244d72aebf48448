"""AGIP on channels: masks on the gates of groups, and one statistic for each channel."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxprune import budgets, meshes, schedules, scores, stats, timetables, trees
from jaxprune.transforms import _gates
from jaxprune.transforms._base import (
    check_bools,
    check_line_search,
    check_update,
    project,
    put_masks,
    update_masks,
    update_of,
    zero_counters,
)


class ChannelState(NamedTuple):
    """The state of `agip_transform` with `groups`.

    `jax.jit` returns dicts with sorted keys, whatever the order of the groups.

    Example:
        >>> ChannelState._fields[3:6]
        ('masks', 'timetable_mark', 'channels')
    """

    prune_step: jax.Array  # int32 [], number of optimizer updates so far
    mask_updates: jax.Array  # int32 [], number of mask updates done
    refused: jax.Array  # int32 [], due mask updates refused because a value was not finite
    masks: Any  # bool, like the parameters; only for the gates
    timetable_mark: jax.Array  # int32 [], the mask update that the masks come from
    channels: dict[str, jax.Array]  # bool [channels] by name of a group, True where one is kept
    channel_average: dict[str, jax.Array]  # float32 [channels]; {} if `decay` is None
    channel_age: dict[str, jax.Array]  # int32 [channels], steps since kept; {} if `decay` is None
    channel_growth: dict[str, jax.Array]  # float32 [channels]; {} without regrowth
    unranked: jax.Array  # int32 [], groups whose scores were all 0 at the last mask update


def channel_transform(
    sparsity: float | optax.Schedule,
    groups: Mapping[str, Any],
    *,
    every: int,
    start: int,
    stop: int,
    decay: float | None,
    score: scores.Score | None,
    budget: budgets.GivenBudget,
    regrow: float,
) -> optax.GradientTransformationExtraArgs:
    """Makes the transformation of `agip_transform` with `groups`, which checks the arguments.

    Args:
        sparsity: fraction of the channels that are masked from `stop` on, or a schedule of it.
        groups: from `structure.find_groups`, or the smaller groups that `Groups.compact` returns.
        every: steps between mask updates.
        start: step of the first mask update.
        stop: step of the last mask update.
        decay: the decay of the averages; None reads the momentum at mask updates.
        score: function `(norms, statistics) -> scores` of lists with a vector for each group; None
            is the statistic itself.
        budget: function `(shapes, sparsity) -> Budget` of channels, or a dict of sparsities by the
            names of groups; None is `budgets.uniform`.
        regrow: fraction of the kept channels that is dropped and regrown at `start`.

    Returns:
        An `optax.GradientTransformationExtraArgs`.
    """
    if score is not None:
        scores.check_score(score)
    steps = schedules.mask_update_steps(start, stop, every)
    sparsities = timetables.sparsities_at(sparsity, steps)
    fraction = schedules.cosine(regrow, start, stop)
    given = budgets.uniform if budget is None else budget
    rule = budgets.rule_of(given, max(sparsities), list(groups))
    # Counts refer to the channels of the dense network, even if some have been removed.
    timetable = timetables.make_timetable(
        {name: jax.ShapeDtypeStruct((group.full,), bool) for name, group in groups.items()},
        steps,
        sparsities,
        moved=[fraction(step) for step in steps],
        budget=_at_least_one(rule),
    )
    grows = timetables.ever_grows(timetable)
    gates_of = _gates.gates_once(groups)
    # Lists have a vector for each of these names, in this order, as the timetable does. A dict that
    # went through `jit`, `cond` or `scan` has sorted keys, so it is only read by name.
    names = list(groups)

    def zeros(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        return {name: jnp.zeros(groups[name].size, dtype) for name in names}

    def put(params: Any, channels: Mapping[str, jax.Array]) -> tuple[Any, dict[int, jax.Array]]:
        """Returns the masks of the gates, as a tree and by position."""
        masks: dict[int, jax.Array] = {}
        leaves = jax.tree.leaves(params)
        for name, gates in gates_of(params).items():
            for gate in gates:
                shape = jnp.shape(leaves[gate.leaf])
                kept = jnp.where(gate.channels < 0, True, channels[name][gate.channels])
                mask = jnp.broadcast_to(_gates.along(gate, len(shape), kept), shape)
                masks[gate.leaf] = masks.get(gate.leaf, True) & mask
        masks = {index: meshes.placed_like(mask, leaves[index]) for index, mask in masks.items()}
        flags = tuple(index in masks for index in range(len(leaves)))
        return put_masks(params, flags, [masks[index] for index in sorted(masks)]), masks

    def init_fn(params: optax.Params) -> ChannelState:
        everything = {name: jnp.ones(groups[name].size, bool) for name in names}
        masks = params
        if not trees.is_placeholder(params):
            masks = put(params, everything)[0]
            _warn_of_zeros(gates_of(params), jax.tree.leaves(params))
        return ChannelState(
            **zero_counters(),
            masks=masks,
            channels=everything,
            channel_average={} if decay is None else zeros(),
            channel_age={} if decay is None else zeros(jnp.int32),
            channel_growth=zeros() if grows and decay is not None else {},
            unranked=jnp.zeros([], jnp.int32),
        )

    @update_of(ChannelState)
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
        check_update(updates, params)
        check_bools(state.channels)
        gates = gates_of(params)
        weights, moves = jax.tree.leaves(params), jax.tree.leaves(updates)
        signal = trees.leaves_like(params, None if decay is None else grad) or moves
        if decay is None and inner_state is not None:
            signal = _momenta(gates, params, inner_state)

        # Gradients -> statistics, at every step.
        seen = _measure(gates, groups, weights, signal)
        slopes = None
        # Norms wait for a mask update, unless an average needs them or the signal is not a stored
        # array: passing it into the branch would write it to memory at every step.
        if signal is moves or (grows and decay is not None):
            slopes = _lengths(gates, groups, seen.signals)
            seen = seen._replace(signals={})
        statistics, slopes, averages = _statistics(
            state, names, seen.products, slopes, decay, grows
        )

        # Statistics -> masks, at a mask update.
        def renew(index: jax.Array, carry: Any, buffers: Any) -> Any:
            (channels, _), (statistics, slopes, seen) = carry, buffers
            norms = _lengths(gates, groups, seen.weights)
            slopes = _lengths(gates, groups, seen.signals) if slopes is None else slopes
            ranked = statistics if score is None else score(norms, statistics)
            ranked, unranked = _never_worthless(ranked, channels, (slopes, norms))
            kept = timetables.renew(timetable, index, channels, ranked, slopes if grows else None)
            return list(kept), unranked

        carry = [state.channels[name] for name in names], state.unranked
        (kept, unranked), counters = update_masks(
            timetable, state, carry, (statistics, slopes, seen), renew
        )
        channels = dict(zip(names, kept, strict=True))

        # Masks -> updates, at every step.
        tree, masks = put(params, channels)
        for index, mask in masks.items():
            moves[index] = project(moves[index], mask, weights[index])
        state = ChannelState(
            **counters, **averages, masks=tree, channels=channels, unranked=unranked
        )
        return jax.tree.unflatten(jax.tree.structure(updates), moves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _momenta(gates: _gates.Gates, params: Any, inner_state: Any) -> dict[int, jax.Array]:
    """Returns the optimizer's momentum of each gated parameter, by position."""
    leaves = list(trees.leaf_by_path(params).items())
    at = sorted({gate.leaf for own in gates.values() for gate in own})
    momenta = stats.first_moment(inner_state, dict(leaves[i] for i in at))
    return dict(zip(at, momenta, strict=True))


def _statistics(
    state: ChannelState,
    names: Sequence[str],
    products: Sequence[jax.Array],
    slopes: Sequence[jax.Array] | None,
    decay: float | None,
    grows: bool,
) -> tuple[Sequence[jax.Array], Sequence[jax.Array] | None, dict[str, Any]]:
    """Takes a step of the averages, unless `decay` is None.

    Args:
        state: the state before the step.
        names: names of the groups, in the order of the lists.
        products: float32 [channels] for each group, see `_Seen`.
        slopes: norms of the gradients at the gates, float32 [channels] for each group, or None.
        decay: the decay of the averages.
        grows: whether channels are regrown, so that the slopes are averaged as well.

    Returns:
        The statistics, the slopes, and the new values of `channel_average`, `channel_age` and
        `channel_growth` by field.
    """

    def by_name(values: Sequence[jax.Array]) -> dict[str, jax.Array]:
        return dict(zip(names, values, strict=True))

    average, age, growth = state.channel_average, state.channel_age, state.channel_growth
    if decay is None:
        fields = {"channel_average": average, "channel_age": age, "channel_growth": growth}
        return products, slopes, fields
    # Average only over the steps since a channel came back.
    on = [state.channels[name] for name in names]
    ages = [
        jnp.asarray(optax.safe_increment(age[name])) * kept
        for name, kept in zip(names, on, strict=True)
    ]
    past = [
        _gates.root_mean_square(average[name], new, decay) * kept
        for name, new, kept in zip(names, products, on, strict=True)
    ]
    if grows and slopes is not None:
        pairs = zip(names, slopes, strict=True)
        slopes = [_gates.root_mean_square(growth[name], new, decay) for name, new in pairs]
        growth = by_name(slopes)
    statistics = [_unbiased(*pair, decay) for pair in zip(past, ages, strict=True)]
    fields = {"channel_average": by_name(past), "channel_age": by_name(ages)}
    return statistics, slopes, fields | {"channel_growth": growth}


class _Seen(NamedTuple):
    """The values at the gates in one step."""

    products: list[jax.Array]  # |sum of w g| of each channel, float32 [channels] for each group
    weights: dict[int, jax.Array]  # parameters by position
    signals: dict[int, jax.Array]  # their gradients or momenta; {} after their norms are computed


def _measure(
    gates: _gates.Gates,
    groups: Mapping[str, Any],
    weights: Sequence[jax.Array],
    signal: Any,
) -> _Seen:
    """Computes the numbers of this step; none is squared, because small squares underflow."""
    used = {gate.leaf for own in gates.values() for gate in own}
    products = []
    for name, group in groups.items():
        pairs = [(weights[gate.leaf], signal[gate.leaf]) for gate in gates[name]]
        terms = [w.astype(jnp.float32) * g.astype(jnp.float32) for w, g in pairs]
        products.append(jnp.abs(_gates.sums(gates[name], group.size, terms)))
    return _Seen(products, {i: weights[i] for i in used}, {i: signal[i] for i in used})


def _lengths(
    gates: _gates.Gates, groups: Mapping[str, Any], arrays: Mapping[int, jax.Array]
) -> list[jax.Array]:
    """Computes the norm of each channel's entries, float32 [channels] for each group."""
    return [
        _gates.lengths(gates[name], group.size, [arrays[gate.leaf] for gate in gates[name]])
        for name, group in groups.items()
    ]


def _unbiased(average: jax.Array, age: jax.Array, decay: float) -> jax.Array:
    """Corrects a root mean square whose average started at 0 for the number of its steps."""
    steps = jnp.maximum(age, 1).astype(jnp.float32)
    return average / jnp.sqrt(1 - decay**steps)


def _never_worthless(
    ranked: Sequence[jax.Array],
    channels: Sequence[jax.Array],
    instead: Sequence[Sequence[jax.Array]],
) -> tuple[list[jax.Array], jax.Array]:
    """Replaces scores that are all 0 in a group, by scores with the mean of all other groups.

    If a whole group has the score 0, its gates have not moved from 0 or no gradient has reached
    them; it does not mean that the channels are worthless.

    Args:
        ranked: scores, [channels] for each group.
        channels: bool [channels] for each group, True where a channel is kept.
        instead: lists of replacement scores; the first that is not all 0 in the group is used.

    Returns:
        Scores like `ranked`, and the number of groups with replaced scores, int32 [].
    """

    def of_kept(values: Sequence[jax.Array]) -> list[jax.Array]:
        values = [jnp.abs(jnp.asarray(own, jnp.float32)) for own in values]
        return [jnp.where(on, own, 0) for own, on in zip(values, channels, strict=True)]

    def mean(own: jax.Array, on: jax.Array) -> jax.Array:
        return jnp.sum(own) / jnp.maximum(jnp.sum(on), 1)

    if not ranked:
        return [], jnp.zeros([], jnp.int32)
    sizes = of_kept(ranked)
    known = [jnp.any(own > 0) for own in sizes]
    largest = jnp.max(jnp.stack([jnp.max(own) for own in sizes]))
    unit = jnp.where(largest > 0, largest, 1)  # prevents underflow and overflow of sums
    counted = [on & flag for on, flag in zip(channels, known, strict=True)]
    count = jnp.maximum(sum(jnp.sum(own, dtype=jnp.int32) for own in counted), 1)
    total = sum(jnp.sum(own / unit) for own in sizes)
    typical = jnp.where(total > 0, unit * (total / count), 1)

    new = []
    substitutes = [of_kept(own) for own in instead]
    for position, (score, on) in enumerate(zip(ranked, channels, strict=True)):
        other = on.astype(jnp.float32)
        for own in reversed(substitutes):
            other = jnp.where(jnp.any(own[position] > 0), own[position], other)
        other = other / jnp.maximum(jnp.max(other), jnp.finfo(jnp.float32).tiny)
        new.append(jnp.where(known[position], score, typical * (other / mean(other, on))))
    return new, jnp.sum(~jnp.stack(known), dtype=jnp.int32)


def _warn_of_zeros(gates: _gates.Gates, leaves: Sequence[Any]) -> None:
    """Warns of groups whose gates are all 0, unless traced."""
    if not all(
        isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, Tracer) for leaf in leaves
    ):
        return
    with jax.ensure_compile_time_eval():  # constants of a function that is being traced
        alive = {
            name: [
                jnp.any(leaves[gate.leaf] != 0, _gates.other_axes(gate, leaves[gate.leaf]))
                for gate in own
            ]
            for name, own in gates.items()
        }
        alive = jax.device_get(alive)
    silent = [
        name
        for name, own in gates.items()
        if not any(np.any(a[gate.channels >= 0]) for a, gate in zip(alive[name], own, strict=True))
    ]
    if silent:
        warnings.warn(
            f"the gates of {', '.join(silent)} are all 0, so the statistics of these channels are "
            "0 until the gates have moved. Until then the channels are ranked by their gradients; "
            "set a later `start`, by which they have moved.",
            stacklevel=2,
        )


def _at_least_one(rule: budgets.BudgetRule) -> budgets.BudgetRule:
    """Makes a budget rule that keeps at least one channel in each group."""

    def floored(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> budgets.Budget:
        budget = rule(shapes, sparsity)
        floors = tuple(max(1, floor) for floor in budget.floors)
        return budgets.Budget(max(budget.total, sum(floors)), floors)

    return floored
