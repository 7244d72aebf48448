"""Trains a MobileNet dense and with 80 and 90 % zeros, and shows all three in your browser.

    make demo-browser

The networks are trained on Fashion-MNIST, converted for LiteRT.js, and served on this machine with
a page that runs them and measures their milliseconds; no request leaves the machine. The same
command resumes a demo that was stopped.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxprune import browser
from jaxprune.experiments import command
from jaxprune.experiments.trained_networks import FASHION, save_runs

TRAIN = [sys.executable, "-m", "jaxprune.experiments.train", "fashion_mobilenet"]
# Name of a network, its title on the page, its options of train.py.
RUNS = {
    "dense": ("Dense", ["--method", "none"]),
    "agip-80": ("AGIP, 80 % zeros", ["--method", "agip", "--sparsity", "0.8"]),
    "agip-90": ("AGIP, 90 % zeros", ["--method", "agip", "--sparsity", "0.9"]),
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = parse(args)
    with command.plain_errors(ValueError, OSError, RuntimeError):
        train(options)
        networks = options.folder / "networks"
        save_runs(networks, {name: (options.folder / name, RUNS[name][0]) for name in RUNS})
        convert(options, networks)
        with browser.serve(networks, options.modules, options.port) as server:
            if options.check:
                print(check(server, options))
                return
            print(f"\nOpen {server.url} in a browser on this machine. Control-C ends the server.")
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                print()


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("runs/demo-browser"), help="default: runs/demo-browser")
    add("--steps", type=int, help="training steps (default: as configured)")
    add("--python", default=sys.executable, help="Python with the extra litert")
    add("--modules", type=Path, default=Path("node_modules"), help="folder with @litertjs/core")
    add("--port", type=int, default=0, help="port of the page; default: a free one")
    add("--check", action="store_true", help="measure in headless Chromium and end")
    add("--screenshot", default="", help="with --check: PNG file of the page")
    return parser.parse_args(args)


def train(options: argparse.Namespace) -> None:
    """Trains what is not finished."""
    for name, (title, words) in RUNS.items():
        print(f"\n== {title}: {options.folder / name}", flush=True)
        words = [*TRAIN, *words, "--workdir", str(options.folder / name)]
        words += ["--steps", str(options.steps)] if options.steps else []
        code = subprocess.run(words).returncode
        if code:
            sys.exit(f"error: the run {name} ended with code {code}; see above")


def convert(options: argparse.Namespace, networks: Path) -> None:
    """Converts the networks in the environment of the extra litert."""
    print("\n== Files for LiteRT", flush=True)
    words = [options.python, "-m", "jaxprune.browser", str(networks), *RUNS, "--classes", *FASHION]
    code = subprocess.run(words).returncode
    if code:
        sys.exit(f"error: the conversion ended with code {code}; see above")


def check(server: browser.Server, options: argparse.Namespace) -> str:
    """Returns a table of what headless Chromium measured."""
    result = browser.visit(server, "rounds=200", seconds=600, screenshot=options.screenshot)
    rows = browser.summary({own["name"]: own["ms"] for own in result["networks"]})
    lines = [f"{'network':12}{'ms':>8}{'quartile':>10}{'speed-up':>10}{'error':>10}"]
    for own in result["networks"]:
        row = rows[own["name"]]
        lines.append(
            f"{own['name']:12}{row['min']:8.3f}{row['q25']:10.3f}{row['speedup']:9.2f}x"
            f"{own['error']:10.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
