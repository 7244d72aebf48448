"""Leaf paths, the rule that says which leaves are pruned, and errors that name every bad leaf."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = [
    "Prunable",
    "Stacked",
    "check_same_structure",
    "is_absent",
    "is_rule",
    "leaf_by_path",
    "leaves_like",
    "leaves_with_paths",
    "path_string",
    "pick",
    "prunable_flags",
    "put",
    "raise_for",
    "stacked_axes",
    "state_fields",
    "unmatched",
]

Prunable = Callable[[str, Any], bool] | Any | None
# (path, leaf) -> the axes that number independent copies of a layer, or None
Stacked = Callable[[str, Any], int | tuple[int, ...] | None] | None

# Stacked (scanned or vmapped) layers give biases and norm parameters two dimensions.
_NEVER_BY_DEFAULT = ("bias", "scale")


def path_string(path: tuple[Any, ...]) -> str:
    """Joins the keys of a leaf's path with slashes.

    A trailing `.value` is left out: Flax NNX variables show it when an optimizer is
    initialised and not when it is updated.

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


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """Lists the leaves of a tree with their paths as strings, in flattening order.

    Args:
        tree: any pytree.

    Returns:
        Pairs of path and leaf.

    Example:
        >>> leaves_with_paths({"dense": {"bias": 1, "kernel": 2}})
        [('dense/bias', 1), ('dense/kernel', 2)]
    """
    return [(path_string(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def leaf_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, in flattening order.

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
        raise_for(twice, "leaves cannot be told apart by their paths; rename one of each:")
    return by_path


def state_fields(state: Any, name: str) -> list[Any]:
    """All fields of that name in the NamedTuples of an optimizer state.

    A parameter of the same name is not a field.

    Args:
        state: state of an Optax optimizer.
        name: name of a field.

    Returns:
        List of values, in flattening order.

    Example:
        >>> state = optax.sgd(0.1, momentum=0.9).init({"trace": jnp.zeros(2)})
        >>> state_fields(state, "trace")
        [{'trace': Array([0., 0.], dtype=float32)}]
    """

    def is_field(path: tuple[Any, ...], value: Any) -> bool:
        del value
        return isinstance(path[-1], optax.tree_utils.NamedTupleKey)

    found = optax.tree.get_all_with_path(state, name, filtering=is_field)
    return [value for _, value in found]


def raise_for(problems: list[str], summary: str) -> None:
    """Raises one `ValueError` that lists every problem, or does nothing if there is none.

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


def unmatched(masks: Mapping[str, Any], leaves: Mapping[str, Any]) -> list[str]:
    """The paths that only masks have, or only leaves.

    Args:
        masks: by path.
        leaves: by path, what the masks are for.

    Returns:
        A line for each, for `raise_for`.

    Example:
        >>> unmatched({"a": True, "b": True}, {"b": 1.0, "c": 2.0})
        ['c: no mask', 'a: a mask without a leaf']
    """
    problems = [f"{path}: no mask" for path in leaves if path not in masks]
    return problems + [f"{path}: a mask without a leaf" for path in masks if path not in leaves]


def check_same_structure(name: str, tree: Any, params: Any) -> None:
    """Raises unless a tree has the paths and shapes of the parameters.

    Args:
        name: how the caller calls `tree`, for the error.
        tree: tree of arrays.
        params: tree of arrays.

    Raises:
        ValueError: lists every leaf that is missing, unknown or of another shape.

    Example:
        >>> check_same_structure("updates", [jnp.zeros(2)], [jnp.zeros(3)])
        Traceback (most recent call last):
        ...
        ValueError: `updates` must have the paths and shapes of the parameters:
          0: shape (2,), but the parameter has (3,)
    """
    wanted = {path: jnp.shape(leaf) for path, leaf in leaf_by_path(params).items()}
    seen = {path: jnp.shape(leaf) for path, leaf in leaf_by_path(tree).items()}
    problems = [f"{path}: missing" for path in wanted if path not in seen]
    problems += [f"{path}: not a parameter" for path in seen if path not in wanted]
    problems += [
        f"{path}: shape {seen[path]}, but the parameter has {shape}"
        for path, shape in wanted.items()
        if seen.get(path, shape) != shape
    ]
    raise_for(problems, f"`{name}` must have the paths and shapes of the parameters:")


def leaves_like(params: Any, tree: Any) -> list[Any] | None:
    """Picks the leaves of a tree that have the paths of the parameters.

    `optax.masked` and `optax.partition` show a transformation a part of the parameters and
    leave extra arguments whole.

    Args:
        params: tree of arrays; decides which paths, and in which order.
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


def prunable_flags(
    params: Any, prunable: Prunable = None, stacked: Stacked = None
) -> tuple[bool, ...]:
    """Decides for each leaf whether it is pruned.

    Args:
        params: tree of arrays.
        prunable: `None` for every floating-point leaf of two or more dimensions that is not
            named `bias` or `scale`; or a predicate `(path, leaf) -> bool`; or a tree of bools
            like `params`.
        stacked: which axes number copies, see `stacked_axes`; they do not count as dimensions.

    Returns:
        One bool for each leaf, in flattening order.

    Raises:
        ValueError: if the rule matches no leaf, matches leaves that are not floating point or
            are empty, or if the tree of bools has other leaves than `params`.

    Example:
        >>> params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}
        >>> prunable_flags(params)
        (False, True)
        >>> prunable_flags(params, lambda path, leaf: path.startswith("bias"))
        (True, False)
    """
    named = leaves_with_paths(params)
    if not named:
        # optax.tree_map_params initialises with a tree that has no leaves.
        return ()
    if prunable is None:
        flags = tuple(
            _default_rule(path, leaf, stacked_axes(path, leaf, stacked)) for path, leaf in named
        )
    elif callable(prunable):
        flags = tuple(bool(prunable(path, leaf)) for path, leaf in named)
    else:
        flags = _flags_from_tree(named, prunable)
    if not any(flags):
        seen = [f"{path}: shape {jnp.shape(leaf)}" for path, leaf in named[:8]]
        raise_for(seen, "`prunable` matches no leaf; change the rule. The first leaves are:")
    raise_for(
        [
            f"{path}: shape {jnp.shape(leaf)}, dtype {jnp.result_type(leaf)}"
            for (path, leaf), flag in zip(named, flags, strict=True)
            if flag and not _can_be_pruned(leaf)
        ],
        "`prunable` must select floating-point leaves with at least one element; "
        "exclude these from the rule:",
    )
    return flags


def pick(tree: Any, flags: tuple[bool, ...]) -> list[Any]:
    """The leaves of a tree, or of a list of leaves, whose flag is True.

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
        leaves: one for each True flag.
        rest: what the other places hold, a tree like `tree`; None is `tree` itself.

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


def is_absent(node: Any) -> bool:
    """Whether a place in a tree is left out: an `optax.MaskedNode`.

    `optax.masked` and `optax.partition` put one where they hide a leaf, pruning states where a
    leaf is never pruned.

    Args:
        node: a node of a tree; the `is_leaf` of `jax.tree.map`.

    Returns:
        A bool.

    Example:
        >>> is_absent(optax.MaskedNode()), is_absent(0)
        (True, False)
    """
    return isinstance(node, optax.MaskedNode)


def is_rule(x: Any) -> bool:
    """Whether an argument is a function to call, and not a tree.

    Modules of Equinox and other frameworks are both: trees of arrays that can be called. What has
    an array or a number among its leaves is a tree.

    Args:
        x: a function, or a tree of arrays, bools or numbers.

    Returns:
        A bool.

    Example:
        >>> is_rule(lambda path, leaf: True), is_rule({"kernel": True})
        (True, False)
    """
    if not callable(x):
        return False
    if isinstance(x, jax.tree_util.Partial):  # a function that carries arrays
        return True
    return not any(
        hasattr(leaf, "shape") or isinstance(leaf, (bool, int, float, complex))
        for leaf in jax.tree.leaves(x)
    )


def stacked_axes(path: str, leaf: Any, stacked: Stacked = None) -> tuple[int, ...]:
    """The axes of a leaf that number independent copies of a layer.

    Layers that are scanned or mapped, and the experts of a mixture, keep the weights of all
    copies in one array. Each copy then counts as a leaf of its own.

    Args:
        path: of the leaf.
        leaf: anything with a shape.
        stacked: function `(path, leaf) -> axis, tuple of axes, or None`; None: nothing is stacked.

    Returns:
        Rising tuple of axes, none negative; empty for a single layer.

    Raises:
        ValueError: if an axis does not exist, is named twice, or is no integer.

    Example:
        >>> stacked_axes("layers/kernel", jnp.zeros((12, 64, 256)), lambda path, leaf: 0)
        (0,)
    """
    found = None if stacked is None else stacked(path, leaf)
    axes = () if found is None else found if isinstance(found, (tuple, list)) else (found,)
    dimensions = jnp.ndim(leaf)
    ok = all(
        isinstance(axis, (int, np.integer))
        and not isinstance(axis, bool)
        and -dimensions <= axis < dimensions
        for axis in axes
    )
    own = sorted({int(axis) % dimensions for axis in axes}) if ok else []
    if len(own) != len(axes):
        raise ValueError(
            f"`stacked` must return axes of the leaf, each once, or None, but returned {found!r} "
            f"for {path} of shape {jnp.shape(leaf)}."
        )
    return tuple(own)


def _can_be_pruned(leaf: Any) -> bool:
    """Floating point and not empty."""
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating)) and jnp.size(leaf) > 0


def _default_rule(path: str, leaf: Any, stacked: tuple[int, ...]) -> bool:
    """Kernels and embeddings, not biases and norm parameters."""
    name = path.rsplit("/", 1)[-1]
    dimensions = jnp.ndim(leaf) - len(stacked)
    return dimensions >= 2 and name not in _NEVER_BY_DEFAULT and _can_be_pruned(leaf)


def _flags_from_tree(named: list[tuple[str, Any]], tree: Any) -> tuple[bool, ...]:
    """Matches a tree of bools with the parameters, path by path."""
    flags = leaf_by_path(tree)
    paths = [path for path, _ in named]
    missing = [f"{path}: missing in `prunable`" for path in paths if path not in flags]
    extra = [f"{path}: not a parameter" for path in flags if path not in set(paths)]
    raise_for(missing + extra, "`prunable` as a tree must have the leaves of the parameters:")
    return tuple(bool(flags[path]) for path in paths)
