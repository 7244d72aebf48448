"""Small models of the kinds that people publish, in Flax Linen."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.structure import Trace
from tests.support import zoo
from tests.support.zoo import KEY, Case, draw, second, tokens


def variables_of(model, *args, **kwargs):
    """Numbers for the variables of a module, without running it."""
    with jax.enable_x64(False):  # or a part of them would be in double precision
        return zoo.filled(jax.eval_shape(functools.partial(model.init, **kwargs), KEY, *args))


def apply(model, mutable=False, method=None, **kwargs):
    def run(variables, *args):
        return model.apply(variables, *args, mutable=mutable, method=method, **kwargs)

    return run


# ---- image classifier


class Bottleneck(nn.Module):
    """As in ResNet, with a projection on the shortcut."""

    width: int
    out: int
    stride: int

    @nn.compact
    def __call__(self, x, norm):
        y = nn.relu(norm()(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        y = nn.Conv(self.width, (3, 3), (self.stride,) * 2, use_bias=False)(y)
        y = nn.relu(norm()(y))
        y = norm()(nn.Conv(self.out, (1, 1), use_bias=False)(y))
        x = norm()(nn.Conv(self.out, (1, 1), (self.stride,) * 2, use_bias=False)(x))
        return nn.relu(x + y)


class InvertedResidual(nn.Module):
    """As in MobileNetV3, with squeeze and excitation."""

    width: int
    squeeze: int

    @nn.compact
    def __call__(self, x, norm):
        y = nn.hard_swish(norm()(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        y = nn.Conv(self.width, (3, 3), feature_group_count=self.width, use_bias=False)(y)
        y = nn.hard_swish(norm()(y))
        gate = nn.relu(nn.Conv(self.squeeze, (1, 1))(y.mean((1, 2), keepdims=True)))
        y = y * nn.hard_sigmoid(nn.Conv(self.width, (1, 1))(gate))
        return x + norm()(nn.Conv(x.shape[-1], (1, 1), use_bias=False)(y))


class ConvNeXt(nn.Module):
    """A block with a depthwise convolution, a layer norm of two passes and a layer scale."""

    width: int

    @nn.compact
    def __call__(self, x):
        dim = x.shape[-1]
        y = nn.Conv(dim, (3, 3), feature_group_count=dim)(x)
        y = nn.LayerNorm(use_fast_variance=False, epsilon=1e-6)(y)
        y = nn.Dense(dim)(nn.gelu(nn.Dense(self.width)(y)))
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (dim,))
        return x + y * gamma[None, None, None]


class Classifier(nn.Module):
    """The blocks of three families one after the other."""

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(nn.Conv(12, (3, 3), use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        x = Bottleneck(8, 20, 1)(x, norm)
        x = InvertedResidual(36, 6)(x, norm)
        x = nn.LayerNorm(use_fast_variance=False)(x)
        x = nn.Conv(28, (2, 2), (2, 2))(x)
        x = ConvNeXt(44)(x)
        return nn.Dense(10)(nn.LayerNorm(use_fast_variance=False)(x.mean((1, 2))))


def classifier():
    model, images = Classifier(), draw(2, 8, 8, 3)
    variables = variables_of(model, images, train=False)
    traces = {
        "evaluate": Trace(apply(model, train=False), (images,)),
        "train": Trace(apply(model, ["batch_stats"], train=True), (images,), second),
    }
    return Case(variables, traces, {"evaluate": (draw(3, 12, 12, 3),)})


# ---- diffusion


class ResBlock(nn.Module):
    """A residual block that knows the time, as in DDPM."""

    out: int

    @nn.compact
    def __call__(self, x, time):
        y = nn.Conv(self.out, (3, 3))(nn.silu(group_norm(x)))
        y = y + nn.Dense(self.out)(nn.silu(time))[:, None, None]
        y = nn.Conv(self.out, (3, 3))(nn.silu(group_norm(y)))
        return y + (x if x.shape == y.shape else nn.Conv(self.out, (1, 1))(x))


def group_norm(x):
    return nn.GroupNorm(num_groups=x.shape[-1] // 4)(x)


class PixelAttention(nn.Module):
    """All pixels look at all pixels, one head."""

    @nn.compact
    def __call__(self, x):
        shape, y = x.shape, group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (nn.Dense(shape[-1], name=name)(y) for name in "qkv")
        weights = nn.softmax(jnp.einsum("nic,njc->nij", q, k) * shape[-1] ** -0.5, -1)
        y = nn.Dense(shape[-1], name="out")(jnp.einsum("nij,njc->nic", weights, v))
        return x + y.reshape(shape)


class UNet(nn.Module):
    """Two resolutions; up by a transposed convolution."""

    @nn.compact
    def __call__(self, x, times):
        time = nn.Dense(36)(nn.silu(nn.Dense(44)(zoo.embed_time(times, 16))))
        skips = [nn.Conv(12, (3, 3))(x)]
        skips.append(ResBlock(12)(skips[-1], time))
        x = nn.Conv(12, (3, 3), (2, 2))(skips[-1])
        skips.append(PixelAttention()(ResBlock(20)(x, time)))
        x = ResBlock(20)(skips[-1], time)
        x = ResBlock(20)(jnp.concatenate([x, skips.pop()], -1), time)
        x = nn.ConvTranspose(20, (4, 4), (2, 2))(x)
        for skip in reversed(skips):
            x = ResBlock(12)(jnp.concatenate([x, skip], -1), time)
        return nn.Conv(3, (3, 3))(nn.silu(group_norm(x)))


def u_net():
    model, args = UNet(), (draw(2, 8, 8, 3), np.float32([3, 50]))
    others = {"denoise": (draw(3, 12, 12, 3), np.float32([3, 50, 90]))}
    return Case(variables_of(model, *args), {"denoise": Trace(apply(model), args)}, others)


# ---- vision transformer


class EncoderBlock(nn.Module):
    """Attention and two dense layers, both behind norms of two passes."""

    train: bool
    causal: bool = False

    @nn.compact
    def __call__(self, x, mask=None):
        still, norm = not self.train, functools.partial(nn.LayerNorm, use_fast_variance=False)
        y = nn.MultiHeadDotProductAttention(
            4, qkv_features=28, dropout_rate=0.1, deterministic=still
        )(norm()(x), mask=mask)
        x = x + nn.Dropout(0.1, deterministic=still)(y)
        y = nn.gelu(nn.Dense(40)(norm()(x)))
        y = nn.Dense(x.shape[-1])(nn.Dropout(0.1, deterministic=still)(y))
        return x + nn.Dropout(0.1, deterministic=still)(y)


class ViT(nn.Module):
    """Patches, a class token, learned positions, blocks, a head."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(24, (4, 4), (4, 4), padding="VALID")(x).reshape(x.shape[0], -1, 24)
        token = self.param("token", nn.initializers.zeros, (1, 1, 24))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], 24))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        for _ in range(2):
            x = EncoderBlock(train)(x)
        return nn.Dense(10)(nn.LayerNorm(use_fast_variance=False)(x)[:, 0])


def vision_transformer():
    model, images = ViT(), draw(2, 8, 8, 3)
    variables = variables_of(model, images, train=False)
    traces = {
        "evaluate": Trace(apply(model, train=False), (images,)),
        "train": Trace(apply(model, train=True, rngs={"dropout": KEY}), (images,)),
    }
    return Case(variables, traces, {"evaluate": (draw(3, 8, 8, 3),)})


# ---- encoder and decoder


class Translator(nn.Module):
    """A transformer with one embedding for inputs, outputs and logits; 0 is padding."""

    train: bool = False
    decode: bool = False
    vocabulary: int = 50

    def setup(self):
        self.shared = nn.Embed(self.vocabulary, 24)
        self.block = EncoderBlock(self.train)
        self.encoder_norm = nn.LayerNorm()
        self.decoder_block = DecoderBlock(self.train, self.decode)
        self.decoder_norm = nn.LayerNorm()

    def embed(self, ids, start=0):
        table = jnp.asarray(zoo.sinusoids(16, 24))
        places = jax.lax.dynamic_slice_in_dim(table, start, ids.shape[1], 0)
        return self.shared(ids) * 24**0.5 + places[None]

    def encode(self, ids):
        mask = nn.make_attention_mask(ids > 0, ids > 0)
        return self.encoder_norm(self.block(self.embed(ids), mask))

    def decode_from(self, encoded, ids, targets, start=0):
        cross = nn.make_attention_mask(jnp.ones_like(targets), ids > 0)
        mask = None
        if not self.decode:
            mask = nn.combine_masks(
                nn.make_attention_mask(targets > 0, targets > 0), nn.make_causal_mask(targets)
            )
        y = self.decoder_block(self.embed(targets, start), encoded, mask, cross)
        return self.shared.attend(self.decoder_norm(y)) / 24**0.5

    def __call__(self, ids, targets):
        shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
        return self.decode_from(self.encode(ids), ids, shifted)

    def start(self, ids, token):
        """Keeps what is encoded for the steps to come; logits of the first."""
        self.put_variable("cache", "encoded", self.encode(ids))
        return self.step(ids, token, 0)

    def step(self, ids, token, place):
        """Logits of one more token."""
        encoded = self.get_variable("cache", "encoded")
        return self.decode_from(encoded, ids, token, place)


class DecoderBlock(nn.Module):
    """Attention to what was said, then to what was read, then two dense layers."""

    train: bool
    decode: bool

    @nn.compact
    def __call__(self, x, encoded, mask, cross):
        def attend(name, **kwargs):
            return nn.MultiHeadDotProductAttention(
                4,
                qkv_features=28,
                dropout_rate=0.1,
                deterministic=not self.train,
                name=name,
                **kwargs,
            )

        x = x + attend("attention", decode=self.decode)(nn.LayerNorm()(x), mask=mask)
        x = x + attend("cross", use_bias=False)(nn.LayerNorm()(x), encoded, mask=cross)
        y = nn.relu(nn.Dense(40)(nn.LayerNorm()(x)))
        return x + nn.Dense(24)(nn.Dropout(0.1, deterministic=not self.train)(y))


def translator():
    ids, targets = tokens(2, 6, below=50, pad=2), tokens(2, 5, below=50, pad=1)
    model = Translator()
    params = variables_of(model, ids, targets)
    stepping = Translator(decode=True)
    with jax.enable_x64(False):
        cache = jax.eval_shape(stepping.init, KEY, ids, targets)["cache"]
    token, step = targets[:, :1], (ids, targets[:, :1], jnp.int32(2))
    variables = params | {"cache": zoo.filled(cache | {"encoded": draw(2, 6, 24)})}

    traces = {
        "evaluate": Trace(apply(model), (ids, targets)),
        "train": Trace(apply(Translator(train=True), rngs={"dropout": KEY}), (ids, targets)),
        "start": Trace(apply(stepping, ["cache"], method="start"), (ids, token), second),
        "step": Trace(apply(stepping, ["cache"], method="step"), step, second),
    }
    others = {"evaluate": (tokens(3, 9, below=50, pad=2), tokens(3, 12, below=50, pad=1))}
    return Case(variables, traces, others)


# ---- decoder-only language model


class RMSNorm(nn.Module):
    """With a scale around 1, as in Gemma."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        variance = jnp.mean(jnp.square(x), -1, keepdims=True)
        return x * jax.lax.rsqrt(variance + 1e-6) * (1 + scale).reshape((1,) * (x.ndim - 1) + (-1,))


class Einsum(nn.Module):
    """A kernel of any shape."""

    shape: tuple

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), self.shape))


class GemmaAttention(nn.Module):
    """Groups of queries share a key and a value; fused keys and values; caches."""

    length: int

    @nn.compact
    def __call__(self, x, positions, use):
        q = zoo.rotate_halves(Einsum((6, 24, 8), name="q")("btd,ndh->btnh", x), positions)
        k, v = Einsum((2, 3, 24, 8), name="kv")("bsd,ckdh->cbskh", x)
        k = zoo.rotate_halves(k, positions)
        shape = x.shape[0], self.length, 3, 8
        caches = [self.variable("cache", name, jnp.zeros, shape, x.dtype) for name in "kv"]
        if use is not None:
            for cache, new in zip(caches, (k, v)):
                cache.value = use(cache.value, new, positions[0, 0])
            k, v = (cache.value for cache in caches)
        q = q.reshape(*q.shape[:2], 3, 2, 8) * 8**-0.5
        logits = jnp.einsum("btkgh,bskh->btkgs", q, k)
        logits = 20 * jnp.tanh(logits / 20)
        seen = positions[:, :, None] >= jnp.arange(k.shape[1])[None, None]
        logits = jnp.where(seen[:, :, None, None], logits, -1e9)
        y = jnp.einsum("btkgs,bskh->btkgh", nn.softmax(logits, -1), v)
        y = y.reshape(*x.shape[:2], 6, 8)
        return Einsum((6, 8, 24), name="out")("btnh,nhd->btd", y)


class GemmaFeedForward(nn.Module):
    """Gated, gate and up in one kernel."""

    @nn.compact
    def __call__(self, x):
        gating = self.param("gating", nn.initializers.normal(), (2, 24, 40))
        hidden = nn.gelu(x @ gating[0]) * (x @ gating[1])
        return hidden @ self.param("linear", nn.initializers.normal(), (40, 24))


class Gemma(nn.Module):
    """A language model with norms before and behind, and capped logits."""

    length: int = 9

    @nn.compact
    def __call__(self, ids, start=0, use=None):
        table = self.param("embedding", nn.initializers.normal(), (50, 24))
        positions = jnp.broadcast_to(start + jnp.arange(ids.shape[1])[None], ids.shape)
        x = table[ids] * jnp.sqrt(24.0).astype(table.dtype)
        for _ in range(2):
            y = GemmaAttention(self.length)(RMSNorm()(x), positions, use)
            x = x + RMSNorm()(y)
            x = x + RMSNorm()(GemmaFeedForward()(RMSNorm()(x)))
        return 30 * jnp.tanh(jnp.dot(RMSNorm()(x), table.T) / 30)


def language_model():
    model, ids, place = Gemma(), tokens(2, 5, below=50), jnp.int32(5)
    variables = variables_of(model, ids)
    step = ids[:, :1], place
    traces = {
        "train": Trace(lambda v, ids: model.apply(v, ids), (ids,)),
        "prefill": Trace(apply(model, ["cache"], use=zoo.write_slice), (ids,), second),
        "decode": Trace(apply(model, ["cache"], use=zoo.write_slice), step, second),
        "decode, scatter": Trace(apply(model, ["cache"], use=zoo.write_at), step, second),
    }
    return Case(variables, traces)


# ---- state space


class Mamba(nn.Module):
    """A selective state space behind a causal convolution, with a gate."""

    @nn.compact
    def __call__(self, x, how):
        x, gate = jnp.split(nn.Dense(80, use_bias=False, name="in")(x), 2, -1)
        x = nn.Conv(40, (4,), padding="CAUSAL", feature_group_count=40, name="conv")(x)
        x = nn.silu(x)
        raw, b, c = jnp.split(nn.Dense(15, use_bias=False, name="project")(x), [3, 9], -1)
        steps = nn.softplus(nn.Dense(40, name="steps")(raw))
        a_log = self.param("a_log", nn.initializers.normal(), (40, 6))
        skip = self.param("skip", nn.initializers.ones, (40,))
        y = zoo.selective_scan(x, steps, a_log, b, c, skip, how)
        return nn.Dense(24, use_bias=False, name="out")(y * nn.silu(gate))


class MambaModel(nn.Module):
    """An embedding, blocks, a tied head."""

    @nn.compact
    def __call__(self, ids, how):
        embedding = nn.Embed(50, 24)
        x = embedding(ids)
        for _ in range(2):
            x = x + Mamba()(nn.RMSNorm()(x), how)
        return embedding.attend(nn.RMSNorm()(x))


def state_space():
    model, ids = MambaModel(), tokens(2, 8, below=50)
    variables = variables_of(model, ids, how="scan")
    traces = {
        "scan": Trace(apply(model, how="scan"), (ids,)),
        "associative scan": Trace(apply(model, how="associative"), (ids,)),
    }
    return Case(variables, traces, dict.fromkeys(traces, (tokens(3, 12, below=50),)))


class S4D(nn.Module):
    """Diagonal state spaces, applied as one long convolution; a gated output."""

    @nn.compact
    def __call__(self, x):
        dim, draw = x.shape[-1], nn.initializers.normal()
        y = zoo.long_convolution(
            x,
            self.param("log_step", draw, (dim,)),
            self.param("a_real", draw, (dim, 6)),
            self.param("a_imag", draw, (dim, 6)),
            self.param("c", draw, (dim, 6, 2)),
        )
        y = nn.gelu(y + x * self.param("skip", draw, (dim,))[None, None])
        return nn.glu(nn.Dense(2 * dim)(y), -1)


class S4DModel(nn.Module):
    """Blocks with residuals and layer norms, then the mean over time."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(20)(x)
        for _ in range(2):
            x = nn.LayerNorm()(x + S4D()(x))
        return nn.Dense(10)(x.mean(1))


def long_convolutions():
    model, x = S4DModel(), draw(2, 8, 3)
    traces = {"evaluate": Trace(apply(model), (x,))}
    return Case(variables_of(model, x), traces, {"evaluate": (draw(3, 12, 3),)})


# ---- recurrent


class Recurrent(nn.Module):
    """An LSTM, and GRUs in both directions, over sequences of several lengths."""

    @nn.compact
    def __call__(self, ids, lengths):
        x = nn.Embed(30, 12)(ids)
        own = {"param_dtype": x.dtype}  # also of what is carried
        x = nn.RNN(nn.OptimizedLSTMCell(20, **own))(x, seq_lengths=lengths)
        forward, backward = nn.RNN(nn.GRUCell(14, **own)), nn.RNN(nn.GRUCell(16, **own))
        x = nn.Bidirectional(forward, backward)(x, seq_lengths=lengths)
        x = nn.RNN(nn.LSTMCell(18, **own))(x)
        return nn.Dense(10)(x)


def recurrent():
    model, args = Recurrent(), (tokens(2, 6, below=30), np.int32([6, 4]))
    others = {"evaluate": (tokens(3, 9, below=30), np.int32([6, 9, 2]))}
    traces = {"evaluate": Trace(apply(model), args)}
    return Case(variables_of(model, *args), traces, others)


# ---- a scan over layers


class Scanned(nn.Module):
    """Blocks with stacked weights, run by `nn.scan` and rematerialised."""

    train: bool

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(50, 24)(ids)
        mask = nn.make_causal_mask(ids)
        block = nn.remat(EncoderBlock, prevent_cse=False)
        stack = nn.scan(
            lambda block, x, _: (block(x, mask), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        x, _ = stack(block(self.train, name="blocks"), x, None)
        return nn.Dense(50)(nn.LayerNorm()(x))


def scanned():
    ids = tokens(2, 5, below=50)
    traces = {
        "evaluate": Trace(apply(Scanned(False)), (ids,)),
        "train": Trace(apply(Scanned(True), rngs={"dropout": KEY}), (ids,)),
    }
    variables = variables_of(Scanned(False), ids)
    return Case(variables, traces, {"evaluate": (tokens(3, 8, below=50),)})


MODELS: dict[str, Any] = {
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
