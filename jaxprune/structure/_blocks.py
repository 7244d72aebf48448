"""Finds the branches of residual networks that can be removed whole.

A block is `f` in `x + f(x)`. Three things are proven from the traced function: `f` is added to
something that it is computed from; its parameters reach the outputs in no other way; and it is 0
if they are. Names play no part.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxprune.structure._analysis import Analysis
from jaxprune.structure._branches import flat, needed, residuals
from jaxprune.structure._traces import Model, Traced
from jaxprune.structure._values import Graph
from jaxprune.structure._zeros import LOST, PRESENT, ZERO, Spread, follow, users_of


class Block(NamedTuple):
    """The leaves that disappear with a branch, in a list of layers.

    Example:
        >>> Block(frozenset({"up", "down"}), frozenset()).state
        frozenset()
    """

    parameters: frozenset[str]
    state: frozenset[str]  # caches and running averages that only the branch reads


class Pass(NamedTuple):
    """One trace of a function with its analysis."""

    traced: Traced
    analysis: Analysis
    graph: Graph


class _Known(NamedTuple):
    """A trace, and which operations read each value."""

    traced: Traced
    graph: Graph
    users: dict[int, list[int]]


def find_blocks(model: Model, passes: Sequence[Pass]) -> list[Block]:
    """Finds the blocks that all traces agree on.

    Args:
        model: the variables.
        passes: the traces.

    Returns:
        The blocks, in the order of the first trace that has them.

    Example:
        >>> find_blocks(Model({}, frozenset()), [])
        []
    """
    known = [_Known(each.traced, each.graph, users_of(each.graph)) for each in passes]
    found = [{own.parameters: own for own in _blocks(model, each)} for each in known]
    joined: list[Block] = []
    for names in dict.fromkeys(names for own in found for names in own):
        state = frozenset().union(*[own[names].state for own in found if names in own])
        block = Block(names, state)
        if all(_vanishes(model, each, block) for each in known):
            joined.append(block)
    return joined


def _blocks(model: Model, each: _Known) -> Iterator[Block]:
    """Finds the blocks of one trace; nested ones with the same parameters are found once."""
    paths = list(model.shapes)
    outs = [out for index, out in enumerate(each.graph.outs) if index not in each.traced.updated]
    own = {i for i, path in enumerate(paths) if path in model.parameters and model.shapes[path]}
    view = flat(each.graph)
    for residual in residuals(view, own):
        places = needed(view, residual, outs)
        leaves = frozenset(paths[place] for place in places if place < len(paths))
        names = leaves & model.parameters
        if not any(model.shapes[path] for path in names):
            continue
        block = _with_updates(model, each, Block(names, leaves - names))
        spread = _follow(model, each, block)
        if spread.state(residual.branch) == ZERO and spread.state(residual.stream) == PRESENT:
            yield block


def _follow(model: Model, each: _Known, block: Block) -> Spread:
    """Follows a trace without a block."""

    def state(path: str) -> int:
        if path not in gone:
            return PRESENT
        return ZERO if path in model.parameters or path in model.caches else LOST

    gone = block.parameters | block.state
    states = [*map(state, model.shapes)]
    states += [PRESENT] * (len(each.graph.ins) - len(states))
    return follow(each.graph, states, each.users)


def _with_updates(model: Model, each: _Known, block: Block) -> Block:
    """Adds the state whose new value cannot be computed without the block."""
    while True:
        spread = _follow(model, each, block)
        lost = {path for at, path in each.traced.updated.items() if spread.outs[at] != PRESENT}
        lost -= block.state | model.parameters
        if not lost:
            return block
        block = block._replace(state=block.state | lost)


def _vanishes(model: Model, each: _Known, block: Block) -> bool:
    """Tells whether a trace computes everything else without the block, and its caches stay 0."""
    spread = _follow(model, each, block)
    for index, state in enumerate(spread.outs):
        path = each.traced.updated.get(index)
        wanted = PRESENT if path not in block.state else ZERO if path in model.caches else state
        if state != wanted:
            return False
    return True
