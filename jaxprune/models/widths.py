"""Widths as data, read from parameters, and the architectures of convolutional networks."""

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from jaxprune import trees

__all__ = ["Widths", "default_widths", "layers_of", "widths_of"]


class Widths(NamedTuple):
    """The output channels of the stem and of every convolution in every block.

    Depthwise convolutions have the channels of their input and no width of their own.

    Lists and integers of any kind are accepted where a network is built, so widths can be stored as
    JSON. The last width of a block is that of the residual stream, hence the same for all blocks
    between two projections; the widths before it are free.

    Example:
        >>> import json
        >>> from flax import nnx
        >>> from jaxprune.models import resnet8
        >>> text = json.dumps(Widths(4, ((2, 4), (3, 8), (5, 16)))._asdict())
        >>> text
        '{"stem": 4, "blocks": [[2, 4], [3, 8], [5, 16]], "head": null}'
        >>> resnet8(widths=Widths(**json.loads(text)), rngs=nnx.Rngs(0)).widths.blocks
        ((2, 4), (3, 8), (5, 16))
    """

    stem: int
    # Basic blocks are (mid, out), bottlenecks (mid1, mid2, out), inverted residuals (expanded, out)
    # or (out,), separable convolutions (out,).
    blocks: tuple[tuple[int, ...], ...]
    head: int | None = None  # the 1x1 convolution before the average of MobileNetV2 and later


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


class Place(NamedTuple):
    """What the position of a block decides."""

    size: int  # window of the depthwise convolution
    stride: int
    shortcut: bool  # whether the input is added to the output
    widths: tuple[int, ...]  # published: (out,), or (expanded, out) if the block expands first


class MobileArchitecture(NamedTuple):
    """What the name of a network decides."""

    inverted: bool  # whether blocks are inverted residuals, not separable convolutions
    # Stages: expansion, output channels, number of blocks, stride of the first, window.
    stages: tuple[tuple[int, int, int, int, int], ...]
    head: int | None  # channels of the 1x1 convolution before the average
    momentum: float
    epsilon: float


MOBILE = {
    "mobilenet_v1": MobileArchitecture(
        inverted=False,
        stages=(
            (1, 64, 1, 1, 3),
            (1, 128, 2, 2, 3),
            (1, 256, 2, 2, 3),
            (1, 512, 6, 2, 3),
            (1, 1024, 2, 2, 3),
        ),
        head=None,
        momentum=0.99,
        epsilon=1e-3,
    ),
    "mobilenet_v2": MobileArchitecture(
        inverted=True,
        stages=(
            (1, 16, 1, 1, 3),
            (6, 24, 2, 2, 3),
            (6, 32, 3, 2, 3),
            (6, 64, 4, 2, 3),
            (6, 96, 3, 1, 3),
            (6, 160, 3, 2, 3),
            (6, 320, 1, 1, 3),
        ),
        head=1280,
        momentum=0.99,
        epsilon=1e-3,
    ),
    "efficientnet_lite0": MobileArchitecture(
        inverted=True,
        stages=(
            (1, 16, 1, 1, 3),
            (6, 24, 2, 2, 3),
            (6, 40, 2, 2, 5),
            (6, 80, 3, 2, 3),
            (6, 112, 3, 1, 5),
            (6, 192, 4, 2, 5),
            (6, 320, 1, 1, 3),
        ),
        head=1280,
        momentum=0.99,
        epsilon=1e-3,
    ),
}
_MOBILE_STEM = 32


def mobile_places(name: str) -> list[Place]:
    """Returns the places of a network's blocks; raises an error that lists the names."""
    if name not in MOBILE:
        raise ValueError(f"`name` must be one of {', '.join(MOBILE)}; got {name!r}.")
    architecture, places, stream = MOBILE[name], [], _MOBILE_STEM
    for expansion, out, depth, first_stride, size in architecture.stages:
        for index in range(depth):
            stride = first_stride if index == 0 else 1
            shortcut = architecture.inverted and stride == 1 and stream == out
            widths = (out,) if expansion == 1 else (expansion * stream, out)
            places.append(Place(size, stride, shortcut, widths))
            stream = out
    return places


def architecture_of(name: str, depths: Sequence[int] | None = None) -> Architecture:
    """Returns the row of the table, with other depths of the stages if they are given.

    It raises an error that lists the names if there is no such row.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"`name` must be one of {', '.join(ARCHITECTURES)}; got {name!r}.")
    architecture = ARCHITECTURES[name]
    if depths is None:
        return architecture
    stages = len(architecture.depths)
    if len(depths) != stages or not all(isinstance(d, Integral) and int(d) > 0 for d in depths):
        raise ValueError(
            f"`depths` of {name} must be {stages} positive integers, the blocks of each stage; got "
            f"{tuple(depths)}. The first block of a stage cannot be left out."
        )
    return architecture._replace(depths=tuple(int(depth) for depth in depths))


def positions(architecture: Architecture) -> Iterator[tuple[int, int, bool]]:
    """Yields stage, stride and "has a projection" of each block, from its position alone."""
    # A bottleneck widens the stream in the first stage too; basic blocks keep the stem's width.
    first_projection = 0 if architecture.bottleneck else 1
    for stage, depth in enumerate(architecture.depths):
        for index in range(depth):
            first = index == 0
            yield stage, 2 if first and stage > 0 else 1, first and stage >= first_projection


def default_widths(
    name: str, multiplier: float = 1.0, *, depths: Sequence[int] | None = None
) -> Widths:
    """Returns the published widths of a network, as a start for different ones.

    Args:
        name: a network of `models`, such as "resnet20" or "mobilenet_v2".
        multiplier: factor of the widths of MobileNet V1 and V2, which are then rounded to multiples
            of 8 as their authors do; below 1 the last 1x1 convolution of V2 keeps its width.
        depths: number of blocks in each stage of a `ResNet`; None for the published ones.

    Returns:
        Its `Widths`.

    Raises:
        ValueError: if `name` is unknown, `depths` are not those of a ResNet, or `multiplier` is not
            positive or does not apply.

    Example:
        >>> default_widths("resnet8").blocks
        ((16, 16), (32, 32), (64, 64))
        >>> default_widths("resnet50").blocks[0]
        (64, 64, 256)
        >>> default_widths("mobilenet_v2").blocks[:3]
        ((16,), (96, 24), (144, 24))
        >>> default_widths("mobilenet_v2", 0.5).blocks[:3]
        ((8,), (48, 16), (96, 16))
    """
    scales = name in ("mobilenet_v1", "mobilenet_v2")
    if not 0 < multiplier < np.inf or (multiplier != 1 and not scales):
        raise ValueError(
            "`multiplier` must be positive, and 1 for networks other than mobilenet_v1 and "
            f"mobilenet_v2; got {multiplier} for {name}: give `Widths(...)` instead."
        )
    if name in MOBILE:
        blocks = tuple(place.widths for place in mobile_places(name))
        published = Widths(_MOBILE_STEM, blocks, MOBILE[name].head)
        return published if multiplier == 1 else _mobile_widths(name, multiplier)
    architecture = architecture_of(name, depths)
    base = architecture.base

    def block(width: int) -> tuple[int, ...]:
        bottleneck = architecture.bottleneck
        return (width, width, 4 * width) if bottleneck else (width, width)

    return Widths(base, tuple(block(base * 2**s) for s, _, _ in positions(architecture)))


def _mobile_widths(name: str, multiplier: float) -> Widths:
    """Scales the published widths of a network for phones."""

    def scaled(width: int) -> int:
        """Returns the nearest multiple of 8 that is not more than a tenth less."""
        found = max(8, int(width * multiplier + 4) // 8 * 8)
        return found + 8 if found < 0.9 * width * multiplier else found

    published, stream, blocks = _MOBILE_STEM, scaled(_MOBILE_STEM), []
    for place in mobile_places(name):
        *expanded, out = place.widths
        # A block expands its input, which is rounded already.
        mid = [width // published * stream for width in expanded]
        published, stream = out, scaled(out)
        blocks.append((*mid, stream))
    head = MOBILE[name].head
    return Widths(
        scaled(_MOBILE_STEM),
        tuple(blocks),
        None if head is None else max(head, scaled(head)),
    )


def widths_of(params: Any) -> Widths:
    """Reads the widths of a convolutional network from its parameters, such as compacted ones.

    A compacted network runs as the function of `Plan.wrap`. A network of these widths with the
    compacted values computes the same as an ordinary module.

    Args:
        params: nested dict of the parameters of a `ResNet` or a `MobileNet`, or its `nnx.State`.

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
        >>> widths_of(small).blocks
        ((2, 4), (3, 8), (5, 16))
        >>> model = resnet8(widths=widths_of(small), rngs=nnx.Rngs(0))
        >>> nnx.update(model, small)  # update the running statistics in the same way
    """
    shapes = {path: np.shape(leaf) for path, leaf in trees.leaf_by_path(params).items()}
    numbers = {path.split("/")[1] for path in shapes if path.startswith("blocks/")}
    depth = max([1, *(int(number) + 1 for number in numbers if number.isdigit())])
    is_mobile = any(path.endswith("/depthwise/conv/kernel") for path in shapes)
    if is_mobile:
        layers = ["expand/conv", "project/conv"]
    else:
        bottleneck = any(path.endswith("/conv3/kernel") for path in shapes)
        layers = ["conv1", "conv2", "conv3"] if bottleneck else ["conv1", "conv2"]
    stem, head = "stem/conv/kernel", "last/conv/kernel"
    kernels = [[f"blocks/{b}/{layer}/kernel" for layer in layers] for b in range(depth)]
    if is_mobile:  # some blocks do not expand their input
        kernels = [
            [path for path in own if path in shapes or "expand" not in path] for own in kernels
        ]
    wanted = [stem, *(path for block in kernels for path in block), *({head} & set(shapes))]
    problems = []
    for path in wanted:
        if path not in shapes:
            problems.append(f"{path}: missing")
        elif len(shapes[path]) != 4:
            problems.append(f"{path}: shape {shapes[path]}, must be [height, width, in, out]")
    rule = 'a network of `models`, such as `small["params"]` of compacted variables:'
    trees.raise_for(problems, f"`params` must be the parameters of {rule}")
    blocks = tuple(tuple(shapes[path][-1] for path in block) for block in kernels)
    return Widths(shapes[stem][-1], blocks, shapes[head][-1] if head in shapes else None)


def layers_of(params: Any, head_dim: int) -> list[tuple[int, ...]]:
    """Reads the argument `layers` of a transformer from its parameters, such as compacted ones.

    Args:
        params: nested dict of the parameters of a `Decoder`, `Encoder` or `ViT`; None in place of
            what a plan has removed. The layers of a stack are alike.
        head_dim: channels of a head.

    Returns:
        `(heads, kv_heads, mlp)` of each layer of a decoder, `(heads, mlp)` of the other two.

    Raises:
        ValueError: if there are no layers, or those of a stack have lost different parts.

    Example:
        >>> from flax import nnx, traverse_util
        >>> from jaxprune.models import Decoder
        >>> model = Decoder(9, width=8, layers=[(4, 2, 8), (2, 1, 0)], head_dim=2, rngs=nnx.Rngs(0))
        >>> small = nnx.to_pure_dict(nnx.state(model))  # or from `plan.compact`
        >>> layers_of(small, head_dim=2)
        [(4, 2, 8), (2, 1, 0)]
        >>> flat = traverse_util.flatten_dict(small)  # to load them, leave out what is None:
        >>> small = traverse_util.unflatten_dict({k: v for k, v in flat.items() if v is not None})
        >>> nnx.update(model, small)
    """
    layers = params.get("layers", {})
    if not layers:
        raise ValueError("`params` must have `layers`, as those of a transformer of `models` do.")
    if all(isinstance(key, int) or key.isdigit() for key in layers):
        return [_layer(layers[key], head_dim) for key in sorted(layers, key=int)]
    depths = {path: np.shape(leaf)[0] for path, leaf in trees.leaf_by_path(layers).items()}
    if len(set(depths.values())) > 1:
        trees.raise_for(
            [f"layers/{path}: {depth} layers" for path, depth in depths.items()],
            "a stack of `models` must have lost whole layers, but these have different numbers; "
            "use `plan.wrap(function)`, or a list of layers:",
        )
    return [_layer(layers, head_dim)] * next(iter(depths.values()))


def _layer(layer: Any, head_dim: int) -> tuple[int, ...]:
    """Reads the widths of one layer, or of the stack of all."""
    shapes = {path: np.shape(leaf) for path, leaf in trees.leaf_by_path(layer).items()}

    def width(*paths: str) -> int:
        return next((shapes[path][-1] for path in paths if path in shapes), 0)

    heads = width("query/kernel", "attention/query/kernel") // head_dim
    kv_heads = (width("key/kernel") // head_dim,) if "gate" in layer or "key" in layer else ()
    return (heads, *kv_heads, width("up/kernel"))


def checked_widths(name: str, widths: Widths, depths: Sequence[int] | None = None) -> Widths:
    """Returns plain integers in tuples; raises one error that lists all that is wrong."""
    architecture = architecture_of(name, depths)
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


def checked_mobile_widths(name: str, widths: Widths) -> Widths:
    """Returns plain integers in tuples; raises one error that lists all that is wrong."""
    places, head = mobile_places(name), MOBILE[name].head
    blocks, problems = tuple(widths.blocks), []
    if len(blocks) != len(places):
        problems.append(f"blocks: there are {len(blocks)}; give {len(places)}, one per block")
    if (widths.head is None) != (head is None):
        problems.append(f"head: {widths.head!r} must be {'None' if head is None else 'a width'}")
    stream, source = widths.stem, "stem"
    named = [("stem", widths.stem)] + ([] if widths.head is None else [("head", widths.head)])
    for index, (block, place) in enumerate(zip(blocks, places, strict=False)):
        here = f"blocks/{index}"
        fields = ("expanded", "out")[-len(place.widths) :]
        if not isinstance(block, Sequence) or len(block) != len(fields):
            problems.append(f"{here}: {block!r} must be ({', '.join(fields)})")
            continue
        named += [(f"{here}: {f}", width) for f, width in zip(fields, block, strict=True)]
        if not place.shortcut:
            stream, source = block[-1], here
        elif block[-1] != stream:
            problems.append(
                f"{here}: out = {block[-1]!r} must be {stream!r} as in {source}, because the block "
                f"adds its input; set it to {stream!r}, or change {source} and all blocks after it"
            )
    problems += [
        f"{where} = {width!r} must be a positive integer"
        for where, width in named
        if not isinstance(width, Integral) or isinstance(width, bool) or int(width) < 1
    ]
    if problems:
        raise ValueError(f"`widths` does not fit {name}:\n  " + "\n  ".join(problems))
    return Widths(
        int(widths.stem),
        tuple(tuple(int(width) for width in block) for block in blocks),
        None if widths.head is None else int(widths.head),
    )
