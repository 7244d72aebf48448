"""Training under given masks that do not change."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxprune import meshes, trees
from jaxprune.transforms._base import check_line_search, project, put_masks, split, update_of


class FixedMaskState(NamedTuple):
    """The state of `fixed_mask_transform`.

    Example:
        >>> masks = {"kernel": jnp.array([[True, False]])}
        >>> state = fixed_mask_transform(masks).init({"kernel": jnp.ones((1, 2))})
        >>> state.masks["kernel"].tolist()
        [[True, False]]
    """

    masks: Any  # bool, True where a weight is kept; only for leaves that have a mask


def fixed_mask_transform(
    masks: Any = None, *, prunable: trees.Prunable = None
) -> optax.GradientTransformationExtraArgs:
    """Keeps the zeros of a pruned network at 0 while the other weights continue to train.

    Put it last in the chain. Use it for fine-tuning after `prune`, for a lottery ticket, or for
    masks found at initialisation.

    Args:
        masks: tree of bools with the paths of the parameters, True where a weight is kept, as
            returned by `prune` and `get_masks`. Each has the shape of its leaf, or is the scalar
            True, which may cover a whole branch. A mask that is True everywhere does not change the
            updates of its leaf. Masks of leaves that `optax.masked` or `optax.partition` hides are
            ignored. None keeps all weights until `set_masks` puts new masks into the state, which
            needs no new compilation; `jaxprune.rewinding` does so.
        prunable: which leaves get a mask if `masks` is None, see `trees.prunable_flags`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its `update` needs `params`.

    Raises:
        ValueError: if both `masks` and `prunable` are given; from `init`, if masks and parameters
            differ in paths or shapes, listing every such leaf; from `update`, if `params` is
            missing or has a different structure.

    Example:
        >>> import jaxprune
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
        >>> params, masks = jaxprune.prune(params, 0.5)
        >>> optimizer = optax.chain(optax.adam(0.1), fixed_mask_transform(masks))
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(params, state, params)
        >>> (optax.apply_updates(params, updates)["kernel"] != 0).tolist()
        [[True, False], [False, True]]
    """

    if masks is not None and prunable is not None:
        raise ValueError(
            "Give `masks` or `prunable`, not both: `masks` already says which leaves are pruned."
        )

    def init_fn(params: optax.Params) -> FixedMaskState:
        if trees.is_placeholder(params):
            return FixedMaskState(params)
        if masks is None:
            flags = trees.prunable_flags(params, prunable)
            kept = [jnp.ones_like(leaf, dtype=bool) for leaf in trees.pick(params, flags)]
            return FixedMaskState(put_masks(params, flags, kept))
        by_path, leaf_of = trees.spread(masks, params), trees.leaf_by_path(params)
        problems = trees.unmatched(by_path, trees.places(params))
        problems += [
            f"{path}: {_described(by_path[path])}, but the parameter has shape "
            f"{trees.shape_of(leaf)}"
            for path, leaf in leaf_of.items()
            if trees.is_numeric(by_path.get(path)) and not _fits(by_path[path], leaf)
        ]
        trees.raise_for(problems, "`masks` must be bools with the paths and shapes of `params`:")
        own = [by_path.get(path) for path in leaf_of]
        flags = tuple(not _keeps_all(mask) for mask in own)
        kept = [
            meshes.placed_like(jnp.array(mask), leaf)
            for mask, leaf, flag in zip(own, leaf_of.values(), flags, strict=True)
            if flag
        ]
        return FixedMaskState(put_masks(params, flags, kept))

    @update_of(FixedMaskState)
    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        check_line_search(extra_args)
        params = trees.without_settings(params, updates)
        if not jax.tree.leaves(state.masks):
            return updates, state
        has_mask = jax.tree.map(
            lambda mask: not trees.is_absent(mask), state.masks, is_leaf=trees.is_absent
        )
        parts = split(updates, state.masks, params, has_mask)
        moves = map(project, parts.updates, parts.masks, parts.weights)
        return trees.put(updates, parts.flags, list(moves)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _fits(mask: Any, leaf: Any) -> bool:
    """Returns whether a mask is a bool array of the leaf's shape, or the scalar True."""
    if jnp.result_type(mask) != jnp.bool_:
        return False
    if jnp.ndim(mask) == 0 and trees.shape_of(leaf) != ():
        return bool(mask)
    if not trees.is_numeric(leaf) and not trees.keeps_leaf(mask):
        return False
    return jnp.shape(mask) == trees.shape_of(leaf)


def _keeps_all(mask: Any) -> bool:
    """Returns whether a mask is known to be all True; it would only cost time at each step."""
    if not trees.is_numeric(mask):
        return True
    # NumPy, because inside `jit` JAX would return a traced array.
    return not isinstance(mask, Tracer) and bool(np.all(np.asarray(mask)))


def _described(mask: Any) -> str:
    """Describes a mask for an error."""
    return f"{jnp.result_type(mask)}{list(jnp.shape(mask))}"
