"""The layer law: a module imports from lower layers only, and heavy packages stay at the edge."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jaxprune"

LAYERS = {
    "trees": 0,
    "files": 0,
    "counting": 0,
    "jaxprs": 0,
    "layouts": 1,
    "stats": 1,
    "scores": 1,
    "budgets": 1,
    "schedules": 1,
    "selection": 1,
    "patterns": 1,
    "rates": 1,
    "stacks": 1,
    "timetables": 2,
    "programs": 0,
    "transforms": 3,
    "structure": 3,
    "models": 3,
    "masks": 2,
    "one_shot": 3,
    "at_init": 3,
    "post_training": 3,
    "storage": 3,
    "processes": 3,
    "sharding": 3,
    "training": 4,
    "checkpoints": 4,
    "reports": 4,
    "checks": 4,
    "data": 4,
    "logs": 5,
    "rewinding": 5,
    "experiments": 6,
}

# Import names of what only the extras `train` and `test` install.
OPTIONAL = {
    "PIL",
    "chex",
    "grain",
    "hypothesis",
    "importlib_resources",
    "matplotlib",
    "orbax",
    "pytest",
    "ray",
    "rich",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tyro",
}

MAX_LINES = 420

FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(
    path for folder in ("scripts", "benchmarks") for path in ROOT.glob(f"{folder}/*.py")
)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _unit(path: Path) -> str:
    """What the layer law speaks of: the module or the folder right below jaxprune/."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(source: str, package: str) -> set[str]:
    """Absolute dotted names that a source imports, at any depth; `from a import b` gives `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _imports_of(path: Path) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return imported_modules(path.read_text(), package)


def broken_laws(unit: str, imports: set[str]) -> list[str]:
    """The imports of one module that the layer law forbids."""
    broken = []
    for name in sorted(imports):
        top, *rest = name.split(".")
        if top in ("scripts", "tests", "benchmarks") or top == "chex":
            broken.append(f"{name}: not for library code")
        elif top in ("tensorflow_datasets", "grain") and unit != "data":
            broken.append(f"{name}: only jaxprune/data reads data sets")
        elif top == "jaxprune":
            other = rest[0] if rest else ""
            if other == unit:
                continue
            if other not in LAYERS:
                broken.append(f"{name}: import from the module that defines it")
            elif LAYERS[other] >= LAYERS[unit]:
                broken.append(f"{name}: layer {LAYERS[other]}, imported from layer {LAYERS[unit]}")
    return broken


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import jaxprune.trees as t", "jaxprune", {"jaxprune.trees"}),
        ("from jaxprune import trees", "jaxprune", {"jaxprune.trees"}),
        ("from . import _rank", "jaxprune.transforms", {"jaxprune.transforms._rank"}),
        ("from ..trees import path_string", "jaxprune.models", {"jaxprune.trees.path_string"}),
        ("def f():\n    import grain.python", "jaxprune", {"grain.python"}),
    ],
)
def test_imported_modules(source, package, expected):
    assert imported_modules(source, package) == expected


@pytest.mark.parametrize(
    ("unit", "name", "allowed"),
    [
        ("reports", "jaxprune.trees.path_string", True),
        ("transforms", "jaxprune.transforms._agip", True),
        ("transforms", "jaxprune.models.resnet", False),
        ("models", "jaxprune.transforms", False),
        ("stats", "jaxprune.scores", False),
        ("trees", "jaxprune.reports", False),
        ("training", "jaxprune.agip_transform", False),
        ("training", "jaxprune", False),
        ("training", "grain", False),
        ("data", "grain.python", True),
        ("stats", "chex", False),
        ("stats", "scripts.train", False),
    ],
)
def test_broken_laws_finds_what_it_should(unit, name, allowed):
    assert (broken_laws(unit, {name}) == []) is allowed


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_go_down(path):
    unit = _unit(path)
    if unit == "__init__":
        pytest.skip("the package itself gathers public names from all layers")
    assert unit in LAYERS, f"{_name(path)} has no layer: add `{unit}` to LAYERS"
    assert broken_laws(unit, _imports_of(path)) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=_name)
def test_scripts_leave_data_sets_and_chex_alone(path):
    tops = {name.split(".")[0] for name in _imports_of(path)}
    assert not tops & {"tensorflow_datasets", "grain", "chex"}


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=_name)
def test_no_file_holds_two_ideas(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{_name(path)} has {lines} lines: split it"


def _loaded_after(*statements: str) -> set[str]:
    """Top-level packages in a fresh interpreter after some statements."""
    code = "; ".join([*statements, "import json, sys", "print(json.dumps(list(sys.modules)))"])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(run.stdout.splitlines()[-1])}


def test_import_needs_no_optional_package():
    # Flax loads some of them itself; only what we add counts.
    base = "import jax, flax, flax.linen, flax.nnx, optax, numpy, scipy"
    ours = "import jaxprune, jaxprune.models, jaxprune.reports, jaxprune.trees"
    added = _loaded_after(base, ours) - _loaded_after(base)
    assert "jaxprune" in added
    assert added & OPTIONAL == set()
