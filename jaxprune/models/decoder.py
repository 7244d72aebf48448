"""A language model of today's usual design in Flax NNX; the widths of every layer are data."""

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

__all__ = [
    "Cache",
    "Decoder",
    "DecoderWidths",
    "decoder_124m",
    "decoder_mini",
    "rotate",
]


class DecoderWidths(NamedTuple):
    """What can be removed of one layer; without heads or without MLP it skips that part.

    `heads / kv_heads` consecutive query heads share a head of keys and values.

    Example:
        >>> DecoderWidths(heads=12, kv_heads=4, mlp=2048)
        DecoderWidths(heads=12, kv_heads=4, mlp=2048)
    """

    heads: int
    kv_heads: int
    mlp: int


class Cache(NamedTuple):
    """Keys and values of the tokens so far, to continue a text without reading it again.

    Example:
        >>> model = Decoder(9, width=8, layers=[(4, 2, 8)], head_dim=2, rngs=nnx.Rngs(0))
        >>> model.empty_cache(1, 5).keys[0].shape
        (1, 5, 2, 2)
    """

    keys: Any  # for each layer [B, max_length, kv_heads, head_dim]; one stack if scanned
    values: Any  # like `keys`
    length: jax.Array  # int32 [], number of tokens so far


class DecoderLayer(nnx.Module):
    """Grouped-query attention and a gated MLP, each of a normalised input and added to it.

    Args:
        width: channels of the residual stream.
        widths: heads, heads of keys and values, MLP channels.
        head_dim: channels of a head.
        base: wavelength of the slowest rotation, in radians.
        dtype: dtype of the computation.
        rngs: source of the initial parameters.
    """

    def __init__(
        self,
        width: int,
        widths: DecoderWidths,
        head_dim: int,
        *,
        base: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        norm = partial(nnx.RMSNorm, width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        heads, kv_heads, mlp = widths
        self.head_dim, self.base = head_dim, base
        self.norm1: Any = norm() if heads else None
        self.query: Any = linear(width, heads * head_dim) if heads else None
        self.key: Any = linear(width, kv_heads * head_dim) if heads else None
        self.value: Any = linear(width, kv_heads * head_dim) if heads else None
        self.out: Any = linear(heads * head_dim, width) if heads else None
        self.norm2: Any = norm() if mlp else None
        self.gate: Any = linear(width, mlp) if mlp else None
        self.up: Any = linear(width, mlp) if mlp else None
        self.down: Any = linear(mlp, width) if mlp else None

    def __call__(
        self, x: jax.Array, start: jax.Array | int = 0, past: Any = None
    ) -> tuple[jax.Array, Any]:
        """Returns `x` [B, T, width] after the layer, and the keys and values with those of `x`.

        Args:
            x: the residual stream.
            start: position of the first token of `x`.
            past: keys and values [B, max_length, kv_heads, head_dim] of a cache; None: no cache.
        """
        if self.query is not None:
            y, past = self._attend(self.norm1(x), start, past)
            x = x + y
        if self.up is not None:
            y = self.norm2(x)
            x = x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))
        return x, past

    def _attend(self, x: jax.Array, start: Any, past: Any) -> tuple[jax.Array, Any]:
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        query, key, value = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        places = start + jnp.arange(length)
        query, key = rotate(query, places, self.base), rotate(key, places, self.base)
        if past is not None:
            at = (0, start, 0, 0)
            key, value = (
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
                for old, new in zip(past, (key, value), strict=True)
            )
            past = key, value
        # One axis for the groups that share keys and values, and one for the heads of a group.
        query = query.reshape(batch, length, key.shape[2], -1, self.head_dim)
        scores = jnp.einsum("bqgrd,bkgd->bgrqk", query, key) / jnp.sqrt(self.head_dim)
        seen = places[:, None] >= jnp.arange(key.shape[1])[None, :]
        scores = jnp.where(seen[None, None, None], scores.astype(jnp.float32), -jnp.inf)
        weights = jax.nn.softmax(scores).astype(x.dtype)
        mixed = jnp.einsum("bgrqk,bkgd->bqgrd", weights, value)
        return self.out(mixed.reshape(batch, length, -1)), past


class Decoder(nnx.Module):
    """A language model: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Parameters are at paths such as `tokens/embedding`, `layers/0/query/kernel` and `head/kernel`.
    With `scanned` all layers have the same widths and are one layer whose parameters have a first
    axis that numbers them, `layers/query/kernel` [layers, width, heads * head_dim], which compiles
    faster.

    Args:
        vocabulary: number of tokens.
        width: channels of the residual stream.
        layers: heads, heads of keys and values, and MLP channels of each layer, see
            `DecoderWidths`.
        head_dim: channels of a head, an even number.
        scanned: whether layers are stacked and run by `jax.lax.scan`.
        remat: whether the backward pass computes each layer again. This takes a third more time,
            and memory for the inside of one layer instead of all.
        base: wavelength of the slowest rotation, in radians.
        dtype: dtype of the computation; parameters and logits are float32.
        rngs: source of the initial parameters.

    Raises:
        ValueError: if widths are wrong, or differ although the layers are scanned.

    Example:
        >>> model = Decoder(256, width=16, layers=[(4, 2, 32)] * 2, head_dim=8, rngs=nnx.Rngs(0))
        >>> tokens = jnp.array([[72, 101, 108, 108, 111]])
        >>> logits = model(tokens)
        >>> logits.shape
        (1, 5, 256)
        >>> _, cache = model.extend(tokens[:, :4], model.empty_cache(1, 8))  # read four tokens
        >>> last, cache = model.extend(tokens[:, 4:], cache)  # and the fifth alone
        >>> bool(jnp.allclose(last[:, 0], logits[:, 4], atol=1e-5)), int(cache.length)
        (True, 5)

    References:
        Touvron et al. LLaMA. arXiv:2302.13971.
        Zhang, Sennrich. Root Mean Square Layer Normalization. arXiv:1910.07467.
        Su et al. RoFormer (rotary positions). arXiv:2104.09864.
        Ainslie et al. GQA. arXiv:2305.13245. Shazeer. GLU Variants. arXiv:2002.05202.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int,
        layers: Sequence[Sequence[int]],
        head_dim: int,
        scanned: bool = False,
        remat: bool = False,
        base: float = 10_000.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if head_dim % 2:
            raise ValueError(f"`head_dim` must be even, as pairs are rotated; got {head_dim}.")
        self.widths, self.scanned, self.head_dim = _checked(layers, scanned), scanned, head_dim
        self.dtype, self.remat = jnp.dtype(dtype), remat

        def layer(widths: DecoderWidths, rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(width, widths, head_dim, base=base, dtype=dtype, rngs=rngs)

        self.tokens = nnx.Embed(vocabulary, width, dtype=dtype, rngs=rngs)
        if scanned:
            stack = nnx.vmap(partial(layer, self.widths[0]), in_axes=0, out_axes=0)
            self.layers: Any = stack(rngs.split(len(self.widths)))
        else:
            self.layers = nnx.List(layer(widths, rngs) for widths in self.widths)
        self.norm = nnx.RMSNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns float32 logits [B, T, vocabulary] of the token after each of `tokens` [B, T]."""
        x, _ = self._run(self.tokens(tokens), 0, None)
        return self._logits(x)

    def extend(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads more tokens of a text.

        Args:
            tokens: integers [B, T]; with those in the cache they must not exceed its length.
            cache: from `empty_cache` or from the last call.

        Returns:
            float32 logits [B, T, vocabulary], and the cache with the new tokens.
        """
        x, past = self._run(self.tokens(tokens), cache.length, (cache.keys, cache.values))
        return self._logits(x), Cache(past[0], past[1], cache.length + tokens.shape[1])

    def empty_cache(self, batch: int, max_length: int) -> Cache:
        """Returns a cache for `batch` texts of up to `max_length` tokens."""

        def zeros(widths: DecoderWidths, *lead: int) -> jax.Array:
            shape = (*lead, batch, max_length, widths.kv_heads, self.head_dim)
            return jnp.zeros(shape, self.dtype)

        if self.scanned:
            both = [zeros(self.widths[0], len(self.widths)) for _ in range(2)]
        else:
            both = [[zeros(widths) for widths in self.widths] for _ in range(2)]
        return Cache(both[0], both[1], jnp.zeros([], jnp.int32))

    def _run(self, x: jax.Array, start: Any, past: Any) -> tuple[jax.Array, Any]:
        """Runs the layers; returns the residual stream and keys and values."""
        again = jax.checkpoint(_run_layer, static_argnums=0) if self.remat else _run_layer
        if self.scanned:
            graphdef, stack = nnx.split(self.layers)

            def body(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
                return again(graphdef, layer[0], x, start, layer[1])

            return jax.lax.scan(body, x, (stack, past))
        kept = []
        for index, layer in enumerate(self.layers):
            own = None if past is None else tuple(both[index] for both in past)
            x, own = again(*nnx.split(layer), x, start, own) if self.remat else layer(x, start, own)
            kept.append(own)
        return x, None if past is None else tuple(map(list, zip(*kept, strict=True)))

    def _logits(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(x)).astype(jnp.float32)


def _run_layer(graphdef: Any, state: Any, x: jax.Array, start: Any, past: Any) -> Any:
    """Runs one layer, given as structure and arrays."""
    return nnx.merge(graphdef, state)(x, start, past)


def _constructor(
    name: str, title: str, head_dim: int, width: int, layers: Sequence[Sequence[int]]
) -> Callable[..., Decoder]:
    """Makes the function that builds a decoder of known widths."""

    def build(
        vocabulary: int,
        *,
        widths: tuple[int, Sequence[Sequence[int]]] | None = None,
        scanned: bool = False,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> Decoder:
        own_width, own_layers = (width, layers) if widths is None else widths
        return Decoder(
            vocabulary,
            width=own_width,
            layers=own_layers,
            head_dim=head_dim,
            scanned=scanned,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Builds {title}

    Args:
        vocabulary: number of tokens, 256 for bytes.
        widths: channels of the residual stream, and `DecoderWidths` of each layer; None: {width},
            and {len(layers)} times {tuple(layers[0])}. Heads have {head_dim} channels.
        scanned: see `Decoder`.
        remat: see `Decoder`.
        dtype: dtype of the computation.
        rngs: source of the initial parameters.

    Returns:
        The model.

    Example:
        >>> model = {name}(256, widths=(16, [(4, 2, 24)]), rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 3), jnp.int32)).shape
        (1, 3, 256)
    """
    return build


decoder_mini = _constructor(
    "decoder_mini",
    "a decoder of 0.87 M parameters for bytes, which trains on a CPU.",
    head_dim=32,
    width=128,
    layers=[(4, 4, 352)] * 4,
)
decoder_124m = _constructor(
    "decoder_124m",
    "a decoder of 124 M parameters for bytes, with 3 heads of keys and values for 12 queries.",
    head_dim=64,
    width=768,
    layers=[(12, 3, 2048)] * 20,
)


def rotate(x: jax.Array, places: jax.Array, base: float) -> jax.Array:
    """Rotates pairs of channels by angles that grow with the position.

    Args:
        x: [B, T, heads, head_dim]; channel i is paired with channel i + head_dim / 2.
        places: integers [T], the position of each token.
        base: wavelength of the slowest rotation, in radians.

    Returns:
        Like `x`.

    Example:
        >>> rotate(jnp.ones((1, 1, 1, 2)), jnp.array([0]), 1e4).ravel().tolist()
        [1.0, 1.0]
    """
    half = x.shape[-1] // 2
    speeds = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = places[None, :, None, None] * speeds[None, None, None, :]
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1).astype(x.dtype)


def _checked(layers: Sequence[Sequence[int]], scanned: bool) -> tuple[DecoderWidths, ...]:
    """Returns plain integers; raises one error that lists every wrong layer."""
    problems = []
    for index, layer in enumerate(layers):
        whole = [isinstance(n, Integral) and not isinstance(n, bool) and n >= 0 for n in layer]
        if len(whole) != 3 or not all(whole):
            problems.append(f"layers/{index}: {tuple(layer)!r} must be (heads, kv_heads, mlp)")
        elif (layer[0] == 0) != (layer[1] == 0) or (layer[1] and layer[0] % layer[1]):
            problems.append(f"layers/{index}: heads {layer[0]} must be a multiple of {layer[1]}")
    if not layers:
        problems.append("there must be at least one layer")
    if scanned and len({tuple(layer) for layer in layers}) > 1:
        problems.append("all layers must be alike with `scanned`; set it to False to differ")
    if problems:
        raise ValueError("`layers` must be the widths of each layer:\n  " + "\n  ".join(problems))
    return tuple(DecoderWidths(*map(int, layer)) for layer in layers)
