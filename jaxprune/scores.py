"""Parameters and statistics -> scores. The larger the score, the later a weight is pruned.

A score is a function `(params, statistics) -> scores` on two trees of the same structure,
where a statistic is the running size of a weight's gradient. Scores are compared with each
other in float32, across all leaves.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Score", "draw", "gradient", "magnitude", "random", "rank_unmoved", "taylor"]

Score = Callable[[Any, Any], Any]

_WORD = np.uint32  # of an index that is hashed at once


def magnitude(params: Any, statistics: Any = None) -> Any:
    """`|w|`: small weights go first.

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
    """The statistic alone: weights with consistently small gradients go first.

    This is what the news item about AGIP says to the letter. An important weight that has
    converged has a small gradient too, which is why `taylor` is the better choice.

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
    """`|w| * S`: how much the loss would change, to first order, if the weight became 0.

    Removing `w` changes the loss by about `g * w`; `S` is the running size of `g`.

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
    """A fixed random ranking of all weights: the control for every other score.

    Args:
        seed: a different seed gives a different ranking.

    Returns:
        A score function; its scores are uniform in [0, 1) and depend on nothing but the seed,
        the position of the leaf and the position in the leaf.

    Example:
        >>> score = random(0)({"a": jnp.zeros(3), "b": jnp.zeros(3)})
        >>> bool((score["a"] != score["b"]).all())
        True
    """

    def score(params: Any, statistics: Any = None) -> Any:
        del statistics
        return draw(jax.random.key(seed), params)

    return score


def draw(key: jax.Array, params: Any) -> Any:
    """Uniform random scores in [0, 1), the same for the same key and shapes.

    Args:
        key: a key of `jax.random`.
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
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Gives layers that have never moved a ranking of their own, below that of all others.

    A product of weight and gradient says nothing of a layer whose gradients are all 0, because none
    has reached it yet, or whose weights are all 0, because it starts there. Such a layer is ranked
    within itself: by `|w|`, or by the statistic where its weights are 0.

    Args:
        scores: of each leaf, larger is kept.
        params: like `scores`.
        statistics: like `scores`, the size of each weight's gradient.
        stacked: axes of each leaf that number copies; each copy is a layer.

    Returns:
        Scores, negative in the layers that have not moved, and bool [copies] for each leaf: True
        where a layer has not moved.

    Example:
        >>> weights, gradients = [jnp.array([1.0, -4.0])], [jnp.zeros(2)]
        >>> ranked, unmoved = rank_unmoved(gradients, weights, gradients, [()])
        >>> ranked[0].tolist(), unmoved[0].tolist()
        ([-1.0, -0.25], [True])
    """
    ranked, unmoved = [], []
    for score, weight, statistic, axes in zip(scores, params, statistics, stacked, strict=True):
        weight, statistic = _size(weight), _size(statistic)
        rest = tuple(axis for axis in range(weight.ndim) if axis not in axes)
        at_zero, unreached = (
            jnp.max(x, axis=rest, keepdims=True) == 0 for x in (weight, statistic)
        )
        own = -1 / jnp.where(at_zero, statistic, weight)  # in the order of what it divides by
        still = at_zero | unreached
        ranked.append(jnp.where(still, own, score))
        unmoved.append(still.reshape(-1))
    return ranked, unmoved


def _hashed(word: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A hash of each position, uniform in [0, 1).

    JAX's own generator takes 27 s to compile for the 54 kernels of a ResNet-50, and .6 s to run;
    a ranking needs less. The mixing function is `lowbias32` of C. Wellons, Prospecting for hash
    functions, 2018.
    """
    bits = np.iinfo(_WORD).bits
    if math.prod(shape) <= 2**bits:
        return _uniform(_mix(_mix(_index(shape, np.uint32)) ^ word))
    with jax.enable_x64(True):  # for the index alone
        index = _index(shape, np.uint64)
        low, high = index.astype(_WORD), index >> np.uint64(bits)
        return _uniform(_mix(_mix(low.astype(jnp.uint32)) ^ _mix(high.astype(jnp.uint32)) ^ word))


def _index(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The row-major index of each entry."""
    index, stride = jnp.zeros((1,) * len(shape), dtype), 1
    for axis in reversed(range(len(shape))):
        extent = (*(1,) * axis, shape[axis], *(1,) * (len(shape) - axis - 1))
        if shape[axis] > 1:
            index += jax.lax.broadcasted_iota(dtype, extent, axis) * np.asarray(stride, dtype)
        stride *= shape[axis]
    return jnp.broadcast_to(index, shape)


def _uniform(bits: jax.Array) -> jax.Array:
    """The upper 24 bits as a fraction, float32 in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers in which every output bit depends on every input bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _required(statistics: Any) -> Any:
    """The statistics, or an error that says where to get them."""
    if statistics is None:
        raise ValueError(
            "`statistics` is missing: this score needs the size of each weight's gradient. Pass "
            "gradients or their averages, a tree like the parameters, or use `scores.magnitude`."
        )
    return statistics


def _size(x: jax.Array) -> jax.Array:
    """Absolute value in float32."""
    return jnp.abs(x.astype(jnp.float32))
