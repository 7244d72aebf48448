"""AGIP on channels: masks at the gates of groups, and one statistic for each channel."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import budgets, plans, schedules, scores, stats, trees
from jaxprune.transforms._masking import (
    check_bools,
    check_line_search,
    project,
    put_masks,
    update_masks,
    zero_counters,
)


class ChannelState(NamedTuple):
    """State of `agip_transform` with `groups`.

    Example:
        >>> ChannelState._fields[3:]
        ('masks', 'plan_mark', 'channels', 'channel_average', 'channel_age', 'channel_growth')
    """

    prune_step: jax.Array  # int32 [], optimizer updates seen
    mask_updates: jax.Array  # int32 [], mask updates that are done
    refused: jax.Array  # int32 [], steps at which a due mask update met something not finite
    masks: Any  # bool, like the parameters; only of the gates
    plan_mark: jax.Array  # int32 [], the mask update that the masks come from
    channels: dict[str, jax.Array]  # bool [channels] by name of a group, True where one is kept
    channel_average: dict[str, jax.Array]  # float32 [channels]; {} without an own average
    channel_age: dict[str, jax.Array]  # int32 [channels], steps since it is on; {} likewise
    channel_growth: dict[str, jax.Array]  # float32 [channels]; {} without regrowth


class _Gate(NamedTuple):
    """Where zeros switch channels off: an axis of a leaf."""

    leaf: int  # position among the parameters
    axis: int
    channels: np.ndarray  # int [entries along the axis]: which channel each is; -1: none


def channel_transform(
    sparsity: float | optax.Schedule,
    groups: Mapping[str, Any],
    *,
    every: int,
    start: int,
    stop: int,
    decay: float | None,
    score: scores.Score | None,
    budget: budgets.BudgetRule | None,
    regrow: float,
) -> optax.GradientTransformationExtraArgs:
    """See `agip_transform`, which checks the arguments.

    Args:
        sparsity: fraction of the channels that are off from `stop` on, or a schedule of it.
        groups: from `structure.find_groups`, or what `Groups.compact` leaves of them.
        every: steps between mask updates.
        start: first mask update.
        stop: last mask update.
        decay: of the averages; None reads the momentum at mask updates.
        score: function `(norms, statistics) -> scores` on lists with a vector for each group; None
            is the statistic itself.
        budget: of channels; None is `budgets.uniform`.
        regrow: fraction of the kept channels that moves at `start`.

    Returns:
        An `optax.GradientTransformationExtraArgs`.
    """
    steps = schedules.mask_update_steps(start, stop, every)
    sparsities = plans.sparsities_at(sparsity, steps)
    fraction = schedules.cosine(regrow, start, stop)
    # Counts are of the dense network's channels, also when only some of them are left.
    plan = plans.make_plan(
        {name: jax.ShapeDtypeStruct((group.full,), bool) for name, group in groups.items()},
        steps,
        sparsities,
        moved=[fraction(step) for step in steps],
        budget=_at_least_one(budgets.uniform if budget is None else budget),
    )
    grows = plans.ever_grows(plan)
    gates_of = _gates_once(groups)

    def zeros(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        return {name: jnp.zeros(group.size, dtype) for name, group in groups.items()}

    def put(params: Any, channels: Mapping[str, jax.Array]) -> tuple[Any, dict[int, jax.Array]]:
        """Masks of the gates, as a tree and by position."""
        masks: dict[int, jax.Array] = {}
        leaves = jax.tree.leaves(params)
        for name, gates in gates_of(params).items():
            for gate in gates:
                kept = jnp.where(gate.channels < 0, True, channels[name][gate.channels])
                shape = np.ones(leaves[gate.leaf].ndim, int)
                shape[gate.axis] = len(gate.channels)
                mask = jnp.broadcast_to(kept.reshape(shape), leaves[gate.leaf].shape)
                masks[gate.leaf] = masks.get(gate.leaf, True) & mask
        flags = tuple(index in masks for index in range(len(leaves)))
        return put_masks(params, flags, [masks[index] for index in sorted(masks)]), masks

    def init_fn(params: optax.Params) -> ChannelState:
        everything = {name: jnp.ones(group.size, bool) for name, group in groups.items()}
        # A tree without leaves is how Optax asks which parts of a state mirror the parameters.
        masks = put(params, everything)[0] if jax.tree.leaves(params) else params
        return ChannelState(
            **zero_counters(),
            masks=masks,
            channels=everything,
            channel_average={} if decay is None else zeros(),
            channel_age={} if decay is None else zeros(jnp.int32),
            channel_growth=zeros() if grows and decay is not None else {},
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
        if params is None:
            raise ValueError(
                "`params` is missing: pruning needs the parameters. Call "
                "`optimizer.update(gradients, state, params)`."
            )
        trees.check_same_structure("updates", updates, params)
        check_bools(state.channels)
        gates = gates_of(params)
        weights, moves = jax.tree.leaves(params), jax.tree.leaves(updates)
        signal = trees.leaves_like(params, None if decay is None else grad) or moves
        if decay is None and inner_state is not None:
            paths = list(trees.leaf_by_path(params))
            at = sorted({gate.leaf for own in gates.values() for gate in own})
            momenta = stats.first_moment(inner_state, [paths[i] for i in at])
            signal = dict(zip(at, momenta, strict=True))

        # Gradients -> statistics: vectors, so that nothing here costs anything.
        def summed(own: list[_Gate], size: int, entry: Callable[..., jax.Array]) -> jax.Array:
            total = jnp.zeros(size)
            for gate in own:
                total += _per_channel(gate, size, entry(weights[gate.leaf], signal[gate.leaf]))
            return total

        products = {n: summed(own, groups[n].size, _product) ** 2 for n, own in gates.items()}
        norms = {n: jnp.sqrt(summed(own, groups[n].size, _square)) for n, own in gates.items()}
        slopes = {n: summed(own, groups[n].size, _slope) for n, own in gates.items() if grows}
        average, age, growth = state.channel_average, state.channel_age, state.channel_growth
        if decay is None:
            statistics, lately = products, slopes
        else:
            # Of the steps since a channel came back only: it has no past to be judged by.
            on = state.channels
            average = jax.tree.map(jnp.multiply, stats.update_average(average, products, decay), on)
            age = jax.tree.map(lambda age, on: (age + 1) * on, age, on)
            growth = lately = stats.update_average(growth, slopes, decay)
            seen = jax.tree.map(lambda age: jnp.maximum(age, 1), age)
            statistics = {n: stats.unbias(own, decay, seen[n]) for n, own in average.items()}

        # Statistics -> masks, at a mask update.
        def renew(index: jax.Array, channels: Any, buffers: Any) -> Any:
            statistics, lately, lengths = (list(part.values()) for part in buffers[:3])
            ranked = statistics if score is None else score(lengths, statistics)
            kept = plans.renew(plan, index, channels, ranked, lately if grows else None)
            return list(kept)

        names = list(gates)
        kept, counters = update_masks(
            plan,
            state,
            [state.channels[name] for name in names],
            (
                {name: statistics[name] for name in names},
                {name: lately[name] for name in names if grows},
                {name: norms[name] for name in names},
                products,
            ),
            renew,
        )
        channels = dict(zip(names, kept, strict=True))

        # Masks -> updates.
        tree, masks = put(params, channels)
        for index, mask in masks.items():
            moves[index] = project(moves[index], mask, weights[index])
        return jax.tree.unflatten(jax.tree.structure(updates), moves), ChannelState(
            **counters,
            masks=tree,
            channels=channels,
            channel_average=average,
            channel_age=age,
            channel_growth=growth,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _product(weight: jax.Array, gradient: jax.Array) -> jax.Array:
    return weight.astype(jnp.float32) * gradient.astype(jnp.float32)


def _square(weight: jax.Array, gradient: jax.Array) -> jax.Array:
    return weight.astype(jnp.float32) ** 2


def _slope(weight: jax.Array, gradient: jax.Array) -> jax.Array:
    return gradient.astype(jnp.float32) ** 2


def _per_channel(gate: _Gate, size: int, entries: jax.Array) -> jax.Array:
    """Sums of the entries of each channel."""
    rows = entries.sum([axis for axis in range(entries.ndim) if axis != gate.axis])
    if np.array_equal(gate.channels, np.arange(size)):
        return rows
    ours = gate.channels >= 0
    return jnp.zeros(size).at[gate.channels[ours]].add(rows[ours])


def _at_least_one(rule: budgets.BudgetRule) -> budgets.BudgetRule:
    """The budget with at least one channel in each group."""

    def floored(shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> budgets.Budget:
        budget = rule(shapes, sparsity)
        floors = tuple(max(1, floor) for floor in budget.floors)
        return budgets.Budget(max(budget.total, sum(floors)), floors)

    return floored


def _gates_once(groups: Mapping[str, Any]) -> Callable[[Any], dict[str, list[_Gate]]]:
    """The gates of each group among given parameters; remembers the last ones."""
    known: dict[tuple, dict[str, list[_Gate]]] = {}

    def gates_of(params: Any) -> dict[str, list[_Gate]]:
        shapes = {path: jnp.shape(leaf) for path, leaf in trees.leaf_by_path(params).items()}
        key = tuple(shapes.items())
        if key not in known:
            known.clear()
            known[key] = _find_gates(groups, shapes)
        return known[key]

    return gates_of


def _find_gates(
    groups: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[_Gate]]:
    """Looks the gates up; those of the variables may have a longer path, such as `params/...`."""
    wanted = [member.path for group in groups.values() for member in group.gates]
    ends = {path: [own for own in shapes if f"/{path}".endswith(f"/{own}")] for path in wanted}
    folders = [path.removesuffix(own) for path, found in ends.items() for own in found]
    under = max(folders, key=folders.count, default="")
    position = {path: index for index, path in enumerate(shapes)}
    gates: dict[str, list[_Gate]] = {}
    problems = []
    for name, group in groups.items():
        gates[name] = []
        for path, axis, channels, _ in group.gates:
            shape = shapes.get(path.removeprefix(under))
            if shape is None or axis >= len(shape) or shape[axis] != len(channels):
                found = "missing" if shape is None else f"shape {shape}"
                problems.append(f"{path}: {found}, must have {len(channels)} along axis {axis}")
            else:
                gates[name].append(_Gate(position[path.removeprefix(under)], axis, channels))
    trees.raise_for(problems, "`groups` must be of the model whose `params` are updated:")
    return gates
