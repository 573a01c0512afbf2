"""The examples in the docstrings of the public API run as they stand."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    [
        *("lazy", "perturbations", "estimators", "transforms", "optimizers", "instruct"),
        *("updates", "ledger", "fingerprint", "sharding"),
    ],
)
def test_docstring_examples(module):
    results = doctest.testmod(importlib.import_module(f"zo_jax.{module}"))
    assert results.attempted > 0 and results.failed == 0
