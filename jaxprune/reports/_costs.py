"""Measures what a function costs on this machine: memory as compiled, time as run."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.reports._tables import table


class Memory(NamedTuple):
    """The bytes that a compiled function takes on one device.

    Example:
        >>> Memory(arguments=8, outputs=4, temporaries=2, aliased=4).peak
        10
    """

    arguments: int
    outputs: int
    temporaries: int  # activations and other buffers inside the function
    aliased: int  # outputs that reuse the memory of donated arguments

    @property
    def peak(self) -> int:
        """Upper bound on live bytes, assuming that temporaries and outputs coexist."""
        return self.arguments + self.outputs + self.temporaries - self.aliased


class Latency(NamedTuple):
    """The seconds that a call takes.

    Example:
        >>> Latency(0.01, 0.009, 0.012, 1.5, 20, "cpu").median
        0.01
    """

    median: float
    low: float  # 10% of the calls are faster
    high: float  # 90% of the calls are faster
    compilation: float  # tracing and compiling, once; short if a cache on disk has the program
    repeats: int  # number of calls that were timed
    device: str  # kind of the device


class Cost(NamedTuple):
    """The cost of one function on one set of arrays, see `compare`.

    Example:
        >>> Cost._fields[:3]
        ('parameters', 'bytes', 'macs')
    """

    parameters: int  # number of entries of the first argument
    bytes: int  # bytes of the first argument
    macs: int  # multiply-accumulates of one call
    memory: Memory
    latency: Latency


class Comparison(NamedTuple):
    """Costs by name; `str()` is a table with speedups relative to the first.

    Example:
        >>> Comparison({}).to_dict()
        {}
    """

    costs: Mapping[str, Cost]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain Python values, ready for `json.dumps`."""
        return {
            name: cost._asdict()
            | {
                "memory": cost.memory._asdict() | {"peak": cost.memory.peak},
                "latency": cost.latency._asdict(),
            }
            for name, cost in self.costs.items()
        }

    def __str__(self) -> str:
        first = next(iter(self.costs.values()))
        rows = [
            {
                "name": name,
                "parameters": cost.parameters,
                "bytes": cost.bytes,
                "MACs": cost.macs,
                "peak bytes": cost.memory.peak,
                "ms": 1e3 * cost.latency.median,
                "10-90 %": f"{1e3 * cost.latency.low:.4g}-{1e3 * cost.latency.high:.4g}",
                "times": first.latency.median / cost.latency.median,
            }
            for name, cost in self.costs.items()
        ]
        return table(rows, {own: "" if own == "name" else own for own in rows[0]})


def measure_memory(function: Callable[..., Any], *args: Any, **jit_options: Any) -> Memory:
    """Reads the bytes that XLA plans for a function, without running it.

    Args:
        function: any JAX function, or a compiled one from `jax.jit(...).lower(...).compile()`,
            which needs no further arguments.
        *args: arrays or `jax.ShapeDtypeStruct`.
        **jit_options: options of `jax.jit`, such as `donate_argnums`.

    Returns:
        A `Memory`: of the device on GPU and TPU, of the heap on CPU.

    Example:
        >>> import jax.numpy as jnp
        >>> measure_memory(lambda x: x * 2, jnp.ones(1024)).arguments
        4096
    """
    is_compiled = isinstance(function, jax.stages.Compiled)
    return _memory(function if is_compiled else _compiled(function, args, jit_options)[0])


def _compiled(
    function: Callable[..., Any], args: Sequence[Any], jit_options: Mapping[str, Any]
) -> tuple[Any, float]:
    """Compiles a function; returns the program and the seconds that this took.

    The seconds of a second call are fewer, as JAX caches traces.
    """
    began = time.perf_counter()
    compiled = jax.jit(function, **jit_options).lower(*args).compile()
    return compiled, time.perf_counter() - began


def _memory(compiled: Any) -> Memory:
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        aliased=found.alias_size_in_bytes,
    )


def measure_latency(
    function: Callable[..., Any], *args: Any, repeats: int = 20, **jit_options: Any
) -> Latency:
    """Measures the seconds from a call to its last result, after one call as a warm-up.

    Args:
        function: any JAX function.
        *args: arrays.
        repeats: number of calls to time, at least 1.
        **jit_options: options of `jax.jit`; arguments must not be donated.

    Returns:
        A `Latency`.

    Raises:
        ValueError: if `repeats` is less than 1.

    Example:
        >>> import jax.numpy as jnp
        >>> measure_latency(lambda x: x * 2, jnp.ones(1024), repeats=3).repeats
        3
    """
    _check_repeats(repeats)
    return _latency(*_compiled(function, args, jit_options), args, repeats)


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, but is {repeats!r}.")


def _latency(compiled: Any, compilation: float, args: Sequence[Any], repeats: int) -> Latency:
    outs = jax.tree.leaves(jax.block_until_ready(compiled(*args)))
    devices = set().union(*[out.devices() for out in outs]) or {jax.devices()[0]}
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - began)
    low, median, high = np.quantile(seconds, [0.1, 0.5, 0.9]).tolist()
    return Latency(median, low, high, compilation, repeats, next(iter(devices)).device_kind)


def compare(
    calls: Mapping[str, tuple[Any, ...]], *, repeats: int = 20, **jit_options: Any
) -> Comparison:
    """Compares parameters, MACs, memory and time of functions, such as dense and compacted.

    Each function is compiled once and timed separately. To resolve a few per cent, time them in
    turns, as benchmarks/structure.py does.

    Args:
        calls: name -> `(function, variables, *args)`.
        repeats: see `measure_latency`.
        **jit_options: options of `jax.jit`.

    Returns:
        A `Comparison`: print it, or use its `costs` and `to_dict()`.

    Raises:
        ValueError: if `calls` is empty; and as for `measure_latency` and `structure.count_macs`.

    Example:
        >>> import jax.numpy as jnp
        >>> def layer(w, x):
        ...     return x @ w
        >>> x = jnp.ones((2, 8))
        >>> calls = {"dense": (layer, jnp.ones((8, 8)), x), "half": (layer, jnp.ones((8, 4)), x)}
        >>> costs = compare(calls, repeats=1).costs
        >>> costs["dense"].macs, costs["half"].macs
        (128, 64)
    """
    from jaxprune.structure import count_macs  # here, so that `import jaxprune` stays light

    if not calls:
        raise ValueError("`calls` must name at least one function, but is empty.")
    _check_repeats(repeats)
    costs = {}
    for name, (function, *args) in calls.items():
        leaves = jax.tree.leaves(args[0])
        compiled, seconds = _compiled(function, args, jit_options)
        costs[name] = Cost(
            parameters=sum(leaf.size for leaf in leaves),
            bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
            macs=count_macs(function, *args),
            memory=_memory(compiled),
            latency=_latency(compiled, seconds, args, repeats),
        )
    return Comparison(costs)
