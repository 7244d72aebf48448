"""The perplexity of a language model, before and after pruning."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.training._steps import cross_entropy


def perplexity(
    apply: Callable[[Any, jax.Array], jax.Array], params: Any, batches: Iterable[Any]
) -> float:
    """Computes how uncertain a language model is of the next token: `exp(mean loss)`.

    The mean is over all tokens but the first of each text. The loss is in nats, so the logarithm
    of base 2 of the result is in bits per token, and for a model of bytes in bits per byte.

    Args:
        apply: function `(params, tokens) -> logits`, floating [B, T, vocabulary], of the token
            after each. It is compiled once for all calls with the same function and shapes.
        params: tree of arrays.
        batches: iterable of batches; each is integers [B, T], or a pair of these and a bool mask
            [B, T], False for tokens that are not to be predicted, such as padding.

    Returns:
        A Python float, at least 1; `inf` if it is beyond the largest float,
        NaN if a loss is.

    Raises:
        TypeError: if `batches` is a single array.
        ValueError: if a batch is no integers [B, T], logits or mask do not fit it, or there is no
            token to predict.

    Example:
        >>> def apply(params, tokens):
        ...     return jnp.zeros((*tokens.shape, 256))  # a model that knows nothing of bytes
        >>> round(perplexity(apply, {}, [jnp.zeros((2, 8), int)]), 2)
        256.0
    """
    if hasattr(batches, "shape"):
        raise TypeError(
            "`batches` must be an iterable of batches, but is one array; pass `[tokens]`."
        )
    total, count = 0.0, 0
    for batch in batches:
        tokens, mask = batch if isinstance(batch, (tuple, list)) else (batch, None)
        tokens = jnp.asarray(tokens)
        mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"`batches` must hold integers [B, T], but has {tokens.dtype} {tokens.shape}; "
                "give the numbers of tokens, not their vectors."
            )
        if mask.shape != tokens.shape:
            raise ValueError(
                f"`batches` must have masks of the shape of the tokens, {tokens.shape}, but one is "
                f"{mask.shape}."
            )
        loss, number = _loss(apply, params, tokens, mask)
        total, count = total + float(loss), count + int(number)
    if not count:
        raise ValueError(
            "`batches` must have tokens to predict, but has none; give at least one text of two "
            "tokens, with a mask that is not False everywhere."
        )
    mean = total / count
    return math.inf if mean > 709 else math.exp(mean)


@functools.partial(jax.jit, static_argnums=0)
def _loss(
    apply: Any, params: Any, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the losses of a batch, and their number."""
    logits = apply(params, tokens)
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"`apply` must return logits [B, T, vocabulary] for tokens {tokens.shape}, but their "
            f"shape is {logits.shape}."
        )
    losses = cross_entropy(logits[:, :-1], tokens[:, 1:])
    counted = mask[:, 1:]
    return jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(counted, dtype=jnp.int32)
