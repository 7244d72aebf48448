"""Erdos-Renyi budgets, which depend on the meaning of a kernel's dimensions."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxprune import trees
from jaxprune.budgets._rules import (
    Budget,
    BudgetRule,
    Shape,
    at_all,
    fill,
    keep_counts,
    of_one,
    sizes_of,
    smallest,
    with_all,
)

__all__ = ["by_layout", "erdos_renyi", "erdos_renyi_kernel"]

# Sizes that count as a window: odd, because numbers of layers, heads and experts are rarely odd.
_WINDOW_SIZES = range(1, 16, 2)


def erdos_renyi(shapes: Mapping[str, Shape], sparsity: float) -> Budget:
    """Follows the Erdos-Renyi distribution: a layer with more inputs and outputs is sparser.

    The density of a leaf is proportional to `(n_in + n_out) / (n_in * n_out)`. Leaves whose density
    would exceed 1 remain dense, and the others share the rest of the budget. The counts are exact:
    a count that is not an integer is rounded by largest remainder, ties to the earlier leaf, and
    every leaf keeps at least one weight.

    The dimensions of a matrix are `n_in` and `n_out`, in either order. A vector counts as
    `n_in = 1`, a scalar as `n_in = n_out = 1`. A leaf of four dimensions counts as the kernel of a
    convolution, with its window first or last, if exactly one of its two ends can be a window: two
    odd sizes up to 15 that are equal or one of which is 1. All other leaves need an explanation:
    name stacks of layers with `stacked=`, other kernels with `by_layout`.

    Args:
        shapes: shapes of the pruned leaves by path, in flattening order.
        sparsity: fraction to prune, in [0, 1).

    Returns:
        A `Budget` whose floors add up to its total.

    Raises:
        ValueError: if the sparsity keeps less than one weight for each leaf; lists every leaf whose
            inputs and outputs would have to be guessed.

    Example:
        >>> erdos_renyi({"a": (100, 100), "b": (100, 10), "c": (10, 10)}, 0.5)
        Budget(total=5550, floors=(4450, 1000, 100))

    References:
        D. C. Mocanu, E. Mocanu, P. Stone, P. H. Nguyen, M. Gibescu, A. Liotta, Scalable Training
        of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by Network
        Science, arXiv:1707.04780.
    """

    return of_one(_in_proportion(_matrices, "erdos_renyi"), shapes, sparsity)


def erdos_renyi_kernel(shapes: Mapping[str, Shape], sparsity: float) -> Budget:
    """Follows the Erdos-Renyi-kernel distribution: `erdos_renyi` that counts the window as well.

    The density of a leaf is proportional to the sum of its dimensions divided by their product:
    `(n_in + n_out + width + height) / (n_in * n_out * width * height)` for a convolution.
    Everything else is as in `erdos_renyi`, except that either end of a convolution's kernel may be
    the window. If all leaves are matrices, both rules give the same budget. A scalar counts as a
    vector of one weight.

    Args:
        shapes: shapes of the pruned leaves by path, in flattening order.
        sparsity: fraction to prune, in [0, 1).

    Returns:
        A `Budget` whose floors add up to its total.

    Raises:
        ValueError: if the sparsity keeps less than one weight for each leaf; lists every leaf whose
            dimensions would have to be guessed.

    Example:
        >>> erdos_renyi_kernel({"1x1": (1, 1, 64, 64), "3x3": (3, 3, 64, 64)}, 0.9)
        Budget(total=4096, floors=(2017, 2079))

    References:
        U. Evci, T. Gale, J. Menick, P. S. Castro, E. Elsen, Rigging the Lottery: Making All
        Tickets Winners, arXiv:1911.11134.
    """

    return of_one(_in_proportion(_dimensions, "erdos_renyi_kernel"), shapes, sparsity)


def _matrices(kernel: Shape) -> int:
    """Returns the rate of a kernel for `erdos_renyi`: inputs and outputs at each position."""
    n_in, n_out = (1, 1, *kernel)[-2:]
    return math.prod(kernel[:-2]) * (n_in + n_out)


def _dimensions(kernel: Shape) -> int:
    """Returns the rate of a kernel for `erdos_renyi_kernel`: the sum of its dimensions."""
    return sum(kernel) if kernel else 1


def by_layout(rule: BudgetRule, layouts: Mapping[str, Any]) -> BudgetRule:
    """Makes a budget rule that sees every leaf as `(*positions, inputs, outputs)`.

    Several input or output axes, such as the heads and the width of attention, count as one axis of
    their product. Layouts belong to whole leaves: the copies of a stacked layer, whose paths end in
    their number, are looked up by the path of their stack. A leaf without a layout keeps its shape
    if it has at most two dimensions, as a lookup table does.

    Args:
        rule: `erdos_renyi`, `erdos_renyi_kernel` or a different function `(shapes, sparsity) ->
            Budget`.
        layouts: from `jaxprune.layouts.find`.

    Returns:
        A function `(shapes, sparsity) -> Budget`.

    Raises:
        ValueError: from the returned function, lists every leaf of three or more dimensions without
            a layout, and every leaf whose number of dimensions differs from that of one copy in its
            layout.

    Example:
        >>> from jaxprune.layouts import Layout
        >>> layouts = {"query": Layout(inputs=(0,), outputs=(1, 2))}
        >>> shapes = {"query": (64, 4, 16), "out": (64, 64)}
        >>> by_layout(erdos_renyi_kernel, layouts)(shapes, 0.5)
        Budget(total=4096, floors=(2048, 2048))
    """

    trees.check_function(
        "rule",
        rule,
        "(shapes, sparsity) -> Budget",
        "For sparsities by name, write `budgets.named({...}, budgets.by_layout(rule, layouts))`.",
    )

    def kernels_of(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        kernels = {path: _kernel(path, shape, layouts) for path, shape in shapes.items()}
        problems = [
            f"{p}: shape {shapes[p]}, {k}" for p, k in kernels.items() if isinstance(k, str)
        ]
        trees.raise_for(
            problems,
            "`layouts` must say what the dimensions of each leaf are. Find the layouts of the tree "
            "that is pruned (`found = jaxprune.layouts.find(function, params, *args)`), name the "
            "axes of copies with `stacked=found.stacked`, or exclude these leaves with "
            "`prunable`:",
        )
        return {path: k for path, k in kernels.items() if not isinstance(k, str)}

    def of_kernels(shapes: Mapping[str, Shape], sparsity: float) -> Budget:
        return rule(kernels_of(shapes), sparsity)

    def of_all(shapes: Mapping[str, Shape], sparsities: np.ndarray) -> Any:
        return at_all(rule, kernels_of(shapes), sparsities.tolist())

    return with_all(of_kernels, of_all)


class _Kernel(tuple[int, ...]):
    """A shape whose order is known to be `(*positions, inputs, outputs)`."""


def _kernel(path: str, shape: Shape, layouts: Mapping[str, Any]) -> Shape | str:
    """Returns the shape of one copy of a leaf as a kernel, or the reason why it is not known."""
    whole = path if path in layouts else re.sub(r"\[[\d, ]+\]$", "", path)
    if whole not in layouts:
        reason = getattr(layouts, "reason", lambda path: "not in `layouts`")(whole)
        return shape if len(shape) <= 2 else f"no layout was found: {reason}"
    layout = layouts[whole]
    left = [axis for axis in range(sum(map(len, layout))) if axis not in layout.copies]
    if len(left) != len(shape):
        copies = f", and axes {layout.copies} of the leaf number copies" if layout.copies else ""
        return f"but one copy has {len(left)} dimensions{copies}"
    size = dict(zip(left, shape, strict=True))
    inputs, outputs = (math.prod(size[a] for a in part) for part in layout[:2])
    return _Kernel((*(size[axis] for axis in layout.positions), inputs, outputs))


def _rates(rate: Callable[[Shape], int], shapes: Mapping[str, Shape], name: str) -> list[int]:
    """Returns the rate of each leaf; raises where its inputs and outputs would be a guess."""

    def is_window(pair: Shape) -> bool:
        known = all(size in _WINDOW_SIZES for size in pair)
        return known and (pair[0] == pair[1] or 1 in pair)

    def possible(shape: Shape) -> set[int]:
        if len(shape) <= 2 or isinstance(shape, _Kernel):
            return {rate(shape)}
        turned = (shape, (*shape[2:], *shape[:2])) if len(shape) == 4 else ()
        return {rate(kernel) for kernel in turned if is_window(kernel[:2])}

    rates = {path: possible(shape) for path, shape in shapes.items()}
    trees.raise_for(
        [f"{path}: shape {shapes[path]}" for path, found in rates.items() if len(found) != 1],
        f"`{name}` must know which dimensions of each leaf are inputs and outputs. If a leaf is a "
        "stack of layers, name the axes that number them, with "
        '`stacked=jaxprune.stacks.under("layers")` or `stacked=found.stacked`. If it is a kernel '
        f"of a different shape, write `budget=budgets.by_layout(budgets.{name}, found)`. Only a "
        "stack of such kernels needs both. Here `found = jaxprune.layouts.find(function, params, "
        "*args)`. Not known for:",
    )
    return [rate for (rate,) in rates.values()]


def _in_proportion(rate: Callable[[Shape], int], name: str) -> Callable[..., Any]:
    """Makes `at_all` of a rule that keeps counts in proportion to rates, one weight at least."""

    def of_all(shapes: Mapping[str, Shape], sparsities: np.ndarray) -> Any:
        rates, sizes = _rates(rate, shapes, name), sizes_of(shapes)
        most = list(sizes.values())
        (totals,) = keep_counts([sum(most)], sparsities).T
        for row in np.flatnonzero(totals < len(sizes))[:1]:
            trees.raise_for(
                smallest(sizes),
                f"`sparsity` {sparsities[row]} keeps {totals[row]} of {sum(most)} weights, fewer "
                f"than one for each of {len(sizes)} leaves. Lower `sparsity`, or exclude small "
                "leaves with `prunable`. The smallest are:",
            )
        return totals, fill(rates, [1] * len(most), most, totals)

    return of_all


with_all(erdos_renyi, _in_proportion(_matrices, "erdos_renyi"))
with_all(erdos_renyi_kernel, _in_proportion(_dimensions, "erdos_renyi_kernel"))
