"""Describes slices of TPUs to libtpu, which compiles for them on a machine without any."""

import importlib.util
import os
import re
from typing import Any, NamedTuple

from jax.experimental import topologies


class Family(NamedTuple):
    """A generation of TPUs."""

    example: str  # the sides of a slice
    accelerator: str  # the name of that slice in Google's cloud
    options: dict[str, Any]  # options of `get_topology_desc`


# Kinds of TPUs, each with a slice as an example and the options that describe it.
TPUS = {
    # The two cores of a chip are one device, as on a TPU VM.
    "v4": Family("2x2x1", "v4-8", {"chip_config_name": "megacore"}),
    "v5e": Family("2x4", "v5litepod-8", {}),
    "v5p": Family("2x2x1", "v5p-8", {}),
    "v6e": Family("2x4", "v6e-8", {}),
}


def tpu_devices(topology: str) -> list[Any]:
    """Returns devices that libtpu compiles for; no TPU is needed.

    Args:
        topology: a family and the sides of a slice, such as `"v5e:2x4"` or `"v4:2x2x1"`. Families
            are the keys of `TPUS`.

    Returns:
        Devices for `sharding.make_mesh`.

    Raises:
        ValueError: if the topology does not have this form, libtpu is not installed, or it cannot
            compile for the topology.

    Example:
        >>> tpu_devices("v5e:8")
        Traceback (most recent call last):
        ValueError: `topology` must have 2 sides for v5e; use for example v5e:2x4; got 'v5e:8'
    """
    family = check_topology(topology)
    options = dict(family.options)
    if set(re.findall(r"[0-9]+", topology.partition(":")[2])) == {"1"}:
        options["chips_per_host_bounds"] = [1, 1, 1]  # by default a host has four chips
    # Without these variables libtpu asks a metadata server what machine this is, or complains.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", family.accelerator)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # these processes only compile
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except RuntimeError as error:
        name = topology.partition(":")[0]
        fix = f"use for example {name}:{family.example}"
        if importlib.util.find_spec("libtpu") is None:
            fix = "`make tpu-check` installs libtpu; elsewhere, `pip install 'jax[tpu]'` does"
        raise ValueError(f"`topology` {topology} cannot be compiled for: {error}; {fix}") from error


def check_topology(text: str) -> Family:
    """Returns the family of a topology; raises unless it is a family and its number of sides."""
    name, _, sides = text.partition(":")
    if name not in TPUS:
        examples = ", ".join(f"{own}:{family.example}" for own, family in TPUS.items())
        raise ValueError(
            f"`topology` must be a family of TPUs and the sides of a slice; use for example "
            f"{examples}; got {text!r}; for GPUs use `gpu_devices`"
        )
    family = TPUS[name]
    count = family.example.count("x") + 1
    if not re.fullmatch("x".join([r"[1-9][0-9]*"] * count), sides):
        raise ValueError(
            f"`topology` must have {count} sides for {name}; use for example "
            f"{name}:{family.example}; got {text!r}"
        )
    return family
