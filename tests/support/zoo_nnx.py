"""Small models of the kinds that people publish, in Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune.structure import Trace
from tests.support import zoo
from tests.support.zoo import Case, draw, second, tokens


class Bound:
    """A module as functions of its variables: `{"params": ..., "state": ..., "cache": ...}`."""

    def __init__(self, build):
        """Takes the shapes alone from `build()`; numbers are put in their place."""
        model = nnx.eval_shape(build)
        self.graphdef, *states = nnx.split(model, nnx.Param, nnx.Cache, ...)
        named = zip(("params", "cache", "state"), map(nnx.to_pure_dict, states))
        self.variables = zoo.filled({name: state for name, state in named if state})

    def merged(self, variables):
        return nnx.merge(
            self.graphdef, *(variables.get(k, {}) for k in ("params", "cache", "state"))
        )

    def trace(self, call, *args, updates=None, train=False):
        """`call(model, *args)`, and new values of the variables in `updates`, name -> type."""

        def run(variables, *args):
            model = self.merged(variables)
            (model.train if train else model.eval)()
            output = call(model, *args)
            if updates is None:
                return output
            new = {k: nnx.to_pure_dict(nnx.state(model, kind)) for k, kind in updates.items()}
            return output, new

        return Trace(run, args, None if updates is None else second)


def call(model, *args):
    return model(*args)


def float_type():
    """Of what modules return or carry in the type of their parameters at first, whatever comes."""
    return jnp.result_type(float)


# ---- image classifier


class ConvNorm(nnx.Module):
    """A convolution and its batch norm."""

    def __init__(self, n_in, n_out, size, stride=1, groups=1, *, rngs):
        self.conv = nnx.Conv(
            n_in,
            n_out,
            (size, size),
            strides=stride,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(n_out, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class Bottleneck(nnx.Module):
    """As in ResNet, with a projection on the shortcut."""

    def __init__(self, n_in, width, out, *, rngs):
        self.layers = nnx.List(
            [
                ConvNorm(n_in, width, 1, rngs=rngs),
                ConvNorm(width, width + 2, 3, 2, rngs=rngs),
                ConvNorm(width + 2, out, 1, rngs=rngs),
            ]
        )
        self.shortcut = ConvNorm(n_in, out, 1, 2, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.layers[1](nnx.relu(self.layers[0](x))))
        return nnx.relu(self.shortcut(x) + self.layers[2](y))


class InvertedResidual(nnx.Module):
    """As in EfficientNet, with squeeze and excitation."""

    def __init__(self, width, inner, squeeze, *, rngs):
        self.expand = ConvNorm(width, inner, 1, rngs=rngs)
        self.depthwise = ConvNorm(inner, inner, 3, groups=inner, rngs=rngs)
        self.squeeze = nnx.Linear(inner, squeeze, rngs=rngs)
        self.excite = nnx.Linear(squeeze, inner, rngs=rngs)
        self.project = ConvNorm(inner, width, 1, rngs=rngs)

    def __call__(self, x):
        y = nnx.silu(self.depthwise(nnx.silu(self.expand(x))))
        gate = nnx.sigmoid(self.excite(nnx.silu(self.squeeze(y.mean((1, 2))))))
        return x + self.project(y * gate[:, None, None])


class ConvNeXt(nnx.Module):
    """A block with a depthwise convolution, a layer norm of two passes and a layer scale."""

    def __init__(self, width, inner, *, rngs):
        self.depthwise = nnx.Conv(width, width, (3, 3), feature_group_count=width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, use_fast_variance=False, rngs=rngs)
        self.expand = nnx.Linear(width, inner, rngs=rngs)
        self.project = nnx.Linear(inner, width, rngs=rngs)
        self.gamma = nnx.Param(jnp.full(width, 1e-6))

    def __call__(self, x):
        y = self.project(nnx.gelu(self.expand(self.norm(self.depthwise(x)))))
        return x + y * self.gamma[None, None, None]


class Classifier(nnx.Module):
    """The blocks of three families one after the other."""

    def __init__(self, *, rngs):
        self.stem = ConvNorm(3, 12, 3, rngs=rngs)
        self.bottleneck = Bottleneck(12, 8, 20, rngs=rngs)
        self.inverted = InvertedResidual(20, 36, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(20, use_fast_variance=False, rngs=rngs)
        self.down = nnx.Conv(20, 28, (2, 2), strides=2, rngs=rngs)
        self.convnext = ConvNeXt(28, 44, rngs=rngs)
        self.last = nnx.LayerNorm(28, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(28, 11, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        x = nnx.max_pool(x, (3, 3), (1, 1), padding="SAME")
        x = self.down(self.norm(self.inverted(self.bottleneck(x))))
        return self.head(self.last(self.convnext(x).mean((1, 2))))


def classifier():
    bound, images = Bound(lambda: Classifier(rngs=nnx.Rngs(0))), draw(2, 8, 8, 3)
    traces = {
        "evaluate": bound.trace(call, images),
        "train": bound.trace(call, images, updates={"state": nnx.BatchStat}, train=True),
    }
    return Case(bound.variables, traces, {"evaluate": (draw(3, 12, 12, 3),)})


# ---- diffusion


def group_norm(width, rngs):
    return nnx.GroupNorm(width, num_groups=width // 4, rngs=rngs)


class ResBlock(nnx.Module):
    """A residual block that the time scales and shifts, as in later DDPMs."""

    def __init__(self, n_in, out, time, *, rngs):
        self.norm1, self.norm2 = group_norm(n_in, rngs), group_norm(out, rngs)
        self.conv1 = nnx.Conv(n_in, out, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(out, out, (3, 3), rngs=rngs)
        self.time = nnx.Linear(time, 2 * out, rngs=rngs)
        self.skip = None if n_in == out else nnx.Conv(n_in, out, (1, 1), rngs=rngs)

    def __call__(self, x, time):
        y = self.conv1(nnx.silu(self.norm1(x)))
        scale, shift = jnp.split(self.time(nnx.silu(time))[:, None, None], 2, -1)
        y = self.conv2(nnx.silu(self.norm2(y) * (1 + scale) + shift))
        return y + (x if self.skip is None else self.skip(x))


class PixelAttention(nnx.Module):
    """All pixels look at all pixels, in heads, with queries, keys and values from one layer."""

    def __init__(self, width, heads, *, rngs):
        self.norm, self.heads = group_norm(width, rngs), heads
        self.qkv = nnx.Conv(width, 3 * width, (1, 1), rngs=rngs)
        self.out = nnx.Conv(width, width, (1, 1), rngs=rngs)

    def __call__(self, x):
        n, high, wide, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, high * wide, 3, self.heads, width // self.heads)
        q, k, v = (qkv[:, :, at] for at in range(3))
        weights = nnx.softmax(jnp.einsum("nihc,njhc->nhij", q, k) * q.shape[-1] ** -0.5, -1)
        return x + self.out(jnp.einsum("nhij,njhc->nihc", weights, v).reshape(x.shape))


class UNet(nnx.Module):
    """Two resolutions; up by repeating the nearest pixel."""

    def __init__(self, *, rngs):
        self.time1 = nnx.Linear(16, 44, rngs=rngs)
        self.time2 = nnx.Linear(44, 36, rngs=rngs)
        self.conv_in = nnx.Conv(3, 12, (3, 3), rngs=rngs)
        self.high = ResBlock(12, 12, 36, rngs=rngs)
        self.down = nnx.Conv(12, 12, (3, 3), strides=2, rngs=rngs)
        self.low = ResBlock(12, 20, 36, rngs=rngs)
        self.attention = PixelAttention(20, 5, rngs=rngs)
        self.middle = ResBlock(20, 20, 36, rngs=rngs)
        self.low_up = ResBlock(40, 20, 36, rngs=rngs)
        self.up = nnx.Conv(20, 20, (3, 3), rngs=rngs)
        self.high_up = nnx.List([ResBlock(32, 12, 36, rngs=rngs), ResBlock(24, 12, 36, rngs=rngs)])
        self.norm_out = group_norm(12, rngs)
        self.conv_out = nnx.Conv(12, 3, (3, 3), rngs=rngs)

    def __call__(self, x, times):
        time = self.time2(nnx.silu(self.time1(zoo.embed_time(times, 16))))
        first = self.conv_in(x)
        second = self.high(first, time)
        low = self.attention(self.low(self.down(second), time))
        x = self.low_up(jnp.concatenate([self.middle(low, time), low], -1), time)
        n, high, wide, width = x.shape
        x = self.up(jax.image.resize(x, (n, 2 * high, 2 * wide, width), "nearest"))
        for block, skip in zip(self.high_up, (second, first)):
            x = block(jnp.concatenate([x, skip], -1), time)
        return self.conv_out(nnx.silu(self.norm_out(x)))


def u_net():
    bound = Bound(lambda: UNet(rngs=nnx.Rngs(0)))
    args, more = (
        (draw(2, 8, 8, 3), np.float32([3, 50])),
        (draw(3, 12, 12, 3), np.float32([1, 2, 9])),
    )
    return Case(bound.variables, {"denoise": bound.trace(call, *args)}, {"denoise": more})


# ---- vision transformer


class Block(nnx.Module):
    """Attention and two dense layers, both behind norms of two passes."""

    def __init__(self, *, rngs, use_bias=True, dropout=0.1, shared=None):
        self.norm1 = nnx.LayerNorm(24, use_fast_variance=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            4,
            24,
            28,
            num_kv_heads=shared,
            dropout_rate=dropout,
            decode=False,
            use_bias=use_bias,
            rngs=rngs,
        )
        self.norm2 = nnx.LayerNorm(24, use_fast_variance=False, rngs=rngs)
        self.expand = nnx.Linear(24, 40, rngs=rngs)
        self.project = nnx.Linear(40, 24, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs if dropout else None)

    def __call__(self, x, mask=None):
        x = x + self.dropout(self.attention(self.norm1(x), mask=mask))
        y = self.dropout(nnx.gelu(self.expand(self.norm2(x))))
        return x + self.dropout(self.project(y))


class ViT(nnx.Module):
    """Patches, a class token, learned positions, blocks, a head."""

    def __init__(self, *, rngs):
        self.patches = nnx.Conv(3, 24, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, 24)))
        self.positions = nnx.Param(jnp.zeros((1, 5, 24)))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(24, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(24, 11, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1]))
        x = self.dropout(jnp.concatenate([token, x], 1) + self.positions[...])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def vision_transformer():
    bound, images = Bound(lambda: ViT(rngs=zoo.rngs(nnx))), draw(2, 8, 8, 3)
    traces = {
        "evaluate": bound.trace(call, images),
        "train": bound.trace(call, images, train=True),
    }
    return Case(bound.variables, traces, {"evaluate": (draw(3, 8, 8, 3),)})


# ---- encoder and decoder


class DecoderBlock(nnx.Module):
    """Attention to what was said, then to what was read, then two dense layers."""

    def __init__(self, *, rngs):
        self.norms = nnx.List([nnx.LayerNorm(24, rngs=rngs) for _ in range(3)])
        self.attention = nnx.MultiHeadAttention(4, 24, 28, dropout_rate=0.1, rngs=rngs)
        self.cross = nnx.MultiHeadAttention(5, 24, 30, dropout_rate=0.1, decode=False, rngs=rngs)
        self.expand = nnx.Linear(24, 40, rngs=rngs)
        self.project = nnx.Linear(40, 24, rngs=rngs)

    def __call__(self, x, encoded, mask, cross, decode):
        x = x + self.attention(self.norms[0](x), mask=mask, decode=decode)
        x = x + self.cross(self.norms[1](x), encoded, mask=cross)
        return x + self.project(nnx.relu(self.expand(self.norms[2](x))))


class Translator(nnx.Module):
    """A transformer with one embedding for inputs, outputs and logits; 0 is padding."""

    def __init__(self, *, rngs):
        self.shared = nnx.Embed(50, 24, rngs=rngs, param_dtype=float_type())
        self.block = Block(rngs=rngs)
        self.encoder_norm = nnx.LayerNorm(24, rngs=rngs)
        self.decoder_block = DecoderBlock(rngs=rngs)
        self.decoder_norm = nnx.LayerNorm(24, rngs=rngs)
        self.decoder_block.attention.init_cache((2, 5, 24))
        self.encoded = nnx.Cache(jnp.zeros((2, 6, 24)))

    def embed(self, ids, start=0):
        table = jnp.asarray(zoo.sinusoids(16, 24))
        places = jax.lax.dynamic_slice_in_dim(table, start, ids.shape[1], 0)
        return self.shared(ids) * 24**0.5 + places[None]

    def encode(self, ids):
        return self.encoder_norm(self.block(self.embed(ids), pairs(ids > 0, ids > 0)))

    def decode(self, encoded, ids, targets, start=0, mask=None):
        cross, x = pairs(jnp.ones_like(targets), ids > 0), self.embed(targets, start)
        y = self.decoder_block(x, encoded, mask, cross, decode=mask is None)
        return self.shared.attend(self.decoder_norm(y)) / 24**0.5

    def __call__(self, ids, targets):
        shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        causal = jnp.tril(jnp.ones((targets.shape[1],) * 2, bool))[None, None]
        mask = pairs(shifted > 0, shifted > 0) & causal
        return self.decode(self.encode(ids), ids, shifted, mask=mask)

    def start(self, ids, token):
        """Keeps what is encoded for the steps to come; logits of the first."""
        self.encoded[...] = self.encode(ids)
        return self.step(ids, token, 0)

    def step(self, ids, token, place):
        """Logits of one more token."""
        return self.decode(self.encoded[...], ids, token, place)


def pairs(rows, columns):
    return (rows > 0)[:, None, :, None] & (columns > 0)[:, None, None]


def translator():
    bound = Bound(lambda: Translator(rngs=zoo.rngs(nnx)))
    ids, targets = tokens(2, 6, below=50, pad=2), tokens(2, 5, below=50, pad=1)
    token, cache = targets[:, :1], {"cache": nnx.Cache}
    traces = {
        "evaluate": bound.trace(call, ids, targets),
        "train": bound.trace(call, ids, targets, train=True),
        "start": bound.trace(Translator.start, ids, token, updates=cache),
        "step": bound.trace(Translator.step, ids, token, jnp.int32(2), updates=cache),
    }
    others = {"evaluate": (tokens(3, 9, below=50, pad=2), tokens(3, 12, below=50, pad=1))}
    return Case(bound.variables, traces, others)


# ---- decoder-only language model


class LlamaAttention(nnx.Module):
    """Groups of queries share a key and a value, as in Llama; normed queries, as in Qwen 3."""

    def __init__(self, length, *, rngs):
        self.q = nnx.Linear(24, 6 * 8, use_bias=False, rngs=rngs)
        self.k = nnx.Linear(24, 3 * 8, use_bias=False, rngs=rngs)
        self.v = nnx.Linear(24, 3 * 8, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(6 * 8, 24, use_bias=False, rngs=rngs)
        self.q_norm, self.k_norm = nnx.RMSNorm(8, rngs=rngs), nnx.RMSNorm(8, rngs=rngs)
        self.k_cache = nnx.Cache(jnp.zeros((2, length, 3, 8)))
        self.v_cache = nnx.Cache(jnp.zeros((2, length, 3, 8)))

    def __call__(self, x, positions, write):
        q = self.q_norm(self.q(x).reshape(*x.shape[:2], 6, 8))
        k = self.k_norm(self.k(x).reshape(*x.shape[:2], 3, 8))
        v = self.v(x).reshape(*x.shape[:2], 3, 8)
        q, k = zoo.rotate_halves(q, positions), zoo.rotate_halves(k, positions)
        if write is not None:
            self.k_cache[...] = k = write(self.k_cache[...], k, positions[0, 0])
            self.v_cache[...] = v = write(self.v_cache[...], v, positions[0, 0])
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(8.0).astype(x.dtype)
        seen = positions[:, None, :, None] >= jnp.arange(k.shape[1])[None, None, None]
        weights = nnx.softmax(jnp.where(seen, logits, jnp.finfo(x.dtype).min), -1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.out(y.reshape(*x.shape[:2], -1))


class SwiGLU(nnx.Module):
    """Gated dense layers."""

    def __init__(self, *, rngs):
        self.gate = nnx.Linear(24, 40, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(24, 40, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(40, 24, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Llama(nnx.Module):
    """A language model whose head has its own weights."""

    def __init__(self, length, *, rngs):
        self.embedding = nnx.Embed(50, 24, rngs=rngs, param_dtype=float_type())
        self.norms = nnx.List([nnx.RMSNorm(24, rngs=rngs) for _ in range(4)])
        self.attentions = nnx.List([LlamaAttention(length, rngs=rngs) for _ in range(2)])
        self.feeds = nnx.List([SwiGLU(rngs=rngs) for _ in range(2)])
        self.norm = nnx.RMSNorm(24, rngs=rngs)
        self.head = nnx.Linear(24, 50, use_bias=False, rngs=rngs)

    def __call__(self, ids, start=0, write=None):
        positions = jnp.broadcast_to(start + jnp.arange(ids.shape[1])[None], ids.shape)
        x = self.embedding(ids)
        for layer, (attention, feed) in enumerate(zip(self.attentions, self.feeds)):
            x = x + attention(self.norms[2 * layer](x), positions, write)
            x = x + feed(self.norms[2 * layer + 1](x))
        return self.head(self.norm(x))


def language_model():
    bound, ids, place = Bound(lambda: Llama(9, rngs=nnx.Rngs(0))), tokens(2, 5, below=50), 5

    def with_cache(write, *args):
        def run(model, ids, start=0):
            return model(ids, start, write)

        return bound.trace(run, *args, updates={"cache": nnx.Cache})

    step = ids[:, :1], jnp.int32(place)
    traces = {
        "train": bound.trace(call, ids),
        "prefill": with_cache(zoo.write_slice, ids),
        "decode": with_cache(zoo.write_slice, *step),
        "decode, scatter": with_cache(zoo.write_at, *step),
    }
    return Case(bound.variables, traces, {"train": (tokens(3, 12, below=50),)})


# ---- state space


class Mamba(nnx.Module):
    """A selective state space behind a causal convolution, with a gate; it can go step by step."""

    def __init__(self, *, rngs):
        self.in_proj = nnx.Linear(24, 80, use_bias=False, rngs=rngs)
        self.conv = nnx.Param(jnp.zeros((4, 40)))
        self.conv_bias = nnx.Param(jnp.zeros(40))
        self.project = nnx.Linear(40, 15, use_bias=False, rngs=rngs)
        self.steps = nnx.Linear(3, 40, rngs=rngs)
        self.a_log, self.skip = nnx.Param(jnp.zeros((40, 6))), nnx.Param(jnp.zeros(40))
        self.out = nnx.Linear(40, 24, use_bias=False, rngs=rngs)
        self.past = nnx.Cache(jnp.zeros((2, 3, 40)))
        self.memory = nnx.Cache(jnp.zeros((2, 40, 6)))

    def inputs(self, window):
        """Of the state space, from the last inputs of the convolution."""
        length = window.shape[1] - 3
        taps = [window[:, at : at + length] * self.conv[at][None, None] for at in range(4)]
        x = nnx.silu(sum(taps) + self.conv_bias[None, None])
        raw, b, c = jnp.split(self.project(x), [3, 9], -1)
        return x, nnx.softplus(self.steps(raw)), b, c

    def __call__(self, x, how):
        x, gate = jnp.split(self.in_proj(x), 2, -1)
        x, steps, b, c = self.inputs(jnp.pad(x, ((0, 0), (3, 0), (0, 0))))
        y = zoo.selective_scan(x, steps, self.a_log[...], b, c, self.skip[...], how)
        return self.out(y * nnx.silu(gate))

    def step(self, x):
        """One more token."""
        x, gate = jnp.split(self.in_proj(x), 2, -1)
        window = jnp.concatenate([self.past[...], x], 1)
        self.past[...] = window[:, 1:]
        x, steps, b, c = self.inputs(window)
        decay = jnp.exp(steps[:, 0, :, None] * -jnp.exp(self.a_log[...])[None])
        self.memory[...] = decay * self.memory[...] + (steps * x)[:, 0, :, None] * b
        y = jnp.einsum("bds,bts->btd", self.memory[...], c) + self.skip[None, None] * x
        return self.out(y * nnx.silu(gate))


class MambaModel(nnx.Module):
    """An embedding, blocks, a tied head."""

    def __init__(self, *, rngs):
        self.embedding = nnx.Embed(50, 24, rngs=rngs, param_dtype=float_type())
        self.norms = nnx.List([nnx.RMSNorm(24, rngs=rngs) for _ in range(3)])
        self.blocks = nnx.List([Mamba(rngs=rngs) for _ in range(2)])

    def through(self, ids, run):
        x = self.embedding(ids)
        for norm, block in zip(self.norms, self.blocks):
            x = x + run(block, norm(x))
        return self.embedding.attend(self.norms[2](x))

    def scan(self, ids):
        return self.through(ids, lambda block, x: block(x, "scan"))

    def associative_scan(self, ids):
        return self.through(ids, lambda block, x: block(x, "associative"))

    def step(self, ids):
        return self.through(ids, Mamba.step)


def state_space():
    bound, ids = Bound(lambda: MambaModel(rngs=nnx.Rngs(0))), tokens(2, 8, below=50)
    traces = {
        "scan": bound.trace(MambaModel.scan, ids),
        "associative scan": bound.trace(MambaModel.associative_scan, ids),
        "step": bound.trace(MambaModel.step, ids[:, :1], updates={"cache": nnx.Cache}),
    }
    return Case(bound.variables, traces, {"scan": (tokens(3, 12, below=50),)})


class S4D(nnx.Module):
    """Diagonal state spaces, applied as one long convolution; a gated output."""

    def __init__(self, dim, *, rngs):
        self.log_step, self.skip = nnx.Param(jnp.zeros(dim)), nnx.Param(jnp.zeros(dim))
        self.a_real, self.a_imag = (nnx.Param(jnp.zeros((dim, 6))) for _ in range(2))
        self.c = nnx.Param(jnp.zeros((dim, 6, 2)))
        self.out = nnx.Linear(dim, 2 * dim, rngs=rngs)

    def __call__(self, x):
        own = self.log_step, self.a_real, self.a_imag, self.c
        y = zoo.long_convolution(x, *(p[...] for p in own)) + x * self.skip[None, None]
        return nnx.glu(self.out(nnx.gelu(y)), -1)


class S4DModel(nnx.Module):
    """Blocks with residuals and layer norms, then the mean over time."""

    def __init__(self, *, rngs):
        self.encoder = nnx.Linear(3, 20, rngs=rngs)
        self.blocks = nnx.List([S4D(20, rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([nnx.LayerNorm(20, rngs=rngs) for _ in range(2)])
        self.decoder = nnx.Linear(20, 10, rngs=rngs)

    def __call__(self, x):
        x = self.encoder(x)
        for block, norm in zip(self.blocks, self.norms):
            x = norm(x + block(x))
        return self.decoder(x.mean(1))


def long_convolutions():
    bound = Bound(lambda: S4DModel(rngs=nnx.Rngs(0)))
    traces = {"evaluate": bound.trace(call, draw(2, 8, 3))}
    return Case(bound.variables, traces, {"evaluate": (draw(3, 12, 3),)})


# ---- recurrent


class Recurrent(nnx.Module):
    """An LSTM, and GRUs in both directions, over sequences of several lengths."""

    def __init__(self, *, rngs):
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": float_type()}
        self.embedding = nnx.Embed(30, 12, rngs=rngs, param_dtype=float_type())
        self.first = nnx.RNN(nnx.OptimizedLSTMCell(12, 20, **options))
        self.both = nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(20, 14, **options)), nnx.RNN(nnx.GRUCell(20, 16, **options))
        )
        self.last = nnx.RNN(nnx.LSTMCell(30, 18, **options))
        self.head = nnx.Linear(18, 10, rngs=rngs)

    def __call__(self, ids, lengths):
        x = self.first(self.embedding(ids), seq_lengths=lengths)
        return self.head(self.last(self.both(x, seq_lengths=lengths)))


def recurrent():
    bound = Bound(lambda: Recurrent(rngs=nnx.Rngs(0)))
    traces = {"evaluate": bound.trace(call, tokens(2, 6, below=30), np.int32([6, 4]))}
    others = {"evaluate": (tokens(3, 9, below=30), np.int32([6, 9, 2]))}
    return Case(bound.variables, traces, others)


# ---- a scan over layers


class Scanned(nnx.Module):
    """Blocks with stacked weights, run by `nnx.scan` and rematerialised."""

    def __init__(self, *, rngs):
        self.embedding = nnx.Embed(50, 24, rngs=rngs, param_dtype=float_type())

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def build(rngs):
            return Block(rngs=rngs, use_bias=False, dropout=0.0, shared=2)

        self.blocks = build(rngs)
        self.norm = nnx.LayerNorm(24, rngs=rngs)
        self.head = nnx.Linear(24, 50, rngs=rngs)

    def __call__(self, ids):
        mask = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))[None, None]

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat(prevent_cse=False)
        def run(block, x):
            return block(x, jnp.broadcast_to(mask, (x.shape[0], 1, *mask.shape[2:])))

        return self.head(self.norm(run(self.blocks, self.embedding(ids))))


def scanned():
    bound = Bound(lambda: Scanned(rngs=nnx.Rngs(0)))
    traces = {"evaluate": bound.trace(call, tokens(2, 5, below=50))}
    # Without dropout, attention is that of JAX, which takes softmax in single precision.
    others = {"evaluate": (tokens(3, 8, below=50),)}
    return Case(bound.variables, traces, others, tolerance=1e-4)


MODELS = {
    "image classifier": classifier,
    "U-Net": u_net,
    "vision transformer": vision_transformer,
    "encoder and decoder": translator,
    "language model": language_model,
    "state space": state_space,
    "long convolutions": long_convolutions,
    "recurrent": recurrent,
    "scan over layers": scanned,
}
