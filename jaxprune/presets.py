"""Rules for the argument `prunable` that suit common kinds of networks.

A rule is a function `(path, leaf) -> bool`, as you would write it. `summarize(params,
prunable=rule)` shows what it chooses.
"""

import re
from typing import Any

from jaxprune import trees

__all__ = ["pointwise", "transformer"]

# Words in a key of the path, and beginnings of such words.
_OUTSIDE = {"head", "heads", "classifier", "pooler", "predictions", "readout", "router", "stem"}
_OUTSIDE |= {"wte", "wpe", "vocab", "final", "lora", "adapter", "adapters"}
_OUTSIDE_STARTS = ("embed", "emb", "patch", "logit", "unembed", "lora")
_ATTENTION = {"q", "k", "v", "qkv", "kv", "query", "key", "value", "queries", "keys", "values"}
_ATTENTION |= {"wq", "wk", "wv", "wqkv", "wkv"}
_MLP = {"ff", "ffn", "ffw", "feed", "feeds", "moe", "expert", "experts"}
_MLP_PARTS = ("mlp", "feedforward", "densereludense", "swiglu", "geglu")
_BLOCK_ENDS = ("block", "blocks", "layer", "layers", "transformer")
# A layer of these names is no block of a transformer.
_ENDS = {"first", "last", "input", "output", "in", "out"}


def transformer(path: str, leaf: Any) -> bool:
    """Chooses the kernels of attention and MLPs: what is pruned in language models and ViTs.

    It excludes what `trees.why_not_pruned` excludes (biases, norms, positions, learnt tokens,
    running averages), and embeddings, patch embeddings and convolutions, output heads, classifiers
    and poolers, the routers of experts, and LoRA factors.

    Dtypes and dimensions are facts: a leaf is chosen only if it is floating point, of at least two
    dimensions, and, outside of attention, of at most three, which a convolution of images exceeds.
    All else is known by name, because the tree of an embedding looks like that of a kernel. A leaf
    is chosen if a key of its path names attention (`attn`, `attention`, `q_proj`, `query`, `wq`),
    an MLP (`mlp`, `ffn`, `feed_forward`, `experts`), or a block (`block_0`, `layers/0`, `h/0`,
    `transformer`), and no key names one of the exclusions. Networks with other names need their own
    rule.

    Args:
        path: the path of the leaf, such as `"layers/0/attention/query/kernel"`.
        leaf: anything; arrays may be `jax.ShapeDtypeStruct`.

    Returns:
        Whether the leaf is pruned. Where a rule chooses no leaf of a tree, that is an error of the
        function that the rule is given to.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxprune
        >>> params = {
        ...     "embed": {"embedding": jnp.ones((9, 4))},
        ...     "layers": [{"query": {"kernel": jnp.ones((4, 4))}, "norm": {"scale": jnp.ones(4)}}],
        ...     "lm_head": {"kernel": jnp.ones((4, 9))},
        ... }
        >>> pruned, masks = jaxprune.prune(params, 0.5, prunable=transformer)
        >>> [path for path, mask in jaxprune.trees.leaf_by_path(masks).items() if not mask.all()]
        ['layers/0/query/kernel']
    """
    if trees.why_not_pruned(path, leaf) is not None:
        return False
    keys = path.split("/")
    if re.fullmatch(r"b(\d+|_.*)?", keys[-1]) or any(map(_is_outside, ["", *keys], keys)):
        return False
    if any(map(_is_attention, keys)):
        return True
    in_block = any(map(_is_mlp, keys)) or any(map(_is_block, keys, [*keys[1:], ""]))
    return in_block and len(leaf.shape) <= 3


def pointwise(path: str, leaf: Any) -> bool:
    """Chooses the kernels of 1x1 convolutions: what runtimes of phones and browsers run sparse.

    Networks of depthwise convolutions have nearly all their weights and arithmetic there.

    Args:
        path: the path of the leaf, such as `"blocks/0/project/conv/kernel"`.
        leaf: anything; arrays may be `jax.ShapeDtypeStruct`.

    Returns:
        Whether the leaf is a floating kernel of shape [1, 1, inputs, outputs].

    Example:
        >>> import jax.numpy as jnp
        >>> pointwise("project/kernel", jnp.ones((1, 1, 8, 16)))
        True
        >>> pointwise("depthwise/kernel", jnp.ones((3, 3, 1, 8)))
        False

    References:
        Elsen, Dukhan, Gale, Simonyan. Fast Sparse ConvNets. arXiv:1911.09723.
    """
    if trees.why_not_pruned(path, leaf) is not None:
        return False
    return len(leaf.shape) == 4 and tuple(leaf.shape[:2]) == (1, 1)


def _words(key: str) -> list[str]:
    """Splits a key into words: `"CausalAttn_0"` -> `["causal", "attn"]`."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)]


def _is_outside(before: str, key: str) -> bool:
    """Returns whether a key names something that is not part of a block."""
    if _names_attention(key):  # such as MultiHeadDotProductAttention_0
        return "lora" in key.lower()
    words = _words(key)
    is_router = key == "gate" and "moe" in before.lower()
    starts = any(word.startswith(_OUTSIDE_STARTS) or word.endswith("lora") for word in words)
    return is_router or starts or not _OUTSIDE.isdisjoint(words)


def _names_attention(key: str) -> bool:
    """Returns whether a key says attention in full."""
    return "attn" in key.lower() or "attention" in key.lower()


def _is_attention(key: str) -> bool:
    """Returns whether a key names attention or one of its kernels."""
    return _names_attention(key) or not _ATTENTION.isdisjoint(_words(key))


def _is_mlp(key: str) -> bool:
    """Returns whether a key names an MLP of a block."""
    words = _words(key)
    joined = "".join(words)
    return not _MLP.isdisjoint(words) or any(part in joined for part in _MLP_PARTS)


def _is_block(key: str, following: str) -> bool:
    """Returns whether a key names a block of attention and MLP, or a list of such."""
    words = _words(key)
    if words == ["h"]:
        return key != "h" or following.isdigit()
    return any(word.endswith(_BLOCK_ENDS) for word in words) and _ENDS.isdisjoint(words)
