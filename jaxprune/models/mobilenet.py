"""Networks for phones in Flax NNX: MobileNet V1 and V2, and EfficientNet-Lite0.

As in `resnet`, widths are data, block by block, and what the position of a block decides (stride,
window, shortcut) is never guessed from a width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxprune.models._layers import ConvNorm, Layers, check_arguments, check_images, make_layers
from jaxprune.models.widths import (
    MOBILE,
    Place,
    Widths,
    checked_mobile_widths,
    default_widths,
    mobile_places,
)

__all__ = ["MobileNet", "efficientnet_lite0", "mobilenet_v1", "mobilenet_v2"]


class Separable(nnx.Module):
    """A depthwise and a 1x1 convolution, each with its normalisation and ReLU6."""

    def __init__(self, layers: Layers, in_width: int, widths: tuple[int, ...], place: Place):
        (out,) = widths
        self.depthwise = ConvNorm(layers, in_width, in_width, place.size, place.stride, in_width)
        self.project = ConvNorm(layers, in_width, out, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu6(self.project(nnx.relu6(self.depthwise(x))))


class InvertedResidual(nnx.Module):
    """A wide depthwise convolution between two 1x1 ones, the last of them linear."""

    def __init__(self, layers: Layers, in_width: int, widths: tuple[int, ...], place: Place):
        *expanded, out = widths
        mid = expanded[0] if expanded else in_width
        self.expand = ConvNorm(layers, in_width, mid, 1) if expanded else None
        self.depthwise = ConvNorm(layers, mid, mid, place.size, place.stride, mid)
        self.project = ConvNorm(layers, mid, out, 1)
        self.shortcut = place.shortcut

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.expand is None else nnx.relu6(self.expand(x))
        y = self.project(nnx.relu6(self.depthwise(y)))
        return x + y if self.shortcut else y


class MobileNet(nnx.Module):
    """A network for phones by name; `mobilenet_v2(...)` is `MobileNet("mobilenet_v2", ...)`.

    A 3x3 stem of stride 2, blocks around depthwise convolutions, a wide 1x1 convolution (not in
    V1), the global average and a linear classifier. There is no dropout.

    With `padding="SYMMETRIC"` and three input channels, runtimes of phones and browsers can skip
    the zeros of pruned 1x1 kernels, see docs/deploy.md.

    Modes, dtypes and sharding are those of `ResNet`. Parameters are at paths such as
    `stem/conv/kernel`, `blocks/3/expand/conv/kernel`, `blocks/3/depthwise/norm/scale`,
    `last/conv/kernel` and `head/kernel`.

    Args:
        name: "mobilenet_v1", "mobilenet_v2" or "efficientnet_lite0".
        num_classes: number of logits.
        in_channels: channels of the images.
        widths: channels of each layer; None for `default_widths(name)`.
        padding: "SAME" pads as TensorFlow does, where the published weights come from: at stride 2
            the end more than the start. "SYMMETRIC" pads both sides by half a window.
        shifted: whether depthwise convolutions are computed as sums of shifted images: on CPU that
            is much faster and equal up to rounding. Leave it False for what counts, analyses or
            exports convolutions.
        dtype: dtype of the computation; parameters, statistics and logits remain float32.
        axis_name: mapped axis over which to average batch statistics, only inside `jax.shard_map`.
        rngs: source of the initial parameters (stream `params`).

    Raises:
        ValueError: if `name` or `padding` is unknown, a number is not positive, or `widths` does
            not fit the network; it lists every wrong block.
        TypeError: if `dtype` is not floating.

    Example:
        >>> thin = default_widths("mobilenet_v1")
        >>> thin = thin._replace(stem=4, blocks=tuple((4 + i % 3,) for i in range(13)))
        >>> model = MobileNet("mobilenet_v1", num_classes=10, widths=thin, rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> nnx.jit(MobileNet.__call__)(model, jnp.ones((2, 32, 32, 3))).shape
        (2, 10)

    References:
        Howard et al. MobileNets. arXiv:1704.04861.
        Sandler et al. MobileNetV2: Inverted Residuals and Linear Bottlenecks. arXiv:1801.04381.
        Tan, Le. EfficientNet. arXiv:1905.11946. The "lite" networks have ReLU6 and no
        squeeze-and-excitation; their stem and last layer do not scale.
    """

    def __init__(
        self,
        name: str,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        widths: Widths | None = None,
        padding: str = "SAME",
        shifted: bool = False,
        dtype: DTypeLike = jnp.float32,
        axis_name: str | None = None,
        rngs: nnx.Rngs,
    ):
        if padding not in ("SAME", "SYMMETRIC"):
            raise ValueError(f'`padding` must be "SAME" or "SYMMETRIC"; got {padding!r}.')
        places = mobile_places(name)
        architecture = MOBILE[name]
        dtype = check_arguments(num_classes, in_channels, dtype)
        layers = make_layers(
            padding="SAME" if padding == "SAME" else None,
            shifted=shifted,
            momentum=architecture.momentum,
            epsilon=architecture.epsilon,
            dtype=dtype,
            axis_name=axis_name,
            rngs=rngs,
        )
        self.name, self.in_channels, self.num_classes = name, in_channels, num_classes
        self.padding, self.shifted = padding, shifted
        self.widths = checked_mobile_widths(
            name, default_widths(name) if widths is None else widths
        )

        inputs = (self.widths.stem, *(block[-1] for block in self.widths.blocks))
        block_of = InvertedResidual if architecture.inverted else Separable
        self.stem = ConvNorm(layers, in_channels, self.widths.stem, 3, 2)
        self.blocks = nnx.List(
            block_of(layers, in_width, block, place)
            for in_width, block, place in zip(inputs, self.widths.blocks, places, strict=False)
        )
        last = self.widths.head
        self.last = None if last is None else ConvNorm(layers, inputs[-1], last, 1)
        self.head = nnx.Linear(last or inputs[-1], num_classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns float32 logits [B, num_classes] of normalised images, floating [B, H, W, C]."""
        check_images(images, self.in_channels)
        x = nnx.relu6(self.stem(images))
        for block in self.blocks:
            x = block(x)
        if self.last is not None:
            x = nnx.relu6(self.last(x))
        return self.head(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


_DOCSTRING = """Builds {title}: {parameters} parameters, {macs} million MACs at 224 x 224 pixels.

Args:
    **options: the keywords of `MobileNet`; `rngs` is needed.

Returns:
    A `MobileNet` in training mode.

Raises:
    ValueError, TypeError: as for `MobileNet`.

Example:
    >>> model = nnx.eval_shape(lambda: {name}(rngs=nnx.Rngs(0)))  # shapes, no arrays
    >>> f"{{sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))):,}}"
    '{parameters}'

References:
    {paper}
"""


def _constructor(
    name: str, title: str, parameters: str, macs: int, paper: str
) -> Callable[..., MobileNet]:
    """Makes the function `name`, with its docstring."""

    def construct(**options: Any) -> MobileNet:
        return MobileNet(name, **options)

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = _DOCSTRING.format(
        name=name, title=title, parameters=parameters, macs=macs, paper=paper
    )
    return construct


mobilenet_v1 = _constructor(
    "mobilenet_v1", "MobileNet V1", "4,231,976", 569, "Howard et al. MobileNets. arXiv:1704.04861."
)
mobilenet_v2 = _constructor(
    "mobilenet_v2",
    "MobileNet V2",
    "3,504,872",
    301,
    "Sandler et al. MobileNetV2. arXiv:1801.04381.",
)
efficientnet_lite0 = _constructor(
    "efficientnet_lite0",
    "EfficientNet-Lite0",
    "4,652,008",
    385,
    "Tan, Le. EfficientNet. arXiv:1905.11946.",
)
