"""An elastic network: a function, what may vary in it, and choices as data."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import structure, trees
from jaxprune.elastic import _kernels
from jaxprune.elastic._kernels import Kernel
from jaxprune.elastic._space import Choice, Decision, check, check_decisions, largest

# Name of a decision -> bool array: which channels, which blocks, which window
Gates = dict[str, np.ndarray]


class Space(NamedTuple):
    """A network whose widths, depths, windows and resolution may vary, from `make_space`.

    Example:
        >>> Space._fields[:3]
        ('decisions', 'units', 'groups')
    """

    decisions: tuple[Decision, ...]
    units: tuple[tuple[str, ...], ...]  # of each decision: groups, blocks, the path of a kernel
    groups: structure.Groups
    variables: Any  # initial arrays; with windows that vary, a dict that has "transforms" too
    evaluate: Callable[..., Any]  # the user's function
    train: Callable[..., Any] | None = None  # in training mode: -> (output, new state)
    build: Callable[[Any], Any] | None = None  # `Extracted` -> module, for networks of `models`

    def gates(self, choice: Choice) -> Gates:
        """Describes a choice by small arrays of fixed shapes, so that it does not recompile.

        Args:
            choice: one index for each decision.

        Returns:
            Name of a decision -> bool: [channels] with True for the first ones; [blocks] likewise;
            [windows] with True for the chosen one. A resolution has none: it is the shape of the
            images.

        Raises:
            ValueError: if the choice is outside of the space.

        Example:
            >>> def mlp(w, x):
            ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
            >>> w = {"in": jnp.ones((1, 4)), "out": jnp.ones((4, 2))}
            >>> groups = structure.find_groups(mlp, w, jnp.ones((1, 1)))
            >>> space = make_space(groups, w, mlp, widths={"in:1": (2, 4)})
            >>> space.gates((0,))
            {'in:1': array([ True,  True, False, False])}
        """
        check(self.decisions, choice)
        gates = {}
        for own, units, index in zip(self.decisions, self.units, choice, strict=True):
            if own.kind == "kernel":
                gates[own.name] = np.arange(len(own.options)) == index
            elif own.kind != "resolution":
                size = self.groups[units[0]].size if own.kind == "width" else len(units)
                gates[own.name] = np.arange(size) < own.options[index]
        return gates

    def resolution(self, choice: Choice) -> int | None:
        """Returns the height and width of the images in pixels, or None if they do not vary."""
        check(self.decisions, choice)
        chosen = zip(self.decisions, choice, strict=True)
        return next((own.options[i] for own, i in chosen if own.kind == "resolution"), None)

    def plan(self, choice: Choice) -> structure.Plan:
        """Returns which channels and blocks a choice keeps.

        Args:
            choice: one index for each decision.

        Returns:
            A `structure.Plan`, such as for `structure.mac_cost`. Windows are no part of it.

        Raises:
            ValueError: if the choice is outside of the space.
        """
        gates, keep = self.gates(choice), {}
        for own, units in zip(self.decisions, self.units, strict=True):
            if own.kind == "width":
                keep |= dict.fromkeys(units, gates[own.name])
            elif own.kind == "depth":
                flags = zip(units, gates[own.name], strict=True)
                keep |= {name: np.full(self.groups.blocks[name].size, kept) for name, kept in flags}
        return self.groups.plan(keep, multiple=1)

    def windows(self, choice: Choice) -> dict[str, int]:
        """Returns the chosen window of each kernel that varies, by path."""
        check(self.decisions, choice)
        chosen = zip(self.decisions, self.units, choice, strict=True)
        return {units[0]: own.options[i] for own, units, i in chosen if own.kind == "kernel"}

    def mask(self, variables: Any, gates: Mapping[str, Any]) -> Any:
        """Makes the variables of a sub-network at the shapes of the full one.

        Parameters of removed channels and skipped blocks are 0, and a smaller kernel lies in the
        centre of the large one, with zeros around it. Running statistics are unchanged.

        Args:
            variables: like `Space.variables`.
            gates: from `gates`, arrays or tracers.

        Returns:
            The tree that the user's function takes: without "transforms".
        """
        return _mask(_rules(self), variables, gates)

    def masked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Makes one function of all sub-networks.

        Args:
            function: `(variables, *args, **kwargs) -> output`, such as `space.evaluate` or
                `space.train`.

        Returns:
            `(variables, gates, *args, **kwargs) -> output`. The gates are data: under `jax.jit` it
            compiles once for all choices of one resolution.

        Example:
            >>> def mlp(w, x):
            ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
            >>> w = {"in": jnp.ones((1, 4)), "out": jnp.ones((4, 2))}
            >>> groups = structure.find_groups(mlp, w, jnp.ones((1, 1)))
            >>> space = make_space(groups, w, mlp, widths={"in:1": (2, 4)})
            >>> apply = jax.jit(space.masked(space.evaluate))
            >>> [apply(w, space.gates((i,)), jnp.ones((1, 1))).tolist() for i in (0, 1)]
            [[[2.0, 2.0]], [[4.0, 4.0]]]
        """
        rules = _rules(self)

        @functools.wraps(function)
        def apply(variables: Any, gates: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            return function(_mask(rules, variables, gates), *args, **kwargs)

        return apply

    def full(self) -> Gates:
        """Returns the gates of the full network."""
        return self.gates(largest(self.decisions))


def make_space(
    groups: structure.Groups,
    variables: Any,
    evaluate: Callable[..., Any],
    train: Callable[..., Any] | None = None,
    *,
    widths: Mapping[Any, Sequence[int]] | None = None,
    depths: Mapping[str, Sequence[str]] | None = None,
    kernels: Mapping[str, Sequence[int]] | None = None,
    resolutions: Sequence[int] = (),
) -> Space:
    """Says what may vary in a function.

    Args:
        groups: from `structure.find_groups`, with the traces of both functions.
        variables: tree of arrays. To train with `elastic.train`, a dict with "params".
        evaluate: `(variables, inputs) -> output`.
        train: `(variables, inputs) -> (output, new values of the state)` in training mode.
        widths: name of a group, or a tuple of names that share one decision -> numbers of channels
            that may be kept.
        depths: name of a stage -> blocks of `groups.blocks`, in their order. Any number of them may
            be skipped, the last one first.
        kernels: path of a convolution kernel [k, k, in, out] -> odd windows up to k.
        resolutions: heights and widths of images. Each is a program of its own, as it changes
            shapes; padding small images to one shape would change the borders of every layer.

    Returns:
        A `Space`. With kernels, its variables have a further entry "transforms": the matrices that
        make small kernels from large ones. They are trained too.

    Raises:
        ValueError: if a name is not that of a group, block or kernel, a block cannot be skipped, or
            options are out of range; it lists all of them.

    References:
        Cai et al. Once-for-All: train one network and specialize it for efficient deployment.
        arXiv:1908.09791.

    Example:
        >>> def apply(v, x):
        ...     w = v["params"]
        ...     x = x + jax.nn.relu(x @ w["up"]) @ w["down"]
        ...     return x @ w["head"]
        >>> w = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 2)), "head": jnp.ones((2, 3))}
        >>> groups = structure.find_groups(apply, {"params": w}, jnp.ones((1, 2)))
        >>> (block,) = groups.blocks
        >>> space = make_space(groups, {"params": w}, apply, depths={"body": [block]},
        ...     widths={"params/up:1": (2, 4, 8)})
        >>> [(own.name, own.kind, own.options) for own in space.decisions]
        [('body', 'depth', (0, 1)), ('params/up:1', 'width', (2, 4, 8))]
    """
    widths = {_names(key): tuple(own) for key, own in (widths or {}).items()}
    depths = {name: tuple(own) for name, own in (depths or {}).items()}
    own_kernels = [Kernel(path, tuple(own)) for path, own in (kernels or {}).items()]
    trees.raise_for(
        [
            *_width_problems(groups, widths),
            *_depth_problems(groups, depths),
            *_kernel_problems(groups, own_kernels, variables),
        ],
        "`widths`, `depths` and `kernels` must name groups, residual blocks and kernels:",
    )
    places = {
        path: (stage, place)
        for stage, blocks in depths.items()
        for place, block in enumerate(blocks)
        for path in _paths(groups.blocks[block])
    }

    def inside(paths: Sequence[str]) -> tuple[str, int]:
        found = {places.get(path, ("", 0)) for path in paths}
        return found.pop() if len(found) == 1 else ("", 0)

    rows = [
        (Decision(name, "depth", tuple(range(len(own) + 1))), own) for name, own in depths.items()
    ]
    for kernel in own_kernels:
        place = inside([kernel.path])
        rows.append((Decision(kernel.path, "kernel", kernel.windows, *place), (kernel.path,)))
    for names, options in widths.items():
        place = inside([path for name in names for path in _paths(groups[name])])
        rows.append((Decision(names[0], "width", options, *place), names))
    if resolutions:
        rows.append((Decision("resolution", "resolution", tuple(resolutions)), ()))
    decisions = tuple(decision for decision, _ in rows)
    check_decisions(decisions)
    if own_kernels:
        transforms = {own.key: _kernels.identities(own.windows) for own in own_kernels}
        variables = {**variables, "transforms": transforms}
    return Space(decisions, tuple(own for _, own in rows), groups, variables, evaluate, train)


def _names(key: Any) -> tuple[str, ...]:
    """Returns the groups that share a decision."""
    return (key,) if isinstance(key, str) else tuple(key)


def _paths(unit: structure.Group) -> list[str]:
    """Returns the leaves of a group or block, each once."""
    return list(dict.fromkeys(member.path for member in unit.members))


def _width_problems(
    groups: structure.Groups, widths: Mapping[tuple[str, ...], tuple[int, ...]]
) -> list[str]:
    """Lists what is wrong with widths."""
    known = ", ".join(groups) or "none"
    problems = [
        f"{name}: not a group; groups are {known}"
        for names in widths
        for name in names
        if name not in groups
    ]
    for names, options in widths.items():
        sizes = {groups[name].size for name in names if name in groups}
        if len(sizes) > 1:
            problems.append(f"{', '.join(names)}: share a decision, but have {sorted(sizes)}")
        elif sizes and (not options or max(options) != min(sizes)):
            problems.append(f"{names[0]}: options {options}, the last must be all {min(sizes)}")
    return problems


def _depth_problems(groups: structure.Groups, depths: Mapping[str, Sequence[str]]) -> list[str]:
    """Lists blocks that cannot be skipped."""
    known = ", ".join(groups.blocks) or "none"
    return [
        f"{name} in {stage}: cannot be skipped, as it is no branch that is added to its input at "
        f"the same shape; blocks that can are {known}"
        for stage, blocks in depths.items()
        for name in blocks
        if name not in groups.blocks
    ]


def _kernel_problems(
    groups: structure.Groups, kernels: Sequence[Kernel], variables: Any
) -> list[str]:
    """Lists kernels whose windows cannot vary."""
    problems, model = [], groups.model
    slides = {
        (own.path, own.dimension) for own in groups.frozen if "convolution slides" in own.reason
    }
    for path, windows in kernels:
        shape = model.shapes.get(path, ())
        if path not in model.parameters or not {(path, 0), (path, 1)} <= slides:
            problems.append(f"{path}: no kernel [height, width, in, out] of a convolution")
        elif not windows or set(shape[:2]) != {max(windows)}:
            problems.append(f"{path}: windows {windows}, the last must be all of {shape[:2]}")
        elif any(window % 2 == 0 for window in windows):
            problems.append(f"{path}: windows {windows}, must be odd")
    if kernels and not isinstance(variables, Mapping):
        problems.append(f"`variables` is {type(variables).__name__}, must be a dict")
    return problems


class _Rules(NamedTuple):
    """What masks each leaf."""

    # Path -> (dimension, decision, channel at each index or -1)
    widths: dict[str, list[tuple[int, str, np.ndarray]]]
    depths: dict[str, list[tuple[str, int]]]  # path -> (decision, number of the block in it)
    kernels: dict[str, tuple[str, Kernel]]  # path -> decision and windows


def _rules(space: Space) -> _Rules:
    """Collects what masks each parameter."""
    model = space.groups.model
    owned = model.parameters | model.caches
    rules = _Rules({}, {}, {})
    for own, units in zip(space.decisions, space.units, strict=True):
        if own.kind == "kernel":
            rules.kernels[units[0]] = own.name, Kernel(units[0], own.options)
        for place, name in enumerate(units if own.kind == "depth" else ()):
            for path in _paths(space.groups.blocks[name]):
                if path in owned:
                    rules.depths.setdefault(path, []).append((own.name, place))
        for name in units if own.kind == "width" else ():
            for member in space.groups[name].members:
                if member.path in owned:
                    row = member.dimension, own.name, member.channels
                    rules.widths.setdefault(member.path, []).append(row)
    return rules


def _mask(rules: _Rules, variables: Any, gates: Mapping[str, Any]) -> Any:
    """Zeroes what a choice removes, and puts small kernels in place of large ones."""
    transforms: Any = {}
    if rules.kernels:
        transforms = variables["transforms"]
        variables = {name: own for name, own in variables.items() if name != "transforms"}

    def masked(path: Any, leaf: Any) -> Any:
        name = trees.path_string(path)
        if name in rules.kernels:
            decision, kernel = rules.kernels[name]
            gate = jnp.asarray(gates[decision])
            leaf = _kernels.selected(leaf, transforms[kernel.key], kernel.windows, gate)
        keep: Any = None
        for decision, place in rules.depths.get(name, ()):
            own = jnp.asarray(gates[decision])[place]
            keep = own if keep is None else keep & own
        for dimension, decision, channels in rules.widths.get(name, ()):
            whole = jnp.append(jnp.asarray(gates[decision]), True)[channels]  # -1 is the last
            own = jax.lax.broadcast_in_dim(whole, jnp.shape(leaf), (dimension,))
            keep = own if keep is None else keep & own
        return leaf if keep is None else jnp.where(keep, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map_with_path(masked, variables)
