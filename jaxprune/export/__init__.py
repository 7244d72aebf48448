"""Files for other runtimes: LiteRT on phones and in browsers, servers with JAX, onnxruntime.

Each target is an extra, and is imported when it is first used. `litert` and `onnx` need
environments of their own; docs/deploy.md says which target is for which device.
"""

from jaxprune.export._conditions import SparseReport, sparse_report
from jaxprune.export._jax import JaxReport
from jaxprune.export._jax import jax_file as jax
from jaxprune.export._litert import VALUES, LitertReport, litert
from jaxprune.export._onnx import OnnxReport
from jaxprune.export._onnx import onnx_file as onnx
from jaxprune.export._safetensors import SafetensorsReport, safetensors

__all__ = [
    "VALUES",
    "JaxReport",
    "LitertReport",
    "OnnxReport",
    "SafetensorsReport",
    "SparseReport",
    "jax",
    "litert",
    "onnx",
    "safetensors",
    "sparse_report",
]
