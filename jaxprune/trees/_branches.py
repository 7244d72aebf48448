"""Masks and flags matched with leaves: one for a whole branch, none for what is hidden."""

from collections.abc import Iterable
from typing import Any

import jax

from jaxprune.trees._paths import is_absent, is_numeric, path_string, places, shape_of


def spread(masks: Any, tree: Any) -> dict[str, Any]:
    """Masks by the paths of the leaves that they are for.

    `optax.masked` and `optax.partition` take one flag or label for a whole branch, and hide what a
    transformation does not see behind an `optax.MaskedNode`, which may stand for a branch as well.
    So a scalar in the place of a branch is the mask of every leaf below it, and masks at or below a
    `MaskedNode` of the tree are left out. All other masks keep their paths, with a leaf or without:
    see `unmatched`.

    Args:
        masks: tree of bools. In the place of a branch only a scalar can stand.
        tree: what the masks are for, whole or with hidden places.

    Returns:
        Dict from path to mask. Below a scalar, what is no array or number has the mask True,
        and None has no mask.

    Example:
        >>> spread({"bias": False, "head": True}, {"bias": 3.0, "head": {"a": 1.0, "b": 2.0}})
        {'bias': False, 'head/a': True, 'head/b': True}
        >>> import optax
        >>> spread({"head": {"a": True, "b": True}, "bias": False}, {"head": optax.MaskedNode()})
        {'bias': False}
    """
    named = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_end)
    ends = {path_string(path): node for path, node in named}
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
    """The paths that lie in a branch or are it."""
    return [end for end in ends if path in _branches(end)]


def _branches(path: str) -> list[str]:
    """The paths of everything that a place lies in, and its own."""
    parts = path.split("/")
    return ["", *("/".join(parts[:i]) for i in range(1, len(parts) + 1))]


def _is_empty(node: Any) -> bool:
    """Whether a node is a container of nothing, such as `{}`."""
    return node is not None and not jax.tree.leaves(node)


def _is_end(node: Any) -> bool:
    """Whether a node is a leaf or has nothing below it."""
    return jax.tree_util.treedef_is_leaf(jax.tree.structure(node))
