"""Matches masks and flags with leaves: one may cover a whole branch, hidden leaves have none."""

from collections.abc import Iterable
from typing import Any

import jax

from jaxprune.trees._paths import is_absent, is_numeric, leaves_with_paths, places, shape_of


def spread(masks: Any, tree: Any) -> dict[str, Any]:
    """Returns masks by the paths of the leaves that they belong to.

    `optax.masked` and `optax.partition` take one flag or label for a whole branch. They hide what a
    transformation does not see behind an `optax.MaskedNode`, which may replace a branch as well.
    Therefore a scalar in place of a branch is the mask of every leaf below it, and masks at or
    below a `MaskedNode` of the tree are left out. All other masks keep their paths, whether the
    tree has a leaf there or not: see `unmatched`.

    Args:
        masks: tree of bools. Only a scalar can stand in place of a branch.
        tree: the tree that the masks belong to, whole or with hidden leaves and branches.

    Returns:
        Dict from path to mask. Below a scalar, leaves that are neither arrays nor numbers have the
        mask True, and None has no mask.

    Example:
        >>> spread({"bias": False, "head": True}, {"bias": 3.0, "head": {"a": 1.0, "b": 2.0}})
        {'bias': False, 'head/a': True, 'head/b': True}
        >>> import optax
        >>> spread({"head": {"a": True, "b": True}, "bias": False}, {"head": optax.MaskedNode()})
        {'bias': False}
    """
    ends = dict(leaves_with_paths(tree, is_leaf=_is_end))
    hidden = {path for path, node in ends.items() if is_absent(node)}
    given = places(masks)
    found: dict[str, Any] = {}
    for path, mask in given.items():
        is_leaf = path in ends and not _is_empty(ends[path])
        if not is_leaf and any(branch in hidden for branch in _branches(path)):
            continue
        is_scalar = is_numeric(mask) and shape_of(mask) == ()
        below = [] if is_leaf or not is_scalar else _below(path, ends)
        if not below:
            found[path] = mask
        for end in below:
            leaf = ends[end]
            if not (leaf is None or _is_empty(leaf)) and end not in given:
                found[end] = mask if is_numeric(leaf) else True
    return found


def _below(path: str, ends: Iterable[str]) -> list[str]:
    """Returns the paths that are a branch or lie in it."""
    return [end for end in ends if path in _branches(end)]


def _branches(path: str) -> list[str]:
    """Returns the paths of all branches that contain a path, and the path itself."""
    parts = path.split("/")
    return ["", *("/".join(parts[:i]) for i in range(1, len(parts) + 1))]


def _is_empty(node: Any) -> bool:
    """Returns whether a node is an empty container, such as `{}`."""
    return node is not None and not jax.tree.leaves(node)


def _is_end(node: Any) -> bool:
    """Returns whether a node is a leaf or has nothing below it."""
    return jax.tree_util.treedef_is_leaf(jax.tree.structure(node))
