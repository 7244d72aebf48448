"""Reads masks from an optimizer state, puts masks into one, and applies masks to parameters."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune import meshes, trees

__all__ = ["Overlap", "apply_masks", "get_masks", "overlap", "set_masks"]


class Overlap(NamedTuple):
    """The fractions of kept weights that other masks keep as well, from `overlap`.

    Example:
        >>> Overlap(0.5, {"kernel": 0.5}).total
        0.5
    """

    total: float  # over all weights that the first masks keep; 1 if nothing is pruned
    leaves: dict[str, float]  # by path


def get_masks(opt_state: Any) -> Any:
    """Reads the masks from an optimizer state, wherever the pruning transformation is.

    Args:
        opt_state: state of any Optax optimizer that contains a pruning transformation: in a
            chain, behind `optax.MultiSteps`, `optax.masked`, `optax.partition`, or the
            `opt_state` of an `nnx.Optimizer`.

    Returns:
        Tree of bools like the parameters, True where a weight is kept. A leaf that no pruning
        transformation sees has the scalar mask True. So does a whole branch that `optax.masked` or
        `optax.partition` hides with one flag or label: all functions that take masks read a scalar
        as the mask of everything below it.

    Raises:
        ValueError: if the state contains no pruning transformation, or two that belong to different
            trees of parameters; if it was restored without a target, so that its parts are dicts.

    Example:
        >>> import optax
        >>> import jaxprune
        >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        >>> optimizer = optax.chain(optax.sgd(0.1), jaxprune.agip_transform(0.5, stop=10))
        >>> masks = jaxprune.get_masks(optimizer.init(params))
        >>> masks["kernel"].tolist()
        [[True, True], [True, True]]
    """
    found = trees.state_fields(opt_state, "masks")
    if not found and _lost_its_types(opt_state):
        raise ValueError(
            "`opt_state` must be an optimizer state, but its parts are plain dicts, as after a "
            "restore without a target. Restore it into the structure that the optimizer makes: "
            "with Orbax, `checkpointer.restore(path, jax.eval_shape(optimizer.init, params))`; "
            "with Flax, `flax.serialization.from_state_dict(optimizer.init(params), opt_state)`."
        )
    if not found:
        raise ValueError(
            "`opt_state` holds no masks: it is the state of an optimizer without a pruning "
            f"transformation (type {type(opt_state).__name__}). Add one, for example "
            "`jaxprune.chain(optimizer, jaxprune.agip_transform(...))`."
        )
    return _merged(found)


def set_masks(opt_state: Any, masks: Any) -> Any:
    """Puts new masks into an optimizer state, wherever the pruning transformation is.

    The parameters do not change: the next update sets masked weights to 0, or `apply_masks` does so
    at once.

    Args:
        opt_state: state of an optimizer with a pruning transformation that does not change its
            masks, such as `fixed_mask_transform()`.
        masks: tree of bools with the paths of the parameters, True where a weight is kept. Each
            mask has the shape of its leaf or is a scalar, which may cover a whole branch. A leaf
            with an `optax.MaskedNode` in this tree keeps its current mask.

    Returns:
        The state with these masks; structure, shapes and dtypes do not change.

    Raises:
        ValueError: if the state holds no masks; if paths or shapes differ, or a mask prunes a leaf
            that has no mask in the state, listing every such leaf.

    Example:
        >>> import optax
        >>> import jaxprune
        >>> params = {"kernel": jnp.array([[3.0, -1.0]]), "bias": jnp.ones(2)}
        >>> optimizer = optax.chain(optax.sgd(0.1), jaxprune.fixed_mask_transform())
        >>> state = optimizer.init(params)
        >>> pruned, masks = jaxprune.prune(params, 0.5)
        >>> get_masks(set_masks(state, masks))["kernel"].tolist()
        [[True, False]]
    """
    held_masks = get_masks(opt_state)
    now = trees.spread(held_masks, masks)
    # A leaf that the state does not prune may be a function of a module, which needs no mask.
    free = {path for path, held in now.items() if held is not None and jnp.ndim(held) == 0}
    by_path = {
        path: None if path in free and not trees.is_numeric(mask) else mask
        for path, mask in trees.spread(masks, held_masks).items()
    }
    problems = trees.unmatched(by_path, now)
    for path, mask in by_path.items():
        held = now.get(path)
        if held is None or mask is None or not trees.is_numeric(mask):
            continue
        if jnp.result_type(mask) != jnp.bool_:
            problems.append(f"{path}: {jnp.result_type(mask)}, must be bool")
        elif jnp.ndim(held) == 0 and not np.all(mask):
            problems.append(f"{path}: pruned, but the optimizer does not prune it")
        elif jnp.ndim(held) and jnp.shape(mask) not in ((), jnp.shape(held)):
            problems.append(f"{path}: shape {jnp.shape(mask)}, but {jnp.shape(held)} in the state")
    trees.raise_for(problems, "`masks` must belong to the model that `opt_state` optimizes:")

    def renewed(state: Any) -> Any:
        if not trees.holds_masks(state):
            return state
        return state._replace(masks=jax.tree_util.tree_map_with_path(renewed_mask, state.masks))

    def renewed_mask(path: Any, held: Any) -> Any:
        mask = by_path.get(trees.path_string(path), held)
        return _placed_like(held, True if mask is None else mask)

    return jax.tree.map(renewed, opt_state, is_leaf=trees.holds_masks)


def apply_masks(tree: Any, masks: Any) -> Any:
    """Sets all masked entries of a tree to zero.

    Args:
        tree: parameters, or any tree with the same paths: gradients, momentum, an average of
            the parameters.
        masks: tree of bools, True where a weight is kept. Each mask has the shape of its leaf
            or is a scalar, which may cover a whole branch.

    Returns:
        Tree like `tree`, with the same dtypes.

    Raises:
        ValueError: if paths or shapes differ.

    Example:
        >>> apply_masks([jnp.array([1.0, 2.0])], [jnp.array([True, False])])[0].tolist()
        [1.0, 0.0]
    """
    by_path = fitting(masks, tree, "`masks` must have the paths and shapes of `tree`:")
    leaves = [_masked(leaf, by_path.get(path)) for path, leaf in trees.leaf_by_path(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def overlap(masks: Any, others: Any) -> Overlap:
    """Measures how many of the weights that one set of masks keeps are kept by another set, too.

    Two random masks of density d have an overlap of about d; those of the same network have 1.

    Args:
        masks: tree of bools, True where a weight is kept.
        others: tree of bools with the same paths. A scalar is the mask of its whole leaf. Leaves
            that neither tree prunes are not counted.

    Returns:
        An `Overlap`: the fraction for each leaf and for all of them together.

    Raises:
        ValueError: inside `jit`; if paths or shapes differ.

    Example:
        >>> first, second = {"w": np.array([True, True, False])}, {"w": np.arange(3) != 1}
        >>> overlap(first, second)
        Overlap(total=0.5, leaves={'w': 0.5})
    """
    for argument, tree in (("masks", masks), ("others", others)):
        trees.check_known(argument, tree, "masks.overlap")
    ours, theirs = (
        {path: mask for path, mask in trees.places(tree).items() if trees.is_numeric(mask)}
        for tree in (masks, others)
    )
    bad = [f"{path}: only in one of them" for path in ours.keys() ^ theirs.keys()]
    own = {
        path: (trees.shape_of(mask), trees.shape_of(theirs[path]))
        for path, mask in ours.items()
        if path in theirs
    }
    bad += [f"{path}: shapes {a} and {b}" for path, (a, b) in own.items() if a and b and a != b]
    trees.raise_for(sorted(bad), "`masks` and `others` must be masks of the same leaves:")
    shared, kept = {}, {}
    for path in own:
        one, other = np.broadcast_arrays(*(np.asarray(tree[path], bool) for tree in (ours, theirs)))
        if not (one.all() and other.all()):
            shared[path], kept[path] = int(np.sum(one & other)), int(np.sum(one))
    leaves = {path: shared[path] / max(1, kept[path]) for path in kept}
    total = sum(shared.values()) / max(1, sum(kept.values())) if kept else 1.0
    return Overlap(total, leaves)


def _masked(leaf: Any, mask: Any) -> Any:
    """Returns a leaf with zeros where its mask is False; leaves non-arrays unchanged."""
    if not trees.is_numeric(mask) or not trees.is_numeric(leaf):
        return leaf
    if not trees.is_array(leaf) and trees.keeps_leaf(mask):
        return leaf  # settings of a module, such as a dropout rate, must not become arrays
    mask = mask if jnp.ndim(mask) == 0 else meshes.placed_like(jnp.asarray(mask), leaf)
    return jnp.where(mask, leaf, jnp.zeros_like(leaf))


def fitting(masks: Any, tree: Any, rule: str) -> dict[str, Any]:
    """Returns masks by path; raises unless each fits its leaf in a tree."""
    by_path, leaf_of = trees.spread(masks, tree), trees.leaf_by_path(tree)
    problems = trees.unmatched(by_path, trees.places(tree))
    problems += [
        f"{path}: shape {trees.shape_of(leaf)}, but mask {trees.shape_of(by_path[path])}"
        for path, leaf in leaf_of.items()
        if path in by_path and trees.shape_of(by_path[path]) not in ((), trees.shape_of(leaf))
    ]
    problems += [
        f"{path}: {type(leaf).__name__}, which cannot be 0, but mask False"
        for path, leaf in leaf_of.items()
        if not trees.is_numeric(leaf) and by_path.get(path) is False
    ]
    trees.raise_for(problems, rule)
    return by_path


def _placed_like(held: Any, mask: Any) -> jax.Array:
    """Returns a mask in the shape and, outside `jit`, on the devices of the one it replaces."""
    mask = jnp.broadcast_to(jnp.array(mask), held.shape)
    if isinstance(held, Tracer) or isinstance(mask, Tracer):
        return meshes.placed_like(mask, held)
    if not held.committed:
        return mask
    return jax.device_put(mask, held.sharding)


def _lost_its_types(state: Any) -> bool:
    """Returns whether a state has masks, but in a dict, and no NamedTuple at all."""
    keys = [key for path, _ in jax.tree_util.tree_leaves_with_path(state) for key in path]
    has_types = any(isinstance(key, jax.tree_util.GetAttrKey) for key in keys)
    return jax.tree_util.DictKey("masks") in keys and not has_types


def _merged(found: list[Any]) -> Any:
    """Merges the masks of several transformations, each of which sees some of the leaves.

    Where one hides a whole branch, the masks come from the others, and are True if all hide it.
    """
    seen = [masks for masks in found if not trees.is_absent(masks)]
    if not seen:
        return jnp.array(True)
    if jax.tree_util.all_leaves(seen):
        # Wrappers that average states turn bools into integers, and ~1 is -2.
        return functools.reduce(operator.and_, [jnp.asarray(mask, bool) for mask in seen])
    levels = [
        jax.tree_util.tree_flatten_with_path(masks, is_leaf=lambda node, own=masks: node is not own)
        for masks in seen
    ]
    children = [{trees.path_string(key): child for key, child in level} for level, _ in levels]
    names = list(children[0])
    if any(own.keys() != children[0].keys() for own in children):
        kinds = "; ".join(", ".join(map(repr, own)) for own in children)
        raise ValueError(
            "`opt_state` must hold the masks of one tree of parameters, but two pruning "
            f"transformations in it belong to different trees: {kinds}. Read the masks of each "
            "from its own state."
        )
    return levels[0][1].unflatten([_merged([own[name] for own in children]) for name in names])
