"""Sphinx: docs/*.md by MyST, and pages of all public names from their docstrings (`make docs`)."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import api_pages  # noqa: E402

import jaxprune  # noqa: E402

project = "jaxprune"
author = "The jaxprune authors"
copyright = "The jaxprune authors"  # Sphinx asks for this name
release = version = jaxprune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
default_role = "code"

html_theme = "furo"
html_title = f"jaxprune {release}"
html_show_sphinx = False

api_pages.write(DOCS / "api")
