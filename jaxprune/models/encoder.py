"""A text encoder of BERT's design in Flax NNX; heads and MLP widths of every layer are data."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxprune.models._blocks import Block, checked_layers

__all__ = ["Encoder"]


class Encoder(nnx.Module):
    """A transformer encoder: tokens in, one vector for each token or for the text.

    Learned positions, layers that normalise after each sum, exact GELU, no dropout. Parameters are
    at paths such as `tokens/embedding`, `layers/0/attention/query/kernel`, `layers/0/up/kernel`.

    Args:
        vocabulary: number of tokens.
        width: channels of the residual stream.
        layers: heads and MLP channels of each layer, see `LayerWidths`.
        head_dim: channels of a head.
        max_length: largest number of positions.
        token_types: number of segments that a text can have.
        epsilon: what the normalisations add to a variance.
        dtype: dtype of the computation; parameters are float32.
        rngs: source of the initial parameters.

    Raises:
        ValueError: if `layers` are not pairs of integers.

    Example:
        >>> model = Encoder(100, width=16, layers=[(2, 32), (2, 32)], head_dim=8, rngs=nnx.Rngs(0))
        >>> tokens = jnp.array([[5, 7, 9, 0]])
        >>> model(tokens).shape, model.embed(tokens, tokens != 0).shape
        ((1, 4, 16), (1, 16))

    References:
        Devlin et al. BERT. arXiv:1810.04805.
        Wang et al. MiniLM. arXiv:2002.10957.
        Reimers, Gurevych. Sentence-BERT (the mean over tokens). arXiv:1908.10084.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int,
        layers: Sequence[Sequence[int]],
        head_dim: int,
        max_length: int = 512,
        token_types: int = 2,
        epsilon: float = 1e-12,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def embedding(number: int) -> nnx.Embed:
            return nnx.Embed(number, width, dtype=dtype, rngs=rngs)

        self.tokens, self.positions = embedding(vocabulary), embedding(max_length)
        self.types = embedding(token_types)
        self.norm = nnx.LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.widths = checked_layers(layers)
        self.layers = nnx.List(
            Block(
                width,
                layer,
                head_dim,
                norm_first=False,
                epsilon=epsilon,
                dtype=dtype,
                rngs=rngs,
            )
            for layer in self.widths
        )

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None
    ) -> jax.Array:
        """Returns the vector of each token.

        Args:
            tokens: integers [B, T].
            mask: bool [B, T], False for padding; None: no padding.
            types: integers [B, T], the segment of each token; None: the first.

        Returns:
            [B, T, width], in the dtype of the computation.
        """
        types = jnp.zeros_like(tokens) if types is None else types
        x = self.tokens(tokens) + self.types(types)
        x = self.norm(x + self.positions(jnp.arange(tokens.shape[1])[None]))
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def embed(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the mean vector of each text, scaled to length 1, float32 [B, width]."""
        x, weights = self(tokens, mask).astype(jnp.float32), mask[:, :, None].astype(jnp.float32)
        mean = jnp.sum(x * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1e-9)
        return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
