"""Sparse kernels against dense products and convolutions of XLA, one layer at a time, on CPUs.

For each shape and sparsity: the forward pass, the gradients by input and by kernel, and all three
together. In one process, in rounds in which every program runs once; the table has medians over
rounds of the ratio dense / sparse within a round, with quartiles for all three. On one thread the
clock is that of the process, which other work on the machine disturbs less; on several it is the
wall clock. Every result is compared with that of the dense function first.

    python benchmarks/kernels.py [--threads 1 2] [--rounds 15] [--only 64x14x14x64] [--block 16]
        [--json FILE]

Shapes are ROWSxINPUTSxOUTPUTS of products, BATCHxROWSxCOLUMNSxINPUTS[xOUTPUTS[xSTRIDE]] of 3x3
convolutions, and BATCHxROWSxCOLUMNSxCHANNELSxWINDOWxSTRIDE-depthwise, which are dense. Kernels are
dense arguments, as in a training step, and masks are random. With `--block 16` each shape and
sparsity has a second row, in which blocks of 16 outputs are kept as a whole, and the last columns
say how much faster these are than single weights in the same rounds.
"""

import argparse
import functools
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PRODUCTS = ("4096x256x256", "4096x512x512", "4096x1024x1024", "64x1024x1024", "16384x64x64")
CONVOLUTIONS = (
    "64x28x28x16",
    "64x14x14x32",
    "64x7x7x64",
    "64x14x14x64",
    "32x14x14x128",
    "64x32x32x64",
    "64x28x28x16x32x2",
    "64x14x14x32x64x2",
)
DEPTHWISE = (
    "64x14x14x128x3x1-depthwise",
    "64x28x28x64x3x2-depthwise",
    "32x14x14x144x7x1-depthwise",
    "32x7x7x240x5x1-depthwise",
)
SPARSITIES = (0.72, 0.8, 0.9, 0.95)
PASSES = ("forward", "input gradient", "kernel gradient")


def drawn_mask(draw: Any, shape: tuple[int, ...], sparsity: float, block: int) -> Any:
    """Draws a mask that keeps a given number of blocks of consecutive outputs."""
    import numpy as np

    units = (*shape[:-1], -(-shape[-1] // block))
    count = math.prod(units)
    kept = draw.permutation(count).reshape(units) >= round(sparsity * count)
    return np.repeat(kept, block, axis=-1)[..., : shape[-1]]


def functions(name: str, sparsity: float, block: int = 1, seed: int = 0) -> tuple[Any, Any, Any]:
    """Returns dense and sparse layers of a shape as functions (x, kernel), and their arguments."""
    import jax.numpy as jnp
    import numpy as np

    from jaxprune import kernels

    draw = np.random.default_rng(seed)
    sizes, _, is_depthwise = name.partition("-")
    shape = tuple(map(int, sizes.split("x")))
    if is_depthwise:
        *images, window, stride = shape
        x, kernel = draw.normal(size=images), draw.normal(size=(window, window, 1, images[-1]))
        return (
            functools.partial(convolve, stride=stride, padding=window // 2, groups=images[-1]),
            functools.partial(
                kernels.depthwise_convolution, strides=stride, padding=((window // 2,) * 2,) * 2
            ),
            (jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)),
        )
    if len(shape) == 3:
        rows, inputs, outputs = shape
        x, kernel = draw.normal(size=(rows, inputs)), draw.normal(size=(inputs, outputs))
        mask = drawn_mask(draw, kernel.shape, sparsity, block)
        product = kernels.product_indices(mask)
        args = jnp.asarray(x, jnp.float32), jnp.asarray(kernel * mask, jnp.float32)
        return jnp.matmul, lambda x, w: kernels.sparse_product(x, w, product), args
    inputs, outputs, stride = (*shape[3:], *(shape[3], 1)[len(shape) - 4 :])
    x, kernel = draw.normal(size=shape[:4]), draw.normal(size=(3, 3, inputs, outputs))
    mask = drawn_mask(draw, kernel.shape, sparsity, block)
    indices = kernels.convolution_indices(mask)
    args = jnp.asarray(x, jnp.float32), jnp.asarray(kernel * mask, jnp.float32)
    dense = functools.partial(convolve, stride=stride, padding=1)

    def sparse(x: Any, w: Any) -> Any:
        padding = ((1, 1), (1, 1))
        return kernels.sparse_convolution(x, w, indices, strides=stride, padding=padding)

    return dense, sparse, args


def convolve(x: Any, w: Any, stride: int, padding: int, groups: int = 1) -> Any:
    """Computes a convolution with XLA."""
    import jax

    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def passes(layer: Any, args: Any, cotangent: Any) -> dict[str, Any]:
    """Compiles the three passes of a layer; pass -> a function without arguments."""
    import jax

    x, kernel = args
    programs = {
        "forward": (lambda x, w, dy: layer(x, w)),
        "input gradient": (lambda x, w, dy: jax.vjp(lambda x: layer(x, w), x)[1](dy)[0]),
        "kernel gradient": (lambda x, w, dy: jax.vjp(lambda w: layer(x, w), w)[1](dy)[0]),
    }
    found = {}
    for name, program in programs.items():
        compiled = jax.jit(program).lower(x, kernel, cotangent).compile()
        found[name] = lambda compiled=compiled: jax.block_until_ready(
            compiled(x, kernel, cotangent)
        )
    return found


def measure(
    shape: str, sparsities: Any, rounds: int, clock: Any, blocks: tuple[int, ...] = (1,)
) -> list[Any]:
    """Times the passes of one shape; one row for each sparsity and size of blocks."""
    import jax.numpy as jnp
    import numpy as np

    arms: dict[Any, Any] = {}
    for sparsity, block in itertools.product(sparsities, blocks):
        dense, sparse, args = functions(shape, sparsity, block)
        cotangent = jnp.cos(jnp.arange(dense(*args).size, dtype=jnp.float32))
        cotangent = cotangent.reshape(dense(*args).shape)
        references = passes(dense, args, cotangent)
        arms.setdefault("dense", references)
        arms[sparsity, block] = passes(sparse, args, cotangent)
        for name, run in arms[sparsity, block].items():
            own, reference = np.asarray(run()), np.asarray(references[name]())
            if name == "kernel gradient":
                reference = reference * (np.asarray(args[1]) != 0)
            error = np.abs(own - reference).max() / np.abs(reference).max()
            assert error < 1e-4, (shape, sparsity, block, name, error)
    seconds: dict[Any, list[float]] = {}
    for _ in range(rounds):
        for arm, runs in arms.items():
            for name, run in runs.items():
                start = clock()
                run()
                seconds.setdefault((arm, name), []).append(clock() - start)
    times = {key: np.array(own) for key, own in seconds.items()}
    rows = []
    for arm in itertools.product(sparsities, blocks):
        ratios = {name: times["dense", name] / times[arm, name] for name in PASSES}
        whole, own, single = (
            sum(times[other, name] for name in PASSES) for other in ("dense", arm, (arm[0], 1))
        )
        low, middle, high = np.quantile(whole / own, [0.25, 0.5, 0.75])
        row = {"shape": shape, "sparsity": arm[0], "block": arm[1]}
        row["dense ms"] = 1e3 * float(np.median(whole))
        row |= {name: float(np.median(own)) for name, own in ratios.items()}
        row["all three"] = [float(low), float(middle), float(high)]
        if arm[1] > 1:
            of_forward = times[(arm[0], 1), "forward"] / times[arm, "forward"]
            row["forward of single"] = float(np.median(of_forward))
            row["all three of single"] = float(np.median(single / own))
        rows.append(row)
    return rows


def show(row: dict[str, Any]) -> str:
    """Returns a row of a table in Markdown."""
    low, middle, high = row["all three"]
    each = " | ".join(f"{row[name]:.2f}" for name in PASSES)
    line = (
        f"| {row['shape']} | {row['sparsity']:.0%} | {row['block']} | {row['dense ms']:.2f} | "
        f"{each} | {middle:.2f} ({low:.2f}-{high:.2f}) |"
    )
    names = "forward of single", "all three of single"
    return line + "".join(f" {row[name]:.2f} |" if name in row else " |" for name in names)


def run_here(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """Measures all shapes on some threads; JAX must not have started yet."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxprune import kernels, training

    training.keep_memory()  # as all commands do
    reason = kernels.available()
    if reason:
        sys.exit(f"kernels are not available: {reason}")
    print(f"\n{threads} thread(s), {platform.machine()}\n", flush=True)
    print(
        f"| shape | sparsity | block | dense, ms | {' | '.join(PASSES)} | all three (quartiles) | "
        "forward, single / blocks | all three, single / blocks |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    clock = time.process_time if threads == 1 else time.perf_counter
    rows = []
    for shape in options.only or PRODUCTS + CONVOLUTIONS + DEPTHWISE:
        sparsities = (0.0,) if shape in DEPTHWISE else options.sparsities
        blocks = (1,) if options.block == 1 or shape in DEPTHWISE else (1, options.block)
        for row in measure(shape, sparsities, options.rounds, clock, blocks):
            rows.append({"threads": threads, **row})
            print(show(row), flush=True)
    return rows


def main() -> None:
    """Runs one process for each number of threads, since XLA decides on them when it starts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--only", nargs="+", help="shapes")
    parser.add_argument("--block", type=int, default=1, help="outputs that are kept together")
    parser.add_argument("--json", type=Path, help="the results as a file")
    options = parser.parse_args()
    if len(options.threads) == 1:
        rows = run_here(options, options.threads[0])
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
        return
    rows = []
    for threads in options.threads:
        part = [*sys.argv[1:], "--threads", str(threads)]
        if options.json:
            part += ["--json", str(options.json)]
        subprocess.run([sys.executable, __file__, *part], check=True)
        if options.json:
            rows += json.loads(options.json.read_text())
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
