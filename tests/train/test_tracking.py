"""Rows at Weights & Biases, by its own library and without the network."""

import importlib.util
import json

import pytest

from zo_jax.train.config import ConfigError
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.run_folder import metrics


@pytest.mark.filterwarnings("ignore")  # of its parts
def test_rows_are_there_as_in_the_folder(tiny_config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny_config.train.wandb = "a-project"
    train_and_evaluate(tiny_config, tmp_path)
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = kept.read_bytes()
    assert b"a-project" in content and (tmp_path / "wandb/id").read_bytes() in content
    rows = metrics.read(tmp_path / "metrics.csv")
    values = [float(row[name]) for row in rows for name in ("loss", "eval_loss") if row[name]]
    assert len(values) > 2 and all(json.dumps(x).encode() in content for x in values)
    tiny_config.train.num_steps += 2
    train_and_evaluate(tiny_config, tmp_path)
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2, "it goes on"
    assert not [
        path for path in tmp_path.glob("wandb/offline-run-*") if path.name[-16:] not in str(kept)
    ]


def test_without_its_library_it_is_refused_in_a_line(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tiny_config.train.wandb = "a-project"
    with pytest.raises(ConfigError, match=r"needs wandb, .* pip install 'zo_jax\[wandb\]'"):
        train_and_evaluate(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_login_it_is_refused_in_a_line(tiny_config, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it keeps the mode that it was first used in
    for name, value in {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": "none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    tiny_config.train.wandb = "a-project"
    with pytest.raises(ConfigError, match=r"cannot begin: .*; run wandb login, set WANDB_MODE"):
        train_and_evaluate(tiny_config, tmp_path / "run")
