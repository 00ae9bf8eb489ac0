"""Sphinx configuration: plain Markdown through MyST, API pages from the docstrings."""

from embedlab import __version__

project = "embedlab"
author = "the embedlab authors"
copyright = "2026, the embedlab authors"  # noqa: A001
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "embedlab"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False
suppress_warnings = ["myst.xref_missing"]
