"""Fixtures of the program's tests."""

import pytest
import shared_programs
import tiny


@pytest.fixture(autouse=True, scope="module")
def equal_programs_are_compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        shared_programs.share(patch.setattr)
        yield


@pytest.fixture
def tiny_config():
    """A fresh configuration that trains in a second."""
    return tiny.get_config()
