"""One convolution at a time: blocks of weights, single weights and N:M against fewer channels.

Compiles and times the forward and the backward pass (gradients by input and by kernel) of every
shape of convolution that a network has, with dense arithmetic on the weights that are kept, in
plain JAX. In one process: rounds in which every arm runs once, in random order; medians of the
ratios to the dense convolution within a round. Prints tables, and writes JSON if asked.

    python benchmarks/blocks.py [--model resnet20] [--rounds 20] [--json results.json]

Arms: `dense`; `masked`, a dense kernel times its mask; `blocks 4x8`, where every block of 8 outputs
reads the same number of blocks of 4 inputs, the same ones at all positions of the kernel; `fan-in`,
the same with blocks of one weight; `2:4` and `1:4` along the inputs; `narrow`, a dense convolution
whose two widths are scaled by the root of the density, to the nearest width or to a multiple of 8.
Blocks of inputs are dealt out evenly: each is read equally often, give or take one. The first
convolution of the network, and any that a pattern does not fit, stays dense.

Each of the three passes of a pattern is tried in all ways that `compact_convolutions` knows, and
the fastest of each make the arm. The arms `dense, all at once` and `dense, 16 outputs at once` are
the dense convolution in the fastest of these ways: what they gain is not due to sparsity. All ways
are tried at the density that comes first; at the others, those that took at most twice the best
time. All that is computed is compared with the masked convolution before it is timed. MACs are
those of the weights that are kept: a pass in place, on a dense kernel, does the others as well.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from compact_convolutions import (
    PASSES,
    Layer,
    Pattern,
    Way,
    block_mask,
    dense_step,
    gather,
    masked_step,
    n_m_mask,
    output_pixels,
    pattern_of,
    ways_of,
)
from flax import nnx

from jaxprune import models, reports

N_M = ((2, 4), (1, 4))
DEFAULTS = {"model": "resnet20", "batch": 64, "rounds": 20, "densities": [0.28, 0.5, 0.14]}
SMALL = {"size": 32, "blocks": ["4x4", "8x8", "16x16", "1x16"]}
LARGE = {"size": 224, "blocks": ["16x64", "64x64", "1x64"]}
QUICK = {"model": "resnet8", "size": 6, "batch": 2, "rounds": 1, "shapes": 2}
QUICK |= {"densities": [0.28, 0.5], "blocks": ["4x8"]}
Seconds = dict[str, dict[str, float]]  # pass -> name -> of one call


class Case(NamedTuple):
    """A convolution and what it is run on."""

    layer: Layer
    x: jax.Array  # [batch, pixels, pixels, inputs]
    kernel: jax.Array  # [size, size, inputs, outputs]
    cotangent: jax.Array  # like the output


class Program(NamedTuple):
    """One arm, compiled."""

    arm: str
    targets: list[float | None]  # densities that were asked for and led to this one
    density: float  # its MACs over those of the dense convolution
    run: Callable[[], Any]
    tried: Seconds


def kept_for(densities: Sequence[float], blocks: int) -> dict[int, list[float | None]]:
    """Blocks to keep of so many -> the densities to which that is nearest, in their order."""
    found: dict[int, list[float | None]] = {}
    for density in densities:
        found.setdefault(max(1, round(density * blocks)), []).append(density)
    return found


# Arms of one layer.


def programs(case: Case, options: argparse.Namespace) -> Iterator[Program]:
    """All arms, the dense one first."""
    layer, arrays = case.layer, case[1:]
    yield Program("dense", [None], 1.0, compiled(partial(dense_step, layer), *arrays), {})
    for multiple in (1, 8):
        yield from narrow_programs(case, options.densities, multiple)
    if layer.first:
        return
    ones = jnp.ones(case.kernel.shape, bool)
    reference = jax.jit(partial(masked_step, layer))
    yield Program("masked", [None], 1.0, compiled(reference, *arrays, ones), {})
    attempt = partial(patterned, case, partial(reference, *arrays), skip=options.skip)
    whole = np.asarray(ones)
    yield attempt("dense, all at once", [None], whole, (layer.inputs, layer.outputs))
    if layer.outputs > 16 and layer.outputs % 16 == 0:
        yield attempt("dense, 16 outputs at once", [None], whole, (layer.inputs, 16))
    for n, m in N_M:
        if layer.inputs % m == 0:
            nearest = min(options.densities, key=lambda density: abs(density - n / m))
            yield attempt(f"{n}:{m}", [nearest], n_m_mask(layer, n, m), None)
    for name in ("1x1", *options.blocks):
        yield from block_programs(case, name, options.densities, attempt)


def narrow_programs(case: Case, densities: Sequence[float], multiple: int) -> Iterator[Program]:
    """Dense convolutions between fewer channels."""
    layer, x, kernel, cotangent = case
    found: dict[tuple[int, int], list[float | None]] = {}
    for density in densities:
        inputs, outputs = (
            min(width, multiple * max(1, round(math.sqrt(density) * width / multiple)))
            for width in (layer.inputs, layer.outputs)
        )
        found.setdefault((layer.inputs if layer.first else inputs, outputs), []).append(density)
    for (inputs, outputs), targets in found.items():
        arrays = x[..., :inputs], kernel[..., :inputs, :outputs], cotangent[..., :outputs]
        density = inputs * outputs / (layer.inputs * layer.outputs)
        name = "narrow" if multiple == 1 else f"narrow, multiple of {multiple}"
        yield Program(name, targets, density, compiled(partial(dense_step, layer), *arrays), {})


def block_programs(
    case: Case, name: str, densities: Sequence[float], attempt: Callable[..., Program]
) -> Iterator[Program]:
    """Of blocks of one size, if there are several of them; slow ways are tried once."""
    layer, block = case.layer, sizes_of(name)
    rows, columns = layer.inputs // block[0], layer.outputs // block[1]
    if (rows * block[0], columns * block[1]) != (layer.inputs, layer.outputs) or rows == 1:
        return
    among = None
    for kept, targets in kept_for(densities, rows).items():
        mask = block_mask(layer, block, kept)
        arm = "fan-in" if name == "1x1" else f"blocks {name}"
        program = attempt(arm, targets, mask, block, among=among)
        among = among or within(program.tried, 2)
        yield program


def sizes_of(block: str) -> tuple[int, int]:
    """Inputs and outputs: "4x8" -> (4, 8)."""
    inputs, outputs = block.split("x")
    return int(inputs), int(outputs)


def within(tried: Seconds, times: float) -> dict[str, list[str]]:
    """The names of ways that took at most so many times as long as the fastest of their pass."""
    return {
        which: [name for name, spent in own.items() if spent <= times * min(own.values())]
        for which, own in tried.items()
    }


def patterned(
    case: Case,
    reference: Callable[..., Any],
    arm: str,
    targets: list[float | None],
    mask: np.ndarray,
    block: tuple[int, int] | None,
    skip: Sequence[str] = (),
    among: Mapping[str, Sequence[str]] | None = None,
) -> Program:
    """The fastest way of each pass, together; `block` is None where each output has its own."""
    pattern = pattern_of(mask, block or (1, 1), whole=block is not None)
    kept = jnp.asarray(gather(case.kernel, pattern))
    args = case.x, kept, case.cotangent, jax.tree.map(jnp.asarray, pattern)
    expected = expected_of(reference(mask), pattern)
    ways = ways_of(case.layer, len(case.x), pattern, kept.shape[-1], skip)
    tried: Seconds = {}
    for which, right in zip(PASSES, expected, strict=True):
        names = [name for name in ways[which] if among is None or name in among[which]]
        tried[which] = try_all({name: ways[which][name] for name in names}, args, right)
    best = [ways[which][min(own, key=own.__getitem__)] for which, own in tried.items()]
    run = compiled(lambda *args: tuple(way(*args) for way in best), *args)
    for actual, right in zip(run(), expected, strict=True):
        check(arm, actual, right)
    return Program(arm, targets, float(mask.mean()), run, tried)


def expected_of(results: Sequence[jax.Array], pattern: Pattern) -> list[np.ndarray]:
    """What a compact convolution must give if the masked one gives this."""
    y, input_gradient, kernel_gradient = results
    return [np.asarray(y), np.asarray(input_gradient), gather(kernel_gradient, pattern)]


def try_all(ways: Mapping[str, Way], args: Sequence[Any], expected: np.ndarray) -> dict[str, float]:
    """Seconds of each way to do one pass, checked."""
    tried: dict[str, float] = {}
    for name, way in ways.items():
        run = compiled(way, *args)
        check(name, run(), expected)
        tried[name] = brief(run, 4 * min(tried.values(), default=math.inf))
    return tried


def check(name: str, actual: jax.Array, expected: np.ndarray) -> None:
    """Raises unless they are equal to the tolerance of the device."""
    exact = jax.default_backend() == "cpu" and expected.dtype == np.float32
    error = np.abs(np.asarray(actual, np.float32) - np.asarray(expected, np.float32)).max()
    scale = np.abs(expected).max().astype(np.float32)
    if not error <= (1e-4 if exact else 3e-2) * scale:
        raise AssertionError(f"{name}: off by {error:.3g}, where values go up to {scale:.3g}")


# Measurement.


def compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A call without arguments that ends when the result is there."""
    program = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def seconds(run: Callable[[], Any]) -> float:
    """Duration of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def brief(run: Callable[[], Any], limit: float) -> float:
    """Median of five, or one alone that is beyond the limit."""
    spent = [seconds(run)]
    while spent[0] <= limit and len(spent) < 5:
        spent.append(seconds(run))
    return statistics.median(spent)


def layers_of(model: str, size: int) -> Counter[Layer]:
    """The convolutions of a network -> how often each shape occurs."""
    abstract = nnx.eval_shape(lambda: getattr(models, model)(rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, images)
    layers: Counter[Layer] = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.conv_general_dilated_p:
            (_, pixels, _, _), (kernel, _, inputs, outputs) = (
                own.aval.shape for own in equation.invars
            )
            stride = equation.params["window_strides"][0]
            assert equation.params["padding"] == ((kernel // 2,) * 2,) * 2
            layers[Layer(kernel, stride, pixels, inputs, outputs, first=not layers)] += 1
    return layers


def case_of(layer: Layer, batch: int, dtype: Any) -> Case:
    """Random arrays; the kernel keeps the output as large as the input."""
    kernel = layer.size, layer.size, layer.inputs, layer.outputs
    x = batch, layer.pixels, layer.pixels, layer.inputs
    y = batch, output_pixels(layer), output_pixels(layer), layer.outputs
    draw = partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    scale = 1 / math.sqrt(math.prod(kernel[:3]))
    arrays = draw(x), scale * draw(kernel), draw(y)
    return Case(layer, *(jnp.asarray(array, dtype) for array in arrays))


def measure(layer: Layer, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each arm, the dense one first."""
    arms = list(programs(case_of(layer, options.batch, options.dtype), options))
    for arm in arms:
        arm.run()
    spent: list[list[float]] = [[] for _ in arms]
    random = np.random.default_rng(0)
    for _ in range(options.rounds):
        for index in random.permutation(len(arms)):  # what runs before an arm makes a difference
            spent[index].append(seconds(arms[index].run))
    print(f"measured {describe(layer)}", file=sys.stderr)
    return [
        {
            "layer": describe(layer),
            "arm": arm.arm,
            "asked": arm.targets,
            "MACs / dense": arm.density,
            "ms": 1e3 * statistics.median(own),
            "time / dense": statistics.median(a / b for a, b in zip(own, spent[0], strict=True)),
            "ways": ", ".join(min(ways, key=ways.__getitem__) for ways in arm.tried.values()),
            "tried_ms": {
                which: {name: 1e3 * own for name, own in ways.items()}
                for which, ways in arm.tried.items()
            },
        }
        for own, arm in zip(spent, arms, strict=True)
    ]


def describe(layer: Layer) -> str:
    """For tables."""
    stride = f", stride {layer.stride}" if layer.stride > 1 else ""
    kernel = f"{layer.size}x{layer.size}"
    return f"{kernel}, {layer.inputs} to {layer.outputs}, {layer.pixels} px{stride}"


def totals(layers: Mapping[Layer, int], records: Mapping[Layer, Any]) -> list[dict[str, Any]]:
    """Sums over all convolutions of a network; those without the arm count as dense."""
    dense = {layer: own[0] for layer, own in records.items()}
    found: dict[tuple[str, float | None], dict[Layer, Any]] = {}
    for layer, own in records.items():
        for record in own:
            for asked in record["asked"]:
                found.setdefault((record["arm"], asked), {})[layer] = record
    rows = []
    for (arm, asked), chosen in sorted(found.items(), key=lambda item: -(item[0][1] or 1)):
        all_ = dense | chosen
        time_weights = [layers[layer] * dense[layer]["ms"] for layer in dense]
        mac_weights = [layers[layer] * macs_of(layer) for layer in dense]
        time_ratios, mac_ratios = (
            [all_[layer][key] for layer in dense] for key in ("time / dense", "MACs / dense")
        )
        rows.append(
            {
                "all layers": arm,
                "asked": asked,
                "layers": sum(layers[layer] for layer in chosen),
                "MACs / dense": float(np.average(mac_ratios, weights=mac_weights)),
                "time / dense": float(np.average(time_ratios, weights=time_weights)),
            }
        )
    return rows


def macs_of(layer: Layer) -> int:
    """Of one image."""
    return output_pixels(layer) ** 2 * layer.size**2 * layer.inputs * layer.outputs


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="a ResNet; whose convolutions are measured")
    parser.add_argument("--size", type=int, help="of images")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--densities", type=float, nargs="+", help="all ways are tried at the first"
    )
    parser.add_argument("--blocks", nargs="+", help="inputs x outputs, such as 4x8")
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=["unrolled", "grouped", "patches", "turned"],
        help="ways that are not tried",
    )  # fmt: skip
    parser.add_argument("--shapes", type=int, help="only so many distinct layers")
    parser.add_argument("--rounds", type=int, help="runs of each arm")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--json", help="also write the records to this file")
    parser.set_defaults(**DEFAULTS)
    first = parser.parse_known_args()[0]
    large = first.model in ("resnet18", "resnet34", "resnet50", "resnet101")
    parser.set_defaults(**(QUICK if first.quick else LARGE if large else SMALL))
    return parser.parse_args()


def main() -> None:
    """Measures, prints and writes."""
    options = parse()
    layers = layers_of(options.model, options.size)
    records = {layer: measure(layer, options) for layer in list(layers)[: options.shapes]}
    setting = {
        "device": jax.devices()[0].device_kind,
        "host_cores": os.cpu_count(),
        "jax": jax.__version__,
        **{name: getattr(options, name) for name in ("model", "size", "batch", "dtype", "rounds")},
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    setting |= {"densities": options.densities, "blocks": options.blocks}
    whole = totals(layers, records)
    rows = [record for own in records.values() for record in own]
    columns = ("layer", "arm", "MACs / dense", "ms", "time / dense", "ways")
    for own, headings in ((rows, columns), (whole, list(whole[0]))):
        print("\n" + reports.markdown_table(own, headings))
    if options.json:
        for layer, own in records.items():
            for record in own:
                record["count"] = layers[layer]
        with open(options.json, "w") as file:
            json.dump(setting | {"layers": rows, "totals": whole}, file)


if __name__ == "__main__":
    main()
