"""Trains dense networks on Fashion-MNIST and compares all searches on them: the tables of searches.

    python benchmarks/search.py --workdir runs/searches

Runs scripts/train.py for a ResNet-20 and a MobileNet V1, then scripts/search.py for each: 50 % and
30 % of the MACs of the ResNet-20, and 50 % of those and of the measured latency of the
MobileNet. Every command resumes where it was stopped, so this one does. Results are written as they
come, to results.md in a folder for each comparison. With --tiny everything is small, to try it.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Name of a comparison -> model, options of scripts/search.py
COMPARISONS = {
    "resnet20-macs": ("resnet20", "--budgets 0.5 0.3"),
    "mobilenet_v1-macs": ("mobilenet_v1", "--budgets 0.5"),
    "mobilenet_v1-latency": ("mobilenet_v1", "--budgets 0.5 --cost latency --batch 64"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--workdir", type=Path, default=Path("runs/searches"), help="default: runs/searches")
    add("--only", nargs="+", default=[*COMPARISONS], choices=COMPARISONS, help="default: all")
    add("--seeds", nargs="+", default=["0", "1", "2"], help="of the searches; default: 0 1 2")
    add("--evaluations", type=int, default=200, help="default: 200")
    add("--images", type=int, default=1000, help="held out, to score with; default: 1000")
    add("--dense-steps", type=int, default=3000, help="of the dense trainings; default: 3000")
    add("--steps", type=int, default=300, help="of fine-tuning; default: 300")
    add("--rewind-steps", type=int, default=1000, help="of rewinding; default: 1000")
    add("--calibration", type=int, default=300, help="images to fit kernels on; default: 300")
    add("--retrain", nargs="+", default=["fine_tune", "rewind"], help="default: fine_tune rewind")
    add("--tiny", action="store_true", help="a few steps and images, to try the command")
    options = parser.parse_args(args)
    if options.tiny:
        options.evaluations, options.images, options.seeds = 44, 50, ["0", "1"]
        options.dense_steps, options.steps, options.rewind_steps = 4, 2, 2
    for command in commands(options):
        print(shlex.join(command), flush=True)
        code = subprocess.run([sys.executable, *command[1:]], cwd=ROOT).returncode
        if code:
            sys.exit(code)


def commands(options: argparse.Namespace) -> list[list[str]]:
    """Returns the commands in order: each dense training before the first search in it."""
    found, trained = [], set()
    workdir = options.workdir.absolute()
    for name in options.only:
        model, own = COMPARISONS[name]
        dense = str(workdir / f"dense-{model}")
        if model not in trained:
            training = (
                f"--model {model} --method none --validation {options.images} --schedule cosine "
                f"--steps {options.dense_steps} --eval-every 500 --workdir"
            )
            words = ["python", "scripts/train.py", "fashion_resnet20", *training.split(), dense]
            found.append(words)
            trained.add(model)
        shared = (
            f"--evaluations {options.evaluations} --steps {options.steps} "
            f"--rewind-steps {options.rewind_steps} --retrain {' '.join(options.retrain)} "
            f"--calibration {min(options.calibration, options.images)}"
        )
        words = ["python", "scripts/search.py", dense, *own.split(), *shared.split()]
        found.append([*words, "--seeds", *options.seeds, "--workdir", str(workdir / name)])
    return found


if __name__ == "__main__":
    main()
