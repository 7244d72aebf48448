"""AC/DC: alternating compressed and decompressed phases."""

from typing import Any

import optax

from jaxprune import budgets, patterns, schedules, scores, timetables, trees
from jaxprune.transforms._base import checked, masking_transform


def acdc_transform(
    sparsity: float,
    *,
    every: int = 100,
    start: int = 0,
    stop: int,
    dense: int | None = None,
    budget: budgets.GivenBudget = None,
    pattern: patterns.PatternRule = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    """Alternates sparse and dense training, and ends sparse.

    Put it last in a `jaxprune.chain`, which restarts the moments of regrown weights at 0. Training
    is dense until `start`. Then phases alternate: at the start of a compressed
    phase the weights with the largest `|w|` are kept and the rest are set to 0; at the start of a
    decompressed phase all weights train again, the pruned ones from 0. The last compressed phase
    starts at `stop`. A compressed phase that would end at `stop` or later is skipped, so that the
    last mask comes from a network that has just trained dense.

    Args:
        sparsity: fraction of the prunable weights that are 0 in a compressed phase, in [0, 1).
        every: number of steps of a compressed phase. The paper: 5 epochs.
        start: first step of the first compressed phase. The paper: epoch 10 of 100.
        stop: first step of the last compressed phase. The paper: epoch 85 of 100.
        dense: number of steps of a decompressed phase; None is `every`.
        budget: function `(shapes, sparsity) -> Budget`, or a dict of sparsities by the names of
            leaves, see `budgets.rule_of`; None is `budgets.erdos_renyi_kernel`. The paper uses
            `budgets.global_budget(0)`, which may starve layers at high sparsity.
        pattern: None for single weights, or a pattern of `jaxprune.patterns`, or a function
            `(path, leaf) -> pattern`.
        prunable: which leaves are pruned, see `trees.prunable_flags`.
        stacked: which axes of a leaf number copies of a layer, see `trees.stacked_axes`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its `update` needs `params`.

    Raises:
        ValueError: as `magnitude_transform`.

    References:
        Peste et al., AC/DC: alternating compressed/decompressed training of deep neural
        networks, arXiv:2106.12379.

    Example:
        >>> import jaxprune
        >>> import jax.numpy as jnp
        >>> optimizer = jaxprune.chain(optax.sgd(0.1), acdc_transform(0.5, every=1, stop=2))
        >>> params = {"kernel": jnp.array([[3.0, 2.0, 1.0, 0.5]])}
        >>> state = optimizer.init(params)
        >>> for _ in range(3):
        ...     updates, state = optimizer.update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(jaxprune.get_masks(state)["kernel"].tolist())
        [[True, True, False, False]]
        [[True, True, True, True]]
        [[True, True, False, False]]
    """
    other = None if dense is None else schedules.whole("dense", dense)
    problems = []
    if other is not None and other < 1:
        problems = [f"`dense` must be at least 1 step, but is {dense!r}"]
    arguments = checked("acdc_transform", every, start, stop, *problems, sparsity=sparsity)
    every, start, stop, fractions = arguments
    steps, sparsities = phases(fractions["sparsity"], every, start, stop, other)

    def choose(
        timetable: timetables.Timetable, index: Any, masks: Any, weights: Any, gradients: Any
    ) -> Any:
        del masks, gradients
        return timetables.select(timetable, index, scores.magnitude(weights))

    return masking_transform(
        steps,
        sparsities,
        choose,
        budget=budgets.erdos_renyi_kernel if budget is None else budget,
        pattern=pattern,
        prunable=prunable,
        stacked=stacked,
    )


def phases(
    sparsity: float, every: int, start: int, stop: int, dense: int | None = None
) -> tuple[list[int], list[float]]:
    """Returns the first step of each phase, and its sparsity: 0 in a decompressed phase."""
    steps, sparsities, step, compressed = [], [], start, True
    while step + (every if compressed else 0) < stop:
        steps.append(step)
        sparsities.append(sparsity if compressed else 0.0)
        step += every if compressed or dense is None else dense
        compressed = not compressed
    return [*steps, stop], [*sparsities, sparsity]
