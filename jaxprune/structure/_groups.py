"""Groups of channels that shrink together, found from the traces of a function."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.structure._analysis import Analysis
from jaxprune.structure._nodes import FROZEN, Nodes
from jaxprune.structure._plans import Plan
from jaxprune.structure._traces import (
    Model,
    Trace,
    Traced,
    analyze,
    broken_caches,
    trace_function,
)
from jaxprune.structure._values import Graph, Split

# Parts of the path of a leaf that is state: it shrinks with the parameters but is never masked.
_STATE = {"batch_stats", "mean", "var", "count", "key", "rngs"}
_WHOLE = "all its indices are one unit: it could only go as a whole"
_CHOICES = 8  # passes over all traces in which factors of splits may still be tried


class Member(NamedTuple):
    """A dimension of a leaf that shrinks with a group.

    Example:
        >>> Member("conv/kernel", 3, np.arange(8), True).dimension
        3
    """

    path: str
    dimension: int
    channels: np.ndarray  # int [size]: which channel of the group each index is; -1: of none
    produces: bool  # an output of a layer, not an input


class Group(NamedTuple):
    """Channels that can be removed, one by one, from all members at once.

    Example:
        >>> Group("conv/kernel:3", 8, (), ()).exact
        True
    """

    name: str
    size: int
    members: tuple[Member, ...]
    # Why zeroing producers alone is not the same as removing; empty if it is.
    reasons: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether zeroing what produces a channel is as good as removing it."""
        return not self.reasons


class Frozen(NamedTuple):
    """A dimension that keeps its size, and why.

    Example:
        >>> Frozen("head/kernel", 1, "output").reason
        'output'
    """

    path: str
    dimension: int
    reason: str


class Groups(Mapping[str, Group]):
    """The groups of a function by name, and the reasons for everything that is in none.

    Example:
        >>> def mlp(variables, x):
        ...     return jax.nn.relu(x @ variables["in"]) @ variables["out"]
        >>> variables = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
        >>> groups = find_groups(mlp, variables, jnp.ones((1, 3)))
        >>> [(group.name, group.size) for group in groups.values()]
        [('in:1', 8)]
    """

    def __init__(
        self,
        model: Model,
        groups: Sequence[Group],
        frozen: Sequence[Frozen],
        unknown: Mapping[str, int],
    ) -> None:
        """Made by `find_groups`."""
        self.model = model
        self.frozen = tuple(frozen)
        self.unknown = dict(unknown)  # primitive -> how often it froze something
        self._groups = {group.name: group for group in groups}

    def __getitem__(self, name: str) -> Group:
        """The group of that name."""
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the leaves."""
        return iter(self._groups)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._groups)

    def plan(self, keep: Mapping[str, Any], *, multiple: int | None = None) -> Plan:
        """Decides which channels stay; groups without a name here stay whole.

        Args:
            keep: name of a group -> bools, one for each channel.
            multiple: the number of kept channels is rounded up to a multiple of this, with the
                first of those that were to go. Default 8 on accelerators, 1 on CPU.

        Returns:
            The `Plan`.

        Raises:
            ValueError: a name is not that of a group, or an array has another length or type or
                keeps nothing. Lists all of them.
        """
        if multiple is None:
            multiple = 1 if jax.default_backend() == "cpu" else 8
        shapes, problems = self.model.shapes, []
        kept = {path: [np.ones(size, bool) for size in shape] for path, shape in shapes.items()}
        for name, wanted in keep.items():
            channels = np.asarray(wanted)
            if name not in self:
                problems.append(f"{name}: not a group; groups are {', '.join(self) or 'none'}")
            elif channels.dtype != bool or channels.shape != (self[name].size,):
                expected = f"bool[{self[name].size}]"
                problems.append(f"{name}: {channels.dtype}{list(channels.shape)}, not {expected}")
            elif not channels.any():
                problems.append(f"{name}: keeps nothing; keep at least one channel")
            else:
                channels = rounded_up(channels, multiple)
                for member in self[name].members:
                    stays = np.where(member.channels >= 0, channels[member.channels], True)
                    kept[member.path][member.dimension] &= stays
        trees.raise_for(problems, "`keep` must hold bools for the channels of groups:")
        return Plan(self.model, kept)

    def __str__(self) -> str:
        """What shrinks together, and why the rest does not."""
        lines = []
        for group in self.values():
            note = "" if group.exact else " (exact only if inputs are zeroed too)"
            lines.append(f"{group.name}: {group.size} channels{note}")
            for member in group.members:
                role = "out" if member.produces else "in"
                shape = "x".join(map(str, self.model.shapes[member.path]))
                lines.append(f"    {role:3} {member.path} [{shape}] dimension {member.dimension}")
        lines += ["frozen:"] * bool(self.frozen)
        lines += [f"    {f.path} dimension {f.dimension}: {f.reason}" for f in self.frozen]
        return "\n".join(lines)


def rounded_up(kept: np.ndarray, multiple: int) -> np.ndarray:
    """Keeps a multiple, or all: the first of those that were to go come back."""
    target = min(len(kept), -(-int(kept.sum()) // multiple) * multiple)
    kept = kept.copy()
    kept[np.flatnonzero(~kept)[: target - int(kept.sum())]] = True
    return kept


def find_groups(
    function: Callable[..., Any] | Sequence[Trace],
    variables: Any,
    *args: Any,
    updates: Callable[[Any], Any] | None = None,
    parameters: Callable[[str, Any], bool] | None = None,
    caches: Callable[[str, Any], bool] | None = None,
) -> Groups:
    """Finds which dimensions of a function's variables can shrink, and which shrink together.

    Nothing runs: the function is traced, and every index of every dimension is followed through its
    operations. An operation that is not understood freezes what it touches.

    Args:
        function: `function(variables, *args)` of any framework; or a list of `Trace` for all
            ways in which the variables will be used, such as evaluation and training.
        variables: tree of arrays or `jax.ShapeDtypeStruct`: parameters and other state.
        *args: arrays or `jax.ShapeDtypeStruct`; batch sizes may be others later.
        updates: see `Trace`.
        parameters: `(path, leaf) -> bool`: what a mask may set to zero. Default floating-point
            leaves that are no caches and whose path has no part such as `batch_stats`, `mean`
            or `var`.
        caches: `(path, leaf) -> bool`: state that is 0 before it is first written, such as keys and
            values of earlier tokens. Default leaves with `cache` in a part of their path.

    Returns:
        The groups.

    Raises:
        ValueError: if `updates` returns something that is not in the variables.

    Example:
        >>> def mlp(variables, x):
        ...     return jax.nn.relu(x @ variables["in"]) @ variables["out"]
        >>> variables = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
        >>> group = find_groups(mlp, variables, jnp.ones((1, 3)))["in:1"]
        >>> [(member.path, member.dimension, member.produces) for member in group.members]
        [('in', 1, True), ('out', 0, False)]
    """
    traces = [Trace(function, args, updates)] if callable(function) else list(function)
    leaves = trees.leaf_by_path(variables)
    is_cache = _is_cache if caches is None else caches
    is_parameter = _is_parameter if parameters is None else parameters
    names = {path for path, leaf in leaves.items() if is_parameter(path, leaf)}
    model = Model(
        {path: tuple(jnp.shape(leaf)) for path, leaf in leaves.items()},
        frozenset(names),
        caches=frozenset(path for path in leaves.keys() - names if is_cache(path, leaves[path])),
    )
    traced = [trace_function(trace, variables) for trace in traces]
    tried: dict[Split, int] = {}
    passes: list[tuple[Traced, Analysis, Graph]] = []
    refined, number = None, 0
    while refined != model:
        model = model if refined is None else refined
        passes = [(each, *analyze(model, each)) for each in traced]
        refined = _refine(model, passes, tried, choose=number < _CHOICES)
        number += 1
    return _join(model, [analysis for _, analysis, _ in passes])


def _refine(
    model: Model,
    passes: Sequence[tuple[Traced, Analysis, Graph]],
    tried: dict[Split, int],
    choose: bool,
) -> Model:
    """What a pass over all traces taught: what consumes, which caches do not stay 0, and, if it may
    `choose`, another factor of each split whose factor was frozen (`tried` counts them)."""
    consumers: set[tuple[int, int]] = set()
    producers: set[tuple[int, int]] = set()
    broken: set[str] = set()
    factors = dict(model.factors)
    for traced, analysis, graph in passes:
        consumers |= analysis.consumers
        producers |= analysis.producers
        broken |= broken_caches(model, traced, analysis, graph)
    for split in {split for _, analysis, _ in passes for split in analysis.splits}:
        chosen = factors.get(split, 0)
        frozen = any(
            analysis.nodes.is_frozen(nodes).all()
            for _, analysis, _ in passes
            for nodes in analysis.splits.get(split, ())
        )
        if choose and frozen and tried.get(split, 0) < len(split.sizes):
            tried[split] = tried.get(split, 0) + 1
            factors[split] = (chosen + 1) % len(split.sizes)
    return model._replace(
        consumers=frozenset(consumers - producers),
        caches=model.caches - broken,
        factors=tuple(sorted(factors.items())),
    )


def _join(model: Model, analyses: Sequence[Analysis]) -> Groups:
    """One set of groups for all traces."""
    # Leaves come first and roots are least: the root of an index of a leaf is one of a leaf.
    count = 1 + sum(size for shape in model.shapes.values() for size in shape if size > 1)
    joined, own = Nodes(), np.arange(count)
    joined.new(count - 1)
    for analysis in analyses:
        joined.unite(own, analysis.root(own))
    unused = set(range(len(model.shapes))) - set().union(*[a.used for a in analyses])
    for index in unused:  # another function may use it, and would not know
        for nodes in analyses[0].leaves[index].nodes:
            joined.unite(nodes, np.full_like(nodes, FROZEN))

    dimensions: list[tuple[int, int, np.ndarray]] = []
    for index, leaf in enumerate(analyses[0].leaves):
        for dimension, nodes in enumerate(leaf.nodes):
            if len(nodes) > 1:
                dimensions.append((index, dimension, joined.root(nodes)))
    where: dict[int, list[int]] = {}  # root -> positions in `dimensions`
    for at, (_, _, roots) in enumerate(dimensions):
        for root in np.unique(roots):
            if root != FROZEN:
                where.setdefault(int(root), []).append(at)
    classes: dict[tuple[int, ...], list[int]] = {}
    for root, places in where.items():
        classes.setdefault(tuple(places), []).append(root)

    paths = list(model.shapes)
    inexact: dict[int, set[str]] = {}
    for analysis in analyses:
        for nodes, reason in analysis.inexact:
            roots = analysis.root(nodes)
            for root in np.unique(joined.root(roots[roots < count])):
                inexact.setdefault(int(root), set()).add(reason)
    groups: list[Group] = []
    names: set[str] = set()
    grouped: set[int] = set()
    for places, roots in classes.items():
        if len(roots) < 2:  # one channel alone can never go
            continue
        roots = np.array(sorted(roots))
        members = []
        for at in places:
            index, dimension, own_roots = dimensions[at]
            channels = np.searchsorted(roots, own_roots).clip(0, len(roots) - 1)
            channels = np.where(roots[channels] == own_roots, channels, -1)
            produces = (
                paths[index] in model.parameters and (index, dimension) not in model.consumers
            )
            members.append(Member(paths[index], dimension, channels, produces))
            grouped.add(at)
        name = _name(members, model, names)
        names.add(name)
        reasons = sorted(set().union(*[inexact.get(int(root), set()) for root in roots]))
        groups.append(Group(name, len(roots), tuple(members), tuple(reasons)))

    reasons_of = _reasons(dimensions, analyses, unused)
    frozen = [
        Frozen(paths[index], dimension, reasons_of.get((index, dimension), _WHOLE))
        for at, (index, dimension, _) in enumerate(dimensions)
        if at not in grouped
    ]
    unknown: dict[str, int] = {}
    for analysis in analyses:
        for name, times in analysis.unknown.items():
            unknown[name] = unknown.get(name, 0) + times
    return Groups(model, groups, frozen, unknown)


def _reasons(
    dimensions: Sequence[tuple[int, int, np.ndarray]],
    analyses: Sequence[Analysis],
    unused: set[int],
) -> dict[tuple[int, int], str]:
    """(leaf, dimension) -> why it stays whole, also where it only follows another one."""
    reasons: dict[tuple[int, int], str] = {}
    for index, dimension, _ in dimensions:
        if index in unused:
            reasons[index, dimension] = "no traced function uses it"
    for analysis in analyses:
        for hit, reason in analysis.freezes:
            for place in hit:
                reasons.setdefault(place, reason)
    # What one trace freezes, another trace may join to further dimensions.
    for analysis in [*analyses, *analyses]:
        cause: dict[int, str] = {}
        roots = {
            (index, dimension): np.unique(analysis.root(analysis.leaves[index].nodes[dimension]))
            for index, dimension, _ in dimensions
        }
        for place in reasons.keys() & roots.keys():
            cause.update(dict.fromkeys(roots[place].tolist(), reasons[place]))
        cause.pop(FROZEN, None)
        for place, own in roots.items():
            known = [cause[root] for root in own.tolist() if root in cause]
            if known:
                reasons.setdefault(place, known[0])
    return reasons


def _name(members: Sequence[Member], model: Model, taken: set[str]) -> str:
    """Path and dimension of the first member with the most dimensions that produces."""
    makers = [member for member in members if member.produces] or members
    first = max(makers, key=lambda member: len(model.shapes[member.path]))
    name = base = f"{first.path}:{first.dimension}"
    number = 1
    while name in taken:
        number += 1
        name = f"{base}#{number}"
    return name


def _is_parameter(path: str, leaf: Any) -> bool:
    floating = bool(jnp.issubdtype(leaf.dtype, jnp.floating))
    return floating and not _STATE & set(path.split("/")) and not _is_cache(path, leaf)


def _is_cache(path: str, leaf: Any) -> bool:
    return "cache" in path
