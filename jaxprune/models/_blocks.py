"""The block that `Encoder` and `ViT` are built of: attention and a two-layer MLP."""

from collections.abc import Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

__all__ = ["Attention", "Block", "LayerWidths", "checked_layers"]


class LayerWidths(NamedTuple):
    """What can be removed of one layer; a layer without heads or without MLP skips that part.

    Example:
        >>> LayerWidths(heads=12, mlp=1536)
        LayerWidths(heads=12, mlp=1536)
    """

    heads: int
    mlp: int


def checked_layers(layers: Sequence[Sequence[int]]) -> tuple[LayerWidths, ...]:
    """Returns plain integers; raises one error that lists every wrong layer."""
    problems = [
        f"layers/{index}: {tuple(layer)!r} must be (heads, mlp), two integers of at least 0"
        for index, layer in enumerate(layers)
        if len(layer) != 2
        or not all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 0 for n in layer)
    ]
    if problems:
        raise ValueError("`layers` must be the widths of each layer:\n  " + "\n  ".join(problems))
    return tuple(LayerWidths(int(heads), int(mlp)) for heads, mlp in layers)


class Attention(nnx.Module):
    """Attention of every position to all positions that a mask allows."""

    def __init__(self, width: int, heads: int, head_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.head_dim = head_dim
        self.query = linear(width, heads * head_dim)
        self.key = linear(width, heads * head_dim)
        self.value = linear(width, heads * head_dim)
        self.out = linear(heads * head_dim, width)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns [B, T, width] of `x` [B, T, width]; `mask` is bool [B, T], True where to look."""
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        query, key, value = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(self.head_dim).astype(x.dtype)
        if mask is not None:
            scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.out(mixed.reshape(batch, length, -1))


class Block(nnx.Module):
    """Attention and an MLP with exact GELU, each added to its input.

    Args:
        width: channels of the residual stream.
        widths: heads and MLP channels.
        head_dim: channels of a head.
        norm_first: whether each part normalises its input (ViT), not the sum after it (BERT).
        epsilon: what the normalisations add to a variance.
    """

    def __init__(
        self,
        width: int,
        widths: LayerWidths,
        head_dim: int,
        *,
        norm_first: bool,
        epsilon: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        linear = partial(nnx.Linear, dtype=dtype, rngs=rngs)
        norm = partial(nnx.LayerNorm, width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.norm_first = norm_first
        heads, mlp = widths
        attention = partial(Attention, width, heads, head_dim, dtype=dtype, rngs=rngs)
        self.norm1: Any = norm() if heads or not norm_first else None
        self.attention: Any = attention() if heads else None
        self.norm2: Any = norm() if mlp or not norm_first else None
        self.up: Any = linear(width, mlp) if mlp else None
        self.down: Any = linear(mlp, width) if mlp else None

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        if self.norm_first:
            if self.attention is not None:
                x = x + self.attention(self.norm1(x), mask)
            return x if self.up is None else x + self._mlp(self.norm2(x))
        if self.attention is not None:
            x = x + self.attention(x, mask)
        x = self.norm1(x)
        return self.norm2(x if self.up is None else x + self._mlp(x))

    def _mlp(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))
