"""Every public name is listed on purpose and has a docstring with an example that runs."""

import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path

import pytest

import jaxprune

MODULES = ["jaxprune"] + sorted(
    module.name
    for module in pkgutil.walk_packages(jaxprune.__path__, "jaxprune.")
    if not module.name.rpartition(".")[2].startswith("_")
)


def _order(name: str):
    """Ruff's RUF022: constants, classes, the rest; numbers inside names by value."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _exported(module_name: str):
    module = importlib.import_module(module_name)
    return [(name, getattr(module, name)) for name in getattr(module, "__all__", ())]


def _needs_example(value) -> bool:
    """Classes and functions do; modules, constants and type aliases have nowhere to put one."""
    return callable(value) and typing.get_origin(value) is None


def test_package_lists_its_names():
    assert jaxprune.__all__
    local = {
        name
        for name, value in vars(jaxprune).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert local <= set(jaxprune.__all__), "imported into jaxprune but missing from `__all__`"


@pytest.mark.parametrize("module_name", MODULES)
def test_all_is_sorted_and_resolves(module_name):
    module = importlib.import_module(module_name)
    names = list(getattr(module, "__all__", ()))
    assert len(names) == len(set(names))
    assert names == sorted(names, key=_order)
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("module_name", MODULES)
def test_modules_have_docstrings(module_name):
    assert inspect.getdoc(importlib.import_module(module_name))


@pytest.mark.parametrize("module_name", MODULES)
def test_public_names_have_examples(module_name):
    missing = [
        name
        for name, value in _exported(module_name)
        if _needs_example(value) and ">>> " not in (value.__doc__ or "")
    ]
    assert missing == [], f"no docstring with a `>>>` example in {module_name}"


def test_types_are_shipped():
    assert (Path(jaxprune.__file__).parent / "py.typed").exists()
