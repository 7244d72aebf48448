"""The site that `make docs` builds: its contents, its links, its search, and what it asks for."""

import ast
import functools
import importlib.util
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import jaxprune
from tests.project.test_public_api import MODULES, _exported
from tests.support import chromium

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.md"))
PYTHON = ROOT / ".venv" / "docs" / "bin" / "python"
# What a browser fetches without being asked; a link is followed by a person.
FETCHED = {"script", "img", "iframe", "source", "link"}


def _api_pages():
    spec = importlib.util.spec_from_file_location("api_pages", DOCS / "api_pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.module_page = functools.cache(module.module_page)
    return module


api_pages = _api_pages()


def _contents() -> dict[str, list[str]]:
    """CONTENTS of docs/conf.py, which only Sphinx can import."""
    for node in ast.parse((DOCS / "conf.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONTENTS":
            return ast.literal_eval(node.value)
    raise AssertionError("docs/conf.py has no CONTENTS")


class _Links(HTMLParser):
    """The anchors of a page, and where it points."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := values.get(key))}
        target = values.get("href") or values.get("src")
        if target and values.get("rel") not in ("canonical", "search"):
            self.links.append(target)
            if tag in FETCHED:
                self.fetched.append(target)


class Faults(NamedTuple):
    broken: list[str]  # links that lead nowhere
    elsewhere: list[str]  # what other machines would be asked for


def faults(folder: Path) -> Faults:
    """The broken links of all pages of a folder, and what they fetch from other machines."""
    pages = {path: _Links(path.read_text()) for path in folder.rglob("*.html")}
    broken, elsewhere = [], []
    for path, page in pages.items():
        name = path.relative_to(folder)
        elsewhere += [f"{name}: {link}" for link in page.fetched if re.match(r"(\w+:)?//", link)]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = pages.get(target)
            if not target.exists() or found and parts.fragment not in {*found.anchors, ""}:
                broken.append(f"{name}: {link}")
    return Faults(broken, elsewhere)


def plots(notebook: Path) -> int:
    """How many figures a notebook draws."""
    return notebook.read_text().count("plt.subplots(")


def names_of(inventory: bytes) -> set[str]:
    """The Python names in an objects.inv of Sphinx."""
    text = zlib.decompress(inventory.split(b"\n", 4)[4]).decode()
    return {line.split()[0] for line in text.splitlines() if line.split()[1].startswith("py:")}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    if not PYTHON.exists():
        pytest.skip("the environment of Sphinx is missing (`make docs` makes it)")
    folder = tmp_path_factory.mktemp("site")
    command = [str(PYTHON), "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(folder)]
    # Not with the flags of tests: notebooks train on one device, with optimized programs.
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    build = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=1800)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


@pytest.mark.slow
@pytest.mark.scripts
def test_links_of_the_site_lead_somewhere(site):
    found = faults(site)
    assert found.broken == []
    assert found.elsewhere == [], "put these files into docs/_static"


@pytest.mark.slow
@pytest.mark.scripts
def test_every_public_name_is_described_on_the_site(site):
    described = names_of((site / "objects.inv").read_bytes())
    for module in api_pages.public_modules():
        assert {entry.path for entry in api_pages.entries(module)} - described == set()
    structure = (site / "api" / "jaxprune.structure.html").read_text()
    assert "&gt;&gt;&gt; " in structure, "examples are missing"
    assert "Default:" in structure, "arguments are missing"
    state = (site / "api" / "jaxprune.transforms.html").read_text()
    assert "number of mask updates done" in state, "comments beside fields are missing"


@pytest.mark.slow
@pytest.mark.scripts
def test_the_site_in_a_browser(site):
    with chromium.serve(site) as address:
        for page in ("index.html", "start.html", "results.html", "api/jaxprune.structure.html"):
            opened = chromium.load(f"{address}/{page}")
            assert "<h1>" in opened.html
            assert opened.console == [], page  # neither errors nor requests for other machines
        for words, target in [
            ("agip_transform", "api/jaxprune.transforms.html#jaxprune.agip_transform"),
            ("find_groups", "api/jaxprune.structure.html#jaxprune.structure.find_groups"),
            ("holds no masks", "faq.html"),
        ]:
            found = chromium.load(f"{address}/search.html?q={words.replace(' ', '+')}")
            assert f'href="{target}' in found.html, words
            assert found.console == []


@pytest.mark.slow
@pytest.mark.scripts
def test_notebooks_have_their_plots_in_a_browser(site):
    with chromium.serve(site) as address:
        for notebook in NOTEBOOKS:
            page = chromium.load(f"{address}/notebooks/{notebook.stem}.html")
            assert page.html.count('<img alt="../_images/') == plots(notebook), notebook.name
            assert page.html.count('class="output ') >= 5, "the cells were not run"
            # A picture whose file is missing is a broken link, see above.
            assert page.console == [], notebook.name


@pytest.mark.slow
def test_chromium_reports_what_a_page_wants_from_elsewhere(tmp_path):
    (tmp_path / "page.html").write_text(
        '<img src="http://example.org/a.png"><link rel="stylesheet" href="//example.org/b.css">'
        '<script>fetch("https://example.org/c").catch(() => document.body.append("caught"))'
        "</script>"
    )
    with chromium.serve(tmp_path) as address:
        page = chromium.load(f"{address}/page.html")
    assert "caught" in page.html
    for name in ("a.png", "b.css", "c"):
        assert any(f"example.org/{name}'" in line for line in page.console), name


@pytest.mark.parametrize(
    "module_name", [name for name in MODULES if "._" not in name and _exported(name)]
)
def test_every_public_name_has_a_page(module_name):
    listed = {entry.name: entry for entry in api_pages.entries(module_name)}
    modules = {name.rpartition(".")[2] for name in MODULES}
    missing = {name for name, _ in _exported(module_name)} - set(listed) - modules
    assert missing == set()
    for entry in listed.values():
        data = entry.kind == "data"
        line = f".. py:data:: {entry.name}" if data else f".. auto{entry.kind}:: {entry.path}"
        assert line in api_pages.module_page(entry.page).splitlines()
        assert entry.summary, f"{entry.path} needs a docstring, or a comment above it"


def test_every_module_is_in_a_family():
    names = [name for names in api_pages.families().values() for name in names]
    assert sorted(names) == sorted({name.split(".")[1] for name in MODULES if _is_public(name)})
    families = re.findall(r"^([A-Z].*):$", jaxprune.__doc__ or "", re.M)
    assert [*families, api_pages.INTERNAL] == list(api_pages.families())


def _is_public(name: str) -> bool:
    return "." in name and "._" not in name and bool(_exported(name))


def test_fields_are_described_by_the_comments_beside_them():
    found = api_pages.fields(jaxprune.AgipState)
    assert list(found) == list(jaxprune.AgipState._fields)
    assert found["mask_updates"] == "int32 [], number of mask updates done"


def test_every_page_is_in_the_side_bar():
    listed = [page for pages in _contents().values() for page in pages]
    assert len(listed) == len(set(listed))
    found = [*DOCS.glob("*.md"), *DOCS.glob("notebooks/*.md")]
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in found} - {"index"}
    assert pages - set(listed) == set(), "add these to CONTENTS of docs/conf.py"


def test_notebooks_are_short_text_with_plots_and_public_names():
    assert len(NOTEBOOKS) >= 3
    for notebook in NOTEBOOKS:
        text = notebook.read_text()
        assert "format_name: myst" in text.split("---")[1], "jupytext cannot open it"
        assert plots(notebook) and len(text.splitlines()) <= 260
        cells = re.findall(r"^```{code-cell} ipython3\n(.*?)^```$", text, re.S | re.M)
        for line in "".join(cells).splitlines():
            assert len(line) <= 92, f"{notebook.name} is wider than its page: {line}"
            assert not re.match(r"\s*(from|import) jaxprune\S*\._|[%!]", line), line
            private = re.match(r"from jaxprune\S* import (.*)", line)
            assert not private or not re.search(r"\b_", private.group(1)), line


def test_the_summary_has_the_figures_of_the_lab_book():
    lab_book = (DOCS / "results.md").read_text()
    text = re.sub(r"\]\([^)]*\)", "]", (DOCS / "summary.md").read_text())
    figures = set(re.findall(r"(?<![\w-])\d[\d.,]*\d|(?<![\w-])\d", text))
    assert len(figures) > 20
    known = set(re.findall(r"(?<![\w-])\d[\d.,]*\d|(?<![\w-])\d", lab_book))
    assert figures - known == set()


def test_the_glossary_has_the_words_of_the_architecture():
    words = (
        (DOCS / "architecture.md").read_text().partition("\n## Words\n")[2].partition("\n## ")[0]
    )
    used = set(re.findall(r"\*([A-Za-z- ]+)\*", words))
    known = set(re.findall(r"^\| \*([A-Za-z:\- ]+)\*", (DOCS / "glossary.md").read_text(), re.M))
    assert len(used) > 20
    assert {word.lower() for word in used} - {word.lower() for word in known} == set()


def test_faults(tmp_path):
    (tmp_path / "b.html").write_text('<p id="there">')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there"></a><a href="b.html#gone"></a><a href="c.html"></a>'
        '<a href="https://example.org"></a><img src="//example.org/x.png"><a href="#here"></a>'
    )
    assert faults(tmp_path) == Faults(
        ["a.html: b.html#gone", "a.html: c.html", "a.html: #here"], ["a.html: //example.org/x.png"]
    )
