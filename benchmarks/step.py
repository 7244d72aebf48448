"""Cost of pruning in the optimizer step, at the shapes of ResNet-50.

Times `tx.update` + `optax.apply_updates`, jitted and donated, for the plain optimizer and for
each way to prune, in one process: rounds in which every arm runs once, medians of the ratios
within a round. Prints a table, and writes JSON if asked.

    python benchmarks/step.py [--rounds 30] [--only RigL] [--json results.json]
    python benchmarks/step.py --leaves 100 300 1000

The second command times the compilation instead, for networks of that many kernels.

The floor counts the bytes that one step must read and write per parameter, relative to the
plain optimizer: SGD with momentum moves 24 bytes (read gradient, momentum, parameter and the
new momentum again; write momentum and parameter), a mask adds 1 (2 where the
members before it see the sparse network), a float32 average 12, dense weights underneath 17.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxprune
from jaxprune import budgets, models, patterns, rates

SPARSITY = 0.72
EVERY = 100


class Arm(NamedTuple):
    """One way to run the optimizer: its step, where it stands, and what was measured."""

    name: str
    floor: float | None  # bytes moved per parameter over those of the plain optimizer
    step: Callable[..., Any]
    compile_seconds: float  # of the first call
    state_bytes: float  # per parameter, beyond the plain optimizer's state
    seconds: list[float]


def parameters() -> Any:
    """Random parameters with the shapes of ResNet-50, as a pure tree."""
    model = nnx.eval_shape(lambda: models.resnet50(rngs=nnx.Rngs(0)))
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(random.standard_normal(x.shape, dtype=np.float32)), shapes
    )


def optimizers() -> dict[str, tuple[float | None, optax.GradientTransformation]]:
    """The arms: name -> (floor, optimizer). The first is the baseline."""

    sgd = optax.sgd(0.1, momentum=0.9)

    def prune(method: str = "agip", **options: Any) -> optax.GradientTransformation:
        # The ramp runs long after the steps that are timed.
        options = {"every": EVERY, "start": 0, "stop": 10_000} | options
        return getattr(jaxprune, f"{method}_transform")(SPARSITY, **options)

    def pruned(method: str = "agip", **options: Any) -> optax.GradientTransformation:
        return jaxprune.chain(sgd, prune(method, **options))

    _, masks = jaxprune.prune(parameters(), SPARSITY)
    two_of_four = {"budget": budgets.uniform, "pattern": two_of_four_where_it_fits}
    return {
        "sgd, momentum": (1.0, sgd),
        "magnitude": (26 / 24, pruned("magnitude")),
        "magnitude, 2:4": (26 / 24, pruned("magnitude", **two_of_four)),
        "saliency": (26 / 24, pruned("saliency")),
        "random": (26 / 24, pruned("random")),
        "SET": (26 / 24, pruned("set")),
        "RigL": (26 / 24, pruned("rigl")),
        "AC/DC": (26 / 24, pruned("acdc")),
        "fixed masks": (26 / 24, jaxprune.chain(sgd, jaxprune.fixed_mask_transform(masks))),
        "straight-through": (41 / 24, pruned("straight_through", every=EVERY)),
        "AGIP, statistic from the momentum": (25 / 24, pruned(decay=None)),
        "AGIP, average in float32": (37 / 24, pruned()),
        "AGIP, average in bfloat16": (33 / 24, pruned(dtype=jnp.bfloat16)),
        "AGIP, plain optax.chain": (41 / 24, optax.chain(sgd, prune())),
        "AGIP, regrowth": (37 / 24, pruned(regrow=0.3)),
        "AGIP, rate by density": (37 / 24, pruned(rate=rates.by_density())),
        "AGIP, rate by statistic": (41 / 24, pruned(rate=rates.by_statistic())),
    }


def two_of_four_where_it_fits(path: str, leaf: Any) -> patterns.Pattern:
    """2:4 along the input channels, single weights in the first convolution."""
    return patterns.n_m(2, 4, axis=-2) if leaf.shape[-2] % 4 == 0 else None


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def set_step(state: Any, step: int, done: int, *, due: bool) -> Any:
    """Moves a pruning state to a step of its calendar, at which its mask update is due or done."""
    if not optax.tree.get_all_with_path(state, "prune_step"):
        return state
    state = optax.tree.set(state, prune_step=jnp.int32(step), mask_updates=jnp.int32(done))
    return optax.tree.set(state, timetable_mark=jnp.int32(0)) if due else state


def measure(rounds: int, mask_rounds: int, only: str | None) -> list[dict[str, Any]]:
    """Runs all arms, interleaved, and returns one record for each."""
    start = parameters()
    gradients = jax.tree.map(lambda x: x * 0.01, start)
    size = sum(x.size for x in jax.tree.leaves(start))
    arms, runs, baseline_bytes = [], [], None
    for name, (floor, tx) in optimizers().items():
        if only and only not in name and arms:
            continue

        def step(params: Any, state: Any, gradients: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.copy, start)
        state = tx.init(params)
        baseline_bytes = baseline_bytes or tree_bytes(state)
        clock = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        extra = (tree_bytes(state) - baseline_bytes) / size
        params, state = jax.block_until_ready(jitted(params, state, gradients))
        seconds = time.perf_counter() - clock
        arms.append(Arm(name, floor, jitted, seconds, extra, []))
        runs.append([params, state])
        print(f"compiled {name}: {seconds:.1f} s", file=sys.stderr)

    def timed(i: int) -> float:
        clock = time.perf_counter()
        runs[i] = list(jax.block_until_ready(arms[i].step(*runs[i], gradients)))
        return time.perf_counter() - clock

    mask_seconds: list[list[float]] = [[] for _ in arms]
    for _ in range(mask_rounds):  # half way down the ramp
        for i in range(len(arms)):
            runs[i][1] = set_step(runs[i][1], 5000, 50, due=True)
            mask_seconds[i].append(timed(i))
    for r in range(rounds + 2):
        for i, arm in enumerate(arms):
            runs[i][1] = set_step(runs[i][1], 5001, 51, due=False)
            seconds = timed(i)
            if r >= 2:
                arm.seconds.append(seconds)
    plain = arms[0].seconds
    records = []
    for arm, mask in zip(arms, mask_seconds, strict=True):
        ratio = statistics.median(a / b for a, b in zip(arm.seconds, plain, strict=True))
        median, mask_median = statistics.median(arm.seconds), statistics.median(mask)
        records.append(
            {
                "arm": arm.name,
                "step_ms": 1e3 * median,
                "ratio": ratio,
                "floor": arm.floor,
                "mask_update_ms": 1e3 * mask_median,
                "amortised_ratio": ratio
                + (mask_median - median) / EVERY / statistics.median(plain),
                "state_bytes_per_parameter": arm.state_bytes,
                "compile_s": arm.compile_seconds,
            }
        )
    return records


def measure_compilation(leaves: int) -> dict[str, Any]:
    """Times tracing and compilation of a step, plain and pruned, for kernels in fifteen shapes."""
    shapes = [(32, 8 * (1 + i)) if i % 2 else (3, 3, 4, 4 * (1 + i)) for i in range(15)]
    params = {
        f"layer{i}": {"kernel": jax.ShapeDtypeStruct(shapes[i % len(shapes)], jnp.float32)}
        for i in range(leaves)
    }
    sgd = optax.sgd(0.1, momentum=0.9)
    arms = {
        "plain": sgd,
        "pruned": jaxprune.chain(sgd, jaxprune.agip_transform(SPARSITY, every=EVERY, stop=10_000)),
    }
    record: dict[str, Any] = {"leaves": leaves}
    for name, tx in arms.items():

        def step(params: Any, state: Any, gradients: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        clocks = time.perf_counter, time.process_time
        began = [clock() for clock in clocks]
        jax.jit(step).lower(params, state, params).compile()
        seconds = [clock() - start for clock, start in zip(clocks, began, strict=True)]
        record |= {f"{name}_s": seconds[0], f"{name}_cpu_s": seconds[1]}
    return record | {"cpu_ratio": record["pruned_cpu_s"] / record["plain_cpu_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=30, help="steps without a mask update")
    parser.add_argument("--mask-rounds", type=int, default=7, help="steps with a mask update")
    parser.add_argument("--only", help="run the baseline and the arms whose name contains this")
    parser.add_argument("--json", help="also write the records to this file")
    parser.add_argument("--leaves", type=int, nargs="+", help="time compilation for such networks")
    arguments = parser.parse_args()
    if arguments.leaves:
        jax.config.update("jax_enable_compilation_cache", False)
        measure_compilation(3)  # what is imported or made once
        records = [measure_compilation(leaves) for leaves in arguments.leaves]
    else:
        records = measure(arguments.rounds, arguments.mask_rounds, arguments.only)
    device = jax.devices()[0]
    versions = f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}"
    print(f"{device.device_kind}, {os.cpu_count()} host cores, {versions}\n")
    print(jaxprune.reports.table(records, list(records[0])))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": device.device_kind, "versions": versions, "arms": records}, file)


if __name__ == "__main__":
    main()
