"""Settings that hold for every test; they must be made before jax and datasets are imported."""

import ctypes
import gc
from importlib import metadata
import os
from pathlib import Path
import subprocess
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "zo_jax_test_compilation_cache")
)
# Small programs are worth keeping too: the tests compile little else.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiled three times faster, to slower programs. What rests on XLA's optimisations, such as
# numbers that different programs compute to the same bit, is tested in processes without.
QUICK = "--xla_backend_optimization_level=0"
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # Later ones do not know it, and end a process that is given what they do not know.
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Nearly all that a collection of garbage looks at are programs that JAX keeps; what they leave
# goes with the tests of a file.
gc.set_threshold(100_000, 50, 100)

# Of a worker, between two tests; two workers and a large test of each are to keep to 4 GB.
MOST_BYTES = 1_550_000_000

# What takes longest begins first, so that the workers end together.
LONGEST = (
    "test_reliability",
    "test_sharding",
    "test_processes",
    "test_estimators",
    "test_modes",
    "test_settings",
    "test_notebooks",
    "test_tracking",
)


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for 1 MB; needs the right to mount one."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def resident_bytes():
    """Memory of this process; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.fixture(autouse=True)
def forget_programs():
    """Compiled programs go where they have become many: all of them together take gigabytes."""
    yield
    if resident_bytes() > MOST_BYTES:
        jax.clear_caches()
        gc.collect()
        # What is free, the allocator keeps; here the system has it back.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
