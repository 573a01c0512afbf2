"""The documentation site: sphinx-build -W -n docs docs/_build."""

import ast
import os
from pathlib import Path
import re
import shutil

import zo_jax
from zo_jax.train import config, experiment

project = "zo_jax"
author = "the zo_jax authors"
copyright = author
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
html_static_path = ["_static"]
html_css_files = ["site.css"]
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
nb_execution_timeout = 900
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
    # Types of ours that functions return and that have no name of their own in public.
    ("py:class", r"zo_jax\.[\w.]+\.\w+"),
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


def _copy_notebooks(app):
    """Sources are found below docs/ alone, links to them through no symbolic link."""
    folder = Path(app.srcdir)
    shutil.copytree(folder.parent / "notebooks", folder / "notebooks", dirs_exist_ok=True)


def _cell(text):
    return " ".join(str(text).split()).replace("|", r"\|")


def _write_settings(app):
    """The tables of docs/settings.md, from the declarations of the program."""
    folder = Path(app.srcdir) / "_build"
    folder.mkdir(exist_ok=True)
    rows = ["| `--config=` | what |", "|---|---|"]
    for name in experiment.shipped():
        module = ast.parse((experiment.FOLDER / f"{name}.py").read_text())
        takes = any(isinstance(x, ast.FunctionDef) and x.args.args for x in module.body)
        summary = (ast.get_docstring(module) or "").split("\n\n")[0]
        rows.append(f"| `{name}{':...' if takes else ''}` | {_cell(summary)} |")
    (folder / "experiments.md").write_text("\n".join(rows) + "\n")
    rows = ["| setting | what |", "|---|---|"]
    for one in config.SETTINGS.values():
        words = [f"`{word or '(empty)'}`" for word in (*one.choices, *one.words)]
        parts = [
            one.help,
            *(
                f"{name}: {text}"
                for name, text in (
                    ("One of", ", ".join(words)),
                    ("Numbers", one.allowed),
                    ("If", one.only_if),
                )
                if text
            ),
        ]
        rows.append(f"| `{one.name}={one.default}` | {_cell('. '.join(parts))} |")
    (folder / "settings.md").write_text("\n".join(rows) + "\n")


def setup(app):
    app.connect("builder-inited", _copy_notebooks)
    app.connect("builder-inited", _write_settings)
    app.connect("autodoc-process-docstring", _escape, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", _skip_fields)
