"""A warning about leaves that an optimizer freezes but that pruning would still set to 0."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import trees


def warn_of_frozen(members: Sequence[Any], states: Sequence[Any], params: Any, masks: Any) -> None:
    """Warns of pruned leaves that the members before pruning do not change.

    `optax.freeze` and `optax.set_to_zero` look like any transformation without a state. Therefore,
    if some leaves are treated separately (`optax.masked`, `optax.partition`), the members are tried
    on a tree of small arrays: a leaf is frozen if its updates are all 0 while those of other leaves
    are not.

    Args:
        members: the transformations before pruning.
        states: the states that their `init` returns.
        params: tree of arrays.
        masks: tree like `params`, with `MaskedNode` at leaves that are not pruned.
    """
    parts = jax.tree.leaves(states, is_leaf=lambda node: isinstance(node, optax.MaskedState))
    if not any(isinstance(part, optax.MaskedState) for part in parts):
        return
    moved = _moves(members, params)
    pruned = [path for path in trees.leaf_by_path(masks) if path in moved]
    frozen = [path for path in pruned if not moved[path]]
    if frozen and any(moved.values()):
        warnings.warn(
            f"the optimizer does not change {', '.join(frozen)}, but pruning would set weights "
            "there to 0. Prune inside the part that trains, `optax.partition({'train': "
            "jaxprune.chain(optimizer, pruning), 'frozen': optax.set_to_zero()}, labels)`, or "
            "exclude these leaves with `prunable`.",
            stacklevel=4,
        )


def _moves(members: Sequence[Any], params: Any) -> dict[str, bool]:
    """Returns whether each leaf gets an update that is not 0; empty if that cannot be tried."""
    draw = np.random.default_rng(0)

    def small(leaf: Any) -> Any:
        shape = [min(size, 2) for size in jnp.shape(leaf)]
        return jnp.asarray(draw.normal(size=shape), jnp.result_type(leaf))

    def tried(weights: Any, updates: Any) -> Any:
        for member in members:
            updates, _ = member.update(updates, member.init(weights), weights)
        return [jnp.any(update != 0) for update in jax.tree.leaves(updates)]

    try:
        with jax.ensure_compile_time_eval(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flags = tried(jax.tree.map(small, params), jax.tree.map(small, params))
            return dict(zip(trees.leaf_by_path(params), map(bool, flags), strict=True))
    except Exception:  # a member needs more than gradients, so nothing is known
        return {}
