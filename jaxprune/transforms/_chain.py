"""A chain whose members also see the raw gradient and what the members before them track."""

from typing import Any

import jax.numpy as jnp
import optax

from jaxprune.transforms._masking import DynamicState


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` that hands on what a pruning transformation at its end needs.

    Last in a chain, a transformation sees updates, not gradients. This chain passes each
    member two extra arguments: `grad`, the gradient as it entered the chain, and
    `inner_state`, the new states of the members before it. Members that do not know these
    arguments are not troubled. The state is that of `optax.chain`.

    Behind `set_transform`, `rigl_transform` and `acdc_transform` it also holds the moments of
    pruned weights at 0 (whatever the members before keep in the shape of a weight: momentum,
    Adam's `mu` and `nu`), so that a weight that comes back starts without a past.

    Args:
        *transforms: gradient transformations, applied in order.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxprune
        >>> optimizer = jaxprune.chain(
        ...     optax.sgd(0.1, momentum=0.9), jaxprune.agip_transform(0.72, stop=1000))
        >>> params = {"kernel": jnp.ones((4, 4))}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update({"kernel": jnp.ones((4, 4))}, state, params)
        >>> f"{updates['kernel'][0, 0]:.3f}"
        '-0.100'
    """
    members = tuple(optax.with_extra_args_support(transform) for transform in transforms)

    def init_fn(params: Any) -> tuple[Any, ...]:
        return tuple(member.init(params) for member in members)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        if len(state) != len(members):
            raise ValueError(
                f"`state` must have one entry for each of the {len(members)} transformations "
                f"of this chain, but has {len(state)}. Use the state that this chain's `init` "
                "returned."
            )
        extra_args = {"grad": updates} | extra_args
        new_state: tuple[Any, ...] = ()
        for member, member_state in zip(members, state, strict=True):
            updates, member_state = member.update(
                updates, member_state, params, **(extra_args | {"inner_state": new_state})
            )
            if isinstance(member_state, DynamicState):
                new_state = _restart_moments(members, new_state, member_state.masks)
            new_state = (*new_state, member_state)
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _restart_moments(members: Any, states: tuple[Any, ...], masks: Any) -> tuple[Any, ...]:
    """The states of the first members, with 0 in place of each moment of a pruned weight."""

    def absent(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def keep(moment: Any, mask: Any) -> Any:
        # Adafactor's sums over rows have other shapes than their weights.
        if absent(moment) or absent(mask) or jnp.shape(mask) != jnp.shape(moment):
            return moment
        return jnp.where(mask, moment, jnp.zeros_like(moment))

    return tuple(
        optax.tree_utils.tree_map_params(member, keep, state, masks, is_leaf=absent)
        for member, state in zip(members, states, strict=False)
    )
