import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from zo_jax.train.config import Config, DataConfig, ModelConfig, TrainConfig, ZOConfig
from zo_jax.train.tools import memory


def test_measure():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    assert memory.measure(lambda x: x + 1, x) >= 8000
    assert memory.measure(lambda x: x + 1, x, donate=(0,)) < 8000


def test_ways_of_training_compare_as_they_should():
    config = Config(
        model=ModelConfig(num_layers=4, num_heads=4, width=128, context_length=128),
        data=DataConfig(block_size=64),
        zo=ZOConfig(num_queries=2),
        train=TrainConfig(num_steps=1, batch_size=8),
    )
    lines = memory.table(config, 1000, ["config"]).splitlines()[2:]
    rows = {cells[1]: [float(x) for x in cells[3:5]] for cells in
            ([c.strip() for c in line.strip("|").split("|")] for line in lines)}  # fmt: skip
    assert rows["inference"] == [1, 1]
    # Zeroth order with SGD needs what inference does and some words; backprop needs gradients and activations.
    assert rows["ZO-SGD"][0] < 1.5 < rows["FO-SGD"][0]
    assert rows["ZO-Adam"][0] > rows["ZO-SGD"][0] + 1
    assert rows["FO-SGD, activations checkpointed"][0] < rows["FO-SGD"][0]


@pytest.mark.slow
def test_command_line():
    run = lambda *args: subprocess.run(
        [sys.executable, "-m", "zo_jax.train.tools.memory", *args], capture_output=True, text=True
    )
    done = run("--sizes=config", "--config=tests/train/tiny.py", "--vocab_size=100")
    assert done.returncode == 0 and "| config | ZO-SGD |" in done.stdout, done
    done = run("--sizes=3B")
    assert done.returncode == 2 and "--sizes must be of" in done.stderr
