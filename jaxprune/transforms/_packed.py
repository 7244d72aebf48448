"""Optimizer state of kept weights only."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import meshes, trees
from jaxprune.transforms._base import check_update, put_masks, update_of, when_any
from jaxprune.transforms._elementwise import check_elementwise
from jaxprune.transforms._positions import (
    LARGEST,
    capacity_of,
    count,
    follow,
    gather,
    is_settled,
    moved,
    owners,
    packed_shape,
    scatter,
)

ROOM = 0.05  # for leaves that gain weights from others, and for mask updates


class PackedState(NamedTuple):
    """The state of `pack_state`.

    A packed array has one row of `capacity` entries and as many dimensions as its leaf. Positions
    are sorted; padding is the number of weights of the leaf.

    Example:
        >>> state = pack_state(optax.adam(0.1), density=0.1).init({"w": jnp.ones((64, 64))})
        >>> state.inner[0].mu["w"].shape, state.positions["w"].shape
        ((1, 512), (1, 512))
    """

    inner: Any  # state of the inner optimizer: arrays of packed leaves have their packed shape
    positions: Any  # int32 [..., capacity], like the parameters; only for packed leaves
    short_steps: jax.Array  # int32 [], updates in which a kept weight had no room and did not move


def pack_state(
    inner: optax.GradientTransformation,
    *,
    density: float | Mapping[str, float] = 1.0,
    capacities: Mapping[str, int] | None = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of an element-wise optimizer for kept weights only, to save memory.

    Put it in place of the optimizer in a `jaxprune.chain`, which passes it the masks of each step;
    elsewhere pass `masks=` to `update`. Momenta and averages of a pruned leaf become vectors with
    room for a given number of weights. Kept weights get the updates of the optimizer alone, bit for
    bit. If masks change, weights that are still kept keep their state, a weight that comes back
    starts with that of `init`, and the state of a removed weight is dropped. The members before
    pruning see the sparse network, as with `jaxprune.chain(..., inner="sparse")`.

    Shapes are static, so the room is as well. Masks that keep more weights than there is room for
    are refused by the `init` of a `jaxprune.chain`. In a compiled step nothing can be raised: a
    kept weight without room does not move (its update is 0), weights that have a state go first,
    and `short_steps` counts such updates. `jaxprune.get_room` reports them, and
    `jaxprune.resize_state` makes the room that the masks need: smaller after a ramp, or larger.

    Args:
        inner: an element-wise optimizer, such as `optax.adam`, `adamw`, `sgd`, `lion` or `rmsprop`.
        density: fraction of the weights of a leaf that there is room for, in (0, 1], plus 5 % and
            rounded up to a multiple of 128 entries; for all packed leaves, or a dict by names as
            for `prunable`, in which a leaf without a name has room for all. A gradual method starts
            dense and needs 1.
        capacities: exact numbers of entries by path, in place of `density`, to restore a state that
            was resized: `{path: room.capacity for path, room in get_room(opt_state).items()}`.
        prunable: which leaves are packed: the rule that pruning has. See `trees.prunable_flags`.
        stacked: as pruning has it, see `trees.stacked_axes`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its `update` needs `params`. Its state is a
        `PackedState`.

    Raises:
        ValueError: if a density or a capacity is out of range or names no packed leaf; from `init`,
            if `inner` is not element-wise, by the shapes of its state and the operations of its
            update, or a leaf is too large; from `update`, if masks or
            `params` are missing, or the state belongs to other leaves.

    Example:
        >>> import jaxprune
        >>> kernel = jax.random.normal(jax.random.key(0), (64, 64))
        >>> params = {"kernel": kernel, "bias": jnp.ones(64)}
        >>> optimizer = jaxprune.chain(
        ...     pack_state(optax.adam(1e-2), density=0.1), jaxprune.rigl_transform(0.9, stop=100))
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(params, state, params)
        >>> jaxprune.get_room(state)
        {'kernel': Room(capacity=512, kept=410, short=0)}
    """
    _check_density(density)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> PackedState:
        none = jnp.zeros([], jnp.int32)
        if trees.is_placeholder(params):
            return PackedState(inner.init(params), params, none)
        flags = trees.prunable_flags(params, prunable, stacked)
        leaves = {
            path: leaf
            for (path, leaf), flag in zip(trees.leaf_by_path(params).items(), flags, strict=True)
            if flag
        }
        sizes = {path: leaf.size for path, leaf in leaves.items()}
        room = _capacities(sizes, density, capacities)
        check_elementwise(inner, params, flags)
        shapes = [packed_shape(leaf, room[path]) for path, leaf in leaves.items()]
        values = [
            jnp.zeros(shape, leaf.dtype)
            for shape, leaf in zip(shapes, leaves.values(), strict=True)
        ]
        positions = [
            jnp.full(shape, size, jnp.int32)
            for shape, size in zip(shapes, sizes.values(), strict=True)
        ]
        packed = trees.put(params, flags, values)
        return PackedState(inner.init(packed), put_masks(params, flags, positions), none)

    @update_of(PackedState)
    def update_fn(
        updates: Any, state: Any, params: Any = None, *, masks: Any = None, **extra_args: Any
    ) -> tuple[Any, PackedState]:
        check_update(updates, params)
        params = trees.without_settings(params, updates)
        leaves = trees.leaf_by_path(params)
        positions = trees.leaf_by_path(state.positions)
        _check_state(positions, leaves)
        flags = tuple(path in positions for path in leaves)
        positions = [positions[path] for path in leaves if path in positions]
        kept = _masks_of(masks, params, leaves, positions, flags)
        _check_whole(trees.pick(params, flags), kept)
        packed_shapes = {
            path: own.shape for path, own in zip(_named(leaves, flags), positions, strict=True)
        }
        own = owners(state.inner, packed_shapes)

        def packed(tree: Any, positions: list[jax.Array]) -> Any:
            values = map(gather, trees.pick(tree, flags), positions)
            return trees.put(tree, flags, list(values))

        settled = list(map(is_settled, positions, kept))
        # A branch for each leaf: what it computes is dense, and so exists for one leaf at a time.
        new = [
            jax.lax.cond(when_any(~flag), follow, lambda own, _: own, place, mask)
            for flag, place, mask in zip(settled, positions, kept, strict=True)
        ]

        def follows(state: Any, positions: Any, new: Any, values: Any) -> Any:
            moves = {
                path: moved(old, then, mask.size)
                for path, old, then, mask in zip(packed_shapes, positions, new, kept, strict=True)
            }
            leaves, structure = jax.tree.flatten(state)
            fresh = jax.tree.leaves(inner.init(values))
            followed = [
                leaf if path is None else moves[path](leaf, start)
                for path, leaf, start in zip(own, leaves, fresh, strict=True)
            ]
            return structure.unflatten(followed)

        values = packed(params, new)
        before = jax.lax.cond(
            when_any(~jnp.all(jnp.stack(settled))),
            follows,
            lambda state, *_: state,
            *(state.inner, positions, new, values),
        )
        positions = new
        for name in ("grad", "inner_state"):  # of the shapes of whole leaves
            extra_args.pop(name, None)
        moves, after = inner.update(packed(updates, positions), before, values, **extra_args)
        whole = [
            scatter(move, place, mask.shape)
            for move, place, mask in zip(trees.pick(moves, flags), positions, kept, strict=True)
        ]
        short = [count(mask) > place.size for mask, place in zip(kept, positions, strict=True)]
        steps = state.short_steps
        steps = jnp.where(jnp.any(jnp.stack(short)), optax.safe_increment(steps), steps)
        new = PackedState(after, put_masks(params, flags, positions), steps)
        return trees.put(moves, flags, whole), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def packed_states(state: Any) -> list[PackedState]:
    """Returns all packed states in an optimizer state, in flattening order."""
    nodes = jax.tree.leaves(state, is_leaf=trees.is_packed)
    return [node for node in nodes if trees.is_packed(node)]


def _named(leaves: Mapping[str, Any], flags: tuple[bool, ...]) -> list[str]:
    """Returns the paths of the packed leaves."""
    return [path for path, flag in zip(leaves, flags, strict=True) if flag]


def _check_density(density: Any) -> None:
    """Raises unless all densities lie in (0, 1]."""
    given = density if isinstance(density, Mapping) else {"": density}
    bad = [
        f"{name or 'all leaves'}: {value!r}"
        for name, value in given.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1
    ]
    trees.raise_for(
        bad,
        "`density` must be the fraction of weights that there is room for, in (0, 1], such as 0.2 "
        'or {"layer1": 0.1}; 1 has room for all. Change these:',
    )


def _capacities(
    sizes: Mapping[str, int], density: Any, capacities: Mapping[str, int] | None
) -> dict[str, int]:
    """Returns the capacity of each packed leaf, or raises."""
    large = [f"{path}: {size:,} weights" for path, size in sizes.items() if size > LARGEST]
    trees.raise_for(
        large,
        f"packed leaves must have at most {LARGEST:,} weights, because positions are int32. "
        "Exclude these with `prunable`:",
    )
    by_path: dict[str, Any] = dict.fromkeys(sizes, density)
    if isinstance(density, Mapping):
        by_path = dict.fromkeys(sizes, 1.0) | trees.by_name("density", density, list(sizes))
    room = {path: capacity_of(size * by_path[path], size, ROOM) for path, size in sizes.items()}
    given = {} if capacities is None else dict(capacities)
    bad = [f"{path}: not packed" for path in given if path not in sizes]
    bad += [
        f"{path}: {own!r} of {sizes[path]:,} weights"
        for path, own in given.items()
        if path in sizes and not (isinstance(own, int) and 1 <= own <= sizes[path])
    ]
    trees.raise_for(
        bad,
        "`capacities` must be whole numbers from 1 to the number of weights, by the paths of "
        f"packed leaves ({', '.join(sizes)}). Change these:",
    )
    return room | given


def _check_state(positions: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Raises unless packed leaves are leaves of the parameters."""
    problems = [f"{path}: packed, but no parameter" for path in positions if path not in leaves]
    problems += [
        f"{path}: {jnp.ndim(own)} dimensions, but packed from {jnp.ndim(leaves[path])} "
        for path, own in positions.items()
        if path in leaves and jnp.ndim(own) != jnp.ndim(leaves[path])
    ]
    trees.raise_for(
        problems,
        "`state` must belong to these parameters. Use the state that `init` returned for them:",
    )


def _masks_of(
    masks: Any,
    params: Any,
    leaves: Mapping[str, Any],
    positions: list[jax.Array],
    flags: tuple[bool, ...],
) -> list[jax.Array]:
    """Returns the mask of each packed leaf, or raises."""
    if masks is None:
        raise ValueError(
            "`masks` are missing: packed state follows masks. Put it before pruning in a "
            "`jaxprune.chain(jaxprune.pack_state(optimizer), pruning)`, which passes them, or call "
            "`optimizer.update(gradients, state, params, masks=masks)`."
        )
    by_path = trees.spread(masks, params)
    found, problems = [], []
    for path, place in zip(_named(leaves, flags), positions, strict=True):
        leaf, mask = leaves[path], by_path.get(path, True)
        if jnp.result_type(mask) != jnp.bool_ or jnp.shape(mask) not in ((), leaf.shape):
            problems.append(
                f"{path}: {jnp.result_type(mask)} {list(jnp.shape(mask))}, must be bool "
                f"{list(leaf.shape)}"
            )
            continue
        if path not in by_path and place.size < leaf.size:
            problems.append(
                f"{path}: no mask, so all {leaf.size:,} weights are kept, but there is room for "
                f"{place.size:,}"
            )
        found.append(jnp.broadcast_to(mask, leaf.shape))
    trees.raise_for(
        problems,
        "`masks` must be bools like the packed leaves. Give `jaxprune.pack_state` the `prunable` "
        "and `stacked` of pruning:",
    )
    return found


def _check_whole(weights: list[Any], masks: list[Any]) -> None:
    """Raises if leaves are shards that differ between devices."""
    if meshes.varies((weights, masks)):
        raise ValueError(
            "`params` must be whole leaves, but are shards of `jax.shard_map`, in which positions "
            "mean different weights on each device. Call the optimizer outside of "
            "`jax.shard_map`, where `jax.jit` splits leaves itself."
        )
