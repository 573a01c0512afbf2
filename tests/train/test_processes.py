"""Several real processes on this machine, which exchange numbers over gloo."""

from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

import pytest

from zo_jax.train.run_folder import checkpoint, metrics

ROOT = Path(__file__).parents[2]
LENGTH = ("train.num_steps=600", "train.eval_interval=200", "train.checkpoint_interval=50")


def start(folder, num_processes, *fields):
    """The processes of one run, each with one device."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "main.py"), f"--config={ROOT / 'tests/train/tiny.py'}"]
    command += [f"--workdir={folder}", *(f"--config.{field}" for field in (*LENGTH, *fields))]
    if num_processes > 1:
        command += ["--distributed", f"--coordinator=localhost:{port}"]
        command += [f"--num_processes={num_processes}"]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen([*command, f"--process_id={i}"], stdout=pipe, stderr=pipe, text=True)
        for i in range(num_processes)
    ]


def wait_for_rows(folder, count, processes):
    count += len(metrics.read(folder / "metrics.csv"))
    deadline = time.monotonic() + 120
    while all(p.poll() is None for p in processes) and time.monotonic() < deadline:
        if len(metrics.read(folder / "metrics.csv")) >= count:
            return
        time.sleep(0.01)
    for process in processes:
        process.kill()
    raise AssertionError([process.communicate() for process in processes])


def end(processes):
    """(exit codes, outputs)."""
    outputs = ["".join(process.communicate(timeout=120)) for process in processes]
    return [process.returncode for process in processes], outputs


def losses_of(folder):
    return [(r["step"], r["loss"], r["eval_loss"]) for r in metrics.read(folder / "metrics.csv")]


@pytest.mark.slow
def test_killed_and_resumed_on_other_numbers_of_processes(tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert end(start(whole, 1))[0] == [0]

    processes = start(folder, 4)
    wait_for_rows(folder, 60, processes)
    processes[2].kill()
    killed = time.monotonic()
    codes, outputs = end(processes)
    assert time.monotonic() - killed < 60
    # A process that notices by itself says so and ends with 76; if JAX's coordination service notices first it aborts the
    # process, and says that another task died. Which of them wins is a race, for each process.
    assert codes[2] == -signal.SIGKILL
    for i in (0, 1, 3):
        assert codes[i] in (76, -signal.SIGABRT), (codes, outputs[i])
        text = "another one ended" if codes[i] == 76 else "another task died"
        assert text in outputs[i], (codes, outputs[i])
    print("exit codes", codes, "after", round(time.monotonic() - killed, 1), "seconds")

    processes = start(folder, 2)
    wait_for_rows(folder, 60, processes)
    processes[1].send_signal(signal.SIGTERM)  # a preemption notice to one of them
    codes, outputs = end(processes)
    assert codes == [75, 75], outputs
    saved = checkpoint.complete_steps(folder / "checkpoints")[-1]
    assert f"the run is saved at step {saved} in" in outputs[0]
    assert "replaying steps" in outputs[0] or "continuing from the checkpoint" in outputs[0]

    codes, outputs = end(start(folder, 1))
    assert codes == [0] and f"continuing from the checkpoint of step {saved}" in outputs[0]
    # Four, two and one process, with queries alone split, are one run, to the bit.
    assert losses_of(folder) == losses_of(whole)
    assert (folder / "ledger.bin").read_bytes() == (whole / "ledger.bin").read_bytes()


@pytest.mark.slow
def test_the_first_process_refuses_for_all(tmp_path):
    folder = tmp_path / "run"
    assert end(start(folder, 1, "train.num_steps=3"))[0] == [0]
    codes, outputs = end(start(folder, 2, "zo.num_queries=4", "mesh.data=2"))
    assert codes == [2, 76], outputs
    assert "zo.num_queries (there 3, here 4)" in outputs[0]
    assert "the first process gave up" in outputs[1]


@pytest.mark.slow
def test_nobody_to_join(tmp_path):
    command = [sys.executable, str(ROOT / "main.py"), "--distributed", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 76 and "give --coordinator=HOST:PORT" in done.stderr, done
