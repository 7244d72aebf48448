"""Whether an optimizer treats each weight by itself, so that its state can be packed."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import trees
from jaxprune.transforms._inner import pruning_states
from jaxprune.transforms._positions import ending, packed_shape

_LONG = 2**20  # longer than any dimension that an optimizer chooses itself
# Primitives that mix entries although the shape remains, by the start of their names.
_MIX = (
    *("cum", "sort", "rev", "gather", "scatter", "dynamic_", "roll", "fft", "dot_", "conv_"),
    *("pure_callback", "io_callback", "ffi_call", "custom_call", "triangular_solve"),
)
_RULE = (
    "`inner` must be element-wise: the update of a weight may depend only on its own gradients "
    "and values. Keep norms and clips as members of their own, `jaxprune.chain(optax."
    "clip_by_global_norm(1.0), jaxprune.pack_state(optax.adam(1e-3)), pruning)`, and optimizers "
    "that need whole layers (LAMB, LARS, Adafactor, Muon, line searches) without "
    "`jaxprune.pack_state`."
)


def check_elementwise(inner: Any, params: Any, flags: tuple[bool, ...]) -> None:
    """Raises unless an optimizer is element-wise on the leaves to be packed.

    This is read from the shapes of its state and from the operations of its update, traced on
    leaves of lengths that nothing else has.

    Args:
        inner: the optimizer.
        params: tree of arrays or shapes.
        flags: which leaves are packed.

    Raises:
        ValueError: if the state has another array of a packed leaf than one in its shape, or holds
            masks; if the update of a weight depends on other weights, or needs more than gradients
            and parameters. It lists all leaves.
    """
    shapes, own = _long_leaves(params, flags)
    trees.raise_for(
        _unlike_leaves(inner, shapes, own),
        f"{_RULE} These parts of its state are neither a number nor an array like the leaf:",
    )
    trees.raise_for(
        _coupled_leaves(inner, shapes, trees.leaf_by_path(params)),
        f"{_RULE} These operations use several weights of a leaf, their places, or chance:",
    )


def _long_leaves(params: Any, flags: tuple[bool, ...]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Returns shapes like the parameters, and those of the packed leaves by path.

    Each packed leaf has a length that no other array has by accident; all others have one entry.
    """
    shapes, own = [], {}
    for number, (path, leaf) in enumerate(trees.leaf_by_path(params).items()):
        shape = packed_shape(leaf, _LONG + number) if flags[number] else (1,) * jnp.ndim(leaf)
        shapes.append(jax.ShapeDtypeStruct(shape, jnp.result_type(leaf)))
        if flags[number]:
            own[path] = shape
    return jax.tree.unflatten(jax.tree.structure(params), shapes), own


def _unlike_leaves(inner: Any, shapes: Any, own: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Lists the parts of a state that cannot be packed, from shapes alone."""
    state = jax.eval_shape(inner.init, shapes)
    if pruning_states(state):
        raise ValueError(
            "`inner` must be an optimizer, but prunes. Put pruning behind it: "
            "`jaxprune.chain(jaxprune.pack_state(optax.adam(1e-3)), pruning)`."
        )
    problems = []
    for path, leaf in trees.leaves_with_paths(state):
        shape, owner = trees.shape_of(leaf), ending(path, own)
        is_own = owner is not None and shape == own[owner]
        is_foreign = any(size >= _LONG for size in shape)
        if not is_own and (is_foreign or (owner is not None and shape)):
            where = f", of the leaf {owner}" if owner else ""
            problems.append(f"state/{path}: shape {_shown(shape)}{where}")
    return problems


def _shown(shape: tuple[int, ...]) -> str:
    """Writes a shape with a name for the unknown length of a packed leaf."""
    sizes = ["the leaf" if size >= _LONG else str(size) for size in shape]
    return f"({', '.join(sizes)})"


def _coupled_leaves(inner: Any, shapes: Any, names: Mapping[str, Any]) -> list[str]:
    """Lists the operations of an update that mix entries of a packed leaf, from shapes alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = jax.eval_shape(inner.init, shapes)
            traced = jax.make_jaxpr(inner.update)(shapes, state, shapes)
    except Exception as error:
        raise ValueError(
            f"{_RULE} This one cannot be traced with gradients and parameters alone: "
            f"{type(error).__name__}: {error}"
        ) from error
    paths, found = list(names), []
    for name, size in _mixing(traced.jaxpr):
        is_one = size - _LONG < len(paths)
        found.append(f"{paths[size - _LONG] if is_one else 'several leaves'}: {name}")
    return list(dict.fromkeys(found))


def _mixing(jaxpr: Any) -> Iterator[tuple[str, int]]:
    """Yields primitives that mix the entries of long arrays, and the length of one of these."""
    for equation in jaxpr.eqns:
        inside = [own for value in equation.params.values() for own in _jaxprs(value)]
        for own in inside:
            yield from _mixing(own)
        ins, outs = (
            [shape for shape in map(_shape, atoms) if shape and max(shape) >= _LONG]
            for atoms in (equation.invars, equation.outvars)
        )
        name = equation.primitive.name
        if inside or name == "optimization_barrier" or not (ins or outs):
            continue
        made = not ins and name != "broadcast_in_dim"  # random numbers, indices
        changed = bool(ins) and (len(outs) < len(equation.outvars) or len({*ins, *outs}) > 1)
        if made or changed or name.startswith(_MIX):
            yield name, max((ins or outs)[0])


def _jaxprs(value: Any) -> list[Any]:
    """Returns the jaxprs in a parameter of an equation."""
    if isinstance(value, (tuple, list)):
        return [own for part in value for own in _jaxprs(part)]
    own = getattr(value, "jaxpr", value)
    return [own] if hasattr(own, "eqns") else []


def _shape(atom: Any) -> tuple[int, ...]:
    """Returns the shape of an operand."""
    return getattr(atom.aval, "shape", ())
