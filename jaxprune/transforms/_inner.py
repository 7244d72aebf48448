"""The network that the members before a pruning transformation see, and their states."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import meshes, trees
from jaxprune.transforms._base import keeps_value, project


def pruning_states(state: Any) -> list[Any]:
    """Returns all states of pruning transformations in an optimizer state, in flattening order."""
    return [
        node
        for node in jax.tree.leaves(state, is_leaf=trees.holds_masks)
        if trees.holds_masks(node)
    ]


def masks_like(params: Any, states: Sequence[Any]) -> Any:
    """Returns the masks of pruning states as a tree like `params`, with `MaskedNode` elsewhere.

    Masks are matched by path, because `optax.masked` and `optax.partition` hide leaves or branches.
    """
    found: dict[str, Any] = {}
    for state in states:
        for path, mask in trees.leaf_by_path(state.masks).items():
            found[path] = found[path] & mask if path in found else mask
    return jax.tree_util.tree_map_with_path(
        lambda path, _: found.get(trees.path_string(path), optax.MaskedNode()), params
    )


def keep_unpruned(tree: Any, masks: Any) -> Any:
    """Sets the pruned entries of a tree like the parameters to 0."""

    def keep(mask: Any, leaf: Any) -> Any:
        return leaf if trees.is_absent(mask) else jnp.where(mask, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(keep, masks, tree, is_leaf=trees.is_absent)


def project_all(updates: Any, masks: Any, params: Any) -> Any:
    """Applies `project` to a whole tree."""

    def one(mask: Any, update: Any, weight: Any) -> Any:
        return update if trees.is_absent(mask) else project(update, mask, weight)

    return jax.tree.map(one, masks, updates, params, is_leaf=trees.is_absent)


def restart_moments(member: Any, state: Any, masks: Any, params: Any) -> Any:
    """Resets the state of a transformation to that of its `init` wherever weights are pruned.

    This applies to each array that mirrors a parameter: its path ends with the path of the
    parameter, and it has the parameter's shape, possibly after a leading axis of history. The state
    is not simply set to 0, because Adagrad, Rprop and COCOB do not start at 0.

    Args:
        member: the transformation.
        state: the state of the transformation.
        masks: tree like the parameters, bool or `MaskedNode`.
        params: the parameters for `init`, with zeros where weights are pruned.

    Returns:
        State of the same structure, shapes and dtypes.
    """
    mask_of = trees.leaf_by_path(masks)
    moments = jax.tree.map(
        lambda node: jax.tree.map(lambda _: 0, node) if _holds_no_moments(node) else node,
        state,
        is_leaf=_holds_no_moments,
    )
    own = [_mask_of(path, leaf, mask_of) for path, leaf in trees.leaves_with_paths(moments)]
    if all(mask is None for mask in own):
        return state

    def restart(old: Any, new: Any, mask: Any) -> Any:
        if mask is None:
            return old
        mask = mask.reshape((1,) * (jnp.ndim(old) - mask.ndim) + mask.shape)
        return jnp.where(mask, old, jnp.asarray(new, old.dtype))

    leaves, structure = jax.tree.flatten(state)

    def restarted(leaves: list[Any], own: list[Any], params: Any) -> list[Any]:
        fresh = jax.tree.leaves(member.init(params))
        return [restart(*three) for three in zip(leaves, fresh, own, strict=True)]

    # A history has one more axis than its mask, which explicit meshes would not mix.
    new = meshes.automatically(restarted, leaves, own, params, like=leaves)
    return structure.unflatten(new)


def forget_values(state: Any, changed: Any) -> Any:
    """Makes `optax.value_and_grad_from_state` evaluate again if the point has changed.

    Args:
        state: state of any optimizer.
        changed: bool [], whether a line search kept value and gradient of a different point.

    Returns:
        The state, with an infinite value in each line search.
    """

    def forget(node: Any) -> Any:
        if not keeps_value(node):
            return node
        value = jnp.asarray(node.value)
        return node._replace(value=jnp.where(changed, jnp.full_like(value, jnp.inf), value))

    return jax.tree.map(forget, state, is_leaf=keeps_value)


def differs(updates: Any, others: Any) -> jax.Array:
    """Returns whether two trees differ in any entry, bool []."""
    flags = jax.tree.map(lambda a, b: jnp.any(a != b), updates, others)
    return jnp.any(jnp.stack(jax.tree.leaves(flags)))


def order_problems(state: Any, where: str = "") -> list[str]:
    """Lists the transformations that follow or wrap pruning so that zeros cannot hold."""
    if not pruning_states(state) or trees.holds_masks(state):
        return []
    if type(state) is tuple or isinstance(state, list):
        children = {f"{where}[{i}]": child for i, child in enumerate(state)}
    elif isinstance(state, dict):
        children = {f"{where}[{key!r}]": child for key, child in state.items()}
    else:
        fields = getattr(state, "_fields", ())
        children = {f"{where}.{name}": getattr(state, name) for name in fields}
    problems = []
    if type(state) is tuple or isinstance(state, OrderedDict):
        last = None
        for name, child in children.items():
            if pruning_states(child):
                last = name
            elif last is not None and _is_state(child):
                problems.append(f"`state{name}` follows the pruning of `state{last}`")
    if _mixes_copies(state):
        kind = type(state).__name__.removesuffix("State")
        problems.append(f"`state{where}`: {kind} mixes parameters of several steps around pruning")
    for name, child in children.items():
        problems += order_problems(child, name)
    return problems


def has_sam(state: Any) -> bool:
    """Returns whether an optimizer state is that of SAM, which takes no unknown arguments."""

    def is_sam(node: Any) -> bool:
        return isinstance(node, optax.contrib.SAMState)

    return any(map(is_sam, jax.tree.leaves(state, is_leaf=is_sam)))


def _holds_no_moments(node: Any) -> bool:
    """Returns whether a node of a state has no separate entry for each weight."""
    # GaLore's moments belong to a projection, which may have the shape of the weight.
    # Packed moments follow masks by themselves.
    known = trees.holds_masks(node) or trees.is_packed(node)
    return known or isinstance(node, optax.contrib.GaLoreState)


def _mask_of(path: str, moment: Any, masks: Mapping[str, Any]) -> Any | None:
    """Returns the mask of the parameter that an array of a state mirrors, or None."""
    parts = path.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts) + 1))
    mask = next((masks[end] for end in ends if end in masks), None)
    if mask is None or not mask.ndim:
        return None
    # Adafactor's sums over rows do not have the shapes of their weights.
    return mask if jnp.shape(moment)[-mask.ndim :] == mask.shape else None


def _is_state(node: Any) -> bool:
    """Returns whether a node may be the state of a transformation, and not a mere counter."""
    return isinstance(node, (tuple, dict))


def _mixes_copies(state: Any) -> bool:
    """Returns whether a wrapper mixes the updates inside it with parameters kept in its state."""
    kinds = (
        optax.LookaheadState,
        optax.contrib.ScheduleFreeState,
        optax.contrib.MechanicState,
    )
    transparent = isinstance(state, optax.contrib.SAMState) and state.cache is not None
    return isinstance(state, kinds) or transparent
