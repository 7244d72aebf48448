"""Gradual random pruning, the baseline for all other methods."""

import optax

from jaxprune import budgets, patterns, scores, trees
from jaxprune.transforms._gradual import gradual_transform


def random_transform(
    sparsity: float | optax.Schedule,
    *,
    every: int = 100,
    start: int = 0,
    stop: int,
    seed: int = 0,
    budget: budgets.GivenBudget = None,
    pattern: patterns.PatternRule = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes in a fixed random order, a baseline that any useful method must beat.

    Put it last in the chain.

    Args:
        sparsity: fraction of the prunable weights that are 0 from `stop` on, in [0, 1); or an
            `optax.Schedule` from the step to that fraction, which must not fall.
        every: steps between mask updates.
        start: step of the first mask update.
        stop: step of the last mask update; masks are fixed from then on.
        seed: the seed of the order.
        budget: function `(shapes, sparsity) -> Budget`, or a dict of sparsities by the names of
            leaves, see `budgets.rule_of`; None is `budgets.global_budget(0.1)`.
        pattern: None for single weights, or a pattern of `jaxprune.patterns`, or a function
            `(path, leaf) -> pattern`.
        prunable: which leaves are pruned, see `trees.prunable_flags`.
        stacked: which axes of a leaf number copies of a layer, see `trees.stacked_axes`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its `update` needs `params`.

    Raises:
        ValueError: as `magnitude_transform`.

    Example:
        >>> import jaxprune
        >>> import jax.numpy as jnp
        >>> optimizer = optax.chain(optax.sgd(0.1), random_transform(0.75, stop=0, seed=1))
        >>> params = {"kernel": jnp.ones((4, 4))}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(params, state, params)
        >>> int(jaxprune.get_masks(state)["kernel"].sum())
        4
    """
    return gradual_transform(
        "random_transform",
        scores.random(seed),
        sparsity,
        every=every,
        start=start,
        stop=stop,
        budget=budget,
        pattern=pattern,
        prunable=prunable,
        stacked=stacked,
    )
