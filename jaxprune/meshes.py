"""What the types of arrays say about a mesh: how arrays are split, and over which axes they vary.

On a mesh with explicit axes (`jax.sharding.AxisType.Explicit`) every type says how its array is
split, and an operation that mixes splits is an error. Inside `jax.shard_map` every type says over
which axes the shards differ, and a loop or branch that changes this is an error.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxprune import trees

__all__ = [
    "automatically",
    "entered",
    "is_explicit",
    "on_this_mesh",
    "placed_like",
    "total",
    "varies",
    "varying_like",
]


def automatically(function: Callable[..., Any], *operands: Any, like: Any = None) -> Any:
    """Calls a function with the explicit axes of the mesh made automatic.

    Inside, the compiler decides how arrays are split. The result is split as the types say again.
    Without explicit axes this is a plain call.

    Args:
        function: function of arrays; it must not close over arrays that are split.
        *operands: trees of arrays, passed to the function; other leaves are passed as they are.
        like: tree of arrays with the structure of the result, or one array for all of it; says how
            the result is split. None: it lies whole on each device.

    Returns:
        The result of the function.

    Example:
        >>> import jax.numpy as jnp
        >>> automatically(jnp.sum, jnp.ones(3), like=jnp.zeros([])).item()
        3.0
    """
    mesh = _explicit_mesh((operands, like))
    if mesh is None:
        return function(*operands)
    whole = NamedSharding(mesh, PartitionSpec())

    def sharding_of(array: Any) -> NamedSharding:
        own = jax.typeof(array).sharding
        return own if is_explicit(own) else whole

    leaves, structure = jax.tree.flatten(operands)
    results: list[tuple[Any, list[Any]]] = []

    def of_arrays(arrays: list[Any]) -> list[Any]:
        found, structure_of_result = jax.tree.flatten(
            function(*structure.unflatten(_merged(leaves, arrays)))
        )
        results.append((structure_of_result, found))
        return _arrays(found)

    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = tuple(name for name, kind in types if kind == AxisType.Explicit)
    out: Any = [sharding_of(array) for array in _arrays(jax.tree.leaves(like))]
    if like is None or trees.is_array(like):
        (out,) = out or [whole]
    mapped: Any = jax.sharding.auto_axes(of_arrays, axes=names, out_sharding=out)
    with jax.sharding.use_abstract_mesh(mesh):  # another one may be entered, or none
        arrays = mapped(_arrays(leaves))
    ((structure_of_result, found),) = results
    return structure_of_result.unflatten(_merged(found, arrays))


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
    meshes = [own.mesh for own in shardings if own is not None and is_explicit(own)]
    if not meshes or not jax.sharding.get_abstract_mesh().empty:
        yield
    else:
        with jax.set_mesh(meshes[0]):
            yield


def is_explicit(sharding: Any) -> bool:
    """Returns whether types say how arrays of a sharding are split.

    Args:
        sharding: of an array, or of its type.

    Returns:
        A bool.

    Example:
        >>> import jax.numpy as jnp
        >>> is_explicit(jnp.ones(2).sharding)
        False
    """
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types


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


def placed_like(array: Any, other: Any) -> Any:
    """Splits an array as the type of another one says; without explicit axes, returns it as it is.

    Args:
        array: array.
        other: array of the same shape.

    Returns:
        The array.

    Example:
        >>> import jax.numpy as jnp
        >>> placed_like(jnp.ones(2), jnp.zeros(2)).tolist()
        [1.0, 1.0]
    """
    if _explicit_mesh(other) is None:
        return array
    if isinstance(array, Tracer) or isinstance(other, Tracer):
        return jax.sharding.reshard(array, jax.typeof(other).sharding)
    return jax.device_put(array, other.sharding)


def varies(tree: Any) -> bool:
    """Returns whether arrays are shards that differ between devices, inside of `jax.shard_map`.

    Args:
        tree: tree of arrays.

    Returns:
        A bool.

    Example:
        >>> import jax.numpy as jnp
        >>> varies([jnp.ones(2)])
        False
    """
    return bool(_varying(tree))


def varying_like(tree: Any, *others: Any) -> Any:
    """Marks arrays as different on each device along all axes along which other arrays are.

    Only inside `jax.shard_map` do types say so; elsewhere nothing changes. The initial values of a
    loop over sharded arrays need it.

    Args:
        tree: tree of arrays.
        *others: trees of arrays.

    Returns:
        Tree with the same values.

    Example:
        >>> import jax.numpy as jnp
        >>> varying_like([jnp.ones(2)], jnp.zeros(3))[0].tolist()
        [1.0, 1.0]
    """
    wanted = _varying(others)

    def mark(array: jax.Array) -> jax.Array:
        missing = tuple(sorted(wanted - _varying(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(mark, tree) if wanted else tree


def total(values: Any, like: Any) -> Any:
    """Sums values over the shards of arrays, so that all devices have the same.

    Only inside `jax.shard_map` are there shards: the sum runs along the axes along which `values`
    differ and `like` does not. Elsewhere the values are returned as they are.

    Args:
        values: tree of arrays, one for each shard.
        like: tree of arrays; says along which axes the result may differ.

    Returns:
        Tree like `values`.

    Example:
        >>> import jax.numpy as jnp
        >>> total({"count": jnp.array(3)}, like=jnp.zeros([]))["count"].item()
        3
    """
    along = tuple(sorted(_varying(values) - _varying(like)))
    if not along:
        return values
    alike = varying_like(values, values)
    return jax.tree.map(lambda value: jax.lax.psum(value, along), alike)


def _arrays(leaves: list[Any]) -> list[Any]:
    """Picks the arrays among leaves."""
    return [leaf for leaf in leaves if trees.is_array(leaf)]


def _merged(leaves: list[Any], arrays: list[Any]) -> list[Any]:
    """Puts arrays back where `_arrays` took them."""
    new = iter(arrays)
    return [next(new) if trees.is_array(leaf) else leaf for leaf in leaves]


def _varying(tree: Any) -> frozenset[str]:
    """Returns the axes of `jax.shard_map` along which arrays differ."""
    types = [jax.typeof(leaf) for leaf in _arrays(jax.tree.leaves(tree))]
    return frozenset().union(*(kind.manual_axis_type.varying for kind in types))


def _explicit_mesh(tree: Any) -> Any:
    """Returns the mesh with explicit axes over which arrays are split, or None."""
    shardings = [jax.typeof(leaf).sharding for leaf in _arrays(jax.tree.leaves(tree))]
    return next((own.mesh for own in shardings if is_explicit(own)), None)
