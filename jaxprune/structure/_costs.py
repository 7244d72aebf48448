"""Counts what a function costs: multiply-accumulates, bytes and time, for all plans at once."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxprune import trees
from jaxprune.jaxprs import on_arrays, split
from jaxprune.structure._analysis import CALLING, INLINED, live_equations
from jaxprune.structure._execution import Execution
from jaxprune.structure._groups import Groups
from jaxprune.structure._plans import Plan
from jaxprune.structure._rules.scans import segments
from jaxprune.structure._traces import Trace, analyze, to_jaxpr, trace_function
from jaxprune.structure._values import Graph, Op
from jaxprune.structure._zeros import CALLS, PRESENT, follow

_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
Shape = Sequence[int]
Counter = Callable[[Execution, Sequence[int]], int]  # also takes the states of the inputs


def macs_of(name: str, params: dict[str, Any], ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    """Counts the multiply-accumulates of a matrix product or a convolution.

    The padding of a convolution counts as inputs; zeros between inputs (dilation) do not.

    Args:
        name: name of the primitive.
        params: parameters of the equation.
        ins: shapes of the operands.
        outs: shapes of the results.

    Returns:
        The exact count.

    Example:
        >>> macs_of("dot_general", {"dimension_numbers": (((1,), (0,)), ((), ()))},
        ...     [(2, 3), (3, 4)], [(2, 4)])
        24
    """
    (left, right), (out,) = ins[:2], outs
    if name == "dot_general":
        (_, contracted), _ = params["dimension_numbers"]
        return math.prod(out) * math.prod(right[axis] for axis in contracted)
    if name == "ragged_dot_general":  # each row is multiplied by the kernel of its group alone
        numbers = params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        seen = {*contracted, *batch, *numbers.rhs_group_dimensions}
        return math.prod(left) * math.prod(n for axis, n in enumerate(right) if axis not in seen)
    numbers = params["dimension_numbers"]
    _, kernel_in, *kernel_space = numbers.rhs_spec
    batch, channel, *space = numbers.out_spec
    windows = zip(
        [out[axis] for axis in space],
        [right[axis] for axis in kernel_space],
        *[params[own] for own in ("window_strides", "lhs_dilation", "rhs_dilation", "padding")],
        strict=True,
    )
    return out[batch] * out[channel] * right[kernel_in] * math.prod(_along(*w) for w in windows)


def _along(
    out: int, taps: int, stride: int, between: int, apart: int, padding: tuple[int, int]
) -> int:
    """Counts products along one spatial dimension.

    Inputs are `between` places apart, the taps of the kernel `apart`.
    """
    if between == 1:
        return out * taps
    places = stride * np.arange(out)[:, None] + apart * np.arange(taps) - padding[0]
    return int((places % between == 0).sum())


def count_macs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Counts the multiply-accumulates of one call: matrix products and convolutions in its jaxpr.

    A scan counts as often as it runs, a `cond` as its most expensive branch, a `while` as one pass,
    and the function of a `shard_map` on each device; dead code does not count. Padding counts, as
    it does in publications. XLA's `cost_analysis` counts two operations for each of ours, leaves
    padding out, and adds elementwise operations: for a ResNet-20 at 32 pixels, half of its number
    is 0.93 of ours.

    Args:
        function: any JAX function.
        *args: its arguments: arrays or `jax.ShapeDtypeStruct`.
        **kwargs: its keyword arguments.

    Returns:
        The exact count.

    Raises:
        ValueError: if there are products inside a primitive that may run them any number of times,
            such as a Pallas kernel.

    Example:
        >>> import jax.numpy as jnp
        >>> count_macs(lambda a, b: jnp.tanh(a @ b), jnp.ones((2, 3)), jnp.ones((3, 4)))
        24
    """
    return _of_jaxpr(to_jaxpr(function, *args, **kwargs)[0].jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(map(_of_equation, live_equations(jaxpr)))


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name in INLINED or name in CALLING:
        return _together(name, params, [_of_jaxpr(own) for own in core.jaxprs_in_params(params)])
    if name not in _PRODUCTS:
        return _nothing_in(name, params)
    ins, outs = ([v.aval.shape for v in own] for own in (equation.invars, equation.outvars))
    return macs_of(name, params, ins, outs)


def _nothing_in(name: str, params: dict[str, Any]) -> int:
    """Returns 0 for a primitive that is not understood; raises if there are products inside it."""
    if any(_of_jaxpr(own) for own in core.jaxprs_in_params(params)):
        raise ValueError(
            "`function` must have no matrix products inside primitives that may run them any "
            f"number of times, but `{name}` has some; count that part by itself."
        )
    return 0


def _together(name: str, params: dict[str, Any], inner: Sequence[int]) -> int:
    """Combines the costs of the functions inside control flow, on all devices together."""
    if name == "cond":
        return max(inner)
    devices = [params["mesh"].shape[axis] for axis in params.get("newly_manual_axes", ())]
    return sum(inner) * params.get("length", 1) * math.prod(devices)


def mac_cost(
    groups: Groups, function: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any
) -> Callable[[Plan], int]:
    """Makes a function from plans to the multiply-accumulates of one call of the smaller function.

    The function is analysed once; a plan of a ResNet-50 then takes some hundredths of a second.

    Args:
        groups: from `find_groups`.
        function: one of the functions given to `find_groups`.
        variables: dense arrays or `jax.ShapeDtypeStruct`.
        *args: arguments of `function`, arrays or `jax.ShapeDtypeStruct`; a batch of one image gives
            the cost of an image.
        **kwargs: its keyword arguments.

    Returns:
        A function from plans of these groups to exact counts like those of `count_macs`, for
        `keep_within`. It raises `ValueError` for a plan that does not fit the function.

    Raises:
        ValueError: as for `count_macs`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w, x = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}, jnp.ones((1, 3))
        >>> groups = find_groups(mlp, w, x)
        >>> cost = mac_cost(groups, mlp, w, x)
        >>> cost(groups.plan({})), cost(groups.plan({"in:1": jnp.arange(8) < 4}))
        (40, 20)
    """
    traced = trace_function(Trace(function, args, kwargs=kwargs), variables)
    analysis, graph = analyze(groups.model, traced, outputs=False)
    count = _counter(graph)

    def cost(plan: Plan) -> int:
        if plan.model.shapes != groups.model.shapes:
            raise ValueError("`plan` must be made from the groups of this cost, but is not.")
        return count(Execution(analysis, plan.kept_nodes(analysis)), plan.states(len(graph.ins)))

    return cost


def _counter(graph: Graph) -> Counter:
    """Makes the counter of a traced function; it reads the smaller shapes of an execution."""
    counters = [(op, own) for op in graph.ops if (own := _counter_of_op(op)) is not None]

    def count(run: Execution, states: Sequence[int]) -> int:
        spread = follow(graph, states)
        return sum(
            own(run, list(map(spread.state, op.ins)))
            for op, own in counters
            if not all(spread.state(out) or id(out) in spread.same for out in op.outs)
        )

    return count


def _counter_of_op(op: Op) -> Counter | None:
    called = op.inner.get("branches") or [op.inner[n] for n in ("call", "cond") if n in op.inner]
    inner = [(_counter(graph), [PRESENT] * len(graph.ins)) for graph in called]
    if op.name == "scan":
        return lambda run, states: sum(
            len(part.rows) * inner[0][0](run, part.states) for part in segments(run, op, states)
        )
    if op.name in CALLS:
        return inner[0][0]
    if inner:
        return lambda run, _: _together(
            op.name, op.params, [own(run, whole) for own, whole in inner]
        )
    if op.name in _PRODUCTS:
        parts = op.ins, op.outs
        return lambda run, _: macs_of(op.name, op.params, *[list(map(run.shape, p)) for p in parts])
    _nothing_in(op.name, op.params)
    return None


def byte_cost(variables: Any) -> Callable[[Plan], int]:
    """Makes a function from plans to the bytes of all compacted variables.

    Args:
        variables: dense arrays or `jax.ShapeDtypeStruct`.

    Returns:
        A function from plans to exact counts, for `keep_within`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> w = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2), jnp.bfloat16)}
        >>> groups = find_groups(lambda w, x: x @ w["in"] @ w["out"], w, jnp.ones((1, 3)))
        >>> byte_cost(w)(groups.plan({"in:1": jnp.arange(8) < 4}))
        64
    """
    parts = split(variables)
    leaves = trees.leaf_by_path(parts.tree(parts.arrays, False))
    sizes = {path: leaf.dtype.itemsize for path, leaf in leaves.items()}

    def cost(plan: Plan) -> int:
        return sum(size * math.prod(plan.shape(path)) for path, size in sizes.items())

    return cost


def cache_cost(variables: Any) -> Callable[[Plan], int]:
    """Makes a function from plans to the bytes of all compacted caches, such as keys and values.

    Divided by the number of texts and of positions that the cache was made for, this is the number
    of bytes for each token: 2 x layers x heads of keys and values x width of a head x bytes of the
    dtype.

    Args:
        variables: dense arrays or `jax.ShapeDtypeStruct`, caches among them; see `caches` of
            `find_groups`.

    Returns:
        A function from plans to exact counts, for `keep_within`. It raises `ValueError` for a plan
        without caches.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> def step(w, x):
        ...     cache = w["cache"] + x @ w["in"]
        ...     return cache @ w["out"], {"cache": cache}
        >>> w = {"cache": jnp.zeros((1, 8)), "in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
        >>> groups = find_groups(step, w, jnp.ones((1, 3)), updates=lambda output: output[1])
        >>> cache_cost(w)(groups.plan({"in:1": jnp.arange(8) < 4}))
        16
    """
    parts = split(variables)
    leaves = trees.leaf_by_path(parts.tree(parts.arrays, False))

    def cost(plan: Plan) -> int:
        caches = plan.model.caches
        if not caches:
            raise ValueError(
                "`plan` must have caches, but has none; put them into the variables of "
                "`find_groups`, and return their new values with `updates`."
            )
        return sum(leaves[path].dtype.itemsize * math.prod(plan.shape(path)) for path in caches)

    return cost


def latency_cost(
    function: Callable[..., Any], variables: Any, *args: Any, repeats: int = 20, **kwargs: Any
) -> Callable[[Plan], float]:
    """Makes a function from plans to the measured seconds of one call of the smaller function.

    Each call compiles, and takes the median of some calls on the device that holds the arguments.
    Times are noisy: for `keep_within` they must differ by more between plans than between runs.

    Args:
        function: one of the functions given to `find_groups`.
        variables: dense arrays.
        *args: arguments of `function`, arrays.
        repeats: number of calls that are timed, after one that is not.
        **kwargs: its keyword arguments.

    Returns:
        A function from plans to seconds, for `keep_within`. Plans with the same shapes are measured
        once.

    Raises:
        ValueError: if `repeats` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w, x = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}, jnp.ones((1, 3))
        >>> seconds = latency_cost(mlp, w, x, repeats=3)
        >>> seconds(find_groups(mlp, w, x).plan({"in:1": jnp.arange(8) < 4})) > 0
        True
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, but is {repeats}.")
    known: dict[Any, float] = {}

    def cost(plan: Plan) -> float:
        key = tuple(plan.shapes.items())
        if key not in known:
            call, arrays, _ = on_arrays(
                plan.wrap(function), plan.compact(variables), *args, **kwargs
            )
            compiled = jax.jit(call).lower(arrays).compile()
            jax.block_until_ready(compiled(arrays))
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                jax.block_until_ready(compiled(arrays))
                times.append(time.perf_counter() - start)
            known[key] = float(np.median(times))
        return known[key]

    return cost
