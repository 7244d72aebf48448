"""Exact selection of the largest scores against sorting them, and N:M against two argsorts.

Scores of one convolution of a ResNet-50 and of all its 54 pruned leaves, selected globally, with
and without ties (scores rounded to bfloat16). The peers get one vector and return what they
sort: a mask would still have to be made from it. In one process, each run of a peer follows a
run of ours; medians of times and of their ratios. Prints a table, and writes JSON if asked.

    python benchmarks/selection.py [--rounds 9] [--large-rounds 2] [--json results.json]

The floor is the time of one read of the scores at the bandwidth of a copy, measured here.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune import models, patterns, reports, selection, trees

DENSITY = 0.28
LEAF = (3, 3, 512, 512)
Arms = dict[str, tuple[Callable[..., Any], Any]]  # name -> (function, argument)


def pruned_shapes() -> list[tuple[int, ...]]:
    """Shapes of the leaves of a ResNet-50 that are pruned by default."""
    model = nnx.eval_shape(lambda: models.resnet50(rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return [leaf.shape for leaf in trees.pick(params, trees.prunable_flags(params))]


def scores(shapes: list[tuple[int, ...]], ties: bool) -> list[jax.Array]:
    """Magnitudes of random weights; rounded, about a hundred values hold most of them."""
    random = np.random.default_rng(0)
    drawn = [jnp.abs(random.standard_normal(shape, dtype=np.float32)) for shape in shapes]
    return [x.astype(jnp.bfloat16).astype(jnp.float32) for x in drawn] if ties else drawn


def selections(leaves: list[jax.Array], peers: int = 3) -> Arms:
    """Ours first, then the sorts, or the first of them."""
    flat = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
    keep = round(DENSITY * flat.size)
    sorts = {
        "jnp.sort": (jnp.sort, flat),
        "jnp.argsort": (jnp.argsort, flat),
        "jax.lax.top_k": (lambda x: jax.lax.top_k(x, keep), flat),
    }
    ours = {"selection.largest": (lambda tree: selection.largest(tree, keep), leaves)}
    return ours | dict(list(sorts.items())[:peers])


def two_of_four(leaf: jax.Array, axis: int) -> Arms:
    """2:4 along an axis, ours first."""

    def ranked(x: jax.Array) -> jax.Array:
        end = x.ndim + axis
        groups = x.reshape(*x.shape[:end], x.shape[end] // 4, 4, *x.shape[end + 1 :])
        ranks = jnp.argsort(jnp.argsort(groups, axis=axis), axis=axis)
        return (ranks >= 2).reshape(x.shape)

    return {
        "patterns.n_m_mask": (lambda x: patterns.n_m_mask(x, 2, 4, axis), leaf),
        "argsort of argsort": (ranked, leaf),
    }


def seconds(function: Callable[..., Any], argument: Any) -> float:
    """Duration of one call."""
    clock = time.perf_counter()
    jax.block_until_ready(function(argument))
    return time.perf_counter() - clock


def bandwidth() -> float:
    """Bytes per second that a copy of 100 MB reads and writes."""
    x = jnp.zeros(25_000_000, jnp.float32)
    copy = jax.jit(jnp.negative)
    return 2 * x.nbytes / statistics.median(seconds(copy, x) for _ in range(9))


def measure(task: str, arms: Arms, rounds: int, rate: float) -> list[dict[str, Any]]:
    """Runs ours before each peer and returns one record for each arm."""
    compiled, compile_seconds = [], []
    for function, argument in arms.values():
        jax.clear_caches()
        clock = time.perf_counter()
        compiled.append(jax.jit(function).lower(argument).compile())
        compile_seconds.append(time.perf_counter() - clock)
    arguments = [argument for _, argument in arms.values()]
    jax.block_until_ready(compiled[0](arguments[0]))  # ours is short enough to notice a cold start
    times: list[list[float]] = [[] for _ in arms]
    ratios: list[list[float]] = [[1.0], *([] for _ in compiled[1:])]
    for _ in range(rounds):
        for i in range(1, len(compiled)):
            times[0].append(seconds(compiled[0], arguments[0]))
            times[i].append(seconds(compiled[i], arguments[i]))
            ratios[i].append(times[i][-1] / times[0][-1])
    size = sum(leaf.size for leaf in jax.tree.leaves(arguments[0]))
    print(f"measured {task}", file=sys.stderr)
    return [
        {
            "task": task,
            "entries": size,
            "arm": name,
            "ms": 1e3 * statistics.median(mine),
            "times_ours": statistics.median(ratio),
            "floor_ms": 4e3 * size / rate,
            "compile_s": spent,
        }
        for name, mine, ratio, spent in zip(arms, times, ratios, compile_seconds, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9, help="for one leaf")
    parser.add_argument("--large-rounds", type=int, default=2, help="for all leaves")
    parser.add_argument("--json", help="also write the records to this file")
    arguments = parser.parse_args()
    rate, shapes, records = bandwidth(), pruned_shapes(), []
    for ties in (False, True):
        kind = ", ties" if ties else ""
        one, all_ = scores([LEAF], ties), scores(shapes, ties)
        records += measure(f"one leaf{kind}", selections(one), arguments.rounds, rate)
        # A sort of all leaves takes 10 s and does not depend on ties: one peer.
        arms = selections(all_, peers=1) if ties else selections(all_)
        records += measure(f"{len(shapes)} leaves{kind}", arms, arguments.large_rounds, rate)
    for axis in (-2, -1):
        arms = two_of_four(scores([LEAF], ties=False)[0], axis)
        records += measure(f"2:4, axis {axis}", arms, arguments.rounds, rate)

    device = jax.devices()[0]
    setting = {
        "device": device.device_kind,
        "host_cores": os.cpu_count(),
        "jax": jax.__version__,
        "copy_gb_per_s": rate / 1e9,
        "leaf": math.prod(LEAF),
        "density": DENSITY,
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()), end="\n\n")
    print(reports.table(records, list(records[0])))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(setting | {"arms": records}, file)


if __name__ == "__main__":
    main()
