"""The architectures of the residual networks as data: names, depths and widths."""

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from jaxprune import trees

__all__ = ["Widths", "default_widths", "widths_of"]


class Widths(NamedTuple):
    """The output channels of the stem and of every convolution in every block.

    Lists and integers of any kind are accepted where a network is built, so widths can be stored as
    JSON. The last width of a block is that of the residual stream, hence the same for all blocks
    between two projections; the widths before it are free.

    Example:
        >>> import json
        >>> from flax import nnx
        >>> from jaxprune.models import resnet8
        >>> text = json.dumps(Widths(4, ((2, 4), (3, 8), (5, 16)))._asdict())
        >>> text
        '{"stem": 4, "blocks": [[2, 4], [3, 8], [5, 16]]}'
        >>> resnet8(widths=Widths(**json.loads(text)), rngs=nnx.Rngs(0)).widths
        Widths(stem=4, blocks=((2, 4), (3, 8), (5, 16)))
    """

    stem: int
    blocks: tuple[tuple[int, ...], ...]  # basic: (mid, out); bottleneck: (mid1, mid2, out)


class Architecture(NamedTuple):
    """The properties that a name decides and widths do not."""

    bottleneck: bool  # whether blocks are 1x1, 3x3 and 1x1 convolutions, not two 3x3 ones
    depths: tuple[int, ...]  # number of blocks in each stage
    base: int  # default width of the stem and of the first stage; it doubles with each stage
    large_images: bool  # whether the stem is a 7x7/2 convolution and a 3x3/2 max-pool, not 3x3
    num_classes: int  # default number of classes
    parameters: str  # number of parameters of the default network, for the docstring


ARCHITECTURES = {
    "resnet8": Architecture(False, (1, 1, 1), 16, False, 10, "78,042"),
    "resnet20": Architecture(False, (3, 3, 3), 16, False, 10, "272,474"),
    "resnet32": Architecture(False, (5, 5, 5), 16, False, 10, "466,906"),
    "resnet56": Architecture(False, (9, 9, 9), 16, False, 10, "855,770"),
    "resnet110": Architecture(False, (18, 18, 18), 16, False, 10, "1,730,714"),
    "resnet18": Architecture(False, (2, 2, 2, 2), 64, True, 1000, "11,689,512"),
    "resnet34": Architecture(False, (3, 4, 6, 3), 64, True, 1000, "21,797,672"),
    "resnet50": Architecture(True, (3, 4, 6, 3), 64, True, 1000, "25,557,032"),
    "resnet101": Architecture(True, (3, 4, 23, 3), 64, True, 1000, "44,549,160"),
}


def architecture_of(name: str) -> Architecture:
    """Returns the row of the table; raises an error that lists the names if there is none."""
    if name not in ARCHITECTURES:
        raise ValueError(f"`name` must be one of {', '.join(ARCHITECTURES)}; got {name!r}.")
    return ARCHITECTURES[name]


def positions(architecture: Architecture) -> Iterator[tuple[int, int, bool]]:
    """Yields stage, stride and "has a projection" of each block, from its position alone."""
    # A bottleneck widens the stream in the first stage too; basic blocks keep the stem's width.
    first_projection = 0 if architecture.bottleneck else 1
    for stage, depth in enumerate(architecture.depths):
        for index in range(depth):
            first = index == 0
            yield stage, 2 if first and stage > 0 else 1, first and stage >= first_projection


def default_widths(name: str) -> Widths:
    """Returns the published widths of a network, as a start for different ones.

    Args:
        name: a network of this module, such as "resnet20".

    Returns:
        Its `Widths`.

    Raises:
        ValueError: if `name` is unknown.

    Example:
        >>> default_widths("resnet8")
        Widths(stem=16, blocks=((16, 16), (32, 32), (64, 64)))
        >>> default_widths("resnet50").blocks[0]
        (64, 64, 256)
    """
    architecture = architecture_of(name)
    base = architecture.base

    def block(width: int) -> tuple[int, ...]:
        bottleneck = architecture.bottleneck
        return (width, width, 4 * width) if bottleneck else (width, width)

    return Widths(base, tuple(block(base * 2**s) for s, _, _ in positions(architecture)))


def widths_of(params: Any) -> Widths:
    """Reads the widths of a network from its parameters, such as compacted ones.

    A compacted network runs as the function of `Plan.wrap`. A network of these widths with the
    compacted values computes the same as an ordinary module.

    Args:
        params: nested dict of the parameters of a `ResNet`, or its `nnx.State`.

    Returns:
        Its `Widths`.

    Raises:
        ValueError: if parameters of such a network are missing, or a kernel does not have four
            dimensions; it lists all of them.

    Example:
        >>> from flax import nnx
        >>> from jaxprune.models import resnet8
        >>> thin = resnet8(widths=Widths(4, ((2, 4), (3, 8), (5, 16))), rngs=nnx.Rngs(0))
        >>> small = nnx.to_pure_dict(nnx.state(thin, nnx.Param))  # or from `plan.compact`
        >>> widths_of(small)
        Widths(stem=4, blocks=((2, 4), (3, 8), (5, 16)))
        >>> model = resnet8(widths=widths_of(small), rngs=nnx.Rngs(0))
        >>> nnx.update(model, small)  # update the running statistics in the same way
    """
    shapes = {path: np.shape(leaf) for path, leaf in trees.leaf_by_path(params).items()}
    numbers = {path.split("/")[1] for path in shapes if path.startswith("blocks/")}
    depth = max([1, *(int(number) + 1 for number in numbers if number.isdigit())])
    layers = 3 if any(path.endswith("/conv3/kernel") for path in shapes) else 2
    stem = "stem/conv/kernel"
    kernels = [[f"blocks/{b}/conv{i + 1}/kernel" for i in range(layers)] for b in range(depth)]
    problems = []
    for path in (stem, *(path for block in kernels for path in block)):
        if path not in shapes:
            problems.append(f"{path}: missing")
        elif len(shapes[path]) != 4:
            problems.append(f"{path}: shape {shapes[path]}, must be [height, width, in, out]")
    rule = 'a ResNet, such as `small["params"]` of compacted variables:'
    trees.raise_for(problems, f"`params` must be the parameters of {rule}")
    blocks = tuple(tuple(shapes[path][-1] for path in block) for block in kernels)
    return Widths(shapes[stem][-1], blocks)


def checked_widths(name: str, widths: Widths) -> Widths:
    """Returns plain integers in tuples; raises one error that lists all that is wrong."""
    architecture = architecture_of(name)
    fields = ("mid1", "mid2", "out") if architecture.bottleneck else ("mid", "out")
    blocks, places = tuple(widths.blocks), tuple(positions(architecture))
    problems = []

    def positive(width: object) -> bool:
        return isinstance(width, Integral) and not isinstance(width, bool) and int(width) > 0

    if not positive(widths.stem):
        problems.append(f"stem: {widths.stem!r} must be a positive integer")
    if len(blocks) != len(places):
        problems.append(f"blocks: there are {len(blocks)}; give {len(places)}, one per block")
    stream, source = widths.stem, "stem"
    for index, (block, (_, _, project)) in enumerate(zip(blocks, places, strict=False)):
        here = f"blocks/{index}"
        if not isinstance(block, Sequence) or len(block) != len(fields):
            problems.append(f"{here}: {block!r} must be ({', '.join(fields)})")
            continue
        problems += [
            f"{here}: {field} = {width!r} must be a positive integer"
            for field, width in zip(fields, block, strict=True)
            if not positive(width)
        ]
        if project:
            stream, source = block[-1], here
        elif block[-1] != stream and len(blocks) == len(places):
            problems.append(
                f"{here}: out = {block[-1]!r} must be {stream!r} as in {source}, as the block has "
                f"no projection; set it to {stream!r}, or change {source} and all blocks after it"
            )
    if problems:
        raise ValueError(f"`widths` does not fit {name}:\n  " + "\n  ".join(problems))
    return Widths(int(widths.stem), tuple(tuple(int(w) for w in block) for block in blocks))
