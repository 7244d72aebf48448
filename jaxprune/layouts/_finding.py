"""Finds the layout of each leaf from a function and its parameters."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import trees
from jaxprune.jaxprs import abstract
from jaxprune.layouts._kernels import Layout
from jaxprune.layouts._views import view_of
from jaxprune.layouts._walk import Found, Take, Value, walk

__all__ = ["Layouts", "capture", "find"]


class Layouts(Mapping[str, Layout]):
    """The layouts of the leaves that are kernels, by path; immutable. `find` makes one.

    Args:
        layouts: layout by path, in the order of the parameters.
        reasons: why each of the other leaves has no layout, by path.
        copies: axes that number copies, by path, for leaves whose layout does not name them.

    Example:
        >>> layouts = Layouts({"kernel": Layout((0,), (1,))}, {"table": "used by `gather`"})
        >>> layouts["kernel"].inputs, layouts.reason("table"), "table" in layouts
        ((0,), 'used by `gather`', False)
        >>> layouts.reason("kernl")
        'there is no such leaf among the parameters whose layouts were found; did you mean kernel?'
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        reasons: Mapping[str, str],
        copies: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._layouts = MappingProxyType(dict(layouts))
        self.reasons = MappingProxyType(dict(reasons))
        self._copies = MappingProxyType(dict(copies or {}))

    def __getitem__(self, path: str) -> Layout:
        return self._layouts[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)

    def __repr__(self) -> str:
        return f"Layouts({dict(self._layouts)}, {dict(self.reasons)}, {dict(self._copies)})"

    def reason(self, path: str) -> str:
        """Says why a leaf has no layout."""
        if path in self.reasons:
            return self.reasons[path]
        known = [*self._layouts, *self.reasons]
        ends = [other for other in known if path and other.endswith(f"/{path}")]
        close = ends or difflib.get_close_matches(path, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"there is no such leaf among the parameters whose layouts were found{hint}"

    def stacked(self, path: str, leaf: Any) -> tuple[int, ...] | None:
        """Returns the axes of a leaf that number copies; pass this method as `stacked`.

        If the layout of a leaf has inputs, these are its `copies`. For other leaves, such as biases
        and scales of norms, they are the axes that number copies in every use of the leaf: a scan
        (`jax.lax.scan`, `jax.lax.map`) runs over them, or they are batch dimensions of a product or
        of a lookup, as `jax.vmap` makes them. An elementwise use does not show what `vmap` ran
        over, and an index does not tell a layer from a row of a table.

        Args:
            path: the path of the leaf.
            leaf: anything; it is ignored.

        Returns:
            Ascending tuple of axes, or None if no axis is proven to number copies.

        Example:
            >>> def apply(params, x):
            ...     return jax.lax.scan(lambda x, p: ((x * p["mix"]) @ p["w"], None), x, params)
            >>> params = {"mix": jnp.ones((3, 4)), "w": jnp.ones((3, 4, 4))}
            >>> found = find(apply, params, jnp.ones(4))
            >>> "mix" in found, found.stacked("mix", params["mix"])
            (False, (0,))
        """
        del leaf
        if path in self._copies:
            return self._copies[path] or None
        return self[path].copies or None if path in self else None


def find(function: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Layouts:
    """Finds which axes of each leaf are inputs, outputs, window positions and copies.

    The function is traced, never run. A leaf has a layout if the trace proves that it is the
    kernel of products (`dot_general`) or convolutions (`conv_general_dilated`), and that each of
    its axes has the same role in all of them. Before such a use, the leaf may be cast, transposed,
    reshaped, sliced, reversed, or masked or scaled element by element with values that do not
    depend on `args`. It may be scanned over (`jax.lax.scan` over stacked layers), mapped
    (`jax.vmap`), or passed through `jit`, `jax.checkpoint` and custom derivatives. It may also be
    reduced, as in a penalty. A leaf that is looked up, multiplied by another leaf, or used in any
    other way has no layout.

    Args:
        function: function `(params, *args, **kwargs) -> anything` of any framework, such as the
            loss or the model.
        params: tree of arrays, or of `jax.ShapeDtypeStruct`. Pass the tree that is pruned, because
            layouts are looked up by path. Leaves that are not arrays are passed unchanged.
        *args: the other arguments of the function: trees of arrays or shapes; leaves that are not
            arrays are passed unchanged.
        **kwargs: its keyword arguments, like `args`.

    Returns:
        `Layouts`: an immutable mapping from path to `Layout`. Its `reason(path)` says why a leaf
        has no layout. Its method `stacked` can be passed as the argument of that name: with
        `found = layouts.find(...)` write `stacked=found.stacked`. This method also knows the copies
        of leaves without a layout.

    Raises:
        ValueError: if two leaves have the same path.

    Example:
        >>> def apply(params, tokens):
        ...     x = params["table"][tokens]
        ...     heads = jnp.einsum("td,dhk->thk", x, params["query"])
        ...     hidden, _ = jax.lax.scan(lambda x, w: (x @ w.T, None), x, params["layers"])
        ...     return heads, hidden
        >>> params = {"table": jnp.ones((9, 4)), "query": jnp.ones((4, 2, 2))}
        >>> params["layers"] = jnp.ones((3, 4, 4))
        >>> layouts = find(apply, params, jnp.zeros(5, int))
        >>> layouts["query"]
        Layout(inputs=(0,), outputs=(1, 2), positions=(), copies=())
        >>> layouts["layers"]
        Layout(inputs=(2,), outputs=(1,), positions=(), copies=(0,))
        >>> layouts.reason("table")
        'used by `gather`'
    """
    leaves, (data, given) = trees.leaf_by_path(params), jax.tree.flatten((args, kwargs))
    treedef = jax.tree.structure(params)
    arrays = {path: abstract(leaf) for path, leaf in leaves.items() if _is_array(leaf)}
    wanted = [path for path, leaf in arrays.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    found: list[Found] = []

    def call(by_path: dict[str, Any], inputs: list[Any]) -> Any:
        tree = treedef.unflatten([by_path.get(path, leaf) for path, leaf in leaves.items()])
        rest = iter(inputs)
        args, kwargs = given.unflatten([next(rest) if _is_array(x) else x for x in data])
        return function(tree, *args, **kwargs)

    def trace(by_path: dict[str, Any], inputs: list[Any]) -> None:
        found.append(capture(call, by_path, inputs, wanted))

    jax.eval_shape(trace, arrays, [abstract(leaf) for leaf in data if _is_array(leaf)])
    reasons = {path: "is not an array" for path in leaves if path not in arrays}
    reasons |= {p: f"has dtype {x.dtype}" for p, x in arrays.items() if p not in wanted}
    for path, reason in found[0].problems:
        reasons.setdefault(path, reason)
    known: dict[str, Layout] = {}
    for path in leaves:
        if path not in reasons:
            use = found[0].uses.get(path)
            layout = use.layout if use else "the function never multiplies it"
            if isinstance(layout, str):
                reasons[path] = layout
            else:
                known[path] = layout
    reasons = {path: reasons[path] for path in leaves if path in reasons}
    unsaid = [path for path in leaves if path not in known or not known[path].inputs]
    copies = {path: tuple(sorted(found[0].copies.get(path, ()))) for path in unsaid}
    return Layouts(known, reasons, copies)


def capture(
    function: Callable[[Any, Any], Any],
    leaves: Mapping[str, Any],
    inputs: Any,
    wanted: Sequence[str],
    take: Take | None = None,
    *,
    step: jax.Array | None = None,
) -> Found:
    """Follows leaves through a function to the products in which they are kernels.

    Args:
        function: function `(leaves, inputs) -> anything`.
        leaves: arrays by path; may be traced.
        inputs: tree of arrays; may be traced.
        wanted: paths of the leaves to follow.
        take: None; or function `Use -> (statistic, rows)`, called at each product. With it, leaves
            must be used unchanged: no slices but single copies, and no elementwise functions but
            the addition of something that does not depend on `inputs`.
        step: of a scan over stacked leaves, the step at which `take` is called, integer []; the
            statistics are then those of one copy, and so is their size. None: all steps.

    Returns:
        `Found`: by path, the `uses`, the sums of statistic and rows over them, and the `scans` over
        leaves; and `problems`, pairs of path and reason.

    Example:
        >>> leaves = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
        >>> found = capture(lambda p, x: x @ p["w"] + p["b"], leaves, jnp.ones(2), ["w", "b"])
        >>> found.uses["w"].layout, found.problems
        (Layout(inputs=(0,), outputs=(1,), positions=(), copies=()), [('b', 'used by `add`')])
    """
    leaves = dict(leaves)

    def outputs(arrays: list[Any], inputs: Any) -> list[Any]:
        result = function(dict(zip(leaves, arrays, strict=True)), inputs)
        return [x for x in jax.tree.leaves(result) if _is_array(x)]

    # The leaves are passed as a list, because tracing would sort the keys of a dict.
    closed = jax.make_jaxpr(outputs)(list(leaves.values()), inputs)
    values = [
        Value(leaf, view_of(path, jnp.shape(leaf)) if path in wanted else None)
        for path, leaf in leaves.items()
    ]
    values += [Value(leaf, data=True) for leaf in jax.tree.leaves(inputs)]
    found = Found(take, step, {}, {}, [], {}, {})
    walk(closed.jaxpr, closed.consts, values, found)
    return found


def _is_array(leaf: Any) -> bool:
    """Returns whether a leaf is a JAX or NumPy array, or its abstract value."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)
