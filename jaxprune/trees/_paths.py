"""Leaf paths, comparisons of trees, and errors that name every bad leaf."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer


def path_string(path: tuple[Any, ...]) -> str:
    """Joins the keys of a leaf's path with slashes.

    A trailing `.value` is dropped: Flax NNX variables show it when an optimizer is initialised but
    not when it is updated.

    Args:
        path: a key path from `jax.tree_util`.

    Returns:
        A string such as `"blocks/0/conv1/kernel"`.

    Example:
        >>> leaves = jax.tree_util.tree_leaves_with_path({"a": [0.0, 1.0]})
        >>> [path_string(path) for path, _ in leaves]
        ['a/0', 'a/1']
    """
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Lists the leaves of a tree with their paths as strings, in flattening order.

    Args:
        tree: any pytree.
        is_leaf: what else counts as a leaf, as in `jax.tree.map`.

    Returns:
        Pairs of path and leaf.

    Raises:
        ValueError: if a dict in the tree has keys that cannot be sorted, such as 1 and "1".

    Example:
        >>> leaves_with_paths({"dense": {"bias": 1, "kernel": 2}})
        [('dense/bias', 1), ('dense/kernel', 2)]
    """
    try:
        found = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    except ValueError:
        raise_for(
            _unsortable(tree, ""),
            "all keys of a dict in a tree must be texts, or all numbers, because JAX sorts them; "
            "rename keys of:",
        )
        raise
    return [(path_string(path), leaf) for path, leaf in found]


def _unsortable(node: Any, path: str) -> list[str]:
    """Lists the dicts in a tree whose keys cannot be sorted."""
    if isinstance(node, Mapping):
        try:
            sorted(node)
        except TypeError:
            return [f"{path.rstrip('/') or 'the tree itself'}: {', '.join(map(repr, node))}"]
        items = list(node.items())
    else:
        items = list(enumerate(node)) if isinstance(node, (list, tuple)) else []
    return [line for key, child in items for line in _unsortable(child, f"{path}{key}/")]


def leaf_by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, in flattening order.

    Args:
        tree: any pytree.

    Returns:
        Dict from path to leaf.

    Raises:
        ValueError: if two leaves have the same path, as in `{"a/b": 0, "a": {"b": 1}}`.

    Example:
        >>> leaf_by_path({"dense": {"bias": 1, "kernel": 2}})
        {'dense/bias': 1, 'dense/kernel': 2}
    """
    named = leaves_with_paths(tree)
    by_path = dict(named)
    if len(by_path) < len(named):
        paths = [path for path, _ in named]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise_for(twice, "leaves must have different paths; rename one of each of these:")
    return by_path


def copy_paths(path: str, shape: Sequence[int], stacked: tuple[int, ...]) -> list[str]:
    """Names each copy of a stacked leaf, in row-major order of the stacked axes.

    Args:
        path: the path of the leaf.
        shape: the shape of the leaf.
        stacked: axes that number copies; empty for a single layer.

    Returns:
        The path itself, or one with an index for each copy.

    Example:
        >>> copy_paths("layers/kernel", (2, 64, 64), (0,)), copy_paths("head", (64, 10), ())
        (['layers/kernel[0]', 'layers/kernel[1]'], ['head'])
    """
    if not stacked:
        return [path]
    numbers = np.ndindex(*(shape[axis] for axis in stacked))
    return [f"{path}[{','.join(map(str, number))}]" for number in numbers]


def copies_of(array: np.ndarray, stacked: tuple[int, ...]) -> np.ndarray:
    """Returns the copies of a stacked leaf along one first axis, in the order of `copy_paths`.

    Args:
        array: the values of the leaf.
        stacked: axes that number copies, ascending; empty for a single layer.

    Returns:
        Array [copies, shape of a layer]; without stacked axes there is one copy.

    Example:
        >>> copies_of(np.ones((4, 3, 5)), (1,)).shape, copies_of(np.ones((4, 5)), ()).shape
        ((3, 4, 5), (1, 4, 5))
    """
    first = np.moveaxis(array, stacked, range(len(stacked)))
    return first.reshape(-1, *first.shape[len(stacked) :])


def is_placeholder(params: Any) -> bool:
    """Whether `init` was called with a tree without leaves, as `optax.tree_map_params` does.

    That function maps over the parts of an optimizer state that mirror the parameters. To find
    them, it calls `init` with a placeholder, a node without leaves, and looks where the placeholder
    turns up in the state. `init` must then neither refuse the tree (a rule that matches no leaf is
    an error otherwise) nor compute from it, and must put it, unchanged or mapped, where the masks
    would be. The placeholder's class is private to Optax, so it is known by having no leaves. A
    model without parameters looks the same, and has nothing to prune either.

    `test_optax_tools_understand_the_state` in tests/transforms/test_contract.py proves that this
    works for every transformation, and `test_optax_finds_the_masks_of_channels` in
    test_agip_channels.py for channels.

    Args:
        params: what `init` received.

    Returns:
        True if the tree has no leaves.

    Example:
        >>> is_placeholder({"kernel": 0.0}), is_placeholder({"layers": []})
        (False, True)
    """
    return not leaves_with_paths(params)


def state_fields(state: Any, name: str) -> list[Any]:
    """Returns all fields with a given name in the NamedTuples of an optimizer state.

    A parameter of the same name is not a field.

    Args:
        state: state of an Optax optimizer.
        name: name of the field.

    Returns:
        List of the fields' values, in flattening order.

    Example:
        >>> import jax.numpy as jnp
        >>> state = optax.sgd(0.1, momentum=0.9).init({"trace": jnp.zeros(2)})
        >>> state_fields(state, "trace")
        [{'trace': Array([0., 0.], dtype=float32)}]
    """

    def is_field(path: tuple[Any, ...], value: Any) -> bool:
        del value
        return isinstance(path[-1], optax.tree_utils.NamedTupleKey)

    found = optax.tree.get_all_with_path(state, name, filtering=is_field)
    return [value for _, value in found]


def holds_masks(node: Any) -> bool:
    """Returns whether a node of an optimizer state is the state of a pruning transformation.

    Args:
        node: a node of a state.

    Returns:
        A bool; True for a NamedTuple with a field `masks`. Can be used as an `is_leaf`.

    Example:
        >>> holds_masks(optax.EmptyState()), holds_masks({"masks": True})
        (False, False)
    """
    return "masks" in getattr(node, "_fields", ())


def is_packed(node: Any) -> bool:
    """Returns whether a node of an optimizer state is that of `jaxprune.pack_state`.

    Args:
        node: a node of a state.

    Returns:
        A bool; True for a NamedTuple with the fields `inner` and `positions`. Can be used as an
        `is_leaf`.

    Example:
        >>> is_packed(optax.EmptyState()), is_packed({"inner": 0, "positions": 0})
        (False, False)
    """
    return {"inner", "positions"} <= set(getattr(node, "_fields", ()))


def raise_for(problems: list[str], summary: str) -> None:
    """Raises one `ValueError` that lists all problems; does nothing if there are none.

    Args:
        problems: one line for each bad leaf or value.
        summary: the rule that was broken and the fix.

    Raises:
        ValueError: if `problems` is not empty.

    Example:
        >>> raise_for([], "nothing is wrong")
        >>> raise_for(["a/kernel: int8"], "pruned leaves must be floating point.")
        Traceback (most recent call last):
        ...
        ValueError: pruned leaves must be floating point.
          a/kernel: int8
    """
    if problems:
        raise ValueError("\n  ".join([summary, *problems]))


def is_array(leaf: Any) -> bool:
    """Returns whether a leaf has a shape and a dtype, as arrays and their abstract values do.

    Modules of some frameworks have functions, strings, dtypes (`np.float32`, a class with both
    attributes) and settings such as a dropout rate among their leaves. These are not parameters,
    and the library does not change them.

    Args:
        leaf: a leaf of a tree.

    Returns:
        A bool.

    Example:
        >>> import jax.numpy as jnp
        >>> [is_array(leaf) for leaf in (jnp.zeros(2), np.True_, 0.5, "same", np.float32)]
        [True, True, False, False, False]
    """
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)


def is_numeric(leaf: Any) -> bool:
    """Returns whether a leaf is an array or a number that JAX accepts as an array.

    Args:
        leaf: a leaf of a tree.

    Returns:
        A bool.

    Example:
        >>> [is_numeric(leaf) for leaf in (np.zeros(2), 0.5, True, "same", None)]
        [True, True, True, False, False]
    """
    return is_array(leaf) or isinstance(leaf, (bool, int, float, complex))


def shape_of(leaf: Any) -> tuple[int, ...]:
    """Returns the shape of a leaf; () if the leaf is not an array.

    Args:
        leaf: a leaf of a tree.

    Returns:
        Tuple of ints.

    Example:
        >>> import jax.numpy as jnp
        >>> shape_of(jnp.zeros((2, 3))), shape_of(0.5), shape_of(jax.nn.relu)
        ((2, 3), (), ())
    """
    return tuple(leaf.shape) if is_array(leaf) else ()


def places(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, counting None as a leaf.

    `equinox.partition` and `equinox.filter` put None in place of the leaves that they take out.

    Args:
        tree: any pytree.

    Returns:
        Dict from path to leaf or None.

    Example:
        >>> places({"activation": None, "kernel": 1})
        {'activation': None, 'kernel': 1}
    """
    return dict(leaves_with_paths(tree, is_leaf=lambda node: node is None))


def keeps_leaf(mask: Any) -> bool:
    """Returns whether a mask is known to keep a whole leaf although it lacks the leaf's shape.

    Args:
        mask: a mask. The scalar True keeps the leaf, and so does anything that is not a mask, such
            as None or a function in the masks of a module.

    Returns:
        A bool; False for a traced mask, because its value is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> [keeps_leaf(mask) for mask in (True, jnp.array(True), None, False, jnp.ones(2, bool))]
        [True, True, True, False, False]
    """
    if isinstance(mask, bool):
        return mask
    if not is_array(mask):
        return not is_numeric(mask)
    return mask.shape == () and not isinstance(mask, Tracer) and bool(np.asarray(mask))


def unmatched(masks: Mapping[str, Any], leaves: Mapping[str, Any]) -> list[str]:
    """Lists the masks without a leaf and the leaves without a mask.

    A leaf that is neither an array nor a number needs no mask. Where one of the two trees has None,
    the other may have the scalar True or nothing, so that the masks of a whole module fit its
    arrays alone, and the other way round.

    Args:
        masks: masks by path, see `places`.
        leaves: leaves by path, see `places`.

    Returns:
        One line for each, for `raise_for`.

    Example:
        >>> unmatched({"a": True, "b": True}, {"b": 1.0, "c": 2.0})
        ['c: no mask', 'a: a mask without a leaf']
        >>> unmatched({"kernel": True, "activation": True}, {"kernel": 1.0, "activation": None})
        []
    """
    problems = [
        f"{path}: no mask"
        for path, leaf in leaves.items()
        if is_numeric(leaf) and path not in masks
    ]
    problems += [
        f"{path}: no mask, but {type(masks[path]).__name__}"
        for path, leaf in leaves.items()
        if is_array(leaf) and not is_numeric(masks.get(path, True)) and masks[path] is not None
    ]
    return problems + [
        f"{path}: a mask without a leaf"
        for path, mask in masks.items()
        if mask is not None
        and (path not in leaves or (leaves[path] is None and not keeps_leaf(mask)))
    ]


def check_same_structure(name: str, tree: Any, params: Any) -> None:
    """Raises unless a tree has the paths and shapes of the parameters.

    Leaves of the parameters that are not arrays may be missing from the tree.

    Args:
        name: the name of the caller's argument, for the error.
        tree: tree of arrays.
        params: tree of arrays.

    Raises:
        ValueError: lists every leaf that is missing, is unknown or has a different shape.

    Example:
        >>> import jax.numpy as jnp
        >>> check_same_structure("updates", [jnp.zeros(2)], [jnp.zeros(3)])
        Traceback (most recent call last):
        ...
        ValueError: `updates` must have the paths and shapes of the parameters:
          0: shape (2,), but the parameter has (3,)
    """
    leaves, others = leaf_by_path(params), leaf_by_path(tree)
    wanted = {path: shape_of(leaf) for path, leaf in leaves.items() if is_array(leaf)}
    seen = {path: shape_of(leaf) for path, leaf in others.items()}
    problems = [f"{path}: missing" for path in wanted if path not in seen]
    problems += [f"{path}: not a parameter" for path in seen if path not in leaves]
    problems += [
        f"{path}: shape {seen[path]}, but the parameter has {shape}"
        for path, shape in wanted.items()
        if seen.get(path, shape) != shape
    ]
    raise_for(problems, f"`{name}` must have the paths and shapes of the parameters:")


def leaves_like(params: Any, tree: Any) -> list[Any] | None:
    """Picks the leaves of a tree that have the paths of the parameters.

    `optax.masked` and `optax.partition` show a transformation only some of the parameters, but
    pass extra arguments whole.

    Args:
        params: tree of arrays; its leaves decide which paths are picked, and in which order.
        tree: tree with at least these paths, or None.

    Returns:
        List of leaves, or None if a path is missing.

    Example:
        >>> leaves_like({"b": 0}, {"a": 1, "b": 2})
        [2]
    """
    by_path = leaf_by_path(tree)
    paths = list(leaf_by_path(params))
    return [by_path[path] for path in paths] if all(path in by_path for path in paths) else None


def pick(tree: Any, flags: tuple[bool, ...]) -> list[Any]:
    """Returns the leaves of a tree, or of a list of leaves, whose flag is True.

    Args:
        tree: tree with one leaf for each flag.
        flags: one bool for each leaf, in flattening order.

    Returns:
        List of leaves.

    Example:
        >>> pick({"bias": 1, "kernel": 2}, (False, True))
        [2]
    """
    return [leaf for leaf, flag in zip(jax.tree.leaves(tree), flags, strict=True) if flag]


def put(tree: Any, flags: tuple[bool, ...], leaves: list[Any], rest: Any = None) -> Any:
    """Puts leaves back where `pick` took them.

    Args:
        tree: tree with one leaf for each flag.
        flags: one bool for each leaf, in flattening order.
        leaves: one leaf for each True flag.
        rest: a tree like `tree` with the leaves for all other places; None takes those of `tree`.

    Returns:
        Tree like `tree`.

    Example:
        >>> put({"bias": 1, "kernel": 2}, (False, True), [3])
        {'bias': 1, 'kernel': 3}
    """
    old, treedef = jax.tree.flatten(tree)
    others = old if rest is None else treedef.flatten_up_to(rest)
    new = iter(leaves)
    return treedef.unflatten(
        [next(new) if flag else other for other, flag in zip(others, flags, strict=True)]
    )


def is_box(node: Any) -> bool:
    """Returns whether a node is a box of Flax around one leaf: a variable of NNX, or Linen's.

    Boxes carry metadata beside the leaf, such as the names of its axes. Can be used as the
    `is_leaf` of `jax.tree.map`.

    Args:
        node: a node of a tree.

    Returns:
        A bool.

    Example:
        >>> from flax import nnx
        >>> is_box(nnx.Param(0)), is_box(0)
        (True, False)
    """
    # Without these modules there can be no box, and importing NNX takes a second.
    kinds = (("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata"))
    known = (getattr(sys.modules.get(module), name, None) for module, name in kinds)
    return isinstance(node, tuple(kind for kind in known if kind is not None))


def is_absent(node: Any) -> bool:
    """Returns whether a node of a tree is an `optax.MaskedNode`, which marks a missing leaf.

    `optax.masked` and `optax.partition` put one in place of a leaf that they hide; pruning states
    have one for each leaf that is never pruned. Can be used as the `is_leaf` of `jax.tree.map`.

    Args:
        node: a node of a tree.

    Returns:
        A bool.

    Example:
        >>> is_absent(optax.MaskedNode()), is_absent(0)
        (True, False)
    """
    return isinstance(node, optax.MaskedNode)
