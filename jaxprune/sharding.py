"""Places the arrays of a run on many devices: batches over all, parameters over the axis `fsdp`.

Masks, momentum and statistics have the shape of their parameter and are placed like it, so pruning
never moves an array between devices.

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

# Both axes split the batch; `fsdp` splits parameters as well.
AXES = ("data", "fsdp")

# Below this number of entries an exchange costs more than it saves: vectors of norm layers have
# fewer, kernels more.
_SMALL = 4096


def parse_mesh(text: str) -> dict[str, int]:
    """Parses the axes of a mesh as written on a command line.

    Args:
        text: axes and sizes, such as `"data=8"` or `"data=4,fsdp=2"`. Each axis splits the batch;
            `fsdp` splits parameters as well. Put `fsdp` last, so that neighbours on a pod get
            different parts of the parameters.

    Returns:
        Axis -> number of devices along it, in the order of the text.

    Raises:
        ValueError: if the text does not have this form; it lists all that is wrong.

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
            problems.append(f"{part.strip()!r}: {name} occurs twice; name each axis once")
        elif not (size.isascii() and size.isdigit() and int(size) > 0):
            problems.append(f"{part.strip()!r}: a size must be an integer of at least 1")
        else:
            axes[name] = int(size)
    rule = "must be axes and sizes such as data=4,fsdp=2"
    trees.raise_for(problems, f"`mesh` {rule}; got {text!r}:")
    return axes


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices in a mesh; on a TPU, neighbours in the mesh are neighbours in the network.

    Args:
        axes: axis -> number of devices, as from `parse_mesh`; None puts all on `data`.
        devices: devices to use, such as those of an ahead-of-time topology. Default: all devices
            of all processes.

    Returns:
        A `jax.sharding.Mesh` with automatic axes.

    Raises:
        ValueError: if there are more or fewer devices than the axes need.

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
            f"`mesh` must use every device: {text} needs {needed}, but there are {found}; use for "
            f"example {_fitting(axes, found)}."
        )
    automatic = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=automatic, devices=devices)


def _fitting(axes: Mapping[str, int], count: int) -> str:
    """Suggests axes for `count` devices that keep the size of `fsdp` if it divides `count`."""
    fsdp = axes.get("fsdp", 1)
    if fsdp == 1 or count % fsdp:
        return f"data={count}"
    return f"data={count // fsdp},fsdp={fsdp}"


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Splits the examples of a batch over all devices.

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
    """Places a tree whose arrays every process holds in full.

    Args:
        tree: arrays; an array that is already spread over devices may be on any mesh.
        sharding: where to place them, also on devices of other processes.

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
        tree: arrays, such as a `jaxprune.data.Split`; every process holds all of them.
        mesh: from `make_mesh`.

    Returns:
        The same tree of replicated `jax.Array`.

    Example:
        >>> replicate(np.ones(3), make_mesh({"data": jax.device_count()})).is_fully_replicated
        True
    """
    return put(tree, NamedSharding(mesh, PartitionSpec()))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises if a batch cannot be split evenly over the devices of a mesh.

    Args:
        batch_size: examples per step.
        mesh: from `make_mesh`.

    Raises:
        ValueError: if `batch_size` does not divide by the number of devices.

    Example:
        >>> check_batch(64, make_mesh({"data": jax.device_count()}))
    """
    if batch_size % mesh.size:
        nearest = max(1, round(batch_size / mesh.size)) * mesh.size
        raise ValueError(
            f"`batch_size` must divide by the number of devices ({mesh.size}), got {batch_size}; "
            f"use for example {nearest}."
        )


def spec_for(
    shape: Sequence[int], mesh: Mesh | AbstractMesh, *, min_size: int = _SMALL
) -> PartitionSpec:
    """Splits one parameter along its largest dimension that divides by `fsdp`.

    Args:
        shape: shape of the parameter.
        mesh: from `make_mesh`; without an axis `fsdp` nothing is split.
        min_size: parameters with fewer entries are replicated.

    Returns:
        A `PartitionSpec`; among equally large dimensions it splits the last.

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
    """Chooses the sharding of each leaf of a tree from its path and shape.

    A leaf whose path ends with that of a parameter and whose shape is the same is placed like the
    parameter: momentum, moments, masks, averages of gradients. All others, such as counters and
    running statistics, are replicated.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`: the parameters, an optimizer state, or a train
            state.
        mesh: from `make_mesh`.
        params: the parameters that the tree belongs to; None if the tree is the parameters.
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
    """Tells whether a path ends with that of a parameter of this shape."""
    parts = path.split("/")
    return any(owners.get("/".join(parts[start:])) == shape for start in range(len(parts)))
