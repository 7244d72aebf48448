"""Writes .tflite files: dense, compacted and sparse networks for phones and browsers."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from jaxprune import files
from jaxprune.export._conditions import SparseReport, report_of
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
from jaxprune.export._rewriting import cut_head, pad_explicitly, store_weights
from jaxprune.export._tflite import Network

_USER = "export.litert"
# How `litert` may store filters
VALUES = ("float32", "int8")


class LitertReport(NamedTuple):
    """What was written, and whether it computes the same; `print` shows it.

    Example:
        >>> sparse = SparseReport(False, "", "no filter is sparse", "prune", 0.0, 0, 0)
        >>> print(LitertReport("a.tflite", 1024, {"CONV_2D": 1}, None, None, sparse))
        a.tflite: 1,024 bytes; 1 CONV_2D; sparse filters: 0
        Not run: give `check=` to compare it with JAX.
        Sparse inference: no; no filter is sparse.
        Cure: prune.
    """

    path: str
    bytes: int
    operations: Mapping[str, int]  # kind -> count
    error: float | None  # largest absolute difference between the runtime and JAX on `check`
    scale: float | None  # largest absolute output of JAX on `check`
    sparse: SparseReport

    def __str__(self) -> str:
        """Shows the size, the operations, the error and whether sparse inference runs."""
        ops = ", ".join(f"{count} {kind}" for kind, count in self.operations.items())
        error = error_line(self.error, self.scale, "JAX")
        return (
            f"{self.path}: {self.bytes:,} bytes; {ops}; sparse filters: "
            f"{self.sparse.sparse_tensors}\n{error}\n{self.sparse}"
        )


def litert(
    apply: Callable[..., Any],
    variables: Any,
    example: Any,
    path: str | os.PathLike[str],
    *,
    values: str = "float32",
    masks: Any = None,
    sparse: bool = True,
    check: Any = None,
    overwrite: bool = False,
) -> LitertReport:
    """Writes a network as a .tflite file for LiteRT: phones, browsers, small computers.

    Variables become constants. Filters with many zeros are stored as sparse tensors, which XNNPACK
    computes with in less time on ARM and in browsers if the network allows it; the report says
    whether it does, and if not, why. Elsewhere such a file is as fast as a dense one. There are no
    float16 values: LiteRT.js 2.5.3 computes wrong results from them.

    Args:
        apply: `apply(variables, *inputs)`; for a compacted network `plan.wrap(apply)`, for a module
            of Flax NNX `evaluate` of `structure.from_nnx(module)`.
        variables: tree of arrays; pruned weights are 0, or `masks` says where they are.
        example: input of a fixed shape, an array or a `jax.ShapeDtypeStruct`; a tuple of them if
            there are several. A runtime can resize a batch of 1; a larger one stays as it is.
        path: the file to write.
        values: "float32", or "int8": filters are stored as int8 with one scale for each output, in
            a quarter of the bytes. The computation remains float32.
        masks: tree of bools like `variables`, True where a weight is kept; one True may cover a
            branch.
        sparse: False stores all filters dense.
        check: inputs like `example`, to run the file with and compare with JAX; axis 0 may be a
            multiple of that of `example`.
        overwrite: whether to replace an existing file.

    Returns:
        A `LitertReport`: bytes, operations, the largest error on `check`, and whether sparse
            inference runs.

    Raises:
        ValueError: if `apply` cannot be traced or converted, a shape is not fixed, or `masks` or
            `check` does not fit.
        FileExistsError: if the file exists and `overwrite` is False.
        OSError: if it cannot be written; an existing file then stays as it is.
        ModuleNotFoundError: if the extra `litert` is not installed.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4))
        >>> path = tempfile.mkdtemp() + "/net.tflite"
        >>> report = litert(lambda w, x: jax.nn.relu(x @ w), jnp.ones((4, 2)), x, path, check=x)
        >>> report.error, dict(report.operations)
        (0.0, {'FULLY_CONNECTED': 1})

    References:
        Elsen, Dukhan, Gale, Simonyan. Fast Sparse ConvNets. arXiv:1911.09723.
    """
    if values not in VALUES:
        raise ValueError(f"`values` must be 'float32' or 'int8', but is {values!r:.40}")
    path = free_path(path, overwrite)
    bound = bind(apply, variables, example, masks)
    checks = None if check is None else batches(bound, check)
    network = Network(_convert(bound), _USER)
    if store_weights(network, sparse, values == "int8"):
        cut_head(network)
        pad_explicitly(network)
    content = network.write()
    error = scale = None
    if checks is not None:
        wanted = outputs_of(bound, checks)
        error, scale = compared(_outputs_of_runtime(content, checks), wanted)
    with files.replacing(path, "wb") as file:
        file.write(content)
    kinds = Counter(map(network.kind, network.graph.operators))
    report = report_of(network)
    return LitertReport(str(path), len(content), dict(kinds.most_common()), error, scale, report)


def _convert(bound: Bound) -> bytes:
    """Converts a function to a .tflite through StableHLO."""
    load("litert_converter", "litert", _USER)
    ir = load("litert_converter.mlir.ir", "litert", _USER)
    passes = load("litert_converter.mlir.passmanager", "litert", _USER)
    api = load("litert_converter.mlir._mlir_libs.converter_api_ext", "litert", _USER)
    exported = jax.export.export(jax.jit(bound.function), platforms=("cpu",))(*bound.inputs)
    names = [f"input_{index}" for index in range(len(bound.inputs))]
    results = [f"output_{index}" for index in range(len(bound.outputs))]
    context = ir.Context()
    api.prepare_mlir_context(context)
    try:
        with context:
            module = ir.Module.parse(exported.mlir_module())
            api.set_signature(
                module.operation,
                signature_name="serving_default",
                input_names=names,
                output_names=results,
            )
            config = api.ConvertToTFLConfig()
            api.run_convert_to_tfl_passes(module, passes.PassManager(), config)
            return api.export_flatbuffer_to_bytes(module.operation)
    except Exception as error:  # the classes of its errors are private
        raise ValueError(
            "`apply` must use operations that LiteRT knows, but the converter says: "
            f"{str(error)[:1000]}"
        ) from error


def _outputs_of_runtime(content: bytes, checks: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """Runs a .tflite with the runtime of LiteRT."""
    interpreter = load("ai_edge_litert.interpreter", "litert", _USER)
    found = []
    runner = interpreter.Interpreter(model_content=content, num_threads=1)
    runner.allocate_tensors()
    run = runner.get_signature_runner("serving_default")
    for batch in checks:
        outputs = run(**{f"input_{index}": own for index, own in enumerate(batch)})
        found += [outputs[f"output_{index}"].copy() for index in range(len(outputs))]
    return found
