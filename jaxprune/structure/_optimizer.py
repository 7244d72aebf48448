"""Slices the optimizer state of a network whose channels are removed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import trees
from jaxprune.structure._groups import Groups
from jaxprune.structure._plans import Plan
from jaxprune.structure._slicing import take
from jaxprune.trees import is_array


class CompactedState(NamedTuple):
    """The compacted optimizer state, from `compact_state`.

    Example:
        >>> CompactedState((), ("0/v_row/w",)).restarted
        ('0/v_row/w',)
    """

    state: Any
    restarted: tuple[str, ...]  # paths of leaves that could not be sliced and were initialised anew


def compact_state(
    plan: Plan,
    optimizer: optax.GradientTransformation,
    state: Any,
    params: Any,
    *,
    under: str = "",
    groups: Groups | None = None,
) -> CompactedState:
    """Compacts an optimizer state like the parameters.

    A leaf that mirrors a parameter (its path ends with that of the parameter, and it has the dense
    shape: momentum, moments, masks, averages) is sliced like the parameter. A leaf that has the
    shape that `optimizer.init` gives it for the compacted parameters is kept, such as a step. The
    rest, such as the row and column sums of Adafactor, cannot be sliced and is initialised anew.
    `FromNNX.optimizer` does the same for an `nnx.Optimizer`.

    Args:
        plan: from `Groups.plan`.
        optimizer: the optimizer that made the state, or the one that continues with it if it
            depends on the remaining channels (`agip_transform` with `groups`).
        state: state of the optimizer, at dense shapes.
        params: dense parameters, as given to `optimizer.init`.
        under: path of the parameters inside the variables of the plan, such as `"params"`.
        groups: the groups that the plan was made from; vectors in the state whose path ends with
            the name of a group lose its removed channels.

    Returns:
        A `CompactedState`: the state, and the paths of what was initialised anew.

    Raises:
        ValueError: if a parameter is not in the plan or has a different shape there, or the state
            is none of this optimizer; it lists all of them.

    Example:
        >>> import numpy as np
        >>> from jaxprune.structure import find_groups
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> params = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
        >>> plan = find_groups(mlp, params, jnp.ones((1, 3))).plan({"in:1": np.arange(8) < 6})
        >>> optimizer = optax.adam(0.1)
        >>> small = compact_state(plan, optimizer, optimizer.init(params), params)
        >>> small.state[0].mu["in"].shape, small.restarted
        ((3, 6), ())
    """
    if hasattr(state, "opt_state") and hasattr(state, "tx"):
        raise ValueError(
            "`state` must be the state of an Optax optimizer, but is an `nnx.Optimizer`. Write "
            "`from_nnx(module).optimizer(plan, optimizer, smaller_module)`, or give its "
            "`optimizer.tx` and `optimizer.opt_state`."
        )
    prefix = f"{under}/" if under else ""
    leaves = trees.leaf_by_path(params)
    dense = {path: jnp.shape(leaf) for path, leaf in leaves.items() if is_array(leaf)}
    problems = [
        f"{path}: shape {shape}, in the plan {plan.model.shapes.get(prefix + path, 'missing')}"
        for path, shape in dense.items()
        if plan.model.shapes.get(prefix + path) != shape
    ]
    trees.raise_for(problems, "`params` must be those of the plan under the path `under`:")
    smaller = [
        plan.take(prefix + path, leaf) if path in dense else leaf for path, leaf in leaves.items()
    ]
    new = optimizer.init(jax.tree.unflatten(jax.tree.structure(params), smaller))
    return sliced_state(plan, state, new, dense, prefix, groups)


def sliced_state(
    plan: Plan,
    state: Any,
    new: Any,
    dense: dict[str, tuple[int, ...]],
    prefix: str,
    groups: Groups | None,
) -> CompactedState:
    """Slices the leaves of a dense state and puts them into a new state of the smaller network.

    Args:
        plan: as for `compact_state`.
        state: state at dense shapes.
        new: state at the shapes of the smaller network, in any container, with the same paths.
        dense: shapes of the dense parameters by path.
        prefix: `under` of `compact_state`, with a slash if it is not empty.
        groups: as for `compact_state`.

    Returns:
        A `CompactedState` in the container of `new`.
    """
    check_not_packed(state)
    channels = {name: plan.channels(group) for name, group in (groups or {}).items()}
    held, fresh = trees.leaf_by_path(state), trees.leaf_by_path(new)
    # Leaves of removed blocks are in the dense state alone.
    gone = {path: shape for path, shape in dense.items() if plan.is_removed(prefix + path)}
    problems = [
        f"{path}: only in `state`"
        for path, leaf in held.items()
        if path not in fresh and owner_of(path, jnp.shape(leaf), gone) is None
    ]
    problems += [f"{path}: missing in `state`" for path in fresh if path not in held]
    trees.raise_for(problems, "`state` must be a state of `optimizer` for these parameters:")
    results, restarted = [], []
    for path, start in fresh.items():
        leaf = held[path]
        owner = owner_of(path, jnp.shape(leaf), dense)
        # Take the longest name: a path that ends with `a/kernel:1` also ends with `kernel:1`.
        ends = [name for name in channels if f"/{path}".endswith(f"/{name}")]
        group = max(ends, key=len, default=None)
        if owner is not None:
            results.append(plan.take(prefix + owner, leaf))
        elif group is not None and jnp.shape(leaf) == channels[group].shape:
            results.append(take(leaf, [channels[group]]))
        elif jnp.shape(leaf) == jnp.shape(start):
            results.append(leaf)
        else:
            results.append(start)
            restarted.append(path)
    return CompactedState(jax.tree.unflatten(jax.tree.structure(new), results), tuple(restarted))


def check_not_packed(state: Any) -> None:
    """Raises for packed states: their positions count in whole leaves."""
    nodes = jax.tree.leaves(state, is_leaf=trees.is_packed)
    if any(map(trees.is_packed, nodes)):
        raise ValueError(
            "`state` holds packed arrays (`jaxprune.pack_state`), which cannot be sliced by "
            "channels. Remove channels first and start the packed optimizer on the smaller "
            "network, `optimizer.init(params)`, or train without `jaxprune.pack_state` until then."
        )


def owner_of(path: str, shape: tuple[int, ...], dense: dict[str, tuple[int, ...]]) -> str | None:
    """Finds the parameter that a state's leaf mirrors: the longest path that `path` ends with."""
    parts = path.split("/")
    for start in range(len(parts)):
        candidate = "/".join(parts[start:])
        if dense.get(candidate) == shape:
            return candidate
    return None
