"""Defines what the analysis knows about a value of a traced function, and the rules' signatures."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxprune import jaxprs

if TYPE_CHECKING:
    from jaxprune.structure._analysis import Analysis
    from jaxprune.structure._execution import Execution

# Facts are bits, one uint8 for each index of a dimension. They say what the entries at that index
# are in the dense function once the index is pruned, that is, once parameters are set to 0 there:
#   ZERO: the entries are 0.       SAME: they do not depend on the parameters.
# The suffix says which parameters must be 0 for that:
#   none: all at that index.
#   SOFT: those that produce it, such as a kernel's outputs; those that consume it may be anything.
#   GATE: the vectors among the producers, such as the scale and bias of a norm layer.
# A SAME bit is the ZERO bit of the same suffix shifted left by one.
ZERO, SAME = np.uint8(1), np.uint8(2)
ZERO_SOFT, SAME_SOFT = np.uint8(4), np.uint8(8)
ZERO_GATE, SAME_GATE = np.uint8(16), np.uint8(32)
NOTHING = np.uint8(0)
ZEROS = ZERO | ZERO_SOFT | ZERO_GATE
ALWAYS_SAME = SAME | SAME_SOFT | SAME_GATE
ALWAYS_ZERO = ZEROS | ALWAYS_SAME
UNGATED = ALWAYS_ZERO & ~(ZERO_GATE | SAME_GATE)  # of a parameter that masks zero and is no vector


@dataclasses.dataclass(eq=False)
class Value:
    """An intermediate result: for each dimension, the nodes of its indices and their facts.

    Example:
        >>> import jax
        >>> Value(jax.ShapeDtypeStruct((2, 3), "float32")).shape
        (2, 3)
    """

    aval: Any
    nodes: list[np.ndarray] = dataclasses.field(default_factory=list)  # int64 [n] per dimension
    facts: list[np.ndarray] = dataclasses.field(default_factory=list)  # uint8 [n] per dimension
    # Per dimension: the (leaf, dimension) pairs of the parameters that it comes from. Only values
    # with `of_params` have any.
    origins: list[frozenset] = dataclasses.field(default_factory=list)
    # The leaves, all vectors, whose zeros the GATE facts rest on: other vectors may be anything.
    support: frozenset[int] = frozenset()
    of_params: bool = False  # depends on parameters and constants alone
    of_data: bool = False  # depends on inputs and constants alone, so on nothing that is pruned
    number: Any = None  # the number that all entries equal, if known
    constant: Any = None  # the array, if the function holds it
    op: "Op | None" = None  # the operation that computes it
    leaf: int | None = None  # its index among the variables, if it is one

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense value; numbers stand in for symbolic sizes."""
        shape = self.aval.shape
        return jaxprs.sizes(shape) if jaxprs.has_symbols(shape) else shape

    def like(self, other: "Value") -> None:
        """Copies all that is known about a different value of the same shape."""
        self.nodes, self.facts = list(other.nodes), list(other.facts)
        self.origins, self.number = list(other.origins), other.number
        self.support = other.support


@dataclasses.dataclass(eq=False)
class Op:
    """One primitive applied to values.

    Example:
        >>> Op("add", None, {}, [], [], "").name
        'add'
    """

    name: str
    primitive: Any
    params: dict[str, Any]  # numbers stand in for symbolic sizes, unlike those of `equation`
    ins: list[Value]
    outs: list[Value]
    where: str  # the line of the user's code
    inner: dict[str, Any] = dataclasses.field(default_factory=dict)  # graphs that control flow runs
    equation: Any = None  # of the jaxpr
    scope: Any = None  # names of the calls that were inlined around it


class Split(NamedTuple):
    """A dimension that a reshape splits, named so that other traces can find it again.

    Example:
        >>> Split(node=7, sizes=(3, 4, 16)).sizes
        (3, 4, 16)
    """

    node: int  # the least root of its indices: a node of a leaf if one shrinks with it
    sizes: tuple[int, ...]  # of the factors


class Graph(NamedTuple):
    """A traced function: its operations in order, with calls of `jit` inlined.

    Example:
        >>> Graph([], [], []).ops
        []
    """

    ins: list[Value]
    outs: list[Value]
    ops: list[Op]


class Rule(NamedTuple):
    """The two functions of a primitive: one joins dimensions, one runs it on smaller arrays.

    `analyze(analysis, op)` fills in the outputs of the operation. It returns False for a form that
    it does not know; the operation then freezes all it touches. `run(execution, op, arrays)`
    returns a list of arrays; None binds the primitive unchanged.

    Example:
        >>> Rule(lambda analysis, op: False).run is None
        True
    """

    analyze: Callable[["Analysis", Op], bool | None]
    run: Callable[["Execution", Op, list[Any]], list[Any]] | None = None
