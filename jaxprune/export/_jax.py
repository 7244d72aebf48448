"""Writes compiled functions as `jax.export` files, for servers that have JAX and nothing else."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.export

from jaxprune import files
from jaxprune.export._functions import bind, compared, error_line, free_path, inputs_of
from jaxprune.export._packages import load

_USER = "export.jax"
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class JaxReport(NamedTuple):
    """What was written, and whether it computes the same; `print` shows it.

    Example:
        >>> print(JaxReport("net.jax", 2048, ("cpu",), ("float32[b,3]",), None, None))
        net.jax: 2,048 bytes for cpu; inputs float32[b,3]
        Not run: give `check=` to compare it with the function.
    """

    path: str
    bytes: int
    platforms: tuple[str, ...]
    inputs: tuple[str, ...]  # dtype and shape of each
    error: float | None  # largest absolute difference to the function on `check`
    scale: float | None  # largest absolute output on `check`

    def __str__(self) -> str:
        """Shows the size, the inputs and the error."""
        error = error_line(self.error, self.scale, "the function")
        return (
            f"{self.path}: {self.bytes:,} bytes for {', '.join(self.platforms)}; inputs "
            f"{', '.join(self.inputs)}\n{error}"
        )


def jax_file(
    apply: Callable[..., Any],
    variables: Any,
    example: Any,
    path: str | os.PathLike[str],
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    masks: Any = None,
    check: Any = None,
    overwrite: bool = False,
) -> JaxReport:
    """Writes a function as a file that loads without Flax, jaxprune or the code of the network.

    `jax.export.deserialize(content).call(*inputs)` runs it. Variables become constants. One array
    as output is that array, any other tree a list of its arrays.

    Args:
        apply: `apply(variables, *inputs)`; for a compacted network `plan.wrap(apply)`, for a module
            of Flax NNX `evaluate` of `structure.from_nnx(module)`.
        variables: tree of arrays, with any keys.
        example: an array or a `jax.ShapeDtypeStruct`, or a tuple of them for several inputs. Sizes
            may be symbols, such as those of `jax.export.symbolic_shape("b, 28, 28, 1")`: the file
            then serves every batch.
        path: the file to write.
        platforms: where it shall run: "cpu", "cuda", "rocm", "tpu".
        masks: tree of bools like `variables`, True where a weight is kept.
        check: inputs of any size that fits, to run the file with and compare with the function.
        overwrite: whether to replace an existing file.

    Returns:
        A `JaxReport`.

    Raises:
        ValueError: if `apply` cannot be traced, a platform is unknown, or `masks` does not fit.
        FileExistsError: if the file exists and `overwrite` is False.
        OSError: if it cannot be written; an existing file then stays as it is.
        ModuleNotFoundError: if flatbuffers is not installed, which JAX writes with.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import jax.numpy as jnp
        >>> from jaxprune import export
        >>> path = tempfile.mkdtemp() + "/net.jax"
        >>> spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 2"), jnp.float32)
        >>> _ = export.jax(lambda w, x: x @ w[0], {0: jnp.eye(2)}, spec, path)
        >>> run = jax.export.deserialize(bytearray(Path(path).read_bytes())).call
        >>> run(jnp.ones((3, 2))).shape
        (3, 2)
    """
    unknown = [own for own in platforms if own not in _PLATFORMS]
    if unknown or not platforms:  # JAX takes any word
        raise ValueError(
            f"`platforms` must be among {', '.join(_PLATFORMS)}, but has "
            f"{', '.join(map(str, unknown)) or 'none'}"
        )
    path = free_path(path, overwrite)
    load("flatbuffers", "export", _USER)
    bound = bind(apply, variables, example, masks, fixed=False)

    def function(*inputs: jax.Array) -> Any:
        outputs = bound.function(*inputs)
        return outputs[0] if len(outputs) == 1 else outputs

    try:
        exported = jax.export.export(jax.jit(function), platforms=tuple(platforms))(*bound.inputs)
    except Exception as error:
        hint = ""
        if "custom call" in str(error):
            hint = (
                " A custom call, such as a sparse kernel of `kernels.wrap`, is built for the "
                "machine it runs on and does not travel in a file: export the function without it, "
                "or serve it in this process with `kernels.serve`."
            )
        raise ValueError(
            f"`apply` must compile for `platforms` {tuple(platforms)}, but JAX says: "
            f"{str(error)[:1000]}{hint}"
        ) from error
    content = bytes(exported.serialize())
    gap = scale = None
    if check is not None:
        inputs = inputs_of(check)
        wanted = jax.tree.leaves(jax.jit(function)(*inputs))
        found = jax.tree.leaves(jax.export.deserialize(bytearray(content)).call(*inputs))
        gap, scale = compared(found, wanted)
    with files.replacing(path, "wb") as file:
        file.write(content)
    inputs = tuple(f"{own.dtype}[{','.join(map(str, own.shape))}]" for own in bound.inputs)
    return JaxReport(str(path), len(content), tuple(platforms), inputs, gap, scale)
