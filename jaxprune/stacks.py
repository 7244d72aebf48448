"""Functions for the argument `stacked`, which say which axes of a leaf number copies of a layer.

Layers that are scanned (`nn.scan`, `nnx.scan`, `jax.lax.scan`, Haiku's `layer_stack`) or mapped
(`nnx.vmap`, `equinox.filter_vmap`), and the experts of a mixture, keep the weights of all copies in
one array. A function `(path, leaf) -> axis, tuple of axes, or None` names the axes that number the
copies. There are three ways to make one:

* `under` names the stacked parts of the tree;
* `from_layer` compares the stack with a single layer, in any framework;
* `from_metadata` reads the axis names that Linen and NNX write on request.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxprune import trees

__all__ = ["axes_of", "from_layer", "from_metadata", "under"]

Axes = int | tuple[int, ...]
StackedRule = Callable[[str, Any], Axes | None]


def under(*prefixes: str, axis: Axes = 0) -> StackedRule:
    """Declares that everything below some paths is stacked.

    Args:
        *prefixes: paths of modules or leaves, such as `"layers"`; `""` is the whole tree.
        axis: the axis, or axes, that number the copies.

    Returns:
        Function `(path, leaf) -> axis`; it returns None for a leaf that is not stacked.

    Raises:
        ValueError: if there is no prefix.

    Example:
        >>> import jax.numpy as jnp
        >>> stacked = under("layers")
        >>> stacked("layers/kernel", jnp.zeros((12, 64, 256))), stacked("head", jnp.zeros((64, 8)))
        (0, None)
    """
    if not prefixes:
        raise ValueError('`prefixes` must name at least one path; `""` is the whole tree.')
    return lambda path, leaf: axis if any(_below(path, prefix) for prefix in prefixes) else None


def from_layer(layer: Any, prefix: str = "", *, axis: Axes = 0) -> StackedRule:
    """Compares a stack with a single layer.

    An axis numbers copies if the leaf without it has the shape of the layer's leaf. A leaf with the
    same shape as the layer's leaf is shared by all copies. This works in every framework: make one
    layer, or only its shapes with `jax.eval_shape`.

    Args:
        layer: tree of arrays or shapes: one layer without the stack, whose leaves have the paths
            that they have below `prefix`.
        prefix: path of the stack; `""` is the whole tree.
        axis: the axis, or axes, that number the copies.

    Returns:
        Function `(path, leaf) -> axes`; it returns None for a leaf that is not stacked, and raises
        `ValueError` for a leaf below `prefix` that the layer does not have or whose shape does not
        fit.

    Raises:
        ValueError: if `layer` has no arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> stacked = from_layer({"kernel": jnp.zeros((64, 256)), "bias": jnp.zeros(256)}, "layers")
        >>> stacked("layers/bias", jnp.zeros((12, 256))), stacked("layers/bias", jnp.zeros(256))
        ((0,), None)
    """
    shapes = {
        path: trees.shape_of(leaf)
        for path, leaf in trees.leaf_by_path(layer).items()
        if trees.is_array(leaf)
    }
    if not shapes:
        raise ValueError("`layer` must be a tree of arrays or shapes, but has none.")

    def stacked(path: str, leaf: Any) -> Axes | None:
        if not _below(path, prefix):
            return None
        name = path[len(prefix) :].lstrip("/")
        if name not in shapes:
            known = ", ".join(list(shapes)[:8])
            raise ValueError(
                f"`layer` must have the leaves of the stack below {prefix!r}, but has no {name} "
                f"for {path}. It has: {known}."
            )
        shape = trees.shape_of(leaf)
        if shape == shapes[name]:
            return None
        axes = trees.stacked_axes(path, leaf, lambda *_: axis)
        if _without(shape, axes) != shapes[name]:
            raise ValueError(
                f"`axis` {axis} does not number the copies of {path}: its shape is {shape}, that "
                f"of one layer is {shapes[name]}. Give the axis that a single layer does not have."
            )
        return axes

    return stacked


def from_metadata(tree: Any, *names: str) -> StackedRule:
    """Reads the axis names that Linen and NNX write.

    They write names only if the transformation asks for them and the layer annotates its
    parameters: in Linen `nn.scan(..., metadata_params={nn.PARTITION_NAME: "layers"})` and
    `kernel_init=nn.with_partitioning(init, (None, None))`, in NNX `nnx.vmap` or `nnx.scan` with
    `transform_metadata={nnx.PARTITION_NAME: "layers"}` and `nnx.with_partitioning`. A parameter
    without names, such as a bias, is stacked like its neighbours in the same module.

    Args:
        tree: Linen variables with their boxes, or an NNX module or state, with the paths of the
            tree to prune.
        *names: names of the axes that number copies; `"layers"` if none is given.

    Returns:
        Function `(path, leaf) -> axes`; it returns None for a leaf that is not stacked, and raises
        `ValueError` for a path that `tree` does not have.

    Raises:
        ValueError: if no leaf has an axis of such a name, or if it would be a guess whether a
            kernel without names is stacked.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn
        >>> kernel = nn.Partitioned(jnp.zeros((12, 64, 256)), names=("layers", "in", "out"))
        >>> stacked = from_metadata({"kernel": kernel, "bias": jnp.zeros((12, 256))})
        >>> stacked("kernel", kernel.value), stacked("bias", jnp.zeros((12, 256)))
        ((0,), (0,))
    """
    wanted, leaves = set(names or ("layers",)), trees.leaf_by_path(tree)
    labels = _axis_names(tree)
    axes = {
        path: tuple(i for i, label in enumerate(own) if wanted & _all_of(label))
        for path, own in labels.items()
    }
    if not any(axes.values()):
        seen = sorted({text for own in labels.values() for label in own for text in _all_of(label)})
        raise ValueError(
            f"`tree` has no axis named {' or '.join(sorted(wanted))}. Names seen: "
            f"{', '.join(seen) or 'none'}. Ask the transformation for names (`PARTITION_NAME`) and "
            "annotate the kernels, or use `stacks.from_layer` or `stacks.under`."
        )
    stacks = {path: own for path, own in axes.items() if own}
    lengths = {(own, _only(leaves[path], own)) for path, own in stacks.items()}
    modules = {path.rpartition("/")[0]: path for path in stacks}
    unclear = []
    for path, leaf in leaves.items():
        if path in axes or not trees.is_array(leaf):
            continue
        partner = modules.get(path.rpartition("/")[0])
        if partner is not None and _only(leaf, stacks[partner]) == _only(
            leaves[partner], stacks[partner]
        ):
            axes[path] = stacks[partner]
        elif trees.why_not_pruned(path, leaf) is None and any(
            _only(leaf, own) == length for own, length in lengths
        ):
            unclear.append(f"{path}: shape {trees.shape_of(leaf)}")
    trees.raise_for(
        unclear,
        "`tree` does not say whether these kernels are stacked; annotate them as well, or use "
        "`stacks.from_layer` or `stacks.under`:",
    )

    def stacked(path: str, leaf: Any) -> Axes | None:
        if path not in leaves:
            raise ValueError(
                f"`stacked` comes from a tree without {path}. Call `stacks.from_metadata` with the "
                f"tree that is pruned; the first leaf of its tree was {next(iter(leaves))}."
            )
        return axes.get(path) or None

    return stacked


def axes_of(params: Any, stacked: trees.Stacked) -> dict[str, tuple[int, ...]]:
    """Returns the stacked axes of all leaves of a tree.

    Args:
        params: any pytree.
        stacked: function `(path, leaf) -> axes`, or None: nothing is stacked.

    Returns:
        Dict from path to an ascending tuple of axes, in flattening order.

    Raises:
        ValueError: if `stacked` matches no leaf, most likely because of a wrong path, or returns
            something that is not an axis.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"layers": {"kernel": jnp.zeros((12, 64, 256))}, "head": jnp.zeros((256, 8))}
        >>> axes_of(params, under("layers"))
        {'head': (), 'layers/kernel': (0,)}
    """
    leaves = trees.leaf_by_path(params)
    axes = {path: trees.stacked_axes(path, leaf, stacked) for path, leaf in leaves.items()}
    if stacked is not None and leaves and not any(axes.values()):
        trees.raise_for(
            [f"{path}: shape {trees.shape_of(leaf)}" for path, leaf in list(leaves.items())[:8]],
            "`stacked` matches no leaf; change the rule, or omit it. The first leaves are:",
        )
    return axes


def _below(path: str, prefix: str) -> bool:
    """Returns whether a path is that of a module or lies below it."""
    prefix = prefix.strip("/")
    return not prefix or path == prefix or path.startswith(prefix + "/")


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of one copy."""
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _only(leaf: Any, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the number of copies along each axis; None if the leaf does not have these axes."""
    shape = trees.shape_of(leaf)
    return tuple(shape[axis] for axis in axes) if max(axes) < len(shape) else None


def _all_of(label: Any) -> set[str]:
    """Returns the names of one axis: one, several or none."""
    return set(label) if isinstance(label, tuple) else set() if label is None else {str(label)}


def _axis_names(tree: Any) -> Mapping[str, tuple[Any, ...]]:
    """Returns the axis names of each leaf that has any, by path."""
    from flax import linen, nnx

    def is_box(node: Any) -> bool:
        return isinstance(node, (nnx.Variable, linen.meta.AxisMetadata))

    found = {}
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box):
        if isinstance(node, nnx.Variable):
            metadata = node.get_metadata()
            labels = metadata.get("out_sharding") or metadata.get("sharding_names")
        else:
            labels = getattr(node, "names", None)
        if labels:
            found[trees.path_string(path)] = tuple(labels)
    return found
