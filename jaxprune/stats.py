"""Gradients -> running statistics: the recent size of each weight's gradient."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import counting, trees

__all__ = ["all_finite", "faults", "first_moment", "rescaled", "unbiasing", "update_average"]


def update_average(average: Any, gradients: Any, decay: float) -> Any:
    """Takes a step of the exponential average of `|g|`: `S <- decay * S + (1 - decay) * |g|`.

    A gradient that is not finite, or too large for the dtype of the average, does not change the
    average of its weight.

    Args:
        average: tree of floating-point arrays; starts at 0.
        gradients: tree of floating-point arrays like `average`.
        decay: the decay of the average, in [0, 1).

    Returns:
        Tree like `average`, in the dtypes of `average`, computed in float32.

    Example:
        >>> update_average([jnp.array([1.0, 1.0])], [jnp.array([-3.0, jnp.nan])], 0.5)[0].tolist()
        [2.0, 1.0]
    """

    def step(average: jax.Array, g: jax.Array) -> jax.Array:
        old, g = average.astype(jnp.float32), g.astype(jnp.float32)
        new = (old + (1 - decay) * (jnp.abs(g) - old)).astype(average.dtype)
        return jnp.where(jnp.isfinite(new), new, average)

    return jax.tree.map(step, average, gradients)


def unbiasing(decay: float, steps: jax.Array) -> jax.Array:
    """Returns what an average that started at 0 is multiplied by: `1 / (1 - decay ** steps)`.

    Args:
        decay: the decay of the average, in [0, 1).
        steps: int32 [], number of gradients that have entered the average.

    Returns:
        float32 [].

    References:
        Kingma and Ba, Adam, arXiv:1412.6980, section 3.

    Example:
        >>> float(0.5 * unbiasing(0.9, jnp.int32(1)).round(3))
        5.0
    """
    return 1 / (1 - decay ** steps.astype(jnp.float32))


def rescaled(
    statistics: Any, scale: Any = 1.0, stacked: Sequence[tuple[int, ...]] | None = None
) -> Any:
    """Multiplies tiny statistics by a power of two, so that products with weights do not vanish.

    The ranking of `|w| * S` does not change, but float32 ends at 1e-38: with gradients of 1e-30 and
    weights of 1e-9, every product would be 0.

    Args:
        statistics: tree of floating-point arrays.
        scale: a positive number that all arrays are multiplied by first, see `unbiasing`.
        stacked: the axes of each leaf that number copies, in flattening order; None: no copies.

    Returns:
        Tree of float32 arrays: the statistics times `scale` if the largest entry is then above
        1e-12. If not, they are also multiplied by the power of two that makes the largest entry
        about 1.

    Example:
        >>> rescaled([jnp.array([0.5]), jnp.array([0.25])])[0].tolist()
        [0.5]
        >>> [float(leaf[0]) for leaf in rescaled([jnp.array([2.0**-60]), jnp.array([2.0**-62])])]
        [0.5, 0.125]
    """
    leaves, treedef = jax.tree.flatten(statistics)
    if not leaves:
        return statistics
    largest = _largest(leaves, stacked) * scale
    # Of a subnormal number this is -126, which is low enough.
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 126
    tiny = (largest > 0) & (exponent < -40)
    power = jnp.where(tiny, jnp.minimum(-exponent, 126), 0)
    # Built from the bits of the exponent, because `exp2` is not exact.
    bits = (power + 127).astype(jnp.int32) << 23
    factor = jax.lax.bitcast_convert_type(bits, jnp.float32) * scale
    return treedef.unflatten([leaf.astype(jnp.float32) * factor for leaf in leaves])


def first_moment(inner_state: Any, paths: Sequence[str]) -> list[jax.Array]:
    """Finds the momentum that an optimizer keeps: SGD's `trace`, Adam's or Lion's `mu`.

    Args:
        inner_state: states of the transformations before the pruning transformation. Each may
            hold the momentum of some of the parameters, as in `optax.partition`.
        paths: paths of parameters, as in `trees.leaf_by_path`.

    Returns:
        One array for each path, in the order of the paths.

    Raises:
        ValueError: if a parameter has no momentum or more than one, listing every such leaf.

    Example:
        >>> state = optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones(2)})
        >>> first_moment(state, ["w"])[0].tolist()
        [0.0, 0.0]
    """
    found: dict[str, dict[str, Any]] = {}  # parameter's path -> place in the state -> momentum
    for name in ("trace", "mu"):
        for place, tree in _fields_with_places(inner_state, name):
            for path, leaf in trees.leaf_by_path(tree).items():
                found.setdefault(path, {})[place] = leaf
    held = [found.get(path, {}) for path in paths]
    trees.raise_for(
        [
            f"{path}: " + (f"momenta in {' and '.join(own)}" if own else "no momentum")
            for path, own in zip(paths, held, strict=True)
            if len(own) != 1
        ],
        "`decay=None` reads the momentum of the optimizer, so each pruned leaf must have exactly "
        "one. Let `agip_transform` keep an average, for example with `decay=0.99`, or put an "
        "optimizer with one `trace` or `mu` before it:",
    )
    return [next(iter(own.values())) for own in held]


def _fields_with_places(state: Any, name: str) -> list[tuple[str, Any]]:
    """Returns all fields with a given name in an optimizer state, with their places."""

    def is_field(path: tuple[Any, ...], value: Any) -> bool:
        del value
        return isinstance(path[-1], optax.tree_utils.NamedTupleKey)

    found = optax.tree.get_all_with_path(state, name, filtering=is_field)
    return [(jax.tree_util.keystr(path), value) for path, value in found]


def faults(x: jax.Array) -> jax.Array:
    """Marks infinities and NaNs, with one bit for each entry.

    Args:
        x: floating-point array.

    Returns:
        uint8 array, packed along the last dimension; 0 where all eight entries are finite.

    Example:
        >>> faults(jnp.array([1.0, jnp.nan, 3.0])).tolist()
        [64]
    """
    return jnp.packbits(~jnp.isfinite(jnp.atleast_1d(x)), axis=-1)


def all_finite(tree: Any) -> jax.Array:
    """Returns whether all entries of a tree are finite.

    Args:
        tree: tree of floating-point arrays.

    Returns:
        bool [].

    Example:
        >>> bool(all_finite({"w": jnp.array([1.0, jnp.inf])}))
        False
    """
    leaves = jax.tree.leaves(tree)
    return jnp.isfinite(_largest(leaves, None)) if leaves else jnp.array(True)


def _largest(leaves: list[jax.Array], stacked: Sequence[tuple[int, ...]] | None) -> jax.Array:
    """Returns the largest size of an entry of any leaf, float32 []; NaN if there is one."""
    # Not `max`: XLA would compute the maximum of N leaves in each of the N places that read it, and
    # a program of N leaves would take N ** 2 times as long to compile.
    return jnp.sort(jnp.concatenate(counting.peaks(leaves, stacked)))[-1]
