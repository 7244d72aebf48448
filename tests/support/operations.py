"""Random programs: layers, and between them whatever may happen to a width.

A program is an ordinary function of variables. It draws its operations while it is traced, from
the shapes that it meets and from its seed, so that every trace at the same shapes is the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.structure import Trace

SIZES = (2, 3, 4, 4, 6)


class Inapplicable(Exception):
    """An operation that does not go with these shapes."""


def require(condition):
    if not condition:
        raise Inapplicable


class Draw:
    """What a run of a program has: random numbers of the step, values so far, and variables."""

    def __init__(self, seed, leaves, making, focus=()):
        self.seed, self.leaves, self.making, self.focus = seed, leaves, making, set(focus)
        self.values, self.used, self.made, self.updates = [], set(), [], {}

    def start(self, *step):
        """Random numbers for one try at one step, whatever was drawn before."""
        self.step, self.count = "-".join(map(str, step)), 0
        self.rng = np.random.default_rng((self.seed, *step))

    def chance(self, probability):
        return self.rng.random() < probability

    def pick(self, items):
        items = list(items)
        require(items)
        return items[self.rng.integers(len(items))]

    def named(self, table):
        """A function of a table: one in focus, if there is any."""
        return table[self.pick(sorted(self.focus & table.keys()) or table)]

    def axis(self, x, least=2):
        """Mostly a wide one."""
        sizes = [size if size >= least else 0 for size in x.shape]
        require(any(sizes))
        return int(self.rng.choice(x.ndim, p=np.array(sizes) / sum(sizes)))

    def axes(self, x):
        """One or more, mostly one."""
        require(x.ndim)
        count = min(x.ndim, 1 + self.rng.geometric(0.7) - 1)
        return tuple(sorted(self.rng.choice(x.ndim, max(count, 1), replace=False).tolist()))

    def width(self):
        return int(self.pick(SIZES))

    def operand(self):
        """Mostly the newest value."""
        index = max(len(self.values) - int(self.rng.geometric(0.7)), 0)
        self.used.add(index)
        return self.values[index]

    def other(self, shape=None):
        """Another value, of this shape if one is given."""
        fitting = [i for i, v in enumerate(self.values) if shape in (None, v.shape)]
        index = self.pick(fitting)
        self.used.add(index)
        return self.values[index]

    def leaf(self, shape, kind="w", scale=1.0):
        """A variable; the first run makes it."""
        name, shape = f"{self.step}/{kind}{self.count}", tuple(shape)
        self.count += 1
        if self.making and name not in self.leaves:
            rng = np.random.default_rng((self.seed, *map(int, self.step.split("-")), self.count))
            numbers = rng.normal(size=shape) * scale
            if kind == "b" and rng.random() < 0.3:
                numbers = np.zeros(shape)
            if kind == "var/":
                numbers = np.abs(numbers) + 0.5
            self.leaves[name] = numbers
        require(name in self.leaves and self.leaves[name].shape == shape)
        self.made.append(name)
        return jnp.asarray(self.leaves[name])

    def kernel(self, shape):
        """A weight of this shape: mostly a leaf, else one used before, or computed from others."""
        shape, scale = tuple(shape), 1 / np.sqrt(shape[0])
        kind = self.rng.random()
        if kind < 0.7:
            return self.leaf(shape, scale=scale)
        if kind < 0.85:  # tied
            known = [n for n in self.made if self.leaves[n].shape in (shape, shape[::-1])]
            weight = jnp.asarray(self.leaves[self.pick(known)])
            return weight if weight.shape == shape else weight.T
        weight = self.leaf(shape, scale=scale)
        return self.pick(COMPUTED_WEIGHTS)(self, weight)


# ---- weights that are computed from others

COMPUTED_WEIGHTS = [
    lambda d, w: jnp.tanh(w),
    lambda d, w: w - w.mean(d.axis(w), keepdims=True),
    lambda d, w: w / jnp.sqrt((w**2).sum(d.axis(w), keepdims=True) + 1e-3),
    lambda d, w: w * jnp.asarray(d.rng.integers(0, 2, w.shape), w.dtype),
    lambda d, w: jnp.flip(w, d.axis(w)),
    lambda d, w: w + 0.1,
    lambda d, w: jnp.exp(w) - 1,
    lambda d, w: w * d.leaf((1,) * (w.ndim - 1) + w.shape[-1:]),
    lambda d, w: jnp.tensordot(d.leaf((w.shape[0], 2)), d.leaf((2, *w.shape[1:])), 1) + w,
    lambda d, w: jnp.sort(w, d.axis(w)),
    lambda d, w: jnp.concatenate([w[: w.shape[0] // 2], w[w.shape[0] // 2 :] * 2], 0),
    lambda d, w: w.T.reshape(w.shape[::-1]).T,
]


def along(vector, x, axis):
    """A vector shaped so that it goes along an axis of `x`."""
    return vector.reshape([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])


# ---- layers


def linear(d, x):
    axis, width = d.axis(x, 1), d.width()
    y = jnp.tensordot(x, d.kernel((x.shape[axis], width)), ([axis], [0]))
    if d.chance(0.6):
        y = y + along(d.leaf((width,), "b"), y, -1)
    return jnp.moveaxis(y, -1, axis) if d.chance(0.4) else y


def linear_over_two(d, x):
    require(x.ndim > 1)
    axes = tuple(sorted(d.rng.choice(x.ndim, 2, replace=False).tolist()))
    kernel = d.leaf((x.shape[axes[0]], x.shape[axes[1]], d.width()), scale=0.4)
    return jnp.tensordot(x, kernel, (axes, (0, 1)))


def linear_to_two(d, x):
    require(x.ndim < 4)
    axis = d.axis(x, 1)
    kernel = d.leaf((x.shape[axis], d.width(), d.width()), scale=0.4)
    return jnp.tensordot(x, kernel, ([axis], [0])) + (
        d.leaf(kernel.shape[1:], "b")[(None,) * (x.ndim - 1)] if d.chance(0.5) else 0.0
    )


def linear_per_group(d, x):
    """A kernel for each index of another axis."""
    require(x.ndim == 3)
    kernel = d.leaf((x.shape[1], x.shape[2], d.width()), scale=0.5)
    return jnp.einsum("bgi,gio->bgo", x, kernel)


def linear_by_vmap(d, x):
    require(x.ndim >= 2)
    kernel = d.leaf((x.shape[0], x.shape[-1], d.width()), scale=0.5)
    return jax.vmap(lambda row, w: jnp.tensordot(row, w, 1))(x, kernel)


def convolution(d, x):
    require(x.ndim in (3, 4))
    channels, space = x.shape[-1], x.ndim - 2
    groups = d.pick(g for g in sorted({1, 2, 3, 4, channels}) if channels % g == 0)
    width = groups * int(d.pick([1, 2, 3] if groups > 1 else SIZES))
    shape = (*d.rng.integers(1, 4, space).tolist(), channels // groups, width)
    kernel = d.leaf(shape, scale=0.5) if d.chance(0.8) else jnp.asarray(d.rng.normal(size=shape))
    names = "NHWC"[:1] + "HW"[:space] + "C", "HW"[:space] + "IO", "N" + "HW"[:space] + "C"
    return lax.conv_general_dilated(
        x,
        kernel,
        (1,) * space if d.chance(0.7) else (2,) * space,
        "SAME",
        rhs_dilation=(1,) * space if d.chance(0.8) else (2,) * space,
        dimension_numbers=names,
        feature_group_count=groups,
    )


def scale_and_shift(d, x):
    axis = d.axis(x)
    shape = x.shape[axis:] if d.chance(0.3) else x.shape[axis : axis + 1]
    missing = (None,) * axis, (None,) * (x.ndim - axis - len(shape))
    scale = d.leaf(shape)[(*missing[0], ..., *missing[1])]
    x = x * scale if d.chance(0.7) else x * (1 + scale)
    return x + d.leaf(shape, "b")[(*missing[0], ..., *missing[1])] if d.chance(0.6) else x


def running_statistics(d, x):
    """Reads statistics of an axis, and in training replaces them."""
    axis = d.axis(x)
    others = tuple(a for a in range(x.ndim) if a != axis)
    mean, var = d.leaf((x.shape[axis],), "mean/"), d.leaf((x.shape[axis],), "var/")
    new = x.mean(others), ((x - x.mean(others, keepdims=True)) ** 2).mean(others)
    for name, old, value in zip(d.made[-2:], (mean, var), new):
        d.updates[name] = 0.9 * old + 0.1 * value
    if d.chance(0.5):
        mean, var = new
    return (x - along(mean, x, axis)) * lax.rsqrt(along(var, x, axis) + 1e-2)


def cache(d, x):
    """State that is 0 before it is first written."""
    require(x.ndim >= 2)
    old = d.leaf((3, *x.shape[1:]), "cache/", scale=0.0)
    name, row = d.made[-1], x[:1]
    kind = d.rng.integers(4)
    if kind == 0:
        new = lax.dynamic_update_slice_in_dim(old, row, 1, 0)
    elif kind == 1:
        new = 0.5 * old + row
    elif kind == 2:
        new = jnp.concatenate([old[1:], row], 0)
    else:
        new = old.at[2].set(row[0] + (0.3 if d.chance(0.5) else 0.0))
    d.updates[name] = new
    return x + (new if d.chance(0.7) else old).sum(0, keepdims=True)


# ---- entry by entry

UNARY = {
    "tanh": jnp.tanh,
    "exp": lambda x: jnp.exp(0.3 * x),
    "exp2": lambda x: jnp.exp2(-(x**2)),
    "expm1": lambda x: jnp.expm1(0.3 * x),
    "sigmoid": jax.nn.sigmoid,
    "cos": jnp.cos,
    "sin": jnp.sin,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "square": jnp.square,
    "cube": lambda x: 0.2 * x**3,
    "inverse": lambda x: 1 / (1 + x**2),
    "inverse power": lambda x: (1 + x**2) ** -1,
    "zeroth power": lambda x: x + x**0,
    "root": lambda x: jnp.sqrt(jnp.abs(x) + 0.3),
    "rsqrt": lambda x: lax.rsqrt(x**2 + 0.5),
    "log": lambda x: jnp.log(x**2 + 0.5),
    "log1p": lambda x: jnp.log1p(x**2),
    "power": lambda x: (x**2 + 0.1) ** 0.7,
    "power of a number": lambda x: 1.3**x,
    "abs": jnp.abs,
    "negative": lambda x: -x,
    "sign": lambda x: x * jnp.sign(x - 0.2),
    "floor": lambda x: x + jnp.floor(x + 0.37),
    "plus": lambda x: x + 0.7,
    "times": lambda x: x * 1.3,
    "plus zero": lambda x: x + 0.0,
    "minus from": lambda x: 0.4 - x,
    "max of zero": lambda x: jnp.maximum(x, 0.0),
    "max of more": lambda x: jnp.maximum(x, 0.3),
    "max of less": lambda x: jnp.maximum(x, -0.3),
    "min of zero": lambda x: jnp.minimum(x, 0.0),
    "min of less": lambda x: jnp.minimum(x, -0.3),
    "min of more": lambda x: jnp.minimum(x, 0.3),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "clip above": lambda x: jnp.clip(x, 0.2, 0.9),
    "clip below": lambda x: jnp.clip(x, -0.9, -0.2),
    "clamp": lambda x: lax.clamp(-0.5, x, 0.5),
    "clamp above": lambda x: lax.clamp(0.2, x, 0.9),
    "clamp below": lambda x: lax.clamp(-0.9, x, -0.2),
    "remainder": lambda x: lax.rem(x, jnp.full_like(x, 0.7)),
    "modulo": lambda x: (x + 0.1) % 1.7,
    "where": lambda x: jnp.where(x > 0.1, x, 0.0),
    "where not": lambda x: jnp.where(x > 0.1, x, 0.6),
    "where less": lambda x: jnp.where(x < 0.1, 0.6, x),
    "select of three": lambda x: lax.select_n(
        (x < 0.1).astype(jnp.int32) + (x < -0.2).astype(jnp.int32), x + 1, x, 0.3 * x
    ),
    "leaky relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "erf": lax.erf,
    "atan2": lambda x: jnp.arctan2(x, 1 + x**2),
    "arctan": jnp.arctan,
    "bfloat16": lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
    "float32": lambda x: x.astype(jnp.float32).astype(x.dtype),
    "integer": lambda x: x + jnp.floor(3 * x + 0.123).astype(jnp.int32).astype(x.dtype),
    "bool": lambda x: x * (x > 0.3).astype(x.dtype),
    "not": lambda x: (~(x > 0.3)).astype(x.dtype),
    "mask of two": lambda x: ((x > -0.5) & (x < 0.5)).astype(x.dtype),
    "mask of either": lambda x: ((x > 0.5) | (x < -0.5)).astype(x.dtype),
    "equal": lambda x: (x == 0).astype(x.dtype) + x,
    "stop gradient": lambda x: x + lax.stop_gradient(jnp.cos(x)),
    "barrier": lambda x: lax.optimization_barrier(jnp.sin(x)),
    "zeros like": lambda x: x + jnp.zeros_like(x),
    "ones like": lambda x: x * jnp.ones_like(x),
    "times zero": lambda x: x * 0.0 + 0.2,
    "logit": lambda x: jnp.log(jax.nn.sigmoid(x)),
    "sinc": lambda x: x * lax.rsqrt(x * x + 1e-3),
}

BINARY = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / (1 + b**2),
    "divide by abs": lambda a, b: a / (jnp.abs(b) + 0.5),
    "max": jnp.maximum,
    "min": jnp.minimum,
    "where": lambda a, b: jnp.where(b > 0, a, 0.0),
    "where else": lambda a, b: jnp.where(a > 0, a, b),
    "where one": lambda a, b: jnp.where(b > 0.1, a, 1.0),
    "select": lambda a, b: jnp.where(a > 0, b, a * 2),
    "atan2": lambda a, b: jnp.arctan2(a, b**2 + 1),
    "power": lambda a, b: (a**2 + 0.3) ** jnp.tanh(b),
    "gate": lambda a, b: a * jax.nn.sigmoid(b),
    "complement": lambda a, b: a * (1 - jax.nn.sigmoid(b)),
    "clip": lambda a, b: jnp.clip(a, -jnp.abs(b), jnp.abs(b)),
    "clamp": lambda a, b: lax.clamp(b + 0 * a - 0.5, a + 0 * b, b + 0 * a + 0.5),
    "logaddexp": jnp.logaddexp,
    "remainder": lambda a, b: lax.rem(a + 0 * b, jnp.abs(b) + 0 * a + 0.5),
    "hypot": lambda a, b: jnp.sqrt(a**2 + b**2 + 0.1),
    "both": lambda a, b: a * ((a > 0) & (b > 0)).astype(a.dtype),
    "xor": lambda a, b: ((a > 0) ^ (b > 0)).astype(a.dtype) + b,
}


def unary(d, x):
    return d.named(UNARY)(x)


def aligned(d, x):
    """Another value or a new vector, shaped so that it broadcasts against `x`."""
    if d.chance(0.2):
        axis = d.axis(x)
        return along(d.leaf(x.shape[axis : axis + 1]), x, axis)
    y = d.other()
    if y.ndim > x.ndim:
        raise Inapplicable
    places, at = [], x.ndim
    for size in y.shape[::-1]:  # from the right, dimensions of the same size
        fitting = [a for a in range(at) if x.shape[a] == size or size == 1]
        at = fitting[-1] if d.chance(0.6) and fitting else d.pick(fitting)
        places.append(at)
    shape = [1] * x.ndim
    for place, size in zip(places, y.shape[::-1]):
        shape[place] = size
    return y.reshape(shape)


def binary(d, x):
    operation = d.named(BINARY)
    y = aligned(d, x)
    return operation(x, y) if d.chance(0.6) else operation(jnp.broadcast_to(y, x.shape), x)


def sibling(d, x):
    """Another value of the same shape: an older one, or one of a new layer."""
    older = [i for i, v in enumerate(d.values) if v.shape == x.shape and v is not x]
    if older and d.chance(0.5):
        index = d.pick(older)
        d.used.add(index)
        return d.values[index]
    axis = d.axis(x)
    kernel = d.leaf((x.shape[axis], x.shape[axis]), scale=0.5)
    y = jnp.moveaxis(jnp.tensordot(x, kernel, ([axis], [0])), -1, axis)
    return d.named(UNARY)(y) if d.chance(0.7) else y


def residual(d, x):
    return x + sibling(d, x)


def numbers(d, x):
    """An array that the function holds, such as positions; some entries may be 0."""
    axis = d.axis(x)
    size = x.shape[axis]
    kind = d.rng.integers(6)
    if kind == 0:
        vector = jnp.arange(size, dtype=x.dtype)  # iota
    elif kind == 1:
        vector = jnp.asarray(d.rng.integers(0, 2, size), x.dtype)
    elif kind == 2:
        vector = jnp.asarray(d.rng.normal(size=size))
    elif kind == 3:
        vector = jnp.asarray(np.full(size, d.pick([0.0, 0.5, 1.0, -1.0])))
    elif kind == 4:
        vector = jnp.full(size, d.pick([0.0, 0.5, -1.0]), x.dtype)
    else:
        vector = jnp.linspace(-1.0, 1.0, size)
    operation = d.pick([lambda a, b: a + b, lambda a, b: a * b, jnp.maximum, BINARY["where"]])
    return operation(x, along(vector, x, axis))


# ---- over dimensions

REDUCTIONS = {
    "sum": jnp.sum,
    "mean": jnp.mean,
    "max": jnp.max,
    "min": jnp.min,
    "norm": lambda x, axis, keepdims: jnp.sqrt((x**2).sum(axis, keepdims=keepdims) + 0.1),
    "mean of squares": lambda x, axis, keepdims: (x**2).mean(axis, keepdims=keepdims),
    "var": jnp.var,
    "std": lambda x, axis, keepdims: jnp.sqrt(jnp.var(x, axis, keepdims=keepdims) + 0.1),
    "ddof": lambda x, axis, keepdims: jnp.var(x, axis, ddof=1, keepdims=keepdims),
    "logsumexp": jax.nn.logsumexp,
    "largest size": lambda x, axis, keepdims: jnp.max(jnp.abs(x), axis, keepdims=keepdims),
    "sum and max": lambda x, axis, keepdims: (
        x.sum(axis, keepdims=keepdims) * jnp.tanh(x.max(axis, keepdims=keepdims))
    ),
    "product": lambda x, axis, keepdims: jnp.prod(0.9 + 0.1 * x, axis, keepdims=keepdims),
    "any": lambda x, axis, keepdims: jnp.any(x > 0.3, axis, keepdims=keepdims).astype(x.dtype),
    "any above": lambda x, axis, keepdims: jnp.any(x > -0.5, axis, keepdims=keepdims).astype(
        x.dtype
    ),
    "all above": lambda x, axis, keepdims: jnp.all(x > 0.1, axis, keepdims=keepdims).astype(
        x.dtype
    ),
    "all": lambda x, axis, keepdims: jnp.all(x > -2, axis, keepdims=keepdims).astype(x.dtype),
    "count": lambda x, axis, keepdims: (x > 0.1).sum(axis, keepdims=keepdims).astype(x.dtype),
    "count of zeros": lambda x, axis, keepdims: jnp.mean(x == 0, axis, keepdims=keepdims),
    "median of ends": lambda x, axis, keepdims: (
        x.max(axis, keepdims=keepdims) + x.min(axis, keepdims=keepdims)
    ),
}


def reduction(d, x):
    require(x.ndim > 1)
    return d.named(REDUCTIONS)(x, axis=d.axes(x), keepdims=d.chance(0.3))


def normalized(d, x):
    """A value and what all of a dimension tell of it."""
    r = d.named(REDUCTIONS)(x, axis=d.axes(x), keepdims=True)
    return d.pick([x - r, x / (jnp.abs(r) + 0.5), x * r, jnp.where(x > r, x, 0.0), x + 0 * r])


NORMS = [
    lambda x, axis: jax.nn.softmax(x, axis),
    lambda x, axis: jax.nn.log_softmax(x, axis),
    lambda x, axis: (x - x.mean(axis, keepdims=True)) * lax.rsqrt(x.var(axis, keepdims=True) + 0.1),
    lambda x, axis: (
        (x - x.mean(axis, keepdims=True))
        * lax.rsqrt((x**2).mean(axis, keepdims=True) - x.mean(axis, keepdims=True) ** 2 + 0.1)
    ),
    lambda x, axis: x * lax.rsqrt((x**2).mean(axis, keepdims=True) + 0.1),
    lambda x, axis: x / (jnp.abs(x).sum(axis, keepdims=True) + 0.1),
    lambda x, axis: x / (jnp.abs(x).max(axis, keepdims=True) + 0.1),
    lambda x, axis: jax.nn.standardize(x, axis, epsilon=0.1),
    lambda x, axis: x - x.sum(axis, keepdims=True) * jnp.max(x, axis, keepdims=True),
    lambda x, axis: (x - x.mean(axis, keepdims=True)) ** 2,
    lambda x, axis: jax.nn.softmax(jnp.where(x > 0, x, -1e9), axis),
    lambda x, axis: jax.nn.softmax(x, axis) - 1 / x.shape[axis],
]


def norm(d, x):
    return d.pick(NORMS)(x, d.axis(x))


def group_norm(d, x):
    axis, groups = d.axis(x, 4), d.pick([2, 2, 3])
    require(x.shape[axis] % groups == 0)
    y = x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])
    over = tuple({axis + 1, d.axis(y)} - {axis})
    y = (y - y.mean(over, keepdims=True)) * lax.rsqrt(y.var(over, keepdims=True) + 0.1)
    return y.reshape(x.shape)


# ---- places


def transpose(d, x):
    return jnp.transpose(x, d.rng.permutation(x.ndim).tolist())


def merge(d, x):
    require(x.ndim > 1)
    at = d.rng.integers(x.ndim - 1)
    return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])


def split(d, x):
    axis = d.axis(x, 4)
    size = x.shape[axis]
    factor = d.pick(f for f in (2, 3, 4) if size % f == 0 and f < size)
    return x.reshape(*x.shape[:axis], factor, size // factor, *x.shape[axis + 1 :])


def reshape(d, x):
    """Through another shape and back, with something in between."""
    axis = d.axis(x, 4)
    y = split(d, x)
    inner = mini(d, y.shape)
    return inner(y).reshape(x.shape) if axis >= 0 else x


def shuffle(d, x):
    axis = d.axis(x, 4)
    factor = d.pick(f for f in (2, 3) if x.shape[axis] % f == 0)
    y = x.reshape(*x.shape[:axis], factor, -1, *x.shape[axis + 1 :])
    return jnp.swapaxes(y, axis, axis + 1).reshape(x.shape)


def flip(d, x):
    return jnp.flip(x, d.axis(x))


def roll(d, x):
    axis = d.axis(x)
    by = int(d.rng.integers(1, x.shape[axis]))
    return jnp.roll(x, by, axis)


def concatenate(d, x):
    axis = d.axis(x, 1)
    require(x.shape[axis] < 8)
    kind = d.rng.integers(4)
    if kind == 0:
        return jnp.concatenate([x, unary(d, x) if d.chance(0.5) else sibling(d, x)], axis)
    if kind == 1:
        rows = jnp.full((*x.shape[:axis], 2, *x.shape[axis + 1 :]), d.pick([0.0, 0.4]), x.dtype)
        return jnp.concatenate([rows, x], axis)
    if kind == 2:
        shape = [2 if a == axis else 1 for a in range(x.ndim)]
        shape = [n if n == 2 and a == axis else s for a, (n, s) in enumerate(zip(shape, x.shape))]
        return jnp.concatenate([d.leaf(shape), x], axis)
    fitting = [
        i
        for i, v in enumerate(d.values)
        if v.ndim == x.ndim
        and all(a == axis or m == n for a, (m, n) in enumerate(zip(v.shape, x.shape)))
    ]
    index = d.pick(fitting)
    d.used.add(index)
    return jnp.concatenate([x, d.values[index]], axis)


def stack(d, x):
    require(x.ndim < 4)
    return jnp.stack([x, sibling(d, x)], int(d.rng.integers(x.ndim + 1)))


def two_widths(d, x):
    """One after the other or in turn; what is 0 of one is not of the other."""
    axis = d.axis(x)
    require(x.shape[axis] <= 6)
    parts = [x, sibling(d, x)]
    if d.chance(0.5):
        parts[1] = d.pick([jnp.exp, jnp.cos, jax.nn.sigmoid])(parts[1])
    if d.chance(0.3):
        parts = parts[::-1]
    if d.chance(0.5):
        return jnp.concatenate(parts, axis)
    return jnp.stack(parts, axis + 1).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def slices(d, x):
    axis = d.axis(x, 3)
    size = x.shape[axis]
    start, stride = int(d.rng.integers(0, size // 2)), int(d.pick([1, 1, 2]))
    stop = int(d.rng.integers(start + 1, size + 1))
    return lax.slice_in_dim(x, start, stop, stride, axis)


def halves(d, x):
    axis = d.axis(x, 2)
    require(x.shape[axis] % 2 == 0)
    a, b = jnp.split(x, 2, axis)
    return d.named(BINARY)(a, b)


def evens(d, x):
    axis = d.axis(x, 2)
    require(x.shape[axis] % 2 == 0)
    a, b = (lax.slice_in_dim(x, i, None, 2, axis) for i in (0, 1))
    return d.named(BINARY)(a, b)


def pad(d, x):
    axis = d.axis(x, 1)
    ends = d.pick([(1, 0, 0), (0, 2, 0), (1, 1, 0), (0, 0, 1), (-1, 1, 0), (1, -1, 0), (1, 2, 0)])
    config = [ends if a == axis else (0, 0, 0) for a in range(x.ndim)]
    if d.chance(0.3):
        config[d.axis(x, 1)] = (1, 0, 0)
    return lax.pad(x, jnp.asarray(d.pick([0.0, 0.0, 0.6]), x.dtype), config)


def repeat(d, x):
    axis = d.axis(x, 1)
    require(x.shape[axis] < 5)
    if d.chance(0.5):
        return jnp.tile(x, [2 if a == axis else 1 for a in range(x.ndim)])
    return jnp.repeat(x, 2, axis)


def expand(d, x):
    require(x.ndim < 4)
    axis = int(d.rng.integers(x.ndim + 1))
    y = jnp.expand_dims(x, axis)
    if d.chance(0.5):
        shape = [*x.shape[:axis], int(d.width()), *x.shape[axis:]]
        return jnp.broadcast_to(y, shape)
    return y


def squeeze(d, x):
    require(1 in x.shape)
    return x.squeeze(x.shape.index(1))


# ---- look-ups


def computed_index(d, x, size):
    """A place that data decides."""
    return (jnp.floor(jnp.abs(x.sum()) * 7.3 + 0.123) % size).astype(jnp.int32)


def look_up(d, x):
    axis = d.axis(x)
    size = x.shape[axis]
    places = d.rng.integers(0, size, int(d.rng.integers(1, size + 1)))
    kind = d.rng.integers(4)
    if kind == 0:
        return jnp.take(x, places, axis)
    if kind == 1:
        return jnp.take(x, jnp.asarray(places) * 0 + computed_index(d, d.other(), size), axis)
    if kind == 2:
        order = jnp.argsort(x, axis)
        return jnp.take_along_axis(x, order, axis)
    return jnp.take(x, places, axis, mode="clip")


def embedding(d, x):
    """Rows of a table by a computed index."""
    table = d.leaf((3, d.width()))
    rows = (jnp.floor(jnp.abs(x) * 2.3 + 0.123) % 3).astype(jnp.int32)
    require(x.ndim < 4)
    return table[rows]


def one_hot(d, x):
    require(x.ndim < 4)
    rows = jnp.argmax(x, d.axis(x))
    return jax.nn.one_hot(rows, d.width(), dtype=x.dtype)


def dynamic(d, x):
    axis = d.axis(x)
    size = x.shape[axis]
    length = int(d.rng.integers(1, size + 1))
    start = computed_index(d, d.other(), size) if d.chance(0.6) else 1
    rows = lax.dynamic_slice_in_dim(x, start, length, axis)
    if d.chance(0.5):
        return rows
    return lax.dynamic_update_slice_in_dim(sibling(d, x), rows, 0 * start, axis)


def scatter(d, x):
    axis = d.axis(x)
    size = x.shape[axis]
    places = jnp.asarray(d.rng.permutation(size)[:2])
    index = (*(slice(None),) * axis, places)
    at = x.at[index]
    rows = sibling(d, x)[index] if d.chance(0.6) else d.pick([0.0, 0.5])
    return d.pick([at.set, at.add, at.multiply, at.max])(rows, unique_indices=True)


def place_mask(d, x):
    """Keeps what comes before a place, as causal masks do."""
    axis = d.axis(x)
    which = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    if x.ndim > 1 and d.chance(0.4):
        other = lax.broadcasted_iota(jnp.int32, x.shape, (axis + 1) % x.ndim)
        return jnp.where(which <= other, x, d.pick([0.0, -1.0]))
    return jnp.where(which < x.shape[axis] // 2, x, d.pick([0.0, 0.3]))


# ---- order

ORDERS = [
    lambda x, axis: jnp.sort(x, axis),
    lambda x, axis: jnp.cumsum(x, axis),
    lambda x, axis: jnp.cumprod(1 + 0.1 * x, axis),
    lambda x, axis: lax.cummax(x, axis),
    lambda x, axis: x * jnp.argsort(x, axis),
    lambda x, axis: x + jnp.argmax(x, axis, keepdims=True),
    lambda x, axis: jnp.moveaxis(lax.top_k(jnp.moveaxis(x, axis, -1), 2)[0], -1, axis),
    lambda x, axis: lax.associative_scan(jnp.add, x, axis=axis),
    lambda x, axis: (
        jnp.abs(jnp.fft.fft(x.astype(jnp.complex64), axis=axis)).astype(x.dtype) * 0 + x
    ),
]


def order(d, x):
    return d.pick(ORDERS)(x, d.axis(x))


# ---- functions inside


def mini(d, shape, depth=2):
    """A function that keeps the shape; all that is random in it is drawn now."""
    parts = []
    for _ in range(int(d.rng.integers(1, depth + 1))):
        kind = d.rng.integers(8)
        big = [axis for axis, size in enumerate(shape) if size > 1]
        if kind < 4 or not big:
            parts.append(d.named(UNARY))
            continue
        axis = d.pick(big)
        vector = d.rng.normal(size=shape[axis])
        if kind == 4:
            parts.append(functools.partial(lambda x, a: jnp.flip(x, a), a=axis))
        elif kind == 5:
            parts.append(functools.partial(lambda x, a: x - x.mean(a, keepdims=True), a=axis))
        elif kind == 6:
            parts.append(
                functools.partial(lambda x, a, v: x * along(jnp.asarray(v), x, a), a=axis, v=vector)
            )
        else:
            parts.append(functools.partial(lambda x, a: jnp.roll(x, 1, a), a=axis))

    def call(x):
        for part in parts:
            x = part(x)
        return x

    return call


def scan_rows(d, x):
    axis = d.axis(x, 1)
    rows = jnp.moveaxis(x, axis, 0)
    shape = rows.shape[1:]
    start = d.pick([jnp.zeros(shape, x.dtype), jnp.ones(shape, x.dtype), rows[0], rows[-1] * 0.5])
    step, mix, out = mini(d, shape), mini(d, shape), mini(d, shape)
    reverse, last = d.chance(0.3), d.chance(0.4)

    def body(carry, row):
        carry = 0.5 * mix(carry) + step(row)
        return carry, out(carry)

    carry, outs = lax.scan(body, start, rows, reverse=reverse)
    return carry if last else jnp.moveaxis(outs, 0, axis)


def scan_chain(d, x):
    """Several passes until anything reaches what is returned."""
    first, inner = mini(d, x.shape, 1), mini(d, x.shape, 1)
    zeros = jnp.zeros_like(x)

    def body(carry, _):
        a, b, c = carry
        return (b, inner(c), first(c) + 0.5 * x), None

    start = d.pick([(x, x, x), (zeros, zeros, x), (zeros, zeros, zeros), (x, zeros, zeros)])
    return lax.scan(body, start, None, length=4)[0][int(d.rng.integers(2))]


def scan_layers(d, x):
    """Stacked weights of layers of one width."""
    axis = d.axis(x)
    size = x.shape[axis]
    kernels, biases = d.leaf((2, size, size), scale=0.5), d.leaf((2, size), "b")
    act = mini(d, x.shape)

    def body(h, weights):
        kernel, bias = weights
        y = jnp.moveaxis(jnp.tensordot(h, kernel, ([axis], [0])), -1, axis)
        return h + act(y + along(bias, y, axis)), None

    return lax.scan(body, x, (kernels, biases))[0]


def loop(d, x):
    inner = mini(d, x.shape)
    if d.chance(0.5):
        return lax.fori_loop(0, 2, lambda i, h: 0.5 * h + inner(h), x)
    start = 0, lax.stop_gradient(x)  # a while loop has no gradients
    return x + lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, inner(c[1])), start)[1]


def branch(d, x):
    count = d.pick([2, 2, 3])
    functions = [mini(d, x.shape) for _ in range(count)]
    which = computed_index(d, d.other(), count)
    if count == 2:
        return lax.cond(which == 0, *functions, x)
    return lax.switch(which, functions, x)


def branch_of_two(d, x):
    """Branches that return different operands."""
    y = unary(d, x) if d.chance(0.5) else sibling(d, x)
    which = computed_index(d, d.other(), 2) == 0
    return lax.cond(which, lambda a, b: a, lambda a, b: b, x, y)


def turn(d, x):
    """A linear function, for derivative rules."""
    axis = d.axis(x)
    return d.pick(
        [
            lambda t: t,
            lambda t: 2 * t,
            lambda t: jnp.flip(t, axis),
            lambda t: t - t.mean(axis, keepdims=True),
        ]
    )


def own_jvp(d, x):
    value, slope, linear_part = mini(d, x.shape), mini(d, x.shape), turn(d, x)

    @jax.custom_jvp
    def call(h):
        return value(h)

    @call.defjvp
    def _(primals, tangents):
        return value(primals[0]), linear_part(tangents[0]) * slope(primals[0])

    return call(x)


def own_vjp(d, x):
    value, slope, linear_part = mini(d, x.shape), mini(d, x.shape), turn(d, x)
    saves_input = d.chance(0.5)

    @jax.custom_vjp
    def call(h):
        return value(h)

    def forward(h):
        return value(h), (h if saves_input else slope(h),)

    def backward(saved, g):
        return (linear_part(g) * (slope(saved[0]) if saves_input else saved[0]),)

    call.defvjp(forward, backward)
    return call(x)


def remat(d, x):
    policies = jax.checkpoint_policies
    policy = d.pick([None, policies.dots_saveable, policies.nothing_saveable])
    return jax.checkpoint(mini(d, x.shape), policy=policy)(x)


def nested(d, x):
    return jax.jit(mini(d, x.shape))(x)


def mapped(d, x):
    axis = d.axis(x, 1)
    shape = [*x.shape[:axis], *x.shape[axis + 1 :]]
    return jax.vmap(mini(d, shape), axis, axis)(x)


# ---- products of data


def attention(d, x):
    require(x.ndim == 3)
    n, m = x.shape[-1], d.width()
    q, k = (jnp.tensordot(x, d.kernel((n, m)), 1) for _ in range(2))
    v = jnp.tensordot(x, d.kernel((n, m)), 1) if d.chance(0.7) else x
    if d.chance(0.3):
        q, k = unary(d, q), unary(d, k)
    weights = jnp.einsum("btc,bsc->bts", q, k) / np.sqrt(m)
    weights = jax.nn.softmax(weights) if d.chance(0.7) else weights
    return jnp.einsum("bts,bsc->btc", weights, v)


def heads(d, x):
    require(x.ndim == 3)
    n, h, m = x.shape[-1], 2, 2
    qkv = jnp.tensordot(x, d.kernel((n, 3 * h * m)), 1)
    layout = d.pick(["3hm", "h3m", "hm3"])
    sizes = {"3": 3, "h": h, "m": m}
    qkv = qkv.reshape(*x.shape[:2], *(sizes[name] for name in layout))
    q, k, v = jnp.moveaxis(qkv, 2 + layout.index("3"), 0)
    weights = jax.nn.softmax(jnp.einsum("bthm,bshm->bhts", q, k))
    return jnp.einsum("bhts,bshm->bthm", weights, v)


def product(d, x):
    """Sums over some dimensions that two values share; others stay, or are batched."""
    y = d.other() if d.chance(0.5) else unary(d, x)
    letters = "abcdefgh"
    first = letters[: x.ndim]
    second = []
    for size in y.shape:
        same = [a for a, n in zip(first, x.shape) if n == size and a not in second]
        second.append(d.pick(same) if same and d.chance(0.8) else letters[4 + len(second)])
    shared = [a for a in first if a in second]
    require(shared)
    out = [a for a in [*first, *second] if a not in shared or d.chance(0.4)]
    out = list(dict.fromkeys(out))
    require(0 < len(out) < 5)
    return 0.3 * jnp.einsum(f"{first},{''.join(second)}->{''.join(out)}", x, y)


def outer(d, x):
    require(x.ndim < 3)
    y = d.other()
    require(y.ndim < 3 and x.ndim + y.ndim < 5)
    return jnp.tensordot(x, y, 0)


def pool(d, x):
    sizes = [2 if n > 2 and d.chance(0.4) else 1 for n in x.shape]
    if d.chance(0.5):
        return lax.reduce_window(x, -jnp.inf, lax.max, sizes, [1] * x.ndim, "VALID")
    return lax.reduce_window(x, 0.0, lax.add, sizes, sizes, d.pick(["SAME", "VALID"]))


# ---- chance


def dropout(d, x):
    kept = jax.random.bernoulli(jax.random.key(d.seed), 0.7, x.shape)
    return jnp.where(kept, x / 0.7, d.pick([0.0, 0.0, 0.5]))


def noise(d, x):
    return x + jax.random.normal(jax.random.key(d.seed), x.shape, x.dtype)


LAYERS = {
    linear: 8, linear_over_two: 1.5, linear_to_two: 1.5, linear_per_group: 1.5, linear_by_vmap: 1,
    convolution: 3, attention: 1, heads: 1, embedding: 0.7, scan_layers: 0.7,
}  # fmt: skip
BETWEEN = {
    unary: 8, binary: 4, residual: 3, numbers: 2, reduction: 2, normalized: 2, norm: 3,
    group_norm: 1, scale_and_shift: 2, running_statistics: 1.5, cache: 0.7, transpose: 1.5,
    merge: 2, split: 1.5, two_widths: 1.5, shuffle: 1, flip: 1, roll: 1, concatenate: 2, stack:
    0.7, slices: 1.5, halves: 1, evens: 0.7, pad: 1.5, repeat: 0.7, expand: 0.7, squeeze: 0.7,
    look_up: 0.7, one_hot: 0.3, dynamic: 0.7, scatter: 0.7, place_mask: 1, order: 0.7,
    scan_rows: 1, scan_chain: 0.7, loop: 0.5, branch: 1, branch_of_two: 0.7, own_jvp: 1,
    own_vjp: 1, remat: 0.7, nested: 0.5, mapped: 0.7, product: 1.5, outer: 0.5, pool: 0.7,
    dropout: 0.7, noise: 0.5, reshape: 1,
}  # fmt: skip
OPERATIONS = {operation.__name__: operation for operation in [*LAYERS, *BETWEEN]}
INPUTS = ((2, 4), (2, 3, 4), (2, 3, 4), (2, 4, 3, 2), (3, 2, 6))


# ---- programs


def choose(d, table):
    """An operation; those in focus come fifty times as often."""
    names = list(table)
    weights = np.array([table[name] * (50 if name.__name__ in d.focus else 1) for name in names])
    return names[d.rng.choice(len(names), p=weights / weights.sum())]


def body(d, x, steps, log):
    """Runs the steps; each is tried a few times until something fits."""
    d.values.append(x)
    for step in steps:
        for attempt in range(8):
            d.start(step, attempt)
            table = LAYERS if step == 0 or d.chance(0.25) else BETWEEN
            operation = choose(d, table)
            before = set(d.used), len(d.made), dict(d.updates)
            try:
                value = operation(d, d.operand())
                require(0 < value.size <= 400 and value.ndim <= 4)
            except Inapplicable:
                d.used, d.updates = before[0], before[2]
                del d.made[before[1] :]
                continue
            log.append(f"{step}: {operation.__name__} -> {value.shape}")
            d.values.append(value)
            break


def close(d, index, log):
    """Brings a value to a shape that may be an output."""
    x = d.values[index]
    for turn in range(4):
        d.start(99, index, turn)
        if not x.ndim or d.chance(0.1):
            break
        kind = d.rng.integers(5)
        axis = d.axis(x, 1)
        if kind < 3 and x.ndim > 1:
            name = d.pick(["sum", "mean", "max", "mean of squares", "min", "var", "sum"])
            x = REDUCTIONS[name](x, axis=axis, keepdims=False)
            log.append(f"close {index}: {name} of {axis}")
        else:
            x = jnp.tensordot(x, d.kernel((x.shape[axis], 2)), ([axis], [0]))
            log.append(f"close {index}: linear of {axis}")
            if d.chance(0.5):
                break
    return x


def make(seed, steps, focus=()):
    """A program: its variables and traces.

    `steps` are numbers of steps; a step is the same whatever others there are, as far as shapes go.
    """
    rng = np.random.default_rng((seed, 1000))
    shape = INPUTS[rng.integers(len(INPUTS))]
    x = rng.normal(size=shape)
    if rng.random() < 0.2:
        x[0] = 0.0  # as padding is, so that values tie
    leaves, logs = {}, []
    skipped = int(rng.choice(steps)) if len(steps) > 2 and rng.random() < 0.25 else None

    def function(variables, x, steps=steps, making=False, log=None):
        log = [] if log is None else log
        d = Draw(seed, leaves if making else variables, making, focus)
        body(d, x, steps, log)
        unused = [i for i in range(1, len(d.values)) if i not in d.used] or [len(d.values) - 1]
        outputs = []
        for index in unused:
            try:
                outputs.append(close(d, index, log))
            except Inapplicable:
                outputs.append(d.values[index])
        return outputs, d.updates

    def run(steps):
        log = []
        jax.eval_shape(lambda x: function(None, x, steps, True, log), x)
        logs.append(log)
        return Trace(functools.partial(function, steps=steps), (x,), lambda output: output[1])

    traces = [run(steps)]
    if skipped is not None:
        traces.append(run(tuple(step for step in steps if step != skipped)))
    return leaves, traces, logs


def describe(seed, steps, focus=()):
    """Words for a program."""
    lines = [f"make({seed}, {steps}, {focus})"]
    for log in make(seed, steps, focus)[2]:
        lines += ["  trace:", *(f"    {line}" for line in log)]
    return "\n".join(lines)
