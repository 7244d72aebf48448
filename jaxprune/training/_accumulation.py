"""Gradients of a batch split into micro-batches, so that only one part's activations live."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["is_product", "over_parts"]

Gradients = Callable[..., tuple[Any, tuple[Any, Any]]]


def over_parts(gradients: Gradients, parts: int) -> Gradients:
    """Averages gradients and metrics over micro-batches, one after the other.

    Args:
        gradients: `(params, model_state, inputs, labels) -> (gradients, (metrics, model_state))`.
        parts: number of micro-batches; 1 changes nothing.

    Returns:
        A function with the same arguments and results. The model state passes from each part to the
        next. It raises ValueError if `parts` does not divide the batch.

    Example:
        >>> def gradients(w, state, x, y):
        ...     return (x * w).mean(), (y.mean(), state + 1)
        >>> x = jnp.arange(6.0)
        >>> found = over_parts(gradients, 3)(jnp.ones(()), jnp.zeros((), int), x, 2 * x)
        >>> jax.tree.map(float, found)
        (2.5, (5.0, 3.0))
    """
    if parts == 1:
        return gradients

    def means(params: Any, model_state: Any, *batch: jax.Array) -> tuple[Any, tuple[Any, Any]]:
        size = len(batch[0])
        if size % parts:
            raise ValueError(f"`parts` must divide the batch ({size}); got {parts}.")
        # Part i has the examples i, i + parts, ..., so each device has its share of every part.
        split = [x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1) for x in batch]

        def add(carry: Any, part: Any, unroll: bool) -> tuple[Any, None]:
            model_state, sums = carry
            inputs, *rest = part
            inputs = _after(sums, inputs) if unroll else inputs
            grads, (metrics, model_state) = gradients(params, model_state, inputs, *rest)
            return (model_state, jax.tree.map(jnp.add, sums, (grads, metrics))), None

        def loop(unroll: bool, *start: Any) -> Any:
            return jax.lax.scan(partial(add, unroll=unroll), start, split, unroll=unroll)[0]

        first = [x[0] for x in split]
        grads, (metrics, _) = jax.eval_shape(gradients, params, model_state, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))
        # On CPU a convolution in a loop is 12 times slower.
        model_state, sums = jax.lax.platform_dependent(
            model_state, zeros, cpu=partial(loop, True), default=partial(loop, False)
        )
        grads, metrics = jax.tree.map(lambda x: x / parts, sums)
        return grads, (metrics, model_state)

    return means


def is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves results of convolutions and matrix products, as a policy of `jax.checkpoint`.

    Example:
        >>> is_product(jax.lax.dot_general_p), is_product(jax.lax.exp_p)
        (True, False)
    """
    return primitive.name in ("conv_general_dilated", "dot_general")


def _after(earlier: Any, inputs: jax.Array) -> jax.Array:
    """Makes `inputs` depend on `earlier`, so that the activations of two parts never coexist.

    XLA:CPU drops `optimization_barrier`. It cannot drop a product with 0, as that of NaN is not 0.
    """
    first = jnp.stack([leaf.ravel()[0].astype(inputs.dtype) for leaf in jax.tree.leaves(earlier)])
    return inputs + 0 * first.sum()
