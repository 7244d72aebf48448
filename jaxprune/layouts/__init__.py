"""Finds which axes of a parameter are inputs, outputs, window positions and copies of a layer.

Frameworks store kernels in different orders: `[in, out]`, `[out, in]`, `[d, heads, width]`, with
the window first or last, or with many layers in one array. N:M groups must lie along the inputs,
and Erdos-Renyi budgets count them. `find` reads the order from the jaxpr of the function that uses
the parameters. `patterns.n_m`, `patterns.channels` and `budgets.by_layout` accept its result.
"""

from jaxprune.layouts._finding import Layouts, capture, find
from jaxprune.layouts._kernels import Arrangement, Layout
from jaxprune.layouts._views import Atom, View, same_values, view_of
from jaxprune.layouts._walk import Found, Scan, Use, Value, walk

__all__ = [
    "Arrangement",
    "Atom",
    "Found",
    "Layout",
    "Layouts",
    "Scan",
    "Use",
    "Value",
    "View",
    "capture",
    "find",
    "same_values",
    "view_of",
    "walk",
]
