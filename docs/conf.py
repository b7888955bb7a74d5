"""Sphinx configuration of the documentation: `make docs` builds it, and every warning is an error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from _scripts import generate, reading  # noqa: E402

import spec_envs  # noqa: E402

project = "spec-envs"
author = "spec-envs contributors"
copyright = "2026, spec-envs contributors"
version = release = spec_envs.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_scripts", "_build"]

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp"

default_role = "code"  # single backticks in docstrings are Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # what a class only overrides is described where it is declared
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_use_param = False  # "device, dtype: …" describes two
napoleon_custom_sections = [("Attributes", "params_style"), ("Hyper-parameters", "params_style")]
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_display_short_literal_types = True
maximum_signature_line_length = 110
add_module_names = False
toc_object_entries_show_parents = "hide"

html_title = "spec-envs"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["extra.css"]
html_theme_options = {
    "source_repository": "https://github.com/spec-envs/spec-envs/",
    "source_branch": "main",
    "source_directory": "docs/",
    "top_of_page_buttons": [],
    "footer_icons": [],
}


def is_skipped(app: Any, what: str, name: str, member: object, skip: bool, options: Any) -> bool | None:
    """Leave out what libraries add to a class: pydantic's configuration, and the places of a named tuple's fields."""
    return True if name in ("model_config", "Settings") or type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Generate pages before the others are read, and complete the others as they are read."""
    app.connect("builder-inited", lambda _: generate.write_all())
    app.connect("source-read", reading.on_source_read)
    app.connect("autodoc-skip-member", is_skipped)
