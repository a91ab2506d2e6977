"""The documentation as a site: `make site` builds the pages of the repository, where they lie, and the reference of Python and of the
command line from the code."""

from __future__ import annotations

import re

import probe

project = "probe"
author = "the probe authors"
version = release = probe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
root_doc = "docs/index"
include_patterns = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
include_patterns += ["docs/*.md", "docs/site/*.md", "tasks/README.md", "tools/README.md"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]
"""A page of a folder may begin below its title."""

html_theme = "furo"
html_title = f"probe {version}"
templates_path = ["templates"]
html_additional_pages = {"index": "redirect.html"}

autodoc_typehints = "description"
autodoc_member_order = "bysource"


def _as_rst(_app, _what, _name, _object, _options, lines: list[str]) -> None:
    """Docstrings mark code as Markdown does, with single backticks."""
    lines[:] = [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line) for line in lines]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", _as_rst)
