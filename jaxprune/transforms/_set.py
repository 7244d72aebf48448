"""SET (sparse evolutionary training): drops weights by magnitude and regrows them at random."""

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
    budget: budgets.GivenBudget = None,
    pattern: patterns.PatternRule = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains a sparse network whose smallest weights are dropped and regrown at random.

    Put it last in a `jaxprune.chain`, which restarts the moments of regrown weights at 0. The
    network is sparse from the first update on; its initial masks are random. At each mask update, a
    fraction of the kept weights (`drop` at `start`, falling to 0 at `stop` along a cosine) is
    replaced by randomly drawn weights, which start at 0. Leaves keep their number of weights.

    To start from the sparse network itself, apply the initial masks before the first step:
    `params = apply_masks(params, get_masks(state))`; the first update does so in any case.

    Differs from the paper, which replaces a constant fraction of the smallest positive and largest
    negative weights at the end of each epoch, with Erdos-Renyi densities.

    Args:
        sparsity: fraction of the prunable weights that are 0, in [0, 1).
        every: steps between mask updates.
        start: step of the first mask update.
        stop: step of the last mask update; masks are fixed from then on.
        drop: fraction of the kept weights that is dropped and regrown at `start`, in [0, 1).
        seed: the seed of the initial masks and of the regrown weights.
        budget: function `(shapes, sparsity) -> Budget`, or a dict of sparsities by the names of
            leaves, see `budgets.rule_of`; None is `budgets.erdos_renyi_kernel`.
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
        # Fold in index + 1, so that growth never reuses the key of the initial masks.
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
