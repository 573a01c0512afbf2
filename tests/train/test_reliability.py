"""What happens to a run when machines, disks and users do their worst: the real thing each time, in
a real process.
"""

import contextlib
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from zo_jax import ledger
from zo_jax.train import run_state
from zo_jax.train.config import EXTENDABLE, ConfigError, ZOConfig
from zo_jax.train.data import batches
from zo_jax.train.model import make_model
from zo_jax.train.progress import Progress
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.run_folder import checkpoint, folder, identity, metrics
from zo_jax.train.run_folder.checkpoint import CheckpointError
from zo_jax.train.run_folder.reports import Reports
from zo_jax.train.signals import CannotWrite, Diverged, Interrupted, catch_signals
from zo_jax.train.tools.ledger import main as replay_main

ROOT = Path(__file__).parents[2]
# Seconds for what must end, or must come: many times what it takes.
PATIENCE = 600
# A run that does not end by itself.
ENDLESS = ("train.num_steps=100000", "train.eval_interval=100000", "train.checkpoint_interval=0")


def start(folder, *fields, before=()):
    command = [
        *before,
        sys.executable,
        str(ROOT / "main.py"),
        f"--config={ROOT / 'tests/train/tiny.py'}",
    ]
    command += [f"--workdir={folder}", *(f"--config.{field}" for field in fields)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def wait_until(has_come, process):
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if has_come():
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError(process.communicate())


def wait_for_rows(folder, count, process):
    """Until the process has written `count` rows more."""
    count += len(metrics.read(folder / "metrics.csv"))
    wait_until(lambda: len(metrics.read(folder / "metrics.csv")) >= count, process)


def losses_of(folder):
    return [(r["step"], r["loss"], r["eval_loss"]) for r in metrics.read(folder / "metrics.csv")]


def final_bits(folder, config, step):
    corpus = batches.load_corpora(config)
    model = make_model(config.model, corpus.tokenizer.vocab_size)
    state = checkpoint.restore(folder / "checkpoints", step, run_state.init_state(config, model))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def assert_same_run(one, other, config, step=6):
    assert losses_of(one) == losses_of(other)
    assert final_bits(one, config, step) == final_bits(other, config, step)
    for name in ("ledger.bin", "sample.txt"):
        if (one / name).exists() or (other / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture
def text(tmp_path, tiny_config):
    path = tmp_path / "bottles.txt"
    path.write_text(tiny.TEXT)
    tiny_config.data.source, tiny_config.data.path = "text", str(path)


@pytest.mark.slow
def test_killed_at_random_and_equal_all_the_same():
    command = [sys.executable, str(ROOT / "benchmarks/kill.py"), "--count=2", "--num-steps=120"]
    command += ["--only=calibrate-mudamw"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "equal to the bit" in done.stdout, done


@pytest.mark.slow
def test_damaged_at_random_and_never_silent():
    command = [sys.executable, str(ROOT / "benchmarks/damage.py"), "--count=8", "--workers=1"]
    command += ["--mode=zo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "8 damages, 0 of them" in done.stdout, done


def assert_stopped_and_saved(folder, process, number):
    """By a signal, whose step was finished; the step, and what was said on stdout."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == Interrupted.exit_code == 75, err
    assert f"{number.name}: finishing the step" in out and "Traceback" not in out
    saved = checkpoint.complete_steps(folder / "checkpoints")[-1]
    told = [line for line in err.splitlines() if line and not line.startswith("step ")]
    (line,) = told
    assert line.startswith(f"stopped: {number.name}: the run is saved at step {saved} in")
    assert len(ledger.read(folder / "ledger.bin").records) == saved
    assert int(metrics.read(folder / "metrics.csv")[-1]["step"]) == saved
    return saved, out


@pytest.mark.slow
def test_signals_lock_and_no_folder(tiny_config, tmp_path, capsys):
    tiny_config.train.num_steps, tiny_config.train.checkpoint_interval = 100_000, 0
    tiny_config.train.eval_interval = 100_000
    folder = tmp_path / "run"
    process = start(folder, *ENDLESS)
    wait_for_rows(folder, 20, process)
    with pytest.raises(ConfigError, match=f"is in use by process {process.pid} on"):
        train_and_evaluate(tiny_config, folder)
    process.send_signal(signal.SIGTERM)
    saved, _ = assert_stopped_and_saved(folder, process, signal.SIGTERM)

    shutil.rmtree(folder / "checkpoints")  # it goes on from the ledger alone
    process = start(folder, *ENDLESS)
    wait_for_rows(folder, 5, process)
    shutil.rmtree(folder)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert f"continuing from the seed, replaying steps 1 to {saved} from the ledger" in out
    assert process.returncode == CannotWrite.exit_code == 74 and "was saved in" in err
    rescued = Path(err[err.index("was saved in ") :].split()[3])
    kept = checkpoint.complete_steps(rescued / "checkpoints")[-1]
    assert f"the run at step {kept} was saved in {rescued}" in err and kept > saved
    assert len(ledger.read(rescued / "ledger.bin").records) == kept
    tiny_config.train.num_steps = kept + 3
    capsys.readouterr()
    train_and_evaluate(tiny_config, rescued)
    assert f"checkpoint of step {kept}" in capsys.readouterr().out
    steps_there = [int(row["step"]) for row in metrics.read(rescued / "metrics.csv")]
    assert steps_there == list(range(kept + 4))
    shutil.rmtree(rescued)


@pytest.mark.slow
def test_an_interrupt_at_any_time_is_one_line(tmp_path):
    """While the first and the last of the imports are under way, while it compiles, in a step."""
    has_loaded = lambda process, name: name in Path(f"/proc/{process.pid}/maps").read_text()
    moments = {
        "imports": lambda folder, process: has_loaded(process, "jaxlib"),
        "more": lambda folder, process: has_loaded(process, "tensorstore"),
        "programs": lambda folder, process: (folder / "config.json").exists(),
        "a step": lambda folder, process: len(metrics.read(folder / "metrics.csv")) > 1,
    }
    for moment, has_come in moments.items():
        folder = tmp_path / moment
        process = start(folder, *ENDLESS)
        wait_until(lambda: has_come(folder, process), process)
        process.send_signal(signal.SIGINT)
        if moment == "a step":
            assert_stopped_and_saved(folder, process, signal.SIGINT)
            continue
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode in (75, 130), (moment, err)
        told = [line for line in err.splitlines() if line and not line.startswith("step ")]
        assert len(told) == 1 and told[0].startswith("stopped: "), (moment, err)
        assert "Traceback" not in out


def test_progress_in_a_log_file(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress(3, 50) as progress:
        for step in range(4, 51):
            now[0] += 1.5
            progress.show(step, f"loss {step}")
            if step == 20:
                progress.say("validation loss after step 20: 2.5")
    out, err = capsys.readouterr()
    assert out == "validation loss after step 20: 2.5\n"
    assert err.splitlines() == [f"step {s} of 50: loss {s}" for s in (10, 17, 24, 31, 38, 45, 50)]
    assert "\r" not in err and "  " not in err


def test_the_second_signal_ends_at_once():
    code = (
        "import os, signal, time\nfrom zo_jax.train.signals import catch_signals\n"
        "with catch_signals() as came:\n    os.kill(os.getpid(), signal.SIGTERM)\n    assert "
        "came(1) == 'SIGTERM'\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -signal.SIGINT, done


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with contextlib.suppress(RuntimeError), catch_signals() as came:
        assert came(1) is None and signal.getsignal(signal.SIGINT) != before[1]
        raise RuntimeError
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.slow
def test_full_disk_takes_no_row_of_backprop(tiny_config, tmp_path, small_disk, text, capfd):
    tiny_config.mode, tiny_config.zo = "fo", ZOConfig()
    tiny_config.train.num_steps = 100_000
    tiny_config.train.checkpoint_interval, tiny_config.train.eval_interval = 0, 7
    free = os.statvfs(small_disk).f_bavail * 4096
    (small_disk / "filler").write_bytes(b"x" * (free - 60_000))
    with pytest.raises(CannotWrite, match=r"No space left on device.* was saved in") as error:
        train_and_evaluate(tiny_config, small_disk / "run")
    assert "Traceback" not in capfd.readouterr().err
    rescued = Path(str(error.value).split("--workdir=")[1].split()[0])
    kept = checkpoint.complete_steps(rescued / "checkpoints")[-1]
    tiny_config.train.num_steps = kept + 3
    train_and_evaluate(tiny_config, rescued)
    train_and_evaluate(tiny_config, tmp_path / "whole")
    assert losses_of(rescued) == losses_of(tmp_path / "whole") and kept > 10
    shutil.rmtree(rescued)


@pytest.mark.slow
def test_full_disk(tiny_config, tmp_path, small_disk, text):
    tiny_config.train.checkpoint_interval = 1
    train_and_evaluate(tiny_config, tmp_path / "whole")
    folder, filler = small_disk / "run", small_disk / "filler"
    # Room for nothing, for the files of a run but no checkpoint, for one or two of them.
    stopped = 0
    for room in (20_000, 60_000, 90_000, 130_000):
        with filler.open("wb") as file, contextlib.suppress(OSError):
            free = os.statvfs(small_disk).f_bavail * 4096
            file.write(b"x" * max(0, free - room))
        with contextlib.suppress(CannotWrite, ConfigError):
            try:
                train_and_evaluate(tiny_config, folder)
            except (CannotWrite, ConfigError) as error:
                assert "No space left on device" in str(error) and "\n" not in str(error)
                stopped += 1
                raise
        filler.unlink()
        rows = metrics.read(folder / "metrics.csv")
        assert [int(row["step"]) for row in rows] == list(range(len(rows)))
    assert stopped
    train_and_evaluate(tiny_config, folder)
    assert_same_run(folder, tmp_path / "whole", tiny_config)


@pytest.mark.slow
def test_read_only_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o555)

    # Root may write anywhere, until it gives up CAP_DAC_OVERRIDE (1) with PR_CAPBSET_DROP (24).
    code = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"  # noqa: E501
    process = start(folder, before=(sys.executable, "-c", code))
    _, err = process.communicate(timeout=PATIENCE)
    folder.chmod(0o755)
    assert process.returncode == 2 and "--workdir cannot be written to" in err
    assert "Permission denied" in err and err.count("\n") == 1


@pytest.mark.slow
def test_old_and_damaged_checkpoints(tiny_config, tmp_path, text, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train_and_evaluate(tiny_config, whole)
    for damage in ("last is gone", "last is damaged", "all are damaged", "all are gone"):
        shutil.copytree(whole, folder)
        for path in sorted((folder / "checkpoints").iterdir())[0 if "all" in damage else 1 :]:
            if "gone" in damage:
                shutil.rmtree(path)
            else:
                for file in path.rglob("ocdbt*/d/*"):
                    file.write_bytes(b"\0")
        # Killed before the last record was whole, and all rows but those of a checkpoint that is
        # there were written.
        (folder / "ledger.bin").write_bytes((folder / "ledger.bin").read_bytes()[:-3])
        lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
        num_lines = 3 if "all" in damage else 6
        (folder / "metrics.csv").write_text("".join(lines[:num_lines]) + lines[num_lines][:-10])
        capsys.readouterr()
        train_and_evaluate(tiny_config, folder)
        out, err = capsys.readouterr()
        origin = (
            "the seed, replaying steps 1"
            if "all" in damage
            else "the checkpoint of step 4, replaying steps 5"
        )
        assert f"continuing from {origin} to 5 from the ledger" in out
        if "damaged" in damage:
            assert "the checkpoint of step 6 in" in err and "cannot be used" in err
        assert_same_run(folder, whole, tiny_config)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_corrupt_and_lost_ledgers(tiny_config, tmp_path, text, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train_and_evaluate(tiny_config, whole)
    data = (whole / "ledger.bin").read_bytes()
    size = ledger.read(whole / "ledger.bin").records.itemsize

    def go_on(content, num_checkpoints=1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        for step in (4, 6)[num_checkpoints:]:
            shutil.rmtree(folder / "checkpoints" / str(step))
        (folder / "ledger.bin").unlink()
        if content is not None:
            (folder / "ledger.bin").write_bytes(content)
        capsys.readouterr()
        train_and_evaluate(tiny_config, folder)
        assert losses_of(folder) == losses_of(whole)
        assert final_bits(folder, tiny_config, 6) == final_bits(whole, tiny_config, 6)
        return "".join(capsys.readouterr())

    flip = lambda step: data[: -size * (7 - step) + 9] + b"?" + data[-size * (7 - step) + 10 :]
    # After the checkpoint: replayed up to it, the rest is trained again, and the ledger is whole.
    said = go_on(flip(6))
    assert "the records of step 6 are damaged" in said and "replaying steps 5 to 5" in said
    assert (folder / "ledger.bin").read_bytes() == data
    # Before it: the run loses nothing, but replay from the seed ends there.
    said = go_on(flip(2))
    assert "the records of step 2 are damaged" in said and "no replay can pass step 2" in said
    assert ledger.read(folder / "ledger.bin").replayable(0) == 1
    # No ledger at all, or another's.
    assert "the ledger lacks 4 of the steps up to 4" in go_on(None)
    assert ledger.read(folder / "ledger.bin").replayable(4) == 6
    said = go_on(data[:20] + b"!" + data[21:])
    assert "the header is damaged" in said and "ledger.bin.damaged" in said
    assert (folder / "ledger.bin.damaged").exists()
    # Neither checkpoint nor ledger is no run that could go on.
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    (folder / "ledger.bin").unlink()
    for file in (folder / "checkpoints").rglob("ocdbt*/d/*"):
        file.unlink()
    for _ in range(2):  # and not the second time either
        with pytest.raises(CheckpointError, match="--restart"):
            train_and_evaluate(tiny_config, folder)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["calibrate", "instruct"])
def test_hybrid_runs_go_on_from_between(tiny_config, tmp_path, text, mode, capsys):
    """From the seed, and from a checkpoint with a backprop gradient before it and one after it."""
    tiny_config.mode, tiny_config.fo.bp_interval, tiny_config.fo.corpus_fraction = mode, 6, 0.5
    tiny_config.instruct.adaptive, tiny_config.train.num_steps = mode == "instruct", 12
    # One kind with an optimiser for both kinds of steps, one with a state for each.
    tiny_config.fo.relative_rate = 0.5 if mode == "calibrate" else 0.0
    whole, folder = tmp_path / "whole", tmp_path / "run"
    result = train_and_evaluate(tiny_config, whole)
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints")
    capsys.readouterr()
    train_and_evaluate(tiny_config, folder)
    assert "from the seed, replaying steps 1 to 5" in capsys.readouterr().out
    assert_same_run(folder, whole, tiny_config, 12)
    tiny_config.train.num_steps = 9
    train_and_evaluate(tiny_config, tmp_path / "part")
    tiny_config.train.num_steps = 12
    assert train_and_evaluate(tiny_config, tmp_path / "part") == result
    assert "continuing from the checkpoint of step 9" in capsys.readouterr().out
    assert_same_run(tmp_path / "part", whole, tiny_config, 12)


@pytest.mark.slow
def test_no_finite_loss(tiny_config, tmp_path, text):
    tiny_config.optimizer.name, tiny_config.optimizer.learning_rate = "sgd", 1e30
    tiny_config.train.num_steps, tiny_config.train.max_skipped = 100, 4
    with pytest.raises(
        Diverged, match=r"4 steps had no finite loss; .* lower optimizer.learning_rate"
    ):
        train_and_evaluate(tiny_config, tmp_path / "run")
    rows = metrics.read(tmp_path / "run/metrics.csv")
    saved = checkpoint.complete_steps(tmp_path / "run/checkpoints")[-1]
    assert saved == int(rows[-1]["step"]) and int(rows[-1]["skipped_steps"]) >= 4
    # With a higher limit the same run goes on.
    tiny_config.train.num_steps, tiny_config.train.max_skipped = saved + 2, 0
    assert train_and_evaluate(tiny_config, tmp_path / "run")["step"] == saved + 2


@pytest.mark.slow
def test_time_between_checkpoints(tiny_config, tmp_path, text, capsys):
    tiny_config.train.checkpoint_interval, tiny_config.train.checkpoint_minutes = 0, 1e-9
    train_and_evaluate(tiny_config, tmp_path / "run")
    assert "saved the checkpoint of step 3" in capsys.readouterr().out


def test_lock_is_freed_and_the_folder_watched(tmp_path):
    with folder.Workdir(tmp_path / "run") as mine:
        mine.lock()
        mine.check()
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"):
            folder.Workdir(tmp_path / "run").lock()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(OSError):
            mine.check()
        (tmp_path / "run").mkdir()
        (tmp_path / "run/.lock").write_text("")
        with pytest.raises(OSError, match="is not the folder"):
            mine.check()
    with folder.Workdir(tmp_path / "run") as mine:
        mine.lock()


@pytest.mark.slow
def test_changed_configuration_is_told_field_by_field(tiny_config, tmp_path, text):
    train_and_evaluate(tiny_config, tmp_path / "run")
    tiny_config.zo.num_queries, tiny_config.optimizer.learning_rate = 4, 0.5
    with pytest.raises(ConfigError) as error:
        train_and_evaluate(tiny_config, tmp_path / "run")
    for part in (
        "zo.num_queries (there 3, here 4)",
        "optimizer.learning_rate (there 0.01, here 0.5)",
        "may go on with another",
        "train.num_steps",
    ):
        assert part in str(error.value)
    tiny_config.zo.num_queries, tiny_config.optimizer.learning_rate = 3, 0.01
    tiny_config.train.num_steps, tiny_config.train.log_interval = 8, 2
    assert train_and_evaluate(tiny_config, tmp_path / "run")["step"] == 8


def write_rows(folder):
    """Ten rows of a run, as it writes them; the file and its lines."""
    log = metrics.Log("12ab", [], metrics.Files(folder, []))
    for step in range(10):
        row = {"step": step, "loss": 3 + step / 7, "mode": "zo", "scope": "a,b"}
        log.write(row | ({"eval_loss": 4 - step / 3} if step % 3 == 0 else {}))
    log.close()
    return folder / "metrics.csv", (folder / "metrics.csv").read_text().splitlines(keepends=True)


def test_rows_are_believed_by_their_checks_alone(tmp_path):
    file, lines = write_rows(tmp_path)
    steps = lambda: [int(row["step"]) for row in metrics.read_checked(file, "12ab")[0]]
    wrong = lambda: metrics.read_checked(file, "12ab")[1]
    whole = metrics.read_checked(file, "12ab")
    assert whole == (metrics.read(file), []) and steps() == list(range(10))
    for at in range(len(lines[4])):  # any other character of a row
        changed = f"{lines[4][:at]}~{lines[4][at + 1 :]}"
        file.write_text("".join([*lines[:4], changed, *lines[5:]]))
        assert 3 not in steps() and len(steps()) >= 8 and wrong(), at
    for damaged, left in (
        (["\ufeff", *lines], list(range(10))),
        (["timestomp", *lines[0][9:], *lines[1:]], list(range(10))),
        (lines[1:], list(range(10))),
        ([*lines[:5], lines[5].rstrip("\n"), *lines[6:]], [0, 1, 2, 3, 6, 7, 8, 9]),
        ([*lines[:5], *lines[6:]], [0, 1, 2, 3, 5, 6, 7, 8, 9]),
        ([lines[0], "a,b\n", "\0\n", '"\n', "x" * 200_000 + "\n", *lines[1:]], list(range(10))),
    ):
        file.write_text("".join(damaged))
        assert steps() == left
        assert wrong() or damaged == [*lines[:5], *lines[6:]]
    file.write_text("".join(lines)[:-5])  # what a kill leaves is nothing to be told
    assert steps() == list(range(9)) and not wrong()
    file.write_text("".join(lines))
    assert metrics.read_checked(file, "other")[0] == []


@pytest.mark.slow
def test_lost_rows_are_made_again_by_replay_or_told(tiny_config, tmp_path, text, capsys):
    tiny_config.train.snapshot_delta = 1e-4
    for mode in ("zo", "fo"):
        tiny_config.mode = mode
        if mode == "fo":
            tiny_config.zo = ZOConfig()
        whole, folder = tmp_path / f"{mode}_whole", tmp_path / mode
        train_and_evaluate(tiny_config, whole)
        shutil.copytree(whole, folder)
        lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
        changed = lines[4][:-12] + "77" + lines[4][-10:]  # of step 3, with a validation loss
        damaged = ["\ufeff", lines[0], *lines[2:4], changed, lines[6].rstrip("\n"), lines[7]]
        (folder / "metrics.csv").write_text("".join(damaged))
        capsys.readouterr()
        train_and_evaluate(tiny_config, folder)
        out, err = capsys.readouterr()
        assert "its header is damaged and" in err and err.count("\n") == 1
        evaluations = [
            [
                (x["step"], x["eval_loss"])
                for x in metrics.read_evaluations(run / "evaluations.jsonl")
            ]
            for run in (whole, folder)
        ]
        if mode == "zo":
            assert "the rows of 5 steps (0, 3, 4, 5, 6) were missing, and are made again" in out
            assert losses_of(folder) == losses_of(whole) and evaluations[0] == evaluations[1]
        else:
            assert "the rows of step 0 were missing" in out
            assert "the rows of 4 steps (3, 4, 5, 6) are lost" in out
            assert [row[0] for row in losses_of(folder)] == ["0", "1", "2"]
            assert evaluations[1] == evaluations[0][:1]
        assert final_bits(folder, tiny_config, 6) == final_bits(whole, tiny_config, 6)


@pytest.mark.slow
def test_files_of_another_run_are_refused(tiny_config, tmp_path, text, capsys):
    mine, other = tmp_path / "mine", tmp_path / "other"
    train_and_evaluate(tiny_config, mine)
    tiny_config.seed = 1
    train_and_evaluate(tiny_config, other)
    tiny_config.seed = 0
    whole = losses_of(mine), final_bits(mine, tiny_config, 6)
    shutil.rmtree(mine / "checkpoints/6")
    shutil.copytree(other / "checkpoints/6", mine / "checkpoints/6")
    capsys.readouterr()
    train_and_evaluate(tiny_config, mine)
    assert "cannot be used: it is of another run; it is now 6.damaged" in capsys.readouterr().err
    assert (losses_of(mine), final_bits(mine, tiny_config, 6)) == whole
    # The tool for ledgers does not take one for that of the folder either.
    (mine / "ledger.bin").write_bytes((other / "ledger.bin").read_bytes())
    assert replay_main([str(mine), "--to-step=3"]) == 2
    assert "the ledger is of another run" in capsys.readouterr().err
    train_and_evaluate(tiny_config, mine)
    assert "is the ledger of another run; it is now ledger.bin.damaged" in capsys.readouterr().err
    assert (losses_of(mine), final_bits(mine, tiny_config, 6)) == whole


def rewrite_ledger(path, **changed):
    """The same records under another header."""
    there = ledger.read(path)
    path.unlink()
    writer = ledger.Writer(path, there.header | changed)
    for record in there.records:
        writer.append(*(record[name] for name in ("step", "kind", "key", "loss", "projections")))
    writer.close()


@pytest.mark.slow
def test_a_run_goes_on_under_other_numerics(tiny_config, tmp_path, text, capsys):
    """As on another processor: another version, and a start whose last bits are others."""
    folder = tmp_path / "run"
    train_and_evaluate(tiny_config, folder)
    whole = losses_of(folder), final_bits(folder, tiny_config, 6)
    path = folder / "ledger.bin"
    header = ledger.read(path).header
    versions = {"jax": "0.0", "device": "cpu another"}
    for changed, goes_on in (
        ({"versions": versions, "fingerprint": 7, "probe": header["probe"] * (1 + 1e-6)}, True),
        ({"versions": versions, "fingerprint": 7, "probe": header["probe"] + 0.5}, False),
        ({"fingerprint": 7}, False),
    ):
        rewrite_ledger(path, **header | changed)
        shutil.rmtree(folder / "checkpoints")
        capsys.readouterr()
        train_and_evaluate(tiny_config, folder)
        out, err = capsys.readouterr()
        assert (
            "replaying steps 1 to 6" in out and "may differ in their last bits" in err
        ) == goes_on
        assert ("is the ledger of another run" in err) != goes_on
        assert (losses_of(folder), final_bits(folder, tiny_config, 6)) == whole


@pytest.mark.slow
def test_an_older_run_and_changed_memory_settings_go_on(tiny_config, tmp_path, text, capsys):
    path = tmp_path / "run/config.json"
    tiny_config.mode, tiny_config.fo.bp_interval = "calibrate", 3
    train_and_evaluate(tiny_config, tmp_path / "run")
    there = json.loads(path.read_text())
    del there["zo"]["batch_chunks"], there["fo"]["corpus_fraction"]
    path.write_text(json.dumps(there | {"check": folder._check(there)}))
    tiny_config.zo.parallel_batch_size, tiny_config.model.checkpoint_activations = 3, True
    capsys.readouterr()
    tiny_config.train.num_steps = 8
    assert train_and_evaluate(tiny_config, tmp_path / "run")["step"] == 8
    err = capsys.readouterr().err
    assert "a version without zo.batch_chunks, fo.corpus_fraction: taken as today's defaults" in err
    assert "zo.parallel_batch_size was 1 and is 3: last bits may differ by rounding" in err
    assert "model.checkpoint_activations was False and is True" in err and err.count("\n") >= 3
    train_and_evaluate(tiny_config, tmp_path / "run")
    assert "a version without" not in capsys.readouterr().err
    # A field that has another value than today's default is a difference all the same.
    del there["zo"]["num_queries"]
    path.write_text(json.dumps(there | {"check": folder._check(there)}))
    with pytest.raises(
        ConfigError, match=r"zo.num_queries \(there absent, which means 8, here 3\)"
    ):
        train_and_evaluate(tiny_config, tmp_path / "run")


@pytest.mark.slow
def test_damaged_configurations_are_refused_in_one_line(tiny_config, tmp_path, text):
    path = tmp_path / "run/config.json"
    train_and_evaluate(tiny_config, tmp_path / "run")
    content = path.read_text()
    for damaged in (content.replace("0.01", "0.02"), content[:-20], "[]", "\0", "[" * 100_000):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match=r"config\.json is (damaged|not the JSON)") as error:
            train_and_evaluate(tiny_config, tmp_path / "run")
        assert "\n" not in str(error.value) and path.read_text() == damaged
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=r"config\.json is not the JSON"):
        train_and_evaluate(tiny_config, tmp_path / "run")


def test_the_identity_is_of_what_makes_a_run(tiny_config, text):
    digests = batches.load_corpora(tiny_config).digests
    mine = identity.identify(tiny_config, digests)
    assert len(mine) == 16 and mine == identity.identify(tiny_config, digests)
    tiny_config.train.num_steps, tiny_config.zo.parallel_batch_size = 99, 3
    assert mine == identity.identify(tiny_config, digests)
    for section, name, value in (
        (tiny_config, "seed", 1),
        (tiny_config.zo, "epsilon", 2e-3),
        (tiny_config.optimizer, "schedule", "cosine"),
    ):
        before = getattr(section, name)
        setattr(section, name, value)
        assert mine != identity.identify(tiny_config, digests), name
        setattr(section, name, before)
    assert mine != identity.identify(tiny_config, digests | {"text": "other"})


def test_the_table_of_what_may_change_is_the_declaration():
    rows = [f"| `{name}` | {what} |" for name, what in EXTENDABLE.items()]
    assert "\n".join(rows) in (ROOT / "docs/reliability.md").read_text()


def test_what_is_written_when_is_remembered(tiny_config):
    train = tiny_config.train
    train.num_steps, train.log_interval, train.eval_interval = 25, 10, 15
    before = Reports([]).go_on(tiny_config, 0)
    assert [s for s in range(26) if before.has_row(s)] == [0, 10, 15, 20, 25]
    assert before.go_on(tiny_config, 12).intervals == before.intervals
    train.num_steps, train.log_interval = 30, 2
    after = before.go_on(tiny_config, 25)
    assert [s for s in range(31) if after.has_row(s)] == [0, 10, 15, 20, 25, 26, 28, 30]
    assert [s for s in range(31) if after.has_evaluation(s)] == [0, 15, 25, 30]
    back = after.go_on(tiny_config, 5)  # the run has lost its last steps
    assert [s for s in range(31) if back.has_row(s)] == [0, *range(6, 15, 2), 15, *range(16, 31, 2)]
