"""Whole training steps and batches of inference with sparse kernels, against masked dense ones.

For a ResNet-20, a MobileNetV1 and the MLPs of a transformer, at some sparsities: one training step
(forward, backward, SGD with momentum, masks that do not change) and one batch of inference. In one
process, in rounds in which every program runs once; the table has medians over rounds of the ratio
dense / sparse within a round, with quartiles. On one thread the clock is that of the process, on
several it is the wall clock. Outputs are compared with those of the dense function first.

    python benchmarks/kernel_steps.py [--threads 1 2] [--rounds 15] [--only resnet20 mlp]

Masks are those of the largest weights, in every layer alike, or with `--budget
erdos_renyi_kernel` as the budget of that name divides them, which leaves more in the layers that
take most time. For the MobileNet there is an arm with dense kernels for its depthwise
convolutions alone, to tell both gains apart. With `--onnxruntime` (pip install onnx onnxruntime)
inference is compared with onnxruntime's, too, which computes all weights.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SPARSITIES = (0.8, 0.9, 0.95)
NAMES = ("resnet20", "mobilenet_v1", "mlp")


class Network(NamedTuple):
    """A network, and a batch for it."""

    evaluate: Callable[..., Any]  # (variables, inputs) -> outputs
    train: Callable[..., Any]  # the same in training mode, with new statistics
    variables: Any  # with "params"
    inputs: Any


def network(name: str, scale: int = 1) -> Network:
    """Makes a network; `scale` divides its batch, for tests."""
    import jax
    from flax import nnx

    from jaxprune import models, structure

    key = jax.random.key(1)
    if name == "mlp":
        return transformer_mlps(key, max(1, 1024 // scale))
    options: dict[str, Any] = {"num_classes": 10, "rngs": nnx.Rngs(0)}
    if name == "resnet20":
        model: Any = models.resnet20(in_channels=1, **options)
        shape = max(1, 64 // scale), 28, 28, 1
    else:
        widths = models.default_widths("mobilenet_v1", 1.0 if scale == 1 else 0.25)
        model = models.mobilenet_v1(in_channels=3, widths=widths, **options)
        shape = max(1, 32 // scale), 64, 64, 3
    own = structure.from_nnx(model, state="model_state")
    return Network(own.evaluate, own.train, own.variables, jax.random.normal(key, shape))


def transformer_mlps(key: Any, tokens: int, width: int = 512, layers: int = 4) -> Network:
    """Makes residual blocks of layer norm, width -> 4 width, GELU, and back."""
    import jax
    import jax.numpy as jnp

    keys = iter(jax.random.split(key, 2 * layers + 1))

    def normal(*shape: int) -> Any:
        return jax.random.normal(next(keys), shape) / shape[0] ** 0.5

    blocks = [
        {"up": normal(width, 4 * width), "down": normal(4 * width, width)} for _ in range(layers)
    ]

    def evaluate(variables: Any, x: Any) -> Any:
        for block in variables["params"]:
            mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
            own = (x - mean) * jax.lax.rsqrt(variance + 1e-6)
            x = x + jax.nn.gelu(own @ block["up"]) @ block["down"]
        return x

    inputs = jax.random.normal(next(keys), (tokens, width))
    variables = {"params": blocks, "model_state": {"steps": jnp.zeros(())}}
    return Network(evaluate, lambda v, x: (evaluate(v, x), {}), variables, inputs)


def pruned(own: Network, sparsity: float, budget: str = "uniform") -> tuple[Any, Any]:
    """Returns variables without the smallest weights, and the masks of all variables."""
    import jax

    import jaxprune

    rule = getattr(jaxprune.budgets, budget)
    params, masks = jaxprune.prune(own.variables["params"], sparsity, budget=rule)
    everything = jax.tree.map(lambda _: True, own.variables) | {"params": masks}
    return {**own.variables, "params": params}, everything


def training_step(train: Callable[..., Any], masks: Any, variables: Any, inputs: Any) -> Any:
    """Compiles a step; returns a function without arguments that runs it on the same state."""
    import jax
    import optax

    import jaxprune

    optimizer = jaxprune.chain(
        optax.sgd(0.01, momentum=0.9), jaxprune.fixed_mask_transform(masks["params"])
    )
    params = variables["params"]
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params: Any, opt_state: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            outputs, updates = train({**variables, "params": params}, x)
            return (outputs**2).mean(), updates

        gradients, updates = jax.grad(loss, has_aux=True)(params)
        changes, opt_state_ = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, changes), opt_state_, updates

    compiled = step.lower(params, opt_state, inputs).compile()
    return lambda: jax.block_until_ready(compiled(params, opt_state, inputs))[0]


def inference(evaluate: Callable[..., Any], variables: Any, inputs: Any) -> Any:
    """Compiles inference; returns a function without arguments that runs it."""
    import jax

    compiled = jax.jit(evaluate).lower(variables, inputs).compile()
    return lambda: jax.block_until_ready(compiled(variables, inputs))


def onnx_session(own: Network, variables: Any, threads: int) -> Any:
    """Returns a function without arguments that runs the network in onnxruntime."""
    import numpy as np
    import onnxruntime  # pyright: ignore[reportMissingImports]

    from jaxprune import export

    path = Path(tempfile.mkdtemp(), "network.onnx")
    export.onnx(own.evaluate, variables, own.inputs, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Otherwise its threads wait actively when it is done, and slow down what runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.asarray(own.inputs)}
    return lambda: session.run(None, feed)[0]


def arms(
    name: str,
    sparsities: Any,
    with_onnx: bool,
    threads: int,
    budget: str = "uniform",
    scale: int = 1,
) -> Any:
    """Compiles all programs of a network: (mode, arm, sparsity) -> function without arguments."""
    import jax
    import numpy as np

    from jaxprune import kernels

    own, found = network(name, scale), {}
    for sparsity in sparsities:
        variables, masks = pruned(own, sparsity, budget)
        args = variables, own.inputs
        found.setdefault(("step", "dense", None), training_step(own.train, masks, *args))
        found.setdefault(("inference", "dense", None), inference(own.evaluate, *args))
        reference = jax.tree.leaves(found["step", "dense", None]())
        if name == "mobilenet_v1":
            train, evaluate = map(kernels.replace_depthwise, (own.train, own.evaluate))
            found.setdefault(("step", "depthwise", None), training_step(train, masks, *args))
            found.setdefault(("inference", "depthwise", None), inference(evaluate, *args))
        if with_onnx:
            session = onnx_session(own, variables, threads)
            found.setdefault(("inference", "onnxruntime", None), session)
        train = kernels.wrap(own.train, masks, *args)
        evaluate = kernels.wrap(own.evaluate, masks, *args, gradients=False)
        print(f"{name} at {sparsity:.0%}, training: {str(train).splitlines()[0]}", flush=True)
        found["step", "sparse", sparsity] = training_step(train, masks, *args)
        found["inference", "sparse", sparsity] = inference(evaluate, *args)
        if sparsity == sparsities[0]:
            largest = max(float(np.abs(y).max()) for y in reference)
            for x, y in zip(jax.tree.leaves(found["step", "sparse", sparsity]()), reference):
                np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * largest)
    return found


def measure(programs: Any, rounds: int, clock: Callable[[], float]) -> dict[Any, Any]:
    """Times all programs in turns; returns their seconds, one for each round."""
    import numpy as np

    seconds: dict[Any, list[float]] = {key: [] for key in programs}
    for number in range(rounds + 1):
        for key, run in programs.items():
            start = clock()
            run()
            if number:  # the first round warms up
                seconds[key].append(clock() - start)
    return {key: np.array(own) for key, own in seconds.items()}


def rows_of(name: str, seconds: dict[Any, Any]) -> list[dict[str, Any]]:
    """Returns a row for each program that is compared with the dense one of its mode."""
    import numpy as np

    rows = []
    for (mode, arm, sparsity), own in seconds.items():
        dense = seconds[mode, "dense", None]
        low, middle, high = np.quantile(dense / own, [0.25, 0.5, 0.75])
        row = {"network": name, "mode": mode, "arm": arm, "sparsity": sparsity}
        rows.append(
            row | {"ms": 1e3 * float(np.median(own)), "ratio": [*map(float, (low, middle, high))]}
        )
    return sorted(rows, key=lambda row: row["mode"], reverse=True)


def show(row: dict[str, Any]) -> str:
    """Returns a row of a table in Markdown."""
    low, middle, high = row["ratio"]
    sparsity = "" if row["sparsity"] is None else f"{row['sparsity']:.0%}"
    return (
        f"| {row['network']} | {row['mode']} | {row['arm']} | {sparsity} | {row['ms']:.1f} | "
        f"{middle:.2f} ({low:.2f}-{high:.2f}) |"
    )


def run_here(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """Measures all networks on some threads; JAX must not have started yet."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxprune import kernels, training

    training.keep_memory()  # as all commands do
    reason = kernels.available()
    if reason:
        sys.exit(f"kernels are not available: {reason}")
    clock, rows = time.process_time if threads == 1 else time.perf_counter, []
    for name in options.only:
        programs = arms(name, options.sparsities, options.onnxruntime, threads, options.budget)
        own = rows_of(name, measure(programs, options.rounds, clock))
        rows += [{"threads": threads} | row for row in own]
        print(f"\n{threads} thread(s), {platform.machine()}\n")
        print("| network | mode | arm | sparsity | ms | dense / this (quartiles) |")
        print("|---|---|---|---|---|---|")
        print("\n".join(map(show, own)), flush=True)
    return rows


def main() -> None:
    """Runs one process for each number of threads, since XLA decides on them when it starts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument(
        "--budget", default="uniform", choices=["uniform", "erdos_renyi_kernel"],
        help="how sparsities are divided among layers; default: uniform",
    )  # fmt: skip
    parser.add_argument("--onnxruntime", action="store_true", help="compare inference with it")
    parser.add_argument("--json", type=Path, help="the results as a file")
    options = parser.parse_args()
    if len(options.threads) == 1:
        rows = run_here(options, options.threads[0])
    else:
        rows = []
        for threads in options.threads:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "rows.json")
                part = [*sys.argv[1:], "--threads", str(threads), "--json", str(path)]
                subprocess.run([sys.executable, __file__, *part], check=True)
                rows += json.loads(path.read_text())
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
