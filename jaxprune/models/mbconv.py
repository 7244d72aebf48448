"""A network of inverted residuals for small images, described block by block.

Widths, windows, strides and shortcuts are all data, so a sub-network of an elastic network is a
network of the same class with a shorter or thinner list of blocks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxprune import trees
from jaxprune.models._layers import ConvNorm, check_arguments, check_images, make_layers
from jaxprune.models.mobilenet import InvertedResidual
from jaxprune.models.widths import Place

__all__ = ["MBBlock", "MBConv", "mbconv"]


class MBBlock(NamedTuple):
    """An inverted residual: 1x1 convolution, depthwise convolution, 1x1 convolution.

    Example:
        >>> MBBlock(expanded=96, out=24, window=7, stride=1, shortcut=False).window
        7
    """

    expanded: int  # channels of the depthwise convolution
    out: int
    window: int  # of the depthwise convolution, odd
    stride: int
    shortcut: bool  # whether the input is added to the output


_STEM, _HEAD = 16, 160
# Stages: output channels, number of blocks, stride of the first; each block expands 6 times.
_STAGES = ((24, 3, 1), (40, 3, 2))


def default_blocks() -> tuple[MBBlock, ...]:
    """Returns the blocks of `mbconv`: two stages of three blocks with windows of 7 x 7.

    Example:
        >>> [block.expanded for block in default_blocks()]
        [96, 144, 144, 144, 240, 240]
    """
    blocks, stream = [], _STEM
    for out, depth, stride in _STAGES:
        for index in range(depth):
            first = index == 0
            blocks.append(MBBlock(6 * stream, out, 7, stride if first else 1, not first))
            stream = out
    return tuple(blocks)


class MBConv(nnx.Module):
    """A 3x3 stem of stride 2, inverted residuals, a 1x1 convolution, the average, a classifier.

    Modes, dtypes and sharding are those of `ResNet`, padding and paths those of `MobileNet`, such
    as `blocks/3/depthwise/conv/kernel`.

    Args:
        blocks: the blocks; None for those of `mbconv`.
        stem: channels of the first convolution.
        head: channels of the last convolution.
        num_classes: number of logits.
        in_channels: channels of the images.
        dtype: dtype of the computation; parameters, statistics and logits remain float32.
        axis_name: mapped axis over which to average batch statistics, only inside `jax.shard_map`.
        rngs: source of the initial parameters (stream `params`).

    Raises:
        ValueError: if a number is not positive, a window is even, or a block with a shortcut
            changes shape; it lists every wrong block.
        TypeError: if `dtype` is not floating.

    Example:
        >>> blocks = [MBBlock(12, 8, 3, 1, False), MBBlock(16, 8, 5, 1, True)]
        >>> model = MBConv(blocks, stem=4, head=16, in_channels=1, rngs=nnx.Rngs(0))
        >>> nnx.jit(MBConv.__call__)(model, jnp.ones((2, 8, 8, 1))).shape
        (2, 10)

    References:
        Sandler et al. MobileNetV2: Inverted Residuals and Linear Bottlenecks. arXiv:1801.04381.
        Cai et al. Once-for-All. arXiv:1908.09791 (windows of up to 7 x 7).
    """

    def __init__(
        self,
        blocks: Sequence[MBBlock] | None = None,
        *,
        stem: int = _STEM,
        head: int = _HEAD,
        num_classes: int = 10,
        in_channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
        rngs: nnx.Rngs,
    ):
        dtype = check_arguments(num_classes, in_channels, dtype)
        own = default_blocks() if blocks is None else tuple(MBBlock(*block) for block in blocks)
        _check_blocks(own, stem, head)
        layers = make_layers(padding="SAME", dtype=dtype, axis_name=axis_name, rngs=rngs)
        self.shapes = own
        self.in_channels = in_channels
        inputs = (stem, *(block.out for block in own))
        self.stem = ConvNorm(layers, in_channels, stem, 3, 2)
        self.blocks = nnx.List(
            InvertedResidual(layers, in_width, (block.expanded, block.out), _place(block))
            for in_width, block in zip(inputs, own, strict=False)
        )
        self.last = ConvNorm(layers, inputs[-1], head, 1)
        self.head = nnx.Linear(head, num_classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns float32 logits [B, num_classes] of normalised images, floating [B, H, W, C]."""
        check_images(images, self.in_channels)
        x = nnx.relu6(self.stem(images))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu6(self.last(x))
        return self.head(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


def mbconv(**options: Any) -> MBConv:
    """Builds the network of inverted residuals for images of about 28 x 28 pixels.

    Args:
        **options: the keywords of `MBConv`; `rngs` is needed.

    Returns:
        An `MBConv` in training mode.

    Raises:
        ValueError, TypeError: as for `MBConv`.

    Example:
        >>> model = nnx.eval_shape(lambda: mbconv(in_channels=1, rngs=nnx.Rngs(0)))
        >>> f"{sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))):,}"
        '127,594'

    References:
        See `MBConv`.
    """
    return MBConv(**options)


def _place(block: MBBlock) -> Place:
    """Returns what an inverted residual is built from."""
    return Place(block.window, block.stride, block.shortcut, (block.expanded, block.out))


def _check_blocks(blocks: Sequence[MBBlock], stem: int, head: int) -> None:
    """Raises one error that lists all that is wrong."""
    problems = [f"{name}: {n!r}" for name, n in (("stem", stem), ("head", head)) if n < 1]
    stream = stem
    for index, block in enumerate(blocks):
        if min(block[:4]) < 1 or block.window % 2 == 0:
            problems.append(f"blocks/{index}: {block}, numbers must be positive and `window` odd")
        if block.shortcut and (block.out != stream or block.stride != 1):
            problems.append(f"blocks/{index}: {block}, its input has {stream} channels, stride 1")
        stream = block.out
    rule = "blocks with a shortcut keep channels and size"
    trees.raise_for(problems, f"`blocks`, `stem` and `head` must make a network; {rule}:")
