"""Follows a traced function once and finds which indices of its parameters belong together.

Read `_values` first: it defines the facts that are known of removed entries.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core, source_info_util

from jaxprune import jaxprs
from jaxprune.structure._nodes import FROZEN, Nodes, rows_of
from jaxprune.structure._rules import (
    control,
    devices,
    elementwise,
    indexing,
    products,
    reductions,
    scans,
    shapes,
)
from jaxprune.structure._values import (
    ALWAYS_SAME,
    ALWAYS_ZERO,
    NOTHING,
    SAME,
    SAME_GATE,
    SAME_SOFT,
    UNGATED,
    ZERO,
    ZERO_GATE,
    ZERO_SOFT,
    Graph,
    Op,
    Rule,
    Split,
    Value,
)

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **shapes.RULES,
    **products.RULES,
    **reductions.RULES,
    **indexing.RULES,
    **control.RULES,
    **scans.RULES,
    **devices.RULES,
}
INLINED = {"jit", "pjit", "closed_call", "core_call", "xla_call"}
CALLING = {*control.RULES, "scan", "shard_map"}  # primitives that run functions
# Primitives that only move entries: nothing is computed from the entries that they leave out.
_MOVES = frozenset(
    "slice split squeeze reshape transpose broadcast_in_dim convert_element_type copy".split()
)
_NO_SCOPE = source_info_util.new_name_stack()
_FEW = 65536  # constants with at most this many entries are inspected
# Each fact beside its two stronger forms; `_values` says what they mean.
_SOFT = {ZERO: ZERO_SOFT, SAME: SAME_SOFT}
_GATE = {ZERO: ZERO_GATE, SAME: SAME_GATE}


class Analysis:
    """The state of one pass over a function.

    Args:
        consumers: `(leaf, dimension)` pairs that only consume a width, from an earlier pass.
        factors: split -> the factor of that dimension that may shrink; see `split_factor`.
        vectors: leaves that an earlier pass found in `vectors` but not in `tables`.

    Example:
        >>> analysis = Analysis()
        >>> leaf = analysis.leaf(jax.ShapeDtypeStruct((2, 3), "float32"), zeroed=True)
        >>> [nodes.tolist() for nodes in leaf.nodes]
        [[1, 2], [3, 4, 5]]
    """

    def __init__(
        self,
        consumers: frozenset[tuple[int, int]] = frozenset(),
        factors: Mapping[Split, int] | None = None,
        vectors: frozenset[int] = frozenset(),
    ) -> None:
        """Starts without a function."""
        self.nodes = Nodes()
        self.leaves: list[Value] = []
        self.used: set[int] = set()  # leaves that some operation reads
        self._used_nodes: dict[int, np.ndarray] = {}  # by identity: many values share their nodes
        # Leaves come first, so their nodes are 1, 2, ... in order.
        self._places: list[tuple[int, int]] = []  # (leaf, dimension)
        self._starts: list[int] = []  # the first node of each place, minus 1
        self._leaf_nodes = 0
        self.known_consumers = consumers
        self.factors = dict(factors or {})
        self.splits: dict[Split, list[np.ndarray]] = {}  # nodes of the factor that may shrink
        self.consumers: set[tuple[int, int]] = set()
        self.producers: set[tuple[int, int]] = set()
        self.freezes: list[tuple[list[tuple[int, int]], str]] = []  # (dimensions frozen, reason)
        self.inexact: list[tuple[np.ndarray, str]] = []  # (nodes, reason), see `Group.reasons`
        self.ungated: list[np.ndarray] = []  # nodes that zeroing vectors alone does not remove
        self.rests: list[tuple[np.ndarray, frozenset[int]]] = []  # nodes, and vectors that remove
        self.known_vectors = vectors
        # How parameters meet data: entry by entry along one dimension, or in any other way.
        self.vectors: set[int] = set()
        self.tables: set[int] = set()
        self.kernels: set[int] = set()  # leaves with two or more dimensions in one product
        self.scales: set[int] = set()  # vectors that multiply data, so that their zeros remove it
        self.layers: list[
            np.ndarray
        ] = []  # nodes of the rows of stacked blocks, see `_rules/scans`
        self.copies: list[np.ndarray] = []  # nodes that products only repeat over, such as heads
        self.unknown: dict[str, int] = {}  # primitive -> how often it froze something
        self.op = Op("update", None, {}, [], [], "of a variable")  # the current operation
        self.symbolic = False  # whether some sizes are symbols
        self.rule_stack: list[tuple[Any, dict]] = []  # derivative rules being followed

    # ---- values

    def leaf(self, aval: Any, zeroed: bool, cached: bool = False) -> Value:
        """Makes a variable: a parameter that masks zero (`zeroed`), a cache, or other state."""
        index, value = len(self.leaves), Value(aval, of_params=not cached)
        value.leaf = index
        is_vector = zeroed and (
            index in self.known_vectors or sum(size > 1 for size in value.shape) <= 1
        )
        value.support = frozenset([index]) if is_vector else frozenset()
        for dimension, size in enumerate(value.shape):
            value.nodes.append(self.nodes.new(size, True) if size > 1 else frozen(size))
            if size > 1:
                self._places.append((index, dimension))
                self._starts.append(self._leaf_nodes)
                self._leaf_nodes += size
            facts = NOTHING
            if zeroed or cached:
                facts = ALWAYS_ZERO if is_vector else UNGATED
            if (index, dimension) in self.known_consumers:
                facts = ZERO | SAME
            value.facts.append(np.full(size, facts, np.uint8))
            value.origins.append(frozenset([(index, dimension)]) if zeroed else frozenset())
        self.leaves.append(value)
        return value

    def data(self, aval: Any) -> Value:
        """Makes an input that keeps its shape."""
        value = Value(aval, of_data=True)
        self.fix(value)
        return value

    def constant(self, array: Any) -> Value:
        """Makes an array that the function holds; it shrinks with whatever it is combined with."""
        aval = jax.typeof(array)
        value = Value(aval, of_params=True, of_data=True, constant=array)
        value.nodes = [self.nodes.new(n) if n > 1 else frozen(n) for n in value.shape]
        value.origins = [frozenset()] * len(value.shape)
        is_plain = not jnp.issubdtype(aval.dtype, jax.dtypes.extended)
        if is_plain and not isinstance(array, Tracer) and 0 < math.prod(aval.shape) <= _FEW:
            numbers = np.asarray(array)
            if (numbers == numbers.flat[0]).all():
                value.number = numbers.flat[0].item()
        facts = ALWAYS_SAME if is_plain else NOTHING
        facts = ALWAYS_ZERO if value.number == 0 else facts
        value.facts = [np.full(n, facts, np.uint8) for n in value.shape]
        return value

    def fix(self, value: Value) -> None:
        """Makes a value keep its shape, with nothing else known about it."""
        value.nodes = [frozen(n) for n in value.shape]
        value.facts = [np.zeros(n, np.uint8) for n in value.shape]
        value.origins = [frozenset()] * len(value.shape)

    # ---- used by rules

    def root(self, nodes: np.ndarray) -> np.ndarray:
        """Returns the root of each node, see `Nodes.root`."""
        return self.nodes.root(nodes)

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Joins nodes pairwise, see `Nodes.unite`; what joins a frozen node is noted as frozen."""
        if a is b:
            return
        roots_a, roots_b = self.root(a), self.root(b)
        if (roots_a == roots_b).all():
            return
        frozen_a, frozen_b = roots_a == FROZEN, roots_b == FROZEN
        for nodes in (a[frozen_b & ~frozen_a], b[frozen_a & ~frozen_b]):
            self.freeze(nodes, f"`{self.op.name}` {self.op.where} joins it to a fixed width")
        self.nodes.unite(roots_a, roots_b)

    def split_factor(self, roots: np.ndarray) -> int:
        """Chooses which factor may shrink when a reshape splits a dimension; returns its index.

        Only one factor may shrink. It is the outermost, unless `factors` names a different one
        because an earlier pass found the outermost frozen.

        Args:
            roots: int64, one dimension for each factor.
        """
        for factor in range(roots.ndim):  # no choice where the entries are tied along a factor
            along = rows_of(roots, factor)
            if (along == along[:, :1]).all():
                return factor
        own = set(roots.flat)
        for split, factor in self.factors.items():
            if split.sizes == roots.shape and int(self.root(np.array([split.node]))[0]) in own:
                return factor
        return 0

    def note_split(self, roots: np.ndarray, nodes: np.ndarray) -> None:
        """Notes the nodes of the factor that may shrink."""
        free = roots[roots != FROZEN]
        if len(free) and self.nodes.of_leaf[free.min()]:
            self.splits.setdefault(Split(int(free.min()), roots.shape), []).append(nodes)

    def use(self, values: Sequence[Value]) -> None:
        """Notes that values enter a computation or are an output."""
        for value in values:
            self._used_nodes.update((id(nodes), nodes) for nodes in value.nodes)

    def mark_used(self) -> None:
        """Marks the classes of all nodes that `use` noted; classes only grow, so once is enough."""
        for nodes in self._used_nodes.values():
            if nodes.any():
                self.nodes.used[self.root(nodes)] = True

    def is_free(self, nodes: np.ndarray) -> np.ndarray:
        """Tells for each node whether it may be removed, as bools."""
        return ~self.nodes.is_frozen(nodes)

    def has_leaves(self, nodes: np.ndarray) -> bool:
        """Tells whether all nodes may be removed, and belong to variables."""
        roots = self.root(nodes)
        return bool((roots != FROZEN).all() and self.nodes.of_leaf[roots].all())

    def any_free(self, values: Sequence[Value]) -> bool:
        """Tells whether any index of the values may be removed."""
        return any(self.is_free(nodes).any() for value in values for nodes in value.nodes)

    def freeze(self, nodes: np.ndarray, reason: str) -> None:
        """Marks nodes that must be kept and notes the reason for each dimension of a leaf hit."""
        if not nodes.any():  # the usual case
            return
        roots = self.root(nodes)
        roots = roots[roots != FROZEN]
        if not len(roots):
            return
        if self.nodes.of_leaf[roots].any():
            marked = np.zeros(self.nodes.count, bool)
            marked[roots] = True
            marked = marked[self.nodes.first_roots(self._leaf_nodes)]
            hits = np.logical_or.reduceat(marked, self._starts)
            hit = [place for place, is_hit in zip(self._places, hits, strict=True) if is_hit]
            self.freezes.append((hit, reason))
        self.nodes.unite(roots, np.zeros_like(roots))

    def freeze_all(self, op: Op, reason: str) -> bool:
        """Freezes all operands and keeps the shapes of outputs; returns True for "done"."""
        for value in op.ins:
            for nodes in value.nodes:
                self.freeze(nodes, f"{reason} {op.where}")
        for value in op.outs:
            self.fix(value)
        return True

    def need(self, nodes: np.ndarray, facts: np.ndarray, fact: np.uint8, reason: str) -> None:
        """Freezes the nodes that lack a fact (`ZERO` or `SAME`) which removing them relies on."""
        free = self.is_free(nodes)
        bad = free & (facts & fact == 0)
        if bad.any():
            self.freeze(nodes[bad], reason)
        unless = free & ~bad & (facts & _SOFT[fact] == 0)
        if unless.any():
            self.inexact.append((nodes[unless], reason))
        gated = facts & _GATE[fact] > 0
        self.ungated.append(nodes[free & ~bad & ~gated])
        self.rest(nodes[free & gated], *[value.support for value in self.op.ins])

    def rest(self, nodes: np.ndarray, *supports: frozenset[int]) -> None:
        """Notes the vectors whose zeros suffice to remove these nodes."""
        self.rests.append((nodes, frozenset().union(*supports)))

    # ---- following a function

    def graph(self, jaxpr: Any, consts: Sequence[Any], ins: Sequence[Value]) -> Graph:
        """Follows a jaxpr on values."""
        ops: list[Op] = []
        self.symbolic |= any(jaxprs.has_symbols(var.aval.shape) for var in jaxpr.invars)
        outs = self._inline(jaxpr, consts, ins, ops)
        return Graph(list(ins), outs, ops)

    def _inline(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        ins: Sequence[Value],
        ops: list[Op],
        scope: Any = _NO_SCOPE,
        caller: str = "an unknown line",
    ) -> list[Value]:
        known: dict[Any, Value] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            known[var] = const if isinstance(const, Value) else self.constant(const)
        known.update(zip(jaxpr.invars, ins, strict=True))

        def read(atom: Any) -> Value:
            return self.constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for equation in live_equations(jaxpr):
            operands = [read(atom) for atom in equation.invars]
            name = equation.primitive.name
            if name in INLINED:
                inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
                within = scope + equation.source_info.name_stack
                place = jaxprs.line(equation) or caller
                outs = self._inline(inner.jaxpr, inner.consts, operands, ops, within, place)
            else:
                where = jaxprs.line(equation) or caller
                outs = [Value(var.aval) for var in equation.outvars]
                params = equation.params
                if self.symbolic:
                    params = {key: jaxprs.sizes(own) for key, own in params.items()}
                op = Op(name, equation.primitive, params, operands, outs, f"at {where}")
                op.equation, op.scope = equation, scope
                self.used.update(value.leaf for value in operands if value.leaf is not None)
                outer, self.op = self.op, op
                # Functions that are traced on the way, such as derivative rules, need the context.
                calls = name in CALLING
                with jaxprs.context(equation, scope) if calls else contextlib.nullcontext():
                    self._follow(op)
                self.op = outer
                ops.append(op)
            known.update(zip(equation.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _follow(self, op: Op) -> None:
        """Fills in the outputs of an operation with its rule."""
        of_params = all(value.of_params for value in op.ins)
        of_data = all(value.of_data for value in op.ins)
        for out in op.outs:
            out.of_params, out.of_data, out.op = of_params, of_data, op
        if op.name not in _MOVES and op.name != "shard_map":  # the operations in it use them
            self.use(op.ins)
        if not of_params and op.name not in CALLING:
            self._note_meeting(op)
        rule = RULES.get(op.name)
        if rule is None or rule.analyze(self, op) is False:
            if self.any_free(op.ins):
                self.unknown[op.name] = self.unknown.get(op.name, 0) + 1
            self.freeze_all(op, f"primitive `{op.name}` is not understood")
        for out in op.outs:
            if not out.origins:
                out.origins = [frozenset()] * len(out.shape)
            if self.symbolic:
                self._keep_symbols(out)
            for dimension, size in enumerate(out.shape):
                assert len(out.nodes[dimension]) == len(out.facts[dimension]) == size, op.name
                if size == 1:  # removing the one index would change what it broadcasts to
                    self.freeze(out.nodes[dimension], f"size 1 in `{op.name}` {op.where}")
            if of_data:  # no mask changes the value, so its removed entries can be computed
                out.facts = [facts | ALWAYS_SAME for facts in out.facts]
            if out.number == 0:
                out.facts = [np.full(n, ALWAYS_ZERO, np.uint8) for n in out.shape]
            out.support = out.support or self._support(op, out)
            if not of_params:  # a parameter dimension that survives into data is a producer
                self.producers.update(*out.origins)
                out.origins = [frozenset()] * len(out.shape)

    def _keep_symbols(self, out: Value) -> None:
        """Keeps dimensions of symbolic size whole.

        The numbers that stand in for sizes respect no bounds, so a slice may have a different size.
        """
        for dimension, size in enumerate(out.shape):
            nodes = out.nodes[dimension]
            if jaxprs.has_symbols(out.aval.shape[dimension : dimension + 1]) or len(nodes) != size:
                self.freeze(nodes, f"its size is symbolic {self.op.where}")
                out.nodes[dimension], out.facts[dimension] = frozen(size), np.zeros(size, np.uint8)

    def _note_meeting(self, op: Op) -> None:
        """Notes how the parameters among the operands meet data."""
        for value in op.ins:
            if not value.of_params:
                continue
            leaves = {leaf for origins in value.origins for leaf, _ in origins}
            if leaves:
                spans = sum(
                    size > 1 and bool(origins)
                    for size, origins in zip(value.shape, value.origins, strict=True)
                )
                plain = op.name in elementwise.NAMES and spans <= 1
                (self.vectors if plain else self.tables).update(leaves)
                if plain and op.name == "mul" and self._switches(value):
                    self.scales |= value.support

    def _switches(self, value: Value) -> bool:
        """Tells whether zeros in vectors alone make every removable entry of a value 0."""
        return all(
            (facts[self.is_free(nodes)] & ZERO_GATE > 0).all()
            for nodes, facts, origins in zip(value.nodes, value.facts, value.origins, strict=True)
            if origins
        )

    def _support(self, op: Op, out: Value) -> frozenset[int]:
        """Returns the vectors that the facts of a result rest on.

        One factor suffices for a product, so the one with the fewest vectors is taken.
        """
        if op.name == "mul":
            enough = [value.support for value in op.ins if self._makes_zero(value, out)]
            if enough:
                return min(enough, key=len)
        return frozenset().union(*[value.support for value in op.ins])

    def _makes_zero(self, value: Value, out: Value) -> bool:
        """Tells whether one factor alone makes 0 all entries of a product that are known to be."""
        for dimension, nodes in enumerate(out.nodes):
            known = out.facts[dimension] & (ZERO_GATE | SAME_GATE) > 0
            if known.any():
                known &= self.is_free(nodes)
            if known.any():
                spans = value.shape and value.shape[dimension] == len(nodes)
                if not spans or not (value.facts[dimension][known] & ZERO_GATE > 0).all():
                    return False
        return True


def frozen(size: int) -> np.ndarray:
    """Returns `size` nodes that must be kept, int64 [size]."""
    return np.zeros(size, np.int64)


def live_equations(jaxpr: Any) -> list[Any]:
    """Returns the equations whose results are used: dead code must not freeze any dimension."""
    used = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}
    live = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(var in used for var in equation.outvars):
            live.append(equation)
            used.update(var for var in equation.invars if not isinstance(var, core.Literal))
    return live[::-1]
