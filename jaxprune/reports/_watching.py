"""Measures the masks of a run while it trains, as plain numbers for any writer of metrics."""

from typing import Any

import numpy as np

from jaxprune import masks, trees

_TOTAL = "total"


def pruning_metrics(
    params: Any, opt_state: Any, *, before: Any = None, axis: int = -1
) -> dict[str, float]:
    """Measures what pruning does to each layer, as a flat dict for any writer of metrics.

    Call it between steps, for example after mask updates, and give the result to TensorBoard,
    Weights & Biases, MLflow or CLU: names are slash-separated, values are Python floats. It runs on
    the host and copies one array at a time. Inside `jit`, `masks.sparsities` gives the first entry.

    Args:
        params: tree of arrays.
        opt_state: state of an optimizer that contains a pruning transformation, or masks.
        before: masks of an earlier moment, such as those of the call before.
        axis: the axis of the outputs of a kernel. The last one, as in Flax; 0 in Equinox.

    Returns:
        For each pruned leaf and, but for `survivors`, over all of them (`total`):

        * `sparsity/PATH`: fraction of masked weights.
        * `dead/PATH`: fraction of outputs that keep no weight.
        * `survivors/PATH`: root mean square of the kept weights; 0 if there are none.
        * `churn/PATH`: fraction of the weights kept before that are masked now. Only with `before`.
        * `regrown/PATH`: fraction of the weights kept now that were masked. Only with `before`.

    Raises:
        ValueError: inside `jit`; if the masks do not fit the parameters or `before`.

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
    leaves = trees.leaf_by_path(params)
    pruned = [path for path in leaves if np.ndim(flags[path])]
    results: dict[str, float] = {}
    sizes, kept, outputs, dead = (dict[str, int]() for _ in range(4))
    for path in pruned:
        mask = np.asarray(flags[path], bool)
        sizes[path], kept[path] = mask.size, int(mask.sum())
        own = mask.any(tuple(i for i in range(mask.ndim) if i != axis % mask.ndim))
        outputs[path], dead[path] = own.size, int(own.size - own.sum())
        results[f"sparsity/{path}"] = 1 - kept[path] / max(1, mask.size)
        results[f"dead/{path}"] = dead[path] / max(1, own.size)
        values = np.where(mask, np.asarray(leaves[path], np.float64), 0)
        results[f"survivors/{path}"] = float(np.sqrt((values**2).sum() / max(1, kept[path])))
    total = sum(sizes.values())
    results[f"sparsity/{_TOTAL}"] = (total - sum(kept.values())) / max(1, total)
    results[f"dead/{_TOTAL}"] = sum(dead.values()) / max(1, sum(outputs.values()))
    if before is not None:
        gone, back = masks.overlap(before, now), masks.overlap(now, before)
        for name, own in (("churn", gone), ("regrown", back)):
            results |= {f"{name}/{path}": 1 - own.leaves.get(path, 1.0) for path in pruned}
            results[f"{name}/{_TOTAL}"] = 1 - own.total
    return results
