"""Trains a small network twice on real images, dense and with AGIP, and compares the two.

    python scripts/demo.py

The images are scikit-learn's digits, which come inside its package, so nothing is downloaded. Each
run is one call of scripts/train.py; its folder holds every record, checkpoint and plot. The same
command resumes a demo that was stopped.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from jaxprune import files, logs, reports
from jaxprune.experiments.command import read_summary

TRAIN = [sys.executable, "-m", "jaxprune.experiments.train"]
CONFIG = "digits_resnet8"
SPARSITY = 0.72

# Folder of a run, its name in tables and plots, its options.
RUNS = {
    "dense": ("dense", ["--method", "none"]),
    "agip": (f"AGIP {SPARSITY:.0%}", ["--method", "agip", "--sparsity", str(SPARSITY)]),
}

ROWS = {
    "test_accuracy": ("Test accuracy", "{:.2%}"),
    "parameters": ("Parameters", "{:,}"),
    "nonzeros": ("Non-zero parameters", "{:,}"),
    "sparsity": ("Sparsity of kernels", "{:.2%}"),
    "dense_bytes": ("Checkpoint, dense (bytes)", "{:,}"),
    "sparse_bytes": ("Checkpoint, sparse (bytes)", "{:,}"),
    "state_bytes": ("Optimizer state (bytes)", "{:,}"),
    "seconds": ("Whole run (seconds)", "{:.1f}"),
}


def main() -> None:
    """Trains both networks and shows the table."""
    options = parse()
    began = time.perf_counter()
    for name, (label, arguments) in RUNS.items():
        print(f"\n== {label}: {options.folder / name}", flush=True)
        command = [*TRAIN, CONFIG, "--workdir", str(options.folder / name)]
        command += arguments
        command += ["--steps", str(options.steps)] if options.steps else []
        command += ["--overwrite"] if options.overwrite else []
        done = subprocess.run(command)
        if done.returncode:
            sys.exit(f"error: the {label} run ended with code {done.returncode}; see above")
    print("\n" + compare(options.folder))
    print(f"\nThe demo took {time.perf_counter() - began:.0f} seconds.")


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/demo"), help="where to write (default: runs/demo)"
    )
    parser.add_argument("--steps", type=int, help="training steps (default: as configured)")
    parser.add_argument("--overwrite", action="store_true", help="train again from the start")
    return parser.parse_args()


def compare(folder: Path) -> str:
    """Writes the plots; returns the table of both runs and the paths of the plots."""
    summaries = {
        label: read_summary(folder / name, ROWS) or {} for name, (label, _) in RUNS.items()
    }
    histories = {
        label: logs.read_records(folder / name / "metrics.jsonl")
        for name, (label, _) in RUNS.items()
    }
    reports.plot_training(histories, folder / "training.png")
    with files.replacing(folder / "densities.png", "wb") as file:
        file.write((folder / "agip" / "densities.png").read_bytes())
    rows = [
        {"what": title} | {label: form.format(run[key]) for label, run in summaries.items()}
        for key, (title, form) in ROWS.items()
    ]
    dense, pruned = summaries.values()
    accuracy = pruned["test_accuracy"] / dense["test_accuracy"]
    return "\n".join(
        [
            reports.table(rows, {"what": ""} | {label: label for label in summaries}),
            "",
            f"With {pruned['nonzeros'] / dense['nonzeros']:.1%} of the parameters AGIP reached "
            f"{accuracy:.1%} of the dense accuracy (one seed);",
            f"its sparse checkpoint is {dense['dense_bytes'] / pruned['sparse_bytes']:.1f} times "
            "smaller. Masks alone do not make steps faster.",
            "",
            f"Accuracy and sparsity over steps:  {folder / 'training.png'}",
            f"Density of each layer:             {folder / 'densities.png'}",
        ]
    )


if __name__ == "__main__":
    main()
