"""The training loop against the bare step: what input and host cost, and where a step's time goes.

    python benchmarks/loop.py [--model resnet20] [--rounds 7] [--json results.json]

Arms, in turns in one process: the compiled step on one batch that is on the device already, and
`training.fit` with batches that are drawn, stacked and sent. Medians of the ratios within a round.
The split of a step is measured apart: drawing and sending a batch, the call until it returns, and
the wait for its results. A ratio near 1 says that the host works while the device does.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxprune
from jaxprune import data, models, reports, sharding, training

QUICK = {"model": "resnet8", "size": 8, "batch": 8, "steps": 2, "rounds": 1}
DEFAULTS = {"model": "resnet20", "size": 32, "batch": 64, "steps": 10, "rounds": 7}


class Loop(NamedTuple):
    """Everything that both arms share."""

    run: Callable[..., tuple]
    split: data.Split
    mesh: Any
    batches: Any
    rows: jax.Array  # of one batch, on the device
    chunk: int


def main(args: Sequence[str] | None = None) -> None:
    """Measures, prints tables, and writes JSON if asked."""
    options = parse(args)
    loop, state = build(options)
    key = jax.random.key(0)
    ratios, seconds = [], {"bare": [], "loop": []}
    for turn in range(options.rounds + 1):  # the first one compiles
        spent = {}
        for name in ("bare", "loop") if turn % 2 else ("loop", "bare"):
            began = time.perf_counter()
            arm = bare if name == "bare" else whole
            state = arm(loop, state, options.steps, key)
            spent[name] = (time.perf_counter() - began) / options.steps
        if turn:
            ratios.append(spent["loop"] / spent["bare"])
            for name, own in seconds.items():
                own.append(spent[name])
    parts = split_of_a_step(loop, state, options.steps, key)
    results = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        **{f"{name} s": statistics.median(own) for name, own in seconds.items()},
        **parts,
    }
    rows = [
        {"arm": "step on a fixed batch", "ms": f"{1e3 * results['bare s']:.2f}", "ratio": "1"},
        {
            "arm": "training.fit",
            "ms": f"{1e3 * results['loop s']:.2f}",
            "ratio": f"{results['ratio']:.3f}",
        },
    ]
    print(reports.markdown_table(rows, ["arm", "ms", "ratio"]))
    total = sum(parts.values())
    shares = [
        {"part": name, "ms": f"{1e3 * own:.2f}", "share": f"{own / total:.1%}"}
        for name, own in parts.items()
    ]
    print("\n" + reports.markdown_table(shares, ["part", "ms", "share"]))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="a tiny network, one round")
    parser.add_argument("--json", help="file for all numbers")
    options = parser.parse_args(sys.argv[1:] if args is None else args)
    if options.quick:
        vars(options).update(QUICK)
    return options


def build(options: argparse.Namespace) -> tuple[Loop, training.TrainState]:
    """A ResNet with AGIP on made-up images."""
    shape = options.size, options.size, 3
    size = 8 * options.batch
    made = data.make_synthetic(image_shape=shape, num_classes=10, train_size=size, test_size=1)
    mesh = sharding.make_mesh()
    split = sharding.replicate(made[0], mesh)
    model = getattr(models, options.model)(num_classes=10, rngs=nnx.Rngs(0))
    tx = jaxprune.chain(
        optax.sgd(0.1, momentum=0.9), jaxprune.agip_transform(0.72, start=1, stop=2, every=1)
    )
    graphdef, state = training.create_state(model, tx, mesh)

    def prepare(key: jax.Array, images: jax.Array) -> jax.Array:
        return data.augment(key, images, pad=2, flip=True).astype(jnp.float32) / 255

    run = training.make_chunk_step(training.make_train_step(graphdef, tx, prepare), mesh)
    chunk = 1 if jax.default_backend() == "cpu" else options.steps
    rows = jnp.tile(jnp.arange(options.batch, dtype=jnp.int32), (chunk, 1))
    batches = data.index_batches(size, options.batch, seed=0)
    return Loop(run, split, mesh, batches, sharding.replicate(rows, mesh), chunk), state


def bare(loop: Loop, state: Any, steps: int, key: jax.Array) -> Any:
    """The compiled step again and again; the host waits at the end only."""
    for _ in range(steps // loop.chunk):
        state, metrics = loop.run(state, loop.split, loop.rows, key)
    jax.block_until_ready(metrics)
    return state


def whole(loop: Loop, state: Any, steps: int, key: jax.Array) -> Any:
    """The loop of the training scripts, with one line of metrics."""
    stop = int(state.step) + steps
    return training.fit(
        state, stop, loop.run, loop.split, loop.batches, key, loop.mesh,
        chunk=loop.chunk, log_every=steps,
    )  # fmt: skip


def split_of_a_step(loop: Loop, state: Any, steps: int, key: jax.Array) -> dict[str, float]:
    """Median seconds of a step: input, dispatch, and what the host waits for."""
    measured: dict[str, list[float]] = {"input": [], "dispatch": [], "device": []}
    for _ in range(max(3, steps // loop.chunk)):
        clock = [time.perf_counter()]
        rows = np.stack([next(loop.batches) for _ in range(loop.chunk)])
        rows = jax.block_until_ready(sharding.replicate(rows, loop.mesh))
        clock.append(time.perf_counter())
        state, metrics = loop.run(state, loop.split, rows, key)
        clock.append(time.perf_counter())
        jax.block_until_ready(metrics)
        clock.append(time.perf_counter())
        for own, first, last in zip(measured.values(), clock, clock[1:], strict=False):
            own.append((last - first) / loop.chunk)
    return {name: statistics.median(own) for name, own in measured.items()}


if __name__ == "__main__":
    main()
