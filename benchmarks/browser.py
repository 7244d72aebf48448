"""Latency of dense, sparse, compacted and narrow MobileNets in a browser and in other runtimes.

    make bench-browser
    python benchmarks/browser.py --networks runs/phone/networks

Without `--networks` the networks are MobileNetV1 with random weights, pruned by magnitude in their
1x1 convolutions; otherwise those that `study.py phone` or the demo saved. Every network is run with
LiteRT and compared with JAX first. Networks run in turns, one inference each in every round, with
one thread: LiteRT.js in headless Chromium, LiteRT and XLA in this process. The fastest round
counts, as other programs only add time. Measurements are kept in latency.json of the folder;
`--runtimes onnx` adds onnxruntime where that is installed. Needs the extra litert, Chromium and
@litertjs/core.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import numpy as np
from flax import nnx

import jaxprune
from jaxprune import browser, files, models, presets, structure

RUNTIMES = ("browser", "litert", "xla", "onnx")
TITLES = {
    "browser": "LiteRT.js, Chromium",
    "litert": "LiteRT, this machine",
    "xla": "XLA:CPU",
    "onnx": "onnxruntime",
}
SPARSITIES = (0.7, 0.8, 0.9, 0.95)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = parse(args)
    folder = options.networks or options.folder
    names = saved_names(folder) if options.networks else build(options)
    kept = folder / "latency.json"
    times = json.loads(kept.read_text()) if kept.exists() else {}
    if {"browser", "litert"} & set(options.runtimes):
        browser.convert(folder, names, say=lambda text: print(text, flush=True))
    for runtime in options.runtimes:
        print(f"measuring: {TITLES[runtime]}", flush=True)
        measure = {"browser": in_browser, "litert": litert, "xla": xla, "onnx": onnx}[runtime]
        times[runtime] = measure(folder, names, options)
        with files.replacing(kept, "wb") as file:
            file.write(json.dumps(times).encode())
    text = table(folder, times)
    with files.replacing(folder / "latency.md", "wb") as file:
        file.write(text.encode())
    print(text)


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--networks", type=Path, help="folder of saved networks; default: random weights")
    add("--folder", type=Path, default=Path("runs/bench-browser"), help="for random weights")
    add("--multiplier", type=float, default=1.0, help="width of the random networks; default: 1")
    add("--size", type=int, default=96, help="pixels of their images; default: 96")
    add("--classes", type=int, default=1000, help="of the random networks; default: 1000")
    add("--rounds", type=int, default=200, help="default: 200")
    add("--runtimes", nargs="+", default=["browser", "litert", "xla"], choices=RUNTIMES)
    add("--modules", type=Path, default=Path("node_modules"), help="folder with @litertjs/core")
    options = parser.parse_args(args)
    if min(options.rounds, options.size) < 1 or options.multiplier <= 0:
        parser.error("--rounds, --size and --multiplier must be positive")
    return options


def saved_names(folder: Path) -> list[str]:
    """Returns the networks of a folder; the dense ones come first."""
    names = sorted(path.stem for path in folder.glob("*.npz") if path.stem != "images")
    if not names:
        raise SystemExit(f"error: {folder} holds no saved networks")
    return sorted(names, key=lambda name: not name.startswith("dense"))


def build(options: argparse.Namespace) -> list[str]:
    """Saves networks with random weights; returns their names."""
    draw = np.random.default_rng(0)
    shape = (2, options.size, options.size, 3)
    pixels = draw.integers(0, 256, shape)
    browser.write_images(options.folder, pixels, draw.normal(size=shape), [0, 1])
    names = []

    def keep(name: str, model: models.MobileNet, variables: Any) -> None:
        browser.save(options.folder, name, model, variables, {"title": name})
        names.append(name)

    model, variables = network(
        models.default_widths("mobilenet_v1", options.multiplier), options.classes
    )
    keep("dense", model, variables)
    for sparsity in SPARSITIES:
        params, _ = jaxprune.prune(variables["params"], sparsity, prunable=presets.pointwise)
        keep(f"sparse-{sparsity:.0%}".replace("%", ""), model, variables | {"params": params})
    apply = structure.from_nnx(model, state="model_state").evaluate
    groups = structure.find_groups(apply, variables, np.zeros((1, *shape[1:]), np.float32))
    scores = structure.filter_norms(groups, variables, order=2)
    plan = groups.plan(structure.keep_global(groups, scores, 0.5), multiple=8)
    small = plan.compact(variables)
    keep("compacted-50", network(models.widths_of(small["params"]), options.classes)[0], small)
    for part in (0.5, 0.25):
        widths = models.default_widths("mobilenet_v1", options.multiplier * part)
        keep(f"narrow-{options.multiplier * part:g}", *network(widths, options.classes))
    return names


def network(widths: models.Widths, classes: int) -> tuple[models.MobileNet, Any]:
    """Returns a MobileNetV1 for sparse inference, and its variables."""
    model = models.mobilenet_v1(
        num_classes=classes, widths=widths, padding="SYMMETRIC", rngs=nnx.Rngs(0)
    )
    model.eval()
    return model, structure.from_nnx(model, state="model_state").variables


def in_browser(folder: Path, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measures in headless Chromium; every output must be that of JAX."""
    with browser.serve(folder, options.modules) as server:
        result = browser.visit(server, f"rounds={options.rounds}", seconds=1800)
    if not result["isolated"]:
        raise SystemExit("error: the page had no precise clock")
    for own in result["networks"]:
        if not own["error"] < 1e-3:
            raise SystemExit(f"error: {own['name']} differs from JAX by {own['error']}")
    return {own["name"]: own["ms"] for own in result["networks"]}


def litert(folder: Path, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measures LiteRT in this process."""
    from ai_edge_litert import interpreter  # pyright: ignore[reportMissingImports]

    image = first_image(folder)

    def runner(name: str) -> Callable[[], Any]:
        own = interpreter.Interpreter(str(folder / f"{name}.tflite"), num_threads=1)
        own.allocate_tensors()
        own.set_tensor(own.get_input_details()[0]["index"], image)
        return own.invoke

    return in_turns({name: runner(name) for name in names}, options.rounds)


def xla(folder: Path, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measures compiled JAX functions in this process; weights are constants."""
    image = jax.device_put(first_image(folder))

    def runner(name: str) -> Callable[[], Any]:
        model, variables, _ = browser.load(folder, name)
        apply = structure.from_nnx(model, state="model_state").evaluate
        compiled = jax.jit(lambda image: apply(variables, image)).lower(image).compile()
        return lambda: compiled(image).block_until_ready()

    return in_turns({name: runner(name) for name in names}, options.rounds)


def onnx(folder: Path, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measures onnxruntime in this process."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    from jaxprune import export

    image = first_image(folder)

    def runner(name: str) -> Callable[[], Any]:
        model, variables, _ = browser.load(folder, name)
        apply = structure.from_nnx(model, state="model_state").evaluate
        path = str(folder / f"{name}.onnx")
        export.onnx(apply, variables, image, path, check=image, overwrite=True)  # pyright: ignore
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, settings)
        feed = {session.get_inputs()[0].name: image}
        return lambda: session.run(None, feed)

    return in_turns({name: runner(name) for name in names}, options.rounds)


def first_image(folder: Path) -> np.ndarray:
    """Returns one input."""
    with np.load(folder / "images.npz") as found:
        return found["inputs"][:1]


def in_turns(
    runners: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns the milliseconds of each function in each round, after five that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for index in range(rounds + 5):
        for name, run in runners.items():
            began = clock()
            run()
            if index >= 5:
                times[name].append(1e3 * (clock() - began))
    return times


def table(folder: Path, times: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Returns bytes, and speed-ups over the first network in each runtime, as Markdown."""
    shown = {runtime: browser.summary(times[runtime]) for runtime in RUNTIMES if runtime in times}
    names = [*next(iter(shown.values()))]
    head = ["network", "kB", *(TITLES[runtime] for runtime in shown)]
    lines = [head, ["---"] * len(head)]
    for index, name in enumerate(names):
        path = folder / f"{name}.tflite"
        cells = [name, f"{path.stat().st_size / 1e3:,.0f}" if path.exists() else ""]
        for rows in shown.values():
            row = rows.get(name)
            if row is None:
                cells.append("")
            elif index == 0:
                cells.append(f"{row['min']:.3f} ms ({row['q25']:.3f})")
            else:
                cells.append(f"{row['speedup']:.2f}x ({row['speedup_q25']:.2f})")
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


if __name__ == "__main__":
    main()
