"""The site: docs/*.md through MyST, and all public names from their docstrings (`make docs`).

The notebooks of docs/notebooks/ are text; they run whenever Sphinx reads them.
"""

import inspect
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import api_pages  # noqa: E402

import jaxprune  # noqa: E402

# The side bar. A page that is not there (yet) is left out, and one that is not here is a warning.
CONTENTS = {
    "Start": ["start", "choose", "loops", "coming", "jaxpruner"],
    "Notebooks": ["notebooks/pruning", "notebooks/channels", "notebooks/elastic"],
    "Prune while training": ["methods", "optimizers"],
    "Remove channels": ["structure", "shrinking"],
    "Search and rewind": ["searching", "elastic", "rewinding"],
    "After training": ["transformers", "pretrained", "deploy", "kernels"],
    "Devices": ["devices", "tpu"],
    "Look up": ["faq", "glossary", "testing", "api/index"],
    "Behind it": ["summary", "results", "results_archive", "architecture"],
}

project = "jaxprune"
author = copyright = "The jaxprune authors"
release = version = jaxprune.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "name"
myst_heading_anchors = 3  # headings have the anchors that a forge gives them
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # seconds for a cell
nb_execution_in_temp = True
nb_execution_show_tb = True
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings say more: shapes, dtypes, units
napoleon_custom_sections = [("Fields", "params_style")]
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"jaxprune {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}


def pages_there():
    """CONTENTS without the pages that are not there."""
    return {
        caption: [page for page in pages if page == "api/index" or (DOCS / f"{page}.md").exists()]
        for caption, pages in CONTENTS.items()
    }


def add_contents(app, docname, source):
    """Appends the side bar to the first page, where a forge would show its source."""
    if docname == "index":
        for caption, pages in app.config.side_bar.items():
            lines = ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]
            source[0] += "\n".join(lines)


def add_fields(app, what, name, value, options, lines):
    """Describes the fields of a class by the comments beside them."""
    found = api_pages.fields(value) if what in ("class", "exception") else {}
    if found:
        star = re.compile(r"\*(?=[^`]*(?:`[^`]*`[^`]*)*$)")  # outside of backquotes
        rows = ["    " + field + ": " + star.sub(r"\\*", text) for field, text in found.items()]
        section = ["Fields:", *rows, ""]
        at = lines.index("Example:") if "Example:" in lines else len(lines)
        lines[at:at] = section if not at or not lines[at - 1] else ["", *section]


def skip_fields(app, what, name, value, skip, options):
    """Leaves out the fields themselves, which have no docstring of their own."""
    return True if inspect.isdatadescriptor(value) and not isinstance(value, property) else skip


def name_role(role, rawtext, text, lineno, inliner, options=None, content=None):
    """Shows what docstrings have in backquotes as code, and links it if it is a public name."""
    env = inliner.document.settings.env
    code = nodes.literal(rawtext, text)
    # Arguments are often called like functions: link what no argument would be called.
    if not any(mark in text for mark in "._") and not text[:1].isupper():
        return [code], []
    module = env.ref_context.get("py:module") or "jaxprune"
    for path in (text, f"{module}.{text}", f"jaxprune.{text}"):
        if path in PATHS:
            target = PATHS[path]
            link = addnodes.pending_xref(
                rawtext, code, refdomain="py", reftype="obj", reftarget=target, refexplicit=True
            )
            link["refdoc"] = env.docname
            return [link], []
    return [code], []


PATHS = {
    f"{module}.{entry.name}": entry.path
    for module in api_pages.public_modules()
    for entry in api_pages.entries(module)
}


def setup(app):
    """Writes the pages of the API, and tells Sphinx of the functions above."""
    api_pages.write(DOCS / "api")
    app.add_config_value("side_bar", pages_there(), "env")  # pages come and go: read all again
    app.add_role("name", name_role)
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", add_fields, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_fields)
