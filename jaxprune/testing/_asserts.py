"""Statements about masks as assertions, which say what is wrong and where."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune import budgets, masks, trees

_SHOWN = 9  # leaves in an error
_NO_DIFFERENCE = (
    "although no argument differs in shape or dtype. The cause is another tree, static argument or "
    "sharding, or a new `jax.jit` in every step."
)


def assert_masked(params: Any, masks_: Any) -> None:
    """Asserts that every masked weight is exactly 0.

    Args:
        params: tree of arrays.
        masks_: tree of bools like it, True where a weight is kept; a scalar, such as those of
            `jaxprune.get_masks` for leaves that are not pruned, is the mask of all below it.

    Raises:
        AssertionError: if a masked weight is not 0 or is NaN. It names each leaf with the number of
            such weights, the first place and the value there.
        ValueError: if the masks do not fit the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> mask = {"w": jnp.array([True, False])}
        >>> assert_masked({"w": jnp.array([3.0, 0.0])}, mask)
        >>> assert_masked({"w": jnp.array([3.0, 1.0])}, mask)
        Traceback (most recent call last):
            ...
        AssertionError: masked weights must be exactly 0, but some are not:
          w: 1 of 1, first 1.0 at [1]
    """
    own = masks.fitting(masks_, params, "`masks` must fit the parameters, but do not:")
    wrong = []
    for path, leaf in trees.leaf_by_path(params).items():
        if not trees.is_numeric(leaf):
            continue
        values = np.asarray(leaf)
        pruned = np.broadcast_to(~np.asarray(own[path], bool), values.shape)
        wrong += _places(path, pruned & ~(values == 0), int(pruned.sum()), values)
    _fail(wrong, "masked weights must be exactly 0, but some are not:")


def assert_sparsity(
    masks_: Any,
    sparsity: float | Mapping[str, float],
    *,
    tolerance: int = 0,
    prunable: trees.Prunable = None,
) -> None:
    """Asserts that masks keep as many weights as a sparsity says, counted exactly.

    Args:
        masks_: tree of bools, True where a weight is kept. Scalars belong to leaves that are not
            pruned, and do not count.
        sparsity: fraction of zeros, in [0, 1], over all leaves together; or path -> fraction of
            that leaf.
        tolerance: how many weights more or fewer may be kept. The exact number is
            `budgets.keep_count(size, sparsity)`.
        prunable: which leaves count, see `trees.prunable_flags`. Default: those in which something
            is pruned, and those that are pruned by default.

    Raises:
        AssertionError: if another number is kept. It says both numbers.
        ValueError: if there is no mask, or a path names none.

    Example:
        >>> import jax.numpy as jnp
        >>> masks = {"w": jnp.array([True, False, False, False]), "b": jnp.bool_(True)}
        >>> assert_sparsity(masks, 0.75)
        >>> assert_sparsity(masks, {"w": 0.5})
        Traceback (most recent call last):
            ...
        AssertionError: masks must have the sparsity that was asked for, but do not:
          w: keeps 1 of 4 (sparsity 0.75), not 2 (0.5)
    """
    flags = _counted(masks_, prunable)
    if not flags:
        raise ValueError("`masks` must have at least one array of bools, but have none.")
    if isinstance(sparsity, Mapping):
        unknown = [path for path in sparsity if path not in flags]
        known = f"`sparsity` must name leaves with a mask; these are {', '.join(flags)}. Unknown:"
        trees.raise_for(unknown, known)
        wanted = {path: ([flags[path]], own) for path, own in sparsity.items()}
    else:
        wanted = {"all leaves together": ([*flags.values()], sparsity)}
    wrong = []
    for name, (own, part) in wanted.items():
        size, kept = sum(mask.size for mask in own), sum(int(mask.sum()) for mask in own)
        count = budgets.keep_count(size, part)
        if abs(kept - count) > tolerance:
            found = f"keeps {kept:,} of {size:,} (sparsity {1 - kept / size:.6g})"
            wrong.append(f"{name}: {found}, not {count:,} ({part:g})")
    _fail(wrong, "masks must have the sparsity that was asked for, but do not:")


def assert_nested(masks_: Any, later: Any) -> None:
    """Asserts that nothing comes back: what later masks keep, the earlier ones keep as well.

    Args:
        masks_: tree of bools.
        later: tree of bools like it.

    Raises:
        AssertionError: if a weight comes back. It names each leaf with their number and the first.
        ValueError: if the trees differ.

    Example:
        >>> import jax.numpy as jnp
        >>> assert_nested({"w": jnp.array([True, True])}, {"w": jnp.array([True, False])})
        >>> assert_nested({"w": jnp.array([True, False])}, {"w": jnp.array([True, True])})
        Traceback (most recent call last):
            ...
        AssertionError: pruned weights must stay pruned, but some come back:
          w: 1 of 2, first at [1]
    """
    wrong = []
    for path, (own, other) in _pairs(masks_, later).items():
        wrong += _places(path, other & ~own, own.size)
    _fail(wrong, "pruned weights must stay pruned, but some come back:")


def assert_same_masks(masks_: Any, others: Any) -> None:
    """Asserts that two trees of masks are equal.

    Args:
        masks_: tree of bools.
        others: tree of bools like it.

    Raises:
        AssertionError: if an entry differs. It names each leaf with their number and the first.
        ValueError: if the trees differ.

    Example:
        >>> import jax.numpy as jnp
        >>> assert_same_masks({"w": jnp.array([True, False])}, {"w": jnp.array([True, True])})
        Traceback (most recent call last):
            ...
        AssertionError: masks must be the same, but differ:
          w: 1 of 2, first at [1]
    """
    wrong = []
    for path, (own, other) in _pairs(masks_, others).items():
        wrong += _places(path, own != other, own.size)
    _fail(wrong, "masks must be the same, but differ:")


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that asserts, when JAX traces it again, that it must not.

    Put it inside `jax.jit`: a training step whose masks are data compiles once.

    Args:
        function: any function of arrays.

    Returns:
        The function. When it is traced a second time it raises an `AssertionError` that says which
        leaves of the arguments have another shape, dtype, weak type or sharding than at first.

    Example:
        >>> import jax.numpy as jnp
        >>> double = jax.jit(traced_once(lambda x: 2 * x))
        >>> double(jnp.ones(3)).shape
        (3,)
        >>> try:
        ...     double(jnp.ones(4))
        ... except AssertionError as error:
        ...     print(error)
        `<lambda>` must be traced once, but is traced again, because arguments differ:
          0/0: float32[3] at first, float32[4] now
    """
    first: list[dict[str, str]] = []
    name = getattr(function, "__name__", type(function).__name__)

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        leaves = trees.leaf_by_path((args, kwargs))
        forms = {path: _form(leaf) for path, leaf in leaves.items()}
        if first:
            paths = dict.fromkeys([*first[0], *forms])
            changed = [
                f"{path}: {first[0].get(path, 'absent')} at first, {forms.get(path, 'absent')} now"
                for path in paths
                if first[0].get(path) != forms.get(path)
            ]
            reason = "because arguments differ:" if changed else _NO_DIFFERENCE
            _fail(changed or [""], f"`{name}` must be traced once, but is traced again, {reason}")
        first.append(forms)
        return function(*args, **kwargs)

    traced.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return traced


def _counted(masks_: Any, prunable: trees.Prunable) -> dict[str, np.ndarray]:
    """Returns the masks of those leaves that count, by path."""
    flags = {path: np.asarray(own, bool) for path, own in trees.leaf_by_path(masks_).items()}
    weights = [jax.ShapeDtypeStruct(own.shape, np.float32) for own in flags.values()]
    tree = jax.tree.unflatten(jax.tree.structure(masks_), weights)
    if prunable is None:
        reasons = trees.reasons(tree)
        counts = [not own.all() or reasons[path] is None for path, own in flags.items()]
    else:
        counts = trees.prunable_flags(tree, prunable)
    pairs = zip(flags.items(), counts, strict=True)
    return {path: own for (path, own), wanted in pairs if wanted and own.ndim}


def _form(leaf: Any) -> str:
    """Returns shape and dtype of a leaf as JAX prints them, or its value."""
    if not trees.is_numeric(leaf):
        return repr(leaf)
    aval = jax.typeof(leaf)
    return aval.str_short() + ("*" if getattr(aval, "weak_type", False) else "")


def _pairs(masks_: Any, others: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the masks of both trees by path, in one shape; raises unless the trees fit."""
    here, there = trees.leaf_by_path(masks_), trees.leaf_by_path(others)
    pairs = {}
    wrong = [f"{path}: only in one of both" for path in here.keys() ^ there.keys()]
    for path in here.keys() & there.keys():
        own, other = np.asarray(here[path], bool), np.asarray(there[path], bool)
        if own.ndim and other.ndim and own.shape != other.shape:
            wrong.append(f"{path}: {own.shape} and {other.shape}")
            continue
        shape = np.broadcast_shapes(own.shape, other.shape)
        pairs[path] = np.broadcast_to(own, shape), np.broadcast_to(other, shape)
    trees.raise_for(sorted(wrong), "masks must have the same paths and shapes, but have not:")
    return {path: pairs[path] for path in here}


def _places(
    path: str, flags: np.ndarray, total: int, values: np.ndarray | None = None
) -> list[str]:
    """Returns a line about a leaf, if a flag in it is set."""
    if not flags.any():
        return []
    place = tuple(int(index) for index in np.argwhere(flags)[0])
    value = "" if values is None else f" {values[place]!s}"
    return [f"{path}: {int(flags.sum()):,} of {total:,}, first{value} at {[*place]}"]


def _fail(wrong: list[str], summary: str) -> None:
    """Raises an assertion that lists what is wrong, if anything is."""
    if not wrong:
        return
    lines = [f"\n  {line}" for line in wrong[:_SHOWN] if line]
    more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise AssertionError(summary + "".join(lines) + more)
