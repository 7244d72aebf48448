"""Writes .onnx files, and runs them with onnxruntime."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np

from jaxprune import files
from jaxprune.export._functions import (
    Bound,
    batches,
    bind,
    compared,
    error_line,
    free_path,
    outputs_of,
)
from jaxprune.export._packages import load

_USER = "export.onnx"


class OnnxReport(NamedTuple):
    """What was written, and whether it computes the same; `print` shows it.

    Example:
        >>> print(OnnxReport("net.onnx", 2048, {"Conv": 1}, 1e-6, 2.0))
        net.onnx: 2,048 bytes; 1 Conv
        Largest error against JAX: 1e-06, of outputs up to 2.
    """

    path: str
    bytes: int
    operations: Mapping[str, int]  # kind -> count
    error: float | None  # largest absolute difference between onnxruntime and JAX on `check`
    scale: float | None  # largest absolute output of JAX on `check`

    def __str__(self) -> str:
        """Shows the size, the operations and the error."""
        ops = ", ".join(f"{count} {kind}" for kind, count in self.operations.items())
        error = error_line(self.error, self.scale, "JAX")
        return f"{self.path}: {self.bytes:,} bytes; {ops}\n{error}"


def onnx_file(
    apply: Callable[..., Any],
    variables: Any,
    example: Any,
    path: str | os.PathLike[str],
    *,
    masks: Any = None,
    check: Any = None,
    overwrite: bool = False,
) -> OnnxReport:
    """Writes a network as an ONNX file, for onnxruntime, OpenVINO and others.

    The function is traced first and jax2onnx gets the result: it replaces parts of JAX while it
    calls a function, and networks that it calls itself, compacted ones above all, fail. Masks save
    no time in these runtimes; a compacted network does.

    Args:
        apply: `apply(variables, *inputs)`; for a compacted network `plan.wrap(apply)`, for a module
            of Flax NNX `evaluate` of `structure.from_nnx(module)`.
        variables: tree of arrays; they become constants.
        example: an array or a `jax.ShapeDtypeStruct` of fixed shape, or a tuple of them.
        path: the file to write.
        masks: tree of bools like `variables`, True where a weight is kept.
        check: inputs like `example`, to run the file with and compare with JAX; axis 0 may be a
            multiple of that of `example`.
        overwrite: whether to replace an existing file.

    Returns:
        An `OnnxReport`.

    Raises:
        ValueError: if `apply` cannot be traced or converted, a shape is not fixed, or `masks` or
            `check` does not fit.
        FileExistsError: if the file exists and `overwrite` is False.
        OSError: if it cannot be written; an existing file then stays as it is.
        ModuleNotFoundError: if the extra `onnx` is not installed.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from jaxprune import export
        >>> x = jnp.ones((1, 4))
        >>> path = tempfile.mkdtemp() + "/net.onnx"
        >>> export.onnx(lambda w, x: jax.nn.relu(x @ w), jnp.ones((4, 2)), x, path, check=x).error
        0.0
    """
    path = free_path(path, overwrite)
    bound = bind(apply, variables, example, masks)
    checks = None if check is None else batches(bound, check)
    model = _convert(bound)
    content = model.SerializeToString()
    error = scale = None
    if checks is not None:
        wanted = outputs_of(bound, checks)
        error, scale = compared(_outputs_of_runtime(content, checks), wanted)
    with files.replacing(path, "wb") as file:
        file.write(content)
    kinds = Counter(node.op_type for node in model.graph.node)
    return OnnxReport(str(path), len(content), dict(kinds.most_common()), error, scale)


def _convert(bound: Bound) -> Any:
    """Converts a traced function to a model of ONNX."""
    converter = load("jax2onnx", "onnx", _USER)
    traced = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(bound.function)(*bound.inputs))
    try:
        return converter.to_onnx(traced, list(bound.inputs))
    except Exception as error:  # it has no class of its own
        raise ValueError(
            "`apply` must use operations that jax2onnx knows, but the converter raises "
            f"{type(error).__name__}: {str(error)[:1000]}"
        ) from error


def _outputs_of_runtime(content: bytes, checks: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """Runs a model with onnxruntime."""
    runtime = load("onnxruntime", "onnx", _USER)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(
            f"`apply` must give a file that onnxruntime loads, but it says: {str(error)[:1000]}"
        ) from error
    names = [own.name for own in session.get_inputs()]
    return [
        np.asarray(out)
        for batch in checks
        for out in session.run(None, dict(zip(names, batch, strict=True)))
    ]
