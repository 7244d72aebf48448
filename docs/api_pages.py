"""Writes a page for each public module into docs/api/, in the families of `jaxprune.__doc__`.

A name is described once, under the shortest path by which users reach it: `jaxprune.prune`, not
`jaxprune.one_shot.prune`. The tables of all modules that export it link there.
"""

import ast
import functools
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
KINDS = ["function", "class", "exception", "data"]  # in the order of a page


class Entry(NamedTuple):
    """A name in the `__all__` of a module."""

    name: str
    path: str  # the shortest one, under which it is described
    page: str  # the module on whose page that is
    kind: str  # class, exception, function or data
    summary: str  # the first paragraph of its docstring


@functools.cache
def public_modules() -> tuple[str, ...]:
    """All modules with an `__all__` whose path has no underscore."""
    found = ["jaxprune"]
    for module in pkgutil.walk_packages(jaxprune.__path__, "jaxprune."):
        if not any(part.startswith("_") for part in module.name.split(".")):
            if getattr(importlib.import_module(module.name), "__all__", ()):
                found.append(module.name)
    return tuple(found)


def families() -> dict[str, list[str]]:
    """The modules below jaxprune by family; last, those that its docstring leaves out."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    for line in (jaxprune.__doc__ or "").splitlines():
        if re.fullmatch(r"[A-Z].*:", line):
            names = found[line.rstrip(":")] = []
        elif row := re.match(r" {4}([a-z_]+(?:, [a-z_]+)*)(?: \(lazy\))? {2,}\S", line):
            if "(internal" not in line:
                names += row.group(1).split(", ")
    top = {name.split(".")[1] for name in public_modules() if "." in name}
    found[INTERNAL] = sorted(top - {name for names in found.values() for name in names})
    return {title: names for title, names in found.items() if names}


def entries(module_name: str) -> list[Entry]:
    """The names that a module exports, without the modules among them."""
    module = importlib.import_module(module_name)
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            continue
        kind = _kind(value)
        homes = [module_name] if kind == "data" else _homes(name, value)
        # The names of jaxprune itself are described where their family is.
        page = next((home for home in homes if home != "jaxprune"), homes[0])
        summary = " ".join(_doc(module, name, value).split("\n\n")[0].split())
        found.append(Entry(name, f"{homes[0]}.{name}", page, kind, summary))
    return sorted(found, key=lambda entry: KINDS.index(entry.kind))  # as `__all__` within a kind


def _homes(name: str, value: typing.Any) -> list[str]:
    """The public modules that export an object, the shortest path first."""
    modules = {other: importlib.import_module(other) for other in public_modules()}
    homes = [
        other
        for other, module in modules.items()
        if name in module.__all__ and getattr(module, name) is value
    ]
    return sorted(homes, key=lambda other: (other.count("."), other))


def _kind(value: typing.Any) -> str:
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if callable(value) and typing.get_origin(value) is None else "data"


def _doc(module: typing.Any, name: str, value: typing.Any) -> str:
    """The docstring of a function or a class, or the comment at a constant."""
    if _kind(value) != "data":
        return inspect.getdoc(value) or ""
    files = [Path(module.__file__)]
    if files[0].name == "__init__.py":
        files = sorted(files[0].parent.glob("*.py"))
    above, beside = rf"((?:^#.*\n)+){name}(?:: .*)? = ", rf"^{name}(?:: .*)? = .*  (# .*)"
    for path in files:
        text = path.read_text()
        if found := re.search(above, text, re.M) or re.search(beside, text, re.M):
            return re.sub(r"^# ?", "", found.group(1), flags=re.M).strip()
    return ""


def fields(cls: type) -> dict[str, str]:
    """The comments beside the fields of a class, such as those of a NamedTuple."""
    lines = inspect.getsource(cls).splitlines()
    tree = ast.parse(textwrap.dedent("\n".join(lines)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    found = {}
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        end = node.end_lineno or node.lineno
        parts = [lines[end - 1].partition("  # ")[2]]
        for line in lines[end:]:  # a long comment continues on lines of its own
            if not parts[0] or not re.match(r"\s*# ", line):
                break
            parts.append(line.strip(" #"))
        if not node.target.id.startswith("_"):
            found[node.target.id] = " ".join(parts).strip()
    return found


def _table(rows: list[tuple[str, str]]) -> str:
    """A table of two columns without a head."""
    lines = [".. list-table::", "   :class: names", "   :widths: 35 65", ""]
    for left, right in rows:
        lines += [f"   * - {left}", f"     - {right}"]
    return "\n".join(lines) + "\n"


def _links(found: list[Entry]) -> str:
    return _table([(f":py:obj:`{entry.name} <{entry.path}>`", entry.summary) for entry in found])


def module_page(module_name: str) -> str:
    """The page of a module, in reStructuredText."""
    found = entries(module_name)
    doc = inspect.getdoc(importlib.import_module(module_name)) or ""
    below = [other for other in public_modules() if other.startswith(f"{module_name}.")]
    # `models.mbconv` is a function; the module of the same path must not be described twice.
    parent, _, name = module_name.rpartition(".")
    is_shadowed = not inspect.ismodule(getattr(importlib.import_module(parent), name))
    directive = "currentmodule" if is_shadowed else "module"
    page = [module_name, "=" * len(module_name), "", f".. py:{directive}:: {module_name}", ""]
    page += [_literal_blocks(doc), "", _links(found)]
    if below:
        page += [".. toctree::", "", *(f"   {other}" for other in below), ""]
    for entry in found:
        if entry.page != module_name:
            continue
        if entry.kind == "data":
            page += [f".. py:data:: {entry.name}", "", f"   {entry.summary}", ""]
        else:
            page += [f".. auto{entry.kind}:: {entry.path}", ""]
    return "\n".join(page)


def _literal_blocks(doc: str) -> str:
    """Marks the indented blocks of a docstring as code, as Markdown does without a mark."""
    lines = doc.splitlines()
    for index in range(1, len(lines)):
        starts = lines[index].startswith("    ") and not lines[index - 1].strip()
        if starts and not re.match(r"\s*>>> ", lines[index]):
            lines[index] = f"::\n\n{lines[index]}"
    return "\n".join(lines)


def index_page() -> str:
    """The page of all modules, family by family."""
    page = ["API", "===", "", ".. py:module:: jaxprune", ""]
    page += ["After ``import jaxprune`` all modules are attributes of it. Every example on these"]
    page += ["pages runs as a test.", ""]
    page += ["Names of jaxprune itself", "-" * 24, "", _links(entries("jaxprune"))]
    for title, names in families().items():
        modules = {name: importlib.import_module(f"jaxprune.{name}") for name in names}
        rows = [
            (f":doc:`{name} <jaxprune.{name}>`", (inspect.getdoc(module) or "").split("\n")[0])
            for name, module in modules.items()
        ]
        page += [title, "-" * len(title), "", _table(rows)]
        page += [
            ".. toctree::",
            "   :hidden:",
            "",
            *(f"   {name} <jaxprune.{name}>" for name in names),
            "",
        ]
    return "\n".join(page)


def write(folder: Path) -> None:
    """Writes all pages; those that have not changed keep their time, so that Sphinx skips them."""
    pages = {name: module_page(name) for name in public_modules() if name != "jaxprune"}
    pages["index"] = index_page()
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.rst"):
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
