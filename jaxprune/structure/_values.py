"""What the analysis knows of a value in a traced function."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# What holds of the entries at an index of a dimension once that index is pruned, in the dense
# function with slices of the class zeroed: all of them (the first two); only those that produce it,
# such as a kernel's outputs, but not those that consume it (SOFT); only the vectors among those,
# such as scale and bias of a norm (GATE).
ZERO, SAME = np.uint8(1), np.uint8(2)  # they are 0; they are the same whatever the parameters are
ZERO_SOFT, SAME_SOFT = np.uint8(4), np.uint8(8)
ZERO_GATE, SAME_GATE = np.uint8(16), np.uint8(32)
NOTHING = np.uint8(0)
ZEROS = ZERO | ZERO_SOFT | ZERO_GATE
ALWAYS_SAME = SAME | SAME_SOFT | SAME_GATE
ALWAYS_ZERO = ZEROS | ALWAYS_SAME
UNGATED = ALWAYS_ZERO & ~(ZERO_GATE | SAME_GATE)  # of what is zeroed, and is no vector


@dataclasses.dataclass(eq=False)
class Value:
    """An intermediate result: for each dimension, the nodes of its indices and what is known.

    Example:
        >>> import jax
        >>> Value(jax.ShapeDtypeStruct((2, 3), "float32")).shape
        (2, 3)
    """

    aval: Any
    nodes: list[np.ndarray] = dataclasses.field(default_factory=list)  # int64 [n] per dimension
    facts: list[np.ndarray] = dataclasses.field(default_factory=list)  # uint8 [n] per dimension
    # Per dimension: the (leaf, dimension) of parameters that it comes from; of parameters only.
    origins: list[frozenset] = dataclasses.field(default_factory=list)
    # Vectors among the leaves whose zeros the facts of GATE rest on: the others may be anything.
    support: frozenset[int] = frozenset()
    of_params: bool = False  # a function of parameters and constants alone
    of_data: bool = False  # a function of inputs and constants alone: of nothing that is pruned
    number: Any = None  # the one number that all entries are, if that is known
    constant: Any = None  # the array, if the function holds it
    op: "Op | None" = None  # what computes it
    leaf: int | None = None  # its number, if it is a leaf of the variables

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense value."""
        return tuple(self.aval.shape)

    def like(self, other: "Value") -> None:
        """Takes over all that is known of another value of the same shape."""
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
    params: dict[str, Any]
    ins: list[Value]
    outs: list[Value]
    where: str  # line of the user's code
    inner: dict[str, Any] = dataclasses.field(default_factory=dict)  # what control flow runs


class Split(NamedTuple):
    """A dimension that a reshape splits, named so that other traces find it again.

    Example:
        >>> Split(node=7, sizes=(3, 4, 16)).sizes
        (3, 4, 16)
    """

    node: int  # the least of its indices: of a leaf, if one shrinks with it
    sizes: tuple[int, ...]


class Graph(NamedTuple):
    """A traced function: its operations in order, calls of `jit` inlined.

    Example:
        >>> Graph([], [], []).ops
        []
    """

    ins: list[Value]
    outs: list[Value]
    ops: list[Op]


class Rule(NamedTuple):
    """How a primitive joins dimensions, and how it runs on smaller arrays.

    `analyze(analysis, op)` fills in the outputs of the operation; it returns False for a form that
    it does not know, which then freezes all it touches. `run(execution, op, arrays)` returns a list
    of arrays; None binds the primitive as it is.

    Example:
        >>> Rule(lambda analysis, op: False).run is None
        True
    """

    analyze: Callable[[Any, Op], bool | None]
    run: Callable[[Any, Op, list[Any]], list[Any]] | None = None
