"""How much room packed states have, and states with another room."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxprune import meshes, trees
from jaxprune.transforms._inner import pruning_states
from jaxprune.transforms._packed import ROOM, PackedState, packed_states
from jaxprune.transforms._positions import capacity_of, count, moved, owners, remain


class Room(NamedTuple):
    """The room of one packed leaf, from `get_room`.

    Example:
        >>> Room(capacity=512, kept=600, short=88).short
        88
    """

    capacity: int  # entries of the packed arrays
    kept: int  # weights that the present mask keeps
    short: int  # kept weights without room: they do not move


def get_room(opt_state: Any) -> dict[str, Room]:
    """Reports how much room each packed leaf has, and how much its mask needs.

    Args:
        opt_state: state of an optimizer with `jaxprune.pack_state` and a pruning transformation.

    Returns:
        Dict from path to `Room`. `short` is not 0 where weights do not move for want of room:
        `resize_state` makes it. Empty if nothing is packed.

    Raises:
        ValueError: inside `jit`; if the state belongs to several networks, or has no masks.

    Example:
        >>> import optax
        >>> import jaxprune
        >>> optimizer = jaxprune.chain(
        ...     jaxprune.pack_state(optax.adam(0.1)), jaxprune.rigl_transform(0.5, stop=9))
        >>> get_room(optimizer.init({"w": jnp.ones((16, 16))}))
        {'w': Room(capacity=256, kept=128, short=0)}
    """
    masks = _masks_of(opt_state, "get_room")
    room = {}
    for state in packed_states(opt_state):
        for path, own in trees.leaf_by_path(state.positions).items():
            kept = _count(masks[path])
            room[path] = Room(own.size, kept, max(0, kept - own.size))
    return room


def resize_state(opt_state: Any, *, room: float = ROOM) -> Any:
    """Makes packed arrays as large as the present masks need, smaller or larger.

    Call it between steps, at some points of a ramp and after it: the state of kept weights stays
    as it is, and the shapes change, so a jitted step is compiled again. Memory then falls with the
    density. A state that was saved after it is restored with the `capacities` of `pack_state`.

    Args:
        opt_state: state of an optimizer with `jaxprune.pack_state` and a pruning transformation.
        room: room for this fraction more weights than are kept, at least 0; rounded up to a
            multiple of 128 entries, and never more than the leaf has.

    Returns:
        The state, with other shapes of its packed arrays.

    Raises:
        ValueError: inside `jit`; if `room` is negative; if the state belongs to several networks,
            or has no masks.

    Example:
        >>> import optax
        >>> import jaxprune
        >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
        >>> params, masks = jaxprune.prune(params, 0.9)
        >>> optimizer = jaxprune.chain(
        ...     jaxprune.pack_state(optax.adam(0.1)), jaxprune.fixed_mask_transform(masks))
        >>> state = optimizer.init(params)
        >>> state[0].inner[0].mu["w"].shape, resize_state(state)[0].inner[0].mu["w"].shape
        ((1, 4096), (1, 512))
    """
    is_number = isinstance(room, (int, float)) and not isinstance(room, bool)
    if not is_number or not 0 <= room < math.inf:
        raise ValueError(
            f"`room` must be a fraction of the kept weights, at least 0, but is {room!r}; 0.05 is "
            "5 % more than are kept."
        )
    masks = _masks_of(opt_state, "resize_state")

    def resized(state: Any) -> Any:
        if not trees.is_packed(state):
            return state
        own = {path: masks[path] for path in trees.leaf_by_path(state.positions)}
        sizes = {path: capacity_of(_count(mask), mask.size, room) for path, mask in own.items()}
        return meshes.automatically(lambda state, own: _resized(state, own, sizes), state, own)

    return jax.tree.map(resized, opt_state, is_leaf=trees.is_packed)


def check_room(states: Any, masks: Mapping[str, Any], params: Any) -> None:
    """Raises if masks are known to keep more weights than packed states have room for.

    Args:
        states: states that may contain packed ones.
        masks: masks by path.
        params: tree of arrays or shapes.
    """
    leaves, problems = trees.leaf_by_path(params), []
    for state in packed_states(states):
        for path, own in trees.leaf_by_path(state.positions).items():
            size = leaves[path].size
            if isinstance(masks.get(path), (Tracer, jax.ShapeDtypeStruct)):
                continue
            kept = _count(masks[path]) if path in masks else size
            without = "" if path in masks else ", because pruning has no mask for it"
            if kept > own.size:
                problems.append(
                    f"{path}: room for {own.size:,} of {size:,} weights, but {kept:,} are "
                    f"kept{without}"
                )
    trees.raise_for(
        problems,
        "packed state must have room for all kept weights. A gradual method starts dense: begin "
        "with `jaxprune.pack_state(optimizer)` and call `jaxprune.resize_state(opt_state)` when "
        "the density has fallen, or use a method that is sparse from the first step with a larger "
        "`density`, and the same `prunable` as pruning:",
    )


def _resized(state: PackedState, masks: Mapping[str, Any], sizes: Mapping[str, int]) -> PackedState:
    """Returns a packed state with other capacities."""
    positions = trees.leaf_by_path(state.positions)
    new = {path: remain(own, masks[path], sizes[path]) for path, own in positions.items()}
    moves = {path: moved(own, new[path], masks[path].size) for path, own in positions.items()}
    values, structure = jax.tree.flatten(state.inner)
    mirrored = owners(state.inner, {path: own.shape for path, own in positions.items()})
    values = [
        value if path is None else moves[path](value, jnp.zeros(sizes[path], value.dtype))
        for path, value in zip(mirrored, values, strict=True)
    ]
    places = jax.tree.unflatten(jax.tree.structure(state.positions), list(new.values()))
    return state._replace(inner=structure.unflatten(values), positions=places)


def _masks_of(opt_state: Any, caller: str) -> dict[str, Any]:
    """Returns the masks of all packed leaves by path, or raises."""
    trees.check_known("opt_state", opt_state, caller)
    masks: dict[str, Any] = {}
    for state in pruning_states(opt_state):
        for path, mask in trees.leaf_by_path(state.masks).items():
            masks[path] = masks[path] & mask if path in masks else mask
    problems = []
    for state in packed_states(opt_state):
        for path, own in trees.leaf_by_path(state.positions).items():
            if path not in masks:
                problems.append(f"{path}: packed, but without a mask")
            elif own.size != own.shape[-1] or own.ndim != masks[path].ndim:
                problems.append(f"{path}: {own.shape}, packed for several networks")
    trees.raise_for(
        problems,
        "`opt_state` must be the state of one network, with the masks of all packed leaves. Pick "
        "one network, `jax.tree.map(lambda x: x[0], opt_state)`, or pack only what is pruned:",
    )
    return masks


def _count(mask: Any) -> int:
    """Counts the kept weights of a leaf, on the host; a leaf has fewer than 2**31."""
    return int(meshes.automatically(count, jnp.asarray(mask)))
