"""What a choice costs: multiply-accumulates and parameters, summed over tables of kernels."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune import search, structure
from jaxprune.elastic._gates import Space
from jaxprune.elastic._space import Choice, canonical, check, draw, largest

_CHECKS = 4  # random choices at which the quick cost must be exact


def mac_cost(space: Space, images: Any) -> Callable[[Choice], int]:
    """Makes a function from choices to the multiply-accumulates of one call of the sub-network.

    The cost is a sum over kernels of the number of positions at which a kernel is applied times its
    number of entries. These follow from the few decisions that a kernel depends on, so each sum
    over all choices looks up numbers that are computed once. Where there are other products, such
    as those of attention weights, `structure.mac_cost` is asked for each choice.

    Args:
        space: the elastic network.
        images: input of `space.evaluate`, an array or a `jax.ShapeDtypeStruct`; a batch of one
            image gives the cost of an image. If resolutions vary, [N, height, width, channels].

    Returns:
        The function; it is exact, and raises `ValueError` for a choice outside the space.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.elastic import make_space
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
        >>> groups = structure.find_groups(mlp, w, jnp.ones((1, 3)))
        >>> space = make_space(groups, w, mlp, widths={"in:1": (2, 4, 8)})
        >>> cost = mac_cost(space, jnp.ones((1, 3)))
        >>> [cost((i,)) for i in range(3)]
        [10, 20, 40]
    """
    pixels = next((own.options for own in space.decisions if own.kind == "resolution"), (None,))
    inputs = {own: _resized(images, own) for own in pixels}
    variables = _dense(space)
    positions = {
        own: {
            layer.path: layer.macs // layer.weights
            for layer in search.find_layers(space.evaluate, variables, x)
        }
        for own, x in inputs.items()
    }
    whole = {
        own: structure.mac_cost(space.groups, space.evaluate, variables, x)
        for own, x in inputs.items()
    }

    def exact(choice: Choice) -> int:
        choice = canonical(space.decisions, choice)
        plan, own = space.plan(choice), space.resolution(choice)
        windows = space.windows(choice)
        missing = sorted(set(windows) - set(positions[own]))
        if missing:
            raise ValueError(
                f"`space` must apply the kernels {missing} directly, as their multiply-accumulates "
                "could not be counted; give a cost function of your own."
            )
        shapes = plan.shapes
        saved = (
            positions[own][path] * math.prod(shapes[path]) * (1 - _share(space, path, window))
            for path, window in windows.items()
            if path in shapes
        )
        return round(whole[own](plan) - sum(saved))

    quick = _tabulated(space, positions)
    rng = np.random.default_rng(0)
    ends = [largest(space.decisions), *(draw(space.decisions, rng) for _ in range(_CHECKS))]
    return quick if all(quick(own) == exact(own) for own in ends) else exact


def parameter_cost(space: Space) -> Callable[[Choice], int]:
    """Makes a function from choices to the number of parameters of the sub-network.

    The matrices that make small kernels from large ones do not count: an extracted network has the
    small kernels themselves.

    Args:
        space: the elastic network.

    Returns:
        The function; it is exact, and raises `ValueError` for a choice outside the space.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.elastic import make_space
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
        >>> groups = structure.find_groups(mlp, w, jnp.ones((1, 3)))
        >>> space = make_space(groups, w, mlp, widths={"in:1": (2, 4, 8)})
        >>> parameter_cost(space)((0,))
        10
    """
    pixels = next((own.options for own in space.decisions if own.kind == "resolution"), (None,))
    once = dict.fromkeys(sorted(space.groups.model.parameters), 1)
    return _tabulated(space, dict.fromkeys(pixels, once))


def plan_cost(space: Space, cost: Callable[[structure.Plan], float]) -> Callable[[Choice], float]:
    """Makes a cost of choices from a cost of plans, such as the sum of a table of latencies.

    Args:
        space: the elastic network, in which only widths and depths vary.
        cost: function from a plan to a number, such as `search.Latencies.cost`.

    Returns:
        The function.

    Raises:
        ValueError: if windows or resolutions vary, of which a plan knows nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.elastic import make_space
        >>> w = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2), jnp.bfloat16)}
        >>> apply = lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> groups = structure.find_groups(apply, w, jnp.ones((1, 3)))
        >>> space = make_space(groups, w, apply, widths={"in:1": (2, 4, 8)})
        >>> plan_cost(space, structure.byte_cost(w))((0,))
        32
    """
    others = [own.name for own in space.decisions if own.kind in ("kernel", "resolution")]
    if others:
        raise ValueError(
            "`space` must vary widths and depths alone, as a plan says nothing of windows and "
            f"resolutions, but has the decisions {', '.join(others)}; give a function of choices."
        )
    return lambda choice: cost(space.plan(canonical(space.decisions, choice)))


def _tabulated(
    space: Space, weights: Mapping[int | None, Mapping[str, int]]
) -> Callable[[Choice], int]:
    """Returns the sum over leaves of a weight times the entries of the smaller leaf.

    Args:
        space: the elastic network.
        weights: resolution -> path of a leaf -> weight.
    """
    deciding: dict[str, list[int]] = {path: [] for own in weights.values() for path in own}
    for index, (own, units) in enumerate(zip(space.decisions, space.units, strict=True)):
        for path in _touched(space, own.kind, units):
            if path in deciding and index not in deciding[path]:
                deciding[path].append(index)
    tables: dict[str, dict[tuple[int, ...], int]] = {path: {} for path in deciding}

    def fill(choice: Choice) -> None:
        """Adds the entries of all leaves for a choice."""
        shapes = space.plan(choice).shapes
        windows = space.windows(choice)
        for path, table in tables.items():
            size = math.prod(shapes[path]) if path in shapes else 0
            if path in windows:
                size = round(size * _share(space, path, windows[path]))
            table[tuple(choice[i] for i in deciding[path])] = size

    def cost(choice: Choice) -> int:
        check(space.decisions, choice)
        choice = canonical(space.decisions, choice)
        own = weights[space.resolution(choice)]
        keys = {path: tuple([choice[i] for i in deciding[path]]) for path in own}
        if any(key not in tables[path] for path, key in keys.items()):
            fill(choice)
        return sum(weight * tables[path][keys[path]] for path, weight in own.items())

    return cost


def _touched(space: Space, kind: str, units: tuple[str, ...]) -> set[str]:
    """Returns the paths of the leaves that a decision makes smaller."""
    if kind == "kernel":
        return {units[0]}
    members = space.groups if kind == "width" else space.groups.blocks
    return {member.path for name in units for member in members[name].members}


def _share(space: Space, path: str, window: int) -> float:
    """Returns the entries of a small window, as a fraction of those of the large one."""
    height, width = space.groups.model.shapes[path][:2]
    return window**2 / (height * width)


def _dense(space: Space) -> Any:
    """Returns shapes of the variables that the user's function takes."""
    return jax.eval_shape(space.mask, space.variables, space.full())


def _resized(images: Any, pixels: int | None) -> Any:
    if pixels is None:
        return images
    batch, _, _, channels = images.shape
    return jax.ShapeDtypeStruct((batch, pixels, pixels, channels), images.dtype)
