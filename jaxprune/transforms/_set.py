"""Sparse evolutionary training: drop by magnitude, grow at random."""

from typing import Any

import jax
import optax

from jaxprune import budgets, patterns, scores, trees
from jaxprune.transforms._dynamic import dynamic_transform


def set_transform(
    sparsity: float,
    *,
    every: int = 100,
    start: int = 0,
    stop: int,
    drop: float = 0.3,
    seed: int = 0,
    budget: budgets.BudgetRule | None = None,
    pattern: patterns.PatternRule = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains a sparse network whose connections move: the smallest go, random ones come.

    Put it last in a `jaxprune.chain`, which restarts the moments of regrown weights at 0. The
    network is sparse from the first update on; its masks start at random. At each mask update a
    fraction of the kept weights, `drop` at `start` and 0 at `stop` along a cosine, is replaced
    by others, drawn at random, which start at 0. Leaves keep their number of weights.

    To start from the sparse network itself, apply the first masks before the first step:
    `params = apply_masks(params, get_masks(state))`; the first update does so in any case.

    Differs from the paper: it replaces a constant fraction, at the end of each epoch, of the
    smallest positive and largest negative weights, with Erdos-Renyi densities.

    Args:
        sparsity: fraction of the prunable weights that are 0, in [0, 1).
        every: steps between mask updates.
        start: step of the first mask update.
        stop: step of the last mask update; masks are fixed from then on.
        drop: fraction of the kept weights that moves at `start`, in [0, 1).
        seed: of the first masks and of what grows.
        budget: function `(shapes, sparsity) -> Budget`; None is `budgets.erdos_renyi_kernel`.
        pattern: None for single weights, or a pattern of `jaxprune.patterns`, or a function
            `(path, leaf) -> pattern`.
        prunable: which leaves are pruned, see `trees.prunable_flags`.
        stacked: which axes of a leaf number copies of a layer, see `trees.stacked_axes`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its `update` needs `params`.

    Raises:
        ValueError: as `magnitude_transform`.

    References:
        Mocanu et al., Scalable training of artificial neural networks with adaptive sparse
        connectivity inspired by network science, arXiv:1707.04780.

    Example:
        >>> import jaxprune
        >>> import jax.numpy as jnp
        >>> optimizer = jaxprune.chain(optax.adam(0.1), set_transform(0.75, every=2, stop=8))
        >>> params = {"kernel": jnp.ones((4, 4))}
        >>> state = optimizer.init(params)
        >>> params = jaxprune.apply_masks(params, jaxprune.get_masks(state))
        >>> int((params["kernel"] != 0).sum())
        4
    """

    def growth(index: jax.Array, weights: list[jax.Array], gradients: Any) -> list[jax.Array]:
        del gradients
        # Not the key of the first masks: the draws of a mask update are its own.
        return scores.draw(jax.random.fold_in(jax.random.key(seed), index + 1), weights)

    return dynamic_transform(
        "set_transform",
        growth,
        sparsity,
        every=every,
        start=start,
        stop=stop,
        drop=drop,
        seed=seed,
        needs_gradient=False,
        budget=budget,
        pattern=pattern,
        prunable=prunable,
        stacked=stacked,
    )
