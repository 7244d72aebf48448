"""Checks whether the masks of an optimizer state hold for parameters, and suggests fixes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import masks, processes, stacks, trees

__all__ = ["Finding", "Report", "check"]

_NO_MASK = (
    "The state belongs to a different model or to a part of this one. Initialise the optimizer "
    "with these parameters, or check only the part that it sees."
)
_NOT_BOOL = (
    "A wrapper around the pruning transformation computes with its state, for example an average "
    "of states. Put pruning inside the wrapper, last in the chain of the inner optimizer."
)
_NOT_ZERO = (
    "Put the pruning transformation last in the chain, and nothing around it that changes updates "
    "or parameters (averages, look-ahead, schedule-free). For parameters that come from elsewhere, "
    "such as an average, call `jaxprune.apply_masks(params, jaxprune.get_masks(opt_state))`."
)
_NOT_FINITE = (
    "No mask update is made while a weight is not finite (`refused` in the state counts them). Go "
    "on from a checkpoint before it with a lower learning rate, clip gradients, or skip steps with "
    "`optax.apply_if_finite`. Masked weights alone become 0 again by `jaxprune.apply_masks(params, "
    "jaxprune.get_masks(opt_state))`."
)
_NOTHING_KEPT = (
    "Lower `sparsity`, give a budget with a larger floor, such as `budgets.global_budget(0.5)` or "
    "`budgets.uniform`, or exclude the leaf with `prunable`."
)
_EMPTY_COPIES = (
    "Give the transformation `stacked=` (`jaxprune.stacks`), so that each copy has a separate "
    "budget and floor."
)
_EMPTY_ROWS = (
    "A row that is never used has no gradient and is pruned first. Exclude the embedding with "
    "`prunable`, or rank it by `scores.magnitude`."
)
_NEVER_MOVED = (
    "Its gradient has always been 0, so nothing is known about its weights: it is frozen, behind "
    "a factor that starts at 0, or never used. Exclude it with `prunable`, or start pruning "
    "(`start=`) only after it has moved."
)


class Finding(NamedTuple):
    """A problem of one leaf, and its fix.

    Example:
        >>> Finding("head/kernel", "keeps nothing", "Lower `sparsity`.").path
        'head/kernel'
    """

    path: str
    problem: str
    fix: str


class Report(NamedTuple):
    """The findings of `check`; `str()` has a line for each finding, and each fix once.

    Example:
        >>> print(Report(findings=(), leaves=2, weights=768, pruned=576))
        masks hold: 576 of 768 weights in 2 leaves are pruned
    """

    findings: tuple[Finding, ...]
    leaves: int  # number of leaves with a mask
    weights: int  # number of weights in these leaves
    pruned: int  # number of pruned weights among them

    @property
    def ok(self) -> bool:
        """True if there are no findings."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Returns plain Python values, ready for `json.dumps`."""
        findings = [finding._asdict() for finding in self.findings]
        return self._asdict() | {"ok": self.ok, "findings": findings}

    def __str__(self) -> str:
        counts = f"{self.pruned:,} of {self.weights:,} weights in {self.leaves} leaves are pruned"
        if self.ok:
            return f"masks hold: {counts}"
        lines = [f"{len(self.findings)} findings; {counts}"]
        for fix in dict.fromkeys(finding.fix for finding in self.findings):
            own = [finding for finding in self.findings if finding.fix == fix]
            lines += [f"  {finding.path}: {finding.problem}" for finding in own]
            lines.append(f"    {fix}")
        return "\n".join(lines)


def check(params: Any, opt_state: Any, *, stacked: trees.Stacked = None) -> Report:
    """Checks whether the masks in an optimizer state hold for parameters, and what is wrong if not.

    For each leaf it reports masked weights that are not 0; weights that are not finite; a mask that
    has a different shape, is no longer bool, or is missing although the default rule would prune
    the leaf; a leaf, a copy in a stack or a row of an embedding that keeps nothing; and a leaf,
    copy or row whose AGIP average is 0 throughout although steps were made.

    The check runs on the host, between steps, and copies one array at a time to the host. If there
    are several processes, all of them must call it.

    Args:
        params: tree of arrays, on any devices: the trained parameters, or an average of them.
        opt_state: state of any Optax optimizer that contains a pruning transformation.
        stacked: function `(path, leaf) -> axes`, the axes that number copies of a layer, see
            `jaxprune.stacks`.

    Returns:
        A `Report`: print it, or read `ok` and `findings`.

    Raises:
        ValueError: inside `jit`; if the state contains no pruning transformation, or `stacked`
            matches no leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxprune
        >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
        >>> pruned, masks = jaxprune.prune(params, 0.5)
        >>> state = jaxprune.fixed_mask_transform(masks).init(params)
        >>> check(pruned, state).ok
        True
        >>> check(params, state).findings[0].problem
        '2 of 2 masked weights are not 0'
    """
    trees.check_known("params", params, "check")
    trees.check_known("opt_state", opt_state, "check")
    held = masks.get_masks(opt_state)
    by_path, axes = trees.spread(held, params), stacks.axes_of(params, stacked)
    reasons = trees.reasons(params, axes)
    problems = [line.split(": ", 1) for line in trees.unmatched(by_path, trees.places(params))]
    # Leaves that the default rule does not prune, such as norm state and biases, need no mask.
    findings = [Finding(path, text, _NO_MASK) for path, text in problems if not reasons.get(path)]
    leaves = weights = pruned = 0
    for path, leaf in trees.leaf_by_path(params).items():
        mask: Any = by_path.get(path)
        if not trees.is_array(leaf) or not trees.is_array(mask) or mask.shape == ():
            continue
        if mask.shape != leaf.shape:
            problem = f"its mask has shape {mask.shape}, the leaf {leaf.shape}"
            findings.append(Finding(path, problem, _NO_MASK))
            continue
        kept = processes.on_host(mask) != 0
        leaves, weights = leaves + 1, weights + kept.size
        pruned += kept.size - int(np.count_nonzero(kept))
        findings += _zeros(path, leaf, kept) + _emptied(path, kept, axes[path])
    findings += _no_bools(opt_state) + _never_moved(opt_state, axes)
    return Report(tuple(findings), leaves, weights, pruned)


def _no_bools(opt_state: Any) -> list[Finding]:
    """Finds masks in the state that are no longer bool; `get_masks` would convert them."""
    return [
        Finding(path, f"its mask has dtype {jnp.result_type(mask)}", _NOT_BOOL)
        for tree in trees.state_fields(opt_state, "masks")
        for path, mask in trees.leaves_with_paths(tree)
        if jnp.result_type(mask) != jnp.bool_
    ]


def _zeros(path: str, leaf: Any, kept: np.ndarray) -> list[Finding]:
    """Finds masked weights that are not 0, and weights that are not finite."""
    with np.errstate(invalid="ignore"):  # NumPy warns of signalling NaN
        values = processes.on_host(leaf)
        finite = np.isfinite(values)
        lost = int(np.count_nonzero((values != 0) & finite & ~kept))
    total = kept.size - int(np.count_nonzero(kept))
    findings = []
    if lost:
        problem = f"{lost:,} of {total:,} masked weights are not 0"
        findings.append(Finding(path, problem, _NOT_ZERO))
    if not finite.all():
        masked = int(np.count_nonzero(~finite & ~kept))
        problem = f"{finite.size - np.count_nonzero(finite):,} weights are not finite"
        problem += f", {masked:,} of them masked" if masked else ""
        findings.append(Finding(path, problem, _NOT_FINITE))
    return findings


def _emptied(path: str, kept: np.ndarray, axes: tuple[int, ...]) -> list[Finding]:
    """Finds a leaf, copies or rows that keep nothing."""
    if not kept.any():
        return [Finding(path, "keeps nothing", _NOTHING_KEPT)] if kept.size else []
    findings = []
    if copies := _empty_copies(kept, axes):
        findings.append(Finding(path, f"{copies} nothing is kept", _EMPTY_COPIES))
    if rows := _empty_rows(path, kept, axes):
        findings.append(Finding(path, f"{rows:,} rows keep nothing", _EMPTY_ROWS))
    return findings


def _never_moved(opt_state: Any, axes: dict[str, tuple[int, ...]]) -> list[Finding]:
    """Finds leaves, copies or rows whose average is still 0 although steps were made."""
    findings = []
    for state in jax.tree.leaves(opt_state, is_leaf=_has_average):
        if not _has_average(state) or not any(map(np.any, jax.tree.leaves(state.prune_step))):
            continue
        for path, average in trees.leaf_by_path(state.gradient_average).items():
            moved, own = processes.on_host(average) != 0, axes.get(path, ())
            if not moved.any():
                findings.append(Finding(path, "its average is 0 throughout", _NEVER_MOVED))
                continue
            if copies := _empty_copies(moved, own):
                findings.append(Finding(path, f"{copies} the average is 0", _NEVER_MOVED))
            if rows := _empty_rows(path, moved, own):
                problem = f"{rows:,} rows were never used: their average is 0"
                findings.append(Finding(path, problem, _EMPTY_ROWS))
    return findings


def _has_average(node: Any) -> bool:
    """Returns whether a node of an optimizer state is the state of AGIP on weights."""
    return "gradient_average" in getattr(node, "_fields", ())


def _empty_copies(bits: np.ndarray, axes: tuple[int, ...]) -> str:
    """Names the copies in a stack in which all bits are False; an empty text if there are none."""
    if not axes:
        return ""
    empty = np.argwhere(~bits.any(axis=_others(bits, axes))).tolist()
    names = [",".join(map(str, copy)) for copy in empty]
    return f"copies {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}:" if names else ""


def _empty_rows(path: str, bits: np.ndarray, axes: tuple[int, ...]) -> int:
    """Counts the rows of an embedding in which all bits are False; 0 for any other leaf."""
    # Flax, Haiku and Equinox all store `[entries, features]` in a module named after "embed".
    others = _others(bits, axes)
    if len(others) != 2 or "embed" not in "/".join(path.lower().split("/")[-2:]):
        return 0
    return int(np.count_nonzero(~bits.any(axis=others[1])))


def _others(bits: np.ndarray, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes within one copy."""
    return tuple(axis for axis in range(bits.ndim) if axis not in axes)
