"""From the traces of a function to its groups."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxprune import trees
from jaxprune.structure._analysis import Analysis
from jaxprune.structure._groups import Groups
from jaxprune.structure._joining import join
from jaxprune.structure._traces import (
    Model,
    Trace,
    Traced,
    analyze,
    broken_caches,
    trace_function,
)
from jaxprune.structure._values import Graph, Split

# Parts of the path of a leaf that is state: it shrinks with the parameters but is never masked.
_STATE = {"batch_stats", "mean", "var"}
_CHOICES = 8  # passes over all traces in which factors of splits may still be tried


def find_groups(
    function: Callable[..., Any] | Sequence[Trace],
    variables: Any,
    *args: Any,
    updates: Callable[[Any], Any] | None = None,
    parameters: Callable[[str, Any], bool] | None = None,
    caches: Callable[[str, Any], bool] | None = None,
) -> Groups:
    """Finds which dimensions of a function's variables can shrink, and which shrink together.

    Nothing runs: the function is traced, and every index of every dimension is followed through its
    operations. An operation that is not understood freezes what it touches.

    Args:
        function: `function(variables, *args)` of any framework; or a list of `Trace` for all
            ways in which the variables will be used, such as evaluation and training.
        variables: tree of arrays or `jax.ShapeDtypeStruct`: parameters and other state.
        *args: arrays or `jax.ShapeDtypeStruct`; batch sizes may be others later.
        updates: see `Trace`.
        parameters: `(path, leaf) -> bool`: what a mask may set to zero. Default floating-point
            leaves that are no caches and whose path has no part such as `batch_stats`, `mean`
            or `var`.
        caches: `(path, leaf) -> bool`: state that is 0 before it is first written, such as keys and
            values of earlier tokens. Default leaves with `cache` in a part of their path.

    Returns:
        The groups.

    Raises:
        ValueError: if `updates` returns something that is not in the variables.

    Example:
        >>> import jax
        >>> def mlp(variables, x):
        ...     return jax.nn.relu(x @ variables["in"]) @ variables["out"]
        >>> variables = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
        >>> group = find_groups(mlp, variables, jnp.ones((1, 3)))["in:1"]
        >>> [(member.path, member.dimension, member.produces) for member in group.members]
        [('in', 1, True), ('out', 0, False)]
    """
    traces = [Trace(function, args, updates)] if callable(function) else list(function)
    leaves = trees.leaf_by_path(variables)
    is_cache = _is_cache if caches is None else caches
    is_parameter = _is_parameter if parameters is None else parameters
    names = {path for path, leaf in leaves.items() if is_parameter(path, leaf)}
    model = Model(
        {path: tuple(jnp.shape(leaf)) for path, leaf in leaves.items()},
        frozenset(names),
        caches=frozenset(path for path in leaves.keys() - names if is_cache(path, leaves[path])),
    )
    traced = [trace_function(trace, variables) for trace in traces]
    tried: dict[Split, int] = {}
    passes: list[tuple[Traced, Analysis, Graph]] = []
    refined, number = None, 0
    while refined != model:
        model = model if refined is None else refined
        passes = [(each, *analyze(model, each)) for each in traced]
        refined = _refine(model, passes, tried, choose=number < _CHOICES)
        number += 1
    return join(model, [analysis for _, analysis, _ in passes])


def _refine(
    model: Model,
    passes: Sequence[tuple[Traced, Analysis, Graph]],
    tried: dict[Split, int],
    choose: bool,
) -> Model:
    """What a pass over all traces taught: what consumes, which caches do not stay 0, and, if it may
    `choose`, another factor of each split whose factor was frozen (`tried` counts them)."""
    consumers: set[tuple[int, int]] = set()
    producers: set[tuple[int, int]] = set()
    broken: set[str] = set()
    factors = dict(model.factors)
    for traced, analysis, graph in passes:
        consumers |= analysis.consumers
        producers |= analysis.producers
        broken |= broken_caches(model, traced, analysis, graph)
    for split in {split for _, analysis, _ in passes for split in analysis.splits}:
        chosen = factors.get(split, 0)
        frozen = any(
            analysis.nodes.is_frozen(nodes).all()
            for _, analysis, _ in passes
            for nodes in analysis.splits.get(split, ())
        )
        if choose and frozen and tried.get(split, 0) < len(split.sizes):
            tried[split] = tried.get(split, 0) + 1
            factors[split] = (chosen + 1) % len(split.sizes)
    return model._replace(
        consumers=frozenset(consumers - producers),
        caches=model.caches - broken,
        factors=tuple(sorted(factors.items())),
    )


def _is_parameter(path: str, leaf: Any) -> bool:
    floating = bool(jnp.issubdtype(leaf.dtype, jnp.floating))
    return floating and not _STATE & set(path.split("/")) and not _is_cache(path, leaf)


def _is_cache(path: str, leaf: Any) -> bool:
    return "cache" in path
