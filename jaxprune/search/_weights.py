"""The problem of single weights: which density each leaf has."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.search._layers import Layer
from jaxprune.search._problems import (
    Counts,
    Decision,
    Problem,
    changed,
    check_fraction,
    make_problem,
)


def weights(
    params: Any,
    layers: Sequence[Layer],
    *,
    budget: float,
    cost: Callable[[Mapping[str, int]], float] | None = None,
    scores: Any = None,
    prunable: trees.Prunable = None,
    floor: float = 0.02,
    choices: int = 256,
) -> Problem:
    """Makes the problem of how many single weights each leaf keeps.

    Args:
        params: dense arrays.
        layers: from `find_layers`; there is one decision for each layer that is pruned.
        budget: the share of the dense cost that may be spent, in (0, 1].
        cost: function from a dict of path -> number of kept weights to a number, such as
            `weight_macs(layers)`. Default: the number of kept weights of these leaves.
        scores: tree like `params`; in each leaf the weights with the largest scores are kept. They
            should be comparable between leaves for `ranking` and `knapsack`. Default: magnitudes.
        prunable: which leaves are pruned, see `trees.prunable_flags`.
        floor: smallest density of a leaf, in [0, 1].
        choices: number of densities of a leaf, evenly spaced from `floor` to 1.

    Returns:
        The `Problem`.

    Raises:
        ValueError: as for `channels`, or if no layer is pruned.

    Example:
        >>> from jaxprune.search import find_layers
        >>> w = {"w": jnp.ones((10, 10))}
        >>> layers = find_layers(lambda w, x: x @ w["w"], w, jnp.ones((1, 10)))
        >>> problem = weights(w, layers, budget=0.2)
        >>> problem.dense, problem.budget, problem.floors
        (100.0, 20.0, (2,))
    """
    trees.check_known("params", params, "search.weights")
    check_fraction("floor", floor)
    if not isinstance(choices, int) or choices < 2:
        raise ValueError(f"`choices` must be an integer of at least 2, but is {choices!r}.")
    leaves = trees.leaf_by_path(params)
    flags = dict(zip(leaves, trees.prunable_flags(params, prunable), strict=True))
    if scores is not None:
        trees.check_same_structure("scores", scores, params)
    worth = leaves if scores is None else trees.leaf_by_path(scores)
    _check_layers(layers, leaves)
    decisions, ranks = [], {}
    for layer in layers:
        if not flags[layer.path]:
            continue
        own = np.abs(np.asarray(worth[layer.path], np.float64)).reshape(-1)
        if scores is not None:
            own = np.asarray(worth[layer.path], np.float64).reshape(-1)
        order = np.argsort(-own, kind="stable")
        spaced = np.linspace(max(1, round(floor * own.size)), own.size, choices)
        widths = np.unique(np.round(spaced).astype(int))
        decisions.append(Decision(layer.path, own.size, widths, order, own[order], (layer,)))
        rank = np.empty(own.size, np.int32)
        rank[order] = np.arange(own.size, dtype=np.int32)
        ranks[layer.path] = rank.reshape(np.shape(leaves[layer.path]))
    if not decisions:
        raise ValueError("`layers` must have at least one leaf that is pruned; see `prunable`.")
    names = [own.name for own in decisions]

    def account(counts: Counts) -> float:
        kept = dict(zip(names, counts, strict=True))
        return float(sum(counts)) if cost is None else cost(kept)

    def masks_of(counts: Counts) -> Any:
        kept = dict(zip(names, counts, strict=True))
        return jax.tree.unflatten(
            jax.tree.structure(params),
            [
                jnp.asarray(
                    ranks[path] < kept[path] if path in kept else np.ones(np.shape(x), bool)
                )
                for path, x in leaves.items()
            ],
        )

    on_device = {path: jnp.asarray(rank) for path, rank in ranks.items()}

    def masked(variables: Any, counts: Any) -> Any:
        kept = {path: on_device[path] < counts[index] for index, path in enumerate(names)}
        return changed(variables, lambda path, x: jnp.where(kept[path], x, 0), kept)

    return make_problem(decisions, account, budget, params, masked, masks_of, None, cliques=())


def weight_macs(layers: Sequence[Layer]) -> Callable[[Mapping[str, int]], float]:
    """Makes the cost of `weights` that counts multiply-accumulates with kept weights.

    Args:
        layers: from `find_layers`.

    Returns:
        A function from path -> number of kept weights to the sum over all layers; a layer that the
        dict does not name is dense.

    Example:
        >>> layers = Layer("a", 4, 4, 1, weights=16, macs=160), Layer("b", 4, 1, 1, 4, macs=40)
        >>> weight_macs(layers)({"a": 4})
        80.0
    """

    def cost(kept: Mapping[str, int]) -> float:
        return float(
            sum(own.macs * kept.get(own.path, own.weights) / own.weights for own in layers)
        )

    return cost


def _check_layers(layers: Sequence[Layer], leaves: Mapping[str, Any]) -> None:
    """Raises unless all layers belong to the variables."""
    trees.raise_for(
        [own.path for own in layers if own.path not in leaves],
        "`layers` must come from `find_layers` of the same function; these are no leaves:",
    )
