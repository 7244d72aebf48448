"""Gates of channels: the slices of parameters whose zeros switch channels off."""

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
    channels: np.ndarray  # int [entries along the axis]: which channel each is; -1: none


Gates = dict[str, list[Gate]]  # by name of a group, in the order of the groups


def gates_once(groups: Mapping[str, Any]) -> Callable[[Any], Gates]:
    """Returns a function from parameters to their `Gates` that remembers its last result."""
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
        gates: of one group.
        size: how many channels it has.
        arrays: one for each gate, shaped like its parameter.

    Returns:
        float32 [size].
    """
    total = jnp.zeros(size, jnp.float32)
    for gate, array in zip(gates, arrays, strict=True):
        rows = jnp.sum(array.astype(jnp.float32), _other_axes(gate, array))
        total += rows if _one_to_one(gate, size) else _at(gate, size).add(rows[gate.channels >= 0])
    return total


def lengths(gates: Sequence[Gate], size: int, arrays: Sequence[jax.Array]) -> jax.Array:
    """Computes the Euclidean norm of the entries of each channel.

    Entries are divided by the largest of their channel before they are squared, so that no square
    underflows or overflows.

    Args:
        gates: of one group.
        size: how many channels it has.
        arrays: one for each gate, shaped like its parameter.

    Returns:
        float32 [size]; NaN where an entry is not finite.
    """
    largest = jnp.zeros(size, jnp.float32)
    for gate, array in zip(gates, arrays, strict=True):
        rows = jnp.max(jnp.abs(array.astype(jnp.float32)), _other_axes(gate, array))
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
        decay: in [0, 1).

    Returns:
        The new average. A value that is not finite leaves the old one.
    """
    largest = jnp.maximum(average, values)
    old, new = (average / _or_one(largest)) ** 2, (values / _or_one(largest)) ** 2
    stepped = largest * jnp.sqrt(old + (1 - decay) * (new - old))
    return jnp.where(jnp.isfinite(stepped), stepped, average)


def along(gate: Gate, ndim: int, values: jax.Array) -> jax.Array:
    """Lays a vector of the entries along the axis of a gate along that axis.

    Args:
        gate: where it lies.
        ndim: dimensions of the gate's parameter.
        values: [entries along the axis].

    Returns:
        Array of `ndim` dimensions that broadcasts against the parameter.
    """
    shape = np.ones(ndim, int)
    shape[gate.axis] = len(gate.channels)
    return values.reshape(shape)


def entries(gate: Gate, array: Any) -> jax.Array:
    """The slices of an array, shaped like the gate's parameter, that belong to channels."""
    return jnp.take(jnp.asarray(array), np.flatnonzero(gate.channels >= 0), axis=gate.axis)


def _or_one(x: jax.Array) -> jax.Array:
    """The array with 1 in place of 0, to divide by."""
    return jnp.where(x > 0, x, 1)


def _other_axes(gate: Gate, array: jax.Array) -> tuple[int, ...]:
    return tuple(axis for axis in range(array.ndim) if axis != gate.axis)


def _one_to_one(gate: Gate, size: int) -> bool:
    """Whether the entries along the axis are the channels, in order."""
    return np.array_equal(gate.channels, np.arange(size))


def _at(gate: Gate, size: int) -> Any:
    """The places of the entries in a new vector of channels."""
    return jnp.zeros(size, jnp.float32).at[gate.channels[gate.channels >= 0]]


def _find(groups: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Gates:
    """Looks the gates up; those of the variables may have a longer path, such as `params/...`."""
    wanted = [member.path for group in groups.values() for member in group.gates]
    ends = {path: [own for own in shapes if f"/{path}".endswith(f"/{own}")] for path in wanted}
    folders = [path.removesuffix(own) for path, found in ends.items() for own in found]
    # The folder of the parameters fits all gates. So may a deeper one, `params/a/` for the gates
    # of `a`, where a leaf outside of `a` has the same name: the shorter one is meant.
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
    trees.raise_for(problems, "`groups` must be of the model whose `params` are updated:")
    return gates
