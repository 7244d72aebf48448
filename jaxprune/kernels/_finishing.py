"""Follows the output of a kernel through a norm, a sum and a ReLU, which the kernel can do itself.

Sums are in registers when a kernel stores them, so a scale and a shift for each channel, an array
that is added, and a clamp are almost free there. As programs of their own they read and write all
activations once more. In evaluation mode a norm is such a scale and shift.

Every value on the way is computed as the function says, and remembers which `Finish` would give it.
At the ReLU one call computes the whole, and XLA drops what nobody reads any more. So only values
that are read once are followed. Derivatives are those of the function, with its own rules: under
differentiation its steps are computed, and the call is dropped.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from jaxprune import jaxprs, layouts
from jaxprune.layouts import Value

__all__ = ["Finish", "Product", "count_reads", "follow"]

_INF = math.inf


class Finish(NamedTuple):
    """What a kernel does to its sums: `clip(sums * scale + shift + rest, low, high)`.

    Example:
        >>> finish = Finish(jnp.array([2.0]), jnp.array([1.0]), low=0.0)
        >>> finish.apply(jnp.array([[-1.0], [1.0]])).tolist()
        [[0.0], [3.0]]
    """

    scale: Any = None  # float32 [channels], with `shift`; None: 1 and 0
    shift: Any = None
    rest: Any = None  # float32, of the shape of the sums; None: 0
    low: float = -_INF
    high: float = _INF

    @property
    def is_open(self) -> bool:
        """Tells whether nothing is clamped yet."""
        return self.low == -_INF and self.high == _INF

    @property
    def limits(self) -> "Finish":
        """The same without arrays, which can be hashed."""
        return self._replace(scale=None, shift=None, rest=None)

    def apply(self, y: jax.Array) -> jax.Array:
        """Computes it without a kernel."""
        if self.scale is not None:
            scale, shift = (
                jnp.expand_dims(own, range(y.ndim - 1)) for own in (self.scale, self.shift)
            )
            y = y * scale + shift
        if self.rest is not None:
            y = y + self.rest
        return jnp.minimum(jnp.maximum(y, self.low), self.high)


class Product(NamedTuple):
    """A product or convolution that a kernel computes, and the steps after it.

    Example:
        >>> product = Product(lambda finish: finish.apply(jnp.ones((2, 1))), (2, 1))
        >>> product.scaled(jnp.array([3.0])).in_place_of(jnp.zeros((2, 1))).tolist()
        [[3.0], [3.0]]
    """

    compute: Callable[[Finish], jax.Array]
    shape: tuple[int, ...]
    finish: Finish = Finish()

    def in_place_of(self, array: jax.Array) -> jax.Array:
        """Computes all steps by one call, with the derivatives of what they gave one by one."""
        return _instead(array, self.compute(self.finish))

    def then(self, **changes: Any) -> "Product":
        """Adds a step."""
        return self._replace(finish=self.finish._replace(**changes))

    def scaled(self, by: Any) -> "Product":
        """Multiplies by a number for each channel."""
        own = self.finish
        if own.scale is None:
            return self.then(scale=by, shift=jnp.zeros_like(by))
        return self.then(scale=own.scale * by, shift=own.shift * by)

    def shifted(self, by: Any) -> "Product":
        """Adds a number for each channel."""
        own = self.finish
        if own.scale is None:
            return self.then(scale=jnp.ones_like(by), shift=by)
        return self.then(shift=own.shift + by)


@jax.custom_vjp
def _instead(array: jax.Array, same: jax.Array) -> jax.Array:
    """Returns the second of two arrays that are equal to rounding; derivatives are of the first."""
    del array
    return same


_instead.defvjp(
    lambda array, same: (array, None), lambda _, cotangent: (cotangent, jnp.zeros_like(cotangent))
)


class _Repeated(NamedTuple):
    """An array that is the same at every position but for its channels, which come last."""

    numbers: jax.Array  # [channels]


def count_reads(jaxpr: Any) -> Counter:
    """Counts how often each variable of a jaxpr, and of those within it, is read.

    Example:
        >>> closed = jax.make_jaxpr(lambda x: (x + x, x))(1.0)
        >>> count_reads(closed.jaxpr)[closed.jaxpr.invars[0]]
        3
    """
    reads, todo, seen = Counter(), [jaxpr], set()
    while todo:
        own = todo.pop()
        own = getattr(own, "jaxpr", own)  # of a closed one
        if id(own) in seen:
            continue
        seen.add(id(own))
        atoms = [*(atom for equation in own.eqns for atom in equation.invars), *own.outvars]
        reads.update(atom for atom in atoms if not isinstance(atom, core.Literal))
        for equation in own.eqns:
            todo += core.jaxprs_in_params(equation.params)
    return reads


def follow(
    equation: Any, operands: list[Value], found: layouts.Found, reads: Counter
) -> list[Value] | None:
    """Returns the results of a step after a product; None if the equation is none.

    Args:
        equation: any equation.
        operands: its operands.
        found: of the walk.
        reads: of all variables, from `count_reads`.
    """
    name = equation.primitive.name
    if name == "broadcast_in_dim" and len(operands) == 1:
        return _repeated(equation, operands[0])
    products = [
        value.known if isinstance(value.known, Product) and reads[atom] == 1 else None
        for value, atom in zip(operands, equation.invars, strict=True)
    ]
    if not any(products):
        return None
    if name == "jit":
        closed = equation.params["jaxpr"]
        return layouts.walk(closed.jaxpr, closed.consts, operands, found)
    side = 0 if products[0] else 1
    product, after = products[side], None
    if name == "custom_jvp_call" and product and product.finish.is_open:
        limits = _limits(equation.params["call_jaxpr"].jaxpr)
        after = limits and product.then(low=limits[0], high=limits[1])
    elif product and len(operands) == 2:
        after = _after(name, product, operands[1 - side], is_first=side == 0)
    if after is None:
        return None
    arrays = [operand.array for operand in operands]
    (array,) = jaxprs.bind(equation.primitive, equation.params, arrays)
    is_last = not after.finish.is_open
    return [Value(after.in_place_of(array) if is_last else array, known=after)]


def _after(name: str, product: Product, other: Value, is_first: bool) -> Product | None:
    """Returns a product after a step with another operand; None if a kernel cannot do it."""
    own = product.finish
    if name in ("max", "min"):
        limit = _number(other)
        is_free = own.high == _INF and (name == "min" or own.low == -_INF)
        if limit is None or not math.isfinite(limit) or not is_free:
            return None
        return product.then(**{"low" if name == "max" else "high": limit})
    if not own.is_open or own.rest is not None:
        return None
    numbers = _numbers(other, product.shape[-1])
    if numbers is None:
        array = other.array
        if name != "add" or np.shape(array) != product.shape or array.dtype != jnp.float32:
            return None
        return product.then(rest=array)
    if name == "add":
        return product.shifted(numbers)
    if name == "sub" and is_first:
        return product.shifted(-numbers)
    if name == "mul":
        return product.scaled(numbers)
    if name == "div" and is_first:
        return product.scaled(1 / numbers)
    return None


def _repeated(equation: Any, operand: Value) -> list[Value] | None:
    """Remembers what an array repeats, if that is one number or those of the channels."""
    array, shape = operand.array, equation.outvars[0].aval.shape
    if operand.view is not None or operand.zero or not shape or equation.outvars[0].aval.size == 0:
        return None
    numbers = _numbers(operand, shape[-1])
    dims = equation.params["broadcast_dimensions"]
    if numbers is None:
        return None
    if np.size(operand.array) > 1 and not (dims and dims[-1] == len(shape) - 1):
        return None
    (result,) = jaxprs.bind(equation.primitive, equation.params, [array])
    return [Value(result, known=_Repeated(numbers))]


def _numbers(value: Value, channels: int) -> jax.Array | None:
    """Returns the numbers of the channels that an array repeats at every position, float32."""
    if isinstance(value.known, _Repeated):
        found = value.known.numbers
    elif np.size(value.array) == 1:
        found = jnp.reshape(value.array, ())
    elif np.shape(value.array)[-1] == np.size(value.array) == channels:
        found = jnp.reshape(value.array, (channels,))
    else:
        return None
    is_fit = found.dtype == jnp.float32 and found.size in (1, channels)
    return jnp.broadcast_to(found, (channels,)) if is_fit else None


def _number(value: Value) -> float | None:
    """Returns a number that is known while tracing."""
    array = value.known.numbers if isinstance(value.known, _Repeated) else value.array
    is_known = not isinstance(array, Tracer) and np.size(array) == 1
    return float(np.reshape(array, ())) if is_known else None


def _limits(jaxpr: Any) -> tuple[float, float] | None:
    """Returns the limits of a function that only clamps its argument, such as a ReLU."""
    if len(jaxpr.invars) != 1:
        return None
    low, high, last = -_INF, _INF, jaxpr.invars[0]
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if equation.invars[0] is not last:
            return None
        if name == "jit" and (limits := _limits(equation.params["jaxpr"].jaxpr)):
            low, high = max(low, limits[0]), min(high, limits[1])
        elif name in ("max", "min") and isinstance(equation.invars[1], core.Literal):
            limit = float(equation.invars[1].val)
            low, high = (max(low, limit), high) if name == "max" else (low, min(high, limit))
        else:
            return None
        last = equation.outvars[0]
    return (low, high) if low <= high and jaxpr.outvars == [last] else None
