"""Whether an optimizer treats each weight by itself, so that its state can be packed."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import trees
from jaxprune.transforms._inner import pruning_states
from jaxprune.transforms._positions import ending, packed_shape

_STEPS = 3
_SCALES = (1.0, 1e3)  # of gradients: clips act on large ones only
_LONG = 2**20  # longer than any dimension that an optimizer chooses itself
_RULE = (
    "`inner` must be element-wise: the update of a weight may depend only on its own gradients "
    "and values. Keep norms and clips as members of their own, `jaxprune.chain(optax."
    "clip_by_global_norm(1.0), jaxprune.pack_state(optax.adam(1e-3)), pruning)`, and optimizers "
    "that need whole layers (LAMB, LARS, Adafactor, Muon, line searches) without "
    "`jaxprune.pack_state`. "
)


def check_elementwise(inner: Any, params: Any, flags: tuple[bool, ...]) -> None:
    """Raises unless an optimizer is element-wise on the leaves to be packed.

    Shapes of the state are known exactly. What an update computes is tried on a few weights per
    leaf, for a few steps; an optimizer that needs more than gradients cannot be tried.

    Args:
        inner: the optimizer.
        params: tree of arrays or shapes.
        flags: which leaves are packed.

    Raises:
        ValueError: if the state has another array of a packed leaf than one in its shape, or holds
            masks; if the update of a weight depends on other weights. It lists all leaves.
    """
    trees.raise_for(
        _unlike_leaves(inner, params, flags),
        _RULE + "These parts of its state are neither a number nor an array like the leaf:",
    )
    trees.raise_for(
        _coupled_leaves(inner, params, flags),
        _RULE + "In these leaves it depends on other weights, or on chance:",
    )


def _unlike_leaves(inner: Any, params: Any, flags: tuple[bool, ...]) -> list[str]:
    """Lists the parts of a state that cannot be packed, from shapes alone."""
    leaves = trees.leaf_by_path(params)
    own, shapes = {}, []
    for number, ((path, leaf), flag) in enumerate(zip(leaves.items(), flags, strict=True)):
        # Each packed leaf has a length that no other array has by accident.
        shape = packed_shape(leaf, _LONG + number) if flag else (1,) * len(trees.shape_of(leaf))
        if flag:
            own[path] = shape
        is_array = trees.is_array(leaf)
        shapes.append(jax.ShapeDtypeStruct(shape, leaf.dtype) if is_array else leaf)
    state = jax.eval_shape(inner.init, jax.tree.unflatten(jax.tree.structure(params), shapes))
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


def _coupled_leaves(inner: Any, params: Any, flags: tuple[bool, ...]) -> list[str]:
    """Lists the leaves whose updates change if the optimizer sees only half of their weights."""
    draw = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(params)
    small = [[min(size, 2) for size in trees.shape_of(leaf)] for leaf in leaves]

    def halved(value: np.ndarray, flag: bool) -> np.ndarray:
        return value.reshape(-1)[::2].reshape(packed_shape(value, -1)) if flag else value

    def updated(trials: list[list[list[np.ndarray]]], halves: bool) -> list[list[np.ndarray]]:
        """Returns the updates of each step, of packed leaves every second entry."""

        def tree(values: list[np.ndarray]) -> Any:
            own = zip(values, flags, strict=True)
            cut = [halved(value, flag and halves) for value, flag in own]
            arrays = [jnp.asarray(x, y.dtype) for x, y in zip(cut, leaves, strict=True)]
            return structure.unflatten(arrays)

        found = []
        for weights, *gradients in trials:
            params = tree(weights)
            state = inner.init(params)
            for gradient in gradients:
                updates, state = inner.update(tree(gradient), state, params)
                own = [np.asarray(x, np.float32) for x in jax.tree.leaves(updates)]
                cut = [halved(x, flag and not halves) for x, flag in zip(own, flags, strict=True)]
                found.append(cut)
                params = optax.apply_updates(params, updates)
        return found

    trials = [
        [[draw.normal(size=shape) * scale for shape in small] for scale in [1.0] + [each] * _STEPS]
        for each in _SCALES
    ]
    try:
        with jax.ensure_compile_time_eval(), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            whole, half = updated(trials, False), updated(trials, True)
    except Exception:  # it needs more than gradients, so nothing is known
        return []
    names = list(trees.leaf_by_path(params))
    return [
        name
        for number, name in enumerate(names)
        if not all(_close(a[number], b[number]) for a, b in zip(whole, half, strict=True))
    ]


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether updates are the same up to rounding."""
    return a.size == b.size and bool(np.allclose(a.reshape(-1), b.reshape(-1), 1e-3, equal_nan=True))
