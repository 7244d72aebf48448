"""Compiles for devices that this machine does not have, and reads what a compiled program does.

`tpu_devices` and `gpu_devices` return devices to build a mesh of and compile for. `collectives`,
`arguments` and `costs` read the text of a compiled program, `compiled.as_text()`.
"""

from jaxprune.programs._gpus import GPU_EXAMPLE, GPUS, gpu_devices, gpu_memory
from jaxprune.programs._hlo import (
    KINDS,
    Argument,
    Collective,
    arguments,
    bits,
    collectives,
    costs,
    in_tiles,
)
from jaxprune.programs._tpus import TPUS, tpu_devices

__all__ = [
    "GPUS",
    "GPU_EXAMPLE",
    "KINDS",
    "TPUS",
    "Argument",
    "Collective",
    "arguments",
    "bits",
    "collectives",
    "costs",
    "gpu_devices",
    "gpu_memory",
    "in_tiles",
    "tpu_devices",
]
