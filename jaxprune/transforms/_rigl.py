"""Rigging the lottery: drop by magnitude, grow by gradient."""

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
    budget: budgets.BudgetRule | None = None,
    pattern: patterns.PatternRule = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains a sparse network whose connections move to where the gradient is large.

    Put it last in a `jaxprune.chain`, which hands the gradient on and restarts the moments of
    regrown weights at 0; in another chain the incoming update takes the place of the gradient,
    the step is slower because that update has to be stored, and moments are not restarted. The
    network is sparse from the first update on; its masks start at random. At each mask update a
    fraction of the kept weights, `drop` at `start` and 0 at `stop` along a cosine, is dropped,
    the smallest `|w|` first, and as many pruned ones with the largest `|g|` are regrown at 0.
    Leaves keep their number of weights if the floors of `budget` add up to its total.

    Differs from the paper: ties are cut by index, not by noise; a weight that was dropped can
    not be regrown in the same mask update.

    Args:
        sparsity: fraction of the prunable weights that are 0, in [0, 1).
        every: steps between mask updates.
        start: step of the first mask update.
        stop: step of the last mask update; masks are fixed from then on. The paper stops at
            three quarters of the run.
        drop: fraction of the kept weights that moves at `start`, in [0, 1).
        seed: of the first masks.
        budget: function `(shapes, sparsity) -> Budget`; None is `budgets.erdos_renyi_kernel`.
        pattern: None for single weights, or a pattern of `jaxprune.patterns`, or a function
            `(path, leaf) -> pattern`.
        prunable: which leaves are pruned, see `trees.prunable_flags`.
        stacked: which axes of a leaf number copies of a layer, see `trees.stacked_axes`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its `update` needs `params` and takes the
        gradient as the extra argument `grad`. A mask update at which the gradient is not finite
        is put off to the next step.

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
