"""Holds groups of channels that shrink together, as `find_groups` returns them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune import trees
from jaxprune.structure._plans import Plan
from jaxprune.structure._traces import Model

# One multiple for all groups, or a dict from the names of groups to theirs
Multiple = int | Mapping[str, int] | None

_WIDTH = 8  # widths that are no multiples of it are slow on all devices, see docs/structure.md


class Member(NamedTuple):
    """A dimension of a leaf that shrinks with a group.

    Example:
        >>> Member("conv/kernel", 3, np.arange(8), True).dimension
        3
    """

    path: str
    dimension: int
    channels: np.ndarray  # int [size]: the channel of the group at each index, or -1 for none
    produces: bool  # True for an output of a layer, False for an input


class Group(NamedTuple):
    """A set of channels, each of which can be removed from all members at once.

    Example:
        >>> Group("conv/kernel:3", 8, (), ()).exact
        True
    """

    name: str
    size: int  # number of channels
    members: tuple[Member, ...]
    # Why zeroing the producers alone differs from removing the channel; empty if it does not.
    reasons: tuple[str, ...]
    # The members with the fewest entries whose zeros remove a channel's effect: scales and biases
    # of norm layers if they suffice, else all producers, else all members that are parameters.
    gates: tuple[Member, ...] = ()
    # Producers that are contracted, looked up, or have two dimensions: kernels, no vectors.
    filters: tuple[Member, ...] = ()
    # Vectors that multiply a channel entry by entry, so that their zeros remove its effect: the
    # scales of norm layers, whatever their names.
    scales: tuple[Member, ...] = ()
    # The scales and the biases added after them; zeros in both remove what reads the channel.
    norms: tuple[Member, ...] = ()
    removed: int = 0  # number of channels that earlier plans removed, see `Groups.compact`
    # Whether products only repeat over the channels, as over heads and experts: no width.
    copies: bool = False

    @property
    def full(self) -> int:
        """The number of channels in the dense network."""
        return self.size + self.removed

    @property
    def multiple(self) -> int:
        """The default of `Groups.plan`: kept channels are rounded up to a multiple of this.

        It makes widths multiples of 8. Heads and experts are not rounded, and neither is a group of
        at most 8 channels, which would be kept whole.
        """
        if self.copies or self.size <= _WIDTH:
            return 1
        return _WIDTH // math.gcd(_WIDTH, *map(_indices, self.members))

    @property
    def exact(self) -> bool:
        """Whether zeroing the producers of a channel equals removing it."""
        return not self.reasons


class Frozen(NamedTuple):
    """A dimension that keeps its size, and the reason.

    Example:
        >>> Frozen("head/kernel", 1, "output").reason
        'output'
    """

    path: str
    dimension: int
    reason: str


class Groups(Mapping[str, Group]):
    """The groups of a function by name, with the reasons for all dimensions that are in none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
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
        blocks: Sequence[Group] = (),
    ) -> None:
        """Stores what `find_groups` found."""
        self.model = model
        self.frozen = tuple(frozen)
        self.unknown = dict(unknown)  # primitive -> how often it froze something
        self._groups = {group.name: group for group in groups}
        # Residual branches that can be removed whole, by name; the channels of a block are the
        # layers of a stack, or one.
        self.blocks = {block.name: block for block in blocks}

    def __getitem__(self, name: str) -> Group:
        """Returns the group of that name."""
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names in the order of the leaves."""
        return iter(self._groups)

    def __len__(self) -> int:
        """Returns the number of groups."""
        return len(self._groups)

    @property
    def units(self) -> dict[str, Group]:
        """The groups and the blocks by name: all that a plan can keep or remove."""
        return {**self._groups, **self.blocks}

    def plan(self, keep: Mapping[str, Any], *, multiple: Multiple = None) -> Plan:
        """Makes the plan that keeps the given channels; groups not named are kept whole.

        Args:
            keep: name of a group or block -> bool [channels], True for kept channels. The channels
                of a block are the layers of its stack, or one.
            multiple: rounds the number of kept channels up to a multiple of this by keeping the
                first of the removed channels. Default: `Group.multiple` of each group. A dict gives
                single groups their own, by name or part of it (see `trees.means`), such as heads
                and their width: `{"query/kernel:1": 1, "query/kernel:2": 64, "mlp": 128}`; the
                other groups have the default.

        Returns:
            The `Plan`.

        Raises:
            ValueError: if a name is not that of a group or block, an array has the wrong length or
                dtype, or a group keeps no channel (it lists all of them); if a multiple is no
                integer above 0.
        """
        if not isinstance(keep, Mapping):
            raise ValueError(
                "`keep` must be a dict from the names of groups to bools, one for each channel, "
                f"such as `structure.keep_global` returns, but is {type(keep).__name__}."
            )
        trees.check_known("keep", dict(keep), "Groups.plan")
        multiples = self._multiples(multiple)
        shapes, units, problems = self.model.shapes, self.units, []
        kept = {path: [np.ones(size, bool) for size in shape] for path, shape in shapes.items()}
        for name, wanted in keep.items():
            channels = np.asarray(wanted)
            if name not in units:
                problems.append(f"{name}: not a group; groups are {', '.join(units) or 'none'}")
            elif channels.dtype != bool or channels.shape != (units[name].size,):
                expected = f"bool[{units[name].size}]"
                problems.append(f"{name}: {channels.dtype}{list(channels.shape)}, not {expected}")
            elif not channels.any() and name in self:
                problems.append(f"{name}: keeps nothing; keep at least one channel")
            else:
                channels = rounded_up(channels, multiples.get(name, 1))
                for member in units[name].members:
                    own = np.where(member.channels >= 0, channels[member.channels], True)
                    kept[member.path][member.dimension] &= own
        trees.raise_for(problems, "`keep` must hold bools for the channels of groups:")
        return Plan(self.model, kept)

    def _multiples(self, multiple: Multiple) -> dict[str, int]:
        """Returns the multiple of each group."""
        if isinstance(multiple, Mapping):
            named = trees.by_name("multiple", multiple, list(self))
        else:
            named = {} if multiple is None else dict.fromkeys(self, multiple)
        bad = [
            f"{name}: {own!r}"
            for name, own in named.items()
            if not isinstance(own, (int, np.integer)) or isinstance(own, bool) or own < 1
        ]
        trees.raise_for(bad, "`multiple` must be an integer of at least 1, but is:")
        return {name: named.get(name, group.multiple) for name, group in self.items()}

    def compact(self, plan: Plan) -> "Groups":
        """Returns the groups of the compacted variables, under the same names.

        Args:
            plan: made from these groups.

        Returns:
            The groups that `find_groups` finds for `plan.wrap(function)`, and those with a single
            channel left as well.

        Raises:
            ValueError: if the plan belongs to a different model.
        """
        if plan.model != self.model:
            raise ValueError(
                "`plan` must be made from these groups, but belongs to a different model."
            )
        model = self.model
        left = [path for path in model.shapes if not plan.is_removed(path)]
        place = {path: index for index, path in enumerate(left)}
        paths = list(model.shapes)
        own = model._replace(
            shapes={path: plan.shape(path) for path in left},
            parameters=model.parameters & place.keys(),
            caches=model.caches & place.keys(),
            consumers=frozenset(
                (place[paths[index]], dimension)
                for index, dimension in model.consumers
                if paths[index] in place
            ),
            factors=(),  # they name nodes of the dense model
        )
        less = [
            [_smaller(plan, unit) for unit in us] for us in (self.values(), self.blocks.values())
        ]
        groups, blocks = ([unit for unit in us if unit.members and unit.size] for us in less)
        frozen = [each for each in self.frozen if each.path in place]
        return Groups(own, groups, frozen, self.unknown, blocks)

    def joined(self, key: Callable[[str], str]) -> "Groups":
        """Joins blocks to larger ones, such as attention and MLP to whole layers.

        Args:
            key: name of a block -> name of the block that it becomes a part of.

        Returns:
            The same groups with the joined blocks.

        Raises:
            ValueError: if blocks of different stacks, or of a stack and a list, get the same name.

        Example:
            >>> parts = [Group(f"layers/0/{n}", 1, (Member(n, 0, np.zeros(2, int), True),), ())
            ...     for n in ("out", "down")]
            >>> groups = Groups(Model({}, frozenset()), [], [], {}, parts)
            >>> layers = groups.joined(lambda name: name.rsplit("/", 1)[0])
            >>> [(name, len(block.members)) for name, block in layers.blocks.items()]
            [('layers/0', 2)]
        """
        parts: dict[str, list[Group]] = {}
        for name, block in self.blocks.items():
            parts.setdefault(key(name), []).append(block)
        problems = [
            f"{name}: {', '.join(f'{block.name} [{block.size}]' for block in own)}"
            for name, own in parts.items()
            if len({(block.size, block.removed) for block in own}) > 1
        ]
        problems += [f"{name}: is the name of a group" for name in parts if name in self]
        trees.raise_for(problems, "`key` must join blocks of the same number of layers:")
        blocks = [
            own[0]._replace(name=name, members=tuple(m for block in own for m in block.members))
            for name, own in parts.items()
        ]
        return Groups(self.model, list(self.values()), self.frozen, self.unknown, blocks)

    def __str__(self) -> str:
        """Lists the members of each group, and the reasons of frozen dimensions."""
        lines = []
        for group in self.values():
            note = "" if group.exact else " (exact only if inputs are zeroed too)"
            lines.append(f"{group.name}: {group.size} channels{note}")
            for member in group.members:
                role = "out" if member.produces else "in"
                shape = "x".join(map(str, self.model.shapes[member.path]))
                lines.append(f"    {role:3} {member.path} [{shape}] dimension {member.dimension}")
        for block in self.blocks.values():
            layers = f"{block.size} layers" if block.size > 1 else "a layer"
            lines.append(f"{block.name}: a branch of {layers} that can be removed")
            lines += [f"        {member.path}" for member in block.members]
        if self.frozen:
            lines.append("frozen:")
        lines += [f"    {f.path} dimension {f.dimension}: {f.reason}" for f in self.frozen]
        return "\n".join(lines)


def _smaller(plan: Plan, group: Group) -> Group:
    """Returns a group without the channels that a plan removes."""
    left = plan.channels(group)
    number = np.cumsum(left) - 1

    def smaller(member: Member) -> Member:
        own = member.channels[plan.kept[member.path][member.dimension]]
        return member._replace(channels=np.where(own >= 0, number[own], -1))

    kinds = ("members", "gates", "filters", "scales", "norms")
    less = {
        kind: tuple(smaller(own) for own in getattr(group, kind) if not plan.is_removed(own.path))
        for kind in kinds
    }
    size = int(left.sum())
    return group._replace(size=size, removed=group.full - size, **less)


def _indices(member: Member) -> int:
    """Returns a number that divides the number of indices that each channel has in a member."""
    return int(np.gcd.reduce(np.bincount(member.channels[member.channels >= 0])))


def rounded_up(kept: np.ndarray, multiple: int) -> np.ndarray:
    """Rounds the kept count up to `multiple` by keeping the first of the removed channels."""
    target = min(len(kept), -(-int(kept.sum()) // multiple) * multiple)
    kept = kept.copy()
    kept[np.flatnonzero(~kept)[: target - int(kept.sum())]] = True
    return kept
