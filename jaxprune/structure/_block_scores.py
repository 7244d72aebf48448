"""Scores residual blocks from data; a higher score means that the block matters more."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import jaxprs, trees
from jaxprune.structure._analysis import Analysis
from jaxprune.structure._branches import flat, residuals
from jaxprune.structure._execution import Execution
from jaxprune.structure._groups import Group, Groups
from jaxprune.structure._nodes import FROZEN
from jaxprune.structure._traces import Trace
from jaxprune.structure._values import Graph, Op, Value
from jaxprune.structure._zeros import CALLS, PRESENT, ZERO, follow

Gates = Mapping[str, Any]  # name of a block -> float [layers], a factor of its branch


def block_influence(
    groups: Groups, function: Callable[..., Any], variables: Any, batches: Iterable[Any]
) -> dict[str, np.ndarray]:
    """Scores blocks by how much they turn the residual stream: `1 - mean cosine(x, x + f(x))`.

    The mean is over all positions, and the cosine along the last axis. For joined blocks `x` is the
    stream before the first and after the last of them.

    Args:
        groups: from `find_groups`, perhaps `Groups.joined`.
        function: `function(variables, batch)`, one of those given to `find_groups`.
        variables: dense arrays.
        batches: iterable of batches, all of one shape.

    Returns:
        Name of a block -> float64 [layers], between 0 and 2.

    Raises:
        ValueError: if there is no block or no batch, or the function does not run a block.

    Example:
        >>> from jaxprune.structure import find_groups
        >>> def net(w, x):
        ...     return (x + x @ w["branch"]) @ w["out"]
        >>> w = {"branch": jnp.eye(2)[::-1], "out": jnp.ones((2, 2))}
        >>> groups = find_groups(net, w, jnp.ones((1, 2)))
        >>> scores = block_influence(groups, net, w, [jnp.array([[1.0, 0.0]])])
        >>> scores["branch"].round(3).tolist()
        [0.293]

    References:
        Men et al., ShortGPT: layers in large language models are more redundant than you expect,
        arXiv:2403.03853.
    """

    def influence(variables: Any, gates: Gates, batch: Any) -> dict[str, Any]:
        return _gated(groups, function, variables, gates, batch)[1]

    return _mean(jax.jit(influence), groups, variables, batches)


def block_taylor(
    groups: Groups, loss: Callable[..., Any], variables: Any, batches: Iterable[Any]
) -> dict[str, np.ndarray]:
    """Scores blocks by the squared first-order change of a loss without them: `(sum of f g) ** 2`.

    Here `g` is the gradient of the loss with respect to the branch `f`. `taylor` is the same score
    of channels.

    Args:
        groups: from `find_groups`, perhaps `Groups.joined`.
        loss: `loss(variables, batch) -> number`.
        variables: dense arrays.
        batches: iterable of batches, all of one shape.

    Returns:
        Name of a block -> float64 [layers].

    Raises:
        ValueError: as for `block_influence`.

    Example:
        >>> from jaxprune.structure import find_groups
        >>> def loss(w, x):
        ...     return ((x + x @ w["branch"]) @ w["out"]).sum()
        >>> w, x = {"branch": 2 * jnp.eye(2), "out": jnp.ones((2, 1))}, jnp.ones((1, 2))
        >>> block_taylor(find_groups(loss, w, x), loss, w, [x])["branch"].tolist()
        [16.0]

    References:
        Molchanov et al., Importance estimation for neural network pruning, arXiv:1906.10771.
    """

    def value(gates: Gates, variables: Any, batch: Any) -> Any:
        return _gated(groups, loss, variables, gates, batch)[0]

    def slopes(variables: Any, gates: Gates, batch: Any) -> Gates:
        return jax.grad(value)(gates, variables, batch)

    found = _mean(jax.jit(slopes), groups, variables, batches)
    return {name: own**2 for name, own in found.items()}


def block_losses(
    groups: Groups, loss: Callable[..., Any], variables: Any, batches: Iterable[Any]
) -> dict[str, np.ndarray]:
    """Scores blocks by how much the loss rises if one of them is removed.

    The loss is compiled once, and evaluated for each block and each layer of a stack.

    Args:
        groups: from `find_groups`, perhaps `Groups.joined`.
        loss: `loss(variables, batch) -> number`.
        variables: dense arrays.
        batches: iterable of batches, all of one shape.

    Returns:
        Name of a block -> float64 [layers]; below 0 if the loss falls.

    Raises:
        ValueError: as for `block_influence`.

    Example:
        >>> from jaxprune.structure import find_groups
        >>> def loss(w, x):
        ...     return ((x + x @ w["branch"]) @ w["out"]).sum()
        >>> w, x = {"branch": 2 * jnp.eye(2), "out": jnp.ones((2, 1))}, jnp.ones((1, 2))
        >>> block_losses(find_groups(loss, w, x), loss, w, [x])["branch"].tolist()
        [-4.0]

    References:
        Song et al., SLEB: streamlining LLMs through redundancy verification and elimination of
        transformer blocks, arXiv:2402.09025.
    """

    @jax.jit
    def value(variables: Any, gates: Gates, batch: Any) -> Any:
        return _gated(groups, loss, variables, gates, batch)[0]

    def rises(variables: Any, gates: Gates, batch: Any) -> dict[str, np.ndarray]:
        whole = float(value(variables, gates, batch))
        found = {name: np.zeros(block.size) for name, block in groups.blocks.items()}
        for name, own in found.items():
            for layer in range(len(own)):
                less = jnp.asarray(np.arange(len(own)) != layer, jnp.float32)
                own[layer] = float(value(variables, {**gates, name: less}, batch)) - whole
        return found

    return _mean(rises, groups, variables, batches)


def _mean(
    measure: Callable[..., Gates], groups: Groups, variables: Any, batches: Iterable[Any]
) -> dict[str, np.ndarray]:
    """Averages what is measured over batches, with all blocks in place."""
    if not groups.blocks:
        raise ValueError("`groups` must have blocks, but no residual branch was found.")
    gates = {name: jnp.ones(block.size) for name, block in groups.blocks.items()}
    total = {name: np.zeros(block.size) for name, block in groups.blocks.items()}
    count = 0
    for batch in batches:
        found = measure(variables, gates, batch)
        for name, own in total.items():
            own += np.asarray(found[name], float)
        count += 1
    if not count:
        raise ValueError("`batches` must hold at least one batch, but is empty.")
    return {name: own / count for name, own in total.items()}


def _gated(
    groups: Groups, function: Callable[..., Any], variables: Any, gates: Gates, batch: Any
) -> tuple[Any, dict[str, Any]]:
    """Runs a function with a factor on each branch; returns its output and the influences."""
    plan = groups.plan({})
    traced, graph, execution, arrays = plan.follow(Trace(function, (batch,)), variables)
    places = _places(groups, execution.analysis, graph)
    seen = {place.name for place in places.values()}
    trees.raise_for(
        [name for name in groups.blocks if name not in seen],
        "`function` must run all blocks, but does not run:",
    )
    run = _Gated(execution.analysis, plan.kept_nodes(execution.analysis), places, gates)
    return traced.output(run.graph(graph, arrays)), run.influences


class _Place(NamedTuple):
    """The block that a sum belongs to, and which operand is the branch."""

    name: str
    branch: int
    layers: np.ndarray  # int [rows]: the layer of the block in each row of a stack, or -1


def _places(groups: Groups, analysis: Analysis, graph: Graph) -> dict[int, _Place]:
    """Maps the ids of the sums that blocks end in to their places."""
    paths = {path: index for index, path in enumerate(groups.model.shapes)}
    found: dict[int, _Place] = {}
    scans = list(_scans(graph))
    for name, block in groups.blocks.items():
        leaves = [paths[member.path] for member in block.members]
        if block.full == 1:
            found |= _ends(name, block, graph, set(leaves))
        roots = set().union(*[_free_rows(analysis, analysis.leaves[leaf]) for leaf in leaves])
        for op in scans if block.full > 1 else ():
            stacked = {
                place
                for place, value in enumerate(op.ins)
                if value.shape and _free_rows(analysis, value) & roots
            }
            found |= _ends(name, block, op.inner["call"], stacked)
    return found


def _free_rows(analysis: Analysis, value: Value) -> set[int]:
    """Returns the roots of the rows of a value that may be removed."""
    return set(analysis.root(value.nodes[0]).tolist()) - {FROZEN}


def _scans(graph: Graph) -> Iterator[Op]:
    for op in graph.ops:
        if op.name == "scan":
            yield op
        elif op.name in CALLS:
            yield from _scans(op.inner["call"])


def _ends(name: str, block: Group, graph: Graph, places: set[int]) -> dict[int, _Place]:
    """Finds the sums whose branch is 0 without these inputs, and whose stream is not."""
    if not places:
        return {}
    states = [ZERO if place in places else PRESENT for place in range(len(graph.ins))]
    spread = follow(graph, states)
    return {
        id(own.op): _Place(name, 0 if own.op.ins[0] is own.branch else 1, block.members[0].channels)
        for own in residuals(flat(graph), places)
        if spread.state(own.branch) == ZERO and spread.state(own.stream) == PRESENT
    }


def _ops(graph: Graph) -> Iterator[Op]:
    """Yields the operations of a graph and of the functions that it rematerialises."""
    for op in graph.ops:
        yield op
        if op.name in CALLS:
            yield from _ops(op.inner["call"])


class _Gated(Execution):
    """A run at dense shapes that scales branches and compares streams before and after them."""

    def __init__(
        self, analysis: Analysis, kept: np.ndarray, places: Mapping[int, _Place], gates: Gates
    ) -> None:
        super().__init__(analysis, kept)
        self._places = places
        self._gates = {name: own[0] if len(own) == 1 else own for name, own in gates.items()}
        self._before: dict[str, Any] = {}
        self.influences: dict[str, Any] = {}

    def _run(self, op: Op, operands: list[Any]) -> list[Any]:
        if id(op) in self._places:
            return [self._add(self._places[id(op)], operands)]
        if op.name in CALLS:  # influences could not leave a rematerialised function
            return self.graph(op.inner["call"], operands)
        if op.name == "scan":
            inside = {id(own) for own in _ops(op.inner["call"])} & self._places.keys()
            if inside:
                layers = {self._places[key].name: self._places[key].layers for key in inside}
                return self._scan(op, operands, layers)
        return super()._run(op, operands)

    def _add(self, place: _Place, operands: list[Any]) -> Any:
        stream, branch = operands[1 - place.branch], operands[place.branch]
        before = self._before.setdefault(place.name, stream)
        after = stream + self._gates[place.name].astype(branch.dtype) * branch
        self.influences[place.name] = jnp.reshape(1 - _cosine(before, after), 1)
        return after

    def _scan(self, op: Op, arrays: list[Any], layers: Mapping[str, np.ndarray]) -> list[Any]:
        """Runs a scan whose body has blocks; gates and influences have a row for each pass."""
        first, count = jaxprs.scan_counts(op.params, len(arrays))
        whole = self._gates

        def body(carry: Any, line: Any) -> Any:
            row, gates = line
            outer = self._before, self.influences
            self._gates, self._before, self.influences = whole | gates, {}, {}
            outs = self.graph(op.inner["call"], [*arrays[:first], *carry, *row])
            influences = {name: self.influences[name][0] for name in layers}
            (self._before, self.influences), self._gates = outer, whole
            return tuple(outs[:count]), (tuple(outs[count:]), influences)

        carry, rows = tuple(arrays[first : first + count]), tuple(arrays[first + count :])
        gates = {
            name: jnp.where(own >= 0, jnp.atleast_1d(whole[name])[own], 1.0)
            for name, own in layers.items()
        }
        carry, (outs, influences) = lax.scan(body, carry, (rows, gates))
        self.influences |= {
            name: influences[name][np.flatnonzero(own >= 0)] for name, own in layers.items()
        }
        return [*carry, *outs]


def _cosine(a: Any, b: Any) -> Any:
    """Returns the mean cosine of the vectors along the last axis, in float32 or wider."""
    a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (a, b))
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    tiny = jnp.finfo(norms.dtype).tiny
    return jnp.mean(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, tiny))
