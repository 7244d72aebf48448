"""Finds the groups of a function: traces it, analyses the traces, and joins the results."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import jaxprs, trees
from jaxprune.structure._blocks import Pass, find_blocks
from jaxprune.structure._groups import Groups
from jaxprune.structure._joining import join
from jaxprune.structure._state import find_state
from jaxprune.structure._traces import (
    Model,
    Trace,
    Traced,
    analyze,
    broken_caches,
    trace_function,
)
from jaxprune.structure._values import Split
from jaxprune.trees import is_array

_CHOICES = 8  # number of passes that may still try a different factor of a split dimension


def find_groups(
    function: Callable[..., Any] | Sequence[Trace],
    variables: Any,
    *args: Any,
    updates: Callable[[Any], Any] | None = None,
    parameters: Callable[[str, Any], bool] | None = None,
    caches: Callable[[str, Any], bool] | None = None,
    **kwargs: Any,
) -> Groups:
    """Finds which dimensions of a function's variables can shrink, and which shrink together.

    The function is traced, not run, and every index of every dimension is followed through its
    operations. An operation that is not understood freezes what it touches.

    Args:
        function: `function(variables, *args, **kwargs)` of any framework; or a list of `Trace`, one
            for each way in which the variables will be used, such as evaluation and training.
        variables: tree of arrays or `jax.ShapeDtypeStruct`: parameters and other state. A whole
            module may have functions, strings and numbers among its leaves; they are kept.
        *args: trees of arrays or `jax.ShapeDtypeStruct`; later calls may use different batch sizes,
            which may be symbolic (`jax.export.symbolic_shape`). What is no array, such as a bool or
            a string, is passed on as it is.
        updates: see `Trace`.
        parameters: `(path, leaf) -> bool`: the leaves that a mask may set to zero. Default: all
            floating-point leaves except caches and state. State is what `updates` returns, what no
            gradient reaches in a trace that uses it, and, because running statistics have a
            gradient in evaluation mode, leaves under `batch_stats` or named `mean` or `var` that
            are no kernel of a product. Give this argument if statistics have different names and no
            trace trains.
        caches: `(path, leaf) -> bool`: state that is 0 before it is first written, such as keys and
            values of earlier tokens. Default: leaves with `cache` in their path.
        **kwargs: keyword arguments of the function, like `args`. For one that is called `updates`,
            `parameters` or `caches`, give a `Trace`.

    Returns:
        The groups, a mapping from names to `Group`.

    Raises:
        ValueError: if `updates` returns something that is not in the variables, if all variables
            are state, if a variable has a symbolic size, or if there are arguments beside a list of
            traces.

    Example:
        >>> import jax
        >>> def mlp(variables, x):
        ...     return jax.nn.relu(x @ variables["in"]) @ variables["out"]
        >>> variables = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
        >>> group = find_groups(mlp, variables, jnp.ones((1, 3)))["in:1"]
        >>> [(member.path, member.dimension, member.produces) for member in group.members]
        [('in', 1, True), ('out', 0, False)]
    """
    if callable(function):
        traces = [Trace(function, args, updates, kwargs=kwargs)]
    elif args or kwargs or updates is not None:
        raise ValueError(
            "each `Trace` must hold its own arguments and `updates`, but some were given beside a "
            "list of traces; put them into the traces."
        )
    else:
        traces = list(function)
    leaves = {path: leaf for path, leaf in trees.leaf_by_path(variables).items() if is_array(leaf)}
    trees.raise_for(
        [f"{p}: {leaf.shape}" for p, leaf in leaves.items() if jaxprs.has_symbols(leaf.shape)],
        "`variables` must have known sizes; only arguments may have symbolic ones:",
    )
    is_cache = _is_cache if caches is None else caches
    traced = [trace_function(trace, variables) for trace in traces]
    if parameters is None:
        names = _default_parameters(traced, leaves)
    else:
        names = {path for path, leaf in leaves.items() if parameters(path, leaf)}
    model = Model(
        {path: tuple(jnp.shape(leaf)) for path, leaf in leaves.items()},
        frozenset(names),
        caches=frozenset(path for path in leaves.keys() - names if is_cache(path, leaves[path])),
        dtypes={path: str(leaf.dtype) for path, leaf in leaves.items() if _is_plain(leaf)},
    )
    tried: dict[Split, int] = {}
    passes: list[Pass] = []
    vectors, number, settled = frozenset[int](), 0, False
    while not settled:
        passes = [Pass(each, *analyze(model, each, vectors=vectors)) for each in traced]
        found = _refine(model, passes, tried, choose=number < _CHOICES), _vectors(passes)
        settled = found == (model, vectors)
        (model, vectors), number = found, number + 1
    return join(model, [each.analysis for each in passes], find_blocks(model, passes))


def _refine(
    model: Model,
    passes: Sequence[Pass],
    tried: dict[Split, int],
    choose: bool,
) -> Model:
    """Returns the model with what a pass over all traces found.

    These are the dimensions that only consume and the caches that do not stay 0. If it may
    `choose`, it also moves on to the next factor of each split whose factor was frozen; `tried`
    counts how often.
    """
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


def _vectors(passes: Sequence[Pass]) -> frozenset[int]:
    """Returns the leaves that meet data only entry by entry, along one dimension."""
    plain = set[int]().union(*[analysis.vectors for _, analysis, _ in passes])
    return frozenset(plain.difference(*[analysis.tables for _, analysis, _ in passes]))


def _default_parameters(traced: Sequence[Traced], leaves: Mapping[str, Any]) -> set[str]:
    """Returns the paths of the parameters, see `parameters` of `find_groups`."""
    floating = {
        path
        for path, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not _is_cache(path, leaf)
    }
    state = find_state(traced, leaves)
    if floating <= state.keys():
        trees.raise_for(
            [f"{path}: {state[path]}" for path in sorted(floating)],
            f"`variables` must hold parameters, but all of {', '.join(sorted(floating))} are "
            "state. Name the parameters with `parameters=lambda path, leaf: ...`, which overrides "
            "these reasons, or leave them out of `updates`:",
        )
    return floating - state.keys()


def _is_plain(leaf: Any) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _is_cache(path: str, leaf: Any) -> bool:
    return "cache" in path
