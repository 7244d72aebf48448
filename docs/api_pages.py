"""Writes a page for each public module into docs/api/, in the families of `jaxprune.__doc__`.

A name is described once, under the shortest path by which users reach it: `jaxprune.prune`, not
`jaxprune.one_shot.prune`. The pages of the other modules that export it link there.
"""

import importlib
import inspect
import pkgutil
import re
import textwrap
import typing
from pathlib import Path
from typing import NamedTuple

import jaxprune

INTERNAL = "Internal: may change at any time"


class Entry(NamedTuple):
    """A name in the `__all__` of a module."""

    name: str
    path: str  # under which it is described: the shortest one
    kind: str  # the directive of autodoc
    summary: str  # the first line of its docstring


def public_modules() -> list[str]:
    """All modules with an `__all__` whose path has no underscore."""
    found = ["jaxprune"]
    for module in pkgutil.walk_packages(jaxprune.__path__, "jaxprune."):
        if not any(part.startswith("_") for part in module.name.split(".")):
            if getattr(importlib.import_module(module.name), "__all__", ()):
                found.append(module.name)
    return found


def families() -> dict[str, list[str]]:
    """The modules below `jaxprune.` by family; those that the docstring of jaxprune leaves out last."""
    found: dict[str, list[str]] = {}
    for line in (jaxprune.__doc__ or "").splitlines():
        if re.fullmatch(r"[A-Z].*:", line):
            found[line.rstrip(":")] = family = []
        elif row := re.match(r" {4}([a-z_]+(?:, [a-z_]+)*)(?: \(lazy\))? {2,}\S", line):
            if "(internal" not in line:
                family += row.group(1).split(", ")
    top = {name.split(".")[1] for name in public_modules() if "." in name}
    found = {title: [name for name in names if name in top] for title, names in found.items()}
    found[INTERNAL] = sorted(top - {name for names in found.values() for name in names})
    return {title: names for title, names in found.items() if names}


def entries(module_name: str) -> list[Entry]:
    """The names that a module exports, without the modules among them."""
    module = importlib.import_module(module_name)
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        if not inspect.ismodule(value):
            path = f"{_home(module_name, name, value)}.{name}"
            found.append(Entry(name, path, _kind(value), _summary(value)))
    return found


def _home(module_name: str, name: str, value: typing.Any) -> str:
    """The shortest module path that exports the same object by the same name."""
    if _kind(value) == "data":
        return module_name
    return min(
        (
            other
            for other in public_modules()
            if name in importlib.import_module(other).__all__
            and getattr(importlib.import_module(other), name) is value
        ),
        key=lambda other: (other.count("."), other != module_name, other),
    )


def _kind(value: typing.Any) -> str:
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if callable(value) and typing.get_origin(value) is None else "data"


def _summary(value: typing.Any) -> str:
    """The first sentence of a docstring; that of a constant would be the one of its type."""
    if _kind(value) == "data":
        return ""
    return " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())


def _table(rows: list[tuple[str, str]]) -> str:
    """A table of two columns without a head."""
    lines = [".. list-table::", "   :class: names", "   :widths: auto", ""]
    for left, right in rows:
        lines += [f"   * - {left}", f"     - {right}"]
    return "\n".join(lines) + "\n"


def module_page(module_name: str, parts: list[str]) -> str:
    """The page of a module, in reStructuredText; `parts` are the modules below it."""
    exported = entries(module_name)
    doc = inspect.getdoc(importlib.import_module(module_name)) or ""
    here = [entry for entry in exported if _page(entry.path) == module_name]
    page = [
        module_name,
        "=" * len(module_name),
        "",
        f".. py:module:: {module_name}",
        "",
        doc,
        "",
        _table([(f":py:obj:`{e.name} <{e.path}>`", e.summary) for e in exported]),
    ]
    if parts:
        page += [".. toctree::", "", *(f"   {part}" for part in parts), ""]
    for entry in here:
        page += [f".. auto{entry.kind}:: {entry.path}", ""]
    return "\n".join(page)


def _page(path: str) -> str:
    """The module on whose page a path is described; what jaxprune exports itself is on another."""
    module_name, _, name = path.rpartition(".")
    if module_name != "jaxprune":
        return module_name
    value = getattr(jaxprune, name)
    return min(
        other
        for other in public_modules()
        if other != "jaxprune"
        and name in importlib.import_module(other).__all__
        and getattr(importlib.import_module(other), name) is value
    )


def index_page() -> str:
    """The page of all modules, family by family."""
    page = ["API", "===", "", textwrap.dedent(
        """
        Every public name, in the families of ``jaxprune.__doc__``. After ``import jaxprune`` all
        modules are attributes of it. The examples run as tests.
        """
    )]  # fmt: skip
    top = [(f":py:obj:`{e.name} <{e.path}>`", e.summary) for e in entries("jaxprune")]
    page += [".. py:module:: jaxprune", "", "Names of ``jaxprune`` itself", "-" * 28, "", _table(top)]
    for title, names in families().items():
        rows = [
            (f":doc:`{name} <jaxprune.{name}>`", _summary_of_module(f"jaxprune.{name}"))
            for name in names
        ]
        page += [title, "-" * len(title), "", _table(rows)]
        page += [".. toctree::", "   :hidden:", "", *(f"   jaxprune.{name}" for name in names), ""]
    return "\n".join(page)


def _summary_of_module(module_name: str) -> str:
    return (inspect.getdoc(importlib.import_module(module_name)) or "").split("\n")[0]


def write(folder: Path) -> None:
    """Writes all pages; those that are up to date keep their time, so that Sphinx skips them."""
    modules = [name for name in public_modules() if name != "jaxprune"]
    pages = {"index": index_page()}
    for name in modules:
        parts = [other for other in modules if other.startswith(f"{name}.")]
        pages[name] = module_page(name, parts)
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.rst"):
        if path.stem not in pages and path.name[: -len(".rst")] not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
