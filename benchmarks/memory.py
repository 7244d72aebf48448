"""What `training.keep_memory` does for a training step on a CPU, with huge pages and without.

For a ResNet-20, one of half its widths, and one with 80 % of its weights pruned and sparse kernels:
the time of a step in a process that gives memory back, as JAX does by default, in one that keeps
it, and in one that keeps it in huge pages. An allocator belongs to a process, so each figure is the
median step of a process of its own; processes run in turns, and the table has medians over rounds
of the ratio to the first kind, with the least and the greatest.

    python benchmarks/memory.py [--rounds 5] [--steps 40] [--batch 64] [--only narrow kernels]

Pin it to one core (`taskset -c 0`); the clock is that of the process, and so is the memory, the
most that the process ever held.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

NAMES = ("dense", "narrow", "kernels")
MODES = ("given back", "kept", "huge pages")


def run_steps(name: str, batch: int, steps: int) -> list[float]:
    """Trains a network on one batch and returns the seconds of each step."""
    import jax
    from flax import nnx
    from kernel_steps import Network, pruned, training_step

    from jaxprune import kernels, models, structure

    widths = models.default_widths("resnet20")
    if name == "narrow":
        blocks = tuple(tuple(width // 2 for width in block) for block in widths.blocks)
        widths = models.Widths(stem=widths.stem // 2, blocks=blocks)
    model = models.resnet20(num_classes=10, in_channels=1, widths=widths, rngs=nnx.Rngs(0))
    inputs = jax.random.normal(jax.random.key(1), (batch, 28, 28, 1))
    parts = structure.from_nnx(model, state="model_state")
    network = Network(parts.evaluate, parts.train, parts.variables, inputs)
    variables, masks = pruned(network, 0.8 if name == "kernels" else 0.0)
    train = network.train
    if name == "kernels":
        train = kernels.wrap(train, masks, variables, inputs)
    step = training_step(train, masks, variables, inputs)
    seconds = []
    for _ in range(steps + 5):  # the first ones warm up
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return seconds[5:]


def run_here(options: argparse.Namespace) -> None:
    """Measures one network in one mode and prints the record; JAX must not have started yet."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxprune import training

    (name,), mode = options.only, options.mode
    if mode != MODES[0] and not training.keep_memory(huge_pages=mode == MODES[2]):
        sys.exit("memory cannot be kept here: that needs Linux with the GNU C library")
    seconds = statistics.median(run_steps(name, options.batch, options.steps))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"network": name, "mode": mode, "seconds": seconds, "bytes": most}))


def rows_of(records: list[dict]) -> list[str]:
    """Returns the rows of the table; each mode of a network has a record of each round."""
    rows, found = [], {}
    for record in records:
        found.setdefault((record["network"], record["mode"]), []).append(record)
    for (name, mode), own in found.items():
        seconds = [record["seconds"] for record in own]
        before = [record["seconds"] for record in found[name, MODES[0]]]
        ratios = [after / first for after, first in zip(seconds, before, strict=True)]
        most = statistics.median(record["bytes"] for record in own) / 2**30
        rows.append(
            f"| {name} | {mode} | {1e3 * statistics.median(seconds):.0f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {most:.2f} |"
        )
    return rows


def main() -> None:
    """Runs a process for each network and mode, in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)  # of a child process
    options = parser.parse_args()
    if options.mode:
        return run_here(options)
    records = []
    for _ in range(options.rounds):
        for name in options.only:
            for mode in MODES:
                words = ["--mode", mode, "--only", name]
                words += ["--steps", str(options.steps), "--batch", str(options.batch)]
                output = subprocess.check_output([sys.executable, __file__, *words], text=True)
                records.append(json.loads(output.splitlines()[-1]))
    print("| network | memory | ms | step / given back (range) | GiB |")
    print("|---|---|---:|---|---:|")
    print("\n".join(rows_of(records)))


if __name__ == "__main__":
    main()
