"""How the pages and the docstrings become a site: `make docs`."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from sphinx.application import Sphinx  # noqa: E402

import mros_jax  # noqa: E402

project = "mros_jax"
author = "the mros_jax authors"
version = release = mros_jax.__version__

# The source is the repository, so that pages may link to files of the code.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "docs/api.rst", "docs/api/**.rst"]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
napoleon_use_ivar = True
napoleon_custom_sections = [("Outputs", "params_style")]
default_role = "code"  # of names in docstrings
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["jax2onnx", "onnx", "onnxruntime"]  # which want an environment of their own
html_theme = "furo"
html_show_copyright = False
html_title = f"mros_jax {release}"
html_additional_pages = {"index": "start.html"}
templates_path = [str(ROOT / "docs" / "templates")]

_CONTENTS = """

:::{toctree}
:hidden:

../README
training
data
systems
reproduce
synthetic
evaluation
index_search
report
explore
import
export
exactness
auto_reid
benchmarks
tpu
adding
../CONTRIBUTING
../CHANGELOG
api
:::
"""


def _add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give the first page a sidebar of all pages, which a reader of the file has no use for."""
    if docname == root_doc:
        source[0] += _CONTENTS


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_contents)
