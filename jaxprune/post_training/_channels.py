"""Scores of whole channels from calibration data."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxprune import trees
from jaxprune.post_training._inputs import Apply, input_statistics, squared_norms
from jaxprune.post_training._matrices import from_matrices, to_matrices
from jaxprune.structure import Groups

__all__ = ["channel_scores"]


def channel_scores(
    apply: Apply, variables: Any, batches: Iterable[Any], groups: Groups
) -> dict[str, np.ndarray]:
    """Scores channels by what they contribute to the layers that read them.

    The score is the sum of `W_ji ** 2 * ||X_j||^2` over the weights of all kernels that read the
    channel, where `||X_j||^2` is the squared norm of input feature `j` over the calibration data:
    how much the outputs of these layers change if the channel is removed and features do not
    correlate. It is the square of Wanda's score, summed. Heads, MLP channels, channels of
    convolutions and residual streams are scored alike, also in stacked layers.

    Args:
        apply: function `(variables, batch) -> anything`, in inference mode.
        variables: tree of arrays.
        batches: iterable of batches, each a second argument of `apply`.
        groups: from `structure.find_groups`.

    Returns:
        Group name -> float64 [channels], for `groups.plan` and the functions of `structure` that
        take scores. `structure.normalized` makes groups comparable.

    Raises:
        ValueError: if a kernel that reads a group is used in a way that `input_statistics` does
            not know, if inputs are not finite, or if there is no batch.

    References:
        Sun et al., A simple and effective pruning approach for large language models (the score of
        a weight), arXiv:2306.11695.
        Muralidharan et al., Compact language models via pruning and knowledge distillation,
        arXiv:2407.14679, rank channels by the size of their activations.

    Example:
        >>> from jaxprune import structure
        >>> w = {"in": jnp.eye(2), "out": jnp.array([[1.0, 1.0], [0.0, 2.0]])}
        >>> def apply(w, x):
        ...     return (x @ w["in"]) @ w["out"]
        >>> batch = jnp.array([[3.0, 1.0]])
        >>> groups = structure.find_groups(apply, w, batch)
        >>> channel_scores(apply, w, [batch], groups)["in:1"].tolist()
        [18.0, 4.0]
    """
    leaves = trees.leaf_by_path(variables)
    readers = [
        (name, member)
        for name, group in groups.items()
        for member in group.members
        if not member.produces and np.ndim(leaves[member.path]) >= 2
    ]
    paths = {member.path for _, member in readers}
    found = input_statistics(
        apply,
        variables,
        batches,
        statistic=squared_norms,
        prunable=lambda path, _: path in paths,
    )
    energies = {path: _energy(leaves[path], inputs) for path, inputs in found.items()}
    scores = {name: np.zeros(groups[name].size) for name, _ in readers}
    for name, member in readers:
        rows = np.moveaxis(energies[member.path], member.dimension, 0)
        ours = member.channels >= 0
        own = rows.reshape(len(rows), -1)[ours].sum(1)
        np.add.at(scores[name], member.channels[ours], own)
    return scores


def _energy(kernel: Any, inputs: Any) -> np.ndarray:
    """Returns the squared product of each weight and the norm of its input, like the kernel."""
    weights = to_matrices(np.asarray(kernel, np.float64), inputs.arrangement)
    norms = np.asarray(inputs.value, np.float64)[:, :, None]
    return from_matrices(weights**2 * norms, inputs.arrangement)
