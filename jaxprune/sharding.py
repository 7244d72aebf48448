"""Where the arrays of a run lie on many devices: a batch over all, parameters over the axis `fsdp`.

Masks, momentum and statistics have the shape of their parameter and lie where it lies, so that
pruning never moves an array between devices.

    mesh = make_mesh(parse_mesh("data=4,fsdp=2"))
    state = jax.device_put(state, shardings_for(state, mesh, params=state.params))
    images = jax.device_put(images, batch_sharding(mesh))
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprune import trees

__all__ = [
    "AXES",
    "batch_sharding",
    "check_batch",
    "make_mesh",
    "parse_mesh",
    "put",
    "replicate",
    "shardings_for",
    "spec_for",
]

# Each splits the batch; `fsdp` splits parameters as well.
AXES = ("data", "fsdp")

# Vectors of norms have fewer entries, kernels more. An exchange would cost more than it saves.
_SMALL = 4096


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the axes of a mesh as they are written on a command line.

    Args:
        text: such as `"data=8"` or `"data=4,fsdp=2"`. Each axis splits the batch; `fsdp` splits
            parameters, too. In this order: neighbours on a pod get different parts of parameters.

    Returns:
        Axis -> number of devices along it, in the order of the text.

    Raises:
        ValueError: it is not of this form; all that is wrong is listed.

    Example:
        >>> parse_mesh("data=4,fsdp=2")
        {'data': 4, 'fsdp': 2}
    """
    axes: dict[str, int] = {}
    problems = []
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals:
            problems.append(f"{part.strip()!r}: has no size; write for example data=8")
        elif name not in AXES:
            problems.append(f"{part.strip()!r}: no such axis; use {' or '.join(AXES)}")
        elif name in axes:
            problems.append(f"{part.strip()!r}: {name} is there already; name each axis once")
        elif not (size.isascii() and size.isdigit() and int(size) > 0):
            problems.append(f"{part.strip()!r}: a size must be an integer of at least 1")
        else:
            axes[name] = int(size)
    rule = "must be axes and sizes such as data=4,fsdp=2"
    trees.raise_for(problems, f"`mesh` {rule}; got {text!r}:")
    return axes


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices; those of a TPU so that neighbours in the mesh are neighbours on the chip.

    Args:
        axes: axis -> number of devices, as `parse_mesh` returns it; None puts all on `data`.
        devices: default all devices of all processes; or those of an ahead-of-time topology.

    Returns:
        A `jax.sharding.Mesh` with automatic axes.

    Raises:
        ValueError: there are more or fewer devices than the axes need.

    Example:
        >>> make_mesh().axis_names
        ('data',)
    """
    devices = jax.devices() if devices is None else devices
    axes = {"data": len(devices)} if axes is None else axes
    needed, found = math.prod(axes.values()), len(devices)
    if needed != found:
        text = ",".join(f"{name}={size}" for name, size in axes.items())
        raise ValueError(
            f"`mesh` must use every device: {text} needs {needed}, and there are {found}; use for "
            f"example {_fitting(axes, found)}"
        )
    automatic = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=automatic, devices=devices)


def _fitting(axes: Mapping[str, int], count: int) -> str:
    """Axes for so many devices, `fsdp` as it was if that divides them."""
    fsdp = axes.get("fsdp", 1)
    if fsdp == 1 or count % fsdp:
        return f"data={count}"
    return f"data={count // fsdp},fsdp={fsdp}"


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Examples over all devices.

    Args:
        mesh: from `make_mesh`.

    Returns:
        A `NamedSharding` of the first dimension over every axis.

    Example:
        >>> tuple(batch_sharding(AbstractMesh((4, 2), ("data", "fsdp"))).spec)
        (('data', 'fsdp'),)
    """
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Places a tree whose arrays every process has in full.

    Args:
        tree: arrays; those that are spread over devices already may be on any mesh.
        sharding: where they go, also to devices of other processes.

    Returns:
        The same tree of `jax.Array`.

    Example:
        >>> mesh = make_mesh({"data": jax.device_count()})
        >>> put(jnp.arange(8), batch_sharding(mesh)).shape
        (8,)
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def global_array(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = global_array(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(global_array, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree of arrays to every device of the mesh.

    Args:
        tree: arrays, e.g. a `jaxprune.data.Split`; every process has all of it.
        mesh: from `make_mesh`.

    Returns:
        The same tree of replicated `jax.Array`.

    Example:
        >>> replicate(np.ones(3), make_mesh({"data": jax.device_count()})).is_fully_replicated
        True
    """
    return put(tree, NamedSharding(mesh, PartitionSpec()))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that cannot be split evenly over the devices of a mesh.

    Args:
        batch_size: examples per step.
        mesh: from `make_mesh`.

    Raises:
        ValueError: `batch_size` does not divide by the number of devices.

    Example:
        >>> check_batch(64, make_mesh({"data": jax.device_count()}))
    """
    if batch_size % mesh.size:
        nearest = max(1, round(batch_size / mesh.size)) * mesh.size
        raise ValueError(
            f"`batch_size` must divide by the number of devices ({mesh.size}), got {batch_size}; "
            f"use for example {nearest}"
        )


def spec_for(
    shape: Sequence[int], mesh: Mesh | AbstractMesh, *, min_size: int = _SMALL
) -> PartitionSpec:
    """How one parameter is split: along its largest dimension that divides by `fsdp`.

    Args:
        shape: of the parameter.
        mesh: from `make_mesh`; without an axis `fsdp` nothing is split.
        min_size: parameters with fewer entries are whole on each device.

    Returns:
        A `PartitionSpec`; of equally large dimensions the last is split.

    Example:
        >>> mesh = AbstractMesh((4, 2), ("data", "fsdp"))
        >>> tuple(spec_for((3, 3, 64, 128), mesh)), tuple(spec_for((128,), mesh))
        ((None, None, None, 'fsdp'), ())
    """
    parts = mesh.shape.get("fsdp", 1)
    divisible = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < min_size or not divisible:
        return PartitionSpec()
    split = max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*[None] * split, "fsdp")


def shardings_for(
    tree: Any, mesh: Mesh | AbstractMesh, *, params: Any = None, min_size: int = _SMALL
) -> Any:
    """Where each leaf of a tree lies, from paths and shapes alone.

    A leaf whose path ends with that of a parameter and whose shape is the same lies where the
    parameter lies: momentum, moments, masks, averages of gradients. All others, such as counters
    and running statistics, are whole on each device.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`: the parameters, an optimizer state, or a train
            state.
        mesh: from `make_mesh`.
        params: the parameters that the tree belongs to; None: the tree is the parameters.
        min_size: see `spec_for`.

    Returns:
        A tree of `NamedSharding`, for `jax.device_put`, `jax.jit` or Orbax.

    Example:
        >>> import optax
        >>> mesh = AbstractMesh((4, 2), ("data", "fsdp"))
        >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}
        >>> state = optax.adam(0.1).init(params)
        >>> shardings = shardings_for(state, mesh, params=params)
        >>> tuple(shardings[0].mu["kernel"].spec), tuple(shardings[0].count.spec)
        ((None, 'fsdp'), ())
    """
    own = trees.leaves_with_paths(tree if params is None else params)
    owners = {path: jnp.shape(leaf) for path, leaf in own}

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        owned = shape if _is_owned(path, shape, owners) else ()
        return NamedSharding(mesh, spec_for(owned, mesh, min_size=min_size))

    leaves = [place(path, jnp.shape(leaf)) for path, leaf in trees.leaves_with_paths(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _is_owned(path: str, shape: tuple[int, ...], owners: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a path ends with that of a parameter of this shape."""
    parts = path.split("/")
    return any(owners.get("/".join(parts[start:])) == shape for start in range(len(parts)))
