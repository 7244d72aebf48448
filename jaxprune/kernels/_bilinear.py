"""Three passes of a layer, each the derivative of the others, as one differentiable function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap, sequential_vmap

from jaxprune.kernels import _building
from jaxprune.kernels._finishing import Finish

Pass = Callable[..., jax.Array]


def bilinear(forward: Pass, backward: Pass, sample: Pass) -> Pass:
    """Returns a function that is linear in `x` and in the weights, with its derivatives.

    y = forward(x, w), and for a cotangent dy of y the cotangents are backward(dy, w) of x and
    sample(x, dy) of w. The same three give the derivatives of the last two, so gradients of
    gradients work. Forward-mode derivatives do not.

    Args:
        forward: (x, weights, indices) -> y.
        backward: (dy, weights, indices) -> dx.
        sample: (x, dy, indices, packed) -> gradient of the weights, 0 off the mask.
    """

    @jax.custom_vjp
    def apply(x: Any, weights: Any, indices: Any) -> jax.Array:
        return forward(x, weights, indices)

    @jax.custom_vjp
    def transposed(dy: Any, weights: Any, indices: Any) -> jax.Array:
        return backward(dy, weights, indices)

    def sampled(packed: bool) -> Pass:
        @jax.custom_vjp
        def gradient(x: Any, dy: Any, indices: Any) -> jax.Array:
            return sample(x, dy, indices, packed)

        def backwards(kept: Any, weights: Any) -> Any:
            x, dy, indices = kept
            return transposed(dy, weights, indices), apply(x, weights, indices), None

        gradient.defvjp(_keeping(gradient), backwards)
        return gradient

    samples = {packed: sampled(packed) for packed in (False, True)}

    def apply_backwards(kept: Any, dy: Any) -> Any:
        x, weights, indices = kept
        gradient = samples[weights.ndim == 1](x, dy, indices)
        return transposed(dy, weights, indices), gradient, None

    def transposed_backwards(kept: Any, x: Any) -> Any:
        dy, weights, indices = kept
        gradient = samples[weights.ndim == 1](x, dy, indices)
        return apply(x, weights, indices), gradient, None

    apply.defvjp(_keeping(apply), apply_backwards)
    transposed.defvjp(_keeping(transposed), transposed_backwards)
    return apply


def _keeping(function: Pass) -> Callable[..., Any]:
    """Returns the forward rule that keeps all arguments."""

    def rule(*args: Any) -> Any:
        return function(*args), args

    return rule


def native(name: str, dense: Pass, operands: Callable[..., Any], **attributes: Any) -> Pass:
    """Returns a pass that calls a kernel on CPUs, and a dense function on other devices.

    Args:
        name: the handler.
        dense: the same as a dense function; the result has its shape.
        operands: the arguments of `dense` -> the operands of the handler.
        attributes: of the handler.
    """

    def run(*args: Any) -> jax.Array:
        if _building.available() is not None:
            return dense(*args)

        def call(*args: Any) -> jax.Array:
            shape = jax.eval_shape(dense, *args)
            kernel = jax.ffi.ffi_call(_building.target(name), shape)
            return kernel(*operands(*args), **attributes)

        return lax.platform_dependent(*args, cpu=call, default=dense)

    return run


def finished(
    name: str, apply: Pass, finish: Finish, operands: Callable[..., Any], **attributes: Any
) -> Pass:
    """Returns `finish.apply(apply(x, weights, indices))` as one call of a kernel.

    Args:
        name: the handler.
        apply: (x, weights, indices) -> sums.
        finish: what to do to them. Its arrays are arguments of the result, after the other three.
        operands: (x, weights, indices) -> the operands of the handler.
        attributes: of the handler.

    Returns:
        (x, weights, indices, scale, shift, rest) -> y. All derivatives are 0.
    """

    def plain(x: Any, weights: Any, indices: Any, *arrays: Any) -> jax.Array:
        scale, shift, rest = (own if own.size else None for own in arrays)
        own = finish._replace(scale=scale, shift=shift, rest=rest)
        return own.apply(apply(x, weights, indices))

    limits = {"low": np.float32(finish.low), "high": np.float32(finish.high)}
    kernel = native(
        name, plain, lambda *args: (*operands(*args[:3]), *args[3:]), **limits, **attributes
    )

    @custom_vmap
    def run(*args: Any) -> jax.Array:
        return kernel(*args)

    @run.def_vmap
    def rule(size: int, batched: Any, *args: Any) -> Any:
        x, *middle, rest = args
        if any(jax.tree.leaves(batched[1:5])) or not batched[0]:
            return one_by_one(size, batched, run, args), True
        if rest.size and not batched[5]:
            rest = jnp.broadcast_to(rest, (size, *rest.shape))
        flat = [own.reshape(-1, *own.shape[2:]) if own.size else own for own in (x, rest)]
        y = run(flat[0], *middle, flat[1])
        return y.reshape(size, -1, *y.shape[1:]), True

    return lambda *args: run(*lax.stop_gradient(args))


def arrays_of(finish: Finish) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the arrays that a pass from `finished` takes; those that are absent are empty."""
    empty = jnp.zeros(0, jnp.float32)
    own = (finish.scale, finish.shift, finish.rest)
    scale, shift, rest = (empty if array is None else array for array in own)
    return scale, shift, rest


def folded(run: Pass) -> Pass:
    """Returns a pass that takes a batch of `x` under `vmap` as more rows or images of one call.

    Args:
        run: (x [rows, ...], weights, indices) -> y [rows, ...].
    """

    @custom_vmap
    def apply(x: Any, weights: Any, indices: Any) -> jax.Array:
        return run(x, weights, indices)

    @apply.def_vmap
    def rule(size: int, batched: Any, x: Any, weights: Any, indices: Any) -> Any:
        if batched[0] and not any(jax.tree.leaves(batched[1:])):
            y = apply(x.reshape(-1, *x.shape[2:]), weights, indices)
            return y.reshape(size, -1, *y.shape[1:]), True
        return one_by_one(size, batched, apply, (x, weights, indices)), True

    return apply


def one_by_one(size: int, batched: Any, run: Pass, args: Any) -> jax.Array:
    """Calls a pass for each member of a batch in a loop."""
    moving, flags = jax.tree.flatten(args)[0], jax.tree.leaves(batched)
    structure = jax.tree.structure(args)

    def body(own: Any) -> jax.Array:
        rest = iter(own)
        leaves = [next(rest) if flag else leaf for flag, leaf in zip(flags, moving)]
        return run(*jax.tree.unflatten(structure, leaves))

    return lax.map(body, [leaf for flag, leaf in zip(flags, moving) if flag])


def separate(run: Pass) -> Pass:
    """Returns a pass (x, dy, indices) that is called for each member of a batch under `vmap`."""
    return sequential_vmap(run)


def is_supported(*arrays: Any) -> bool:
    """Tells whether kernels compute on arrays: in float32, in which narrower ones are stored."""
    return jnp.result_type(*arrays) in (jnp.float32, jnp.bfloat16, jnp.float16)
