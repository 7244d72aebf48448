"""Parameters and statistics -> scores. Weights with the lowest scores are pruned first.

A score is a function `(params, statistics) -> scores` of two trees with the same structure. A
statistic is the running size of a weight's gradient. Scores are compared in float32, across all
leaves.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import counting, trees

__all__ = [
    "Score",
    "check_score",
    "draw",
    "gradient",
    "magnitude",
    "random",
    "rank_unmoved",
    "taylor",
]

# (params, statistics) -> scores, a tree like `params`; the largest are kept
Score = Callable[[Any, Any], Any]

_WORD = np.uint32  # the part of an index that is hashed at once


def magnitude(params: Any, statistics: Any = None) -> Any:
    """Scores each weight by its size, `|w|`, so that small weights are pruned first.

    Args:
        params: tree of floating-point arrays.
        statistics: not used.

    Returns:
        Tree of float32 arrays like `params`.

    References:
        Han et al., Learning both weights and connections, arXiv:1506.02626.

    Example:
        >>> magnitude({"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
        [[2.0, 1.0]]
    """
    del statistics
    return jax.tree.map(_size, params)


def gradient(params: Any, statistics: Any) -> Any:
    """Scores each weight by its statistic, so that weights with small gradients are pruned first.

    This follows the news item about AGIP to the letter. An important weight that has converged also
    has a small gradient, which is why `taylor` is the better choice.

    Args:
        params: not used.
        statistics: tree of non-negative arrays.

    Returns:
        Tree of float32 arrays like `statistics`.

    Raises:
        ValueError: if `statistics` is None.

    Example:
        >>> gradient(None, {"kernel": jnp.array([[0.5, 1.0]])})["kernel"].tolist()
        [[0.5, 1.0]]
    """
    del params
    return jax.tree.map(_size, _required(statistics))


def taylor(params: Any, statistics: Any) -> Any:
    """Scores each weight by `|w| * S`, the first-order change of the loss if it became 0.

    Setting `w` to 0 changes the loss by about `-g * w`; `S` is the running size of `g`.

    `structure.taylor` applies the same expansion to whole channels: it takes signed gradients and
    returns `(sum of w * g) ** 2` over the entries of a channel, whose terms can cancel. Here every
    weight is scored separately, by the size of its gradient.

    Args:
        params: tree of floating-point arrays.
        statistics: tree of non-negative arrays like `params`.

    Returns:
        Tree of float32 arrays like `params`.

    Raises:
        ValueError: if `statistics` is None.

    References:
        Molchanov et al., Importance estimation for neural network pruning, arXiv:1906.10771.

    Example:
        >>> taylor([jnp.array([-2.0, 1.0])], [jnp.array([0.5, 3.0])])[0].tolist()
        [1.0, 3.0]
    """
    return jax.tree.map(lambda w, s: _size(w) * _size(s), params, _required(statistics))


def random(seed: int) -> Score:
    """Makes a score that ranks all weights in a fixed random order, a baseline for other scores.

    Args:
        seed: a different seed gives a different ranking.

    Returns:
        A score function; its scores are uniform in [0, 1) and depend only on the seed, the position
        of the leaf and the position in the leaf.

    Example:
        >>> score = random(0)({"a": jnp.zeros(3), "b": jnp.zeros(3)})
        >>> bool((score["a"] != score["b"]).all())
        True
    """

    def score(params: Any, statistics: Any = None) -> Any:
        del statistics
        return draw(jax.random.key(seed), params)

    return score


def check_score(score: Any) -> None:
    """Raises unless an argument `score` is a function `(params, statistics) -> scores`.

    Args:
        score: what the caller was given.

    Raises:
        ValueError: if it is anything else; it names the score that was meant.

    Example:
        >>> check_score("magnitude")
        Traceback (most recent call last):
        ...
        ValueError: `score` must be a function `(params, statistics) -> scores`, but is \
'magnitude'. Write `score=jaxprune.scores.magnitude`.
    """
    form, known = "(params, statistics) -> scores", ("magnitude", "taylor", "gradient")
    name = score if isinstance(score, str) else getattr(score, "__name__", "")
    fix = f"Write `score=jaxprune.scores.{name if name in known else 'magnitude'}`."
    if name == "random":
        fix = "Write `score=jaxprune.scores.random(0)`, with a seed."
    trees.check_function("score", score, form, fix)


def draw(key: jax.Array, params: Any) -> Any:
    """Draws uniform random scores in [0, 1), the same for the same key and shapes.

    Args:
        key: a `jax.random` key.
        params: tree of arrays; only their shapes are used.

    Returns:
        Tree of float32 arrays like `params`.

    Example:
        >>> draw(jax.random.key(0), [jnp.zeros((2, 3))])[0].shape
        (2, 3)
    """
    leaves, treedef = jax.tree.flatten(params)
    words = jax.random.bits(key, (len(leaves),), jnp.uint32)
    draws = [_hashed(word, jnp.shape(leaf)) for word, leaf in zip(words, leaves)]
    return jax.tree.unflatten(treedef, draws)


def rank_unmoved(
    scores: Sequence[jax.Array],
    params: Sequence[jax.Array],
    statistics: Sequence[jax.Array],
    stacked: Sequence[tuple[int, ...]],
) -> tuple[list[jax.Array], jax.Array]:
    """Ranks layers that have never moved within themselves, below the weights of all other layers.

    The product of weight and gradient says nothing about a layer whose gradients are all 0, because
    none has reached it yet, or whose weights are all 0, because they start there. Such a layer is
    ranked within itself: by `|w|`, or by the statistic if its weights are 0.

    Args:
        scores: one array for each leaf; weights with larger scores are kept.
        params: weights, like `scores`.
        statistics: size of each weight's gradient, like `scores`.
        stacked: axes of each leaf that number copies; each copy is a layer.

    Returns:
        Scores, which are negative in the layers that have not moved, and bool [layers], True for a
        layer that has not moved.

    Example:
        >>> weights, gradients = [jnp.array([1.0, -4.0])], [jnp.zeros(2)]
        >>> ranked, unmoved = rank_unmoved(gradients, weights, gradients, [()])
        >>> ranked[0].tolist(), unmoved.tolist()
        ([-1.0, -0.25], [True])
    """
    ranked, unmoved = [], []
    peaks = (counting.peaks(tree, stacked) for tree in (params, statistics))
    layouts = counting.stacks(params, stacked)
    for score, w, s, stack, *own in zip(scores, params, statistics, layouts, *peaks, strict=True):
        at_zero, unreached = (peak == 0 for peak in own)
        divisor = jnp.where(stack.spread(at_zero), _size(s), _size(w))
        unmoved.append(at_zero | unreached)
        ranked.append(jnp.where(stack.spread(unmoved[-1]), -1 / divisor, score))
    return ranked, jnp.concatenate(unmoved)


def _hashed(word: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Hashes each position to a number that is uniform in [0, 1).

    JAX's own generator takes 27 s to compile for the 54 kernels of a ResNet-50, and 0.6 s to run; a
    ranking needs less randomness. The mixing function is `lowbias32` from C. Wellons, Prospecting
    for hash functions, 2018.
    """
    bits = np.iinfo(_WORD).bits
    if math.prod(shape) <= 2**bits:
        return _uniform(_mix(_mix(_index(shape, np.uint32)) ^ word))
    with jax.enable_x64(True):  # only for the index
        index = _index(shape, np.uint64)
        low, high = index.astype(_WORD), index >> np.uint64(bits)
        return _uniform(_mix(_mix(low.astype(jnp.uint32)) ^ _mix(high.astype(jnp.uint32)) ^ word))


def _index(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns the row-major index of each entry."""
    index, stride = jnp.zeros((1,) * len(shape), dtype), 1
    for axis in reversed(range(len(shape))):
        extent = (*(1,) * axis, shape[axis], *(1,) * (len(shape) - axis - 1))
        if shape[axis] > 1:
            index += jax.lax.broadcasted_iota(dtype, extent, axis) * np.asarray(stride, dtype)
        stride *= shape[axis]
    return jnp.broadcast_to(index, shape)


def _uniform(bits: jax.Array) -> jax.Array:
    """Returns the upper 24 bits as a fraction, float32 in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def _mix(x: jax.Array) -> jax.Array:
    """Mixes 32-bit integers by a bijection whose output bits each depend on every input bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _required(statistics: Any) -> Any:
    """Returns the statistics; raises an error that says where to get them if there are none."""
    if statistics is None:
        raise ValueError(
            "`statistics` is missing: this score needs the size of each weight's gradient. Pass a "
            "tree like the parameters with gradients or their averages, or use `scores.magnitude`."
        )
    return statistics


def _size(x: jax.Array) -> jax.Array:
    """Returns the absolute value in float32."""
    return jnp.abs(x.astype(jnp.float32))
