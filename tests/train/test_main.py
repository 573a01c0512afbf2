"""What only a process can show: exit codes, one line on stderr, and being killed."""

from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest
import tiny

from zo_jax.train.run_folder import metrics

ROOT = Path(__file__).parents[2]
TINY = f"--config={ROOT / 'tests/train/tiny.py'}"


def start(*args):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args):
    process = start(*args)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_help_and_errors(tmp_path):
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "raises.py").write_text("def get_config():\n    raise RuntimeError('boo')\n")
    cases = {
        "--config.zo.num_querys=3": "did you mean --config.zo.num_queries",
        "--config.zo.num_queries=abc": "--config.zo.num_queries=abc",
        "--config.zo.epsilon=[1,2]": "--config.zo.epsilon=[1,2]",
        "--config.data.block_size=4096": "longer than the model can read",
        f"--config={tmp_path}/absent.py": "there is no file",
        f"--config={tmp_path}/none.py": "get_config",
        f"--config={tmp_path}/raises.py": "boo",
        "--unknown=1": "unknown",
        "stray": "'stray' is no flag",
    }
    workdir = tmp_path / "run"
    processes = [start(f"--workdir={workdir}", argument) for argument in cases]
    for (argument, message), process in zip(cases.items(), processes, strict=True):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err.count("\n")) == (2, "", 1), argument
        assert err.startswith("error: ") and message in err
    assert not workdir.exists()


@pytest.mark.slow
def test_killed_run_continues_to_the_same_losses(tmp_path):
    (tmp_path / "bottles.txt").write_text(tiny.TEXT)
    args = (
        TINY,
        "--config.zo.num_queries=2",
        "--config.data.source=text",
        f"--config.data.path={tmp_path / 'bottles.txt'}",
        "--config.train.num_steps=400",
        "--config.train.checkpoint_interval=10",
        "--config.train.eval_interval=50",
    )
    code, out, err = run(*args, f"--workdir={tmp_path / 'whole'}")
    assert code == 0, err
    assert "Warning" not in err and "finished 400 steps" in out

    workdir = tmp_path / "killed"
    log = workdir / "metrics.csv"
    for rows in (30, 150):
        process = start(*args, f"--workdir={workdir}")
        deadline = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            if len(metrics.read(log)) >= rows:
                break
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    code, resumed, err = run(*args, f"--workdir={workdir}")
    assert code == 0 and "continuing from the checkpoint of step" in resumed, err
    final = lambda text: text[text.index("finished") : text.index("results are")]
    assert final(resumed) == final(out)
    losses = lambda folder: [
        (row["step"], row["loss"], row["eval_loss"]) for row in metrics.read(folder / "metrics.csv")
    ]
    assert losses(workdir) == losses(tmp_path / "whole")
