"""Scores the channels of each group; a higher score means that the channel matters more."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune import trees
from jaxprune.structure._groups import Group, Groups, Member

Scores = Mapping[str, np.ndarray]


def filter_norms(groups: Groups, variables: Any, order: float = 1) -> dict[str, np.ndarray]:
    """Scores channels by the norm of their filters, summed over all layers that produce them.

    Filters are leaves that are contracted, looked up, or used along two dimensions. Norm layers,
    biases and running averages are none, whatever their names and shapes.

    Args:
        groups: from `find_groups`.
        variables: dense arrays.
        order: of the norm: 1, 2 or `numpy.inf`.

    Returns:
        Group name -> float64 [channels]. A group without filters is left out, with a warning.

    Raises:
        ValueError: if no group has filters.

    References:
        Li et al., Pruning filters for efficient ConvNets, arXiv:1608.08710.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> w = {"in": jnp.array([[1.0, -2.0], [0.0, 3.0]]), "out": jnp.ones((2, 2))}
        >>> groups = find_groups(lambda w, x: (x @ w["in"]) @ w["out"], w, jnp.ones((1, 2)))
        >>> filter_norms(groups, w)["in:1"].tolist()
        [1.0, 5.0]
    """
    trees.check_known("variables", variables, "structure.filter_norms")

    def norm(rows: np.ndarray) -> np.ndarray:
        return np.linalg.norm(rows, ord=order, axis=1)

    return _summed(groups, variables, norm, "filters", _filters)


def norm_scales(groups: Groups, variables: Any) -> dict[str, np.ndarray]:
    """Scores channels by the magnitude of the norm layers' scales, summed over the norm layers.

    Scales are vectors that are proven to multiply a channel entry by entry, whatever their names.

    Args:
        groups: from `find_groups`.
        variables: dense arrays.

    Returns:
        Group name -> float64 [channels]. A group without a norm layer is left out, with a warning;
        `keep_global` and its relatives keep groups without scores whole.

    Raises:
        ValueError: if no group has a norm layer.

    References:
        Liu et al., Learning efficient convolutional networks through network slimming,
        arXiv:1708.06519.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> w = {"in": jnp.ones((2, 2)), "gamma": jnp.array([3.0, -4.0]), "out": jnp.ones((2, 2))}
        >>> def apply(w, x):
        ...     return ((x @ w["in"]) * w["gamma"][None]) @ w["out"]
        >>> norm_scales(find_groups(apply, w, jnp.ones((1, 2))), w)["in:1"].tolist()
        [3.0, 4.0]
    """
    trees.check_known("variables", variables, "structure.norm_scales")
    return _summed(groups, variables, lambda rows: np.abs(rows).sum(1), "norm layers", _scales)


def taylor(groups: Groups, variables: Any, gradients: Any) -> dict[str, np.ndarray]:
    """Scores channels by the squared first-order change of the loss if zeroed: `(sum of w g) ** 2`.

    The sum runs over the scales and biases of the norm layers behind a channel or, if it has none,
    over its filters. `jaxprune.scores.taylor` is the score of single weights.

    Args:
        groups: from `find_groups`.
        variables: dense arrays.
        gradients: gradients of the loss, a tree like `variables`; an average over batches is less
            noisy.

    Returns:
        Group name -> float64 [channels]. A group with neither is left out, with a warning.

    Raises:
        ValueError: if `gradients` do not fit the variables, or no group has norm layers or filters.

    References:
        Molchanov et al., Importance estimation for neural network pruning, arXiv:1906.10771.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> w = {"in": jnp.array([[1.0, -2.0], [0.0, 3.0]]), "out": jnp.ones((2, 2))}
        >>> groups = find_groups(lambda w, x: (x @ w["in"]) @ w["out"], w, jnp.ones((1, 2)))
        >>> taylor(groups, w, w)["in:1"].tolist()
        [1.0, 169.0]
    """
    trees.check_known("variables", variables, "structure.taylor")
    trees.check_known("gradients", gradients, "structure.taylor")
    trees.check_same_structure("gradients", gradients, variables)

    def product(weight: Any, gradient: Any) -> np.ndarray:
        return np.asarray(weight, float) * np.asarray(gradient, float)

    products = jax.tree.map(product, variables, gradients)
    sums = _summed(groups, products, lambda rows: rows.sum(1), "norm layers or filters", _switches)
    return {name: own**2 for name, own in sums.items()}


def fpgm(groups: Groups, variables: Any) -> dict[str, np.ndarray]:
    """Scores channels by the distance of their filters from all others of the layer.

    A filter near the geometric median is redundant: the others can replace it.

    Args:
        groups: from `find_groups`.
        variables: dense arrays.

    Returns:
        Group name -> float64 [channels]: sums of Euclidean distances. A group without filters is
        left out, with a warning.

    Raises:
        ValueError: if no group has filters.

    References:
        He et al., Filter pruning via geometric median, arXiv:1811.00250.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> w = {"in": jnp.array([[0.0, 1.0, 3.0]]), "out": jnp.ones((3, 2))}
        >>> groups = find_groups(lambda w, x: (x @ w["in"]) @ w["out"], w, jnp.ones((1, 1)))
        >>> fpgm(groups, w)["in:1"].tolist()
        [4.0, 3.0, 5.0]
    """
    trees.check_known("variables", variables, "structure.fpgm")

    def distances(rows: np.ndarray) -> np.ndarray:
        squares = (rows**2).sum(1)
        between = squares[:, None] + squares[None] - 2 * rows @ rows.T
        return np.sqrt(between.clip(0)).sum(1)

    return _summed(groups, variables, distances, "filters", _filters)


def normalized(scores: Scores) -> dict[str, np.ndarray]:
    """Divides scores by the mean magnitude in their group, so that groups can be compared.

    Args:
        scores: group name -> float [channels].

    Returns:
        The same mapping, normalized; scores that are all 0 remain 0.

    Example:
        >>> normalized({"a": np.array([1.0, 3.0])})["a"].tolist()
        [0.5, 1.5]
    """
    return {name: own / (np.abs(own).mean() or 1.0) for name, own in scores.items()}


def _summed(
    groups: Groups,
    variables: Any,
    measure: Callable[[np.ndarray], np.ndarray],
    what: str,
    members_of: Callable[[Group], tuple[Member, ...]],
) -> dict[str, np.ndarray]:
    """Sums `measure` of each channel's rows over the members that `members_of` chooses.

    A group without such members gets no scores: zeros would mean that it is worth nothing.
    """
    leaves = trees.leaf_by_path(variables)
    sums = {}
    for name, group in groups.items():
        members = members_of(group)
        if members:
            sums[name] = np.zeros(group.size)
        for member in members:
            array = np.moveaxis(np.asarray(leaves[member.path], float), member.dimension, 0)
            ours = member.channels >= 0
            measured = measure(array.reshape(len(array), -1)[ours])
            np.add.at(sums[name], member.channels[ours], measured)
    missing = [f"{name}: no {what}" for name in groups if name not in sums]
    if not sums:
        trees.raise_for(missing, f"`groups` must have {what} for this score; use a different one:")
    if missing:
        warnings.warn(
            "\n  ".join(
                ["groups without scores are kept whole; use a different score for:", *missing]
            ),
            stacklevel=3,
        )
    return sums


def _filters(group: Group) -> tuple[Member, ...]:
    return group.filters


def _scales(group: Group) -> tuple[Member, ...]:
    return group.scales


def _switches(group: Group) -> tuple[Member, ...]:
    return group.norms or group.filters
