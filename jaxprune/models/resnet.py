"""Residual networks in Flax NNX, for small (CIFAR) and large (ImageNet) images.

The widths of every block are data, so a network with removed channels is described as exactly as
the original. Strides and projections are decided by the position of a block and never guessed from
shapes: a width that happens to match must not make a projection disappear.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxprune.models._layers import (
    ConvNorm,
    Layers,
    check_arguments,
    check_images,
    make_layers,
)
from jaxprune.models.widths import (
    ARCHITECTURES,
    Widths,
    architecture_of,
    checked_widths,
    default_widths,
    positions,
)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions around a shortcut; `widths` is (mid, out)."""

    def __init__(
        self, layers: Layers, in_width: int, widths: tuple[int, ...], stride: int, project: bool
    ):
        mid, out = widths
        self.conv1 = layers.conv(in_width, mid, 3, stride)
        self.norm1 = layers.norm(mid)
        self.conv2 = layers.conv(mid, out, 3)
        self.norm2 = layers.norm(out, scale=0.0)
        self.projection = ConvNorm(layers, in_width, out, 1, stride) if project else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.projection is None else self.projection(x)))


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; `widths` is (mid1, mid2, out)."""

    def __init__(
        self, layers: Layers, in_width: int, widths: tuple[int, ...], stride: int, project: bool
    ):
        mid1, mid2, out = widths
        self.conv1 = layers.conv(in_width, mid1, 1)
        self.norm1 = layers.norm(mid1)
        self.conv2 = layers.conv(mid1, mid2, 3, stride)
        self.norm2 = layers.norm(mid2)
        self.conv3 = layers.conv(mid2, out, 1)
        self.norm3 = layers.norm(out, scale=0.0)
        self.projection = ConvNorm(layers, in_width, out, 1, stride) if project else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return nnx.relu(y + (x if self.projection is None else self.projection(x)))


class ResNet(nnx.Module):
    """A residual network by name; `resnet20(...)` is `ResNet("resnet20", ...)`.

    Networks for small images (resnet8/20/32/56/110) have a 3x3 stem and three stages. Networks for
    large images (resnet18/34/50/101, "v1.5") have a 7x7 stem of stride 2, a 3x3 max-pool of stride
    2 and four stages. Both end with the global average and a linear classifier. Every stage after
    the first halves the image in its first block, in a 3x3 convolution. The shortcut of a stage's
    first block is a 1x1 projection with normalisation ("option B"), except in the first stage of a
    network of basic blocks.

    A new network is in training mode: batch normalisation uses the batch and moves its running
    statistics by a tenth. `eval()` and `train()` change the mode. Parameters (`nnx.Param`) and
    statistics (`nnx.BatchStat`) are float32, at paths such as `stem/conv/kernel`,
    `blocks/3/conv1/kernel`, `blocks/3/projection/norm/scale` and `head/kernel`.

    Under `jax.jit` a batch may be sharded in any way: statistics are those of the whole batch.
    Inside `jax.shard_map`, name the mapped axis to get the same statistics.

    Args:
        name: name of the network, such as "resnet20".
        num_classes: number of logits; None for 10 (small images) or 1000 (large images).
        in_channels: channels of the images.
        widths: channels of each layer; None for `default_widths(name, depths=depths)`.
        depths: number of blocks in each stage, at least 1; None for those of the name.
        dtype: dtype of the computation; with bfloat16, parameters, statistics and logits remain
            float32.
        axis_name: mapped axis over which to average batch statistics, only inside `jax.shard_map`.
        rngs: source of the initial parameters (stream `params`).

    Raises:
        ValueError: if `name` is unknown, a number is not positive, or `widths` or `depths` does not
            fit the network; it lists every wrong block.
        TypeError: if `dtype` is not floating.

    Example:
        >>> thin = Widths(stem=4, blocks=((2, 4), (3, 8), (5, 16)))
        >>> model = ResNet("resnet8", widths=thin, rngs=nnx.Rngs(0))
        >>> logits = nnx.jit(ResNet.__call__)(model, jnp.ones((2, 8, 8, 3)))
        >>> logits.shape, bool((model.stem.norm.mean[...] == 0).all())  # statistics moved
        ((2, 10), False)
        >>> model.eval()  # from now on they are used and do not change
        >>> ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))][:2]
        ['blocks/0/conv1/kernel', 'blocks/0/conv2/kernel']

    References:
        He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. arXiv:1512.03385.
        He, Zhang, Ren, Sun. Delving Deep into Rectifiers (He-normal kernels). arXiv:1502.01852.
        Ioffe, Szegedy. Batch Normalization. arXiv:1502.03167.
        Goyal et al. Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour (the last norm scale
        of each block starts at zero; the stride sits in the 3x3 convolution). arXiv:1706.02677.
    """

    def __init__(
        self,
        name: str,
        *,
        num_classes: int | None = None,
        in_channels: int = 3,
        widths: Widths | None = None,
        depths: Sequence[int] | None = None,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
        rngs: nnx.Rngs,
    ):
        architecture = architecture_of(name, depths)
        num_classes = architecture.num_classes if num_classes is None else num_classes
        dtype = check_arguments(num_classes, in_channels, dtype)
        layers = make_layers(dtype=dtype, axis_name=axis_name, rngs=rngs)
        self.name = name
        self.in_channels = in_channels
        self.large_images = architecture.large_images
        widths = default_widths(name, depths=depths) if widths is None else widths
        self.widths = checked_widths(name, widths, depths)

        stem = self.widths.stem
        self.stem = ConvNorm(layers, in_channels, stem, *((7, 2) if self.large_images else (3, 1)))
        inputs = (stem, *(block[-1] for block in self.widths.blocks))
        block_of = Bottleneck if architecture.bottleneck else BasicBlock
        self.blocks = nnx.List(
            block_of(layers, in_width, block, stride, project)
            for in_width, block, (_, stride, project) in zip(
                inputs, self.widths.blocks, positions(architecture), strict=False
            )
        )
        self.head = nnx.Linear(inputs[-1], num_classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns float32 logits [B, num_classes] of normalised images, floating [B, H, W, C]."""
        check_images(images, self.in_channels)
        x = nnx.relu(self.stem(images))
        if self.large_images:
            padding: Any = ((1, 1), (1, 1))  # Any: flax annotates `str` and documents pairs
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


class Constructor(Protocol):
    """A function that builds a named network; its keywords are those of `ResNet`."""

    def __call__(
        self,
        *,
        num_classes: int = ...,
        in_channels: int = 3,
        widths: Widths | None = None,
        depths: Sequence[int] | None = None,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
        rngs: nnx.Rngs,
    ) -> ResNet: ...


_DOCSTRING = """Builds a {title} for {images} images: {blocks} blocks, {parameters} parameters.

Args: those of `ResNet`.

Returns:
    A `ResNet` in training mode.

Raises:
    ValueError, TypeError: as for `ResNet`.

Example:
    >>> model = nnx.eval_shape(lambda: {name}(rngs=nnx.Rngs(0)))  # shapes, no arrays
    >>> f"{{sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))):,}}"
    '{parameters}'

References:
    He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. arXiv:1512.03385.
"""


def _constructor(name: str) -> Constructor:
    """Makes the function `name`, with signature and docstring."""
    architecture = ARCHITECTURES[name]

    def construct(
        *,
        num_classes: int = architecture.num_classes,
        in_channels: int = 3,
        widths: Widths | None = None,
        depths: Sequence[int] | None = None,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
        rngs: nnx.Rngs,
    ) -> ResNet:
        return ResNet(
            name,
            num_classes=num_classes,
            in_channels=in_channels,
            widths=widths,
            depths=depths,
            dtype=dtype,
            axis_name=axis_name,
            rngs=rngs,
        )

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = _DOCSTRING.format(
        name=name,
        title=name.replace("resnet", "ResNet-"),
        images="large (ImageNet)" if architecture.large_images else "small (CIFAR)",
        blocks=" + ".join(map(str, architecture.depths))
        + (" bottleneck" if architecture.bottleneck else " basic"),
        parameters=architecture.parameters,
    )
    return construct


resnet8 = _constructor("resnet8")
resnet20 = _constructor("resnet20")
resnet32 = _constructor("resnet32")
resnet56 = _constructor("resnet56")
resnet110 = _constructor("resnet110")
resnet18 = _constructor("resnet18")
resnet34 = _constructor("resnet34")
resnet50 = _constructor("resnet50")
resnet101 = _constructor("resnet101")
