"""Block-sparse products, compiled for devices that are not there, and their roofline on paper."""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from jaxprune import kernels, reports
from jaxprune.experiments.ahead.checks import Check

ROWS, INPUTS, OUTPUTS = 4096, 4096, 16384  # tokens, and the first layer of an MLP
DENSITIES = 1.0, 0.25, 0.1
SIDES = 128, 256, 512  # of square blocks
PASSES = "y", "dx", "dw"
TOLERANCE = 0.02  # by which FLOPs may exceed what kept blocks say, relative
TARGETS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}


class Peak(NamedTuple):
    """What a device does at most."""

    flops: float  # of bfloat16, dense, in a second
    bandwidth: float  # bytes of its main memory in a second


# Google Cloud's pages of each version of TPU; NVIDIA's data sheets of the SXM modules, without 2:4.
PEAKS = {
    "v4": Peak(275e12, 1228e9),
    "v5e": Peak(197e12, 819e9),
    "v5p": Peak(459e12, 2765e9),
    "v6e": Peak(918e12, 1640e9),
    "a100": Peak(312e12, 2039e9),
    "h100": Peak(989e12, 3350e9),
    "b200": Peak(2250e12, 8000e9),
}


class Cost(NamedTuple):
    """What a product computes and moves."""

    flops: float
    nbytes: float


class Figures(NamedTuple):
    """One compiled pass of a layer."""

    name: str  # one of PASSES
    side: int  # of a block
    density: float  # kept blocks / blocks
    seconds: float  # of compilation
    cost: Cost
    steps: int  # of the grid
    kernels: int  # calls of Pallas in the program
    temporaries: int  # bytes


def report(platform: str, device: Any, topology: str, options: dict[str, Any]) -> bool:
    """Compiles all passes, prints a table; returns whether all checks passed."""
    name = topology.partition(":")[0]
    print(
        f"{name}: block-sparse product on {device.device_kind}, x [{ROWS}, {INPUTS}], kernel "
        f"[{INPUTS}, {OUTPUTS}], bfloat16",
        flush=True,
    )
    found = [
        compile_pass(platform, device, own, side, density, options)
        for side in SIDES
        if kernels.block_platforms((INPUTS, OUTPUTS), (side, side), jnp.bfloat16).count(platform)
        for own in PASSES
        for density in DENSITIES
    ]
    print("\n".join(table(found, PEAKS[name])))
    results = check_all(found)
    for check in results:
        print(f"  {'ok' if check.passed else 'FAIL':4}  {check.text}")
    print(flush=True)
    return all(check.passed for check in results)


def compile_pass(
    platform: str, device: Any, name: str, side: int, density: float, options: dict[str, Any]
) -> Figures:
    """Compiles one pass for one device, from shapes."""
    place = jax.sharding.SingleDeviceSharding(device)

    def shape(dims: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(dims), dtype, sharding=place)

    indices = jax.tree.map(lambda own: shape(own.shape, own.dtype), indices_of(side, density))
    x, kernel = shape((ROWS, INPUTS), jnp.bfloat16), shape((INPUTS, OUTPUTS), jnp.bfloat16)
    dy = shape((ROWS, OUTPUTS), jnp.bfloat16)

    def run(x: Any, kernel: Any, dy: Any, indices: Any) -> Any:
        y, pull = jax.vjp(lambda *own: kernels.block_product(own[0], own[1], indices), x, kernel)
        return {"y": lambda: y, "dx": lambda: pull(dy)[0], "dw": lambda: pull(dy)[1]}[name]()

    traced = jax.jit(run).trace(x, kernel, dy, indices)
    grid = grids(traced.jaxpr.jaxpr)[f"block_product_{name}_{platform}"]
    lowered = traced.lower(lowering_platforms=(platform,))
    began = time.perf_counter()
    compiled = lowered.compile(options)
    seconds = time.perf_counter() - began
    # XLA knows the costs of kernels for TPUs, which say them; those of GPUs have none.
    said = compiled.cost_analysis() if platform == "tpu" else None
    cost = (
        Cost(said["flops"], said["bytes accessed"])
        if said
        else at_least(name, kept_of(side, density))
    )
    return Figures(
        name=name,
        side=side,
        density=density,
        seconds=seconds,
        cost=cost,
        steps=math.prod(grid),
        kernels=(compiled.as_text() or "").count(f'custom_call_target="{TARGETS[platform]}"'),
        temporaries=reports.measure_memory(compiled).temporaries,
    )


def indices_of(side: int, density: float) -> kernels.BlockIndices:
    """Returns indices of random blocks, exactly as many as the density says, to rounding."""
    units = np.zeros(INPUTS * OUTPUTS // side**2, bool)
    units[: kept_of(side, density) // side**2] = True
    units = np.random.default_rng(0).permutation(units).reshape(INPUTS // side, OUTPUTS // side)
    return kernels.block_indices(units.repeat(side, 0).repeat(side, 1), (side, side))


def kept_of(side: int, density: float) -> int:
    """Counts kept weights."""
    return round(density * INPUTS * OUTPUTS / side**2) * side**2


def grids(jaxpr: Any) -> dict[str, tuple[int, ...]]:
    """Returns the grid of each kernel of Pallas in a jaxpr, by its name."""
    found: dict[str, tuple[int, ...]] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            mapping = equation.params["grid_mapping"]
            found[str(equation.params["name"])] = tuple(mapping.grid)
        else:
            for inner in jaxprs_in_params(equation.params):
                found |= grids(inner)
    return found


def at_least(name: str, kept: int) -> Cost:
    """Counts the arithmetic of kept weights and each array once; gradients of weights are dense."""
    weights = INPUTS * OUTPUTS if name == "dw" else kept
    return Cost(2 * ROWS * kept, 2 * (ROWS * (INPUTS + OUTPUTS) + weights))


def bound(cost: Cost, peak: Peak) -> tuple[float, str]:
    """Returns the least seconds on a device, and whether arithmetic or memory decides."""
    times = {"arithmetic": cost.flops / peak.flops, "memory": cost.nbytes / peak.bandwidth}
    limit = max(times, key=lambda own: times[own])
    return times[limit], limit


def table(found: Sequence[Figures], peak: Peak) -> list[str]:
    """Lists passes, and their least time relative to that of the dense product."""
    dense, limit = bound(at_least("y", INPUTS * OUTPUTS), peak)
    flops, nbytes = at_least("y", INPUTS * OUTPUTS)
    lines = [
        "  pass  block  density  compiled in  GFLOP     MB   steps   least ms   of dense  bound by",
        f"  dense {'':28} {flops / 1e9:6.0f} {nbytes / 1e6:6.0f} {'':7} {dense * 1e3:10.2f} "
        f"{1:10.2f}  {limit}",
    ]
    for own in found:
        seconds, limit = bound(own.cost, peak)
        lines.append(
            f"  {own.name:5} {own.side:5} {own.density:8.2f} {own.seconds:10.1f} s "
            f"{own.cost.flops / 1e9:6.0f} {own.cost.nbytes / 1e6:6.0f} {own.steps:7} "
            f"{seconds * 1e3:10.2f} {seconds / dense:10.2f}  {limit}"
        )
    return lines


def check_all(found: Sequence[Figures]) -> list[Check]:
    """Checks that each pass is one kernel, computes kept blocks only, and copies no array."""
    wrong = [own for own in found if own.kernels != 1]
    checks = [
        Check(not wrong, f"{len(found) - len(wrong)} of {len(found)} programs have one kernel each")
    ]
    ratio = max(
        own.cost.flops / at_least(own.name, kept_of(own.side, own.density)).flops for own in found
    )
    text = f"FLOPs are at most {ratio:.3f} of what kept blocks say, which may be {1 + TOLERANCE}"
    checks.append(Check(ratio <= 1 + TOLERANCE, text))
    smallest = 2 * ROWS * INPUTS
    largest = max(own.temporaries for own in found)
    text = f"temporaries take {largest} bytes at most; a copy of x would take {smallest}"
    return [*checks, Check(largest < smallest, text)]
