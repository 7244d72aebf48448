"""Gradual pruning by the gradient of the current step."""

import optax

from jaxprune import budgets, patterns, scores, trees
from jaxprune.transforms._gradual import gradual_transform


def saliency_transform(
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
    """Prunes the weights with the smallest `|w * g|`, where `g` is the gradient of that step.

    Put it last in a `jaxprune.chain`, which passes the gradient on. In any other chain the incoming
    update replaces the gradient, and the step is slower because that update must be stored. The
    score of one batch is noisy: `agip_transform` averages the gradient over steps, at the cost of 4
    bytes for each weight.

    Args:
        sparsity: fraction of the prunable weights that are 0 from `stop` on, in [0, 1); or an
            `optax.Schedule` from the step to that fraction, which must not fall.
        every: steps between mask updates.
        start: step of the first mask update.
        stop: step of the last mask update; masks are fixed from then on.
        budget: function `(shapes, sparsity) -> Budget`, or a dict of sparsities by the names of
            leaves, see `budgets.rule_of`; None is `budgets.global_budget(0.1)`.
        pattern: None for single weights, or a pattern of `jaxprune.patterns`, or a function
            `(path, leaf) -> pattern`.
        prunable: which leaves are pruned, see `trees.prunable_flags`.
        stacked: which axes of a leaf number copies of a layer, see `trees.stacked_axes`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its `update` needs `params` and takes the
        gradient as the extra argument `grad`. A mask update at which the gradient is not finite
        is made at the next step instead.

    Raises:
        ValueError: as `magnitude_transform`.

    References:
        Mozer and Smolensky, Skeletonization, NeurIPS 1988 (first-order saliency).
        Molchanov et al., Importance estimation for neural network pruning, arXiv:1906.10771.

    Example:
        >>> import jaxprune
        >>> import jax.numpy as jnp
        >>> optimizer = jaxprune.chain(optax.sgd(0.1), saliency_transform(0.5, stop=0))
        >>> params = {"kernel": jnp.array([[3.0, 1.0]])}
        >>> state = optimizer.init(params)
        >>> gradients = {"kernel": jnp.array([[0.1, -2.0]])}
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> jaxprune.get_masks(state)["kernel"].tolist()
        [[False, True]]
    """
    return gradual_transform(
        "saliency_transform",
        scores.taylor,
        sparsity,
        every=every,
        start=start,
        stop=stop,
        needs_gradient=True,
        budget=budget,
        pattern=pattern,
        prunable=prunable,
        stacked=stacked,
    )
