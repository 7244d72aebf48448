"""Decides which leaves are pruned, which axes number copies of a layer, and what is a function."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.trees import _defaults
from jaxprune.trees._branches import spread
from jaxprune.trees._names import check_function, is_names, named
from jaxprune.trees._paths import (
    is_array,
    is_placeholder,
    leaves_with_paths,
    places,
    raise_for,
    shape_of,
)

_PRUNABLE = (
    'Names are accepted as well, such as `prunable="kernel"` or `prunable=["layer1", "layer2/*"]`.'
)
_STACKED = (
    'For the leaves of a module write `stacked=jaxprune.stacks.under("layers")`, for all leaves '
    "`stacked=lambda path, leaf: 0`."
)

# Which leaves are pruned: (path, leaf) -> bool, names, a tree of bools, or None for the default.
Prunable = Callable[[str, Any], bool] | Any | None
# (path, leaf) -> the axes that number independent copies of a layer, or None
Stacked = Callable[[str, Any], int | tuple[int, ...] | None] | None


def prunable_flags(
    params: Any, prunable: Prunable = None, stacked: Stacked = None
) -> tuple[bool, ...]:
    """Decides for each leaf whether it is pruned.

    Args:
        params: tree of arrays. Leaves that are not arrays are never pruned, whatever the rule says.
        prunable: None for the default rule, which prunes floating-point leaves of two or more
            dimensions unless their names mark them as norm parameters, biases and the like, see
            `why_not_pruned`; or a predicate `(path, leaf) -> bool`; or names such as `"kernel"` or
            `["layer1", "layer2/*"]`, see `means`: a named leaf is pruned, of a named module what
            the default rule prunes; or a tree of bools like `params`, where one bool may stand for
            a whole branch.
        stacked: function `(path, leaf) -> axes`, the axes that number copies of a layer, see
            `stacked_axes`; the default rule does not count them as dimensions.

    Returns:
        One bool for each leaf, in flattening order.

    Raises:
        ValueError: if the rule or a name matches no leaf, or matches leaves that are empty or not
            floating point; if the tree of bools and `params` have different leaves; if the default
            rule matches complex kernels.

    Example:
        >>> params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}
        >>> prunable_flags(params)
        (False, True)
        >>> prunable_flags(params, lambda path, leaf: path.startswith("bias"))
        (True, False)
        >>> prunable_flags(params, "kern*")
        (False, True)
    """
    if is_placeholder(params):
        return ()
    items = leaves_with_paths(params)
    if prunable is not None and not callable(prunable) and _is_empty(prunable):
        raise ValueError(
            f"`prunable` must say which leaves are pruned, but is {prunable!r}. Omit it for the "
            "default rule; to prune nothing, use the optimizer without pruning. "
            f"{_PRUNABLE}"
        )
    if prunable is None:
        flags = _default_flags(params, items, stacked)
    elif is_names(prunable):
        flags = _flags_from_names(params, items, prunable, stacked)
    elif is_rule(prunable):
        check_function("prunable", prunable, "(path, leaf) -> bool", _PRUNABLE)
        flags = tuple(is_array(leaf) and bool(prunable(path, leaf)) for path, leaf in items)
    else:
        flags = _flags_from_tree(params, items, prunable)
    if not any(flags):
        seen = [f"{path}: shape {shape_of(leaf)}" for path, leaf in items if is_array(leaf)][:8]
        seen = seen or [f"{path}: {type(leaf).__name__}" for path, leaf in items[:8]]
        raise_for(seen, "`prunable` matches no leaf; change the rule. The first leaves are:")
    raise_for(
        [
            f"{path}: shape {shape_of(leaf)}, dtype {leaf.dtype}"
            for (path, leaf), flag in zip(items, flags, strict=True)
            if flag and not _can_be_pruned(leaf)
        ],
        "`prunable` must select floating-point leaves with at least one element, of a type that "
        "has the number 0; "
        "exclude these from the rule:",
    )
    return flags


def is_rule(x: Any) -> bool:
    """Returns whether an argument is a function to call rather than a tree.

    Modules of Equinox and other frameworks are both: trees of arrays that can be called. An object
    with an array or a bool among its leaves is a tree; only an object without them is called.
    Numbers decide nothing, because a rule written as a JAX dataclass has its settings as leaves.

    Args:
        x: a function, or a tree of arrays or bools.

    Returns:
        A bool.

    Example:
        >>> is_rule(lambda path, leaf: True), is_rule({"kernel": True})
        (True, False)
    """
    if not callable(x):
        return False
    if isinstance(x, jax.tree_util.Partial):  # a function with bound arrays
        return True
    return not any(isinstance(leaf, bool) or is_array(leaf) for leaf in jax.tree.leaves(x))


def stacked_axes(path: str, leaf: Any, stacked: Stacked = None) -> tuple[int, ...]:
    """Returns the axes of a leaf that number independent copies of a layer.

    Layers that are scanned or mapped, and the experts of a mixture, keep the weights of all copies
    in one array. Each copy then counts as a separate leaf. `jaxprune.stacks` makes functions for
    `stacked`.

    Args:
        path: the path of the leaf.
        leaf: anything; `stacked` is not called for a leaf that is not an array.
        stacked: function `(path, leaf) -> axis, tuple of axes, or None`; None: nothing is stacked.

    Returns:
        Ascending tuple of non-negative axes; empty for a single layer.

    Raises:
        ValueError: if an axis does not exist, is named twice, or is not an integer.

    Example:
        >>> stacked_axes("layers/kernel", jnp.zeros((12, 64, 256)), lambda path, leaf: 0)
        (0,)
    """
    check_stacked(stacked)
    found = stacked(path, leaf) if stacked is not None and is_array(leaf) else None
    axes = () if found is None else found if isinstance(found, (tuple, list)) else (found,)
    dimensions = len(shape_of(leaf))
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
            f"for {path} of shape {shape_of(leaf)}."
        )
    return tuple(own)


def check_stacked(stacked: Any) -> None:
    """Raises unless an argument `stacked` is None or a function `(path, leaf) -> axes`.

    Args:
        stacked: what the caller was given.

    Raises:
        ValueError: if it is anything else.

    Example:
        >>> check_stacked(None)
    """
    if stacked is not None:
        check_function("stacked", stacked, "(path, leaf) -> axes", _STACKED)


def _is_empty(x: Any) -> bool:
    """Returns whether an argument is an empty text or set, or a tree without leaves."""
    return not x if isinstance(x, (str, set, frozenset)) else not jax.tree.leaves(x)


def _can_be_pruned(leaf: Any) -> bool:
    """Returns whether an array is floating point, of a type that has a 0, and not empty."""
    return _defaults.can_be_zero(leaf.dtype) and 0 not in leaf.shape


def _default_flags(params: Any, items: list[tuple[str, Any]], stacked: Stacked) -> tuple[bool, ...]:
    """Applies the default rule; raises for complex kernels rather than silently keeping them."""
    axes = {path: stacked_axes(path, leaf, stacked) for path, leaf in items}
    found = _reasons(params, axes)
    raise_for(
        [
            f"{path}: shape {leaf.shape}, dtype {leaf.dtype}"
            for path, leaf in items
            if _defaults.is_complex(leaf) and found[path] is None
        ],
        "`params` must not have complex kernels, which cannot be pruned. Store their real and "
        "imaginary parts as two real leaves, or exclude them with `prunable`:",
    )
    return tuple(reason is None for reason in found.values())


def _reasons(params: Any, axes: Mapping[str, tuple[int, ...]]) -> dict[str, str | None]:
    """Applies the default rule as if complex kernels were real, so that they can be refused."""

    def as_real(leaf: Any) -> Any:
        is_complex = _defaults.is_complex(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if is_complex else leaf

    return _defaults.reasons(jax.tree.map(as_real, params), axes)


def _flags_from_names(
    params: Any, items: list[tuple[str, Any]], names: Any, stacked: Stacked
) -> tuple[bool, ...]:
    """Flags the leaves that are named, and in named modules those of the default rule."""
    names = [names] if isinstance(names, str) else list(names)
    means = named("prunable", names, [path for path, leaf in items if is_array(leaf)])
    axes = {path: stacked_axes(path, leaf, stacked) for path, leaf in items}
    reasons = _reasons(params, axes)
    chosen = {
        path: [name for name, kind in own.items() if kind == "leaf" or reasons[path] is None]
        for path, own in means.items()
    }
    useful = {name for own in chosen.values() for name in own}
    branches = {name: [path for path in means if name in means[path]] for name in names}
    raise_for(
        [
            f"{name}: {path}, {reasons[path]}"
            for name in names
            if name not in useful
            for path in branches[name][:3]
        ],
        "`prunable` must name leaves, or modules with leaves that the default rule prunes. To "
        "prune others, name the leaves themselves, as in layer1/kernel; the default rule excludes:",
    )
    return tuple(bool(chosen.get(path)) for path, _ in items)


def _flags_from_tree(params: Any, items: list[tuple[str, Any]], tree: Any) -> tuple[bool, ...]:
    """Matches a tree of bools with the parameters, path by path."""
    flags = {path: flag for path, flag in spread(tree, params).items() if flag is not None}
    known = places(params)
    missing = [
        f"{path}: missing in `prunable`"
        for path, leaf in items
        if path not in flags and is_array(leaf)
    ]
    extra = [f"{path}: not a parameter" for path in flags if path not in known]
    kind = "as a tree"
    if callable(tree):
        kind = (
            "is a module with arrays or bools among its leaves, which counts as a tree of flags "
            "(to use it as a function, wrap it in a `lambda path, leaf:`) and"
        )
    raise_for(missing + extra, f"`prunable` {kind} must have the leaves of the parameters:")
    return tuple(is_array(leaf) and bool(flags[path]) for path, leaf in items)
