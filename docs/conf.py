"""The documentation site: sphinx-build -W -n docs docs/_build."""

import os
import re

import zo_jax

project = "zo_jax"
copyright = "the zo_jax authors"
version = release = zo_jax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

html_theme = "sphinx_book_theme"
html_title = "zo_jax"
html_theme_options = {
    "repository_url": "https://github.com/zo-jax/zo_jax",
    "use_repository_button": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    # The search stands in the sidebar; the bar at the top would be empty but for a second one.
    "navbar_persistent": [],
}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Notebooks are kept without outputs: the build executes them, once for each version of them.
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True

# Single backticks in docstrings are code, and links where they name something public.
default_role = "obj"
maximum_signature_line_length = 80
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_use_param = False
napoleon_use_rtype = False

nitpick_ignore_regex = [
    ("py:obj", "(?s).*"),  # single backticks that are code
    # Types of others, in annotations; their inventories would need the network.
    (
        "py:.*",
        r"(jax|jaxlib|np|numpy|optax|tokenizers|collections|typing|pathlib|contextlib|types)\..*",
    ),
    ("py:class", r"Any|Callable|Path|Mesh|Primitive|optional"),
]
# With the network, names of others are links.
if os.environ.get("ZO_JAX_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }


def _skip_fields(app, what, name, obj, skip, options):
    """Fields of NamedTuples are told in the docstrings of their classes."""
    return True if type(obj).__name__ == "_tuplegetter" else skip


def _escape(app, what, name, obj, options, lines):
    """Docstrings are plain text with code in backticks: |x| and *batch are no markup."""
    in_example = in_code = False
    for i, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        if not in_example:
            parts = line.split("`")
            first = 1 if in_code else 0
            parts[first::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[first::2]]
            lines[i] = "`".join(parts)
            in_code ^= len(parts) % 2 == 0


def setup(app):
    app.connect("autodoc-process-docstring", _escape, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", _skip_fields)
