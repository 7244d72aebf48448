"""Learning-rate factors for the weights that are kept.

A rate rule is a function `(statistic, mean, density) -> factor`, called once for each pruned leaf
at every step. `statistic` has the shape of the leaf; `mean` (the mean statistic of its kept
weights) and `density` are scalars, measured at the last mask update. Under both rules in this file
a dense leaf has the factor 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["RateRule", "by_density", "by_statistic"]

# (statistics of a leaf, their mean, its density) -> factors of the learning rate
RateRule = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def by_density(power: float = 0.5, limit: float = 2.0) -> RateRule:
    """Makes a rule that raises the rate of sparse layers: `min(limit, density ** -power)`.

    Args:
        power: 0.5 preserves the size of a layer's total update under SGD; 1 is the muP rule for
            Adam.
        limit: largest factor.

    Returns:
        A rate rule; its factor is a scalar for each leaf.

    Raises:
        ValueError: if `power` is negative or `limit` is below 1.

    References:
        Dey et al., Sparse maximal update parameterization, arXiv:2405.15743.

    Example:
        >>> rule = by_density()
        >>> float(rule(jnp.zeros(3), jnp.array(1.0), jnp.array(0.25)))
        2.0
    """
    _check(power, limit)

    def rule(statistic: jax.Array, mean: jax.Array, density: jax.Array) -> jax.Array:
        del statistic, mean
        return jnp.minimum(limit, jnp.maximum(density, 1e-12) ** -power)

    return rule


def by_statistic(limit: float = 2.0) -> RateRule:
    """Makes a rule that raises the rate of weights whose gradient is above the mean of their leaf.

    `clip(1 + (1 - density) * (S / mean S - 1), 1 / limit, limit)`: the effect grows from none in a
    dense layer to its full strength in a sparse one.

    Args:
        limit: largest factor; its inverse is the smallest.

    Returns:
        A rate rule; its factor has the shape of the leaf.

    Raises:
        ValueError: if `limit` is below 1.

    Example:
        >>> rule = by_statistic()
        >>> factor = rule(jnp.array([0.01, 1.0, 9.0]), jnp.array(1.0), jnp.array(0.0))
        >>> factor.tolist()
        [0.5, 1.0, 2.0]
    """
    _check(0.0, limit)

    def rule(statistic: jax.Array, mean: jax.Array, density: jax.Array) -> jax.Array:
        slope = (1 - density) / jnp.maximum(mean, 1e-30)
        factor = density + slope * jnp.abs(statistic.astype(jnp.float32))
        return jnp.clip(factor, 1 / limit, limit)

    return rule


def _check(power: float, limit: float) -> None:
    """Checks the arguments that the rules share."""
    if not power >= 0:
        raise ValueError(f"`power` must not be negative, but is {power!r}.")
    if not limit >= 1:
        raise ValueError(f"`limit` must be at least 1, but is {limit!r}.")
