"""What each channel of a group is worth."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune import trees
from jaxprune.structure._groups import Groups

Scores = Mapping[str, np.ndarray]


def filter_norms(groups: Groups, variables: Any, order: float = 1) -> dict[str, np.ndarray]:
    """The norm of each channel's filters, summed over all layers that make the channel.

    Args:
        groups: from `find_groups`.
        variables: dense.
        order: 1, 2 or `numpy.inf`.

    Returns:
        Name of a group -> float64 [channels].

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

    return _summed(groups, variables, norm, _is_filter)


def norm_scales(groups: Groups, variables: Any) -> dict[str, np.ndarray]:
    """The size of the norm layers' scales, summed over the norms of each channel.

    Args:
        groups: from `find_groups`.
        variables: dense.

    Returns:
        Name of a group -> float64 [channels]; 0 for a group without a norm layer.

    References:
        Liu et al., Learning efficient convolutional networks through network slimming,
        arXiv:1708.06519.

    Example:
        >>> norm_scales(Groups(None, [], [], {}), {})
        {}
    """
    return _summed(groups, variables, lambda rows: np.abs(rows).sum(1), _is_scale)


def taylor(groups: Groups, variables: Any, gradients: Any) -> dict[str, np.ndarray]:
    """What the loss would change by, to first order, if a channel were 0: `(sum of w g) ** 2`.

    Taken at the norm layers behind a channel, its gate, or where it has none, at its filters.

    Args:
        groups: from `find_groups`.
        variables: dense.
        gradients: of the loss, a tree like `variables`; an average over batches is better.

    Returns:
        Name of a group -> float64 [channels].

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
    gates = _summed(groups, products, lambda rows: rows.sum(1), _is_gate)
    filters = _summed(groups, products, lambda rows: rows.sum(1), _is_filter)
    has_gate = {
        name: any(_is_gate(groups, member) for member in group.members)
        for name, group in groups.items()
    }
    return {name: (gates if has_gate[name] else filters)[name] ** 2 for name in groups}


def fpgm(groups: Groups, variables: Any) -> dict[str, np.ndarray]:
    """How far a filter is from all others of its layer; one near the middle can be replaced.

    Args:
        groups: from `find_groups`.
        variables: dense.

    Returns:
        Name of a group -> float64 [channels]: sums of Euclidean distances.

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

    return _summed(groups, variables, distances, _is_filter)


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
    counts: Callable[[Groups, Any], bool],
) -> dict[str, np.ndarray]:
    """A number for each channel: the sum of what is measured of its rows in all members."""
    leaves = trees.leaf_by_path(variables)
    sums = {}
    for name, group in groups.items():
        sums[name] = np.zeros(group.size)
        for member in group.members:
            if counts(groups, member):
                array = np.moveaxis(np.asarray(leaves[member.path], float), member.dimension, 0)
                ours = member.channels >= 0
                measured = measure(array.reshape(len(array), -1)[ours])
                np.add.at(sums[name], member.channels[ours], measured)
    return sums


def _is_filter(groups: Groups, member: Any) -> bool:
    return member.produces and len(groups.model.shapes[member.path]) > 1


def _is_gate(groups: Groups, member: Any) -> bool:
    """A scale of a norm layer, or the bias beside one."""
    folder = member.path.rpartition("/")[0]
    return member.produces and f"{folder}/scale" in groups.model.shapes


def _is_scale(groups: Groups, member: Any) -> bool:
    return member.produces and member.path.rpartition("/")[2] == "scale"
