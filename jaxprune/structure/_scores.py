"""What each channel of a group is worth."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune import trees
from jaxprune.structure._groups import Group, Groups, Member

Scores = Mapping[str, np.ndarray]


def filter_norms(groups: Groups, variables: Any, order: float = 1) -> dict[str, np.ndarray]:
    """The norm of each channel's filters, summed over all layers that make the channel.

    Filters are what is contracted, looked up, or met along two dimensions: no norm layers, biases
    or running averages, whatever their names and shapes.

    Args:
        groups: from `find_groups`.
        variables: dense.
        order: 1, 2 or `numpy.inf`.

    Returns:
        Name of a group -> float64 [channels]. A group without filters is left out, with a warning.

    Raises:
        ValueError: no group has any.

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

    def norm(rows: np.ndarray) -> np.ndarray:
        return np.linalg.norm(rows, ord=order, axis=1)

    return _summed(groups, variables, norm, "filters", _filters)


def norm_scales(groups: Groups, variables: Any) -> dict[str, np.ndarray]:
    """The size of the norm layers' scales, summed over the norms of each channel.

    Scales are vectors that are proven to multiply a channel entry by entry, whatever their names.

    Args:
        groups: from `find_groups`.
        variables: dense.

    Returns:
        Name of a group -> float64 [channels]. A group without a norm layer is left out, with a
        warning; what `keep_global` and its like are given no scores of stays whole.

    Raises:
        ValueError: no group has one.

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
    return _summed(groups, variables, lambda rows: np.abs(rows).sum(1), "norm layers", _scales)


def taylor(groups: Groups, variables: Any, gradients: Any) -> dict[str, np.ndarray]:
    """What the loss would change by, to first order, if a channel were 0: `(sum of w g) ** 2`.

    Taken at the norm layers behind a channel, scales and biases, or where it has none, at its
    filters.

    Args:
        groups: from `find_groups`.
        variables: dense.
        gradients: of the loss, a tree like `variables`; an average over batches is better.

    Returns:
        Name of a group -> float64 [channels]. A group with neither is left out, with a warning.

    Raises:
        ValueError: `gradients` do not fit the variables, or no group has either.

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
    trees.check_same_structure("gradients", gradients, variables)

    def product(weight: Any, gradient: Any) -> np.ndarray:
        return np.asarray(weight, float) * np.asarray(gradient, float)

    products = jax.tree.map(product, variables, gradients)
    sums = _summed(groups, products, lambda rows: rows.sum(1), "norm layers or filters", _switches)
    return {name: own**2 for name, own in sums.items()}


def fpgm(groups: Groups, variables: Any) -> dict[str, np.ndarray]:
    """How far a filter is from all others of its layer; one near the middle can be replaced.

    Args:
        groups: from `find_groups`.
        variables: dense.

    Returns:
        Name of a group -> float64 [channels]: sums of Euclidean distances. A group without filters
        is left out, with a warning.

    Raises:
        ValueError: no group has any.

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

    def distances(rows: np.ndarray) -> np.ndarray:
        squares = (rows**2).sum(1)
        between = squares[:, None] + squares[None] - 2 * rows @ rows.T
        return np.sqrt(between.clip(0)).sum(1)

    return _summed(groups, variables, distances, "filters", _filters)


def normalized(scores: Scores) -> dict[str, np.ndarray]:
    """Scores over the mean of their group, so that groups can be compared.

    Args:
        scores: name of a group -> [channels].

    Returns:
        The same; a group of zeros stays zeros.

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
    """A number for each channel: the sum of what is measured of its rows in some members.

    Zeros would say that a group without such members is worth nothing, so it gets no scores.
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
        trees.raise_for(missing, f"`groups` must have {what} to be scored by; use another score:")
    if missing:
        warnings.warn(
            "\n  ".join(["groups without scores stay whole; use another score for:", *missing]),
            stacklevel=3,
        )
    return sums


def _filters(group: Group) -> tuple[Member, ...]:
    return group.filters


def _scales(group: Group) -> tuple[Member, ...]:
    return group.scales


def _switches(group: Group) -> tuple[Member, ...]:
    return group.norms or group.filters
