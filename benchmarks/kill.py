"""Kills real runs with SIGKILL at random moments until they have ended all the same, and compares
them with ones left alone.

  python benchmarks/kill.py                  200 kills over every mode and optimiser, and runs of
                                             two processes
  python benchmarks/kill.py --count=3 --only=zo-adam --num-steps=200 --seed=1

What must be equal to the bit: parameters, optimiser state and all else of the final checkpoint, the
rows of metrics.csv but for their timestamps, evaluations likewise, the ledger, the snapshots. While
a run is dead, metrics.csv must be a CSV. Of two processes one is killed, and the other must end
within 30 seconds with exit code 76.
"""

import argparse
from concurrent import futures
import csv
import dataclasses
import itertools
import json
import os
from pathlib import Path
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from zo_jax.train.config import Config, from_dict
from zo_jax.train.data.batches import load_corpora
from zo_jax.train.model import make_model
from zo_jax.train.run_folder import checkpoint, metrics
from zo_jax.train.run_state import init_state

ROOT = Path(__file__).parent.parent
OPTIMIZERS = {
    "sgd": "optimizer.name=sgd optimizer.momentum=0.9 optimizer.learning_rate=0.0005",
    "adam": "optimizer.name=adam",
    "adamw": "optimizer.name=adamw",
    "muon": "optimizer.name=muon",
    "mudamw": "optimizer.name=mudamw",
}
MODES = {
    "zo": "mode=zo train.snapshot_delta=0.05",
    "calibrate": "mode=calibrate fo.bp_interval=7 zo.batch_per_query=true",
    "instruct": "mode=instruct fo.bp_interval=5 instruct.adaptive=true instruct.num_guided=2",
    "fo": "mode=fo",
}
# (settings, number of processes) of a run.
CASES = {
    f"{mode}-{optimizer}": (f"{MODES[mode]} {OPTIMIZERS[optimizer]}", 1)
    for mode, optimizer in itertools.product(MODES, OPTIMIZERS)
} | {
    "zo-adam-2": ("train.snapshot_delta=0.05", 2),
    "fo-adam-2": ("mode=fo mesh.data=2", 2),
}
# Seconds after which the death of one process must have ended the other.
LIMIT = 30


def start(workdir: Path, arguments: list[str], num_processes: int = 1) -> list[subprocess.Popen]:
    """The program, in processes of its own."""
    command = [sys.executable, str(ROOT / "main.py"), f"--workdir={workdir}", *arguments]
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            command += ["--distributed", f"--coordinator=localhost:{free.getsockname()[1]}"]
        command += [f"--num_processes={num_processes}"]
    processes = []
    for i in range(num_processes):
        with workdir.with_suffix(f".{i}.log").open("ab") as log:
            processes.append(
                subprocess.Popen([*command, f"--process_id={i}"], stdout=log, stderr=log)
            )
    return processes


def finish(workdir: Path, arguments: list[str], num_processes: int) -> None:
    """Lets a run end."""
    if any([process.wait() for process in start(workdir, arguments, num_processes)]):
        raise SystemExit(f"the run failed; see {workdir.with_suffix('.0.log')}")


def num_rows(workdir: Path) -> int:
    """Rows of metrics.csv; it must be one."""
    path = workdir / "metrics.csv"
    if not path.exists():
        return 0
    text = path.read_text()
    rows = list(csv.reader(text.splitlines()))
    assert all(len(row) == len(rows[0]) for row in rows) and text.endswith("\n"), path
    return len(rows) - 1


def kill_until_done(
    workdir: Path,
    arguments: list[str],
    num_processes: int,
    num_steps: int,
    kills: int,
    rng: random.Random,
) -> dict[str, int]:
    """Starts and kills the run `kills` times, then lets it end; what the kills hit."""
    hit = {"kills": 0, "in a checkpoint": 0, "before a step": 0, "replayed": 0}
    log = workdir.with_suffix(".0.log")
    while hit["kills"] < kills:
        before = num_rows(workdir)
        left = kills - hit["kills"]
        # One in five at any time while it starts and compiles, the others spread over the steps
        # that are left.
        early = rng.random() < 0.2
        target = before + rng.randint(1, max(1, 3 * (num_steps - before) // (2 * left + 4)))
        said = log.read_text().count("model:") if log.exists() else 0
        processes = start(workdir, arguments, num_processes)
        while num_processes > 1 and log.read_text().count("model:") == said:
            time.sleep(0.01)  # until they have come together: who has not cannot be missed
            assert all(process.poll() is None for process in processes), log
        deadline = time.monotonic() + (rng.uniform(0, 8) if early else 120)
        while processes[0].poll() is None and time.monotonic() < deadline:
            path = workdir / "metrics.csv"
            if path.exists() and path.read_bytes().count(b"\n") - 1 >= target:
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        victim = processes.pop(rng.randrange(num_processes))
        victim.send_signal(signal.SIGKILL)
        if victim.wait() != -signal.SIGKILL:
            raise SystemExit(f"the run ended by itself; see {log}")
        for process in processes:
            if process.wait(timeout=LIMIT) != 76:
                raise SystemExit(f"another process ended with {process.returncode}; see {log}")
        hit["kills"] += 1
        hit["in a checkpoint"] += bool(list(workdir.glob("*/*orbax-checkpoint-tmp*")))
        hit["before a step"] += num_rows(workdir) == before
    finish(workdir, arguments, num_processes)
    hit["replayed"] = log.read_text().count("replaying steps")
    return hit


def state_like(run: Path) -> Any:
    """A state of the run in a folder, which says how to read those of its checkpoints."""
    fields = json.loads((run / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(Config)}
    config = from_dict({name: value for name, value in fields.items() if name in names})
    model = make_model(config.model, load_corpora(config).tokenizer.vocab_size)
    return init_state(config, model)


def read_states(run: Path, like: Any) -> dict[tuple[str, int], list[bytes] | None]:
    """{(folder, step): the bits of a state like one} of what a run has saved; None of what cannot
    be read.
    """
    found = {}
    for name in ("checkpoints", "snapshots"):
        for step in checkpoint.complete_steps(run / name):
            try:
                state = checkpoint.restore(run / name, step, like)
                found[name, step] = [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]
            except checkpoint.CheckpointError:
                found[name, step] = None
    return found


def differences(
    one: Path, other: Path, states: dict, like: Any, num_steps: int, num_rows: int
) -> list[str]:
    """What two finished runs do not have in common; `one` is as it should be, with these states
    and so many rows.
    """
    found, there = [], read_states(other, like)
    last = "checkpoints", num_steps
    if not states[last] or there.get(last) != states[last]:
        found.append("state")
    rows = lambda run: [_without_time(row) for row in metrics.read(run / "metrics.csv")]
    if rows(one) != rows(other) or len(rows(one)) != num_rows:
        found.append("metrics.csv")
    evaluations = lambda run: [
        _without_time(row) for row in metrics.read_evaluations(run / "evaluations.jsonl")
    ]
    if evaluations(one) != evaluations(other):
        found.append("evaluations.jsonl")
    for name in ("ledger.bin", "sample.txt"):
        if _content(one / name) != _content(other / name):
            found.append(name)
    for name, step in sorted(states | there):
        if not there.get((name, step)) or there[name, step] != states.get((name, step)):
            found.append(f"{name}/{step}")
    return found


def _without_time(row: dict) -> dict:
    """What two runs of the same settings have in common; the check is of the time too."""
    return {name: x for name, x in row.items() if name not in ("timestamp", "check")}


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def try_case(name: str, kills: int, num_steps: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """(what the kills of a case hit, what of its run differs from one that was left alone)."""
    fields, num_processes = CASES[name]
    folder = Path(tempfile.mkdtemp(prefix=f"zo_jax_{name}_"))
    arguments = [
        f"--config={ROOT / 'tests/train/tiny.py'}",
        f"--config.train.num_steps={num_steps}",
        "--config.train.checkpoint_interval=20",
        "--config.train.eval_interval=25",
        *(f"--config.{field}" for field in fields.split()),
    ]
    whole, killed = folder / "whole", folder / "killed"
    finish(whole, arguments, num_processes)
    rng = random.Random(f"{name} {seed}")
    hit = kill_until_done(killed, arguments, num_processes, num_steps, kills, rng)
    like = state_like(whole)
    found = differences(whole, killed, read_states(whole, like), like, num_steps, num_steps + 1)
    if not found:
        shutil.rmtree(folder)
    return hit, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="kills, over all cases")
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--only", default="", help="the cases whose names contain this")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cases at once")
    options = parser.parse_args()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="zo_jax_kill_"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    names = [name for name in CASES if options.only in name]
    shares = [
        options.count * (i + 1) // len(names) - options.count * i // len(names)
        for i in range(len(names))
    ]
    failed, total = 0, 0
    with futures.ThreadPoolExecutor(options.workers) as pool:
        tried = {
            name: pool.submit(try_case, name, kills, options.num_steps, options.seed)
            for name, kills in zip(names, shares, strict=True)
            if kills
        }
        for name, outcome in tried.items():
            hit, found = outcome.result()
            counts = ", ".join(f"{count} {what}" for what, count in hit.items())
            how = "DIFFERENT: " + ", ".join(found) if found else "equal to the bit"
            print(f"{name}: {counts}: {how}", flush=True)
            failed, total = failed + bool(found), total + hit["kills"]
    print(f"{total} kills, {failed} of the runs different from one left alone")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
