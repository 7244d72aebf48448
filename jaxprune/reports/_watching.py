"""Measures the masks of a run while it trains, as plain numbers for any writer of metrics."""

from typing import Any, NamedTuple

import numpy as np

from jaxprune import masks, stacks, trees

_TOTAL = "total"
_ALWAYS = ("sparsity", "dead")  # of which there is a total even if nothing is pruned
_BEFORE = "`before` must hold masks of `params`, but does not:"


def pruning_metrics(
    params: Any,
    opt_state: Any,
    *,
    before: Any = None,
    axis: int = -1,
    stacked: trees.Stacked = None,
) -> dict[str, float]:
    """Measures what pruning does to each layer, as a flat dict for any writer of metrics.

    Call it between steps, for example after mask updates, and give the result to TensorBoard,
    Weights & Biases, MLflow or CLU: names are slash-separated, values are Python floats. It runs on
    the host and copies one array at a time. Inside `jit`, `masks.sparsities` gives the first entry.

    Args:
        params: tree of arrays.
        opt_state: state of an optimizer that contains a pruning transformation, or masks.
        before: masks of an earlier moment, such as those of the call before.
        axis: the axis of the outputs of a kernel. The last one, as in Flax; 0 in Equinox. In a
            stack it is the axis of a single layer.
        stacked: function `(path, leaf) -> axes` that number copies of a layer, see
            `jaxprune.stacks`. Each copy has numbers of its own, such as `dead/layers/kernel[3]`.

    Returns:
        For each pruned leaf and, but for `survivors`, over all of them (`total`):

        * `sparsity/PATH`: fraction of masked weights.
        * `dead/PATH`: fraction of outputs that keep no weight.
        * `survivors/PATH`: root mean square of the kept weights; 0 if there are none.
        * `churn/PATH`: fraction of the weights kept before that are masked now. Only with `before`.
        * `regrown/PATH`: fraction of the weights kept now that were masked. Only with `before`.

    Raises:
        ValueError: inside `jit`; if the masks do not fit the parameters or `before`, or `stacked`
            matches nothing.

    Example:
        >>> params = {"kernel": np.array([[3.0, 0.0], [4.0, 0.0]])}
        >>> mask = {"kernel": np.array([[True, False], [True, False]])}
        >>> for name, value in pruning_metrics(params, mask).items():
        ...     print(f"{name} {value:.2f}")
        sparsity/kernel 0.50
        dead/kernel 0.50
        survivors/kernel 3.54
        sparsity/total 0.50
        dead/total 0.50
    """
    trees.check_known("params", params, "reports.pruning_metrics")
    now = masks.get_masks(opt_state) if trees.state_fields(opt_state, "masks") else opt_state
    trees.check_known("masks", now, "reports.pruning_metrics")
    flags = masks.fitting(now, params, "the masks must fit `params`, but do not:")
    leaves, axes = trees.leaf_by_path(params), stacks.axes_of(params, stacked)
    pruned = {path: leaf for path, leaf in leaves.items() if np.ndim(flags[path])}
    layers: list[_Layer] = []
    earlier = None if before is None else masks.fitting(before, params, _BEFORE)
    for path, leaf in pruned.items():
        shape = np.shape(leaf)
        own = [np.asarray(flags[path], bool), np.asarray(leaf, np.float64)]
        if earlier is not None:
            own.append(np.broadcast_to(np.asarray(earlier[path], bool), shape))
        copies = [trees.copies_of(array, axes[path]) for array in own]
        names = trees.copy_paths(path, shape, axes[path])
        layers += [_layer(*row, axis=axis) for row in zip(names, *copies, strict=True)]
    results = {name: value for layer in layers for name, value in layer.numbers.items()}
    for name in dict.fromkeys(name for layer in layers for name in layer.counts) or _ALWAYS:
        part, whole = (sum(own.counts[name][end] for own in layers) for end in (0, 1))
        results[f"{name}/{_TOTAL}"] = part / max(1, whole)
    return results


class _Layer(NamedTuple):
    """What is known of one layer."""

    numbers: dict[str, float]  # by name with the path
    counts: dict[str, tuple[int, int]]  # name -> how many, and of how many, for the totals


def _layer(
    path: str, mask: np.ndarray, values: np.ndarray, before: np.ndarray | None = None, *, axis: int
) -> _Layer:
    """Measures one layer."""
    kept, others = int(mask.sum()), tuple(i for i in range(mask.ndim) if i != axis % mask.ndim)
    alive = mask.any(others)
    counts = {
        "sparsity": (mask.size - kept, mask.size),
        "dead": (int(alive.size - alive.sum()), alive.size),
    }
    if before is not None:
        counts["churn"] = int((before & ~mask).sum()), int(before.sum())
        counts["regrown"] = int((mask & ~before).sum()), kept
    numbers = {f"{name}/{path}": part / max(1, whole) for name, (part, whole) in counts.items()}
    squares = float((np.where(mask, values, 0) ** 2).sum())
    return _Layer(numbers | {f"survivors/{path}": (squares / max(1, kept)) ** 0.5}, counts)
