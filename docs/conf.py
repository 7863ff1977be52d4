"""Sphinx: ``make docs`` builds the site into build/docs. Nothing is fetched, and warnings are errors."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "_ext"), str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from masa import __version__  # noqa: E402

project, author, release = "masa", "the masa authors", __version__
copyright = "the masa authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
extensions += ["mathml", "from_code", "repository"]  # in _ext

exclude_patterns = ["_ext", "_static"]
smartquotes = False  # what is quoted is often to be typed
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are kept with their outputs, and run by the tests
nb_render_markdown_format = "myst"  # tables in outputs are tables

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"show-inheritance": True}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_use_rtype = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"
add_module_names = False

# references to what is ours must resolve; those to other packages would need their sites
nitpicky = True
# (tables at the end of a module have no docstring: a string after an assignment would change the code's meaning)
private = r"masa\.settings\._\w+"  # in pydantic's annotations
nitpick_ignore_regex = [("py:.*", r"(?!masa\.).*"), ("py:(data|attr)", r"masa\..*"), ("py:class", private)]
# an annotation that a dataclass in another module inherits stays text; of classes of one name the first is taken
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = f"masa {release}"
html_static_path = ["_static"]
html_css_files = ["masa.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
