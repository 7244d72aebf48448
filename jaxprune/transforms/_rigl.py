"""RigL (rigging the lottery): drops weights by magnitude and regrows them by gradient."""

from typing import Any

import jax
import optax

from jaxprune import budgets, patterns, scores, trees
from jaxprune.transforms._dynamic import dynamic_transform


def rigl_transform(
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
    """Trains a sparse network whose connections move to weights with large gradients.

    Put it last in a `jaxprune.chain`, which passes the gradient on and restarts the moments of
    regrown weights at 0. In any other chain the incoming update replaces the gradient, the step is
    slower because that update must be stored, and moments are not restarted.

    The network is sparse from the first update on; its initial masks are random. At each mask
    update, a fraction of the kept weights (`drop` at `start`, falling to 0 at `stop` along a
    cosine) is dropped, smallest `|w|` first. The same number of pruned weights, those with the
    largest `|g|`, is regrown at 0. Leaves keep their number of weights if the floors of `budget`
    add up to its total.

    Differs from the paper: ties are broken by index, not by noise; a dropped weight cannot be
    regrown in the same mask update.

    Args:
        sparsity: fraction of the prunable weights that are 0, in [0, 1).
        every: steps between mask updates.
        start: step of the first mask update.
        stop: step of the last mask update; masks are fixed from then on. The paper stops at
            three quarters of the run.
        drop: fraction of the kept weights that is dropped and regrown at `start`, in [0, 1).
        seed: the seed of the initial masks.
        budget: function `(shapes, sparsity) -> Budget`, or a dict of sparsities by the names of
            leaves, see `budgets.rule_of`; None is `budgets.erdos_renyi_kernel`.
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
        Evci et al., Rigging the lottery: making all tickets winners, arXiv:1911.11134.

    Example:
        >>> import jaxprune
        >>> import jax.numpy as jnp
        >>> optimizer = jaxprune.chain(
        ...     optax.sgd(0.1, momentum=0.9), rigl_transform(0.5, drop=0.5, stop=100))
        >>> params = {"kernel": jnp.ones((2, 4))}
        >>> state = optimizer.init(params)
        >>> gradients = {"kernel": jnp.arange(8.0).reshape(2, 4)}
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> int(jaxprune.get_masks(state)["kernel"].sum())
        4
    """

    def growth(index: jax.Array, weights: list[jax.Array], gradients: Any) -> list[jax.Array]:
        del index, weights
        return scores.gradient(None, gradients)

    return dynamic_transform(
        "rigl_transform",
        growth,
        sparsity,
        every=every,
        start=start,
        stop=stop,
        drop=drop,
        seed=seed,
        needs_gradient=True,
        budget=budget,
        pattern=pattern,
        prunable=prunable,
        stacked=stacked,
    )
