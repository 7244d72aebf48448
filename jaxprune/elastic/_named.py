"""Elastic networks by name: the residual networks of `models`, and `models.mbconv`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.typing import DTypeLike

from jaxprune import models, structure, trees
from jaxprune.elastic._extracting import Extracted
from jaxprune.elastic._gates import Space, make_space
from jaxprune.models.mbconv import default_blocks
from jaxprune.models.widths import ARCHITECTURES

_STATE = "model_state"
_STEP = 4  # widths are multiples of it


def named(
    name: str,
    *,
    image_size: int = 28,
    in_channels: int = 1,
    num_classes: int = 10,
    widths: Sequence[float] = (0.5, 0.75, 1.0),
    streams: Sequence[float] = (1.0,),
    windows: Sequence[int] = (3, 5, 7),
    resolutions: Sequence[int] = (),
    dtype: DTypeLike = jnp.float32,
    seed: int = 0,
) -> Space:
    """Makes the elastic network of a name.

    In every stage the first block remains and any number of the others may be skipped. Each block
    has its own width: that of its inner convolutions, or how far an inverted residual expands.

    Args:
        name: a residual network of `models`, such as "resnet20", or "mbconv".
        image_size: height and width of the images.
        in_channels: their channels.
        num_classes: number of logits.
        widths: fractions of the inner channels of a block, 1 last; rounded to multiples of 4.
        streams: fractions of the channels on the residual stream of a stage, 1 last.
        windows: sizes of the depthwise kernels of "mbconv", at most 7.
        resolutions: sizes of images to train and run with; empty for `image_size` alone.
        dtype: dtype of the computation.
        seed: of the initial parameters.

    Returns:
        A `Space`; its variables are those of `structure.from_nnx`, with "params" and "model_state".

    Raises:
        ValueError: if the name is unknown, or fractions are not in (0, 1] with 1 at the end.

    Example:
        >>> from jaxprune.elastic import count
        >>> space = named("resnet20", image_size=8)
        >>> [(own.name, own.options) for own in space.decisions][2:4]
        [('stage2', (0, 1, 2)), ('blocks/0', (8, 12, 16))]
        >>> count(space.decisions) == (3 + 9 + 27) ** 3
        True
    """
    for argument, fractions in (("widths", widths), ("streams", streams)):
        if not fractions or max(fractions) != 1 or min(fractions) <= 0:
            raise ValueError(
                f"`{argument}` must be fractions in (0, 1] with 1 among them; got {fractions}."
            )
    if name not in ARCHITECTURES and name != "mbconv":
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"`name` must be mbconv or one of {known}; got {name!r}.")
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "dtype": dtype,
    }
    model = getattr(models, name)(**options, rngs=nnx.Rngs(seed))
    pure = structure.from_nnx(model, state=_STATE)
    images = jnp.zeros((2, image_size, image_size, in_channels))
    groups = structure.find_groups(
        pure.traces(images), pure.variables, parameters=pure.is_parameter
    )
    layers, stream = _layers(name)
    stages = _stages(model)
    shared = {  # name of a decision -> the groups that share it
        f"blocks/{b}": tuple(
            _group_of(groups, f"params/blocks/{b}/{layer}/kernel", 3) for layer in layers
        )
        for b in range(len(model.blocks))
    }
    fractions = dict.fromkeys(shared, widths)
    for number, own in enumerate(stages if len(streams) > 1 else ()):
        # The channels of a stream are those that the first block of its stage puts on it.
        group = _group_of(groups, f"params/blocks/{own[0]}/{stream}/kernel", 3)
        shared[f"stream{number}"] = (group,)
        fractions[f"stream{number}"] = streams
    kernels = {}
    if name == "mbconv" and len(windows) > 1:
        kernels = {
            f"params/blocks/{b}/depthwise/conv/kernel": tuple(windows)
            for b in range(len(model.blocks))
        }
    space = make_space(
        groups,
        pure.variables,
        pure.evaluate,
        pure.train,
        widths={
            names: _rounded(groups[names[0]].size, fractions[key]) for key, names in shared.items()
        },
        depths={
            f"stage{s}": [_block_of(groups, b) for b in own[1:]]
            for s, own in enumerate(stages)
            if len(own) > 1
        },
        kernels=kernels,
        resolutions=resolutions,
    )
    short = {names[0]: key for key, names in shared.items()}
    short |= {path: f"{path.split('/', 1)[1].split('/depthwise')[0]}/window" for path in kernels}
    decisions = tuple(own._replace(name=short.get(own.name, own.name)) for own in space.decisions)
    build = functools.partial(_build, name, options, stages)
    return space._replace(decisions=decisions, build=build)


def _layers(name: str) -> tuple[list[str], str]:
    """Returns the layers inside a block that share a width, and the one that ends it."""
    if name == "mbconv":
        return ["expand/conv"], "project/conv"
    if ARCHITECTURES[name].bottleneck:
        return ["conv1", "conv2"], "conv3"
    return ["conv1"], "conv2"


def _stages(model: Any) -> list[list[int]]:
    """Returns the numbers of the blocks of each stage."""
    if isinstance(model, models.MBConv):
        starts = [index for index, block in enumerate(model.shapes) if not block.shortcut]
    else:
        depths = ARCHITECTURES[model.name].depths
        starts = [sum(depths[:stage]) for stage in range(len(depths))]
    stops = [*starts[1:], len(model.blocks)]
    return [list(range(*own)) for own in zip(starts, stops, strict=True)]


def _rounded(size: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """Returns fractions of a width as multiples of 4, at least 4, without repetition."""
    step = min(_STEP, size)
    counts = {min(size, max(step, round(size * own / step) * step)) for own in fractions if own < 1}
    return tuple(sorted({*counts, size}))


def _group_of(groups: structure.Groups, path: str, dimension: int) -> str:
    """Returns the group that a dimension of a leaf belongs to."""
    return next(
        name
        for name, group in groups.items()
        if any((own.path, own.dimension) == (path, dimension) for own in group.members)
    )


def _block_of(groups: structure.Groups, number: int) -> str:
    """Returns the residual branch that is a block of the network."""
    start = f"blocks/{number}/"
    return next(
        name
        for name, block in groups.blocks.items()
        if all(own.path.split("/", 1)[1].startswith(start) for own in block.members)
    )


def _build(
    name: str, options: dict[str, Any], stages: Sequence[Sequence[int]], extracted: Extracted
) -> Any:
    """Builds a network of the widths, depths and windows of a sub-network, with its values."""
    leaves = {
        path: leaf
        for path, leaf in trees.leaf_by_path(extracted.crop()).items()
        if leaf is not None
    }
    numbers = {int(path.split("/")[2]) for path in leaves if path.startswith("params/blocks/")}
    place = {number: index for index, number in enumerate(sorted(numbers))}
    own: dict[str, dict[str, Any]] = {"params": {}, _STATE: {}}
    for path, leaf in leaves.items():
        kind, *rest = path.split("/")
        if rest[0] == "blocks":
            if int(rest[1]) not in place:
                continue
            rest[1] = str(place[int(rest[1])])
        own[kind]["/".join(rest)] = leaf

    def shape(path: str) -> tuple[int, ...]:
        return np.shape(own["params"][path])

    if name == "mbconv":
        dense = default_blocks()
        blocks = [
            models.MBBlock(
                shape(f"blocks/{index}/expand/conv/kernel")[-1],
                shape(f"blocks/{index}/project/conv/kernel")[-1],
                shape(f"blocks/{index}/depthwise/conv/kernel")[0],
                *dense[number][3:],
            )
            for number, index in place.items()
        ]
        stem, head = shape("stem/conv/kernel")[-1], shape("last/conv/kernel")[-1]
        model: Any = models.MBConv(blocks, stem=stem, head=head, **options, rngs=nnx.Rngs(0))
    else:
        depths = [sum(number in place for number in stage) for stage in stages]
        widths = models.widths_of(own["params"])
        model = models.ResNet(name, widths=widths, depths=depths, **options, rngs=nnx.Rngs(0))
    _load(model, nnx.Param, own["params"])
    _load(model, nnx.BatchStat, own[_STATE])
    model.eval()
    return model


def _load(model: Any, kind: Any, values: dict[str, Any]) -> None:
    """Puts values into the variables of a module, by path."""
    paths = {
        "/".join(map(str, path)): path for path, _ in nnx.to_flat_state(nnx.state(model, kind))
    }
    new = {paths[name]: jnp.asarray(leaf) for name, leaf in values.items()}
    nnx.update(model, traverse_util.unflatten_dict(new))
