"""Runs a traced function on smaller arrays."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import jaxprs
from jaxprune.structure._analysis import RULES, Analysis
from jaxprune.structure._rules import elementwise
from jaxprune.structure._slicing import pick
from jaxprune.structure._values import ZERO, Graph, Op, Value
from jaxprune.structure._zeros import CALLS, Spread, follow


class Execution:
    """One run of a traced function without its removed indices.

    Args:
        analysis: the analysis of the function on dense shapes.
        kept: bool [nodes], valid at roots.

    Example:
        >>> Execution(Analysis(), np.ones(1, bool)).arrays
        {}
    """

    def __init__(self, analysis: Analysis, kept: np.ndarray) -> None:
        """Starts with nothing computed."""
        self.analysis, self._kept = analysis, kept
        self._shapes: dict[int, tuple[int, ...]] = {}
        self.arrays: dict[int, Any] = {}  # id of a value -> its smaller array
        self._removed: dict[tuple[int, int], Any] = {}
        self.spread = Spread({}, {}, [])  # what removed arrays mean for the graph that runs now

    def kept(self, value: Value, dimension: int) -> np.ndarray:
        """Tells which indices of a dimension are kept, as bools."""
        return self._kept[self.analysis.root(value.nodes[dimension])]

    def shape(self, value: Value) -> tuple[int, ...]:
        """Returns the shape of the smaller array of a value."""
        if id(value) not in self._shapes:
            kept = [self.kept(value, dimension) for dimension in range(len(value.shape))]
            self._shapes[id(value)] = tuple(
                size if own.all() else int(own.sum())
                for own, size in zip(kept, value.aval.shape, strict=True)
            )
        return self._shapes[id(value)]

    def take(self, array: Any, value: Value, but: int | None = None) -> Any:
        """Takes the kept entries of a dense array; dimension `but` is not touched."""
        for dimension in range(len(value.shape)):
            kept = self.kept(value, dimension)
            if dimension != but and not kept.all():
                array = pick(array, np.flatnonzero(kept), dimension)
        return array

    def is_zero(self, value: Value, dimension: int) -> bool:
        """Tells whether all removed entries of a dimension are 0 in the dense function."""
        removed = ~self.kept(value, dimension)
        return bool((value.facts[dimension][removed] & ZERO).all())

    def removed(self, value: Value, dimension: int) -> Any:
        """Computes the entries at the removed indices of a dimension.

        The result has size 1 along the dimension if all removed entries are equal.
        """
        key = id(value), dimension
        if key not in self._removed:
            self._removed[key] = self._find_removed(value, dimension)
        return self._removed[key]

    def _find_removed(self, value: Value, dimension: int) -> Any:
        if value.number is not None or self.is_zero(value, dimension):
            shape = list(self.shape(value))
            shape[dimension] = 1
            return jnp.full(shape, value.number or 0, value.aval.dtype)
        op = value.op
        if value.of_data:
            gone = np.flatnonzero(~self.kept(value, dimension))
            whole = pick(self.dense(value), gone, dimension)
            return self.take(whole, value, but=dimension)
        if op is None:
            raise AssertionError(f"no removed entries of {value}")
        if op.name in elementwise.NAMES:
            return self.bind(op, _alike([self._operand(v, dimension) for v in op.ins], dimension))[
                0
            ]
        if op.name in elementwise.IDENTITIES:
            return self.removed(op.ins[op.outs.index(value)], dimension)
        operand = op.ins[0]
        if op.name == "broadcast_in_dim":
            source = list(op.params["broadcast_dimensions"])
            shape, array = list(self.shape(value)), self.read(operand)
            shape[dimension] = 1
            if dimension in source and operand.shape[source.index(dimension)] > 1:
                array = self.removed(operand, source.index(dimension))
                shape[dimension] = array.shape[source.index(dimension)]
            return lax.broadcast_in_dim(array, shape, source)
        if op.name == "transpose":
            source = op.params["permutation"]
            return lax.transpose(self.removed(operand, source[dimension]), source)
        raise AssertionError(f"no removed entries of `{op.name}` {op.where}")

    def dense(self, value: Value) -> Any:
        """Computes the dense array of a value that depends on no parameter."""
        if value.constant is not None:
            return value.constant
        if value.op is None:
            return self.read(value)
        return self.bind(value.op, list(map(self.dense, value.op.ins)))[value.op.outs.index(value)]

    def _operand(self, value: Value, dimension: int) -> Any:
        """Returns an elementwise operand at the removed indices; it may broadcast there."""
        spreads = value.shape and value.shape[dimension] > 1
        return self.removed(value, dimension) if spreads else self.read(value)

    def read(self, value: Value) -> Any:
        """Returns the smaller array of a value; None for one that is removed."""
        if id(value) in self.arrays:
            return self.arrays[id(value)]
        assert value.constant is not None, "used before it is computed"
        return self.take(value.constant, value)

    def graph(
        self, graph: Graph, arrays: Sequence[Any], states: Sequence[int] | None = None
    ) -> list[Any]:
        """Runs a traced function on smaller inputs and returns its outputs.

        Args:
            graph: the function.
            arrays: its inputs; None for one that is removed.
            states: the state of each input, see `_zeros`. Default: all are present.

        Returns:
            The outputs; None for those that are zeros or lost because inputs are removed.
        """
        outer = self.arrays, self._removed, self.spread
        self.arrays, self._removed = dict(zip(map(id, graph.ins), arrays, strict=True)), {}
        self.spread = follow(graph, states or [0] * len(arrays))
        for op in graph.ops:
            if all(id(out) in self.spread.same or self.spread.state(out) for out in op.outs):
                sources = [self.spread.same.get(id(out)) for out in op.outs]
                results = [None if own is None else self.read(own) for own in sources]
            else:
                with jaxprs.context(op.equation, op.scope):
                    results = self._run(op, [self.read(value) for value in op.ins])
            for value, array in zip(op.outs, results, strict=True):
                if array is not None and tuple(array.shape) != self.shape(value):
                    raise ValueError(
                        f"`{op.name}` {op.where} must give shape {self.shape(value)} under the "
                        f"plan, but gave {tuple(array.shape)}; please report this."
                    )
                self.arrays[id(value)] = array
        found = [self.read(value) for value in graph.outs]
        results = [
            None if array is None else jaxprs.as_output(array, value.aval)
            for array, value in zip(found, graph.outs, strict=True)
        ]
        self.arrays, self._removed, self.spread = outer
        return results

    def _run(self, op: Op, operands: list[Any]) -> list[Any]:
        """Runs one operation on smaller arrays."""
        if op.name != "scan" and op.name not in CALLS:
            operands = [
                self.zeros(value) if array is None else array
                for value, array in zip(op.ins, operands, strict=True)
            ]
        rule = RULES.get(op.name)
        if rule is None or rule.run is None or not (op.inner or self._shrinks(op)):
            return self.bind(op, operands)
        return rule.run(self, op, operands)

    def zeros(self, value: Value) -> Any:
        """Makes the smaller array of a value that is zero."""
        return jnp.zeros(self.shape(value), value.aval.dtype)

    def bind(self, op: Op, arrays: Sequence[Any]) -> list[Any]:
        """Runs the primitive unchanged."""
        return jaxprs.bind(op.primitive, op.equation.params, arrays)

    def _shrinks(self, op: Op) -> bool:
        values = [*op.ins, *op.outs]
        return any(self.shape(value) != tuple(value.aval.shape) for value in values)


def _alike(arrays: Sequence[Any], dimension: int) -> list[Any]:
    """Repeats arrays of size 1 along a dimension to the size of the others."""
    longest = max([array.shape[dimension] for array in arrays if array.ndim], default=1)

    def spread(array: Any) -> Any:
        is_one = array.ndim and array.shape[dimension] == 1
        return jnp.repeat(array, longest, dimension) if is_one else array

    return list(map(spread, arrays))
