"""Benchmarks as modules: they are scripts, and their folder is on no path."""

import functools
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks"


@functools.cache
def load(name: str) -> ModuleType:
    """A benchmark under its own name, by which others import it: load what it imports first."""
    spec = spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
