"""Code that all pruning transformations share: state, mask updates in one branch, projection."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxprune import budgets, meshes, patterns, schedules, stats, timetables, trees


class MaskState(NamedTuple):
    """The state of the transformations that store only masks.

    Their updates depend only on the masks, so `jaxprune.chain` shows the members before them the
    sparse network, in which a regrown weight has no history.

    Example:
        >>> import jaxprune
        >>> state = jaxprune.magnitude_transform(0.5, stop=10).init({"kernel": jnp.ones((2, 2))})
        >>> int(state.mask_updates), state.masks["kernel"].shape
        (0, (2, 2))
    """

    prune_step: jax.Array  # int32 [], number of optimizer updates so far
    mask_updates: jax.Array  # int32 [], number of mask updates done
    refused: jax.Array  # int32 [], due mask updates refused because a value was not finite
    masks: Any  # bool, like the parameters, True where a weight is kept; only for pruned leaves
    timetable_mark: jax.Array  # int32 [], the mask update that the masks come from


class Parts(NamedTuple):
    """The pruned leaves of one update, each a list in flattening order."""

    flags: tuple[bool, ...]  # for all leaves: whether the leaf is pruned
    weights: list[jax.Array]
    updates: list[jax.Array]
    masks: list[jax.Array]


Renew = Callable[..., Any]
Update = Callable[..., tuple[Any, Any]]
_WIDER = jnp.dtype(jnp.bfloat16)  # holds all numbers of the types of 8 bits
_LAST_STEP = np.iinfo(np.int32).max  # steps are counted up to it


def split(
    updates: Any,
    masks: Any,
    params: Any,
    prunable: trees.Prunable,
    stacked: trees.Stacked = None,
) -> Parts:
    """Picks the pruned leaves from the arguments of an update, and checks the arguments."""
    check_update(updates, params)
    flags = trees.prunable_flags(params, prunable, stacked)
    _check_state(masks, params, flags)
    weights, moves = trees.pick(params, flags), trees.pick(updates, flags)
    check_bools(masks)
    return Parts(flags, weights, moves, held_for(masks, params, flags))


def check_update(updates: Any, params: Any) -> None:
    """Raises unless the parameters are given and the updates fit them."""
    if params is None:
        raise ValueError(
            "`params` is missing: pruning needs the parameters. Call "
            "`optimizer.update(gradients, state, params)`."
        )
    trees.check_same_structure("updates", updates, params)


def held_for(tree: Any, params: Any, flags: tuple[bool, ...]) -> list[jax.Array]:
    """Returns the part of a state for each pruned leaf, in the order of the parameters."""
    by_path = trees.leaf_by_path(tree)  # a restored state may sort its keys differently
    return [by_path[path] for path in named_leaves(params, flags)]


def _check_state(masks: Any, params: Any, flags: tuple[bool, ...]) -> None:
    """Raises unless the state belongs to a transformation that prunes the same leaves."""
    held = trees.leaf_by_path(masks)
    wanted = {path: jnp.shape(leaf) for path, leaf in named_leaves(params, flags).items()}
    problems = [
        f"{path}: pruned, but without a mask in the state" for path in wanted if path not in held
    ]
    problems += [
        f"{path}: a mask in the state, but not pruned" for path in held if path not in wanted
    ]
    problems += [
        f"{path}: shape {shape}, but its mask in the state has {jnp.shape(held[path])}"
        for path, shape in wanted.items()
        if path in held and jnp.shape(held[path]) != shape
    ]
    trees.raise_for(
        sorted(problems),
        "`state` must belong to a transformation that prunes the same leaves. Restore it with the "
        "same `prunable`, or start from `init` and set the old masks with `jaxprune.set_masks`:",
    )


def check_bools(masks: Any) -> None:
    """Raises if a wrapper has computed with the masks of a state."""
    bad = [
        f"{path}: {jnp.result_type(mask)}"
        for path, mask in trees.leaves_with_paths(masks)
        if jnp.result_type(mask) != jnp.bool_
    ]
    trees.raise_for(
        bad,
        "`state` must hold bool masks, but a wrapper around the pruning transformation mixes "
        "states of several steps (optax.contrib.sam, optax.lookahead with `reset_state`). Put it "
        "before pruning in a jaxprune.chain, SAM with `opaque_mode=True`; see docs/optimizers.md:",
    )


def has_line_search(state: Any) -> bool:
    """Returns whether an optimizer state keeps a value and a gradient for the next step."""
    return any(map(keeps_value, jax.tree.leaves(state, is_leaf=keeps_value)))


def keeps_value(node: Any) -> bool:
    """Returns whether a node is the state of a line search, by the fields that Optax looks for."""
    return {"value", "grad"} <= set(getattr(node, "_fields", ()))


def check_line_search(extra_args: Any, inner_state: Any = None) -> None:
    """Raises if a line search would keep value and gradient of the point before masking."""
    if "value_fn" in extra_args and not has_line_search(extra_args.get("inner_state", inner_state)):
        raise ValueError(
            "`value_fn` is passed to a pruning transformation, but no line search is before it in "
            "the same jaxprune.chain. A line search outside the chain would use the value and the "
            "gradient of the unmasked point in the next step. Write `jaxprune.chain(optax.lbfgs(), "
            "pruning)`; see docs/optimizers.md."
        )


def raw_gradients(grad: Any, params: Any, flags: tuple[bool, ...]) -> list[jax.Array] | None:
    """Returns the raw gradients of the pruned leaves, or None if the chain does not pass them."""
    leaves = trees.leaves_like(params, grad)
    return None if leaves is None else trees.pick(leaves, flags)


def put_masks(params: Any, flags: tuple[bool, ...], masks: Sequence[jax.Array]) -> Any:
    """Returns a tree like `params` with masks at pruned leaves and `MaskedNode` elsewhere.

    A box around a leaf that is not pruned, such as a variable of NNX, is replaced as a whole: Flax
    asks each box for the shape, the dtype and the sharding of what it holds.
    """
    check_one_copy(params)
    nodes, structure = jax.tree.flatten(params, is_leaf=trees.is_box)
    flag, mask = iter(flags), iter(masks)

    def masks_of(node: Any) -> Any:
        leaves, inner = jax.tree.flatten(node)
        own = [next(flag) for _ in leaves]
        if own and not any(own):
            # No masks for other leaves: every step would have to pass them in and out.
            return optax.MaskedNode()
        return inner.unflatten([next(mask) if pruned else optax.MaskedNode() for pruned in own])

    return structure.unflatten([masks_of(node) for node in nodes])


def check_one_copy(params: Any) -> None:
    """Raises if fast and slow weights would be ranked together, as if they were one network."""

    def is_pair(node: Any) -> bool:
        return isinstance(node, optax.LookaheadParams)

    if any(map(is_pair, jax.tree.leaves(params, is_leaf=is_pair))):
        raise ValueError(
            "`params` are LookaheadParams, two copies of one network: pruning would rank fast and "
            "slow weights together. Put the chain inside, `optax.lookahead(jaxprune.chain("
            "optimizer, pruning), ...)`, and apply the masks to both copies after each step; see "
            "docs/optimizers.md."
        )


def update_masks(
    timetable: timetables.Timetable,
    state: Any,
    carry: Any,
    buffers: Any,
    renew: Renew,
    faults: Sequence[jax.Array] = (),
) -> tuple[Any, dict[str, jax.Array]]:
    """Changes the masks if a mask update is due, in the only branch of a step.

    Under `vmap`, as for several seeds, the branch is taken if an update is due for any of them.

    The last mask update at or before this step is due until the masks come from it. Therefore a
    state that resumes with a different timetable catches up with it, whatever its counters say.

    Args:
        timetable: the mask updates.
        state: a NamedTuple with the counters of `MaskState`.
        carry: masks and everything that changes with them; returned unchanged at all other steps.
        buffers: arrays that `renew` reads. Pass only arrays of the optimizer's state, gradients or
            parameters: an array that is computed for the branch is written to memory at every step.
        renew: function `(index of the mask update, carry, buffers) -> carry`.
        faults: bits that mark values that are not finite, for arrays that are not in `buffers`.

    Returns:
        The carry, and the new values of the counters. If a buffer is not finite, the mask update is
        refused and remains due.
    """
    done = timetables.entries_until(timetable, state.prune_step)
    mark = jnp.where(done > 0, jnp.asarray(timetable.marks)[done - 1], state.timetable_mark)
    due = mark != state.timetable_mark

    def at_mask_update(carry: Any, buffers: Any, faults: Any) -> Any:
        ok = stats.all_finite(buffers)
        ok &= ~jnp.any(jnp.array([jnp.any(bits > 0) for bits in faults], bool))
        # Devices that share counters must agree, whatever shard of a leaf each of them has.
        ok = meshes.total((~ok).astype(jnp.int32), like=state.prune_step) == 0
        new = renew(done - 1, carry, buffers)
        # Under `vmap`, one of several networks may be due and this one not.
        return jax.tree.map(lambda a, b: jnp.where(ok & due, a, b), new, carry), ok | ~due

    carry, ok = jax.lax.cond(
        when_any(due),
        at_mask_update,
        lambda carry, *_: (carry, jnp.array(True)),
        *(carry, buffers, list(faults)),
    )
    counters = {
        "prune_step": jnp.asarray(optax.safe_increment(state.prune_step)),
        "mask_updates": jnp.where(ok, done, state.mask_updates),
        "timetable_mark": jnp.where(ok, mark, state.timetable_mark),
        "refused": jnp.where(due & ~ok, optax.safe_increment(state.refused), state.refused),
    }
    return carry, counters


@jax.custom_batching.custom_vmap
def when_any(flag: jax.Array) -> jax.Array:
    """Returns a flag; under `vmap`, whether it is True for any member of the batch.

    A branch with a batched condition would become both of its sides, and each step a mask update.
    """
    return flag


@when_any.def_vmap
def _any_of_batch(size: int, is_batched: Sequence[bool], flags: jax.Array) -> tuple[Any, bool]:
    del size
    return when_any(jnp.any(flags, axis=0) if is_batched[0] else flags), False


def update_of(kind: type) -> Callable[[Update], Update]:
    """Makes a decorator for the update of a transformation whose state is of a kind.

    The decorated update raises for other states. On meshes with explicit axes, where operations
    must not mix splits, it computes with automatic axes; the new state is split as the old one, and
    the new updates as the old ones.

    Args:
        kind: the NamedTuple of the state.

    Returns:
        A decorator.
    """

    def decorated(update: Update) -> Update:
        @functools.wraps(update)
        def anywhere(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
            _check_kind(state, kind)
            names = [name for name in ("grad", "inner_state", "masks") if name in extra_args]
            trees_given = {name: extra_args.pop(name) for name in names}

            def compute(updates: Any, state: Any, params: Any, given: Any) -> Any:
                return update(updates, state, params, **given, **extra_args)

            operands = updates, state, params, trees_given
            return meshes.automatically(compute, *operands, like=(updates, state))

        return anywhere

    return decorated


def _check_kind(state: Any, kind: Any) -> None:
    """Raises unless a state has the fields of a kind of states."""
    if not set(kind._fields) <= set(getattr(state, "_fields", ())):
        raise ValueError(
            f"`state` must be the {kind.__name__} that `init` of this transformation returned, but "
            f"is {type(state).__name__}. To go on from other masks, start from `init` and set them "
            "with `jaxprune.set_masks`; a state that was restored as dicts needs a target."
        )


def zero_counters() -> dict[str, jax.Array]:
    """Returns the counters of a state before the first step."""
    names = ("prune_step", "mask_updates", "refused", "timetable_mark")
    return {name: jnp.zeros([], jnp.int32) for name in names}


def project(update: jax.Array, mask: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the update that moves kept weights as given and pruned weights to exactly 0."""
    # In the wider of the two dtypes, because -w rounded to a narrower dtype leaves a residue.
    update, weight = widened(update, weight)
    return jnp.where(mask, update, -weight)


def widened(*arrays: jax.Array) -> list[jax.Array]:
    """Converts arrays to the narrowest type that holds the numbers of all.

    JAX promotes no floating-point type of 8 bits or less, whatever the other type is.
    """
    kinds = {array.dtype for array in arrays}
    if len(kinds) > 1:
        kinds = {kind if kind.itemsize > 1 else _WIDER for kind in kinds}
    dtype = functools.reduce(jnp.promote_types, kinds)
    return [array.astype(dtype) for array in arrays]


def named_leaves(params: Any, flags: tuple[bool, ...]) -> dict[str, Any]:
    """Returns the pruned leaves by path."""
    items = trees.leaf_by_path(params).items()
    return {path: leaf for (path, leaf), flag in zip(items, flags, strict=True) if flag}


def timetable_once(*arguments: Any, **options: Any) -> Callable[..., timetables.Timetable]:
    """Returns a function from parameters to their timetable that caches its last few results."""
    budgets.check_budget(options.get("budget"))
    patterns.check_pattern(options.get("pattern"))
    trees.check_stacked(options.get("stacked"))
    known: dict[tuple, timetables.Timetable] = {}

    def timetable_for(params: Any, flags: tuple[bool, ...]) -> timetables.Timetable:
        leaves = named_leaves(params, flags)
        key = tuple((path, jnp.shape(leaf)) for path, leaf in leaves.items())
        if key not in known:
            while len(known) >= 4:
                known.pop(next(iter(known)))
            known[key] = timetables.make_timetable(leaves, *arguments, **options)
        return known[key]

    return timetable_for


class Arguments(NamedTuple):
    """The steps of the mask updates and the fractions that a transformation was given, checked."""

    every: int
    start: int
    stop: int
    fractions: dict[str, float]  # by name of the argument


def checked(
    name: str, every: Any, start: Any, stop: Any, *problems: str, **fractions: Any
) -> Arguments:
    """Checks the arguments of a transformation; raises one error for all problems.

    Args:
        name: name of the public transformation.
        every: steps between mask updates.
        start: step of the first mask update.
        stop: step of the last mask update.
        *problems: problems of other arguments.
        **fractions: arguments that must lie in [0, 1).

    Returns:
        The arguments as Python numbers.
    """
    bad: list[str] = []

    def read(kind: Callable[[str, Any], Any], name: str, value: Any, instead: float) -> Any:
        try:
            return kind(name, value)
        except ValueError as error:
            bad.append(str(error).rstrip("."))
            return instead  # breaks no other rule

    given = {"every": every, "start": start, "stop": stop}
    every, start, stop = (read(schedules.whole, key, v, math.nan) for key, v in given.items())
    if every < 1:
        bad.append(f"`every` must be at least 1 step, but is {every!r}")
    if start < 0:
        bad.append(f"`start` must not be negative, but is {start!r}")
    if stop < start:
        bad.append(f"`stop` must not be before `start`, but {stop!r} < {start!r}")
    if stop > _LAST_STEP:
        bad.append(f"`stop` must be at most {_LAST_STEP}, the last step counted, but is {stop!r}")
    shares = {key: read(schedules.number, key, value, 0.0) for key, value in fractions.items()}
    bad += [
        f"`{key}` must lie in [0, 1), but is {fractions[key]!r}"
        for key, share in shares.items()
        if not 0 <= share < 1
    ]
    trees.raise_for([*bad, *problems], f"{name} cannot run with these arguments:")
    return Arguments(every, start, stop, shares)


def warn_of_zeros(params: Any, flags: tuple[bool, ...]) -> None:
    """Warns of pruned leaves that are 0 everywhere, if their values are known: outside `jit`."""
    known = {
        path: leaf
        for path, leaf in named_leaves(params, flags).items()
        if isinstance(leaf, (jax.Array, np.ndarray))
        and not isinstance(leaf, Tracer)
        and getattr(leaf, "is_fully_addressable", True)
    }
    with jax.ensure_compile_time_eval():  # constants of a function that is being traced
        zeros = [path for path, leaf in known.items() if not jnp.any(leaf)]
    if zeros:
        warnings.warn(
            f"`params` holds leaves that are 0 everywhere: {', '.join(zeros)}. Weights are ranked "
            "by their product with the gradient, which says nothing until a leaf has moved. Until "
            "then each such leaf keeps its share at the overall density. Exclude such leaves with "
            "`prunable`, or set a later `start`.",
            stacklevel=3,
        )


def masking_transform(
    steps: Sequence[int],
    sparsities: Sequence[float],
    choose: Callable[..., list[jax.Array]],
    *,
    moved: Sequence[float] | None = None,
    first: Callable[[timetables.Timetable, list[jax.Array]], list[jax.Array]] | None = None,
    needs_gradient: bool = False,
    budget: budgets.GivenBudget = None,
    pattern: patterns.PatternRule = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation whose state consists of its masks.

    Args:
        steps: the steps at which masks change.
        sparsities: sparsity after each mask update.
        choose: function `(timetable, index, masks, weights, gradients) -> masks` of lists of the
            pruned leaves; `gradients` is None unless `needs_gradient`.
        moved: fraction of the kept weights that each mask update drops and regrows.
        first: function `(timetable, weights) -> masks` for the initial masks; None keeps all
            weights.
        needs_gradient: whether `choose` reads gradients.
        budget: how many weights are kept.
        pattern: which weights are pruned together.
        prunable: which leaves are pruned.
        stacked: which axes number copies.

    Returns:
        An `optax.GradientTransformationExtraArgs`.
    """
    timetable_for = timetable_once(
        steps, sparsities, moved=moved, budget=budget, pattern=pattern, stacked=stacked
    )

    def init_fn(params: optax.Params) -> Any:
        flags = trees.prunable_flags(params, prunable, stacked)
        weights = trees.pick(params, flags)
        timetable = None if trees.is_placeholder(params) else timetable_for(params, flags)
        if needs_gradient:
            warn_of_zeros(params, flags)
        masks = [jnp.ones_like(weight, dtype=bool) for weight in weights]
        if first and timetable:
            # Outside `jit` the loops of the selection would be slow.
            masks = jax.jit(functools.partial(first, timetable))(weights)
            masks = list(map(meshes.placed_like, masks, weights))
            masks = list(map(meshes.varying_like, masks, weights))
        return MaskState(**zero_counters(), masks=put_masks(params, flags, masks))

    @update_of(MaskState)
    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        check_line_search(extra_args)
        params = trees.without_settings(params, updates)
        parts = split(updates, state.masks, params, prunable, stacked)
        timetable = timetable_for(params, parts.flags)
        gradients = None
        if needs_gradient:
            gradients = raw_gradients(grad, params, parts.flags) or parts.updates

        def renew(index: jax.Array, masks: Any, buffers: Any) -> Any:
            return choose(timetable, index, masks, *buffers)

        masks, counters = update_masks(
            timetable, state, parts.masks, (parts.weights, gradients), renew
        )
        moves = map(project, parts.updates, masks, parts.weights)
        state = MaskState(**counters, masks=put_masks(params, parts.flags, masks))
        return trees.put(updates, parts.flags, list(moves)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
