from pathlib import Path
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax.train.run_folder import checkpoint


def state_of(step):
    return {"w": jnp.full((2, 3), step, jnp.bfloat16), "step": jnp.int32(step)}


def test_latest_two_are_kept_and_restored(tmp_path):
    assert checkpoint.find_whole(tmp_path / "c", state_of(0)) == ([], [], None)
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step))
    whole, damaged, state = checkpoint.find_whole(tmp_path / "c", state_of(0))
    assert (whole, damaged) == ([2, 3], []) and state["w"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, state, state_of(3))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]


def found(folder, identity=""):
    """(steps that are whole, steps that are not)."""
    return checkpoint.find_whole(folder, state_of(0), identity)[:2]


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0")


def test_a_damaged_checkpoint_falls_back_and_can_be_written_again(tmp_path, capsys):
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step))
    damage(tmp_path / "c/2/state")
    assert found(tmp_path / "c") == ([1], [2])
    err = capsys.readouterr().err
    assert "the checkpoint of step 2 in" in err and "it is now 2.damaged" in err
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(2, state_of(2))
    assert found(tmp_path / "c") == ([1, 2], [])


def test_those_of_another_run_or_step_are_put_aside(tmp_path, capsys):
    for name, identity in (("mine", "00000001f0000000"), ("other", "0000000100000000")):
        with checkpoint.open_checkpoints(tmp_path / name, identity=identity) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, state_of(step))
    mine = tmp_path / "mine"
    shutil.copytree(tmp_path / "other/2", mine / "3")
    shutil.copytree(mine / "2", mine / "4")
    (mine / "5").write_text("no folder")
    assert found(mine, "00000001f0000000") == ([1, 2], [3, 4, 5])
    err = capsys.readouterr().err
    assert "it is of another run" in err and "it is that of step 2" in err and err.count("\n") == 3


@pytest.fixture
def two(tmp_path):
    """A folder with two checkpoints of an array, and the largest file of the second."""
    state = {"w": jax.random.normal(jax.random.key(1), (3000,))}
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state)
    largest = max((tmp_path / "c/2").rglob("ocdbt*/d/*"), key=lambda path: path.stat().st_size)
    return tmp_path / "c", state, largest


def flip(path, at, bit):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_bit_of_any_file_is_noticed(two, tmp_path, capsys):
    folder, state, _ = two
    rng = np.random.default_rng(0)
    files = [path.relative_to(folder) for path in (folder / "2").rglob("*") if path.is_file()]
    assert len(files) > 5 and Path("2/files.json") in files
    for name in files:
        shutil.copytree(folder, tmp_path / "d")
        path = tmp_path / "d" / name
        flip(path, rng.integers(path.stat().st_size), rng.integers(8))
        whole, aside, latest = checkpoint.find_whole(tmp_path / "d", state)
        assert (whole, aside) == ([1], [2]) and np.array_equal(latest["w"], state["w"])
        assert "is not as it was written" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "d")


def test_flipped_bits_of_an_array_are_noticed_without_the_list_of_files(two, capsys):
    # 40 flips of 40 went through orbax and tensorstore unnoticed when this was written.
    folder, state, path = two
    (folder / "2/files.json").unlink()
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(5):
        flip(path, rng.integers(2000, 8000), rng.integers(8))  # among the numbers
        with pytest.raises(checkpoint.CheckpointError, match="wrong fingerprint"):
            checkpoint.restore(folder, 2, state)
        path.write_bytes(whole)
    # A run that is killed before the list is written goes on from there.
    assert np.array_equal(checkpoint.restore(folder, 2, state)["w"], state["w"])


def test_files_that_are_strange_to_a_checkpoint_are_noticed(tmp_path, capsys):
    with checkpoint.open_checkpoints(tmp_path / "c", keep=None) as checkpoints:
        for step in range(5):
            checkpoints.save(step, state_of(step))
    (tmp_path / "c/1/state/_METADATA").unlink()
    (tmp_path / "c/2/_METADATA").write_text("{}")
    (tmp_path / "c/3/files.json").unlink()
    (tmp_path / "c/3/files.json").mkdir()
    (tmp_path / "c/4/files.json").write_text("[1]")
    assert found(tmp_path / "c") == ([0], [1, 2, 3, 4])
    err = capsys.readouterr().err
    assert "'state/_METADATA' is not as it was written" in err
    assert err.count("'files.json' is not as it was written") == 2 and err.count("\n") == 4


def test_truncated_and_vanished_files(tmp_path):
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step))
    for path in (tmp_path / "c/3").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert found(tmp_path / "c")[0] == [2]
    for path in (tmp_path / "c/2/state").rglob("*"):
        if path.is_file():
            path.unlink()
    assert found(tmp_path / "c") == ([], [2, 3])


def test_the_state_may_be_donated_at_once(tmp_path):
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state = {"w": jnp.zeros(300_000)}
    with checkpoint.open_checkpoints(tmp_path / "c", keep=None) as checkpoints:
        for i in range(1, 9):
            state = step(state)
            checkpoints.save(i, state)
    for i in range(1, 9):
        there = checkpoint.restore(tmp_path / "c", i, state)
        np.testing.assert_array_equal(there["w"], i)


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
    assert int(checkpoint.restore(tmp_path / "c", 1, state_of(0))["step"]) == 1


def test_full_disk_is_an_os_error(tmp_path, small_disk):
    state = {"w": jax.random.normal(jax.random.key(0), (500_000,))}
    with checkpoint.open_checkpoints(small_disk / "c") as checkpoints:
        checkpoints.save(1, state_of(1))
        checkpoints.wait()
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(2, state)
            checkpoints.wait()
    assert found(small_disk / "c")[0] == [1]
