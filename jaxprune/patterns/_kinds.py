"""The kinds of patterns, and checks whether a pattern fits a leaf."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.patterns._by_layout import Unfit, axes_of, check_one_way

Shape = tuple[int, ...]

# Each leaf needs m (m - 1) / 2 comparisons, which compile in 0.1 s for m = 4, in 2.5 s for 32 and
# in 13 s for 64.
MAX_M = 32
_POOLS = ("mean", "max", "sum")
_WANTED = "None or made by `n_m`, `blocks` or `channels`"


class NM(NamedTuple):
    """A pattern that keeps `n` of every `m` consecutive weights along an axis.

    Make it with `n_m`, which checks the arguments.

    Args:
        n: number of weights kept in each group.
        m: size of a group.
        axis: the axis along which groups lie.

    Example:
        >>> NM(2, 4, axis=-2)
        NM(n=2, m=4, axis=-2)
    """

    n: int
    m: int
    axis: int


class Blocks(NamedTuple):
    """A pattern of blocks, each of which is pruned as a whole.

    Make it with `blocks`, which checks the arguments.

    Args:
        shape: size of a block along the trailing dimensions of the leaf; None is the whole
            dimension.
        pool: how the scores of a block are combined: `"mean"`, `"max"` or `"sum"`.

    Example:
        >>> Blocks((4, None), "mean").shape
        (4, None)
    """

    shape: tuple[int | None, ...]
    pool: str


class Channels(NamedTuple):
    """A pattern of slices across the whole leaf, each of which is pruned as a whole.

    Make it with `channels`, which checks the arguments.

    Args:
        axis: the axis whose indices each select one slice.
        pool: how the scores of a slice are combined: `"mean"`, `"max"` or `"sum"`.

    Example:
        >>> Channels(-1, "mean")
        Channels(axis=-1, pool='mean')
    """

    axis: int
    pool: str


# What is pruned together; None is single weights.
Pattern = NM | Blocks | Channels | None
# A pattern for all leaves, or a function (path, leaf) -> pattern.
PatternRule = Pattern | Callable[[str, Any], Pattern]


@overload
def n_m(n: int, m: int, axis: int) -> NM: ...
@overload
def n_m(n: int, m: int, *, layouts: Mapping[str, Any]) -> Callable[[str, Any], Any]: ...
def n_m(
    n: int, m: int, axis: int | None = None, *, layouts: Mapping[str, Any] | None = None
) -> NM | Callable[[str, Any], Any]:
    """Makes a pattern of N:M sparsity: `n` of every `m` consecutive weights along an axis are kept.

    Hardware for 2:4 sparsity needs groups along the inputs of a kernel. Frameworks store inputs on
    different axes, so there is no default: pass `axis` or `layouts`.

    Args:
        n: number of weights kept in each group, from 1 to `m`.
        m: size of a group, at most 32.
        axis: the axis of every leaf along which groups lie: -2 is the input of kernels
            `[..., in, out]`, -1 that of `[out, in]`.
        layouts: from `jaxprune.layouts.find`: groups lie along the last input axis of each leaf.

    Returns:
        A pattern for `axis`; for `layouts` a function `(path, leaf) -> pattern`.

    Raises:
        ValueError: if the numbers are out of range or not integers, or unless exactly one of `axis`
            and `layouts` is given.

    References:
        Mishra et al., Accelerating sparse deep neural networks, arXiv:2104.08378.

    Example:
        >>> n_m(2, 4, axis=-2)
        NM(n=2, m=4, axis=-2)
        >>> from jaxprune import layouts
        >>> params = {"weight": jnp.ones((3, 8))}  # [out, in]
        >>> found = layouts.find(lambda p, x: x @ p["weight"].T, params, jnp.ones(8))
        >>> n_m(2, 4, layouts=found)("weight", params["weight"])
        NM(n=2, m=4, axis=-1)
    """
    check_one_way("n_m(2, 4", "inputs", "-2", axis, layouts)
    if axis is not None:
        return _checked(NM(n, m, axis))
    assert layouts is not None
    _checked(NM(n, m, -1))

    def rule(path: str, leaf: Any) -> NM | Unfit:
        inputs = axes_of(layouts, path, leaf, "inputs")
        return inputs if isinstance(inputs, Unfit) else NM(n, m, inputs[-1] - len(leaf.shape))

    return rule


def blocks(shape: tuple[int | None, ...], pool: str = "mean") -> Blocks:
    """Makes a pattern of blocks of weights, each of which is pruned as a whole.

    Args:
        shape: the shape of a block; None is the whole dimension. If the leaf has more dimensions,
            the block has size 1 along the leading ones. Blocks at the far edges of a leaf are
            smaller where the block does not divide it.
        pool: how the scores of a block are combined: `"mean"` over the weights that exist,
            `"max"` or `"sum"`. Only under `"mean"` does a smaller edge block tie with a full block
            of the same weights.

    Returns:
        A pattern.

    Raises:
        ValueError: if a size is not a positive integer or None, or `pool` is unknown.

    Example:
        >>> blocks((4, 4), pool="max")
        Blocks(shape=(4, 4), pool='max')
    """
    return _checked(Blocks(tuple(shape) if isinstance(shape, list) else shape, pool))


@overload
def channels(axis: int, pool: str = "mean") -> Channels: ...
@overload
def channels(*, pool: str = "mean", layouts: Mapping[str, Any]) -> Callable[[str, Any], Any]: ...
def channels(
    axis: int | None = None, pool: str = "mean", *, layouts: Mapping[str, Any] | None = None
) -> Channels | Callable[[str, Any], Any]:
    """Makes a pattern of slices across the whole leaf, each of which is pruned as a whole.

    Args:
        axis: the axis of every leaf whose indices each select one slice: -1 selects the output
            channels of kernels `[..., in, out]`, -2 their input channels. Frameworks store outputs
            on different axes, so there is no default: pass `axis` or `layouts`.
        pool: how the scores of a slice are combined: `"mean"`, `"max"` or `"sum"`.
        layouts: from `jaxprune.layouts.find`: the slices are the output channels of each leaf. With
            several output axes there is one slice for each of their entries; with copies of a
            layer, one for each output of each copy.

    Returns:
        A pattern for `axis`; for `layouts` a function `(path, leaf) -> pattern`.

    Raises:
        ValueError: if `axis` is not an integer, `pool` is unknown, or unless exactly one of `axis`
            and `layouts` is given.

    Example:
        >>> channels(axis=-1)
        Channels(axis=-1, pool='mean')
        >>> from jaxprune import layouts
        >>> params = {"query": jnp.ones((8, 2, 4))}  # [inputs, heads, width]
        >>> def apply(params, x):
        ...     return jnp.einsum("nd,dhw->nhw", x, params["query"])
        >>> found = layouts.find(apply, params, jnp.ones((1, 8)))
        >>> channels(layouts=found)("query", params["query"])
        Blocks(shape=(None, 1, 1), pool='mean')
    """
    check_one_way("channels(", "outputs", "-1", axis, layouts)
    if axis is not None:
        return _checked(Channels(axis, pool))
    assert layouts is not None
    _checked(Channels(-1, pool))

    def rule(path: str, leaf: Any) -> Channels | Blocks | Unfit:
        outputs = axes_of(layouts, path, leaf, "outputs")
        if isinstance(outputs, Unfit):
            return outputs
        dimensions, copies = len(leaf.shape), axes_of(layouts, path, leaf, "copies")
        own = {*outputs} if isinstance(copies, Unfit) else {*outputs, *copies}
        if len(own) == 1:
            return Channels(outputs[0] - dimensions, pool)
        return Blocks(tuple(1 if axis in own else None for axis in range(dimensions)), pool)

    return rule


def check_pattern(rule: Any) -> None:
    """Raises unless an argument `pattern` is None, a pattern, or a function that returns one.

    Args:
        rule: what the caller was given.

    Raises:
        ValueError: if it is anything else.

    Example:
        >>> check_pattern(None)
    """
    if rule is None or isinstance(rule, (NM, Blocks, Channels)) or callable(rule):
        return
    n_m_text = re.fullmatch(r"\D*(\d+)\D+(\d+)\D*", str(rule))
    meant = "patterns.n_m({}, {}, axis=-2)".format(*n_m_text.groups()) if n_m_text else ""
    raise ValueError(
        f"`pattern` must be {_WANTED}, or a function of path and leaf that returns one, but "
        f"is {rule!r}." + (f" Write `pattern=jaxprune.{meant}`." if meant else "")
    )


def patterns_of(leaves: Mapping[str, Any], rule: PatternRule) -> list[Pattern]:
    """Returns the pattern of each leaf, checked against its shape.

    Args:
        leaves: path -> anything with a `shape`, in flattening order.
        rule: one pattern for all leaves, or a function `(path, leaf) -> pattern`.

    Returns:
        One pattern for each leaf; None stands for single weights.

    Raises:
        ValueError: if `rule` is neither a pattern nor a function; or lists every leaf that its
            pattern does not fit.

    Example:
        >>> leaves = {"stem/kernel": jnp.zeros((3, 8)), "head/kernel": jnp.zeros((8, 2))}
        >>> patterns_of(leaves, lambda path, leaf: n_m(2, 4, axis=-2) if "head" in path else None)
        [None, NM(n=2, m=4, axis=-2)]
        >>> patterns_of(leaves, n_m(2, 4, axis=-2))
        Traceback (most recent call last):
        ...
        ValueError: each leaf must fit its pattern; exclude a leaf with `prunable`, or ...
          stem/kernel: shape (3, 8), axis -2 has 3 entries, not a multiple of m = 4
    """
    check_pattern(rule)
    if callable(rule):
        found = [rule(path, leaf) for path, leaf in leaves.items()]
    else:
        found: list[Pattern] = [rule] * len(leaves)
    problems = [
        f"{path}: shape {tuple(leaf.shape)}, {fault}"
        for (path, leaf), pattern in zip(leaves.items(), found, strict=True)
        if (fault := _argument_fault(pattern) or _fault(pattern, tuple(leaf.shape)))
    ]
    trees.raise_for(
        problems,
        "each leaf must fit its pattern; exclude a leaf with `prunable`, or let `pattern` be a "
        "function of path and leaf that returns a different pattern, or None for single weights:",
    )
    return found


def unit_shape(pattern: Pattern, shape: Shape, stacked: tuple[int, ...] = ()) -> Shape:
    """Returns the shape of the array of units of a leaf, which budgets count.

    Args:
        pattern: the pattern of the leaf, or of each of its copies.
        shape: the shape of the leaf.
        stacked: axes of the leaf that number copies; the pattern counts only the other axes.

    Returns:
        A shape with as many dimensions as `shape`; a smaller block at an edge counts as one. With
        N:M, the shape of the array of groups, which are not units: each keeps `n` of its weights.

    Raises:
        ValueError: if the pattern does not fit the shape.

    Example:
        >>> unit_shape(blocks((4, 4)), (3, 10, 8)), unit_shape(channels(axis=-1), (3, 3, 16, 32))
        ((3, 3, 2), (1, 1, 1, 32))
        >>> unit_shape(n_m(2, 4, axis=-2), (8, 5)), unit_shape(None, (8, 5))
        ((2, 5), (8, 5))
        >>> unit_shape(channels(axis=-1), (12, 16, 32), stacked=(0,))
        (12, 1, 32)
    """
    return tuple(-(-size // step) for size, step in zip(shape, block_of(pattern, shape, stacked)))


def _checked(pattern: Any) -> Any:
    """Returns the pattern itself; raises if its arguments are invalid."""
    if fault := _argument_fault(pattern):
        raise ValueError(f"{fault}.")
    return pattern


def is_int(x: Any) -> bool:
    """Returns whether an object is a Python or NumPy integer, and not a bool."""
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _argument_fault(pattern: Any) -> str:
    """Says what is wrong with a pattern for any leaf; an empty text if nothing is."""
    match pattern:
        case None:
            return ""
        case NM(n, m):
            if not (is_int(n) and is_int(m) and 1 <= n <= m <= MAX_M):
                return (
                    f"`n` and `m` must be integers with 1 <= n <= m <= {MAX_M}, but are "
                    f"{n!r} and {m!r}"
                )
        case Blocks(shape):
            sizes = shape if isinstance(shape, tuple) else ()
            if not sizes or not all(size is None or is_int(size) and size > 0 for size in sizes):
                return (
                    "`shape` must be a tuple of positive integers, or None for a whole "
                    f"dimension, but is {shape!r}"
                )
        case Channels():
            pass
        case Unfit(reason):
            return reason
        case _:
            return f"the pattern must be {_WANTED}, but is {pattern!r}"
    if not isinstance(pattern, Blocks) and not is_int(pattern.axis):
        return f"`axis` must be an integer, but is {pattern.axis!r}"
    if not isinstance(pattern, NM) and pattern.pool not in _POOLS:
        return f"`pool` must be one of {', '.join(_POOLS)}, but is {pattern.pool!r}"
    return ""


def _fault(pattern: Pattern, shape: Shape) -> str:
    """Says why a valid pattern does not fit a leaf of this shape; an empty text if it fits."""
    if isinstance(pattern, Blocks):
        lead = len(shape) - len(pattern.shape)
        if lead < 0:
            return f"the block {pattern.shape} has more dimensions"
        pairs = zip(pattern.shape, shape[lead:], strict=True)
        wide = [axis for axis, (step, size) in enumerate(pairs, lead) if step and step > size]
        return f"the block {pattern.shape} is larger along {_axes(wide)}" if wide else ""
    if pattern is None:
        return ""
    if not -len(shape) <= pattern.axis < len(shape):
        return f"there is no axis {pattern.axis}"
    size = shape[pattern.axis]
    if isinstance(pattern, NM) and size % pattern.m:
        return f"axis {pattern.axis} has {size} entries, not a multiple of m = {pattern.m}"
    return ""


def _axes(numbers: list[int]) -> str:
    """Names axes in an error: `axis 1`, or `axes 0, 1`."""
    return f"ax{'es' if len(numbers) > 1 else 'is'} {', '.join(map(str, numbers))}"


def copy_shape(shape: Shape, stacked: tuple[int, ...]) -> Shape:
    """Returns the shape of one copy of a stacked leaf.

    Args:
        shape: the shape of the leaf.
        stacked: axes that number copies.

    Returns:
        The shape without these axes.

    Example:
        >>> copy_shape((12, 64, 256), (0,))
        (64, 256)
    """
    return tuple(size for axis, size in enumerate(shape) if axis not in stacked)


def axis_of(pattern: NM, shape: Shape, stacked: tuple[int, ...]) -> int:
    """Returns the axis of a leaf along which N:M groups lie; a pattern counts the axes of a copy.

    Args:
        pattern: the pattern of each copy.
        shape: the shape of the leaf.
        stacked: axes that number copies.

    Returns:
        A non-negative axis.

    Example:
        >>> axis_of(n_m(2, 4, axis=-2), (64, 12, 256), stacked=(1,))
        0
    """
    return [axis for axis in range(len(shape)) if axis not in stacked][pattern.axis]


def block_of(pattern: Pattern, shape: Shape, stacked: tuple[int, ...] = ()) -> Shape:
    """Returns the size of a unit, or of an N:M group, along each dimension of a leaf."""
    if stacked:
        own = iter(block_of(pattern, copy_shape(shape, stacked)))
        return tuple(1 if axis in stacked else next(own) for axis in range(len(shape)))
    if fault := _argument_fault(pattern) or _fault(pattern, shape):
        raise ValueError(f"`pattern` must fit the leaf of shape {shape}: {fault}.")
    if isinstance(pattern, Blocks):
        sizes = (*(1,) * (len(shape) - len(pattern.shape)), *pattern.shape)
        return tuple(max(n, 1) if step is None else step for step, n in zip(sizes, shape))
    if isinstance(pattern, Channels):
        own = pattern.axis % len(shape)
        return tuple(1 if axis == own else max(n, 1) for axis, n in enumerate(shape))
    own = None if pattern is None else pattern.axis % len(shape)
    return tuple(pattern.m if pattern and axis == own else 1 for axis in range(len(shape)))


def as_float32(scores: Any) -> jax.Array:
    """Converts scores to float32, in which they are compared."""
    scores = jnp.asarray(scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise ValueError(f"`scores` must be floating point, but are {scores.dtype}; convert them.")
    return scores.astype(jnp.float32)
