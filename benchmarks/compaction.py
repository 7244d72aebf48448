"""Training steps of networks with masks, with fewer channels, and of the same widths by hand.

Times full training steps (forward, backward, SGD with momentum, running statistics) in one process:
rounds in which every arm runs once, medians of the ratios within a round.

    python benchmarks/compaction.py [--model resnet20] [--rounds 15] [--json results.json]

Arms: the dense network; the dense network with zeros in place of half of the channels of each
group; `plan.wrap` on the smaller arrays; and `models.resnet*(widths=...)`, an ordinary module of
the same widths. FLOPs are XLA's count; compilation is tracing, analysis and XLA together.
"""

import argparse
import gc
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

from jaxprune import models, reports, structure
from jaxprune.structure import Trace

TX = optax.sgd(0.1, momentum=0.9)
# Density of each group -> fraction of the parameters of a ResNet-50 that is gone, about.
DENSITIES = {"25 %": 0.866, "50 %": 0.707, "72 %": 0.53}


class Functions(NamedTuple):
    """A network as functions of its variables."""

    variables: dict[str, Any]
    evaluate: Callable[..., Any]
    train: Callable[..., Any]


class Arm(NamedTuple):
    """One way to take a training step, and what was measured."""

    name: str
    compiled: Any
    state: list[Any]  # variables and optimizer state; donated, so replaced at each call
    seconds: list[float]
    compile_seconds: float
    macs: int  # of evaluating one image


def functions_of(model: nnx.Module) -> Functions:
    """Evaluation, and training with new running statistics."""
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, state = map(nnx.to_pure_dict, states)

    def evaluate(variables: Any, images: jax.Array) -> jax.Array:
        own = nnx.merge(graphdef, variables["params"], variables["state"])
        own.eval()
        return own(images)

    def train(variables: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        own = nnx.merge(graphdef, variables["params"], variables["state"])
        own.train()
        logits = own(images)
        return logits, {"state": nnx.to_pure_dict(nnx.state(own, nnx.Not(nnx.Param)))}

    return Functions({"params": params, "state": state}, evaluate, train)


def traces_of(functions: Functions, images: Any) -> list[Trace]:
    """What `find_groups` needs to know."""
    updates = Trace(functions.train, (images,), updates=lambda output: output[1])
    return [Trace(functions.evaluate, (images,)), updates]


def step_of(train: Callable[..., Any]) -> Callable[..., Any]:
    """A training step."""

    def step(variables: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            logits, updates = train(variables | {"params": params}, images)
            logits = logits.astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        moves, opt_state = TX.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], moves)
        return {"params": params} | updates, opt_state

    return step


def make_arm(name: str, functions: Functions, images: jax.Array, labels: jax.Array) -> Arm:
    """Compiles a step."""
    variables = jax.tree.map(jnp.copy, functions.variables)
    opt_state = TX.init(variables["params"])
    began = time.perf_counter()
    jitted = jax.jit(step_of(functions.train), donate_argnums=(0, 1))
    compiled = jitted.lower(variables, opt_state, images, labels).compile()
    seconds = time.perf_counter() - began
    macs = structure.count_macs(functions.evaluate, variables, images[:1])
    print(f"compiled {name}: {seconds:.1f} s", file=sys.stderr)
    return Arm(name, compiled, [variables, opt_state], [], seconds, macs)


def wrapped(plan: structure.Plan, dense: Functions) -> Functions:
    """The same functions on smaller arrays."""
    wraps = plan.wrap(dense.evaluate), plan.wrap(dense.train)
    return Functions(plan.compact(dense.variables), *wraps)


def half_of(groups: structure.Groups, density: float) -> structure.Plan:
    """The first channels of each group."""
    keep = {n: np.arange(g.size) < max(1, round(density * g.size)) for n, g in groups.items()}
    return groups.plan(keep, multiple=8 if jax.default_backend() != "cpu" else 1)


def time_rounds(arms: list[Arm], images: jax.Array, labels: jax.Array, rounds: int) -> None:
    """Every arm once in each round; the first round does not count."""
    for number in range(rounds + 1):
        for arm in arms:
            began = time.perf_counter()
            out = arm.compiled(*arm.state, images, labels)
            arm.state[:] = jax.block_until_ready(out)
            if number:
                arm.seconds.append(time.perf_counter() - began)


def records_of(arms: list[Arm]) -> list[dict[str, Any]]:
    """A row for each arm; the first is what others are compared with."""
    records = []
    for arm in arms:
        ratios = [a / b for a, b in zip(arms[0].seconds, arm.seconds, strict=True)]
        memory = arm.compiled.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        leaves = jax.tree.leaves(arm.state[0]["params"])
        records.append(
            {
                "arm": arm.name,
                "parameters": sum(leaf.size for leaf in leaves),
                "MACs": arm.macs,
                "XLA GFLOP": arm.compiled.cost_analysis()["flops"] / 1e9,
                "peak MiB": peak / 2**20,
                "step_ms": 1e3 * statistics.median(arm.seconds),
                "times dense": statistics.median(ratios),
                "compile_s": arm.compile_seconds,
            }
        )
    return records


def measure_cpu(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Dense, masked, compacted and by hand, at half of the channels."""
    make = getattr(models, options.model)
    size, batch = options.size, options.batch
    dense = functions_of(make(num_classes=10, in_channels=3, rngs=nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    labels = jnp.arange(batch) % 10
    groups = structure.find_groups(traces_of(dense, images), dense.variables)
    plan = half_of(groups, 0.5)
    small = plan.compact(dense.variables)
    widths = models.widths_of(small["params"])
    by_hand = functions_of(make(num_classes=10, in_channels=3, widths=widths, rngs=nnx.Rngs(0)))
    arms = [
        make_arm("dense", dense, images, labels),
        make_arm("masked", dense._replace(variables=plan.mask(dense.variables)), images, labels),
        make_arm("compacted", wrapped(plan, dense), images, labels),
        make_arm("by hand", by_hand, images, labels),
    ]
    time_rounds(arms, images, labels, options.rounds)
    compacted, own = arms[2:]
    ratios = [a / b for a, b in zip(compacted.seconds, own.seconds, strict=True)]
    flops = [arm.compiled.cost_analysis()["flops"] for arm in (compacted, own)]
    print(f"compacted over by hand: time {statistics.median(ratios):.3f}, ", end="")
    print(f"FLOPs {flops[0] / flops[1]:.4f}, ", end="")
    print(f"compilation {compacted.compile_seconds / own.compile_seconds:.2f}")
    return records_of(arms)


def measure_gpu(options: argparse.Namespace) -> list[dict[str, Any]]:
    """ResNet-50, bfloat16, 224 px: dense, masked and compacted, at one size after the other."""
    dense = functions_of(models.resnet50(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(0), (options.batch, 224, 224, 3), jnp.bfloat16)
    labels = jnp.arange(options.batch) % 1000
    groups = structure.find_groups(traces_of(dense, images), dense.variables)
    records = []
    first = make_arm("dense", dense, images, labels)
    for name, density in DENSITIES.items():
        plan = half_of(groups, density)
        masked = dense._replace(variables=plan.mask(dense.variables))
        arms = [
            first,
            make_arm(f"masked, {name} fewer", masked, images, labels),
            make_arm(f"compacted, {name} fewer", wrapped(plan, dense), images, labels),
        ]
        first.seconds.clear()
        time_rounds(arms, images, labels, options.rounds)
        records += records_of(arms)[bool(records) :]
        del arms
        gc.collect()
    return records


def time_analysis(repeats: int = 3) -> float:
    """Seconds to find the groups of a ResNet-50 at 224 px from both traces."""
    model = nnx.eval_shape(lambda: models.resnet50(rngs=nnx.Rngs(0)))
    functions = functions_of(model)
    images = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        structure.find_groups(traces_of(functions, images), functions.variables)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    gpu = jax.default_backend() != "cpu"
    parser.add_argument("--model", default="resnet20", help="on CPU; on GPU it is resnet50")
    parser.add_argument("--size", type=int, default=32, help="of images, on CPU")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--skip-analysis", action="store_true", help="do not analyse ResNet-50")
    parser.add_argument("--json", help="also write the records to this file")
    options = parser.parse_args()
    records = measure_gpu(options) if gpu else measure_cpu(options)
    device = jax.devices()[0].device_kind
    versions = f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}"
    print(f"{device}, {os.cpu_count()} host cores, {versions}\n")
    print(reports.table(records, list(records[0])))
    if not options.skip_analysis:
        print(f"\ngroups of ResNet-50, evaluation and training: {time_analysis():.1f} s")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": device, "versions": versions, "arms": records}, file)


if __name__ == "__main__":
    main()
