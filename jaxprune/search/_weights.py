"""The problem of single weights: which density each leaf has."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import stacks, trees
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
    stacked: trees.Stacked = None,
    floor: float = 0.02,
    choices: int = 256,
) -> Problem:
    """Makes the problem of how many single weights each leaf keeps.

    Args:
        params: dense arrays.
        layers: from `find_layers`; there is one decision for each layer that is pruned, or for each
            copy in a stack of layers.
        budget: the share of the dense cost that may be spent, in (0, 1].
        cost: function from a dict of path -> number of kept weights to a number, such as
            `weight_macs(layers)`. Default: the number of kept weights of these leaves.
        scores: tree like `params`; in each leaf the weights with the largest scores are kept. They
            should be comparable between leaves for `ranking` and `knapsack`. Default: magnitudes.
        prunable: which leaves are pruned, see `trees.prunable_flags`.
        stacked: function `(path, leaf) -> axes` that says which axes number copies of a layer, as
            those of `jaxprune.stacks`. Each copy is a decision of its own, named `path[copy]`.
        floor: smallest density of a decision, in [0, 1].
        choices: number of densities of a decision, evenly spaced from `floor` to 1.

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
    axes = stacks.axes_of(params, stacked)
    decisions: list[Decision] = []
    parts: dict[str, _Part] = {}
    for layer in layers:
        if not flags[layer.path]:
            continue
        own = np.asarray(worth[layer.path], np.float64)
        rows = trees.copies_of(np.abs(own) if scores is None else own, axes[layer.path])
        rows = rows.reshape(len(rows), -1)
        copies, size = rows.shape
        order = np.argsort(-rows, axis=1, kind="stable")
        spaced = np.linspace(max(1, round(floor * size)), size, choices)
        widths = np.unique(np.round(spaced).astype(int))
        rank = np.empty(rows.shape, np.int32)
        np.put_along_axis(rank, order, np.arange(size, dtype=np.int32)[None], axis=1)
        rank = _unrows(rank, own.shape, axes[layer.path])
        parts[layer.path] = _Part(len(decisions), copies, axes[layer.path], rank)
        single = layer._replace(weights=layer.weights // copies, macs=layer.macs // copies)
        names = trees.copy_paths(layer.path, own.shape, axes[layer.path])
        for index, name in enumerate(names):
            ordered = rows[index][order[index]]
            decisions.append(Decision(name, size, widths, order[index], ordered, (single,)))
    if not decisions:
        raise ValueError("`layers` must have at least one leaf that is pruned; see `prunable`.")

    def account(counts: Counts) -> float:
        kept = {path: sum(counts[own.places]) for path, own in parts.items()}
        return float(sum(counts)) if cost is None else cost(kept)

    def masks_of(counts: Counts) -> Any:
        masks = [
            jnp.asarray(parts[path].keep(counts) if path in parts else np.ones(np.shape(x), bool))
            for path, x in leaves.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(params), masks)

    on_device = {path: own._replace(rank=jnp.asarray(own.rank)) for path, own in parts.items()}

    def masked(variables: Any, counts: Any) -> Any:
        def zeroed(path: str, leaf: Any) -> Any:
            return jnp.where(on_device[path].keep(counts), leaf, 0)

        return changed(variables, zeroed, on_device)

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


class _Part(NamedTuple):
    """The decisions of a leaf."""

    first: int  # its first decision
    copies: int  # the number of its decisions
    axes: tuple[int, ...]  # that number the copies
    rank: Any  # int32, shape of the leaf: the place of each weight in its copy, 0 is kept longest

    @property
    def places(self) -> slice:
        """Its decisions."""
        return slice(self.first, self.first + self.copies)

    def keep(self, counts: Any) -> Any:
        """Returns the mask of the leaf."""
        shape = [own if axis in self.axes else 1 for axis, own in enumerate(self.rank.shape)]
        own = counts[self.places]
        return self.rank < (np.array(own) if isinstance(own, tuple) else own).reshape(shape)


def _unrows(rows: np.ndarray, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
    """Returns a leaf from the rows of its copies."""
    rest = [own for axis, own in enumerate(shape) if axis not in axes]
    first = rows.reshape(*(shape[axis] for axis in axes), *rest)
    return np.moveaxis(first, range(len(axes)), axes)


def _check_layers(layers: Sequence[Layer], leaves: Mapping[str, Any]) -> None:
    """Raises unless all layers belong to the variables."""
    trees.raise_for(
        [own.path for own in layers if own.path not in leaves],
        "`layers` must come from `find_layers` of the same function; these are no leaves:",
    )
