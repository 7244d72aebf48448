"""Vision transformers in Flax NNX; heads and MLP widths of every layer are data."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxprune.models._blocks import Block, checked_layers
from jaxprune.models._layers import check_arguments, check_images

__all__ = ["ViT", "vit_b16", "vit_s16", "vit_ti16"]


class ViT(nnx.Module):
    """A vision transformer: patches, a class token, layers that normalise their input, a head.

    Parameters are at paths such as `patches/kernel`, `layers/0/attention/query/kernel`,
    `layers/0/up/kernel` and `head/kernel`. There is no dropout.

    Args:
        width: channels of the residual stream.
        layers: heads and MLP channels of each layer, see `LayerWidths`.
        head_dim: channels of a head.
        patch: side of a patch, in pixels.
        image_size: side of the images, in pixels.
        num_classes: number of logits.
        in_channels: channels of the images.
        dtype: dtype of the computation; parameters and logits are float32.
        rngs: source of the initial parameters.

    Raises:
        ValueError: if `layers` are not pairs of integers, or patches do not fill the image.

    Example:
        >>> model = ViT(16, [(2, 32)], head_dim=8, patch=4, image_size=8, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 8, 8, 3))).shape
        (1, 1000)

    References:
        Dosovitskiy et al. An Image is Worth 16x16 Words. arXiv:2010.11929.
    """

    def __init__(
        self,
        width: int,
        layers: Sequence[Sequence[int]],
        *,
        head_dim: int = 64,
        patch: int = 16,
        image_size: int = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtype = check_arguments(num_classes, in_channels, dtype)
        if image_size % patch:
            raise ValueError(f"`patch` {patch} must divide `image_size` {image_size}.")
        self.in_channels, self.image_size = in_channels, image_size
        self.widths = checked_layers(layers)
        self.patches = nnx.Conv(
            in_channels,
            width,
            (patch, patch),
            strides=patch,
            padding="VALID",
            dtype=dtype,
            rngs=rngs,
        )
        count, normal = (image_size // patch) ** 2, nnx.initializers.normal(0.02)
        self.token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(normal(rngs.params(), (1, count + 1, width)))
        self.layers = nnx.List(
            Block(width, layer, head_dim, norm_first=True, epsilon=1e-6, dtype=dtype, rngs=rngs)
            for layer in self.widths
        )
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns float32 logits [B, num_classes] of normalised images, floating [B, H, W, C]."""
        check_images(images, self.in_channels)
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"`images` must be {self.image_size} x {self.image_size} pixels, as the positions "
                f"are; got shape {images.shape}. Resize them, or set `image_size`."
            )
        x = self.patches(images)
        batch, _, _, width = x.shape
        x = x.reshape(batch, -1, width)
        token = jnp.broadcast_to(self.token[...].astype(x.dtype), (batch, 1, width))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...].astype(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0].astype(jnp.float32))


_DOCSTRING = """Builds {title}: 12 layers of {width} channels, {parameters} parameters.

Args:
    **options: the keywords of `ViT`; `rngs` is needed.

Returns:
    A `ViT`.

Raises:
    ValueError: as for `ViT`.

Example:
    >>> model = nnx.eval_shape(lambda: {name}(rngs=nnx.Rngs(0)))  # shapes, no arrays
    >>> f"{{sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))):,}}"
    '{parameters}'

References:
    Dosovitskiy et al. An Image is Worth 16x16 Words. arXiv:2010.11929.
    Touvron et al. DeiT (the smaller two). arXiv:2012.12877.
"""


def _constructor(name: str, title: str, width: int, parameters: str) -> Callable[..., ViT]:
    """Makes the function `name`, with its docstring; heads have 64 channels."""

    def construct(**options: Any) -> ViT:
        return ViT(width, [(width // 64, 4 * width)] * 12, **options)

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = _DOCSTRING.format(
        name=name, title=title, width=width, parameters=parameters
    )
    return construct


vit_ti16 = _constructor("vit_ti16", "ViT-Ti/16", 192, "5,717,416")
vit_s16 = _constructor("vit_s16", "ViT-S/16", 384, "22,050,664")
vit_b16 = _constructor("vit_b16", "ViT-B/16", 768, "86,567,656")
