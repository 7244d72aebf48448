"""Masks beside parameters: read them from an optimizer state, apply them, make them in one call."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune import budgets, scores, selection, trees

__all__ = ["apply_masks", "get_masks", "prune"]


def get_masks(opt_state: Any) -> Any:
    """Reads the masks from an optimizer state, wherever the pruning transformation sits.

    Args:
        opt_state: state of any Optax optimizer that contains a pruning transformation: in a
            chain, behind `optax.MultiSteps`, `optax.masked`, `optax.partition`, or the
            `opt_state` of an `nnx.Optimizer`.

    Returns:
        Tree of bools like the parameters, True where a weight is kept. A leaf that no pruning
        transformation sees has the scalar mask True.

    Raises:
        ValueError: if there is no pruning transformation in the state.

    Example:
        >>> import jaxprune
        >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        >>> optimizer = optax.chain(optax.sgd(0.1), jaxprune.agip_transform(0.5, stop=10))
        >>> masks = jaxprune.get_masks(optimizer.init(params))
        >>> masks["kernel"].tolist()
        [[True, True], [True, True]]
    """
    found = trees.state_fields(opt_state, "masks")
    if not found:
        raise ValueError(
            "`opt_state` holds no masks: it is the state of an optimizer without a pruning "
            f"transformation (type {type(opt_state).__name__}). Add one, for example "
            "`jaxprune.chain(optimizer, jaxprune.agip_transform(...))`."
        )
    return jax.tree.map(_merge, *found, is_leaf=_is_masked_node)


def apply_masks(tree: Any, masks: Any) -> Any:
    """Sets everything that is masked to zero.

    Args:
        tree: parameters, or any tree with the same paths: gradients, momentum, an average of
            the parameters.
        masks: tree of bools, True where a weight is kept. Each mask has the shape of its leaf
            or is a scalar.

    Returns:
        Tree like `tree`, with the same dtypes.

    Raises:
        ValueError: if paths or shapes differ.

    Example:
        >>> apply_masks([jnp.array([1.0, 2.0])], [jnp.array([True, False])])[0].tolist()
        [1.0, 0.0]
    """
    by_path, leaf_of = trees.leaf_by_path(masks), trees.leaf_by_path(tree)
    named, paths = leaf_of.items(), leaf_of.keys()
    problems = [f"{path}: no mask" for path, _ in named if path not in by_path]
    problems += [f"{path}: a mask without a leaf" for path in by_path if path not in paths]
    problems += [
        f"{path}: shape {jnp.shape(leaf)}, but mask {jnp.shape(by_path[path])}"
        for path, leaf in named
        if path in by_path and jnp.shape(by_path[path]) not in ((), jnp.shape(leaf))
    ]
    trees.raise_for(problems, "`masks` must have the paths and shapes of `tree`:")
    leaves = [jnp.where(by_path[path], leaf, jnp.zeros_like(leaf)) for path, leaf in named]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def prune(
    params: Any,
    sparsity: float,
    *,
    score: scores.Score = scores.magnitude,
    statistics: Any = None,
    budget: budgets.BudgetRule | None = None,
    prunable: trees.Prunable = None,
) -> tuple[Any, Any]:
    """Prunes once, without training.

    Args:
        params: tree of arrays.
        sparsity: fraction of the prunable weights to set to zero, in [0, 1).
        score: function `(params, statistics) -> scores`; the largest are kept.
        statistics: tree like `params` for scores that need one: gradients or their averages.
        budget: function `(shapes, sparsity) -> Budget`; None is one global ranking in which
            each leaf keeps at least a tenth of its uniform budget.
        prunable: which leaves are pruned, see `trees.prunable_flags`.

    Returns:
        The pruned parameters and the masks, a tree of bools like `params`.

    Raises:
        ValueError: if `sparsity` is outside [0, 1), or nothing can be pruned.

    Example:
        >>> import jaxprune
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [2.0, 0.5]]), "bias": jnp.ones(2)}
        >>> pruned, masks = jaxprune.prune(params, 0.5)
        >>> pruned["kernel"].tolist()
        [[3.0, 0.0], [2.0, 0.0]]
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"`sparsity` must lie in [0, 1), but is {sparsity!r}.")
    flags = trees.prunable_flags(params, prunable)
    weights = trees.pick(params, flags)
    if statistics is not None:
        trees.check_same_structure("statistics", statistics, params)
        statistics = trees.pick(statistics, flags)
    rule = budgets.global_budget() if budget is None else budget
    total, floors = rule([weight.shape for weight in weights], sparsity)
    selected = _largest(score(weights, statistics), total, floors=jnp.array(floors, jnp.int32))
    everything = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), params)
    masks = trees.put(everything, flags, selected)
    return apply_masks(params, masks), masks


# Outside of `jit` its loops would be compiled anew at every call.
_largest = jax.jit(selection.largest)


def _is_masked_node(node: Any) -> bool:
    """What `optax.masked` and `optax.partition` put in place of a leaf they do not see."""
    return isinstance(node, optax.MaskedNode)


def _merge(*masks: Any) -> Any:
    """The mask of a leaf from the one transformation that sees it."""
    seen = [mask for mask in masks if not _is_masked_node(mask)]
    if not seen:
        return jnp.array(True)
    merged = seen[0]
    for mask in seen[1:]:
        merged = merged & mask
    return merged
