"""What `presets.transformer` chooses in trees of many frameworks and code bases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune
from jaxprune import models, presets, stacks, trees
from tests.support import zoo_linen, zoo_nnx
from tests.support.clients import CLIENTS

# Trees as published code names them, path -> shape: first what is chosen, then what is not.
PUBLISHED = {
    "GPT-2, Hugging Face Flax": (
        {
            "transformer/h/0/attn/c_attn/kernel": (192, 64),
            "transformer/h/0/attn/c_proj/kernel": (64, 64),
            "transformer/h/11/mlp/c_fc/kernel": (256, 64),
            "transformer/h/11/mlp/c_proj/kernel": (64, 256),
        },
        {
            "transformer/wte/embedding": (100, 64),
            "transformer/wpe/embedding": (32, 64),
            "transformer/h/0/ln_1/scale": (64,),
            "transformer/ln_f/scale": (64,),
            "lm_head/kernel": (64, 100),
        },
    ),
    "LLaMA, Hugging Face Flax": (
        {f"model/layers/3/self_attn/{name}_proj/kernel": (64, 64) for name in "qkvo"}
        | {f"model/layers/3/mlp/{name}_proj/kernel": (64, 64) for name in ("gate", "up", "down")},
        {
            "model/embed_tokens/embedding": (100, 64),
            "model/layers/3/input_layernorm/weight": (64,),
            "model/norm/weight": (64,),
            "lm_head/kernel": (64, 100),
            "score/kernel": (64, 2),
        },
    ),
    "BERT, Hugging Face Flax": (
        {
            "bert/encoder/layer/0/attention/self/query/kernel": (64, 64),
            "bert/encoder/layer/0/attention/output/dense/kernel": (64, 64),
            "bert/encoder/layer/0/intermediate/dense/kernel": (64, 256),
            "bert/encoder/layer/0/output/dense/kernel": (256, 64),
        },
        {
            "bert/embeddings/word_embeddings/embedding": (100, 64),
            "bert/embeddings/position_embeddings/embedding": (32, 64),
            "bert/pooler/dense/kernel": (64, 64),
            "cls/predictions/transform/dense/kernel": (64, 64),
            "cls/predictions/decoder/kernel": (64, 100),
            "classifier/kernel": (64, 2),
        },
    ),
    "T5, Hugging Face Flax": (
        {
            "encoder/block/0/layer/0/SelfAttention/q/kernel": (64, 64),
            "encoder/block/0/layer/1/DenseReluDense/wi_0/kernel": (64, 128),
            "decoder/block/0/layer/1/EncDecAttention/o/kernel": (64, 64),
        },
        {
            "shared/embedding": (100, 64),
            "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding": (32, 8),
            "encoder/block/0/layer/0/layer_norm/weight": (64,),
            "lm_head/kernel": (64, 100),
        },
    ),
    "ViT, Hugging Face Flax": (
        {"vit/encoder/layer/0/attention/attention/query/kernel": (64, 64)},
        {
            "vit/embeddings/cls_token": (1, 1, 64),
            "vit/embeddings/patch_embeddings/projection/kernel": (16, 16, 3, 64),
            "vit/embeddings/position_embeddings": (1, 197, 64),
            "classifier/kernel": (64, 10),
        },
    ),
    "ViT, Linen": (
        {
            "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": (64, 256),
            "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel": (4, 16, 64),
        },
        {
            "Transformer/encoderblock_0/LayerNorm_0/scale": (64,),
            "Transformer/encoder_norm/scale": (64,),
            "Transformer/posembed_input/pos_embedding": (1, 197, 64),
            "embedding/kernel": (16, 16, 3, 64),
            "cls": (1, 1, 64),
            "pre_logits/kernel": (64, 64),
            "head/kernel": (64, 10),
        },
    ),
    "LM1B, Linen": (
        {
            "decoder/encoderdecoderblock_0/MultiHeadDotProductAttention_0/key/kernel": (64, 4, 16),
            "decoder/encoderdecoderblock_0/MlpBlock_0/Dense_1/kernel": (256, 64),
        },
        {"decoder/Embed_0/embedding": (100, 64), "decoder/logitdense/kernel": (64, 100)},
    ),
    "nanodo": (
        {
            "blocks_0/CausalAttn_0/query/kernel": (64, 4, 16),
            "blocks_0/CausalAttn_0/attn_out_proj/kernel": (4, 16, 64),
            "blocks_0/Mlp_0/Dense_0/kernel": (64, 256),
        },
        {
            "embed/embedding": (100, 64),
            "pos_embed/embedding": (32, 64),
            "blocks_0/LayerNorm_0/scale": (64,),
        },
    ),
    "nanoGPT in plain JAX": (
        {f"blocks/{name}": (12, 64, 64) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "c_fc")},
        {
            "wte": (100, 64),
            "wpe": (32, 64),
            "blocks/ln_1": (12, 64),
            "blocks/b1": (12, 64),
            "unembed": (64, 100),
        },
    ),
    "Gemma": (
        {
            "transformer/layer_0/attn/q_einsum/w": (4, 64, 16),
            "transformer/layer_0/attn/kv_einsum/w": (2, 2, 64, 16),
            "transformer/layer_0/attn/attn_vec_einsum/w": (4, 16, 64),
            "transformer/layer_0/mlp/gating_einsum": (2, 64, 256),
            "transformer/layer_0/mlp/linear": (256, 64),
        },
        {
            "transformer/embedder/input_embedding": (100, 64),
            "transformer/layer_0/pre_attention_norm/scale": (64,),
            "transformer/final_norm/scale": (64,),
        },
    ),
    "MaxText": (
        {
            "decoder/layers/self_attention/query/kernel": (64, 12, 4, 16),
            "decoder/layers/mlp/wi_0/kernel": (64, 12, 256),
            "decoder/layers/MoeBlock_0/wo": (8, 256, 64),
        },
        {
            "token_embedder/embedding": (100, 64),
            "decoder/layers/pre_self_attention_layer_norm/scale": (64, 12),
            "decoder/layers/MoeBlock_0/gate/kernel": (64, 8),
            "decoder/decoder_norm/scale": (64,),
            "decoder/logits_dense/kernel": (64, 100),
        },
    ),
    "Haiku": (
        {
            "transformer/h0_attn/query/w": (64, 64),
            "transformer/h0_mlp/linear_1/w": (256, 64),
            "transformer/linear_3/w": (64, 256),
            "transformer/~/layer_stack/multi_head_attention/linear/w": (12, 64, 64),
        },
        {
            "embed/embeddings": (100, 64),
            "transformer/~/layer_stack/multi_head_attention/linear/b": (12, 64),
            "transformer/h_f/offset": (64,),
            "linear/w": (64, 100),
        },
    ),
    "Equinox": (
        {
            "encoder/layers/0/attention_block/attention/query_proj/weight": (64, 64),
            "encoder/layers/0/ff_block/mlp/weight": (256, 64),
            "encoder/layers/0/mlp/layers/0/weight": (256, 64),
        },
        {
            "encoder/embedder_block/token_embedder/weight": (100, 64),
            "encoder/layers/0/attention_block/layernorm/weight": (12, 64),
            "encoder/pooler/weight": (64, 64),
            "classifier_head/weight": (2, 64),
        },
    ),
    "others": (
        {"blocks/0/multihead/qkv/kernel": (64, 192)},
        {
            "blocks/0/attn/q_proj/kernel_lora_a": (64, 4),
            "blocks/0/attn/q_proj/lora_b": (4, 64),
            "blocks/0/attn/q_proj/lora/a": (64, 4),
            "blocks/0/adapter/down/kernel": (64, 4),
            "blocks/0/router/kernel": (64, 8),
            "blocks/0/conv/kernel": (3, 3, 64, 64),
            "final_layer/linear/kernel": (64, 10),
            "output_layer/kernel": (64, 10),
            "layers/0/attn/steps": (),
            "stem/conv/kernel": (3, 3, 3, 64),
        },
    ),
}


def tree_of(shapes):
    """A nested dict of arrays without values."""
    tree = {}
    for path, shape in shapes.items():
        *modules, name = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def chosen(tree):
    flags = trees.prunable_flags(tree, presets.transformer)
    return {path for path, flag in zip(trees.leaf_by_path(tree), flags, strict=True) if flag}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name):
    kernels, others = PUBLISHED[name]
    assert chosen(tree_of(kernels | others)) == set(kernels)


LAYERS = [(2, 1, 16)] * 2
MODELS = {
    "encoder": lambda: models.Encoder(
        20, width=8, layers=[(2, 16)] * 2, head_dim=4, rngs=nnx.Rngs(0)
    ),
    "vit": lambda: models.ViT(
        8, [(2, 16)] * 2, head_dim=4, patch=4, image_size=8, num_classes=4, rngs=nnx.Rngs(0)
    ),
    "decoder": lambda: models.Decoder(20, width=8, layers=LAYERS, head_dim=4, rngs=nnx.Rngs(0)),
    "scanned": lambda: models.Decoder(
        20, width=8, layers=LAYERS, head_dim=4, scanned=True, rngs=nnx.Rngs(0)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_library(name):
    params = nnx.state(nnx.eval_shape(MODELS[name]), nnx.Param)
    kernels = {
        path
        for path in trees.leaf_by_path(params)
        if path.startswith("layers/") and path.endswith("kernel")
    }
    assert kernels and chosen(params) == kernels


TRANSFORMERS = ["vision transformer", "encoder and decoder", "language model", "scan over layers"]


@pytest.mark.slow
@pytest.mark.parametrize("zoo", [zoo_linen, zoo_nnx], ids=["linen", "nnx"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_others(name, zoo):
    """All kernels but embeddings and what lies at the top of the tree: patches, heads."""
    variables = zoo.MODELS[name]().variables
    kernels = {
        path
        for path, leaf in trees.leaf_by_path(variables).items()
        if trees.why_not_pruned(path, leaf) is None and "embedding" not in path.split("/")[-1]
    }
    assert chosen(variables) == {path for path in kernels if path.count("/") > 2 or "Gemma" in path}


def shapes_of(name):
    module = nnx.eval_shape(lambda: getattr(models, name)(rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(module))


CONVOLUTIONAL = {
    "zoo, Linen": lambda: zoo_linen.MODELS["image classifier"]().variables,
    "zoo, NNX": lambda: zoo_nnx.MODELS["image classifier"]().variables,
    **{name: functools.partial(shapes_of, name) for name in ("resnet20", "resnet50")},
    **{name: functools.partial(shapes_of, name) for name in ("mobilenet_v2", "efficientnet_lite0")},
    **{name: lambda name=name: CLIENTS[name](optax.sgd(0.1)).variables for name in CLIENTS},
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_network_without_attention_is_refused(name):
    with pytest.raises(ValueError, match="`prunable` matches no leaf; change the rule"):
        trees.prunable_flags(CONVOLUTIONAL[name](), presets.transformer)


def test_factors_of_flax():
    """`nnx.LoRA` around a layer of attention; what is already there is chosen as before."""
    rngs = nnx.Rngs(0)
    attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    attention.query = nnx.LoRA(8, 2, 8, base_module=attention.query, rngs=rngs)
    state = nnx.state(nnx.Dict(attention=attention), nnx.Param)
    assert {path for path in trees.leaf_by_path(state) if "lora" in path}
    assert chosen(state) == {
        "attention/query/base_module/kernel",
        "attention/key/kernel",
        "attention/value/kernel",
        "attention/out/kernel",
    }


@pytest.mark.slow
def test_everything_that_takes_prunable_takes_it():
    params = nnx.to_pure_dict(nnx.state(MODELS["scanned"](), nnx.Param))
    options = {"prunable": presets.transformer, "stacked": stacks.under("layers")}
    _, masks = jaxprune.prune(params, 0.5, **options)
    optimizer = jaxprune.magnitude_transform(0.5, stop=3, **options)
    for own in (masks, jaxprune.get_masks(optimizer.init(params))):
        assert np.ndim(own["layers"]["query"]["kernel"]) == 3 and np.all(own["head"]["kernel"])
    rows = jaxprune.summarize(params, **options).rows
    assert {row.path.split("[")[0] for row in rows if row.reason is None} == chosen(params)


def test_pointwise_chooses_the_1x1_convolutions_of_a_mobilenet():
    widths = models.default_widths("mobilenet_v2", 0.25)
    model = nnx.eval_shape(lambda: models.mobilenet_v2(widths=widths, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chosen = {
        path for path, leaf in trees.leaf_by_path(params).items() if presets.pointwise(path, leaf)
    }
    blocks = range(len(widths.blocks))
    wanted = {f"blocks/{index}/project/conv/kernel" for index in blocks}
    wanted |= {f"blocks/{index}/expand/conv/kernel" for index in blocks if index}
    assert chosen == wanted | {"last/conv/kernel"}


def test_pointwise_leaves_integers_alone():
    assert not presets.pointwise("kernel", jax.ShapeDtypeStruct((1, 1, 4, 4), jnp.int32))
