"""Convolutions of which only some weights are kept, computed in several ways, in plain JAX.

What is kept lies in a compact kernel [blocks, height, width, kept, outputs of a block]; where it
belongs is an argument, so another choice needs no compilation. Each of the three passes (forward,
gradients by input and by kernel) can be computed in these ways:

    in place    spread over a dense kernel, and an ordinary convolution
    unrolled    gathered inputs and one convolution for each block of outputs
    grouped     gathered inputs and one grouped convolution, which is what `jax.vmap` makes of one
    patches     gathered patches of the image and one matrix product, batched over blocks
    turned      gradient by the input only: one convolution for each block of inputs
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import patterns

PASSES = ("forward", "input gradient", "kernel gradient")
# One convolution for each block takes 0.05 s each to compile, and very thin ones are hopeless.
MAX_CONVOLUTIONS, MIN_WIDTH = 32, 4
MAX_GATHERED = 2**28  # entries of gathered patches

Way = Callable[..., jax.Array]  # (x, kept, cotangent, pattern) -> the result of one pass
Ways = Mapping[str, Mapping[str, Way]]  # pass -> name -> function


class Layer(NamedTuple):
    """One shape of convolution."""

    size: int  # of the kernel, each way
    stride: int
    pixels: int  # of the input, each way
    inputs: int
    outputs: int
    first: bool  # sees the images, and no gradient by them is wanted


class Pattern(NamedTuple):
    """Where the weights of a compact kernel belong."""

    inputs: Any  # int32 [blocks, height, width, kept]: channels that a block of outputs reads
    # None unless all positions of the kernel read the same blocks of inputs:
    readers: Any  # int32 [input blocks, readers]: blocks of outputs that read a block of inputs
    places: Any  # int32 [input blocks, readers]: where among their inputs, -1 fills up


# Dense, masked and compact.


def convolve(layer: Layer, x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    """Size and stride are those of the layer, the widths those of the arrays."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (layer.stride, layer.stride),
        [(layer.size // 2, layer.size // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def dense_step(layer: Layer, x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> Any:
    """Output and gradients by input and kernel."""
    y, pull_back = jax.vjp(partial(convolve, layer), x, kernel)
    return y, *pull_back(cotangent)[layer.first :]


def masked_step(layer: Layer, x: Any, kernel: Any, cotangent: Any, mask: Any) -> Any:
    """The same with a mask on the kernel."""
    y, pull_back = jax.vjp(lambda x, kernel: convolve(layer, x, kernel * mask), x, kernel)
    return y, *pull_back(cotangent)


def in_place(layer: Layer, x: jax.Array, kept: jax.Array, pattern: Pattern) -> jax.Array:
    """Spreads the kernel."""
    return convolve(layer, x, spread(kept, pattern, x.shape[-1]))


def unrolled(layer: Layer, x: jax.Array, kept: jax.Array, pattern: Pattern) -> jax.Array:
    """One convolution for each block of outputs."""
    blocks = zip(pattern.inputs[:, 0, 0], kept, strict=True)
    return jnp.concatenate([convolve(layer, take(x, own), kernel) for own, kernel in blocks], -1)


def grouped(layer: Layer, x: jax.Array, kept: jax.Array, pattern: Pattern) -> jax.Array:
    """One convolution with as many groups as blocks of outputs."""
    gathered = take(x, pattern.inputs[:, 0, 0].reshape(-1))
    kernel = jnp.moveaxis(kept, 0, -2)
    return convolve(layer, gathered, kernel.reshape(*kernel.shape[:-2], -1), len(kept))


def patches(layer: Layer, x: jax.Array, kept: jax.Array, pattern: Pattern) -> jax.Array:
    """One matrix product for each block of outputs, as a batch."""
    positions = np.arange(layer.size**2, dtype=np.int32).reshape(1, layer.size, layer.size, 1)
    columns = (positions * x.shape[-1] + pattern.inputs).reshape(len(kept), -1)
    image = cut_patches(layer, x)
    everything = columns.shape == (1, image.shape[-1])
    gathered = image[..., None, :] if everything else take(image, columns)
    kernel = kept.reshape(*columns.shape, -1)
    y = jnp.einsum("bhwnk,nko->bhwno", gathered, kernel)
    return y.reshape(*y.shape[:3], -1)


def cut_patches(layer: Layer, x: jax.Array) -> jax.Array:
    """[batch, height, width, size * size * channels] of what each output sees."""
    edge, count = layer.size // 2, output_pixels(layer)
    x = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    ends = [(i, i + (count - 1) * layer.stride + 1, layer.stride) for i in range(layer.size)]
    return jnp.concatenate([x[:, slice(*i), slice(*j)] for i in ends for j in ends], -1)


def turned(
    layer: Layer, x: jax.Array, kept: jax.Array, cotangent: jax.Array, pattern: Pattern
) -> jax.Array:
    """Gradient by the input: for each block of inputs from the blocks of outputs that read it."""
    width, outputs = x.shape[-1] // len(pattern.readers), kept.shape[-1]
    weights = kept.reshape(*kept.shape[:3], -1, width, outputs)
    by_block = cotangent.reshape(*cotangent.shape[:3], -1, outputs)
    parts = []
    for readers, places in zip(pattern.readers, pattern.places, strict=True):
        own = weights[readers, :, :, places]  # [readers, height, width, width of inputs, outputs]
        own = jnp.where((places >= 0).reshape(-1, 1, 1, 1, 1), own, 0)
        kernel = jnp.moveaxis(own, 0, -2).reshape(*own.shape[1:4], -1)
        seen = jnp.take(by_block, readers, axis=-2, mode="clip")
        pull_back = jax.vjp(lambda x, own=kernel: convolve(layer, x, own), x[..., :width])[1]
        parts.append(pull_back(seen.reshape(*seen.shape[:3], -1))[0])
    return jnp.concatenate(parts, -1)


def take(x: jax.Array, indices: Any) -> jax.Array:
    """Entries along the last axis, without a test of each index."""
    return jnp.take(x, indices, axis=-1, mode="clip")


def gather(kernel: Any, pattern: Pattern) -> np.ndarray:
    """What a compact kernel holds of a dense one."""
    blocks = np.reshape(kernel, (*kernel.shape[:3], len(pattern.inputs), -1))
    return blocks[positions_of(pattern)]


def spread(kept: jax.Array, pattern: Pattern, inputs: int) -> jax.Array:
    """The dense kernel with zeros elsewhere."""
    zeros = jnp.zeros((*kept.shape[1:3], inputs, len(kept), kept.shape[-1]), kept.dtype)
    whole = zeros.at[positions_of(pattern)].add(kept)
    return whole.reshape(*whole.shape[:3], -1)


def positions_of(pattern: Pattern) -> tuple[Any, ...]:
    """Indices into a dense kernel [height, width, inputs, blocks, outputs of a block]."""
    block, row, column, _ = np.ogrid[tuple(map(slice, pattern.inputs.shape))]
    return row, column, pattern.inputs, block


def ways_of(layer: Layer, batch: int, pattern: Pattern, outputs: int, skip: Sequence[str]) -> Ways:
    """All that are worth a try: pass -> name -> function."""
    blocks, whole = len(pattern.inputs), pattern.readers is not None
    dense = blocks == 1 and pattern.inputs.shape[-1] == layer.inputs
    forward = {"in place": in_place}
    if whole and not dense and blocks <= MAX_CONVOLUTIONS and outputs >= MIN_WIDTH:
        forward["unrolled"] = unrolled
        if blocks > 1:
            forward["grouped"] = grouped
    if batch * output_pixels(layer) ** 2 * pattern.inputs.size <= MAX_GATHERED:
        forward["patches"] = patches
    found: dict[str, dict[str, Way]] = {name: {} for name in PASSES}
    for name, function in forward.items():
        for which, way in zip(PASSES, passes_of(partial(function, layer)), strict=True):
            found[which][name] = way
    if whole and 1 < len(pattern.readers) <= MAX_CONVOLUTIONS:
        if layer.inputs >= MIN_WIDTH * len(pattern.readers):
            found["input gradient"]["turned"] = partial(turned, layer)
    return {
        which: {name: way for name, way in ways.items() if name not in skip}
        for which, ways in found.items()
    }


def passes_of(function: Callable[..., jax.Array]) -> tuple[Way, Way, Way]:
    """Forward pass and gradients of a function of x, kept weights and pattern."""

    def forward(x: Any, kept: Any, cotangent: Any, pattern: Pattern) -> jax.Array:
        return function(x, kept, pattern)

    def input_gradient(x: Any, kept: Any, cotangent: Any, pattern: Pattern) -> jax.Array:
        return jax.vjp(lambda x: function(x, kept, pattern), x)[1](cotangent)[0]

    def kernel_gradient(x: Any, kept: Any, cotangent: Any, pattern: Pattern) -> jax.Array:
        return jax.vjp(lambda kept: function(x, kept, pattern), kept)[1](cotangent)[0]

    return forward, input_gradient, kernel_gradient


def output_pixels(layer: Layer) -> int:
    """Each way."""
    return -(-layer.pixels // layer.stride)


# Which weights are kept.


def deal(rows: int, columns: int, kept: int, random: np.random.Generator) -> np.ndarray:
    """A bool [rows, columns] with so many in each column, and rows alike give or take one."""
    mask = np.zeros((rows, columns), bool)
    for column in range(columns):
        rarest_first = np.lexsort((random.random(rows), mask.sum(1)))
        mask[rarest_first[:kept], column] = True
    return mask


def block_mask(layer: Layer, block: tuple[int, int], kept: int) -> np.ndarray:
    """So many blocks of inputs for each block of outputs, at all positions of the kernel."""
    rows, columns = layer.inputs // block[0], layer.outputs // block[1]
    units = deal(rows, columns, kept, np.random.default_rng(0))
    shape = layer.size, layer.size, layer.inputs, layer.outputs
    return np.broadcast_to(np.kron(units, np.ones(block, bool)), shape)


def n_m_mask(layer: Layer, n: int, m: int) -> np.ndarray:
    """So many of every few inputs, at random for each position and output."""
    shape = layer.size, layer.size, layer.inputs, layer.outputs
    scores = np.random.default_rng(0).random(shape, np.float32)
    return np.asarray(jax.jit(partial(patterns.n_m_mask, n=n, m=m, axis=-2))(scores))


def pattern_of(mask: np.ndarray, block: tuple[int, int], whole: bool) -> Pattern:
    """From a mask [height, width, inputs, outputs] that is made of such blocks."""
    of_blocks = np.moveaxis(mask[..., :: block[1]], -1, 0)  # [blocks, height, width, inputs]
    inputs = first_true(of_blocks, of_blocks[0, 0, 0].sum())
    if not whole:
        return Pattern(inputs, None, None)
    reads = mask[0, 0, :: block[0], :: block[1]]
    readers = first_true(reads, reads.sum(1).max())
    places = np.where(reads, reads.cumsum(0, dtype=np.int32) - 1, -1)
    return Pattern(inputs, readers, np.take_along_axis(places, readers, 1))


def first_true(mask: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first so many along the last axis; of others if there are fewer."""
    return np.argsort(~mask, axis=-1, kind="stable")[..., :count].astype(np.int32)
