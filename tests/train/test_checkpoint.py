import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax.train.run_folder import checkpoint


def state_of(step):
    return {"w": jnp.full((2, 3), step, jnp.bfloat16), "step": jnp.int32(step)}


def test_latest_two_are_kept_and_restored(tmp_path):
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_latest(state_of(0)) is None
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step))
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        step, state = checkpoints.restore_latest(state_of(0))
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
            checkpoints.save(step, state_of(step))
    damage(tmp_path / "c/2/state")
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_latest(state_of(0))[0] == 1
        assert "the checkpoint of step 2 cannot be used" in capsys.readouterr().err
        checkpoints.save(2, state_of(2))
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_latest(state_of(0))[0] == 2


def test_every_flipped_bit_of_an_array_is_noticed(tmp_path, capsys):
    # 40 flips of 40 went through orbax and tensorstore unnoticed when this was written.
    state = {"w": jax.random.normal(jax.random.key(1), (3000,))}
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state)
    data = max((tmp_path / "c/2").rglob("ocdbt*/d/*"), key=lambda path: path.stat().st_size)
    whole, rng = data.read_bytes(), np.random.default_rng(0)
    for _ in range(10):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        data.write_bytes(damaged)
        with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
            step, found = checkpoints.restore_latest(state)
        assert step == 1 or np.array_equal(found["w"], state["w"])
        if step == 1:
            assert "step 2 cannot be used" in capsys.readouterr().err


def test_truncated_and_vanished_files(tmp_path):
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step))
    for path in (tmp_path / "c/3").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_latest(state_of(0))[0] == 2
    for path in (tmp_path / "c/2/state").rglob("*"):
        if path.is_file():
            path.unlink()
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_latest(state_of(0)) is None


def test_the_state_may_be_donated_at_once(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state = {"w": jnp.zeros(300_000)}
    with checkpoint.open_checkpoints(tmp_path / "c", keep=None) as checkpoints:
        for i in range(1, 9):
            state = step(state)
            checkpoints.save(i, state)
    for i in range(1, 9):
        found = checkpoint.restore(tmp_path / "c", i, state)
        np.testing.assert_array_equal(found["w"], i)


def test_nothing_is_executed(tmp_path, monkeypatch):
    """A checkpoint from a stranger is arrays and JSON: neither written nor read with pickle."""
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state_of(1))
    names = [str(path) for path in (tmp_path / "c").rglob("*")]
    assert not [name for name in names if "pickle" in name or name.endswith(".pkl")]

    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr("builtins.eval", refuse)
    found = checkpoint.restore(tmp_path / "c", 1, state_of(0))
    assert int(found["step"]) == 1


def test_full_disk_is_an_os_error(tmp_path, small_disk):
    state = {"w": jax.random.normal(jax.random.key(0), (500_000,))}
    with checkpoint.open_checkpoints(small_disk / "c") as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.wait()
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(2, state)
            checkpoints.wait()
    with checkpoint.open_checkpoints(small_disk / "c") as checkpoints:
        assert checkpoints.restore_latest(state_of(0))[0] == 1
