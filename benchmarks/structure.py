"""Training steps of a network with masks, with fewer channels, and of the same widths by hand.

Compiles and times full training steps (forward, backward, SGD with momentum, running statistics) in
one process: rounds in which every arm is compiled, and then runs, once; medians of the ratios
within a round. Prints tables, and writes JSON if asked.

    python benchmarks/structure.py [--model resnet20] [--rounds 15] [--json results.json]

Arms: the dense network; the dense network with masks; the functions of `plan.wrap` on the smaller
arrays; an ordinary module of the same widths, `models.resnet*(widths=...)`. A ResNet-20 loses half
of the channels of each group; on GPU, a ResNet-50 loses 25, 50 and 72 % of its parameters.

MACs are those of one image in evaluation, FLOPs XLA's count for the step, and peak memory what XLA
plans for it. Where the device counts what it allocates, that stands beside it. `trace_s` is all
that comes before XLA: of a compacted network, with its analysis.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxprune
from jaxprune import models, reports, structure

SGD = optax.sgd(0.1, momentum=0.9)
QUICK = {"model": "resnet8", "size": 8, "batch": 4, "rounds": 1, "compilations": 1}
CPU = {"model": "resnet20", "size": 32, "batch": 128, "rounds": 15, "compilations": 3}
GPU = {"model": "resnet50", "size": 224, "batch": 128, "rounds": 30, "compilations": 1}
GPU |= {"dtype": "bfloat16", "fewer": [25, 50, 72]}


class Functions(NamedTuple):
    """A network as functions of its variables."""

    variables: dict[str, Any]
    evaluate: Callable[..., Any]
    train: Callable[..., Any]


class Arm(NamedTuple):
    """One way to take a training step, and what was measured."""

    name: str
    functions: Functions
    tx: optax.GradientTransformation
    program: list[Any]  # compiled, the last one
    state: list[Any]  # variables and optimizer state; donated, so replaced at each call
    seconds: dict[str, list[float]]  # of tracing, of XLA and of steps
    memory: list[int]  # what the device counted of the first steps


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


def groups_of(functions: Functions, images: Any) -> structure.Groups:
    """From both ways to call the network."""
    evaluate = structure.Trace(functions.evaluate, (images,))
    train = structure.Trace(functions.train, (images,), updates=lambda output: output[1])
    return structure.find_groups([evaluate, train], functions.variables)


def plans_of(groups: structure.Groups, fewer: Sequence[int]) -> dict[str, structure.Plan]:
    """The same fraction of each group goes: so many per cent of all parameters, or else half."""
    ranks = {name: -np.arange(group.size) / group.size for name, group in groups.items()}
    if not fewer:
        return {"half": groups.plan(structure.keep_uniform(groups, ranks, 0.5))}
    count, plans = structure.count_parameters, {}
    for percent in fewer:
        limit = (1 - percent / 100) * count(groups.plan({}))
        keep = structure.keep_within(groups, ranks, limit, count)
        plans[f"{percent} % fewer"] = groups.plan(keep)
    return plans


def step_of(train: Callable[..., Any], tx: optax.GradientTransformation) -> Callable[..., Any]:
    """A training step."""

    def step(variables: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            logits, updates = train(variables | {"params": params}, images)
            logits = logits.astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        moves, opt_state = tx.update(grads, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], moves)} | updates, opt_state

    return step


def make_arms(options: argparse.Namespace) -> list[Arm]:
    """All of them, not compiled; the dense one first."""
    make = getattr(models, options.model)
    shared = {"dtype": jnp.dtype(options.dtype), "rngs": nnx.Rngs(0)}
    dense = functions_of(make(**shared))
    images = jax.ShapeDtypeStruct((options.batch, options.size, options.size, 3), options.dtype)
    arms = [("dense", dense, SGD)]
    for name, plan in plans_of(groups_of(dense, images), options.fewer).items():
        if len(arms) == 1:  # how many are masked makes no difference
            ones = jax.tree.map(jnp.ones_like, dense.variables)
            masks = jax.tree.map(jnp.bool, plan.mask(ones)["params"])
            tx = jaxprune.chain(SGD, jaxprune.fixed_mask_transform(masks))
            arms.append((f"masked, {name}", dense, tx))
        small = plan.compact(dense.variables)
        wraps = plan.wrap(dense.evaluate), plan.wrap(dense.train)
        widths = models.widths_of(small["params"])
        by_hand = functions_of(make(widths=widths, **shared))
        arms += [
            (f"compacted, {name}", Functions(small, *wraps), SGD),
            (f"by hand, {name}", by_hand, SGD),
        ]
    return [Arm(*arm, [], [], {"trace": [], "xla": [], "step": []}, []) for arm in arms]


def compile_arm(arm: Arm, batch: Sequence[jax.Array]) -> None:
    """Compiles the step from the beginning, nothing of it known from before."""
    variables = arm.functions.variables
    began = time.perf_counter()
    step = jax.jit(step_of(arm.functions.train, arm.tx), donate_argnums=(0, 1))
    lowered = step.lower(variables, jax.eval_shape(arm.tx.init, variables["params"]), *batch)
    traced = time.perf_counter()
    arm.program[:] = [lowered.compile()]
    arm.seconds["trace"].append(traced - began)
    arm.seconds["xla"].append(time.perf_counter() - traced)


def start(arm: Arm, batch: Sequence[jax.Array]) -> None:
    """Two steps that are not timed; what the device counts is new if no arm before needs more."""
    before = allocated("bytes_in_use")
    variables = jax.tree.map(jnp.copy, arm.functions.variables)
    arm.state[:] = [variables, arm.tx.init(variables["params"])]
    run(arm, batch)
    run(arm, batch)
    if before is not None:
        arm.memory.append(allocated("peak_bytes_in_use") - before)


def allocated(name: str) -> Any:
    """What the device knows of its memory, if it does."""
    return (jax.devices()[0].memory_stats() or {}).get(name)


def run(arm: Arm, batch: Sequence[jax.Array]) -> float:
    """Duration of one step."""
    began = time.perf_counter()
    arm.state[:] = jax.block_until_ready(arm.program[0](*arm.state, *batch))
    return time.perf_counter() - began


def measure(options: argparse.Namespace) -> list[Arm]:
    """Compiles and runs all arms."""
    shape = options.batch, options.size, options.size, 3
    images = jax.random.normal(jax.random.key(0), shape, options.dtype)
    batch = images, jnp.arange(options.batch) % 10
    arms = make_arms(options)
    for number in range(options.compilations):
        for arm in arms:
            compile_arm(arm, batch)
            print(f"compiled {arm.name} ({number + 1})", file=sys.stderr)
    for arm in sorted(arms, key=lambda arm: reports.measure_memory(arm.program[0]).peak):
        start(arm, batch)
    for _ in range(options.rounds):
        for arm in arms:
            arm.seconds["step"].append(run(arm, batch))
    return arms


def flops(arm: Arm) -> float:
    """Of a step, by XLA's count."""
    return arm.program[0].cost_analysis()["flops"]


def record_of(arm: Arm, dense: Arm, size: int) -> dict[str, Any]:
    """A row of the table."""
    variables, evaluate = arm.functions.variables, arm.functions.evaluate
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return {
        "arm": arm.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "MACs": structure.count_macs(evaluate, variables, image),
        "GFLOP": flops(arm) / 1e9,
        "peak MiB": reports.measure_memory(arm.program[0]).peak / 2**20,
        "allocated MiB": arm.memory[0] / 2**20 if arm.memory else None,
        "step_ms": 1e3 * statistics.median(arm.seconds["step"]),
        "times faster": ratio(dense.seconds["step"], arm.seconds["step"]),
        "trace_s": statistics.median(arm.seconds["trace"]),
        "xla_s": statistics.median(arm.seconds["xla"]),
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def ratios_of(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Compacted networks over those of the same widths by hand."""
    records = []
    for ours, theirs in zip(arms[2::2], arms[3::2], strict=True):
        parts = [(arm.seconds["trace"], arm.seconds["xla"]) for arm in (ours, theirs)]
        both = [list(map(sum, zip(*own, strict=True))) for own in parts]
        records.append(
            {
                "over by hand": ours.name,
                "step": ratio(ours.seconds["step"], theirs.seconds["step"]),
                "FLOPs": flops(ours) / flops(theirs),
                "trace": ratio(*[own[0] for own in parts]),
                "xla": ratio(*[own[1] for own in parts]),
                "trace and xla": ratio(*both),
            }
        )
    return records


def time_analysis(model: str, size: int, repeats: int) -> float:
    """Seconds to find the groups of a network, evaluation and training."""
    functions = functions_of(nnx.eval_shape(lambda: getattr(models, model)(rngs=nnx.Rngs(0))))
    images = jax.ShapeDtypeStruct((128, size, size, 3), jnp.float32)
    seconds = []
    for _ in range(repeats):
        jax.clear_caches()  # of traces
        began = time.perf_counter()
        groups_of(functions, images)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def parse(defaults: Mapping[str, Any]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model")
    parser.add_argument("--size", type=int, help="of images")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dtype", default="float32", help="to compute in")
    parser.add_argument(
        "--fewer", type=int, nargs="*", default=[], help="per cent of the parameters; or else half "
        "of the channels",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="steps of each arm")
    parser.add_argument("--compilations", type=int, help="of each arm")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--json", help="also write the records to this file")
    parser.set_defaults(**defaults)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def main() -> None:
    """Measures, prints and writes."""
    options = parse(CPU if jax.default_backend() == "cpu" else GPU)
    if not options.quick:  # a program from a cache on disk would not be compiled
        jax.config.update("jax_enable_compilation_cache", False)
    arms = measure(options)
    large = ("resnet8", 8, 1) if options.quick else ("resnet50", 224, 3)
    setting = {
        "device": jax.devices()[0].device_kind,
        "host_cores": os.cpu_count(),
        "versions": f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}",
        **{name: getattr(options, name) for name in ("model", "size", "batch", "dtype", "rounds")},
        "analysis": f"{large[0]} at {large[1]} pixels",
        "analysis_s": time_analysis(*large),
    }
    records, ratios = [record_of(arm, arms[0], options.size) for arm in arms], ratios_of(arms)
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    for own in (records, ratios):
        print("\n" + reports.table(own, list(own[0])))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(setting | {"arms": records, "ratios": ratios}, file)


if __name__ == "__main__":
    main()
