"""Sphinx configuration; `make docs` builds the pages with warnings as errors."""

import amil_fast

project = "amil_fast"
author = "The amil_fast authors"
copyright = "2026, The amil_fast authors"
version = release = amil_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx-mathjax-offline",  # MathJax inside the pages, no network needed to read them
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_title = f"amil_fast {release}"
html_theme_options = {"navigation_with_keys": True}
exclude_patterns = ["build"]
