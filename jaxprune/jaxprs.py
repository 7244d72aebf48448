"""Reads the equations of a jaxpr in the same way for every supported version of JAX.

It also makes functions of arrays alone, which is what can be traced to a jaxpr.
"""

import contextlib
import functools
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import source_info_util
from jax.sharding import AxisType, NamedSharding

from jaxprune.trees import is_array

__all__ = [
    "Parts",
    "abstract",
    "as_output",
    "bind",
    "context",
    "has_symbols",
    "line",
    "on_arrays",
    "scan_counts",
    "sizes",
    "split",
]


class Parts(NamedTuple):
    """A tree as its arrays and the way back.

    Example:
        >>> parts = split({"act": jax.nn.relu, "rate": 0.5, "w": jnp.ones(2)})
        >>> len(parts.arrays), parts.tree([3])["w"], parts.tree([3])["rate"]
        (1, 3, 0.5)
    """

    arrays: list[Any]
    # As many leaves -> the tree with these in place of the arrays. With a second argument False,
    # None takes the place of everything else, so that nothing else is a leaf.
    tree: Callable[..., Any]


def split(tree: Any) -> Parts:
    """Splits a tree into its arrays and everything else.

    Args:
        tree: any pytree.

    Returns:
        Its `Parts`.

    Example:
        >>> split([jnp.ones(2), "same"]).tree(["an array"])
        ['an array', 'same']
    """
    leaves, structure = jax.tree.flatten(tree)
    traced = list(map(is_array, leaves))

    def joined(arrays: Iterable[Any], others: bool = True) -> Any:
        own, rest = iter(arrays), leaves if others else [None] * len(leaves)
        pairs = zip(rest, traced, strict=True)
        return structure.unflatten([next(own) if flag else leaf for leaf, flag in pairs])

    return Parts([leaf for leaf, flag in zip(leaves, traced, strict=True) if flag], joined)


def on_arrays(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list, list]:
    """Makes a function of the arrays among the arguments alone, which can be traced and compiled.

    Args:
        function: any function.
        *args: its arguments. Leaves that are not arrays are passed as they are.
        **kwargs: its keyword arguments.

    Returns:
        That function, which takes and returns a list of arrays; the arrays; and a list that holds
        the function from arrays to the whole output, once the first has been called.

    Example:
        >>> call, arrays, box = on_arrays(lambda x, power: {"y": x**power}, jnp.ones(2), 3)
        >>> outputs = call(arrays)
        >>> len(arrays), box[0](outputs)["y"].tolist()
        (1, [1.0, 1.0])
    """
    given, box = split((args, dict(kwargs))), []

    def call(arrays: Sequence[Any]) -> list[Any]:
        args, kwargs = given.tree(arrays)
        output = split(function(*args, **kwargs))
        box[:] = [output.tree]
        return output.arrays

    return call, given.arrays, box


def abstract(leaf: Any, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """Returns the type of an array, from which a function is traced as from the array itself.

    Args:
        leaf: array, traced array, number, type of an array, or `jax.ShapeDtypeStruct`.
        shape: a different shape for it.

    Returns:
        Its shape and dtype, whether it is weakly typed, and how it is split over the axes of a mesh
        that types name (explicit axes, and those of `jax.shard_map`).

    Example:
        >>> abstract(jnp.ones((2, 3))), abstract(jnp.asarray(1.0)).weak_type
        (ShapeDtypeStruct(shape=(2, 3), dtype=float32), True)
    """
    own = jax.typeof(leaf) if isinstance(leaf, Tracer) else leaf
    sharding, manual = (getattr(own, name, None) for name in ("sharding", "manual_axis_type"))
    types = sharding.mesh.axis_types if isinstance(sharding, NamedSharding) else ()
    is_typed = bool(manual) or AxisType.Explicit in types
    return jax.ShapeDtypeStruct(
        getattr(leaf, "shape", ()) if shape is None else shape,
        leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf),
        weak_type=getattr(leaf, "weak_type", False),
        sharding=sharding if is_typed else None,
        manual_axis_type=manual,
    )


@contextlib.contextmanager
def context(equation: Any, scope: Any = None) -> Iterator[None]:
    """Puts an interpreter where an equation was traced.

    The mesh, the names of `jax.named_scope` and the settings that are no parameters of the
    primitive belong to an equation, too.

    Args:
        equation: an equation of a jaxpr.
        scope: the names of the calls around it, if the interpreter enters calls by itself.

    Yields:
        Nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> with jax.named_scope("outer"):
        ...     (equation,) = jax.make_jaxpr(jnp.sin)(1.0).eqns
        >>> with context(equation):
        ...     result = bind(equation.primitive, equation.params, [1.0])
        >>> len(result)
        1
    """
    info = equation.source_info
    names = info.name_stack if scope is None else scope + info.name_stack
    stack = source_info_util.current_name_stack() + names
    with source_info_util.user_context(info.traceback, name_stack=stack), equation.ctx.manager:
        yield


def bind(primitive: Any, params: Mapping[str, Any], arrays: Sequence[Any]) -> list[Any]:
    """Applies the primitive of an equation.

    Args:
        primitive: the primitive.
        params: the parameters of the equation, perhaps changed.
        arrays: the operands.

    Returns:
        The results, also if there is only one.

    Example:
        >>> import jax
        >>> (equation,) = jax.make_jaxpr(jax.lax.sin)(1.0).eqns
        >>> [result.shape for result in bind(equation.primitive, equation.params, [0.0])]
        [()]
    """
    bound = primitive.get_bind_params(dict(params))
    # Newer versions of JAX put the functions inside the parameters.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    results = primitive.bind(*functions, *arrays, **params)
    return list(results) if primitive.multiple_results else [results]


def as_output(value: Any, aval: Any) -> jax.Array:
    """Returns what an interpreter has for an output of a jaxpr as an array of its type.

    Arrays are right as they are. A number is weakly typed where the jaxpr says so; with the dtype
    alone it would not be, and change the dtype of what is computed from it.

    Args:
        value: array, traced array, or number.
        aval: the type of the output.

    Returns:
        An array.

    Example:
        >>> closed = jax.make_jaxpr(lambda: (2.0, jnp.float32(2)))()
        >>> [as_output(2.0, aval).weak_type for aval in closed.out_avals]
        [True, False]
    """
    if isinstance(value, jax.Array):
        return value
    if aval.weak_type and aval.dtype.kind in _PYTHON:
        own = jnp.asarray(_PYTHON[aval.dtype.kind](value))
        if own.dtype == aval.dtype:
            return own
    return jnp.asarray(value, aval.dtype)


_PYTHON = {"i": int, "f": float, "c": complex}  # numbers that arrays of a kind are made of


def line(equation: Any) -> str:
    """Says which line of the user's code an equation comes from.

    That is the innermost line outside of Python's library and of installed packages, such as the
    line of a model that calls a layer of Flax. If there is none, it is the innermost line outside
    of JAX. An equation inside of a compiled function of `jax.numpy` knows neither; then the call
    does.

    Args:
        equation: an equation of a jaxpr.

    Returns:
        File, line and function, or an empty string.

    Example:
        >>> (equation,) = jax.make_jaxpr(lambda x: jax.lax.sin(x))(1.0).eqns
        >>> line(equation)
        '<doctest jaxprune.jaxprs.line[0]>:1 (<lambda>)'
    """
    traceback = equation.source_info.traceback
    frames = [] if traceback is None else traceback.frames
    outside = (f for f in frames if not f.file_name.startswith(_JAX) and not _is_made(f.file_name))
    first = None
    for frame in outside:
        first = first or frame
        if not _is_library(frame.file_name):
            first = frame
            break
    return f"{first.file_name}:{first.line_num} ({first.function_name})" if first else ""


_JAX = f"{Path(jax.__file__).parent}{os.sep}"
# These call the functions that they trace.
_OWN = ("structure", "kernels", "layouts", "post_training", "search", "elastic", "export")
_LIBRARIES = (
    f"{sysconfig.get_path('stdlib')}{os.sep}",
    *(f"{Path(__file__).parent / name}{os.sep}" for name in _OWN),
    str(Path(__file__)),
)


@functools.cache
def _is_library(file: str) -> bool:
    """Tells whether a file belongs to Python or an installed package."""
    packages = {"site-packages", "dist-packages"}
    return file.startswith(_LIBRARIES) or bool(packages & set(Path(file).parts))


def _is_made(file: str) -> bool:
    """Tells whether a file does not exist, because a library made the code."""
    return file.startswith("<") and not file.startswith(("<doctest", "<stdin", "<ipython"))


_STAND_INS: dict[str, int] = {}  # name of a size -> a prime number that no other name has


def sizes(value: Any) -> Any:
    """Replaces sizes that are symbols, such as those of `jax.export.symbolic_shape`, by numbers.

    Sums and products of symbols become those of their numbers, so that shapes still fit together.
    The number of a symbol means nothing, and bounds of symbols are not kept.

    Args:
        value: a size, or tuples of sizes; anything else in them is returned as it is.

    Returns:
        The same with numbers, each at least 2.

    Example:
        >>> b, t, rows = jax.export.symbolic_shape("b, t, b * t")
        >>> numbers = sizes((b, t, rows, 4))
        >>> numbers[0] * numbers[1] == numbers[2], numbers[3]
        (True, 4)
    """
    if type(value) is int:
        return value
    if type(value) is tuple:
        return tuple(map(sizes, value))
    if not has_symbols((value,)):
        return value
    names = value._get_vars()  # `jax.export` has no public way to read or evaluate a size
    for name in sorted(names - _STAND_INS.keys()):
        last = max(_STAND_INS.values(), default=13)
        _STAND_INS[name] = next(n for n in range(last + 1, 2 * last) if _is_prime(n))
    return max(2, int(value._evaluate({name: _STAND_INS[name] for name in names})))


def _is_prime(number: int) -> bool:
    return all(number % factor for factor in range(2, number))


def has_symbols(shape: Sequence[Any]) -> bool:
    """Tells whether a shape has sizes that are symbols.

    Args:
        shape: a shape.

    Returns:
        A bool.

    Example:
        >>> has_symbols((2, 3)), has_symbols(jax.export.symbolic_shape("b, 3"))
        (False, True)
    """
    return any(type(size) is not int and hasattr(size, "_evaluate") for size in shape)


def scan_counts(params: Mapping[str, Any], operands: int) -> tuple[int, int]:
    """Counts the operands of a scan that are constants, and those that are carried.

    Args:
        params: the parameters of the equation.
        operands: number of operands of the equation.

    Returns:
        The two numbers; the scan runs over the rest of the operands.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def total(x, rows):
        ...     return jax.lax.scan(lambda c, row: (c + row * x, None), jnp.float32(0), rows)
        >>> (scan,) = jax.make_jaxpr(total)(1.0, jnp.ones(3)).eqns[-1:]
        >>> scan_counts(scan.params, len(scan.invars))
        (1, 1)
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].update(range(operands)).unpack()  # JAX 0.12
    return len(consts), len(carry)
