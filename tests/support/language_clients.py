"""Small language models in four frameworks, each with the training loop that its users write.

They follow what people copy: nanodo's decoder in Linen, an example of Flax in NNX, a stack of
blocks that a scan runs over in Equinox, Haiku's own transformer. Only the lines marked `pruning`
are particular to it.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import jaxprune
from jaxprune import presets, stacks

VOCABULARY, LENGTH, WIDTH, HEADS, MLP, LAYERS = 12, 9, 16, 2, 32, 2


def texts(seed: int, count: int = 8) -> np.ndarray:
    """Numbers that go up by the same step, so that the second tells the rest."""
    random = np.random.default_rng(seed)
    start, step = random.integers(0, VOCABULARY, count), random.integers(1, 4, count)
    return (start[:, None] + step[:, None] * np.arange(LENGTH + 1)) % VOCABULARY


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.mean(losses)


def pruning(**options: Any) -> optax.GradientTransformationExtraArgs:  # pruning
    return jaxprune.magnitude_transform(
        0.5, every=1, start=1, stop=4, prunable=presets.transformer, **options
    )


class LanguageClient:
    """A model that trains; `apply` is a pure function of parameters and tokens."""

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any
    opt_state: Any
    step: Callable[[jax.Array], jax.Array]
    stacked: Any = None

    def fit(self, steps: int) -> list[float]:
        return [float(self.step(jnp.asarray(texts(number % 4)))) for number in range(steps)]


# ---- nanodo: a decoder in Linen with a tied embedding, clipping and a schedule


class CausalAttn(nn.Module):
    @nn.compact
    def __call__(self, x):
        split = functools.partial(nn.DenseGeneral, (HEADS, WIDTH // HEADS), use_bias=False)
        query, key, value = (split(name=name)(x) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(WIDTH / HEADS)
        seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(WIDTH, (-2, -1), use_bias=False, name="attn_out_proj")(mixed)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, use_bias=False)(nn.gelu(nn.Dense(MLP, use_bias=False)(x)))


class TBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + CausalAttn()(nn.LayerNorm(use_bias=False)(x))
        return x + Mlp()(nn.LayerNorm(use_bias=False)(x))


class TransformerDo(nn.Module):
    def setup(self):
        self.embed = nn.Embed(VOCABULARY, WIDTH)
        self.pos_embed = nn.Embed(LENGTH + 1, WIDTH)
        self.blocks = [TBlock() for _ in range(LAYERS)]
        self.out_ln = nn.LayerNorm(use_bias=False)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.pos_embed(jnp.arange(tokens.shape[1])[None])
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.out_ln(x))


class Nanodo(LanguageClient):
    kernels = r"blocks_\d/(CausalAttn_0/(query|key|value|attn_out_proj)|Mlp_0/Dense_[01])/kernel"

    def __init__(self) -> None:
        model = TransformerDo()
        schedule = optax.warmup_cosine_decay_schedule(0.0, 0.03, 3, 60)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
        tx = jaxprune.chain(tx, pruning())  # pruning
        self.apply = lambda params, tokens: model.apply({"params": params}, tokens)
        params = jax.jit(model.init)(jax.random.key(0), jnp.asarray(texts(0)))["params"]
        self.state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @staticmethod
    @functools.partial(jax.jit, donate_argnums=0)
    def _next(state, tokens):
        def loss(params):
            return loss_of(state.apply_fn({"params": params}, tokens), tokens)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    def step(self, tokens):
        self.state, value = self._next(self.state, tokens)
        return value

    @property
    def params(self):
        return self.state.params

    @property
    def opt_state(self):
        return self.state.opt_state


# ---- an example of Flax in NNX: dropout, metrics, a module that is updated in place


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.ln1, self.ln2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.linear1 = nnx.Linear(WIDTH, MLP, rngs=rngs)
        self.linear2 = nnx.Linear(MLP, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.05, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.dropout(self.attention(self.ln1(x), mask=mask))
        return x + self.dropout(self.linear2(nnx.relu(self.linear1(self.ln2(x)))))


class MiniGPT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.token_emb = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.pos_emb = nnx.Embed(LENGTH + 1, WIDTH, rngs=rngs)
        self.transformer_blocks = nnx.List(Block(rngs) for _ in range(LAYERS))
        self.output_layer = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.token_emb(tokens) + self.pos_emb(jnp.arange(tokens.shape[1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for block in self.transformer_blocks:
            x = block(x, mask)
        return self.output_layer(x)


@nnx.jit
def nnx_step(model: Any, optimizer: Any, metrics: Any, tokens: jax.Array) -> None:
    value, gradients = nnx.value_and_grad(lambda model: loss_of(model(tokens), tokens))(model)
    metrics.update(loss=value)
    optimizer.update(model, gradients)


class FlaxNNX(LanguageClient):
    kernels = r"transformer_blocks/\d/(attention/(query|key|value|out)|linear[12])/kernel"

    def __init__(self) -> None:
        self.model = MiniGPT(nnx.Rngs(0))
        tx = jaxprune.chain(optax.adamw(0.01), pruning())  # pruning
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)
        self.metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
        graphdef, _, self.others = nnx.split(
            nnx.view(self.model, deterministic=True), nnx.Param, ...
        )
        self.apply = lambda params, tokens: nnx.merge(graphdef, params, self.others)(tokens)

    def step(self, tokens):
        self.model.train()
        self.metrics.reset()
        nnx_step(self.model, self.optimizer, self.metrics, tokens)
        return self.metrics.compute()["loss"]

    @property
    def params(self):
        return nnx.to_pure_dict(nnx.state(self.model, nnx.Param))

    @property
    def opt_state(self):
        return self.optimizer.opt_state


# ---- Equinox: blocks in one stack that a scan runs over


class EquinoxBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, MLP, 1, jax.nn.gelu, key=keys[1])

    def __call__(self, x):
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class EquinoxLM(eqx.Module):
    embedding: eqx.nn.Embedding
    positions: jax.Array
    layers: EquinoxBlock
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 4)
        self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.positions = 0.02 * jax.random.normal(keys[1], (LENGTH + 1, WIDTH))
        self.layers = eqx.filter_vmap(EquinoxBlock)(jax.random.split(keys[2], LAYERS))
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[3])

    def __call__(self, tokens):
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        x = jax.vmap(self.embedding)(tokens) + self.positions[: len(tokens)]
        x, _ = jax.lax.scan(lambda x, own: (eqx.combine(own, static)(x), None), x, arrays)
        return jax.vmap(self.head)(x)


class Equinox(LanguageClient):
    kernels = r"layers/(attention/(query|key|value|output)_proj|mlp/layers/[01])/weight"
    stacked = staticmethod(stacks.under("layers"))

    def __init__(self) -> None:
        self.model = EquinoxLM(jax.random.key(0))
        self.tx = jaxprune.chain(optax.adamw(0.01), pruning(stacked=self.stacked))  # pruning
        arrays, static = eqx.partition(self.model, eqx.is_inexact_array)
        self.opt_state = self.tx.init(arrays)
        self.apply = lambda params, tokens: jax.vmap(eqx.combine(params, static))(tokens)

    @staticmethod
    @eqx.filter_jit
    def _next(model, opt_state, tx, tokens):
        value, gradients = eqx.filter_value_and_grad(
            lambda model: loss_of(jax.vmap(model)(tokens), tokens)
        )(model)
        updates, opt_state = tx.update(gradients, opt_state, model)
        return eqx.apply_updates(model, updates), opt_state, value

    def step(self, tokens):
        new = self._next(self.model, self.opt_state, self.tx, tokens)
        self.model, self.opt_state, value = new
        return value

    @property
    def params(self):
        return eqx.filter(self.model, eqx.is_inexact_array)


# ---- Haiku: modules inside a transformed function


class Transformer(hk.Module):
    def __call__(self, x):
        init = hk.initializers.VarianceScaling(2 / LAYERS)
        mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1])))

        def norm(x):
            return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)

        for _ in range(LAYERS):
            attention = hk.MultiHeadAttention(HEADS, WIDTH // HEADS, model_size=WIDTH, w_init=init)
            y = norm(x)
            x = x + attention(y, y, y, mask=mask)
            dense = hk.Sequential([hk.Linear(MLP), jax.nn.gelu, hk.Linear(WIDTH, w_init=init)])
            x = x + dense(norm(x))
        return norm(x)


def haiku_model(tokens: jax.Array) -> jax.Array:
    places = hk.get_parameter(
        "positional_embeddings", (LENGTH + 1, WIDTH), init=hk.initializers.TruncatedNormal(0.02)
    )
    x = hk.Embed(VOCABULARY, WIDTH)(tokens) + places[None, : tokens.shape[1]]
    return hk.Linear(VOCABULARY)(Transformer()(x))


class Haiku(LanguageClient):
    kernels = r"transformer/(multi_head_attention(_1)?/(query|key|value|linear)|linear(_\d)?)/w"

    def __init__(self) -> None:
        net = hk.without_apply_rng(hk.transform(haiku_model))
        tx = jaxprune.chain(optax.adamw(0.01), pruning())  # pruning
        self.apply = net.apply
        self.params = jax.jit(net.init)(jax.random.key(0), jnp.asarray(texts(0)))
        self.opt_state = tx.init(self.params)

        @jax.jit
        def update(params, opt_state, tokens):
            value, gradients = jax.value_and_grad(
                lambda params: loss_of(net.apply(params, tokens), tokens)
            )(params)
            updates, opt_state = tx.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        self._update = update

    def step(self, tokens):
        self.params, self.opt_state, value = self._update(self.params, self.opt_state, tokens)
        return value


LANGUAGE_CLIENTS: dict[str, Callable[[], Any]] = {
    "nanodo": Nanodo,
    "nnx": FlaxNNX,
    "equinox": Equinox,
    "haiku": Haiku,
}
