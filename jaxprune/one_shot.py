"""Prunes without training: in one step, or in rounds that score the remaining weights again."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import budgets, counting, meshes, patterns, schedules, scores, timetables, trees
from jaxprune.masks import apply_masks, fitting

__all__ = ["prune", "prune_in_rounds"]


def prune(
    params: Any,
    sparsity: float,
    *,
    score: scores.Score | Any = scores.magnitude,
    statistics: Any = None,
    budget: budgets.GivenBudget = None,
    pattern: patterns.PatternRule = None,
    prunable: trees.Prunable = None,
    stacked: trees.Stacked = None,
    masks: Any = None,
) -> tuple[Any, Any]:
    """Prunes in one step, without training.

    Args:
        params: tree of arrays.
        sparsity: fraction of the prunable weights to set to zero, in [0, 1).
        score: function `(params, statistics) -> scores`, or a tree of scores like `params`, such
            as those of `jaxprune.at_init`; the weights with the largest scores are kept.
        statistics: tree like `params` for scores that need one: gradients or their averages.
        budget: function `(shapes, sparsity) -> Budget`, or a dict of sparsities by the names of
            leaves, see `budgets.rule_of`; None is one global ranking in which each leaf keeps at
            least a tenth of its uniform budget.
        pattern: None for single weights, or a pattern of `jaxprune.patterns`, or a function
            `(path, leaf) -> pattern`.
        prunable: which leaves are pruned, see `trees.prunable_flags`.
        stacked: function `(path, leaf) -> axis, axes or None`, the axes that number copies of a
            layer; each copy counts as a separate leaf, see `trees.stacked_axes`.
        masks: masks from `prune` or `get_masks`; weights that they prune remain pruned.

    Returns:
        The pruned parameters and the masks, a tree of bools like `params`.

    Raises:
        ValueError: if `sparsity` is outside [0, 1), no leaf can be pruned, a pattern or a budget
            does not fit, or a tree differs from `params`.

    Example:
        >>> import jaxprune
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, 0.5]]), "bias": jnp.ones(2)}
        >>> pruned, masks = jaxprune.prune(params, 0.5)
        >>> pruned["kernel"].tolist()
        [[3.0, 0.0], [2.0, 0.0]]
    """
    sparsity = _fraction(sparsity)
    flags = trees.prunable_flags(params, prunable, stacked)
    paths = [path for path, flag in zip(trees.leaf_by_path(params), flags, strict=True) if flag]
    weights = trees.pick(params, flags)
    if not weights:
        raise ValueError("`params` must have a leaf that can be pruned, but has no leaves.")
    if statistics is not None:
        trees.check_same_structure("statistics", statistics, params)
        statistics = _of_paths(statistics, paths)
    is_tree = trees.is_array(score) or not jax.tree_util.all_leaves([score])
    if trees.is_rule(score) or not is_tree:
        scores.check_score(score)
        ranked = score(weights, statistics)
    else:
        trees.check_same_structure("score", score, params)
        ranked = _of_paths(score, paths)
    among = None if masks is None else _full_masks(masks, params, paths)
    timetable = timetables.make_timetable(
        dict(zip(paths, weights, strict=True)),
        [0],
        [sparsity],
        budget=budget,
        pattern=pattern,
        stacked=stacked,
    )

    everything = jax.tree.map(lambda leaf: jnp.ones(trees.shape_of(leaf), bool), params)
    kinds = tuple((ranking.pattern, ranking.members) for ranking in timetable.rankings)
    tables = [ranking[2:] for ranking in timetable.rankings]
    with counting.exact(weights):
        select = functools.partial(_selected, kinds, timetable.stacked)
        kept = meshes.automatically(select, tables, ranked, among, like=weights)
    masks = trees.put(everything, flags, kept)
    return apply_masks(params, masks), masks


def prune_in_rounds(
    params: Any,
    sparsity: float,
    score: Callable[[Any], Any],
    *,
    rounds: int = 100,
    **options: Any,
) -> tuple[Any, Any]:
    """Prunes in many small rounds and scores the remaining weights again before each.

    With the final density `d = 1 - sparsity`, the density after round `k` of `n` is `d ** (k / n)`.
    A weight that is pruned in one round remains pruned. SynFlow uses such rounds so that no layer
    is emptied.

    Args:
        params: tree of arrays.
        sparsity: fraction of the prunable weights to set to zero, in [0, 1).
        score: function from the parameters, with zeros where they are pruned, to scores, a
            tree like the parameters.
        rounds: number of rounds, at least 1.
        **options: `budget`, `pattern`, `prunable` and `stacked` of `prune`.

    Returns:
        The pruned parameters and the masks, as `prune` returns them.

    Raises:
        ValueError: if `rounds` is less than 1, and as in `prune`.

    References:
        Tanaka et al., Pruning neural networks without any data, arXiv:2006.05467.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, 0.5]])}
        >>> pruned, masks = prune_in_rounds(params, 0.5, scores.magnitude, rounds=2)
        >>> pruned["kernel"].tolist()
        [[3.0, 0.0], [2.0, 0.0]]
    """
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, but is {rounds!r}.")
    sparsity = _fraction(sparsity)
    if not trees.is_rule(score):
        raise ValueError(
            "`score` must be a function from the parameters to a tree of scores, but is a tree "
            f"({type(score).__name__}). Pass a fixed tree of scores to `prune`."
        )
    pruned, masks = params, jax.tree.map(lambda _: True, params)
    for k in range(1, rounds + 1):
        now = sparsity if k == rounds else 1 - (1 - sparsity) ** (k / rounds)
        pruned, masks = prune(pruned, now, score=score(pruned), masks=masks, **options)
    return pruned, masks


def _fraction(sparsity: Any) -> float:
    """Returns `sparsity` as a Python number; raises unless it lies in [0, 1)."""
    if isinstance(sparsity, Mapping):
        raise ValueError(
            "`sparsity` must be one number. Give the sparsities of single leaves as `budget`, and "
            f"here that of all others; it is {sparsity!r}."
        )
    value = schedules.number("sparsity", sparsity)
    if not 0 <= value < 1:
        fix = f" For {value:g} % write {value / 100:g}." if 1 < value < 100 else ""
        raise ValueError(f"`sparsity` must lie in [0, 1), but is {sparsity!r}.{fix}")
    return value


@functools.partial(jax.jit, static_argnums=(0, 1))
def _selected(
    kinds: Any, stacked: Any, tables: Any, ranked: list[jax.Array], among: Any
) -> list[jax.Array]:
    """Selects the masks; jitted with counts as arguments, so a new sparsity does not recompile."""
    rankings = [
        timetables.Ranking(*kind, *counts) for kind, counts in zip(kinds, tables, strict=True)
    ]
    timetable = timetables.Timetable(
        np.zeros(1, np.int32), tuple(rankings), stacked, np.ones(1, np.int32)
    )
    return (
        timetables.select(timetable, 0, ranked)
        if among is None
        else timetables.renew(timetable, 0, among, ranked)
    )


def _of_paths(tree: Any, paths: list[str]) -> list[Any]:
    """Returns the leaves at the given paths, in the order of the paths."""
    by_path = trees.leaf_by_path(tree)
    return [by_path[path] for path in paths]


def _full_masks(masks: Any, params: Any, paths: list[str]) -> list[jax.Array]:
    """Returns the masks of the leaves at the given paths; True and None keep all of a leaf."""
    by_path = fitting(masks, params, "`masks` must have the paths and shapes of the parameters:")
    leaf_of = trees.leaf_by_path(params)
    kept = {path: True if by_path[path] is None else by_path[path] for path in paths}
    return [jnp.broadcast_to(jnp.asarray(kept[path]), leaf_of[path].shape) for path in paths]
