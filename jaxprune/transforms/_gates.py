"""Gates of channels: the slices of parameters that mask a channel if they are set to 0."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees


class Gate(NamedTuple):
    """An axis of a parameter whose entries belong to the channels of one group."""

    leaf: int  # position among the parameters
    axis: int
    channels: np.ndarray  # int [entries along the axis], the channel of each entry; -1: none


Gates = dict[str, list[Gate]]  # by name of a group, in the order of the groups


def gates_once(groups: Mapping[str, Any]) -> Callable[[Any], Gates]:
    """Returns a function from parameters to their `Gates` that caches its last result."""
    known: dict[tuple, Gates] = {}

    def gates_of(params: Any) -> Gates:
        shapes = {path: jnp.shape(leaf) for path, leaf in trees.leaf_by_path(params).items()}
        key = tuple(shapes.items())
        if key not in known:
            known.clear()
            known[key] = _find(groups, shapes)
        return known[key]

    return gates_of


def sums(gates: Sequence[Gate], size: int, arrays: Sequence[jax.Array]) -> jax.Array:
    """Sums the entries of each channel.

    Args:
        gates: the gates of one group.
        size: number of channels of the group.
        arrays: one array for each gate, with the shape of its parameter.

    Returns:
        float32 [size].
    """
    total = jnp.zeros(size, jnp.float32)
    for gate, array in zip(gates, arrays, strict=True):
        rows = jnp.sum(array.astype(jnp.float32), other_axes(gate, array))
        total += rows if _one_to_one(gate, size) else _at(gate, size).add(rows[gate.channels >= 0])
    return total


def lengths(gates: Sequence[Gate], size: int, arrays: Sequence[jax.Array]) -> jax.Array:
    """Computes the Euclidean norm of the entries of each channel.

    Entries are divided by the largest entry of their channel before they are squared, so that no
    square underflows or overflows.

    Args:
        gates: the gates of one group.
        size: number of channels of the group.
        arrays: one array for each gate, with the shape of its parameter.

    Returns:
        float32 [size]; NaN where an entry is not finite.
    """
    largest = jnp.zeros(size, jnp.float32)
    for gate, array in zip(gates, arrays, strict=True):
        rows = jnp.max(jnp.abs(array.astype(jnp.float32)), other_axes(gate, array))
        own = rows if _one_to_one(gate, size) else _at(gate, size).max(rows[gate.channels >= 0])
        largest = jnp.maximum(largest, own)
    unit = _or_one(largest)
    squares = [
        (array.astype(jnp.float32) / along(gate, array.ndim, unit[gate.channels])) ** 2
        for gate, array in zip(gates, arrays, strict=True)
    ]
    return unit * jnp.sqrt(sums(gates, size, squares))


def root_mean_square(average: jax.Array, values: jax.Array, decay: float) -> jax.Array:
    """Takes one step of an exponential average of squares, kept as its root.

    `R <- sqrt(decay * R ** 2 + (1 - decay) * x ** 2)`, with the larger of `R` and `x` factored
    out: squares of single gradients would underflow.

    Args:
        average: float32, not negative; starts at 0.
        values: float32 like `average`, not negative.
        decay: the decay of the average, in [0, 1).

    Returns:
        The new average. Where a value is not finite, the average does not change.
    """
    largest = jnp.maximum(average, values)
    old, new = (average / _or_one(largest)) ** 2, (values / _or_one(largest)) ** 2
    stepped = largest * jnp.sqrt(old + (1 - decay) * (new - old))
    return jnp.where(jnp.isfinite(stepped), stepped, average)


def along(gate: Gate, ndim: int, values: jax.Array) -> jax.Array:
    """Reshapes a vector with one value for each entry of a gate to lie along the gate's axis.

    Args:
        gate: the gate.
        ndim: number of dimensions of the gate's parameter.
        values: array [entries along the axis].

    Returns:
        Array of `ndim` dimensions that broadcasts against the parameter.
    """
    shape = np.ones(ndim, int)
    shape[gate.axis] = len(gate.channels)
    return values.reshape(shape)


def other_axes(gate: Gate, array: jax.Array) -> tuple[int, ...]:
    """Returns all axes of an array except the gate's."""
    return tuple(axis for axis in range(array.ndim) if axis != gate.axis)


def _or_one(x: jax.Array) -> jax.Array:
    """Replaces 0 by 1, so that the array can be a divisor."""
    return jnp.where(x > 0, x, 1)


def _one_to_one(gate: Gate, size: int) -> bool:
    """Returns whether the entries along the axis are the channels, in order."""
    return np.array_equal(gate.channels, np.arange(size))


def _at(gate: Gate, size: int) -> Any:
    """Returns the positions of the entries in a new vector of channels, for `add` and `max`."""
    return jnp.zeros(size, jnp.float32).at[gate.channels[gate.channels >= 0]]


def _find(groups: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Gates:
    """Finds the gates; `groups` may name them by a longer path, such as `params/...`."""
    wanted = [member.path for group in groups.values() for member in group.gates]
    ends = {path: [own for own in shapes if f"/{path}".endswith(f"/{own}")] for path in wanted}
    folders = [path.removesuffix(own) for path, found in ends.items() for own in found]
    # The folder of the parameters fits all gates. A deeper folder, `params/a/` for the gates of
    # `a`, may also fit if a leaf outside `a` has the same name. The shorter one is right.
    under = max(folders, key=lambda folder: (folders.count(folder), -len(folder)), default="")
    position = {path: index for index, path in enumerate(shapes)}
    gates: Gates = {}
    problems = []
    for name, group in groups.items():
        gates[name] = []
        for path, axis, channels, _ in group.gates:
            shape = shapes.get(path.removeprefix(under))
            if shape is None or axis >= len(shape) or shape[axis] != len(channels):
                found = "missing" if shape is None else f"shape {shape}"
                problems.append(f"{path}: {found}, must have {len(channels)} along axis {axis}")
            else:
                gates[name].append(Gate(position[path.removeprefix(under)], axis, channels))
    trees.raise_for(problems, "`groups` must belong to the model whose `params` are updated:")
    return gates
