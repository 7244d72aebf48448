"""Writes a trained run as files for phones, browsers and servers.

    python scripts/export.py runs/mobilenet --to litert onnx jax safetensors
    python scripts/export.py runs/mobilenet --to litert --values int8

Takes a finished run of scripts/train.py, dense or pruned, with the channels that it has at its end
and the averaged parameters if it has them. The files go to --workdir, `export` in the folder of the
run if it is not given, and are refused if they exist. Inputs are prepared (normalised) images of a
batch of one; a file of `jax` takes any batch. Each file runs once on test images and is compared
with JAX; report.json and the table at the end show the results.

LiteRT and ONNX are taken from .venv/litert and .venv/onnx if they are not installed here;
`make litert-check` and `make onnx-check` make these environments.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from jaxprune import checkpoints, export, files, masks, training
from jaxprune.experiments import command
from jaxprune.experiments.command import plain_errors
from jaxprune.experiments.config import Config
from jaxprune.experiments.experiment import Experiment
from jaxprune.experiments.network import as_variables
from jaxprune.experiments.pruning import pruning_of
from jaxprune.experiments.stages import Stages

ROOT = Path(__file__).parents[2]
SUFFIXES = {
    "litert": ".tflite",
    "onnx": ".onnx",
    "jax": ".jax",
    "safetensors": ".safetensors",
}
# The package of each target.
NEEDS = {
    "litert": "litert_converter",
    "onnx": "jax2onnx",
    "jax": "flatbuffers",
    "safetensors": "safetensors",
}
APART = ("litert", "onnx")  # targets with environments of their own


class Trained(NamedTuple):
    """A finished run as a function."""

    apply: Callable[..., Any]  # (variables, prepared examples) -> outputs
    variables: Any
    masks: Any  # like `variables`; None for a dense run
    examples: np.ndarray  # prepared examples [count, ...]


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = parse(sys.argv[1:] if args is None else list(args))
    with plain_errors(ValueError, OSError, ModuleNotFoundError):
        paths = free_paths(options)
        find_targets(options.to)
        trained = read_run(options.run, options.check)
        checkpoints.check_writable(options.workdir)
        with files.locked(options.workdir, "`workdir`"):
            reports = write_all(options, trained, paths)
            checkpoints.write_json(options.workdir / "report.json", reports)
            print(table(reports))


def parse(args: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/export.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the folder of a finished run of scripts/train.py")
    parser.add_argument("--to", nargs="+", choices=SUFFIXES, required=True, help="the targets")
    parser.add_argument("--workdir", type=Path, help="default: `export` in the folder of the run")
    parser.add_argument(
        "--values", choices=("float32", "int8"), default="float32", help="of weights in a .tflite"
    )
    parser.add_argument(
        "--check", type=int, default=16, metavar="N", help="examples to compare each file on"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    options = parser.parse_args(args)
    if options.check < 1:
        parser.error(f"--check must be at least 1, but is {options.check}")
    options.to = list(dict.fromkeys(options.to))
    options.workdir = options.run / "export" if options.workdir is None else options.workdir
    return options


def free_paths(options: argparse.Namespace) -> dict[str, Path]:
    """Returns the file of each target; raises if one exists and is not to be replaced."""
    stem = "network-int8" if options.values == "int8" else "network"
    paths = {
        target: options.workdir / f"{stem if target == 'litert' else 'network'}{SUFFIXES[target]}"
        for target in options.to
    }
    existing = [str(path) for path in paths.values() if path.exists()]
    if existing and not options.overwrite:
        raise ValueError(
            f"{', '.join(existing)} exists; give another --workdir, or --overwrite to replace it"
        )
    return paths


def find_targets(targets: Sequence[str]) -> None:
    """Makes the packages of all targets importable.

    Those of an environment of its own come last on the path: what this environment has wins, so the
    older versions that they were installed with do no harm.

    Raises:
        ValueError: if a target is installed neither here nor in its environment; it lists all.
    """
    problems = []
    for target in targets:
        if find_spec(NEEDS[target]) is None and packages_of(target).is_dir():
            sys.path.append(str(packages_of(target)))
            importlib.invalidate_caches()
        if find_spec(NEEDS[target]) is None:
            how = "`pip install 'jaxprune[export]'` installs it"
            if target in APART:
                how = f"`make {target}-check` makes .venv/{target} with it"
            problems.append(f"--to {target} needs {NEEDS[target]}, which is not installed; {how}")
    if problems:
        raise ValueError("\n  ".join(["targets must be installed:", *problems]))


def packages_of(target: str) -> Path:
    """Returns where the environment of a target has its packages, if there is one."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return ROOT / ".venv" / target / "lib" / version / "site-packages"


def read_run(path: Path, count: int) -> Trained:
    """Reads a finished run.

    Raises:
        ValueError: the folder holds no finished run, or its data cannot be opened.
    """
    saved = command.read_config(path)
    if saved is None:
        raise ValueError(f"{path} holds no run of scripts/train.py")
    if not (path / "summary.json").exists():
        raise ValueError(f"{path} is not finished; run the command that began it to resume")
    names = {field.name for field in dataclasses.fields(Config)}
    config = Config(**{key: saved[key] for key in saved if key in names})
    print(f"reading {path}: {config.model} on {config.dataset}", flush=True)
    experiment = Experiment(config, pruning_of)
    manager = checkpoints.open_manager(path / "checkpoints")
    stages = Stages(experiment, checkpoints.read_record(manager)["stage"])
    state, _ = checkpoints.restore(manager, stages.like())
    manager.close()
    params = training.with_averages(state.params, state.opt_state)
    variables = as_variables(params, state.model_state)
    kept = None
    if config.method != "none":
        kept = {name: True for name in variables} | {"params": masks.get_masks(state.opt_state)}
    apply = stages.stage.wrap(experiment.functions.evaluate)
    images = experiment.source.first(count).images
    variables, examples = jax.device_get((variables, experiment.source.prepare(images)))
    return Trained(apply, variables, jax.device_get(kept), np.asarray(examples))


def write_all(
    options: argparse.Namespace, trained: Trained, paths: dict[str, Path]
) -> dict[str, Any]:
    """Writes all files and returns what is known of each, by target."""
    reports = {}
    for index, (target, path) in enumerate(paths.items()):
        print(f"{index + 1}/{len(paths)} {target}", flush=True)
        reports[target] = write(target, path, trained, options)
        print(f"  {reports[target]['text']}".replace("\n", "\n  "), flush=True)
    return reports


def write(target: str, path: Path, trained: Trained, options: argparse.Namespace) -> dict[str, Any]:
    """Writes the file of one target; returns its report, ready for JSON."""
    apply, variables, kept, examples = trained
    given: dict[str, Any] = {"masks": kept, "overwrite": options.overwrite}
    if target == "safetensors":
        report = export.safetensors(variables, path, **given)
        return {"path": str(path), "bytes": sum(report.files.values()), "text": str(report)}
    given["check"] = examples
    if target == "jax":
        sizes = ", ".join(map(str, examples.shape[1:]))
        shape = jax.export.symbolic_shape(f"batch, {sizes}")
        report: Any = export.jax(
            apply, variables, jax.ShapeDtypeStruct(shape, examples.dtype), path, **given
        )
        return report._asdict() | {"text": str(report)}
    example = jax.ShapeDtypeStruct((1, *examples.shape[1:]), examples.dtype)
    if target == "onnx":
        report = export.onnx(apply, variables, example, path, **given)
        return report._asdict() | {"text": str(report)}
    report = export.litert(apply, variables, example, path, values=options.values, **given)
    return report._asdict() | {"text": str(report), "sparse": report.sparse._asdict()}


def table(reports: dict[str, Any]) -> str:
    """Returns one line for each file: bytes, error, and whether sparse inference runs."""
    lines = [f"{'target':12} {'bytes':>12} {'error':>9}  sparse inference"]
    for target, own in reports.items():
        error = own.get("error")
        shown = "" if error is None else f"{error:.1e}"
        sparse = own.get("sparse")
        runs = "" if sparse is None else "yes" if sparse["runs"] else f"no: {sparse['reason']}"
        lines.append(f"{target:12} {own['bytes']:12,} {shown:>9}  {runs}".rstrip())
    return "\n".join(lines)
