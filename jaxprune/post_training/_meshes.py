"""Runs code that reshapes and sorts on arrays whose types say how they are split."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = ["entered", "on_any_mesh", "on_this_mesh"]


@contextlib.contextmanager
def entered(tree: Any) -> Iterator[None]:
    """Enters the mesh of arrays whose types name its axes, unless a mesh is entered already.

    Not for use inside of `jit`.

    Args:
        tree: tree of arrays.

    Yields:
        Nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> with entered(jnp.ones(2)):
        ...     jax.sharding.get_abstract_mesh().empty
        True
    """
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    meshes: list[Any] = [
        own.mesh
        for own in shardings
        if isinstance(own, NamedSharding) and AxisType.Explicit in own.mesh.axis_types
    ]
    if not meshes or not jax.sharding.get_abstract_mesh().empty:
        yield
    else:
        with jax.set_mesh(meshes[0]):
            yield


def on_any_mesh(function: Callable[..., Any], *arrays: jax.Array, like: Any = None) -> Any:
    """Calls a function of arrays; on a mesh with explicit axes, XLA decides how it is split.

    Reshapes, sorts and products have one sharding only where axes are explicit, or none at all.

    Args:
        function: function of arrays.
        *arrays: arrays, also traced ones.
        like: an array; on a mesh with explicit axes, the results are split as this one. Default:
            they lie whole on each device.

    Returns:
        What the function returns.

    Example:
        >>> import jax.numpy as jnp
        >>> on_any_mesh(jnp.sort, jnp.array([2, 1])).tolist()
        [1, 2]
    """
    shardings = [jax.typeof(array).sharding for array in arrays]
    explicit = [own for own in shardings if AxisType.Explicit in own.mesh.axis_types]
    if not explicit:
        return function(*arrays)
    mesh = explicit[0].mesh
    spec = PartitionSpec() if like is None else jax.typeof(like).sharding.spec
    with jax.sharding.use_abstract_mesh(mesh):
        out = NamedSharding(mesh, spec)
        return jax.sharding.auto_axes(function, out_sharding=out)(*arrays)


def on_this_mesh(array: jax.Array) -> jax.Array:
    """Returns an array that was computed inside `jax.sharding.auto_axes` for use outside of it.

    Args:
        array: an array.

    Returns:
        The same values, whole on each device if the types of the axes differ here.

    Example:
        >>> import jax.numpy as jnp
        >>> on_this_mesh(jnp.ones(2)).tolist()
        [1.0, 1.0]
    """
    mesh, own = jax.sharding.get_abstract_mesh(), jax.typeof(array).sharding.mesh
    if mesh.empty or own.empty or own == mesh:
        return array
    return jax.sharding.reshard(array, PartitionSpec())
