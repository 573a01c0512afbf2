import os
from pathlib import Path
import subprocess
import sys

import jax
import pytest

from zo_jax.layout import Layout
from zo_jax.train.mesh import MeshError, make_mesh
from zo_jax.train.model import RULES


@pytest.mark.slow
def test_on_eight_virtual_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n2",
            "-q",
            str(Path(__file__).parent / "eight_devices.py"),
        ],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]


def test_mesh_of_one_device():
    mesh = make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"query": 1, "data": 1, "model": 1}
    with pytest.raises(MeshError, match=r"multiply to the 1 devices; got query=2"):
        make_mesh(2, devices=jax.devices()[:1])


def test_rules():
    layout = Layout(make_mesh(devices=jax.devices()[:1]), RULES)
    tree = {"fc": {"kernel": jax.numpy.ones((2, 3)), "bias": jax.numpy.ones(3)}}
    # One device holds everything.
    assert all(s.is_fully_replicated for s in jax.tree.leaves(layout.shardings(tree)))
