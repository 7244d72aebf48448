"""A chain whose members also get the raw gradient and the states of the members before them."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import optax

from jaxprune import trees
from jaxprune.transforms._agip import AgipState
from jaxprune.transforms._agip_channels import ChannelState
from jaxprune.transforms._base import MaskState, has_line_search
from jaxprune.transforms._fixed_mask import FixedMaskState
from jaxprune.transforms._frozen import warn_of_frozen
from jaxprune.transforms._inner import (
    differs,
    forget_values,
    has_sam,
    keep_unpruned,
    masks_like,
    order_problems,
    project_all,
    pruning_states,
    restart_moments,
)
from jaxprune.transforms._packed import PackedState, packed_states
from jaxprune.transforms._room import check_room
from jaxprune.transforms._straight_through import StraightThroughState

_Inner = Literal["sparse", "dense"] | None

# States of methods that read nothing about pruned weights from the members before them.
_MASKS_ONLY = (MaskState, FixedMaskState)


def chain(
    *transforms: optax.GradientTransformation, inner: _Inner = None
) -> optax.GradientTransformationExtraArgs:
    """Chains transformations like `optax.chain`, and passes pruning members what they need.

    The last member of a chain sees updates, not gradients. This chain passes pruning members the
    extra arguments `grad`, the gradient as it entered the chain, and `inner_state`, the new states
    of the members before them. Line searches and members that name `grad` in their signature get it
    too. All other extra arguments are the caller's, and go to the members that accept them. The
    state is that of `optax.chain`.

    The members before pruning see the sparse network: the gradient and the value of a pruned weight
    are 0, and its moments (any array in the shape of a weight: momentum, Adam's `mu` and `nu`) are
    those that `init` returns. Norms therefore count kept weights only, and a regrown weight starts
    without a history. AGIP and `straight_through_transform` learn from the gradients of pruned
    weights, so the members before them see the dense network unless `inner` is "sparse" or
    a member is a `jaxprune.pack_state`. That one also gets `masks`, those that hold at this step.

    If a line search keeps value and gradient for the next step (`optax.lbfgs`) and pruning changes
    the point, the value is set to infinity, so that `optax.value_and_grad_from_state` evaluates
    again. docs/optimizers.md lists what else optimizers need.

    Args:
        *transforms: gradient transformations, applied in order. Pruning transformations come last,
            alone or inside `optax.masked`, `optax.partition`, `optax.named_chain` and the like.
        inner: the network that the members before pruning see: "sparse" or "dense"; None is "dense"
            before AGIP and straight-through, and "sparse" before every other method.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: if `inner` has any other value; from `init` and `update`, if a member follows a
            pruning transformation, if a wrapper around one cannot keep zeros, or if
            `inner="sparse"` hides values that the method needs, listing all such members; from
            `update`, if there is a gradient for each example, which has to be aggregated first.

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
    if inner not in (None, "sparse", "dense"):
        raise ValueError(f'`inner` must be None, "sparse" or "dense", but is {inner!r}.')
    trees.raise_for(
        [
            f"{i}: {type(member).__name__}"
            for i, member in enumerate(transforms)
            if not (hasattr(member, "init") and hasattr(member, "update"))
        ],
        "`transforms` must be Optax transformations, each a separate argument and called, such as "
        "`jaxprune.chain(optax.sgd(0.1), jaxprune.magnitude_transform(0.9, stop=1000))`. These "
        "are none:",
    )
    members = tuple(optax.with_extra_args_support(transform) for transform in transforms)

    def init_fn(params: Any) -> tuple[Any, ...]:
        try:
            state = tuple(member.init(params) for member in members)
        except TypeError as error:
            _explain_settings(params, error)
            raise
        _check(state, inner)
        first = _first_pruning(state)
        masks = masks_like(params, pruning_states(state))
        if first < len(members) and packed_states(state):
            check_room(state, trees.leaf_by_path(masks), params)
        warn_of_frozen(members[:first], state[:first], params, masks)
        return state

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        if len(state) != len(members):
            raise ValueError(
                f"`state` must have one entry for each of the {len(members)} transformations "
                f"of this chain, but has {len(state)}. Use the state that this chain's `init` "
                "returned."
            )
        seen_by = _check(state, inner)
        params = trees.without_settings(params, updates)
        first = _first_pruning(state)
        if first < len(members) and params is not None:
            _check_one_gradient(updates, params)
        earlier = extra_args.pop("inner_state", ())  # from a chain around this one
        extra = {"grad": updates} | extra_args
        ours = {"grad", "inner_state"} - extra_args.keys()
        learned, masks = (), None
        if params is not None and any(_hides(s, seen_by) for s in pruning_states(state)):
            known = extra | {"inner_state": (*earlier, *state)}
            pruning = members[first:], state[first:]
            learned, masks = _masks_first(*pruning, updates, params, known, ours, seen_by)
        hidden = bool(jax.tree.leaves(masks))
        seen, before = params, extra
        if masks is not None:
            before = extra | {"masks": masks}
            ours |= {"masks"}
        if hidden:
            seen = keep_unpruned(params, masks)
            state = tuple(
                restart_moments(member, own, masks, seen)
                for member, own in zip(members, state, strict=True)
            )
            before = before | {"grad": _kept_gradient(extra["grad"], updates, masks)}
            # Packed state reads kept weights alone, so nothing is written out for it.
            if not (first and isinstance(state[0], PackedState)):
                updates = keep_unpruned(updates, masks)
        new_state: tuple[Any, ...] = ()
        for member, own in zip(members[:first], state[:first], strict=True):
            accepted = _accepted(member, own, before, ours)
            point = params if isinstance(own, PackedState) else seen
            updates, own = member.update(updates, own, point, **accepted)
            new_state = (*new_state, own)
        moves = updates
        if hidden and _is_masks_alone(state[first:]):
            # The update of such a member follows from its masks, so its branch runs only once.
            updates = project_all(updates, masks, params)
            new_state = (*new_state, *learned)
        else:
            for member, own in zip(members[first:], state[first:], strict=True):
                known = extra | {"inner_state": (*earlier, *new_state)}
                accepted = _accepted(member, own, known, ours)
                updates, own = member.update(updates, own, params, **accepted)
                new_state = (*new_state, own)
        if first < len(members) and has_line_search(new_state[:first]):
            new_state = forget_values(new_state, differs(updates, moves))
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _explain_settings(params: Any, error: TypeError) -> None:
    """Raises an error that names the functions and strings among the parameters, if there are."""
    settings = [
        f"{path}: {type(leaf).__name__}"
        for path, leaf in trees.leaves_with_paths(params)
        if not trees.is_numeric(leaf)
    ]
    if settings:
        rule = (
            "`params` must hold arrays only, as for every optimizer of Optax. Take the settings of "
            "a module out, `optimizer.init(equinox.filter(module, equinox.is_inexact_array))`; "
            "`optimizer.update` accepts the whole module. These are no arrays:"
        )
        raise ValueError("\n  ".join([rule, *settings])) from error


def _masks_first(
    members: Sequence[Any],
    states: Sequence[Any],
    updates: Any,
    params: Any,
    extra_args: Mapping[str, Any],
    ours: set[str],
    inner: _Inner,
) -> tuple[tuple[Any, ...], Any]:
    """Updates the pruning members; returns their new states, and the masks for the other members.

    This runs before the other members: reading old and new masks in one step would force a copy.
    """
    learned = tuple(
        member.update(updates, own, params, **_accepted(member, own, extra_args, ours))[1]
        for member, own in zip(members, states, strict=True)
    )
    return learned, masks_like(params, [s for s in pruning_states(learned) if _hides(s, inner)])


def _first_pruning(state: Any) -> int:
    """Returns the position of the first member that prunes."""
    return next((i for i, own in enumerate(state) if pruning_states(own)), len(state))


def _hides(state: Any, inner: _Inner) -> bool:
    """Returns whether the members before a pruning transformation see the sparse network."""
    return inner == "sparse" or (inner is None and isinstance(state, _MASKS_ONLY))


def _is_masks_alone(states: Sequence[Any]) -> bool:
    """Returns whether pruning is one unwrapped transformation that depends only on its masks."""
    return len(states) == 1 and isinstance(states[0], _MASKS_ONLY)


def _accepted(
    member: Any, state: Any, extra_args: Mapping[str, Any], ours: set[str]
) -> Mapping[str, Any]:
    """Returns the extra arguments that a member accepts.

    A wrapper such as `optax.chain` accepts all and passes all to what is in it. There SAM in opaque
    mode takes only its own, and line searches raise for arguments that `value_fn` does not take.
    Therefore arguments that this chain adds go only to members that use them.

    Args:
        member: the transformation.
        state: the state of the transformation.
        extra_args: all arguments.
        ours: names of the arguments that the caller has not given.

    Returns:
        Part of `extra_args`.
    """
    parameters = inspect.signature(member.update).parameters
    names = set(extra_args) & set(parameters)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        names |= set(extra_args) - ours
        if has_line_search(state):
            names |= {"grad"}
        elif pruning_states(state) and not has_sam(state):
            names = set(extra_args)
        if packed_states(state):
            names |= {"masks"} & set(extra_args)
    return {name: value for name, value in extra_args.items() if name in names}


def _check_one_gradient(updates: Any, params: Any) -> None:
    """Raises if the updates hold a gradient for each example, which no score could read."""
    shapes = {path: trees.shape_of(leaf) for path, leaf in trees.leaf_by_path(params).items()}
    many = [
        f"{path}: shape {trees.shape_of(leaf)}, but the parameter has {shapes[path]}"
        for path, leaf in trees.leaf_by_path(updates).items()
        if path in shapes and trees.shape_of(leaf)[1:] == shapes[path] != trees.shape_of(leaf)
    ]
    trees.raise_for(
        many,
        "`updates` must be one gradient, but holds one for each example, which pruning cannot "
        "rank by. Aggregate them before the chain: `optax.chain(optax.contrib."
        "differentially_private_aggregate(...), jaxprune.chain(optimizer, pruning))`; see "
        "docs/optimizers.md:",
    )


def _kept_gradient(grad: Any, updates: Any, masks: Any) -> Any:
    """Returns the argument `grad` for the members before pruning."""
    # Inside `optax.masked` the caller's `grad` has more leaves than this chain sees.
    same = jax.tree.structure(grad) == jax.tree.structure(updates)
    return keep_unpruned(grad, masks) if same else grad


def _check(state: Any, inner: _Inner) -> _Inner:
    """Returns what the members before pruning see; raises for members that cannot work together.

    Those would break the zeros, or hide values that pruning needs.
    """
    trees.raise_for(
        order_problems(state),
        "pruning must come last in a jaxprune.chain, or the zeros do not hold. Move these before "
        "it (docs/optimizers.md has a recipe for each):",
    )
    packed = bool(packed_states(state))
    if packed and inner == "dense":
        raise ValueError(
            '`inner="dense"` needs state for all weights, but `jaxprune.pack_state` keeps that of '
            "kept weights. Omit one of them."
        )
    if packed:
        inner = "sparse"
    if inner != "sparse":
        return inner
    blind = [type(s).__name__ for s in pruning_states(state) if _needs_dense(s)]
    trees.raise_for(
        blind,
        '`inner="sparse"` hides the gradients of pruned weights, or the momentum of this step, '
        "by which these methods rank, and so does `jaxprune.pack_state`. Omit it, or give "
        "`agip_transform` a `decay`:",
    )
    return inner


def _needs_dense(state: Any) -> bool:
    """Returns whether a method reads updates or momenta of pruned weights."""
    if isinstance(state, AgipState):
        return state.gradient_average == ()
    if isinstance(state, ChannelState):
        return state.channel_average == {}
    return isinstance(state, StraightThroughState)
