import fine_tune
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
    lines = list(memory.table(config, 1000, ["config"]))[2:]
    rows = {cells[1]: [float(x) for x in cells[3:5]] for cells in
            ([c.strip() for c in line.strip("|").split("|")] for line in lines)}  # fmt: skip
    assert rows["inference"] == [1, 1]
    # Zeroth order with SGD needs what inference does and some words; backprop needs gradients and
    # activations.
    assert rows["ZO-SGD"][0] < 1.5 < rows["FO-SGD"][0]
    assert rows["ZO-Adam"][0] > rows["ZO-SGD"][0] + 1
    assert rows["FO-SGD, activations checkpointed"][0] < rows["FO-SGD"][0]


@pytest.mark.slow
def test_command_line(capsys):
    args = ["--sizes=config", "--config=tests/train/tiny.py", "--vocab_size=100"]
    assert memory.main(args) == 0 and "| config | ZO-SGD |" in capsys.readouterr().out


def test_a_fine_tune_is_measured_on_text(tmp_path, monkeypatch, capsys):
    """What its task and its kept activations ask for is left out."""
    base = fine_tune.write_base(tmp_path / "base")
    monkeypatch.setattr(memory, "STEPS", {"ZO-SGD": memory.STEPS["ZO-SGD"]})
    args = [f"--config=finetune_lora:{base}", "--config.data.block_size=16"]
    assert memory.main([*args, "--config.zo.num_queries=2"]) == 0
    assert "| config | ZO-SGD |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        (["--sizes=3B"], "--sizes must be of"),
        (["--vocab_size=0"], "--vocab_size must be at least 1"),
        (["--sises=1B"], "did you mean --sizes"),
    ],
)
def test_what_cannot_be_measured_is_said(args, message, capsys):
    assert memory.main(args) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
