"""The examples in the docstrings run as they stand."""

import doctest
import importlib
from pathlib import Path
import pkgutil
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import zo_jax

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


def test_the_page_of_families_and_rules_runs():
    names = {}
    for block in python_blocks(ROOT / "docs/own_family_and_rule.md"):
        exec(block, names)
    assert names["est"].gradient.shape == (6, 7)


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
