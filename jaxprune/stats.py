"""Gradients -> running statistics: how large each weight's gradient has been lately."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import trees

__all__ = ["all_finite", "faults", "first_moment", "rescaled", "unbias", "update_average"]


def update_average(average: Any, gradients: Any, decay: float) -> Any:
    """One step of the exponential average of `|g|`: `S <- decay * S + (1 - decay) * |g|`.

    A gradient that is not finite, or too large for the dtype of the average, leaves its
    weight's average as it was.

    Args:
        average: tree of floating-point arrays; starts at 0.
        gradients: tree of floating-point arrays like `average`.
        decay: in [0, 1).

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


def unbias(average: Any, decay: float, steps: jax.Array) -> Any:
    """Divides an average that started at 0 by `1 - decay ** steps`.

    Args:
        average: tree of arrays.
        decay: in [0, 1).
        steps: int32 [], how many gradients have entered.

    Returns:
        Tree of float32 arrays like `average`.

    References:
        Kingma and Ba, Adam, arXiv:1412.6980, section 3.

    Example:
        >>> unbias([jnp.array([0.5])], 0.9, jnp.int32(1))[0].round(3).tolist()
        [5.0]
    """
    scale = 1 / (1 - decay ** steps.astype(jnp.float32))
    return jax.tree.map(lambda s: s.astype(jnp.float32) * scale, average)


def rescaled(statistics: Any) -> Any:
    """Multiplies tiny statistics by a power of two, so that products with weights do not vanish.

    The ranking of `|w| * S` stays what it is, but float32 ends at 1e-38: with gradients of 1e-30
    and weights of 1e-9 every product would be 0.

    Args:
        statistics: tree of non-negative floating-point arrays.

    Returns:
        Tree of the same arrays if the largest entry of all is above 1e-12; else each times the same
        power of two, which makes the largest about 1. Dtypes stay.

    Example:
        >>> rescaled([jnp.array([0.5]), jnp.array([0.25])])[0].tolist()
        [0.5]
        >>> [float(leaf[0]) for leaf in rescaled([jnp.array([2.0**-60]), jnp.array([2.0**-62])])]
        [0.5, 0.125]
    """
    leaves, treedef = jax.tree.flatten(statistics)
    if not leaves:
        return statistics
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)).astype(jnp.float32) for leaf in leaves]))
    exponent = jnp.frexp(largest)[1]
    tiny = (largest > 0) & (exponent < -40)
    power = jnp.where(tiny, jnp.minimum(-exponent, 126), 0)
    # Exactly 2 ** power, which `exp2` is not: its bits are the exponent alone.
    bits = (power + 127).astype(jnp.int32) << 23
    factor = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return treedef.unflatten([leaf * factor.astype(leaf.dtype) for leaf in leaves])


def first_moment(inner_state: Any) -> Any | None:
    """The momentum that an optimizer already keeps: SGD's `trace`, Adam's or Lion's `mu`.

    Args:
        inner_state: states of the transformations before the pruning transformation.

    Returns:
        Tree like the parameters, or `None` if there is not exactly one such tree.

    Example:
        >>> import optax
        >>> state = optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones(2)})
        >>> first_moment(state)["w"].tolist()
        [0.0, 0.0]
        >>> first_moment(optax.sgd(0.1).init({"w": jnp.ones(2)})) is None
        True
    """
    found = [m for name in ("trace", "mu") for m in trees.state_fields(inner_state, name)]
    return found[0] if len(found) == 1 else None


def faults(x: jax.Array) -> jax.Array:
    """Marks infinities and NaNs, eight entries to a byte.

    Args:
        x: floating-point array.

    Returns:
        uint8, packed along the last dimension; 0 where eight entries are finite.

    Example:
        >>> faults(jnp.array([1.0, jnp.nan, 3.0])).tolist()
        [64]
    """
    return jnp.packbits(~jnp.isfinite(jnp.atleast_1d(x)), axis=-1)


def all_finite(tree: Any) -> jax.Array:
    """Whether no entry of a tree is infinite or NaN.

    Args:
        tree: tree of floating-point arrays.

    Returns:
        bool [].

    Example:
        >>> bool(all_finite({"w": jnp.array([1.0, jnp.inf])}))
        False
    """
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.array(True)
