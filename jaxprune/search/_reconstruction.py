"""Fits the kernels that read removed channels to the outputs of the dense network."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import post_training, structure, trees

Inputs = Mapping[str, post_training.InputStatistics]


def find_inputs(
    apply: Callable[[Any, Any], Any],
    variables: Any,
    batches: Iterable[Any],
    groups: structure.Groups,
) -> Inputs:
    """Sums `X^T X` over calibration data for the inputs X of every kernel that reads a group.

    Args:
        apply: function `(variables, batch) -> anything`, in inference mode.
        variables: dense arrays.
        batches: iterable of batches, each a second argument of `apply`. AMC takes 3,000 images.
        groups: from `structure.find_groups`.

    Returns:
        Path of a kernel -> its `post_training.InputStatistics`, for `reconstruct`.

    Raises:
        ValueError: as for `post_training.input_statistics`, such as where a kernel is used in a way
            that it does not know.

    Example:
        >>> w = {"in": jnp.ones((2, 8)), "out": jnp.ones((8, 3))}
        >>> apply = lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> groups = structure.find_groups(apply, w, jnp.ones((1, 2)))
        >>> [*find_inputs(apply, w, [jnp.ones((5, 2))], groups)]
        ['out']
    """
    leaves = trees.leaf_by_path(variables)
    readers = {
        member.path
        for group in groups.values()
        for member in group.members
        if not member.produces and np.ndim(leaves[member.path]) >= 2
    }
    return post_training.input_statistics(
        apply, variables, batches, prunable=lambda path, _: path in readers
    )


def reconstruct(
    variables: Any, plan: structure.Plan, inputs: Inputs, *, damping: float = 1e-6
) -> Any:
    """Fits every kernel whose inputs a plan removes to its dense outputs, by least squares.

    With the inputs X of the dense network, K the input features that are kept and W the kernel:

        W'[K] = argmin || X W - X[:, K] W'[K] ||^2
              = (G[K, K] + damping * mean(diag G[K, K]) * I)^-1 G[K, :] W,    G = X^T X

    and W' is 0 elsewhere. Dense layers, convolutions of any size and stacked layers are fitted
    alike: for a convolution, X holds patches. There is no intercept, and all layers are fitted to
    dense inputs, as published.

    Args:
        variables: dense arrays.
        plan: which channels are kept.
        inputs: from `find_inputs`.
        damping: relative to the mean of the diagonal; it makes inputs solvable that are always 0 or
            copies of each other. Few data need more, or the fit holds for them alone: 1e-2 for a
            hundred images.

    Returns:
        The variables at dense shapes with new kernels; compact or mask them by the plan.

    Raises:
        ValueError: if `damping` is negative, `inputs` are of different kernels, or a kernel of them
            cannot be solved.

    References:
        He, Zhang, Sun. Channel pruning for accelerating very deep neural networks,
        arXiv:1707.06168. He et al., AMC, arXiv:1802.03494, whose code fits 1x1 convolutions only.

    Example:
        >>> w = {"in": jnp.ones((2, 8)), "out": jnp.arange(8.0)[:, None]}
        >>> apply = lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> groups = structure.find_groups(apply, w, jnp.ones((1, 2)))
        >>> plan = groups.plan({"in:1": jnp.arange(8) < 2})  # its channels are copies
        >>> inputs = find_inputs(apply, w, [jnp.ones((5, 2))], groups)
        >>> reconstruct(w, plan, inputs)["out"][:3, 0].round(2).tolist()
        [14.0, 14.0, 0.0]
    """
    if not damping >= 0:
        raise ValueError(f"`damping` must be at least 0, but is {damping}.")
    leaves = trees.leaf_by_path(variables)
    trees.raise_for(
        [
            f"{path}: {own.arrangement.shape}, not {trees.shape_of(leaves.get(path, ()))}"
            for path, own in inputs.items()
            if path not in leaves or trees.shape_of(leaves[path]) != own.arrangement.shape
        ],
        "`inputs` must be those of `variables`, from `find_inputs`:",
    )
    new, unsolved = dict(leaves), []
    for path, own in inputs.items():
        kept = _kept_features(plan, path, own)
        if kept is None or kept.all():
            continue
        kernel = np.asarray(leaves[path], np.float64)
        matrices = post_training.to_matrices(kernel, own.arrangement)
        grams = np.asarray(own.value, np.float64)
        try:
            fitted = [_fit(*each, damping) for each in zip(grams, matrices, kept, strict=True)]
        except np.linalg.LinAlgError as error:
            unsolved.append(f"{path}: {error}")
            continue
        kernel = post_training.from_matrices(np.stack(fitted), own.arrangement)
        new[path] = _like(kernel, leaves[path])
    trees.raise_for(unsolved, "`inputs` must be solvable; raise `damping`, or add data. Not:")
    return jax.tree.unflatten(jax.tree.structure(variables), list(new.values()))


def _kept_features(
    plan: structure.Plan, path: str, inputs: post_training.InputStatistics
) -> np.ndarray | None:
    """Tells which input features are kept, bool [groups, features]; None if an axis has two roles.

    Removed outputs stay as they are, and so do depthwise kernels: they have one input each.
    """
    layout = inputs.arrangement.layout
    if isinstance(layout, str):
        return None
    kept = np.ones(inputs.arrangement.shape, bool)
    for axis in layout.inputs:
        shape = [-1 if own == axis else 1 for own in range(kept.ndim)]
        kept &= plan.kept[path][axis].reshape(shape)
    return post_training.to_matrices(kept, inputs.arrangement)[:, :, 0]


def _fit(gram: np.ndarray, kernel: np.ndarray, kept: np.ndarray, damping: float) -> np.ndarray:
    """Fits one matrix [features, outputs] in float64, with the Gram matrix [features, features]."""
    new = np.zeros_like(kernel)
    if kept.any():
        own = gram[np.ix_(kept, kept)]
        scale = np.diag(own).mean() or 1.0  # inputs that are always 0 need no weights
        own = own + damping * scale * np.eye(len(own))
        new[kept] = np.linalg.solve(own, gram[kept] @ kernel)
    return new


def _like(array: np.ndarray, leaf: Any) -> Any:
    """Returns an array of the type and at the place of a leaf."""
    array = array.astype(leaf.dtype)
    is_placed = isinstance(leaf, jax.Array) and leaf.committed
    return jax.device_put(array, leaf.sharding) if is_placed else jnp.asarray(array)
