"""Compiles the step of scripts/train.py for TPUs or GPUs that are not there, and checks it.

    make tpu-check
    make cuda-check
    python scripts/compile_for_tpu.py --topology v5e:2x4 v4:2x2x1 --config synthetic_resnet50
    python scripts/compile_for_tpu.py --topology v5e:2x4 --mesh data=4,fsdp=2 -- --batch-size 1024
    python scripts/compile_for_tpu.py --platform cuda --topology h100:8

What follows `--` are options of train.py. Needs libtpu (the extra `tpu`) and no TPU, or JAX's CUDA
plugin (the extra `cuda`) and no GPU: nothing runs, and no array is made. The step is compiled for
the network and for what is left of it without half of the channels. Each report has memory,
arithmetic and exchanges between devices, all of one device, and checks; the exit status is 1 if one
of them fails.
"""

import argparse
import importlib.util
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import gpus
import jax
import program_checks
import programs
import tyro
from abstract_steps import (
    Network,
    Program,
    check_config,
    compile_step,
    dense_network,
    shapes_of,
    without_half,
)
from configs import CONFIGS, Config
from experiment import plain_errors
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxprune import sharding


class Family(NamedTuple):
    """A generation of TPUs."""

    example: str  # the sides of a slice
    accelerator: str  # what Google's cloud calls that slice
    options: dict[str, Any]  # of `get_topology_desc`


FAMILIES = {
    # As on a TPU VM: the two cores of a chip are one device.
    "v4": Family("2x2x1", "v4-8", {"chip_config_name": "megacore"}),
    "v5e": Family("2x4", "v5litepod-8", {}),
    "v5p": Family("2x2x1", "v5p-8", {}),
    "v6e": Family("2x4", "v6e-8", {}),
}
DEFAULTS = {
    "tpu": [f"{name}:{family.example}" for name, family in FAMILIES.items()],
    "cuda": [gpus.EXAMPLE],
    "cpu": ["cpu"],
}
MIB = 2**20


def main(args: Sequence[str] | None = None) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = parse(sys.argv[1:] if args is None else list(args))
    passed = True
    with plain_errors():
        own = [options.config, *options.training]
        config = tyro.extras.overridable_config_cli(CONFIGS, args=own)
        check_config(config)
        jax.config.update("jax_platforms", "cpu")  # where what is traced would run
        for topology in options.topology:
            mesh = make_mesh(options.platform, topology, options.mesh or config.mesh)
            sharding.check_batch(config.batch_size, mesh)
            passed &= report(config, mesh, options.platform, topology, options.effort)
    if not passed:
        sys.exit(1)


def parse(args: list[str]) -> argparse.Namespace:
    """The command line; `training` is what follows the `--`."""
    form = argparse.RawDescriptionHelpFormatter
    usage = "compile_for_tpu.py [options] [-- options of train.py]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--topology", nargs="+", metavar="NAME:SIDES",
        help=f"chips to compile for; default: {' '.join(DEFAULTS['tpu'])}; of cuda: "
        f"{gpus.EXAMPLE}, also for example h100:2x8 for two machines")  # fmt: skip
    add("--config", default="synthetic_resnet50", choices=CONFIGS, metavar="NAME",
        help="named configuration of train.py; default: synthetic_resnet50")  # fmt: skip
    add("--mesh", help="such as data=4,fsdp=2; default: data over all devices")
    add("--platform", default="tpu", choices=[*DEFAULTS],
        help="cuda: GPUs; cpu: as many fake devices of this machine as --mesh says")  # fmt: skip
    add("--effort", type=float, default=-1.0,
        help="of the TPU compiler: 0 is that of training; default: -1, faster")  # fmt: skip
    end = args.index("--") if "--" in args else len(args)
    options = parser.parse_args(args[:end])
    options.training = args[end + 1 :]
    if options.topology is None or options.platform == "cpu":
        options.topology = DEFAULTS[options.platform]
    return options


# ---- devices


def make_mesh(platform: str, topology: str, text: str) -> Mesh:
    """The devices of a topology, or as many of this machine as the text says."""
    axes = sharding.parse_mesh(text) if text else {}
    if platform == "cpu":
        if axes and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", math.prod(axes.values()))
        devices = jax.devices()
    else:
        devices = gpus.devices(topology) if platform == "cuda" else tpu_devices(topology)
    return sharding.make_mesh(axes or {"data": len(devices)}, devices)


def tpu_devices(topology: str) -> list[Any]:
    """What libtpu compiles for; no TPU is looked for."""
    family = check_topology(topology)
    options = dict(family.options)
    if set(re.findall(r"[0-9]+", topology.partition(":")[2])) == {"1"}:
        options["chips_per_host_bounds"] = [1, 1, 1]  # by default a host has four chips
    # Without these it asks a server of Google's cloud what machine this is, or complains.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", family.accelerator)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by processes that compile only
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except RuntimeError as error:
        name = topology.partition(":")[0]
        fix = f"use for example {name}:{family.example}"
        if importlib.util.find_spec("libtpu") is None:
            fix = "`make tpu-check` installs libtpu; elsewhere, `pip install 'jax[tpu]'` does"
        raise ValueError(f"`topology` {topology} cannot be compiled for: {error}; {fix}") from error


def check_topology(text: str) -> Family:
    """Refuses what is not a family and as many sides as it has."""
    name, _, sides = text.partition(":")
    if name not in FAMILIES:
        examples = ", ".join(f"{own}:{family.example}" for own, family in FAMILIES.items())
        raise ValueError(
            f"`topology` must be a family of TPUs and the sides of a slice; use for example "
            f"{examples}; got {text!r}; GPUs need `--platform cuda`"
        )
    family = FAMILIES[name]
    count = family.example.count("x") + 1
    if not re.fullmatch("x".join([r"[1-9][0-9]*"] * count), sides):
        raise ValueError(
            f"`topology` must have {count} sides for {name}; use for example "
            f"{name}:{family.example}; got {text!r}"
        )
    return family


# ---- reports


def report(config: Config, mesh: Mesh, platform: str, topology: str, effort: float) -> bool:
    """Compiles, prints, and says whether all is well."""
    compiler = {"exec_time_optimization_effort": effort} if platform == "tpu" else {}
    source = shapes_of(config)
    dense = dense_network(config, source)
    networks = dense, without_half(config, dense, source.image_shape)
    kind = mesh.devices.flat[0].device_kind
    axes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    print(
        f"{topology}: {mesh.size} x {kind}, mesh {axes}\n  {config.model}, {config.method} on "
        f"{config.granularity}, {config.dtype}, {config.batch_size} images of "
        f"{'x'.join(map(str, source.image_shape))} a step",
        flush=True,
    )
    try:
        found = [compile_step(config, source, own, mesh, **compiler) for own in networks]
    except jax.errors.JaxRuntimeError as error:  # such as too little memory
        print(f"  FAIL  does not compile: {str(error).splitlines()[0]}\n")
        return False
    print("\n".join([*table(networks, found), *exchanges(found[0])]))
    checks = program_checks.check_all(networks, found)
    if platform == "cuda":
        checks.append(program_checks.check_fits(found[0], gpus.memory(topology)))
    for check in checks:
        print(f"  {'ok' if check.passed else 'FAIL':4}  {check.text}")
    print(flush=True)
    return all(check.passed for check in checks)


def table(networks: Sequence[Network], found: Sequence[Program]) -> list[str]:
    """What both networks cost."""

    def padded(tree: Any) -> float:
        return sum(own.padded for own in jax.tree.leaves(tree)) / MIB

    rows = {
        "seconds of compilation": [own.seconds for own in found],
        "million parameters": [entries(own.variables["params"]) / 1e6 for own in networks],
        "GMACs of an image": [own.macs / 1e9 for own in networks],
        "GFLOPs of a device": [own.flops / 1e9 for own in found],
        "GB accessed by a device": [own.bytes_accessed / 1e9 for own in found],
        "MiB of arguments on a device": [own.memory.arguments / MIB for own in found],
        "  of them, parameters": [padded(own.state.params) for own in found],
        "  masks": [padded(program_checks.masks_of(own.state)) for own in found],
        "  statistics": [padded(program_checks.statistics_of(own.state)) for own in found],
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
    """Counts and bytes of the exchanges of a step and of a mask update."""
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
    """Of all arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
