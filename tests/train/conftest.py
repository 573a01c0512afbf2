"""Fixtures of the program's tests."""

import pytest
import tiny


@pytest.fixture
def tiny_config():
    """A fresh configuration that trains in a second."""
    return tiny.get_config()
