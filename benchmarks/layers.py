"""Training steps of stacked layers that keep different widths: padded in the scan, or unrolled.

A decoder of equal layers loses MLP channels and heads, in each layer a different number. Padded, it
remains one scan over layers of the largest width, with zeros; unrolled, it is a list of layers of
their own widths. Compiles and times full training steps (forward, backward, AdamW) in one process:
rounds in which every arm is compiled once and then runs; medians over rounds. CPU seconds are those
of the process, on all of its threads; on a machine that does other work they say more.

    python benchmarks/layers.py [--layers 12] [--rounds 9] [--json results.json]
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxprune import models, training

HEADS, KV_HEADS, HEAD_DIM, MLP, WIDTH, VOCABULARY = 8, 4, 32, 768, 256, 256
QUICK = {"layers": 2, "batch": 1, "length": 8, "rounds": 1, "compilations": 1}
FULL = {"layers": 8, "batch": 4, "length": 128, "rounds": 9, "compilations": 2}
OPTIMIZER = optax.adamw(1e-3)


class Arm(NamedTuple):
    """One form of the network, and what was measured."""

    name: str
    state: list[Any]  # parameters and optimizer state; donated, so replaced at each call
    step: Any  # to be compiled
    compiled: list[Any]  # the last one
    seconds: dict[str, list[float]]


def widths(layers: int, low: float, high: float) -> list[models.DecoderWidths]:
    """The widths of each layer, from a low to a high fraction of the dense ones."""
    fractions = np.linspace(low, high, layers)
    kv_heads = [max(1, round(KV_HEADS * own)) for own in fractions]
    return [
        models.DecoderWidths(HEADS // KV_HEADS * n, n, max(1, round(MLP * own / 8)) * 8)
        for n, own in zip(kv_heads, fractions, strict=True)
    ]


def widest(own: Sequence[models.DecoderWidths]) -> list[models.DecoderWidths]:
    """Layers that are all as wide as the widest."""
    return [models.DecoderWidths(*map(max, zip(*own, strict=True)))] * len(own)


def arm(name: str, layers: Sequence[models.DecoderWidths], scanned: bool, tokens: Any) -> Arm:
    """A decoder with its step."""
    model = models.Decoder(
        VOCABULARY,
        width=WIDTH,
        layers=layers,
        head_dim=HEAD_DIM,
        scanned=scanned,
        rngs=nnx.Rngs(0),
    )
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)

    def loss(params: Any) -> Any:
        logits = nnx.merge(graphdef, params)(tokens[:, :-1])
        return training.cross_entropy(logits, tokens[:, 1:]).mean()

    def step(params: Any, opt_state: Any) -> Any:
        updates, opt_state = OPTIMIZER.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return Arm(name, [params, OPTIMIZER.init(params)], step, [], {})


@contextlib.contextmanager
def timed(own: Arm, what: str) -> Iterator[None]:
    """Notes seconds of the wall clock and of the process."""
    clocks = {f"{what}, s": time.perf_counter, f"{what}, CPU s": time.process_time}
    starts = {name: clock() for name, clock in clocks.items()}
    yield
    for name, clock in clocks.items():
        own.seconds.setdefault(name, []).append(clock() - starts[name])


def compiled(own: Arm) -> None:
    """Compiles the step of an arm once more."""
    jax.clear_caches()
    with timed(own, "compile"):
        lowered = jax.jit(own.step, donate_argnums=(0, 1)).lower(*own.state)
        own.compiled[:] = [lowered.compile()]


def run(own: Arm, times: int) -> None:
    """Runs steps of an arm, and notes the time of each but the first."""
    for index in range(times + 1):
        with timed(own, "step" if index else "first step"):
            own.state[:] = jax.block_until_ready(own.compiled[0](*own.state))


def measure(options: dict[str, int], low: float, high: float) -> list[dict[str, Any]]:
    """Measures all arms of one choice of widths."""
    shape = options["batch"], options["length"]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, shape))
    own, dense = widths(options["layers"], low, high), widths(options["layers"], 1.0, 1.0)
    arms = [
        arm("dense, scanned", dense, True, tokens),
        arm("dense, unrolled", dense, False, tokens),
        arm("padded, scanned", widest(own), True, tokens),
        arm("own widths, unrolled", own, False, tokens),
    ]
    for number in range(max(options["rounds"], options["compilations"])):
        for each in arms:
            if number < options["compilations"]:
                compiled(each)
            if number < options["rounds"]:
                run(each, 2)
    return [
        {
            "widths": f"{low:.0%} to {high:.0%}",
            "arm": each.name,
            "parameters": sum(map(np.size, jax.tree.leaves(each.state[0]))),
            "megabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(each.state)) / 2**20,
            **{name: statistics.median(times) for name, times in each.seconds.items()},
        }
        for each in arms
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads options, measures, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test, whose numbers mean nothing"
    )
    for name, value in FULL.items():
        parser.add_argument(f"--{name}", type=int, default=None, help=f"default {value}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parsed = parser.parse_args(arguments)
    options = dict(QUICK if parsed.quick else FULL)
    options |= {name: own for name in FULL if (own := getattr(parsed, name)) is not None}
    rows = [row for high in (1.0, 0.75) for row in measure(options, 0.25, high)]
    print(f"{jax.devices()[0].device_kind}, {options}")
    for row in rows:
        print(
            f"{row['widths']:>12} {row['arm']:<22} {row['parameters']:>10,} parameters "
            f"{row['megabytes']:6.1f} MiB  compile {row['compile, s']:5.1f} s "
            f"({row['compile, CPU s']:5.1f} CPU s)  step {1e3 * row['step, s']:6.0f} ms "
            f"({1e3 * row['step, CPU s']:6.0f} CPU ms)"
        )
    if parsed.json:
        parsed.json.write_text(json.dumps({"options": options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
