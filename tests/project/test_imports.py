"""The import law: each unit imports what its row allows, and heavy packages stay at the edge."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jaxprune"

# Each unit, a module or a folder right below jaxprune/, and the others that it may import. The
# table in docs/architecture.md says the same. `experiments` may import all, and nothing imports it.
MAY_IMPORT = {
    "trees": set(),
    "jaxprs": {"trees"},
    "counting": set(),
    "files": set(),
    "meshes": {"trees"},
    "scores": {"counting", "trees"},
    "schedules": set(),
    "rates": set(),
    "presets": {"trees"},
    "programs": set(),
    "processes": set(),
    "data": {"files"},
    "stats": {"counting", "trees"},
    "stacks": {"trees"},
    "budgets": {"schedules", "trees"},
    "patterns": {"trees"},
    "masks": {"counting", "meshes", "stacks", "trees"},
    "at_init": {"trees"},
    "storage": {"files", "trees"},
    "export": {"files", "masks", "trees"},
    "browser": {"export", "files", "models", "storage", "structure"},
    "models": {"trees"},
    "sharding": {"trees"},
    "selection": {"counting", "meshes", "trees"},
    "kernels": {"files", "jaxprs", "layouts", "masks", "meshes", "patterns", "reports", "trees"},
    "layouts": {"jaxprs", "trees"},
    "structure": {"files", "jaxprs", "trees"},
    "timetables": {"budgets", "counting", "patterns", "schedules", "selection", "trees"},
    "one_shot": {
        "budgets",
        "counting",
        "masks",
        "meshes",
        "patterns",
        "schedules",
        "scores",
        "timetables",
        "trees",
    },
    "post_training": {"budgets", "layouts", "meshes", "patterns", "structure", "trees"},
    "transforms": {
        "budgets",
        "counting",
        "meshes",
        "patterns",
        "rates",
        "schedules",
        "scores",
        "stats",
        "timetables",
        "trees",
    },
    "checks": {"masks", "processes", "stacks", "trees"},
    "testing": {"budgets", "masks", "transforms", "trees"},
    "training": {"masks", "sharding", "trees"},
    "checkpoints": {"files", "processes"},
    "logs": {"checkpoints", "files"},
    "reports": {"files", "masks", "processes", "stacks", "storage", "structure", "trees"},
    "search": {
        "files",
        "jaxprs",
        "layouts",
        "post_training",
        "reports",
        "stacks",
        "structure",
        "trees",
    },
    "elastic": {
        "checkpoints",
        "data",
        "files",
        "kernels",
        "models",
        "processes",
        "reports",
        "search",
        "sharding",
        "structure",
        "training",
        "trees",
    },
    "rewinding": {
        "budgets",
        "checkpoints",
        "files",
        "masks",
        "one_shot",
        "processes",
        "scores",
        "stats",
        "trees",
    },
}

# Those that `import jaxprune` leaves alone, and what they load that takes long.
LAZY = {
    "jaxprune.browser",
    "jaxprune.checkpoints",
    "jaxprune.data",
    "jaxprune.elastic",
    "jaxprune.experiments",
    "jaxprune.export",
    "jaxprune.kernels",
    "jaxprune.models",
    "jaxprune.rewinding",
    "jaxprune.search",
    "jaxprune.structure",
    "jaxprune.testing",
    "jaxprune.training",
    "orbax",
}

# Import names of what only the extras `train` and `test` install.
OPTIONAL = {
    "PIL",
    "ai_edge_litert",
    "chex",
    "grain",
    "hypothesis",
    "importlib_resources",
    "jax2onnx",
    "litert_converter",
    "matplotlib",
    "onnx",
    "onnxruntime",
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

MAX_LINES = 600

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


def units_of(imports: set[str]) -> set[str]:
    """The units of ours among imported names; "" is the package itself."""
    ours = (name.split(".") for name in imports)
    return {rest[0] if rest else "" for top, *rest in ours if top == "jaxprune"}


def broken_laws(unit: str, imports: set[str]) -> list[str]:
    """The imports of one module that the import law forbids."""
    broken = []
    for name in sorted(imports):
        top = name.split(".")[0]
        if top in ("scripts", "tests", "benchmarks") or top == "chex":
            broken.append(f"{name}: not for library code")
        elif top in ("tensorflow_datasets", "grain") and unit != "data":
            broken.append(f"{name}: only jaxprune/data reads data sets")
        elif unit != "experiments" and not units_of({name}) <= MAY_IMPORT[unit] | {unit}:
            broken.append(f"{name}: not in the row of `{unit}`")
    return broken


def units_in_table(text: str) -> dict[str, set[str] | None]:
    """Unit -> what it may import, None for everything, from the table of docs/architecture.md."""
    found: dict[str, set[str] | None] = {}
    lines = iter(text.splitlines())
    for line in lines:
        if line.replace(" ", "").startswith("|unit|"):
            break
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        first, last = cells[0], cells[-1]
        if first.startswith("`"):
            found[first.strip("`")] = None if last == "everything" else set(last.split("`")[1::2])
    return found


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
        ("structure", "jaxprune.stats", False),
        ("storage", "jaxprune.timetables", False),
        ("rewinding", "jaxprune.experiments.config", False),
        ("experiments", "jaxprune.rewinding", True),
        ("training", "grain", False),
        ("data", "grain.python", True),
        ("stats", "chex", False),
        ("stats", "scripts.train", False),
    ],
)
def test_broken_laws_finds_what_it_should(unit, name, allowed):
    assert (broken_laws(unit, {name}) == []) is allowed


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_are_in_the_table(path):
    unit = _unit(path)
    if unit in ("__init__", "__main__"):
        pytest.skip("the package itself gathers public names of all units, or commands by name")
    assert unit in MAY_IMPORT or unit == "experiments", f"{_name(path)}: add a row for `{unit}`"
    assert broken_laws(unit, _imports_of(path)) == []


@pytest.mark.parametrize("unit", MAY_IMPORT)
def test_every_entry_of_the_table_is_used(unit):
    files = [path for path in FILES if _unit(path) == unit]
    assert files, f"there is no `{unit}`"
    used = set().union(*(units_of(_imports_of(path)) for path in files))
    assert MAY_IMPORT[unit] - used == set()


def test_imports_make_no_circle():
    order = [*TopologicalSorter(MAY_IMPORT).static_order()]
    assert set(order) == MAY_IMPORT.keys()
    with pytest.raises(ValueError, match="cycle"):
        TopologicalSorter(MAY_IMPORT | {"trees": {"rewinding"}}).prepare()


def test_the_table_is_that_of_the_architecture():
    assert units_in_table(
        "| unit | what | may import |\n|--|\n| `a` | b | `c`, `d` |\n\n|`e`||"
    ) == {"a": {"c", "d"}}
    documented = units_in_table((ROOT / "docs" / "architecture.md").read_text())
    if not documented:
        pytest.skip("docs/architecture.md has no table with one row for each unit")
    assert documented == {**MAY_IMPORT, "experiments": None}


@pytest.mark.parametrize("path", SCRIPTS, ids=_name)
def test_scripts_leave_data_sets_and_chex_alone(path):
    tops = {name.split(".")[0] for name in _imports_of(path)}
    assert not tops & {"tensorflow_datasets", "grain", "chex"}


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=_name)
def test_no_file_holds_two_ideas(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{_name(path)} has {lines} lines: split it"


def _loaded_after(*statements: str) -> set[str]:
    """Modules in a fresh interpreter after some statements."""
    code = "; ".join([*statements, "import json, sys", "print(json.dumps(list(sys.modules)))"])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_import_is_light_and_needs_no_optional_package():
    # Flax loads some of them itself; only what we add counts.
    base = "import jax, flax, flax.linen, flax.nnx, optax, numpy, scipy"
    before = _loaded_after(base)
    light = _loaded_after(base, "import jaxprune") - before
    assert "jaxprune.transforms" in light
    assert light & LAZY == set()
    ours = _loaded_after(base, "import jaxprune, jaxprune.models, jaxprune.reports") - before
    assert {name.split(".")[0] for name in ours} & OPTIONAL == set()


@pytest.mark.slow
def test_every_public_name_is_reachable_after_import_jaxprune():
    code = "import jaxprune; print(*(getattr(jaxprune, name) for name in jaxprune.__all__))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
