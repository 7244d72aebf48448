"""A chain whose members also see the raw gradient and what the members before them track."""

from typing import Any

import optax


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` that hands on what a pruning transformation at its end needs.

    Last in a chain, a transformation sees updates, not gradients. This chain passes each
    member two extra arguments: `grad`, the gradient as it entered the chain, and
    `inner_state`, the new states of the members before it. Members that do not know these
    arguments are not troubled. The state is that of `optax.chain`.

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
            new_state = (*new_state, member_state)
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
