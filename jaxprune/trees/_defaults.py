"""The default rule of what is pruned: dtypes, dimensions, and names by convention.

The rule reads what a tree shows: dtypes, shapes, paths and kinds of NNX variables. A norm parameter
of one layer has one dimension. In a stack of layers it has two, like a matrix, and unless `stacked`
says which axis numbers the layers, only its name tells them apart. The names below are used by
Flax, Haiku, Equinox and published models. They are a convention, not a proof: `prunable=` overrides
them.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.trees import _paths

# The last word of a leaf's name: scales and offsets of norms and layers; learned tokens.
_LAST_WORDS = {"scale", "scales", "offset", "gamma", "beta", "token", "tokens"}
# Whole names of leaves: the state of a norm; parameters of state-space layers and transformers.
_NAMES = {"mean", "var", "running_mean", "running_var", "A_log", "cls", "class_embedding"}
# Words in the name of a leaf or of its module, unless another word says that it is a layer.
_NORM_WORDS = {"ln", "bn", "gn"}
_POSITION_WORDS = {"pos", "position", "positions", "positional", "posemb", "posembed", "wpe"}
_POSITION_WORDS |= {"rel", "relative", "relpos"}
_LAYER_WORDS = {"linear", "dense", "conv", "proj", "projection", "mlp", "fc", "kernel"}
# First keys of Linen leaves other than "params".
_COLLECTIONS = {"batch_stats", "cache", "intermediates", "perturbations"}
# Kinds of NNX variables that hold state.
_STATE_KINDS = ("BatchStat", "Cache", "Intermediate", "Perturbation", "RngState")


def why_not_pruned(
    path: str,
    leaf: Any,
    axes: tuple[int, ...] = (),
    beside: Mapping[str, int] | None = None,
) -> str | None:
    """Says why the default rule does not prune a leaf.

    The rule prunes floating-point arrays of two or more dimensions, not counting axes that number
    copies of a layer. By naming conventions it does not prune: biases and the scales and offsets of
    norms (`bias`, `scale`, `offset`, `gamma`, `beta`, and everything in a module named as a norm:
    `norm1`, `LayerNorm_0`, `ln_f`, `bn`); running averages (`mean`, `var`, Linen's `batch_stats`,
    Haiku's `mean_ema`); positional embeddings and tables of relative positions; learned tokens
    (`cls_token`); `A_log`; `b` next to a `w` of more dimensions, and `D` next to an `A_log` of more
    dimensions.

    Args:
        path: the path of the leaf, such as `"layers/norm1/weight"`.
        leaf: anything; arrays may be `jax.ShapeDtypeStruct`.
        axes: the axes that number copies of a layer, see `stacked_axes`.
        beside: number of dimensions of each leaf in the same module, by name.

    Returns:
        The reason in a few words, or None if the leaf is pruned.

    Example:
        >>> why_not_pruned("layers/norm1/weight", jnp.zeros((12, 64)))
        'norm'
        >>> why_not_pruned("layers/kernel", jnp.zeros((12, 64)), axes=(0,))
        '1 dimension'
        >>> why_not_pruned("layers/kernel", jnp.zeros((12, 64, 64))) is None
        True
    """
    return _kind(leaf) or _form(leaf, axes) or _named(path, leaf, beside or {})


def reasons(
    params: Any, axes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, str | None]:
    """Says for each leaf of a tree why the default rule does not prune it.

    In addition to what `why_not_pruned` reads, this function reads the kinds of NNX variables and
    the other leaves of the same module.

    Args:
        params: any pytree.
        axes: path -> axes that number copies of a layer; missing paths have none.

    Returns:
        Dict from path to the reason, or None if the leaf is pruned, in flattening order.

    Example:
        >>> reasons({"w": jnp.zeros((12, 64, 64)), "b": jnp.zeros((12, 64))})
        {'b': 'bias', 'w': None}
    """
    leaves, kinds = _paths.leaf_by_path(params), _variable_kinds(params)
    modules: dict[str, dict[str, int]] = {}
    for path, leaf in leaves.items():
        module, _, name = path.rpartition("/")
        modules.setdefault(module, {})[name] = len(_paths.shape_of(leaf))
    return {
        path: kinds.get(path)
        or why_not_pruned(path, leaf, (axes or {}).get(path, ()), modules[path.rpartition("/")[0]])
        for path, leaf in leaves.items()
    }


def can_be_zero(dtype: Any) -> bool:
    """Returns whether a type is floating point and has a 0; float8_e8m0fnu (scales) has none."""
    return bool(jnp.issubdtype(dtype, jnp.floating) and np.zeros((), dtype) == 0)


def is_complex(leaf: Any) -> bool:
    """Returns whether a leaf is an array of complex numbers."""
    return _paths.is_array(leaf) and bool(jnp.issubdtype(leaf.dtype, jnp.complexfloating))


def _kind(leaf: Any) -> str | None:
    """Returns the reason that lies in the type of a leaf, or None: only floats are pruned."""
    if not _paths.is_array(leaf):
        return "not an array"
    return None if can_be_zero(leaf.dtype) else str(leaf.dtype)


def _form(leaf: Any, axes: tuple[int, ...]) -> str | None:
    """Returns the reason that lies in the shape of a leaf, or None: two dimensions are needed."""
    shape = _paths.shape_of(leaf)
    if 0 in shape:
        return "empty"
    dimensions = len(shape) - len(axes)
    if dimensions < 2:
        return "1 dimension" if dimensions == 1 else "no dimensions"
    return None


def _named(path: str, leaf: Any, beside: Mapping[str, int]) -> str | None:
    """Returns the reason that lies in the names of a leaf and its module, or None."""
    keys = path.split("/")
    if keys[0] in _COLLECTIONS:
        return keys[0]
    # An entry of a list is judged by the name of the list.
    keys = [key for key in keys if not key.isdigit()]
    name, module = (["", "", *keys][-1], ["", "", *keys][-2])
    words = _words(name)
    if "bias" in words or "biases" in words or _is_bias_beside(name, leaf, beside):
        return "bias"
    if name in _NAMES or (words and words[-1] in _LAST_WORDS):
        return f"named {name}"
    if _words(module)[-1:] == ["ema"]:
        return "running average"
    if name == "D" and beside.get("A_log", 0) > len(_paths.shape_of(leaf)):
        return "named D"
    for key in (name, module):
        words = set(_words(key))
        if words & _LAYER_WORDS:
            break  # a kernel is pruned, whatever its module is called
        if words & _NORM_WORDS or any(word.endswith(("norm", "norms")) for word in words):
            return "norm"
        if words & _POSITION_WORDS:
            return "positions"
    return None


def _is_bias_beside(name: str, leaf: Any, beside: Mapping[str, int]) -> bool:
    """Returns whether a leaf such as `b`, `b1` or `b_q` is beside a `w` of more dimensions."""
    if not name.startswith("b"):
        return False
    rest, dimensions = name[1:], len(_paths.shape_of(leaf))
    return any(
        size > dimensions and (other[1:] == rest or (not rest and other[1:2] == "_"))
        for other, size in beside.items()
        if other[:1] in ("w", "W")
    )


def _words(name: str) -> list[str]:
    """Splits a name into words: `"LayerNorm_0"` -> `["layer", "norm"]`."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def _variable_kinds(params: Any) -> dict[str, str]:
    """Returns the kind of each NNX variable that holds state or a constant, by path."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:  # no NNX variable can exist, and importing NNX takes a second
        return {}
    states = tuple(getattr(nnx, kind) for kind in _STATE_KINDS)
    found = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    return {
        _paths.path_string(path): f"nnx.{type(node).__name__}"
        for path, node in found
        if isinstance(node, states) or type(node) is nnx.Variable
    }
