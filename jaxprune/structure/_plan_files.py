"""Reads plans: every index in them is checked before it counts."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import files
from jaxprune.files import schemas
from jaxprune.structure._plans import VERSION, Plan
from jaxprune.structure._traces import Model
from jaxprune.structure._values import Split

_WHOLE = schemas.whole()
_PATHS = schemas.each(schemas.text, unique=True)
_LEAF = {"shape": schemas.each(_WHOLE), "removed": schemas.each(schemas.each(_WHOLE, unique=True))}


def _dtype(value: Any, at: str) -> None:
    schemas.text(value, at)
    try:
        jnp.dtype(value)
    except TypeError as error:
        raise schemas.wrong(at, "the name of a dtype", value) from error


_PLAN = schemas.record(
    {
        "version": schemas.one_of(VERSION),
        "order": _PATHS,  # `consumers` and `factors` index into it
        "parameters": _PATHS,
        "caches": _PATHS,
        "consumers": schemas.each(schemas.each(_WHOLE, length=2)),
        "factors": schemas.each(schemas.anything),
        "leaves": schemas.table(schemas.record(_LEAF, optional={"dtype": _dtype})),
    }
)
# A plan has a flag for each index of a dimension that shrinks, though its file lists only those
# that are removed. More flags than this would let a small file take all memory.
_MOST = 2**28


def plan_of(content: Mapping[str, Any], where: str = "`content`") -> Plan:
    """Makes a plan from the values of `Plan.to_dict`.

    Args:
        content: these values, before or after a trip through JSON.
        where: the name of `content` in errors.

    Returns:
        The plan.

    Raises:
        ValueError: if `content` is not such a dict, was changed since, or has a different version.

    Example:
        >>> model = Model({"w": (2,)}, frozenset())
        >>> plan_of(Plan(model, {"w": [np.array([True, False])]}).to_dict()).shape("w")
        (1,)
    """
    if not isinstance(content, Mapping) or "version" not in content:
        raise ValueError(f"{where} is not a plan of jaxprune: it must be an object with `version`")
    if content["version"] != VERSION or isinstance(content["version"], bool):
        raise ValueError(
            f"{where} is a plan of version {str(content['version'])[:60]}; this jaxprune reads "
            f"{VERSION}: make it again with `Groups.plan`"
        )
    content = files.unseal(content, where)
    _PLAN(content, where)
    leaves, order = content["leaves"], content["order"]
    if set(order) != leaves.keys():
        raise ValueError(f"{where}: `order` must name the same leaves as `leaves`")
    shapes = {name: tuple(leaves[name]["shape"]) for name in order}
    _check_places(content, shapes, where)
    model = Model(
        shapes,
        frozenset(content["parameters"]),
        frozenset((index, dimension) for index, dimension in content["consumers"]),
        frozenset(content["caches"]),
        tuple((Split(node, tuple(sizes)), factor) for node, sizes, factor in content["factors"]),
        {name: leaves[name]["dtype"] for name in order if "dtype" in leaves[name]},
    )
    kept = {
        name: [
            _flags(size, removed)
            for size, removed in zip(shape, leaves[name]["removed"], strict=True)
        ]
        for name, shape in shapes.items()
    }
    return Plan(model, kept)


def load_plan(path: str | Path) -> Plan:
    """Reads a plan from a file.

    Args:
        path: a file written by `Plan.save`.

    Returns:
        The plan.

    Raises:
        ValueError: if it is not such a file, is damaged, or has a different version.
        OSError: if it cannot be read.

    Example:
        >>> import tempfile
        >>> model = Model({"w": (2,)}, frozenset())
        >>> file = tempfile.mkdtemp() + "/plan.json"
        >>> Plan(model, {"w": [np.array([True, False])]}).save(file)
        >>> load_plan(file).shape("w")
        (1,)
    """
    try:
        content = files.parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a plan of jaxprune: {error}") from error
    return plan_of(content, str(path))


def _check_places(
    content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raises unless every path and every index of a plan names something in it."""
    for name in ("parameters", "caches"):
        for path in content[name]:
            schemas.one_of(*shapes)(path, f"{where}: `{name}`")
    dimensions = [len(shape) for shape in shapes.values()]
    for number, (leaf, dimension) in enumerate(content["consumers"]):
        at = f"{where}: `consumers/{number}`"
        schemas.whole(high=len(shapes) - 1)(leaf, at)
        schemas.whole(high=dimensions[leaf] - 1)(dimension, at)
    nodes = sum(sum(shape) for shape in shapes.values())
    for number, row in enumerate(content["factors"]):
        at = f"{where}: `factors/{number}`"
        schemas.each(schemas.anything, length=3)(row, at)
        node, sizes, factor = row
        schemas.whole(high=nodes)(node, at)
        schemas.each(schemas.whole(low=1))(sizes, at)
        schemas.whole(high=len(sizes) - 1)(factor, at)
    flags = 0
    for name, shape in shapes.items():
        at = schemas.below(f"{where}: `leaves`", name)
        removed = content["leaves"][name]["removed"]
        if len(removed) != len(shape):
            raise ValueError(
                f"{at} must have a list in `removed` for each of its {len(shape)} dimensions, but "
                f"has {len(removed)}"
            )
        if math.prod(shape) > np.iinfo(np.int64).max:
            raise ValueError(f"{at} must be an array, but no array has the shape {shape}")
        for size, own in zip(shape, removed):
            for index in (min(own), max(own)) if own else ():
                schemas.whole(high=size - 1)(index, schemas.below(at, "removed"))
            flags += size if own else 0
    if flags > _MOST:
        raise ValueError(
            f"{where}: the dimensions that shrink must have at most {_MOST} indices together, but "
            f"have {flags}"
        )


def _flags(size: int, removed: list[int]) -> np.ndarray:
    """Returns bools [size], False where removed."""
    if not removed:
        return np.broadcast_to(True, size)  # takes no memory
    kept = np.ones(size, bool)
    kept[removed] = False
    return kept
