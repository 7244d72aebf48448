"""Compiles the step of scripts/train.py for TPUs or GPUs that are not there, and checks it.

    make tpu-check
    make cuda-check
    python scripts/compile_for_tpu.py --topology v5e:2x4 v4:2x2x1 --config synthetic_resnet50
    python scripts/compile_for_tpu.py --topology v5e:2x4 --mesh data=4,fsdp=2 -- --batch-size 1024
    python scripts/compile_for_tpu.py --platform cuda --topology h100:8
    python scripts/compile_for_tpu.py --blocks

Options after `--` are those of train.py. The command needs libtpu (the extra `tpu`) and no TPU, or
JAX's CUDA plugin (the extra `cuda`) and no GPU: nothing runs, and no array is made. It compiles the
step for the network, and for the network without half of its channels. Each report lists memory,
arithmetic and exchanges between devices, all for one device, and checks; the exit status is 1 if a
check fails. `--blocks` compiles the block-sparse product of `jaxprune.kernels` instead.
"""

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import tyro
from jax.sharding import Mesh

from jaxprune import programs, sharding
from jaxprune.experiments import command
from jaxprune.experiments.ahead import blocks, checks
from jaxprune.experiments.ahead.steps import (
    Network,
    Program,
    check_config,
    compile_step,
    dense_network,
    shapes_of,
    without_half,
)
from jaxprune.experiments.command import plain_errors
from jaxprune.experiments.config import CONFIGS, Config

DEFAULTS = {
    "tpu": [f"{name}:{family.example}" for name, family in programs.TPUS.items()],
    "cuda": [programs.GPU_EXAMPLE],
    "cpu": ["cpu"],
}
MIB = 2**20


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = parse(sys.argv[1:] if args is None else list(args))
    passed = True
    with plain_errors():
        own = [options.config, *options.training]
        config = tyro.extras.overridable_config_cli(CONFIGS, args=own)
        check_config(config)
        jax.config.update("jax_platforms", "cpu")  # traced constants live there
        for topology in options.topology:
            if options.blocks:
                passed &= report_blocks(options.platform, topology, options.effort)
                continue
            mesh = make_mesh(options.platform, topology, options.mesh or config.mesh)
            sharding.check_batch(config.batch_size, mesh)
            passed &= report(config, mesh, options.platform, topology, options.effort)
    if not passed:
        sys.exit(1)


def parse(args: list[str]) -> argparse.Namespace:
    """Parses the command line; `training` holds the options after `--`."""
    form = argparse.RawDescriptionHelpFormatter
    usage = "compile_for_tpu.py [options] [-- options of train.py]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--topology", nargs="+", metavar="NAME:SIDES",
        help=f"chips to compile for; default: {' '.join(DEFAULTS['tpu'])}; for cuda "
        f"{programs.GPU_EXAMPLE}; h100:2x8 means two machines of eight")  # fmt: skip
    add("--config", default="synthetic_resnet50", choices=CONFIGS, metavar="NAME",
        help="named configuration of train.py; default: synthetic_resnet50")  # fmt: skip
    add("--mesh", help="mesh such as data=4,fsdp=2; default: data over all devices")
    add("--platform", default="tpu", choices=[*DEFAULTS],
        help="cuda: GPUs; cpu: as many virtual devices of this machine as --mesh has")  # fmt: skip
    add("--effort", type=float, default=-1.0,
        help="effort of the TPU compiler: 0 as in training, -1 (default) faster")  # fmt: skip
    add("--blocks", action="store_true", help="the block-sparse product instead of the step")
    options = command.parse(parser, args)
    if options.topology is None or options.platform == "cpu":
        options.topology = DEFAULTS[options.platform]
    return options


# ---- devices


def make_mesh(platform: str, topology: str, text: str) -> Mesh:
    """Arranges the devices of a topology, or as many of this machine as the text says."""
    axes = sharding.parse_mesh(text) if text else {}
    if platform == "tpu" and topology.partition(":")[0] in programs.GPUS:
        raise ValueError(f"`topology` {topology} is one of GPUs; add `--platform cuda`")
    if platform == "cpu":
        if axes and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", math.prod(axes.values()))
        devices = jax.devices()
    else:
        devices = (
            programs.gpu_devices(topology) if platform == "cuda" else programs.tpu_devices(topology)
        )
    return sharding.make_mesh(axes or {"data": len(devices)}, devices)


# ---- reports


def report_blocks(platform: str, topology: str, effort: float) -> bool:
    """Compiles and prints block-sparse products for one device; returns whether checks passed."""
    if platform == "cpu":
        raise ValueError("`platform` must be tpu or cuda with `--blocks`, but is cpu")
    device = make_mesh(platform, topology, "").devices.flat[0]
    return blocks.report(platform, device, topology, compiler_options(platform, effort))


def compiler_options(platform: str, effort: float) -> dict[str, Any]:
    """Returns options of XLA."""
    return {"exec_time_optimization_effort": effort} if platform == "tpu" else {}


def report(config: Config, mesh: Mesh, platform: str, topology: str, effort: float) -> bool:
    """Compiles and prints a report; returns whether all checks passed."""
    compiler = compiler_options(platform, effort)
    source = shapes_of(config)
    dense = dense_network(config, source)
    networks = dense, without_half(dense)
    kind = mesh.devices.flat[0].device_kind
    axes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    print(
        f"{topology}: {mesh.size} x {kind}, mesh {axes}\n  {config.model}, {config.method} on "
        f"{config.granularity}, {config.dtype}, {config.batch_size} "
        f"{'windows' if source.label else 'images'} of {'x'.join(map(str, source.shape))} a step",
        flush=True,
    )
    try:
        found = [compile_step(config, source, own, mesh, **compiler) for own in networks]
    except jax.errors.JaxRuntimeError as error:  # such as too little memory
        print(f"  FAIL  does not compile: {str(error).splitlines()[0]}\n")
        return False
    print("\n".join([*table(networks, found), *exchanges(found[0])]))
    results = checks.check_all(networks, found)
    if platform == "cuda":
        results.append(checks.check_fits(found[0], programs.gpu_memory(topology)))
    for check in results:
        print(f"  {'ok' if check.passed else 'FAIL':4}  {check.text}")
    print(flush=True)
    return all(check.passed for check in results)


def table(networks: Sequence[Network], found: Sequence[Program]) -> list[str]:
    """Lists the costs of both networks."""

    def padded(tree: Any) -> float:
        return sum(own.padded for own in jax.tree.leaves(tree)) / MIB

    rows = {
        "seconds of compilation": [own.seconds for own in found],
        "million parameters": [entries(own.variables["params"]) / 1e6 for own in networks],
        "GMACs of an example": [own.macs / 1e9 for own in networks],
        "GFLOPs of a device": [own.flops / 1e9 for own in found],
        "GB accessed by a device": [own.bytes_accessed / 1e9 for own in found],
        "MiB of arguments on a device": [own.memory.arguments / MIB for own in found],
        "  of them, parameters": [padded(own.state.params) for own in found],
        "  masks": [padded(checks.masks_of(own.state)) for own in found],
        "  statistics": [padded(checks.statistics_of(own.state)) for own in found],
        "MiB of temporaries": [own.memory.temporaries / MIB for own in found],
        "MiB at the peak": [own.memory.peak / MIB for own in found],
    }
    lines = [f"  {'':32} {'network':>10} {'half':>10} {'ratio':>7}"]
    for name, (whole, half) in rows.items():
        if math.isnan(whole):  # XLA does not say
            continue
        ratio = f"{half / whole:7.2f}" if whole else ""
        lines.append(f"  {name:32} {whole:10.4g} {half:10.4g} {ratio}")
    return lines


def exchanges(program: Program) -> list[str]:
    """Lists counts and bytes of the exchanges of a step and of a mask update."""
    lines = [f"  {'exchanges':32} {'number':>10} {'MiB':>10}"]
    for conditional, when in ((False, "each step"), (True, "mask update")):
        for kind in programs.KINDS:
            own = [
                one.bytes
                for one in program.collectives
                if (one.kind, one.conditional) == (kind, conditional)
            ]
            if own:
                lines.append(f"  {kind + ', ' + when:32} {len(own):10} {sum(own) / MIB:10.4g}")
    return lines


def entries(tree: Any) -> int:
    """Counts the entries of all arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
