"""Settings of the documentation: ``make docs`` builds it, every warning is an error."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]
# The notebooks run in processes of their own, which import the package from this checkout. One
# thread, for their networks are small.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
)
# The commands of this environment, and tables as wide as the page.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("COLUMNS", "96")
# A kernel asks every command for a terminal's colours and progress bars, which no page can show.
os.environ.update(TTY_COMPATIBLE="0", TTY_INTERACTIVE="0", NO_COLOR="1")
# tqdm would rather draw widgets; text does.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from nad_attr import __version__  # noqa: E402

project = "nad_attr"
author = "The nad_attr developers"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "reference_pages",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
# Other people's pages may or may not be there in a checkout of a branch.
suppress_warnings = ["toc.empty_glob"]

# -- pages ---------------------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb"}

# -- notebooks -----------------------------------------------------------------------------------

# Every tutorial is run by every build. While one page is written, NAD_DOCS_RUN=page.md runs that
# page alone, and NAD_DOCS_RUN= (empty) none.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_execution_show_tb = True
nb_merge_streams = True
_only = os.environ.get("NAD_DOCS_RUN")
if _only is not None:
    suppress_warnings += ["myst-nb.lexer"]  # what was not run does not say its language
    nb_execution_excludepatterns = [
        path.relative_to(HERE).as_posix()
        for path in HERE.rglob("*.md")
        if path.name not in _only.split(",")
    ]

# -- reference -----------------------------------------------------------------------------------

autosummary_generate = True
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
templates_path = ["_templates"]

# -- HTML ----------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"nad_attr {version}"
html_static_path = ["_static"]
html_css_files = ["nad_attr.css"]
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"
