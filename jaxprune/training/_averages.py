"""Averages the parameters exponentially and keeps pruned weights at zero."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import masks, trees


class AverageState(NamedTuple):
    """The state of `average_parameters`."""

    parameter_average: Any  # like the parameters, in float32 or wider


def average_parameters(decay: float) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential average of the parameters and leaves updates unchanged.

    Chain it after the whole optimizer, so that it sees the new parameters:
    `optax.chain(jaxprune.chain(optimizer, pruning), average_parameters(0.999))`.

    The average is kept in float32 or wider: in bfloat16 a step of a thousandth would round to
    nothing. It takes the memory of one more copy of the parameters.

    Args:
        decay: share of the old average that each step keeps, in [0, 1).

    Returns:
        An Optax transformation. `with_averages` reads its average.

    Raises:
        ValueError: if `decay` is outside [0, 1); the update, if it is called without `params`.

    Example:
        >>> optimizer = optax.chain(optax.sgd(1.0), average_parameters(0.75))
        >>> params, grads = {"w": jnp.array(4.0)}, {"w": jnp.array(4.0)}
        >>> _, state = optimizer.update(grads, optimizer.init(params), params)
        >>> float(with_averages(params, state)["w"])
        3.0
    """
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must lie in [0, 1), but is {decay!r}.")

    def init(params: Any) -> AverageState:
        return AverageState(jax.tree.map(lambda leaf: _wide(jnp.copy(leaf)), params))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "`params` is missing: averages follow the parameters; call "
                "`optimizer.update(updates, state, params)`."
            )
        new = jax.tree.map(_wide, optax.apply_updates(params, updates))
        average = optax.incremental_update(new, state.parameter_average, 1 - decay)
        return updates, AverageState(average)

    return optax.GradientTransformationExtraArgs(init, update)


def with_averages(params: Any, opt_state: Any) -> Any:
    """Returns the averaged parameters for evaluation, or `params` if no average is kept.

    A weight that is pruned now was not always 0, so the masks in the state are applied.

    Args:
        params: the trained parameters.
        opt_state: state of the whole optimizer.

    Returns:
        A tree like `params`, with its dtypes.

    Raises:
        ValueError: the state has more than one average, or that of a different tree.

    Example:
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> with_averages(params, optax.sgd(0.1).init(params)) is params
        True
    """
    found = trees.state_fields(opt_state, "parameter_average")
    if not found:
        return params
    if len(found) > 1:
        raise ValueError(f"`opt_state` must hold one average of parameters, but has {len(found)}.")
    trees.check_same_structure("the average in `opt_state`", found[0], params)
    averages = jax.tree.map(lambda own, leaf: own.astype(leaf.dtype), found[0], params)
    if trees.state_fields(opt_state, "masks"):
        return masks.apply_masks(averages, masks.get_masks(opt_state))
    return averages


def _wide(leaf: jax.Array) -> jax.Array:
    """Returns a leaf in float32 if its type is narrower; other types do not change."""
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return leaf.astype(jnp.float32) if narrow else leaf
