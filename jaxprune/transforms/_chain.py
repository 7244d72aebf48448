"""A chain whose members also see the raw gradient and what the members before them track."""

from typing import Any

import optax

from jaxprune.transforms._masking import (
    DynamicState,
    keep_unpruned,
    project_all,
    restart_moments,
)


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` that hands on what a pruning transformation at its end needs.

    Last in a chain, a transformation sees updates, not gradients. This chain passes each
    member two extra arguments: `grad`, the gradient as it entered the chain, and
    `inner_state`, the new states of the members before it. Members that do not know these
    arguments are not troubled. The state is that of `optax.chain`.

    The members before `set_transform`, `rigl_transform` or `acdc_transform` see the sparse
    network: where a weight is pruned, its gradient, its value and its moments (whatever they keep
    in the shape of a weight: momentum, Adam's `mu` and `nu`) are 0, so that a weight that comes
    back starts without a past.

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
        dynamic = [i for i, s in enumerate(state) if isinstance(s, DynamicState)]
        last, masks, seen = None, None, params
        if dynamic and params is not None:
            # Its masks come first: the old ones, read besides the new, would be copied each step.
            last = dynamic[-1]
            pruned: Any = members[last].update(updates, state[last], params, **extra_args)[1]
            masks = pruned.masks
            before = zip(members[:last], state[:last], strict=True)
            restarted = [restart_moments(*member, masks) for member in before]
            state = (*restarted, pruned, *state[last + 1 :])
            seen, updates = keep_unpruned(params, masks), keep_unpruned(updates, masks)
        new_state: tuple[Any, ...] = ()
        for i, (member, member_state) in enumerate(zip(members, state, strict=True)):
            if i == last:
                updates, seen = project_all(updates, masks, params), params
                new_state = (*new_state, member_state)
                continue
            updates, member_state = member.update(
                updates, member_state, seen, **(extra_args | {"inner_state": new_state})
            )
            new_state = (*new_state, member_state)
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
