"""Joins all analysed traces of a function to one set of groups."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.structure._analysis import Analysis
from jaxprune.structure._blocks import Block
from jaxprune.structure._groups import Frozen, Group, Groups, Member
from jaxprune.structure._nodes import FROZEN, Nodes
from jaxprune.structure._traces import Model

_WHOLE = "all its indices are one unit, or no traced function uses them"


class _Dimension(NamedTuple):
    """A dimension of a leaf that has more than one index."""

    index: int  # number of the leaf
    dimension: int
    roots: np.ndarray  # int64 [size], roots after joining


class _Joined(NamedTuple):
    """The union-find of the leaf nodes of all traces together."""

    nodes: Nodes
    count: int  # number of leaf nodes plus one
    unused: set[int]  # leaves that no trace uses


class _Classes(NamedTuple):
    """Roots that lie in exactly the same dimensions; the frozen root is in none."""

    places: list[tuple[int, ...]]  # of each class: positions of its dimensions
    roots: list[np.ndarray]  # of each class: int64 [channels], ascending
    number: np.ndarray  # int64 [count]: the class of each root, or -1


def join(model: Model, analyses: Sequence[Analysis], blocks: Sequence[Block] = ()) -> Groups:
    """Joins the analyses of all traces to one set of groups.

    Args:
        model: the analysed model.
        analyses: one analysis for each trace.
        blocks: the blocks in lists of layers; those of stacks are in the analyses.

    Returns:
        The groups. Every dimension of a leaf is in a group, or in `frozen` with a reason.

    Example:
        >>> len(join(Model({}, frozenset()), [Analysis()]))
        0
    """
    joined = _join_nodes(model, analyses)
    dimensions = [
        _Dimension(index, dimension, joined.nodes.root(nodes))
        for index, leaf in enumerate(analyses[0].leaves)
        for dimension, nodes in enumerate(leaf.nodes)
        if len(nodes) > 1
    ]
    classes = _classes(dimensions, joined.count)
    inexact: list[set[str]] = [set() for _ in classes.places]
    rests: list[set[int]] = [set() for _ in classes.places]  # leaves, see `Analysis.rests`
    ungated, copies, layers = set[int](), set[int](), set[int]()
    for analysis in analyses:
        hit = _hits(joined, classes, analysis)
        for nodes, reason in analysis.inexact:
            for number in hit(nodes):
                inexact[number].add(reason)
        for nodes in analysis.ungated:
            ungated.update(hit(nodes))
        for nodes in analysis.copies:
            copies.update(hit(nodes))
        for nodes in analysis.layers:
            layers.update(hit(nodes))
        for nodes, support in analysis.rests:
            for number in hit(nodes):
                rests[number].update(support)
    tables = set().union(*[analysis.tables for analysis in analyses])
    plain = set().union(*[analysis.vectors for analysis in analyses]) - tables
    scales = set().union(*[analysis.scales for analysis in analyses])
    groups: dict[str, Group] = {}
    stacked: list[tuple[Member, ...]] = []
    grouped: set[int] = set()
    for number, (places, roots) in enumerate(zip(classes.places, classes.roots, strict=True)):
        if len(roots) > 1:  # a single channel can never be removed
            grouped.update(places)
            members = _members(model, [dimensions[at] for at in places], roots)
            if number in layers:
                stacked.append(members)
                continue
            reasons, enough = sorted(inexact[number]), rests[number]
            gated = number not in ungated
            name = _name(members, model, groups)
            leaves = [dimensions[at].index for at in places]
            makers = [
                (leaf, member)
                for leaf, member in zip(leaves, members, strict=True)
                if member.produces
            ]
            resting = tuple(member for leaf, member in makers if leaf in enough)
            multiply = tuple(member for leaf, member in makers if leaf in scales)
            is_norm = any(leaf in enough & scales for leaf, _ in makers)
            groups[name] = Group(
                name,
                len(roots),
                members,
                tuple(reasons),
                _gates(model, members, resting if gated else (), reasons),
                filters=tuple(
                    member
                    for leaf, member in makers
                    if leaf not in plain and len(model.shapes[member.path]) > 1
                ),
                scales=multiply,
                norms=resting if is_norm else multiply,
                copies=number in copies,
            )
    paths, reasons_of = list(model.shapes), _reasons(dimensions, analyses, joined.unused)
    frozen = [
        Frozen(paths[own.index], own.dimension, reasons_of.get(own[:2], _WHOLE))
        for at, own in enumerate(dimensions)
        if at not in grouped
    ]
    unknown: dict[str, int] = {}
    for analysis in analyses:
        for name, times in analysis.unknown.items():
            unknown[name] = unknown.get(name, 0) + times
    found = [*stacked, *[_of_block(model, block) for block in blocks]]
    return Groups(model, list(groups.values()), frozen, unknown, _blocks(model, found))


def _join_nodes(model: Model, analyses: Sequence[Analysis]) -> _Joined:
    """Joins and freezes the leaf nodes that any of the traces joins or freezes."""
    # Leaf nodes have the lowest numbers and a root is the minimum of its class, so a class with a
    # leaf node has a leaf node as its root.
    count = 1 + sum(size for shape in model.shapes.values() for size in shape if size > 1)
    nodes, own = Nodes(), np.arange(count)
    nodes.new(count - 1)
    for analysis in analyses:
        nodes.used[own] |= analysis.nodes.used[analysis.root(own)]
        nodes.unite(own, analysis.root(own))
    # Keep what no trace uses, such as positions beyond the traced length: other calls may use it.
    idle = own[~nodes.used[nodes.root(own)]]
    nodes.unite(idle, np.full_like(idle, FROZEN))
    unused = set(range(len(model.shapes))) - set().union(*[a.used for a in analyses])
    return _Joined(nodes, count, unused)


def _classes(dimensions: Sequence[_Dimension], count: int) -> _Classes:
    """Sorts roots by the dimensions that they are found in."""
    # Each dimension splits the classes: those of its roots that were in one class go to a new one.
    number, places = np.full(count, -1), dict[int, tuple[int, ...]]({-1: ()})
    for at, own in enumerate(dimensions):
        roots = own.roots[own.roots != FROZEN]
        old = number[roots]
        if len(old) and (old == old[0]).all():  # the usual case
            before, places_of = old[:1], np.zeros(len(old), int)
        else:
            before, places_of = np.unique(old, return_inverse=True)
        new = len(places) + np.arange(len(before))
        places |= {to: (*places[was], at) for was, to in zip(before.tolist(), new.tolist())}
        number[roots] = new[places_of]
    roots = np.flatnonzero(number >= 0)
    roots = roots[np.argsort(number[roots], kind="stable")]
    used, starts = np.unique(number[roots], return_index=True)
    parts = np.split(roots, starts[1:]) if len(used) else []
    # In the order of the leaves: by the first dimension, then by the first root.
    kept = sorted(zip(used.tolist(), parts), key=lambda own: (places[own[0]][0], own[1][0]))
    renumbered = np.full(len(places) + 1, -1)
    renumbered[[old for old, _ in kept]] = np.arange(len(kept))
    return _Classes([places[old] for old, _ in kept], [own for _, own in kept], renumbered[number])


def _hits(
    joined: _Joined, classes: _Classes, analysis: Analysis
) -> Callable[[np.ndarray], list[int]]:
    """Makes a function from nodes of an analysis to the classes that they are in."""

    def hits(nodes: np.ndarray) -> list[int]:
        roots = analysis.root(nodes)
        numbers = classes.number[joined.nodes.root(roots[roots < joined.count])]
        return np.flatnonzero(np.bincount(numbers + 1)[1:]).tolist()

    return hits


def _members(
    model: Model, dimensions: Sequence[_Dimension], roots: np.ndarray
) -> tuple[Member, ...]:
    """Makes the members of a group whose channels have these roots."""
    paths, members = list(model.shapes), []
    for index, dimension, own in dimensions:
        channels = np.searchsorted(roots, own).clip(0, len(roots) - 1)
        channels = np.where(roots[channels] == own, channels, -1)
        produces = paths[index] in model.parameters and (index, dimension) not in model.consumers
        members.append(Member(paths[index], dimension, channels, produces))
    return tuple(members)


def _of_block(model: Model, block: Block) -> tuple[Member, ...]:
    """Makes the members of a block in a list: the first dimension of each leaf, as one channel."""
    own = block.parameters | block.state
    return tuple(
        Member(path, 0, np.zeros(shape[0], int), path in block.parameters)
        for path, shape in model.shapes.items()
        if path in own and shape
    )


def _blocks(model: Model, found: Sequence[tuple[Member, ...]]) -> list[Group]:
    """Names blocks after the largest kernel in them, in the order of the leaves."""
    order = {path: place for place, path in enumerate(model.shapes)}
    named = []
    for members in found:
        makers = [member for member in members if member.produces]
        named.append((max(makers, key=lambda own: len(model.shapes[own.path])).path, members))
    blocks: list[Group] = []
    for path, members in sorted(named, key=lambda own: order[own[0]]):
        size = 1 + max(int(member.channels.max()) for member in members)
        taken = sum(block.name.split("#")[0] == path for block in blocks)
        name = f"{path}#{taken + 1}" if taken else path  # a block inside of another one
        blocks.append(Group(name, size, members, ()))
    return blocks


def _gates(
    model: Model, members: Sequence[Member], enough: tuple[Member, ...], reasons: Sequence[str]
) -> tuple[Member, ...]:
    """Chooses `Group.gates`; the vectors in `enough` suffice if there are any."""
    if reasons:
        return tuple(member for member in members if member.path in model.parameters)
    return enough or tuple(member for member in members if member.produces)


def _reasons(
    dimensions: Sequence[_Dimension], analyses: Sequence[Analysis], unused: set[int]
) -> dict[tuple[int, int], str]:
    """Maps (leaf, dimension) to the reason why it is kept whole, given or inherited.

    A dimension inherits the reason of a frozen dimension that it is joined with in some trace.
    """
    reasons: dict[tuple[int, int], str] = {}
    for index, dimension, _ in dimensions:
        if index in unused:
            reasons[index, dimension] = "no traced function uses it"
    for analysis in analyses:
        for hit, reason in analysis.freezes:
            for place in hit:
                reasons.setdefault(place, reason)
    # What one trace freezes, a different trace may join to further dimensions. The first pass hands
    # reasons to later traces, the second hands those found last back to earlier ones. Longer chains
    # are possible and stop here: only the text of a reason depends on it (`_WHOLE` stands in), not
    # which dimensions are frozen.
    frozen = [own for own in dimensions if (own.roots == FROZEN).any()]
    for analysis in [*analyses, *analyses]:
        roots = {
            own[:2]: analysis.root(analysis.leaves[own.index].nodes[own.dimension])
            for own in frozen
        }
        given = [place for place in roots if place in reasons]
        cause = np.full(analysis.nodes.count, -1)
        for number, place in enumerate(given):
            cause[roots[place]] = number
        cause[FROZEN] = -1
        for place in roots.keys() - set(given):
            known = cause[roots[place]]
            if (known >= 0).any():
                reasons[place] = reasons[given[known[known >= 0][0]]]
    return reasons


def _name(members: Sequence[Member], model: Model, taken: Mapping[str, Group]) -> str:
    """Names a group after its producer with the most dimensions, the first of equals."""
    makers = [member for member in members if member.produces] or members
    first = max(makers, key=lambda member: len(model.shapes[member.path]))
    name = base = f"{first.path}:{first.dimension}"
    number = 1
    while name in taken:
        number += 1
        name = f"{base}#{number}"
    return name
