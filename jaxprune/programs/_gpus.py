"""Describes NVIDIA GPUs to XLA, so that it compiles for them on a machine without any.

The figures are those of XLA's own descriptions (openxla/xla, xla/backends/gpu/target_config/specs:
a100_sxm_80, h100_sxm, b200).
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.experimental import topologies

# A GPU and how many of them, as a command takes it.
GPU_EXAMPLE = "h100:8"
FRACTION = 0.75  # of memory that JAX allocates at its start, see XLA_CLIENT_MEM_FRACTION


class Gpu(NamedTuple):
    """A GPU as XLA sees it."""

    description: str  # the driver's name for it
    facts: dict[str, Any]  # fields of stream_executor.GpuDeviceInfoProto


SHARED = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "shared_memory_per_block": 49152,
}
# What the compiler is told of each kind of GPU.
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        {
            "cuda_compute_capability": {"major": 8},
            "core_count": 108,
            "fpus_per_core": 64,
            "clock_rate_ghz": 1.41,
            "shared_memory_per_core": 167936,
            "shared_memory_per_block_optin": 166912,
            "l2_cache_size": 41943040,
            "memory_bandwidth": 2039040000000,
            "device_memory_size": 85100068864,
        },
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3",
        {
            "cuda_compute_capability": {"major": 9, "feature_extension": "ACCELERATED_FEATURES"},
            "core_count": 132,
            "fpus_per_core": 128,
            "clock_rate_ghz": 1.98,
            "shared_memory_per_core": 233472,
            "shared_memory_per_block_optin": 232448,
            "l2_cache_size": 52428800,
            "memory_bandwidth": 3352320000000,
            "device_memory_size": 84942979072,
        },
    ),
    "b200": Gpu(
        "NVIDIA B200",
        {
            "cuda_compute_capability": {"major": 10, "feature_extension": "ACCELERATED_FEATURES"},
            "core_count": 148,
            "fpus_per_core": 128,
            "clock_rate_ghz": 1.965,
            "shared_memory_per_core": 233472,
            "shared_memory_per_block_optin": 232448,
            "l2_cache_size": 132644864,
            "memory_bandwidth": 7672320000000,
            "device_memory_size": 191514411008,
        },
    ),
}
VERSIONS = {
    "platform_name": '"CUDA"',
    "runtime_version": {"major": 12, "minor": 8},
    "dnn_version_info": {"major": 9, "minor": 10},
}


def gpu_devices(topology: str) -> list[Any]:
    """Returns devices that JAX's CUDA plugin compiles for; no GPU is needed.

    Args:
        topology: model and number of GPUs, such as `"h100:8"`, or model, machines and GPUs of each,
            such as `"h100:2x8"`. Models are the keys of `GPUS`.

    Returns:
        Devices for `sharding.make_mesh`.

    Raises:
        ValueError: if the topology does not have this form, the CUDA plugin is not installed, or it
            cannot compile for the topology.

    Example:
        >>> gpu_devices("k80:1")
        Traceback (most recent call last):
        ValueError: `topology` must be one of a100, h100, b200 and ...
    """
    gpu, machines, each = parse(topology)
    shape = f"1x{machines}x{each}"
    try:
        found = topologies.get_topology_desc(
            topology, platform="cuda", target_config=target_config(gpu), topology=shape
        )
    except NotImplementedError as error:
        raise ValueError(
            f"`topology` {topology} needs the CUDA plugin of JAX ({error}); `make cuda-check` "
            f"installs it; elsewhere, `pip install 'jax[cuda12]'` does"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"`topology` {topology} cannot be compiled for: {error}; use for example {GPU_EXAMPLE}"
        ) from error
    return found.devices


def parse(topology: str) -> tuple[Gpu, int, int]:
    """Returns the GPU, the number of machines, and the number of GPUs in each."""
    name, _, sides = topology.partition(":")
    if name not in GPUS:
        raise ValueError(
            f"`topology` must be one of {', '.join(GPUS)} and a number of GPUs; use for example "
            f"{GPU_EXAMPLE}; got {topology!r}"
        )
    if not re.fullmatch(r"([1-9][0-9]*x)?[1-9][0-9]*", sides):
        raise ValueError(
            f"`topology` must give the number of GPUs, or of machines and of GPUs in each; use for "
            f"example {name}:8 or {name}:2x8; got {topology!r}"
        )
    machines, _, each = sides.rpartition("x")
    return GPUS[name], int(machines or 1), int(each)


def target_config(gpu: Gpu) -> str:
    """Writes the text of a stream_executor.GpuTargetConfigProto."""
    facts = {"gpu_device_info": SHARED | gpu.facts, **VERSIONS}
    return proto_text({**facts, "device_description_str": f'"{gpu.description}"'})


def proto_text(fields: Mapping[str, Any]) -> str:
    """Writes the fields of a message in the text format of protocol buffers."""
    lines = []
    for name, value in fields.items():
        is_message = isinstance(value, Mapping)
        lines.append(f"{name} {{ {proto_text(value)} }}" if is_message else f"{name}: {value}")
    return " ".join(lines)


def gpu_memory(topology: str) -> int:
    """Returns the bytes of a GPU's memory that JAX allocates at its start.

    Args:
        topology: as in `gpu_devices`.

    Returns:
        Bytes of one GPU: three quarters of its memory, the default of JAX.

    Raises:
        ValueError: if the topology does not have the form of `gpu_devices`.

    Example:
        >>> gpu_memory("h100:8")
        63707234304
    """
    return int(FRACTION * parse(topology)[0].facts["device_memory_size"])
