"""Turns the stacked layers of a scan into a list, so that each layer can have its own widths."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxprune import jaxprs, trees
from jaxprune.jaxprs import abstract, on_arrays
from jaxprune.trees import is_array

_INLINED = frozenset("jit pjit closed_call core_call xla_call".split())
_REMAT = frozenset("remat2 checkpoint remat".split())
_ROW_BY_ROW = frozenset("convert_element_type reduce_precision copy copy_p".split())


class Unstacked(NamedTuple):
    """Variables whose stacked leaves are lists of layers, from `unstack`.

    Example:
        >>> Unstacked._fields
        ('variables', 'structure', 'stacked')
    """

    variables: Any
    structure: Any  # of the tree with stacked leaves
    stacked: tuple[str, ...]  # paths of the leaves that were stacked

    def wrap(
        self, function: Callable[..., Any], updates: Callable[[Any], Any] | None = None
    ) -> Callable[..., Any]:
        """Makes the same function of variables with lists; its scans over layers are unrolled.

        Args:
            function: `function(variables, *args, **kwargs)` of the stacked variables.
            updates: as for `Trace`, if the function returns new values of stacked leaves, such as
                caches. These are lists, too.

        Returns:
            A function for `find_groups` and `Plan.wrap`. It runs on dense layers only; the one from
            `Plan.wrap` runs on layers of different widths.
        """

        @functools.wraps(function)
        def by_layer(variables: Any, *args: Any, **kwargs: Any) -> Any:
            own = self.structure.flatten_up_to(variables)
            tree = self.structure.unflatten([_type(leaf) for leaf in own])
            call, arrays, box = on_arrays(function, tree, *args, **kwargs)
            closed = jax.make_jaxpr(call)(list(map(abstract, arrays)))
            given = [
                _Rows(leaf) if isinstance(leaf, list) else leaf
                for leaf in own
                if isinstance(leaf, list) or is_array(leaf)
            ]
            outs = _evaluate(closed.jaxpr, closed.consts, [*given, *arrays[len(given) :]])
            lists = set()
            if updates is not None:
                new = trees.leaf_by_path(updates(box[0](range(len(outs)), False)))
                lists = {index for path, index in new.items() if path in self.stacked}
            return box[0](
                [list(_rows(out)) if i in lists else _stack(out) for i, out in enumerate(outs)]
            )

        return by_layer


def unstack(variables: Any, stacked: Callable[[str, Any], Any]) -> Unstacked:
    """Splits stacked layers into lists, so that each layer can keep its own widths.

    Args:
        variables: tree of arrays; layers are stacked along the first axis.
        stacked: `(path, leaf) -> axis or None`, such as `stacks.under("layers")`.

    Returns:
        The variables with a list of layers in place of each stacked leaf, and `wrap` for functions.

    Raises:
        ValueError: if no leaf is stacked, or one along a different axis than the first; it lists
            them.

    Example:
        >>> from jaxprune import stacks
        >>> from jaxprune.structure import find_groups
        >>> def net(w, x):
        ...     def body(x, layer):
        ...         return jax.nn.relu(x @ layer["up"]) @ layer["down"], None
        ...     return jax.lax.scan(body, x, w["layers"])[0]
        >>> w = {"layers": {"up": jnp.ones((2, 3, 8)), "down": jnp.ones((2, 8, 3))}}
        >>> layers, x = unstack(w, stacks.under("layers")), jnp.ones((1, 3))
        >>> groups = find_groups(layers.wrap(net), layers.variables, x)
        >>> plan = groups.plan({"layers/up/0:1": jnp.arange(8) < 5}, multiple=1)
        >>> [leaf.shape for leaf in plan.compact(layers.variables)["layers"]["up"]]
        [(3, 5), (3, 8)]
    """
    leaves = trees.leaf_by_path(variables)
    axes = {path: stacked(path, leaf) for path, leaf in leaves.items() if is_array(leaf)}
    named = {path: own for path, own in axes.items() if own is not None}
    trees.raise_for(
        [f"{path}: {own}" for path, own in named.items() if own not in (0, (0,))],
        "`stacked` must give the first axis, 0, which scans run over:",
    )
    if not named:
        raise ValueError("`stacked` must match a leaf of `variables`, but matches none.")
    structure = jax.tree.structure(variables)
    lists = [
        [leaf[row] for row in range(leaf.shape[0])] if path in named else leaf
        for path, leaf in leaves.items()
    ]
    return Unstacked(structure.unflatten(lists), structure, tuple(named))


class _Rows(NamedTuple):
    """A stack of arrays that has not been put together."""

    rows: Sequence[Any]


def _type(leaf: Any) -> Any:
    """Returns a leaf of the stacked tree, from a list as the type of its stack."""
    if not isinstance(leaf, list):
        return leaf
    return abstract(leaf[0], (len(leaf), *leaf[0].shape))


def _stack(value: Any) -> Any:
    return jnp.stack(value.rows) if isinstance(value, _Rows) else value


def _rows(value: Any) -> Sequence[Any]:
    return value.rows if isinstance(value, _Rows) else value


def _evaluate(jaxpr: Any, consts: Sequence[Any], ins: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr on arrays and rows; scans over rows become one layer after the other."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= zip(jaxpr.invars, ins, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        with jaxprs.context(equation):
            known |= zip(
                equation.outvars, _apply(equation, [read(v) for v in equation.invars]), strict=True
            )
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, operands: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if not any(isinstance(own, _Rows) for own in operands):
        return jaxprs.bind(equation.primitive, params, operands)
    if name in _INLINED:
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        return _evaluate(inner.jaxpr, inner.consts, operands)
    if name in _REMAT:
        call = jax.checkpoint(
            lambda *args: _evaluate(params["jaxpr"], (), args),
            prevent_cse=params["prevent_cse"],
            policy=params["policy"],
        )
        return call(*operands)
    if name == "scan":
        return _unrolled(equation, operands)
    if name in _ROW_BY_ROW:
        rows = [jaxprs.bind(equation.primitive, params, [row])[0] for row in operands[0].rows]
        return [_Rows(rows)]
    return jaxprs.bind(equation.primitive, params, list(map(_stack, operands)))


def _unrolled(equation: Any, operands: list[Any]) -> list[Any]:
    """Runs a scan one pass after the other, with the rows of its stacks."""
    first, count = jaxprs.scan_counts(equation.params, len(operands))
    fixed, xs = list(map(_stack, operands[: first + count])), operands[first + count :]
    body, carry, length = equation.params["jaxpr"], fixed[first:], equation.params["length"]
    results: list[Any] = [None] * length
    order = range(length)
    for place in reversed(order) if equation.params["reverse"] else order:
        row = [_rows(own)[place] for own in xs]
        outs = _evaluate(body.jaxpr, body.consts, [*fixed[:first], *carry, *row])
        carry, results[place] = list(map(_stack, outs[:count])), list(map(_stack, outs[count:]))
    return [*carry, *(_Rows(rows) for rows in zip(*results, strict=True))]
