"""N:M masks, found by pairwise comparison."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.patterns._kinds import MAX_M, NM, as_float32, block_of, is_int

# Keys have the order of the scores: first "never kept", then NaN, then -inf .. +inf.
_NEVER, _NAN = np.int32(-(2**31)), np.int32(-(2**31) + 1)


def n_m_mask(
    scores: jax.Array,
    n: int | jax.Array,
    m: int,
    axis: int,
    among: jax.Array | None = None,
) -> jax.Array:
    """Keeps the `n` largest scores of every `m` consecutive ones along an axis.

    A weight is kept if fewer than `n` weights of its group precede it. Those with a larger score
    precede it, and those with the same score and a lower index. NaN ranks below -inf. Each pair of
    a group is compared once; nothing is sorted.

    Args:
        scores: floating-point array, compared in float32.
        n: int or int32 [], from 0 to `m`; if traced, it is clipped to this range.
        m: size of a group, at most 32; divides the size of the axis.
        axis: the axis along which groups lie.
        among: None or a bool array like `scores`; only weights that are True here can be kept.

    Returns:
        bool array like `scores`, with exactly `n` True in each group, or as many as `among`
        allows.

    Raises:
        ValueError: if the axis does not exist or its size is not a multiple of `m`, if `n` or `m`
            is out of range, if scores are not floating point, or if `among` has a different shape.

    Example:
        >>> n_m_mask(jnp.array([3.0, 1.0, 2.0, 2.0, 0.0, 0.0, 0.0, 5.0]), 2, 4, axis=0).tolist()
        [True, False, True, False, True, False, False, True]
    """
    scores = as_float32(scores)
    _check_n_m(scores, n, m, axis, among)
    keys = _keys(scores, among)
    # Slices of the groups rather than every m-th entry of the axis, because XLA:CPU is faster so.
    split = axis % scores.ndim + 1
    size = scores.shape[split - 1]
    groups = keys.reshape(*scores.shape[: split - 1], size // m, m, *scores.shape[split:])
    members = [jax.lax.index_in_dim(groups, i, split, keepdims=False) for i in range(m)]
    limit = jnp.clip(n, 0, m).astype(jnp.int8)
    kept = jnp.stack([rank < limit for rank in _ranks(members)], split).reshape(scores.shape)
    return kept if among is None else kept & among


def _check_n_m(scores: jax.Array, n: Any, m: int, axis: int, among: jax.Array | None) -> None:
    """Checks the arguments of `n_m_mask`, as far as they are static."""
    if not is_int(m) or not 1 <= m <= MAX_M:
        raise ValueError(f"`m` must be an integer from 1 to {MAX_M}, but is {m!r}.")
    block_of(NM(m, m, axis), scores.shape)
    if jnp.ndim(n) or not jnp.issubdtype(jnp.result_type(n), jnp.integer):
        raise ValueError(f"`n` must be one integer, but is {n!r}.")
    if is_int(n) and not 0 <= n <= m:
        raise ValueError(f"`n` must lie between 0 and m = {m}, but is {n}.")
    if among is not None and (among.shape != scores.shape or among.dtype != bool):
        raise ValueError(
            f"`among` must be None or bools of the shape {scores.shape} of `scores`, but is "
            f"{among.dtype} {among.shape}."
        )


def _keys(scores: jax.Array, among: jax.Array | None) -> jax.Array:
    """Maps float32 scores to int32 keys in the same order."""
    scores = jnp.where(scores == 0, 0.0, scores)  # -0.0 and 0.0 tie
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    keys = jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)
    keys = jnp.where(jnp.isnan(scores), _NAN, keys)
    return keys if among is None else jnp.where(among, keys, _NEVER)


def _ranks(members: list[jax.Array]) -> list[jax.Array]:
    """Counts how many members of its group precede each member, int8."""
    ranks = [jnp.zeros(x.shape, jnp.int8) for x in members]
    for i, later in enumerate(members):
        for j, earlier in enumerate(members[:i]):
            first = earlier >= later
            ranks[i] += first.astype(jnp.int8)
            ranks[j] += (~first).astype(jnp.int8)
    return ranks
