"""The house: the library imports jax, numpy and optax alone, and every room only rooms below it."""

import ast
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "zo_jax"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
}


def imports_of(path):
    """The modules that a file imports when it is itself imported, of the whole file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in FILES else node.module


LIBRARY = {
    name: path
    for name, path in FILES.items()
    if (name.count(".") == 1 or name.startswith("zo_jax.methods.")) and path.stem[:2] != "__"
}


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_imports_jax_numpy_optax_and_itself(name):
    for module in imports_of(LIBRARY[name]):
        top = module.partition(".")[0]
        assert top in {"jax", "numpy", "optax", *sys.stdlib_module_names} or module in {
            *LIBRARY,
            "zo_jax",
            "zo_jax.methods",
        }, f"{name} imports {module}"


def test_importing_the_library_loads_nothing_else():
    code = (
        "import sys, jax, jax.numpy, jax.sharding, jax.extend, jax.experimental, numpy, optax, "
        "optax.contrib\n"
        "before = set(sys.modules)\nimport zo_jax\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - sys.stdlib_module_names <= {"zo_jax", "jax", "numpy", "optax"}


def test_no_room_imports_one_above_it():
    """The imports among modules have no cycle, so that there is an order from the ground up."""
    below = {
        name: {m for m in imports_of(path) if m in FILES and m != name}
        for name, path in FILES.items()
        if path.stem != "__init__"
    }
    placed = set()
    while ready := {
        name for name in below if name not in placed and below[name] & below.keys() <= placed
    }:
        placed |= ready
    assert placed == below.keys(), f"in cycles: {sorted(below.keys() - placed)}"
