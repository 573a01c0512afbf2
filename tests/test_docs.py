"""The examples in the docstrings run as they stand."""

import contextlib
import doctest
import importlib
import inspect
from pathlib import Path
import pkgutil
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import zo_jax
import zo_jax.models

ROOT = Path(__file__).parents[1]


def modules():
    """Every module of the project that has an example."""
    for info in pkgutil.walk_packages(zo_jax.__path__, "zo_jax."):
        if not info.name.endswith("__main__") and doctest.DocTestFinder().find(
            module := importlib.import_module(info.name)
        ):
            if any(test.examples for test in doctest.DocTestFinder().find(module)):
                yield info.name


@pytest.mark.parametrize("module", modules())
def test_docstring_examples(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0 and results.failed == 0


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "page", ["start", "own_model", "own_family_and_rule", "devices", "resume_and_replay"]
)
@pytest.mark.filterwarnings("ignore")  # of Flax and Equinox
def test_the_code_of_a_page_runs(page):
    names = {}
    for block in python_blocks(ROOT / f"docs/{page}.md"):
        exec(block, names)


def public_names():
    for module in (zo_jax, zo_jax.methods, zo_jax.models):
        names = (name for name in module.__all__ if not inspect.ismodule(getattr(module, name)))
        yield from (f"{module.__name__}.{name}" for name in names)


def test_every_public_name_is_in_the_reference():
    """Each once, and each that is there exists; the build of the site fails for the latter too."""
    told = []
    for page in (ROOT / "docs/reference").glob("*.rst"):
        module = ""
        for directive, name in re.findall(r"^\.\. (\w+):: (\S+)$", page.read_text(), re.MULTILINE):
            if directive == "currentmodule":
                module = f"{name}."
            elif directive.startswith("auto"):
                told.append(name if name.startswith("zo_jax.") else f"{module}{name}")
    assert len(told) == len(set(told))
    missing = set(public_names()) - set(told)
    assert not missing, f"docs/reference/ says nothing of {', '.join(sorted(missing))}"


@pytest.mark.parametrize("name", public_names())
def test_every_public_function_has_an_example(name):
    module, _, name = name.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    if inspect.isfunction(function):
        assert ">>>" in (inspect.getdoc(function) or "")


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page):
    """Files, scripts, tests and public names of the library."""
    text = page.read_text()
    files = re.findall(r"`((?:tests|benchmarks|zo_jax|configs)/[\w/]+\.\w+)", text)
    files += re.findall(r"python (benchmarks/\w+\.py)", text)
    assert not [name for name in files if not (ROOT / name).is_file()]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert not [name for name in named if f"def {name}(" not in tests]
    if page.stem != "CHANGELOG":  # which tells of names that are no longer
        names = re.findall(r"\bzo_jax\.([a-zA-Z]\w+)", text)
        assert not [name for name in names if not is_name(name)]


def test_the_columns_of_a_run_are_those_that_are_explained():
    from zo_jax.train.run_folder.metrics import COLUMNS

    section = (ROOT / "docs/read_a_run.md").read_text().partition("## What the columns mean")[2]
    told = [
        name
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    ]
    assert told and not set(told) - set(COLUMNS)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    """Those of the site are looked at where it is built."""
    links = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text())
    assert not [x for x in links if not x.startswith("http") and not (ROOT / x).exists()]


def test_the_readme_is_narrow():
    assert not [x for x in (ROOT / "README.md").read_text().splitlines() if len(x) > 120]


def is_name(name):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"zo_jax.{name}")
    return hasattr(zo_jax, name)


def test_the_page_of_methods_runs():
    names = {}
    for block in python_blocks(ROOT / "docs/methods.md"):
        exec(block, names)
    assert len(names["again"]) == 2


def test_the_readme_runs():
    """Its code, with a loss, parameters and a batch that a reader would have."""
    names = {
        "loss_fn": lambda p, x: jnp.mean((x @ p["w"]) ** 2),
        "params": {"w": jnp.ones((3, 2))},
        "key": jax.random.key(0),
        "batch": (jnp.ones((4, 3)),),
        "optax": optax,
    }
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, names)
    assert names["loss_fn"](names["params"], *names["batch"]) < 9, "it descended"
