"""What the models of both frameworks share: how they are used, numbers for their variables, and
the mathematics that has no parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import trees
from jaxprune.structure import Trace


class Case(NamedTuple):
    """A model, and all ways in which its variables are used."""

    variables: Any
    traces: dict[str, Trace]
    others: dict[str, tuple] = {}  # arguments of other sizes, for the entry points that take them
    tolerance: float = 1e-8  # of numbers in float64


# Random bits of this kind compile faster.
KEY = jax.random.key(7, impl="unsafe_rbg")


def second(output):
    return output[1]


def rngs(nnx):
    """Of an NNX module that drops out."""
    return nnx.Rngs(KEY)


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def tokens(*shape, below, pad=0):
    """Integers from 1; the last `pad` of each row but the first are 0."""
    numbers = np.random.default_rng(shape).integers(1, below, shape).astype(np.int32)
    numbers[1:, shape[1] - pad :] = 0
    return numbers


def filled(shapes):
    """Numbers for a tree of `jax.ShapeDtypeStruct`; no norm or running statistic is trivial."""
    named = trees.leaf_by_path(shapes)
    leaves = [_numbers(path, index, leaf) for index, (path, leaf) in enumerate(named.items())]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _numbers(path, index, leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(KEY, leaf.shape)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.full(leaf.shape, 2 if "index" in path else 0, leaf.dtype)
    numbers = np.random.default_rng(index).normal(size=leaf.shape)
    name = path.rsplit("/", 1)[-1]
    if name == "var":
        numbers = np.abs(numbers) + 0.5
    elif name in ("scale", "gamma"):
        numbers = 1 + 0.3 * numbers
    elif numbers.ndim > 1:  # outputs of about the size of inputs
        numbers = numbers / np.sqrt(np.prod(leaf.shape[:-1])) * 1.5
    return (numbers * 0.5).astype(leaf.dtype)


# ---- positions


def sinusoids(length, width):
    """A table of positions, float32 [length, width]."""
    angles = np.arange(length)[:, None] * np.exp(np.linspace(0, -6, (width + 1) // 2))[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)[:, :width].astype(np.float32)


def embed_time(times, width):
    """Of diffusion steps [n], as DDPM does."""
    rates = jnp.exp(jnp.arange(width // 2) * -(np.log(1e4) / (width // 2 - 1)))
    angles = times[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)


def rotate_halves(x, positions):
    """RoPE of [n, time, heads, width] at positions [n, time], as Llama and Gemma do."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] / 100.0 ** (jnp.arange(half) / half)[None, None, None]
    sin, cos = jnp.sin(angles).astype(x.dtype), jnp.cos(angles).astype(x.dtype)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def rotate_pairs(x, positions):
    """RoPE of neighbours, as GPT-J does."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] / 100.0 ** (jnp.arange(half) / half)[None, None, None]
    sin, cos = (jnp.repeat(f(angles).astype(x.dtype), 2, -1) for f in (jnp.sin, jnp.cos))
    turned = jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * cos + turned * sin


# ---- caches of keys and values, [n, length, heads, width]


def write_slice(cache, new, position):
    return lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0, position, 0, 0))


def write_at(cache, new, position):
    return cache.at[:, position].set(new[:, 0].astype(cache.dtype))


# ---- state spaces


def recurrence(decay, drive, how):
    """h[t] = decay[t] * h[t - 1] + drive[t] over dimension 1."""
    if how == "scan":
        steps = (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(drive, 1, 0))

        def step(h, own):
            h = own[0] * h + own[1]
            return h, h

        _, states = lax.scan(step, jnp.zeros_like(drive[:, 0]), steps)
        return jnp.moveaxis(states, 0, 1)

    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return lax.associative_scan(combine, (decay, drive), axis=1)[1]


def selective_scan(x, steps, a_log, b, c, skip, how):
    """Mamba's: x, steps [n, time, width], a_log [width, state], b, c [n, time, state]."""
    decay = jnp.exp(steps[..., None] * -jnp.exp(a_log)[None, None])
    states = recurrence(decay, (steps * x)[..., None] * b[:, :, None], how)
    return jnp.einsum("btds,bts->btd", states, c) + skip[None, None] * x


def long_convolution(x, log_step, a_real, a_imag, c):
    """S4D: x [n, time, width], its kernel from diagonal complex states, applied by FFT."""
    length = x.shape[1]
    step = jnp.exp(log_step)[:, None]
    real, imag = -jnp.exp(a_real), a_imag
    size = real**2 + imag**2
    rate = lax.complex(real, imag)  # [width, state]
    inverse = lax.complex(real / size, -imag / size)
    weights = lax.complex(c[..., 0], c[..., 1]) * (jnp.exp(rate * step) - 1) * inverse
    powers = jnp.exp((rate * step)[..., None] * jnp.arange(length)[None, None])
    kernel = 2 * jnp.einsum("ds,dst->dt", weights, powers).real
    spectrum = (
        jnp.fft.rfft(x, 2 * length, axis=1) * jnp.fft.rfft(kernel.T, 2 * length, axis=0)[None]
    )
    return jnp.fft.irfft(spectrum, 2 * length, axis=1)[:, :length]
