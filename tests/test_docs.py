"""The examples in the docstrings run as they stand."""

import doctest
import importlib
import pkgutil

import pytest

import zo_jax


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
