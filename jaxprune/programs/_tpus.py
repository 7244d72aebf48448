"""Slices of TPUs to compile for where there is no TPU."""

import importlib.util
import os
import re
from typing import Any, NamedTuple

from jax.experimental import topologies


class Family(NamedTuple):
    """A generation of TPUs."""

    example: str  # the sides of a slice
    accelerator: str  # what Google's cloud calls that slice
    options: dict[str, Any]  # of `get_topology_desc`


TPUS = {
    # As on a TPU VM: the two cores of a chip are one device.
    "v4": Family("2x2x1", "v4-8", {"chip_config_name": "megacore"}),
    "v5e": Family("2x4", "v5litepod-8", {}),
    "v5p": Family("2x2x1", "v5p-8", {}),
    "v6e": Family("2x4", "v6e-8", {}),
}


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
    if name not in TPUS:
        examples = ", ".join(f"{own}:{family.example}" for own, family in TPUS.items())
        raise ValueError(
            f"`topology` must be a family of TPUs and the sides of a slice; use for example "
            f"{examples}; got {text!r}; GPUs need `--platform cuda`"
        )
    family = TPUS[name]
    count = family.example.count("x") + 1
    if not re.fullmatch("x".join([r"[1-9][0-9]*"] * count), sides):
        raise ValueError(
            f"`topology` must have {count} sides for {name}; use for example "
            f"{name}:{family.example}; got {text!r}"
        )
    return family
