"""Says what a search decides: how much each group of channels, or each leaf, keeps."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import structure, trees
from jaxprune.search._layers import Layer
from jaxprune.search._pricing import quick_cost

# The number of units that each decision keeps, in the order of `Problem.decisions`
Counts = tuple[int, ...]


class Decision(NamedTuple):
    """One number that a search chooses: how many units of a group or a leaf are kept.

    Example:
        >>> Decision("in:1", 16, np.array([8, 16]), np.arange(16), np.arange(16.0), ()).floor
        8
    """

    name: str  # of a group of channels, or the path of a leaf
    size: int  # number of its units: channels or weights
    widths: np.ndarray  # int [choices], ascending: numbers of units that may be kept, `size` last
    order: np.ndarray  # int [size]: the units, the most important one first
    scores: np.ndarray  # float [size] of the units in this order, comparable between decisions
    layers: tuple[Layer, ...]  # layers that read the channels, in the order of use

    @property
    def floor(self) -> int:
        """The least number of units that may be kept."""
        return int(self.widths[0])

    def at_least(self, fraction: float) -> int:
        """Returns the smallest allowed number of units that is not below a fraction of them."""
        wanted = min(max(round(fraction * self.size), self.floor), self.size)
        return int(self.widths[np.searchsorted(self.widths, wanted)])


class Problem(NamedTuple):
    """What a search decides and may spend, from `channels` or `weights`.

    Example:
        >>> Problem._fields[:3]
        ('decisions', 'budget', 'dense')
    """

    decisions: tuple[Decision, ...]
    budget: float  # the largest cost of a candidate
    dense: float  # the cost of keeping everything
    cost: Callable[[Counts], float]  # quick, for the search
    account: Callable[[Counts], float]  # as the user's function counts, for the result
    variables: Any  # the dense tree
    # (variables, int32 [decisions]) -> variables with zeros; can be traced and mapped by `vmap`
    masked: Callable[[Any, Any], Any]
    outcome: Callable[[Counts], Any]  # -> the `structure.Plan`, or the tree of masks
    # Counts -> variables whose kernels are fitted to what is kept; None uses those of `variables`
    refit: Callable[[Counts], Any] | None = None

    @property
    def floors(self) -> Counts:
        """The least that every decision may keep."""
        return tuple(own.floor for own in self.decisions)

    @property
    def sizes(self) -> Counts:
        """Everything."""
        return tuple(own.size for own in self.decisions)

    def fits(self, counts: Counts) -> bool:
        """Tells whether counts cost no more than the budget."""
        return self.cost(counts) <= self.budget


def channels(
    groups: structure.Groups,
    variables: Any,
    layers: Sequence[Layer],
    *,
    cost: Callable[[structure.Plan], float],
    budget: float,
    scores: Mapping[str, Any] | None = None,
    floor: float = 0.2,
    multiple: int | None = None,
    refit: Callable[[Any, structure.Plan], Any] | None = None,
) -> Problem:
    """Makes the problem of how many channels each group keeps.

    There is one decision for each group, so all layers on a residual stream decide together. The
    decisions follow the order in which `layers` read the groups, as an episode of AMC does.

    Args:
        groups: from `structure.find_groups`.
        variables: dense arrays.
        layers: from `find_layers`.
        cost: function from a plan to a number, such as `structure.mac_cost(...)`,
            `structure.count_parameters`, `structure.byte_cost(...)` or `Latencies.cost`. It must
            not fall when more is kept.
        budget: the share of the dense cost that may be spent, in (0, 1].
        scores: group name -> float [channels]: in each group the channels with the largest scores
            are kept. Groups without scores are kept whole. Default: the L1 norms of filters,
            normalized in each group.
        floor: smallest fraction of a group that is kept, in [0, 1]; 0.2 as published.
        multiple: widths are multiples of this. Default: `Group.multiple` of each group.
        refit: function `(variables, plan) -> variables` that fits the kernels of a candidate to
            what it keeps, such as `lambda variables, plan: reconstruct(variables, plan, inputs)`.

    Returns:
        The `Problem`.

    Raises:
        ValueError: if there are no groups, `variables` belong to a different model, a number is
            out of range, scores do not fit, or the floors alone cost more than the budget; the
            error says the least possible budget.

    References:
        He et al., AMC: AutoML for model compression and acceleration on mobile devices,
        arXiv:1802.03494.

    Example:
        >>> from jaxprune.search import find_layers
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w = {"in": jnp.ones((3, 16)), "out": jnp.ones((16, 2))}
        >>> groups = structure.find_groups(mlp, w, jnp.ones((1, 3)))
        >>> layers = find_layers(mlp, w, jnp.ones((1, 3)))
        >>> problem = channels(groups, w, layers, cost=structure.count_parameters, budget=0.5)
        >>> problem.dense, problem.budget, problem.decisions[0].widths.tolist()
        (80, 40.0, [8, 16])
    """
    _check_channels(groups, variables, floor, multiple)
    if scores is None:
        scores = structure.normalized(structure.filter_norms(groups, variables))
    scores = {name: np.asarray(own, np.float64) for name, own in scores.items()}
    structure.keep_global(groups, scores, 1.0)  # raises unless scores fit their groups
    decisions = []
    for name, own in scores.items():
        group = groups[name]
        order = np.argsort(-own, kind="stable")
        step = group.multiple if multiple is None else multiple
        widths = _widths(group.size, max(1, round(floor * group.size)), step)
        readers = _readers(group, layers)
        decisions.append(Decision(name, group.size, widths, order, own[order], readers))
    place = {layer.path: index for index, layer in enumerate(layers)}
    last = len(place)
    decisions.sort(key=lambda own: min([place[x.path] for x in own.layers], default=last))

    def plan_of(counts: Counts) -> structure.Plan:
        keep = {}
        for own, count in zip(decisions, counts, strict=True):
            keep[own.name] = np.zeros(own.size, bool)
            keep[own.name][own.order[:count]] = True
        return groups.plan(keep, multiple=1)

    parts = _parts(groups, decisions)
    fit = refit
    return make_problem(
        decisions,
        lambda counts: cost(plan_of(counts)),
        budget,
        variables,
        lambda variables, counts: _mask_channels(variables, counts, parts),
        plan_of,
        None if fit is None else lambda counts: fit(variables, plan_of(counts)),
        cliques=_cliques(groups, decisions),
    )


def make_problem(
    decisions: Sequence[Decision],
    account: Callable[[Counts], float],
    budget: float,
    variables: Any,
    masked: Callable[[Any, Any], Any],
    outcome: Callable[[Counts], Any],
    refit: Callable[[Counts], Any] | None,
    *,
    cliques: Sequence[tuple[int, ...]],
) -> Problem:
    """Prices the problem, and refuses a budget that no candidate fits."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
        raise ValueError(
            f"`budget` must be a share of the dense cost, in (0, 1], but is {budget!r}."
        )
    cost = quick_cost(account, [own.widths for own in decisions], cliques)
    sizes = tuple(own.size for own in decisions)
    least, dense = account(tuple(own.floor for own in decisions)), account(sizes)
    if not np.isfinite([least, dense]).all() or not 0 < dense:
        raise ValueError(f"`cost` must be a positive number, but is {dense} for the dense network.")
    if least > budget * dense:
        raise ValueError(
            f"`budget` {budget:g} is below {least / dense:.4g}, the least possible share: what the "
            "floors keep costs as much. Raise it, or lower `floor` or `multiple`."
        )
    limit = budget * dense
    if math.isclose(limit, round(limit), rel_tol=1e-12):  # a share that was computed from a count
        limit = float(round(limit))
    return Problem(tuple(decisions), limit, dense, cost, account, variables, masked, outcome, refit)


def _widths(size: int, least: int, step: int) -> np.ndarray:
    """Returns the multiples of `step` from `least` on, and the whole."""
    return np.array([*range(-(-least // step) * step, size, step), size])


def _readers(group: structure.Group, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Returns the layers that read the channels of a group, or else those that produce them."""
    reads = {member.path for member in group.members if not member.produces}
    makes = {member.path for member in group.members}
    depthwise = {own.path for own in layers if own.groups > 1} & makes
    found = [own for own in layers if own.path in reads | depthwise]
    return tuple(found or [own for own in layers if own.path in makes])


def _cliques(
    groups: structure.Groups, decisions: Sequence[Decision]
) -> tuple[tuple[int, ...], ...]:
    """Returns the decisions that share a leaf, for each leaf: their costs multiply."""
    by_leaf: dict[str, set[int]] = {}
    for index, own in enumerate(decisions):
        for member in groups[own.name].members:
            by_leaf.setdefault(member.path, set()).add(index)
    return tuple(dict.fromkeys(tuple(sorted(own)) for own in by_leaf.values()))


# Path of a leaf -> its dimensions that shrink, with the decision and the rank of each index there;
# an index that belongs to no channel has rank -1 and is always kept.
Parts = Mapping[str, Sequence[tuple[int, int, np.ndarray]]]


def _parts(groups: structure.Groups, decisions: Sequence[Decision]) -> Parts:
    """Returns which leaves are set to zero, as `Plan.mask` does."""
    model, parts = groups.model, {}
    for index, own in enumerate(decisions):
        rank = np.empty(own.size + 1, np.int32)
        rank[own.order], rank[-1] = np.arange(own.size), -1
        for member in groups[own.name].members:
            if member.path in model.parameters or member.path in model.caches:
                part = member.dimension, index, rank[member.channels]
                parts.setdefault(member.path, []).append(part)
    return parts


def _mask_channels(variables: Any, counts: Any, parts: Parts) -> Any:
    """Sets channels to zero; counts are data, so that one program serves all candidates."""

    def zeroed(path: str, leaf: Any) -> Any:
        for dimension, index, rank in parts[path]:
            shape = [-1 if d == dimension else 1 for d in range(jnp.ndim(leaf))]
            kept = (jnp.asarray(rank) < counts[index]).reshape(shape)
            leaf = jnp.where(kept, leaf, jnp.zeros_like(leaf))
        return leaf

    return changed(variables, zeroed, parts)


def changed(variables: Any, change: Callable[[str, Any], Any], paths: Mapping[str, Any]) -> Any:
    """Changes the leaves at some paths of a tree."""
    leaves = trees.leaf_by_path(variables)
    new = [change(path, leaf) if path in paths else leaf for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(variables), new)


def _check_channels(
    groups: structure.Groups, variables: Any, floor: float, multiple: int | None
) -> None:
    """Raises unless the arguments of `channels` fit together."""
    trees.check_known("variables", variables, "search.channels")
    if not groups:
        reasons = [f"{own.path} dimension {own.dimension}: {own.reason}" for own in groups.frozen]
        trees.raise_for(
            reasons[:9] or ["there are no dimensions"],
            "`groups` must have at least one group of channels, but every dimension is kept whole:",
        )
    leaves, shapes = trees.leaf_by_path(variables), groups.model.shapes
    trees.raise_for(
        [
            f"{path}: {trees.shape_of(leaves[path]) if path in leaves else 'missing'}, not {shape}"
            for path, shape in shapes.items()
            if path not in leaves or trees.shape_of(leaves[path]) != shape
        ],
        "`groups` must be those of `variables`, but belong to a different model; find them with "
        "`structure.find_groups(function, variables, ...)`. These leaves differ:",
    )
    check_fraction("floor", floor)
    if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
        raise ValueError(f"`multiple` must be an integer of at least 1, but is {multiple!r}.")


def check_fraction(name: str, value: float) -> None:
    """Raises unless a number is a fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be a fraction in [0, 1], but is {value!r}.")
