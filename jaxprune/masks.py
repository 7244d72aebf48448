"""Reads masks from an optimizer state, puts masks into one, applies masks, and counts in them."""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune import counting, meshes, stacks, trees

__all__ = [
    "Overlap",
    "apply_masks",
    "get_masks",
    "merge_low_rank",
    "overlap",
    "set_masks",
    "sparsities",
]


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


def sparsities(masks: Any, *, stacked: trees.Stacked = None) -> dict[str, jax.Array]:
    """Returns the sparsity of each pruned layer, for any writer of metrics; works inside `jit`.

    The zeros are counted in integers, exactly, and each sparsity is their number divided by the
    size of the layer.

    Args:
        masks: tree of bools, True where a weight is kept, or the state of an optimizer that
            contains a pruning transformation. A leaf with a scalar mask is not pruned and is left
            out.
        stacked: function `(path, leaf) -> axes` that number copies of a layer, see
            `jaxprune.stacks`. Each copy has a separate value, such as `layers/kernel[3]`; `leaf` is
            the mask.

    Returns:
        Dict from path to sparsity, float32 [], and `"total"`, that of all these layers together.

    Raises:
        ValueError: if no leaf has a mask of its shape, or a leaf is not bool, or has the path
            `total`; if `stacked` matches nothing.

    Example:
        >>> masks = {"bias": True, "layers": jnp.array([[True, False, False, False], [True] * 4])}
        >>> values = jax.jit(lambda m: sparsities(m, stacked=stacks.under("layers")))(masks)
        >>> {path: float(value) for path, value in values.items()}
        {'layers[0]': 0.75, 'layers[1]': 0.0, 'total': 0.375}
    """
    if trees.state_fields(masks, "masks"):
        masks = get_masks(masks)
    every = {path: mask for path, mask in trees.places(masks).items() if trees.is_array(mask)}
    trees.raise_for(
        [f"{path}: {mask.dtype}" for path, mask in every.items() if mask.dtype != bool],
        "`masks` must be a tree of bools, or the state of an optimizer with a pruning "
        "transformation; `jaxprune.get_masks(opt_state)` reads them. These are something else:",
    )
    leaves = {path: mask for path, mask in every.items() if mask.shape}
    if not leaves:
        raise ValueError(
            "`masks` must have a mask of the shape of its leaf, but no leaf has one: nothing is "
            "pruned."
        )
    axes = stacks.axes_of(leaves, stacked)
    copies = [trees.copy_paths(path, mask.shape, axes[path]) for path, mask in leaves.items()]
    names = [name for own in copies for name in own]
    if "total" in names:
        raise ValueError(
            "`masks` must not have a leaf with the path `total`, the name of the sparsity of all; "
            "rename it."
        )
    layouts = counting.stacks(list(leaves.values()), [axes[path] for path in leaves])
    sizes = np.concatenate([[stack.size] * stack.copies for stack in layouts])

    def measured(leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
        with counting.exact(leaves):
            kept = counting.count_kept(leaves, [stack.axes for stack in layouts])
            removed = jnp.asarray(sizes, kept.dtype) - kept
            total = jnp.sum(removed).astype(jnp.float32) / np.float32(sizes.sum())
            return removed.astype(jnp.float32) / np.float32(sizes), total

    values, total = meshes.automatically(measured, [jnp.asarray(mask) for mask in leaves.values()])
    return {name: values[index] for index, name in enumerate(names)} | {"total": total}


def merge_low_rank(
    kernel: jax.Array, a: jax.Array, b: jax.Array, *, scale: Any = 1.0, mask: Any = None
) -> jax.Array:
    """Merges a low-rank adapter into a pruned kernel: `mask * (kernel + scale * a @ b)`.

    The product of two factors has no zeros, so adding it alone would undo the pruning. It is
    computed in float32 or wider, and masked weights are exactly 0 afterwards. What the adapter adds
    to masked weights is lost; an adapter that was trained with the same mask on its product loses
    nothing.

    Args:
        kernel: floating [inputs, outputs]; or with several axes for either, whose product the
            factors have; or with more axes first, one adapter for each copy of a stack.
        a: floating [inputs, rank]; of a stack [copies, inputs, rank].
        b: floating [rank, outputs]; of a stack [copies, rank, outputs]. For a kernel that is
            stored as [outputs, inputs], pass `b.T` as `a` and `a.T` as `b`.
        scale: number by which the product is multiplied, such as `alpha / rank`.
        mask: bool like `kernel`, True where a weight is kept; None keeps what is not 0.

    Returns:
        Array with the shape and dtype of `kernel`.

    Raises:
        ValueError: if the shapes do not fit, or an array is not floating point.

    References:
        Hu et al. LoRA: low-rank adaptation of large language models. arXiv:2106.09685.

    Example:
        >>> kernel = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> merge_low_rank(kernel, jnp.ones((2, 1)), jnp.ones((1, 2)), scale=0.5).tolist()
        [[1.5, 0.0], [0.0, 2.5]]
    """
    arrays = {"kernel": jnp.asarray(kernel), "a": jnp.asarray(a), "b": jnp.asarray(b)}
    trees.raise_for(
        [f"{name}: {x.dtype}" for name, x in arrays.items() if not _is_real(x)],
        "`kernel`, `a` and `b` must be floating point; convert these:",
    )
    kernel, a, b = arrays.values()
    shapes = ", ".join(f"`{name}` {x.shape}" for name, x in arrays.items())
    if a.ndim < 2 or b.ndim != a.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            "`a` and `b` must be [..., inputs, rank] and [..., rank, outputs], with the same axes "
            f"before these and the same rank, but the shapes are {shapes}; transpose or swap them."
        )
    whole = (*a.shape[:-1], b.shape[-1])
    if not _splits(kernel.shape, whole):
        raise ValueError(
            f"`a @ b` must have the shape of `kernel`, but has {whole}; the shapes are {shapes}. "
            "For a kernel [outputs, inputs], pass `b.T` as `a` and `a.T` as `b`."
        )
    if mask is not None and jnp.shape(mask) not in ((), kernel.shape):
        raise ValueError(
            f"`mask` must have the shape of `kernel`, {kernel.shape}, but has {jnp.shape(mask)}; "
            "give the mask of this leaf."
        )
    wide = jnp.promote_types(jnp.result_type(kernel, a, b), jnp.float32)
    product = jnp.matmul(a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST)
    merged = kernel.astype(wide) + jnp.asarray(scale, wide) * product.reshape(kernel.shape)
    kept = kernel != 0 if mask is None else jnp.asarray(mask, bool)
    return jnp.where(kept, merged, jnp.zeros_like(merged)).astype(kernel.dtype)


def _is_real(x: jax.Array) -> bool:
    """Returns whether an array is floating point."""
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _splits(shape: tuple[int, ...], matrices: tuple[int, ...]) -> bool:
    """Returns whether a kernel is a stack of matrices, with several axes for either side."""
    lead, (rows, columns) = len(matrices) - 2, matrices[-2:]
    rest = shape[lead:]
    sides = ((math.prod(rest[:i]), math.prod(rest[i:])) for i in range(1, len(rest)))
    return shape[:lead] == matrices[:-2] and (rows, columns) in sides


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
