"""A table of how long each layer takes on this device, as a cost of plans."""

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import files, reports, structure, trees
from jaxprune.files import schemas
from jaxprune.search._layers import Layer

VERSION = 1
# (layer, input channels, output channels) -> seconds
Clock = Callable[[Layer, int, int], float]
_NUMBERS = schemas.each(schemas.finite)
_TABLE = schemas.record(
    {
        "version": schemas.one_of(VERSION),
        "device": schemas.table(schemas.anything),
        "layers": schemas.table(
            schemas.record(
                {
                    "c": schemas.each(schemas.whole(low=1)),
                    "n": schemas.each(schemas.whole(low=1)),
                    "seconds": schemas.each(_NUMBERS),
                    "inputs": schemas.each(schemas.whole()),
                    "outputs": schemas.each(schemas.whole()),
                    "groups": schemas.whole(low=1),
                }
            )
        ),
    }
)


class Timing(NamedTuple):
    """The seconds of one layer on a grid of widths.

    Example:
        >>> own = Timing((2, 4), (2, 4), ((1.0, 2.0), (2.0, 4.0)), (0,), (1,))
        >>> own.at((3, 4)), own.at((3, 3))
        (3.0, 2.25)
    """

    c: tuple[int, ...]  # ascending: input channels; of a grouped convolution only the dense number
    n: tuple[int, ...]  # ascending: output channels
    seconds: tuple[tuple[float, ...], ...]  # [c, n]
    inputs: tuple[int, ...]  # axes of the kernel that are input channels
    outputs: tuple[int, ...]  # axes of the kernel that are output channels
    groups: int = 1

    def at(self, shape: Sequence[int]) -> float:
        """Returns the seconds for the shape of a smaller kernel, between the points of the grid."""
        c, n = (np.prod([shape[axis] for axis in own]) for own in (self.inputs, self.outputs))
        table = np.asarray(self.seconds)
        rows = [np.interp(n, self.n, row) for row in table]
        return float(rows[0] if self.groups > 1 else np.interp(c, self.c, rows))


class Latencies(NamedTuple):
    """The timings of all layers of a network on one device, from `measure_latencies`.

    Example:
        >>> Latencies({}, {}).layers
        {}
    """

    device: dict[str, Any]  # what they were measured on, see `describe_device`
    layers: dict[str, Timing]  # path of the kernel -> its timing

    def cost(self, plan: structure.Plan) -> float:
        """Returns the sum over the layers, in seconds: a cost for `channels`."""
        return sum(own.at(plan.shape(path)) for path, own in self.layers.items())

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON; `load_latencies` reads it."""
        content = {
            "version": VERSION,
            "device": self.device,
            "layers": {name: own._asdict() for name, own in self.layers.items()},
        }
        with files.replacing(path) as file:
            file.write(json.dumps(files.seal(content)) + "\n")


class Check(NamedTuple):
    """A table held against a whole network, from `check_latencies`.

    Example:
        >>> Check(0.9, 1.0).error
        -0.1
    """

    summed: float  # seconds by the table
    whole: float  # seconds of the whole network, measured

    @property
    def error(self) -> float:
        """The relative error of the table."""
        return round(self.summed / self.whole - 1, 12)


def measure_latencies(
    layers: Sequence[Layer], *, points: int = 4, clock: Clock | None = None
) -> Latencies:
    """Measures each layer once, at a grid of widths, on this device.

    A layer is timed with the scale, bias and ReLU that usually follow it and that XLA fuses with
    it, on the batch of `find_layers`. Layers of the same shape are measured once. Between the
    points of the grid costs are interpolated. A wider layer never counts as cheaper: what was
    measured is replaced by the largest value at widths up to it, because a cost must not fall when
    more is kept.

    Args:
        layers: from `find_layers`, with the batch that the latency is for.
        points: widths of the grid for inputs and for outputs, evenly spaced up to the whole.
        clock: function `(layer, c, n) -> seconds` for a layer with so many input and output
            channels. Default: the median of repeated calls on this device.

    Returns:
        The `Latencies`.

    Raises:
        ValueError: if `points` is below 2, or no layer has a known layout.

    Example:
        >>> from jaxprune.search import find_layers
        >>> w = {"w": jnp.ones((8, 4))}
        >>> layers = find_layers(lambda w, x: x @ w["w"], w, jnp.ones((1, 8)))
        >>> table = measure_latencies(layers, points=2, clock=lambda layer, c, n: 1e-6 * c * n)
        >>> round(table.layers["w"].at((6, 3)), 9)
        1.8e-05
    """
    if not isinstance(points, int) or points < 2:
        raise ValueError(f"`points` must be an integer of at least 2, but is {points!r}.")
    clock = time_layer if clock is None else clock
    known: dict[Any, tuple[tuple[float, ...], ...]] = {}
    timings = {}
    for layer in layers:
        if layer.layout is None:
            continue
        c, n = (_grid(own, points) for own in (layer.c, layer.n))
        c = c if layer.groups == 1 else (layer.c,)
        key = layer._replace(path="", layout=None)
        if key not in known:
            seconds = np.array([[clock(layer, one, two) for two in n] for one in c])
            seconds = np.maximum.accumulate(np.maximum.accumulate(seconds, 0), 1)
            known[key] = tuple(tuple(map(float, row)) for row in seconds)
        axes = layer.layout.inputs, layer.layout.outputs
        timings[layer.path] = Timing(c, n, known[key], *axes, layer.groups)
    if not timings:
        raise ValueError("`layers` must have at least one whose axes have one role each.")
    return Latencies(describe_device(), timings)


def time_layer(layer: Layer, c: int, n: int) -> float:
    """Times a layer with other widths on this device; returns the median of its calls in seconds.

    Args:
        layer: from `find_layers`.
        c: input channels; a grouped convolution has as many as its outputs ask for.
        n: output channels.

    Returns:
        The seconds.

    Example:
        >>> time_layer(Layer("w", 4, 4, 1, 16, 16), 4, 2) > 0
        True
    """
    groups = max(1, layer.groups * n // layer.n)
    per_group = layer.c // layer.groups if layer.groups > 1 else c
    scale, bias = jnp.ones(n), jnp.zeros(n)

    def call(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if layer.window:
            spatial = "".join(chr(ord("a") + own) for own in range(len(layer.window)))
            numbers = f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                layer.strides,
                layer.padding,
                dimension_numbers=numbers,
                feature_group_count=groups,
            )
        else:
            y = x @ kernel
        shape = (1,) * (y.ndim - 1) + (n,)
        return jax.nn.relu(y * scale.reshape(shape) + bias.reshape(shape))

    inputs = groups * per_group if layer.groups > 1 else c
    x = jnp.ones((layer.rows, *layer.size, inputs))
    kernel = jnp.ones((*layer.window, per_group, groups * (n // groups)))
    return reports.measure_latency(jax.jit(call), x, kernel).median


def check_latencies(
    latencies: Latencies,
    plans: Sequence[structure.Plan],
    function: Callable[..., Any],
    variables: Any,
    *args: Any,
    clock: Callable[..., float] | None = None,
) -> list[Check]:
    """Holds the sums of a table against whole networks, measured.

    Args:
        latencies: the table.
        plans: networks to compare; `groups.plan({})` is the dense one. The error of the ratios to
            that one is what matters for a budget that is a share of it.
        function: see `Plan.wrap`.
        variables: dense arrays.
        *args: its arguments, with the batch of the table.
        clock: function `(function, *args) -> seconds`. Default: the median of repeated calls.

    Returns:
        A `Check` for each plan.

    Example:
        >>> check_latencies(Latencies({}, {}), [], lambda w: w, {})
        []
    """

    def median(function: Callable[..., Any], *args: Any) -> float:
        return reports.measure_latency(function, *args).median

    measure = median if clock is None else clock
    return [
        Check(
            latencies.cost(plan),
            measure(jax.jit(plan.wrap(function)), plan.compact(variables), *args),
        )
        for plan in plans
    ]


def describe_device() -> dict[str, Any]:
    """Describes what a table of latencies holds for: the device and the versions.

    Returns:
        JSON-ready values.

    Example:
        >>> sorted(describe_device())
        ['cores', 'jax', 'jaxlib', 'kind', 'platform']
    """
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "cores": os.cpu_count() if device.platform == "cpu" else 0,
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
    }


def load_latencies(path: str | Path, *, any_device: bool = False) -> Latencies:
    """Reads a table of latencies.

    Args:
        path: a file written by `Latencies.save`.
        any_device: whether a table of a different device, or of other versions, may be used here.

    Returns:
        The `Latencies`.

    Raises:
        ValueError: if the file is damaged, or was measured on a different device or with other
            versions.
        OSError: if it cannot be read.

    Example:
        >>> import tempfile
        >>> file = tempfile.mkdtemp() + "/latencies.json"
        >>> Latencies(describe_device(), {}).save(file)
        >>> load_latencies(file).layers
        {}
    """
    try:
        content = files.parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no table of latencies: {error}") from error
    content = files.unseal(content, str(path))
    _TABLE(content, str(path))
    here, there = describe_device(), content["device"]
    differing = [
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if not any_device:
        trees.raise_for(
            differing,
            f"{path} must have been measured on this device and with these versions; measure again "
            "with `measure_latencies`, or pass `any_device=True`:",
        )
    at = f"{path}: `layers`"
    timings = {
        name: _timing(own, schemas.below(at, name)) for name, own in content["layers"].items()
    }
    return Latencies(there, timings)


def _timing(content: Mapping[str, Any], at: str) -> Timing:
    """Makes a timing of what a file says."""
    for name in ("c", "n"):
        widths = content[name]
        if not widths or any(two <= one for one, two in itertools.pairwise(widths)):
            raise ValueError(f"{schemas.below(at, name)} must hold ascending widths, at least one")
    seconds = content["seconds"]
    if len(seconds) != len(content["c"]) or any(len(own) != len(content["n"]) for own in seconds):
        raise ValueError(f"{schemas.below(at, 'seconds')} must have one number for each c and n")
    lists = {name: tuple(own) for name, own in content.items() if name != "groups"}
    lists["seconds"] = tuple(map(tuple, lists["seconds"]))
    return Timing(**lists, groups=content["groups"])


def _grid(size: int, points: int) -> tuple[int, ...]:
    """Returns evenly spaced widths up to the whole."""
    return tuple(dict.fromkeys(max(1, round(size * i / points)) for i in range(1, points + 1)))
