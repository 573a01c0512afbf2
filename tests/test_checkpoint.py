import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax import checkpoint


def state_of(step):
    return {"w": jnp.full((2, 3), step, jnp.bfloat16), "step": jnp.int32(step)}


def test_latest_two_are_kept_and_restored(tmp_path):
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoint.restore_latest(checkpoints, state_of(0)) is None
        for step in (1, 2, 3):
            checkpoint.save(checkpoints, step, state_of(step))
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        step, state = checkpoint.restore_latest(checkpoints, state_of(0))
    assert step == 3 and state["w"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, state, state_of(3))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0")


def test_a_damaged_checkpoint_falls_back_and_can_be_written_again(tmp_path, capsys):
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoint.save(checkpoints, step, state_of(step))
    damage(tmp_path / "c/2/state")
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoint.restore_latest(checkpoints, state_of(0))[0] == 1
        assert "step 2 cannot be read" in capsys.readouterr().err
        checkpoint.save(checkpoints, 2, state_of(2))
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoint.restore_latest(checkpoints, state_of(0))[0] == 2


def test_nothing_readable(tmp_path):
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        checkpoint.save(checkpoints, 1, state_of(1))
    damage(tmp_path / "c/1/state")
    with (
        checkpoint.open_checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(checkpoint.CheckpointError, match="--restart"),
    ):
        checkpoint.restore_latest(checkpoints, state_of(0))
