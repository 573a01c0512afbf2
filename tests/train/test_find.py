"""Settings that a run finds before its first step."""

import json

import pytest
import tiny

from zo_jax.train.config import ConfigError
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.run_folder.folder import read_config
from zo_jax.train.tools import ledger
from zo_jax.train.validation import validate


@pytest.fixture
def auto_config(tiny_config):
    tiny_config.zo.epsilon = tiny_config.optimizer.learning_rate = "auto"
    tiny_config.optimizer.name = "sgd"
    tiny_config.train.num_steps = 4
    return tiny_config


def test_what_is_found_is_kept_and_used(auto_config, tmp_path, capsys):
    train_and_evaluate(auto_config, tmp_path / "run")
    out = capsys.readouterr().out
    assert "measuring the loss, to find zo.epsilon and optimizer.learning_rate" in out
    found = read_config(tmp_path / "run/config.json")["found"]
    assert 1e-5 < found["zo.epsilon"] < 1 and 1e-6 < found["optimizer.learning_rate"] < 100
    assert f"central differences of {found['zo.epsilon']:g}" in out
    assert "by rounding" in out and "cost: " in out
    # A longer run goes on with the same numbers, and measures nothing.
    auto_config.train.num_steps = 6
    train_and_evaluate(auto_config, tmp_path / "run")
    assert "measuring" not in capsys.readouterr().out
    assert read_config(tmp_path / "run/config.json")["found"] == found
    # So does replay, which the ledger tells of them.
    assert ledger.main([str(tmp_path / "run"), "--to-step=6"]) == 0
    assert "are equal to the bit" in capsys.readouterr().out
    # Set by hand, they are the same run but for the name of it.
    config = tiny.get_config()
    config.optimizer.name, config.train.num_steps = "sgd", 6
    config.zo.epsilon = found["zo.epsilon"]
    config.optimizer.learning_rate = found["optimizer.learning_rate"]
    train_and_evaluate(config, tmp_path / "other")
    losses = [
        [json.loads(line)["eval_loss"] for line in (tmp_path / name / "evaluations.jsonl").open()]
        for name in ("run", "other")
    ]
    assert losses[0][0] == losses[1][0] and losses[0][-1] == losses[1][-1]


def test_epsilon_alone(auto_config, tmp_path, capsys):
    auto_config.optimizer.learning_rate = 1e-2
    auto_config.train.num_steps = 1
    train_and_evaluate(auto_config, tmp_path / "run")
    assert list(read_config(tmp_path / "run/config.json")["found"]) == ["zo.epsilon"]


def test_a_rate_beside_another_is_not_found(auto_config):
    auto_config.optimizer.name, auto_config.optimizer.adam_learning_rate = "muon", 1e-3
    with pytest.raises(ConfigError, match="auto finds one rate, and"):
        validate(auto_config)
    auto_config.optimizer.adam_learning_rate = 0.0
    validate(auto_config)


def test_a_rate_of_backprop_is_not_found(auto_config):
    tiny.to_backprop(auto_config)
    with pytest.raises(ConfigError, match="learning_rate=auto is found by zeroth-order trials"):
        validate(auto_config)
    auto_config.optimizer.learning_rate = "Auto"
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate must be of type float"):
        validate(auto_config)
