"""Turns a function of variables and inputs into a function of inputs alone."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import masks as masks_of
from jaxprune import trees

Path_ = str | os.PathLike[str]


class Bound(NamedTuple):
    """A function whose variables are constants.

    Example:
        >>> bound = bind(lambda w, x: x @ w, jnp.eye(3), jnp.ones((1, 3)))
        >>> [spec.shape for spec in bound.inputs], [spec.shape for spec in bound.outputs]
        ([(1, 3)], [(1, 3)])
    """

    function: Callable[..., list[jax.Array]]  # inputs -> the arrays of the output, in order
    inputs: list[jax.ShapeDtypeStruct]
    outputs: list[jax.ShapeDtypeStruct]


def bind(
    apply: Callable[..., Any], variables: Any, example: Any, masks: Any = None, fixed: bool = True
) -> Bound:
    """Binds the variables of a function.

    Args:
        apply: `apply(variables, *inputs)`; the output is a tree of arrays.
        variables: tree of arrays.
        example: an array or a `jax.ShapeDtypeStruct`, or a tuple of them for several inputs.
        masks: tree of bools like `variables`, or None; masked variables become 0.
        fixed: whether every size of the inputs must be a number.

    Returns:
        The function of the inputs, and the types of its inputs and outputs.

    Raises:
        TypeError: if `apply` is not a function.
        ValueError: if `masks` or an input does not fit, or `apply` cannot be traced.

    Example:
        >>> bind(lambda w, x: {"y": x * w}, 2.0, jnp.ones(3)).function(jnp.ones(3))[0].tolist()
        [2.0, 2.0, 2.0]
    """
    if not callable(apply):
        raise TypeError(
            f"`apply` must be a function `apply(variables, *inputs)`, but is {apply!r:.80}; for a "
            "module of Flax NNX give `evaluate` and `variables` of `structure.from_nnx(module)`"
        )
    if reason := getattr(apply, "no_export", None):  # as `kernels.wrap` has
        raise ValueError(f"`apply` cannot be exported: {reason}")
    if masks is not None:
        variables = masks_of.apply_masks(variables, masks)
    inputs = [_spec(leaf, index) for index, leaf in enumerate(inputs_of(example))]
    problems = [
        f"input {index}: {spec.shape}"
        for index, spec in enumerate(inputs)
        if fixed and not all(isinstance(size, int) for size in spec.shape)
    ]
    trees.raise_for(
        problems, "`example` must have fixed sizes; give numbers, such as a batch of 1:"
    )

    def function(*arrays: jax.Array) -> list[jax.Array]:
        return [jnp.asarray(leaf) for leaf in jax.tree.leaves(apply(variables, *arrays))]

    try:
        outputs = jax.eval_shape(function, *inputs)
    except Exception as error:
        raise ValueError(
            "`apply` must be a function that JAX can trace as `apply(variables, *example)`, but "
            f"with inputs {', '.join(map(_text, inputs))} it raises {type(error).__name__}: "
            f"{error}"
        ) from error
    if not outputs:
        raise ValueError("`apply` must return at least one array, but returns none")
    return Bound(function, inputs, outputs)


def inputs_of(example: Any) -> tuple[Any, ...]:
    """Returns the inputs of a function: a tuple is several, anything else is one."""
    return example if isinstance(example, tuple) else (example,)


def batches(bound: Bound, check: Any) -> list[tuple[np.ndarray, ...]]:
    """Splits the arrays of `check` into batches with the shapes of the inputs.

    Raises:
        ValueError: if they do not fit.
    """
    given = [np.asarray(leaf) for leaf in inputs_of(check)]
    wanted = [f"{spec.dtype}{list(spec.shape)}" for spec in bound.inputs]
    counts = {
        len(own) // spec.shape[0]
        for own, spec in zip(given, bound.inputs)
        if own.ndim and own.ndim == len(spec.shape) and spec.shape[0]
    }
    count = counts.pop() if len(counts) == 1 else 1
    fits = len(given) == len(wanted) and all(
        own.dtype == spec.dtype
        and own.shape == (spec.shape and (spec.shape[0] * count, *spec.shape[1:]))
        for own, spec in zip(given, bound.inputs)
    )
    if not fits or not count:
        found = ", ".join(f"{own.dtype}{list(own.shape)}" for own in given)
        raise ValueError(
            f"`check` must have the shapes of `example`, {', '.join(wanted)}, or multiples of them "
            f"along axis 0, but is {found}"
        )
    parts = [np.split(own, count) if own.ndim else [own] * count for own in given]
    return list(zip(*parts))


def outputs_of(bound: Bound, checks: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """Returns what JAX computes from the batches of `batches`."""
    run = jax.jit(bound.function)
    return [np.asarray(out) for batch in checks for out in run(*batch)]


def compared(found: list[Any], wanted: list[Any]) -> tuple[float, float]:
    """Returns the largest absolute difference between two lists of arrays, and the largest entry.

    Example:
        >>> compared([jnp.array([1.0, 2.5])], [jnp.array([1.0, -2.0])])
        (4.5, 2.0)
    """
    return largest_gap(found, wanted), largest_gap(wanted, [np.zeros(own.shape) for own in wanted])


def error_line(error: float | None, scale: float | None, other: str) -> str:
    """Says how large the error of a file is, where it was run.

    Example:
        >>> error_line(0.125, 2.0, "JAX")
        'Largest error against JAX: 0.12, of outputs up to 2.'
    """
    if error is None:
        return f"Not run: give `check=` to compare it with {other}."
    return f"Largest error against {other}: {error:.2g}, of outputs up to {scale:.2g}."


def free_path(path: Path_, overwrite: bool) -> Path:
    """Returns a path that may be written.

    Raises:
        FileExistsError: if the file exists and `overwrite` is False.
        FileNotFoundError: if its folder does not exist.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"`path` {path} exists; take another name or `overwrite=True`.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"`path` {path} must be in an existing folder; make it first.")
    return path


def largest_gap(found: list[Any], wanted: list[Any]) -> float:
    """Returns the largest absolute difference between two lists of arrays; NaN if one has it."""
    pairs = zip(found, wanted, strict=True)
    gaps = [
        np.abs(np.asarray(own, np.float64) - np.asarray(other, np.float64)) for own, other in pairs
    ]
    return float(max((gap.max(initial=0.0) for gap in gaps), default=0.0))


def _spec(leaf: Any, index: int) -> jax.ShapeDtypeStruct:
    """Returns the type of an input."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(
            f"`example` must be an array or a `jax.ShapeDtypeStruct`, or a tuple of them, but "
            f"input {index} is {leaf!r:.80}"
        )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _text(spec: jax.ShapeDtypeStruct) -> str:
    return f"{spec.dtype}[{','.join(map(str, spec.shape))}]"
