"""Gradual magnitude pruning."""

import optax

from jaxprune import budgets, patterns, scores, trees
from jaxprune.transforms._gradual import gradual_transform


def magnitude_transform(
    sparsity: float | optax.Schedule,
    *,
    every: int = 100,
    start: int = 0,
    stop: int,
    budget: budgets.GivenBudget = None,
    pattern: patterns.PatternRule = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes the smallest weights, a few more at each mask update.

    Put it last in the chain. At `start`, every `every` steps and at `stop`, the kept weights with
    the smallest `|w|` are pruned, until the sparsity of the cubic ramp is reached. The state is one
    bool for each prunable weight.

    Differs from the paper: pruned weights are 0 and remain pruned (the paper keeps their last
    values, so that they may come back), and all leaves compete in one ranking unless `budget`
    is `budgets.uniform`.

    Args:
        sparsity: fraction of the prunable weights that are 0 from `stop` on, in [0, 1); or an
            `optax.Schedule` from the step to that fraction, which must not fall.
        every: steps between mask updates.
        start: step (counted in optimizer updates, from 0) of the first mask update.
        stop: step of the last mask update; masks are fixed from then on.
        budget: function `(shapes, sparsity) -> Budget`, or a dict of sparsities by the names of
            leaves, see `budgets.rule_of`; None is `budgets.global_budget(0.1)`.
        pattern: None for single weights, or a pattern of `jaxprune.patterns`, or a function
            `(path, leaf) -> pattern`.
        prunable: which leaves are pruned, see `trees.prunable_flags`.
        stacked: which axes of a leaf number copies of a layer, see `trees.stacked_axes`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its `update` needs `params`.

    Raises:
        ValueError: if an argument is out of range; from `init`, if a pattern does not fit or a
            budget cannot be met; from `update`, if `params` is missing or has a different
            structure.

    References:
        Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878.

    Example:
        >>> import jaxprune
        >>> import jax.numpy as jnp
        >>> optimizer = optax.chain(optax.sgd(0.1), magnitude_transform(0.5, stop=0))
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(params, state, params)
        >>> optax.apply_updates(params, updates)["kernel"].round(2).tolist()
        [[2.700000047683716, 0.0], [0.0, 1.7999999523162842]]
    """
    return gradual_transform(
        "magnitude_transform",
        scores.magnitude,
        sparsity,
        every=every,
        start=start,
        stop=stop,
        budget=budget,
        pattern=pattern,
        prunable=prunable,
        stacked=stacked,
    )
