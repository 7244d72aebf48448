"""Puts a smaller network back into arrays of the dense shapes: growth, the inverse of removal."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune import trees
from jaxprune.structure._groups import Groups
from jaxprune.structure._optimizer import check_not_packed, owner_of
from jaxprune.structure._plans import Plan
from jaxprune.structure._slicing import is_on_one_cpu, named_sharding


def expand(groups: Groups, plan: Plan, variables: Any, base: Any) -> Any:
    """Widens a network by the channels that a plan removes; it computes what it did, to rounding.

    New entries are those of `base`, such as a fresh initialization. Only the gates of new channels
    (`Group.gates`: scales and biases of norm layers where these suffice, otherwise what produces
    the channel) are multiplied by 2 ** -100, or 2 ** -20 in float16: what they add to a sum is lost
    in rounding, and they learn from the first step on. With 0 they would not: the slope of
    `jax.nn.relu` at 0 is 0. `plan.compact` of the result gives the smaller network back.

    Growth that keeps the function: Chen, Goodfellow and Shlens, "Net2Net", ICLR 2016, where new
    channels are copies; Evci et al., "GradMax", ICLR 2022. Which channels come first is up to the
    caller: a plan can keep any of them.

    Args:
        groups: from `find_groups` of the large network.
        plan: from `groups.plan`: what the small network has of the large one.
        variables: of the small network, as `plan.compact` returns them.
        base: variables of the large network, at dense shapes.

    Returns:
        Variables of the large network: a tree like `base`.

    Raises:
        ValueError: if the plan is not of these groups or removes whole blocks, or if paths or
            shapes of the trees are not those of the plan; it lists all of them.

    Example:
        >>> from jaxprune import structure
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> large = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 1))}
        >>> groups = structure.find_groups(mlp, large, jnp.ones((1, 3)))
        >>> plan = groups.plan({"in:1": np.arange(4) < 2})
        >>> small = plan.compact(jax.tree.map(lambda leaf: 5 * leaf, large))
        >>> large = structure.expand(groups, plan, small, large)
        >>> large["in"][0].round(3).tolist(), large["out"].ravel().tolist()
        ([5.0, 5.0, 0.0, 0.0], [5.0, 5.0, 1.0, 1.0])
    """
    _check_plan(groups, plan)
    smaller, larger = trees.leaf_by_path(variables), trees.leaf_by_path(base)
    problems = _differences(smaller, plan.shapes, "`variables`")
    problems += _differences(larger, plan.model.shapes, "`base`")
    trees.raise_for(problems, "`variables` must have the shapes that the plan keeps, `base` all:")
    gates = _gates_of_new(groups, plan)
    leaves = []
    for path, leaf in larger.items():
        kept = plan.kept.get(path)
        if kept is None or all(own.all() for own in kept):
            leaves.append(smaller.get(path, leaf))
            continue
        start = leaf
        for dimension, new in gates.get(path, ()):
            start = _faint(start, new, dimension)
        leaves.append(_put(smaller[path], start, kept))
    return jax.tree.unflatten(jax.tree.structure(base), leaves)


def expand_state(plan: Plan, state: Any, base: Any, params: Any, *, under: str = "") -> Any:
    """Widens the state of an optimizer like the parameters.

    Leaves that mirror a parameter, such as momentum, keep what they hold of the small network; new
    entries are those of `base`.

    Args:
        plan: as in `expand`.
        state: state of an Optax optimizer of the small network.
        base: state of the same optimizer for the large network, from `optimizer.init(params)`.
        params: parameters of the large network.
        under: path of the parameters inside the variables of the plan, such as `"params"`.

    Returns:
        A state of the large network: a tree like `base`.

    Raises:
        ValueError: if both states have different paths, or a leaf mirrors no parameter and has
            different shapes in them; it lists all of them.

    Example:
        >>> import optax
        >>> from jaxprune import structure
        >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 1))}
        >>> groups = structure.find_groups(
        ...     lambda w, x: jnp.tanh(x @ w["in"]) @ w["out"], params, jnp.ones((1, 3)))
        >>> plan = groups.plan({"in:1": np.arange(4) < 2})
        >>> optimizer = optax.sgd(0.1, momentum=0.9)
        >>> small = jax.tree.map(jnp.ones_like, optimizer.init(plan.compact(params)))
        >>> state = structure.expand_state(plan, small, optimizer.init(params), params)
        >>> state[0].trace["out"].ravel().tolist()
        [1.0, 1.0, 0.0, 0.0]
    """
    check_not_packed(state)
    prefix = f"{under}/" if under else ""
    dense = {path: jnp.shape(leaf) for path, leaf in trees.leaf_by_path(params).items()}
    held, fresh = trees.leaf_by_path(state), trees.leaf_by_path(base)
    problems = [f"{path}: only in `state`" for path in held.keys() - fresh.keys()]
    problems += [f"{path}: missing in `state`" for path in fresh.keys() - held.keys()]
    leaves = []
    for path, start in fresh.items():
        if path not in held:
            continue
        leaf = held[path]
        owner = owner_of(path, jnp.shape(start), dense)
        path_in_plan = f"{prefix}{owner}"
        is_mirror = owner is not None and path_in_plan in plan.kept
        if is_mirror and jnp.shape(leaf) == plan.shape(path_in_plan):
            leaves.append(_put(leaf, start, plan.kept[path_in_plan]))
        elif jnp.shape(leaf) == jnp.shape(start):
            leaves.append(leaf)
        else:
            problems.append(f"{path}: shape {jnp.shape(leaf)}, {jnp.shape(start)} in `base`")
    trees.raise_for(sorted(problems), "`state` and `base` must be states of the same optimizer:")
    return jax.tree.unflatten(jax.tree.structure(base), leaves)


def _check_plan(groups: Groups, plan: Plan) -> None:
    """Raises unless a plan is of these groups and keeps a part of every leaf."""
    problems = [
        f"{member.path}: not in the plan"
        for group in groups.values()
        for member in group.members
        if member.path not in plan.kept
    ]
    problems += [f"{path}: removed whole" for path in plan.kept if plan.is_removed(path)]
    trees.raise_for(
        sorted(set(problems)), "`plan` must be one of `groups`, and must not remove whole blocks:"
    )


def _differences(
    leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], name: str
) -> list[str]:
    """Says which leaves do not have the shapes that they must have."""
    found = {path: trees.shape_of(leaf) for path, leaf in leaves.items()}
    return [
        f"{path}: shape {found.get(path, 'missing')} in {name}, must be {shape}"
        for path, shape in shapes.items()
        if found.get(path) != shape
    ]


def _gates_of_new(groups: Groups, plan: Plan) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Returns path -> dimensions in which a leaf gates channels, with flags of the new ones."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for group in groups.values():
        for gate in group.gates:
            new = ~plan.kept[gate.path][gate.dimension] & (gate.channels >= 0)
            if new.any():
                found.setdefault(gate.path, []).append((gate.dimension, new))
    return found


def _faint(array: Any, new: np.ndarray, dimension: int) -> Any:
    """Multiplies the new entries of a dimension by a number that rounding loses."""
    factor = 2.0 ** (-20 if array.dtype == jnp.float16 else -100)
    along = new.reshape([-1 if d == dimension else 1 for d in range(array.ndim)])
    return jnp.where(along, array * jnp.asarray(factor, array.dtype), array)


def _put(small: Any, base: Any, kept: Sequence[np.ndarray]) -> Any:
    """Puts an array into a larger one, on the devices of that one.

    Args:
        small: array of the kept entries.
        base: array of all entries.
        kept: bool [size] for each dimension.
    """
    places = np.ix_(*map(np.flatnonzero, kept))
    if is_on_one_cpu(base) and is_on_one_cpu(small):  # compiles nothing for each shape
        host = np.array(base)
        host[places] = np.asarray(small)
        return jax.device_put(host, base.sharding if base.committed else None)
    sharding = named_sharding(base)
    larger = jnp.asarray(base).at[places].set(small)
    is_concrete = not isinstance(larger, Tracer)
    return jax.device_put(larger, sharding) if sharding is not None and is_concrete else larger
