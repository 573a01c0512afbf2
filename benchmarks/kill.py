"""Kills a real run with SIGKILL at random moments until it has ended all the same, and compares it with one that was left alone.

  python benchmarks/kill.py                      every case, the first one killed 20 times, the others 8 times
  python benchmarks/kill.py --kills=3 --only=zo --num-steps=200

What must be equal to the bit: parameters, optimiser state and all else of the final checkpoint, the rows of metrics.csv but for their
timestamps, evaluations likewise, the ledger, the steps of the snapshots. While the run is dead, metrics.csv must be a CSV.
"""

import argparse
import csv
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from zo_jax.train.run_folder import checkpoint, metrics

ROOT = Path(__file__).parent.parent
CASES = {
    "zo": "train.snapshot_delta=0.05",
    "zo-muon": "optimizer.name=muon zo.batch_per_query=true",
    "calibrate": "mode=calibrate fo.bp_interval=7 optimizer.name=mudamw",
    "instruct": "mode=instruct fo.bp_interval=5 instruct.adaptive=true instruct.num_guided=2 "
    "optimizer.name=sgd optimizer.momentum=0.9 optimizer.learning_rate=0.0005",
    "fo": "mode=fo optimizer.name=adamw",
}


def start(workdir: Path, arguments: list[str]) -> subprocess.Popen:
    """The program, in a process of its own."""
    command = [sys.executable, str(ROOT / "main.py"), f"--workdir={workdir}", *arguments]
    log = workdir.with_suffix(".log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log)


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
    workdir: Path, arguments: list[str], num_steps: int, kills: int, rng: random.Random
) -> dict[str, int]:
    """Starts and kills the run `kills` times, then lets it end; what the kills hit."""
    hit = {"kills": 0, "in a checkpoint": 0, "before a step": 0, "replayed": 0}
    while hit["kills"] < kills:
        before = num_rows(workdir)
        left = kills - hit["kills"]
        # One in five at any time while it starts and compiles, the others spread over the steps that are left.
        early = rng.random() < 0.2
        target = before + rng.randint(1, max(1, 3 * (num_steps - before) // (2 * left + 4)))
        process, began = start(workdir, arguments), time.monotonic()
        deadline = began + (rng.uniform(0, 8) if early else 120)
        while process.poll() is None and time.monotonic() < deadline:
            path = workdir / "metrics.csv"
            if path.exists() and path.read_bytes().count(b"\n") - 1 >= target:
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"the run ended by itself; see {workdir.with_suffix('.log')}")
        hit["kills"] += 1
        hit["in a checkpoint"] += bool(list(workdir.glob("*/*orbax-checkpoint-tmp*")))
        hit["before a step"] += num_rows(workdir) == before
    if start(workdir, arguments).wait():
        raise SystemExit(f"the run failed; see {workdir.with_suffix('.log')}")
    hit["replayed"] = workdir.with_suffix(".log").read_text().count("replaying steps")
    return hit


def differences(one: Path, other: Path, num_steps: int, num_rows: int) -> list[str]:
    """What two finished runs do not have in common; `one` is as it should be, with so many rows."""
    found = []
    if not _same_state(
        one / "checkpoints" / str(num_steps), other / "checkpoints" / str(num_steps)
    ):
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
    for name in ("checkpoints", "snapshots"):
        steps = checkpoint.complete_steps(one / name)
        if checkpoint.complete_steps(other / name) != steps:
            found.append(f"{name}: {steps}, {checkpoint.complete_steps(other / name)}")
        elif different := [
            step for step in steps if not _same_state(*(x / name / str(step) for x in (one, other)))
        ]:
            found.append(f"{name} {different}")
    return found


def _same_state(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bits, seals and all."""
    try:
        a, b = (jax.tree.leaves_with_path(ocp.load(path)) for path in (one, other))
    except Exception:  # a damaged file can raise anything
        return False
    return [(path, np.asarray(x).tobytes()) for path, x in a] == [
        (path, np.asarray(x).tobytes()) for path, x in b
    ]


def _without_time(row: dict) -> dict:
    """What two runs of the same settings have in common; the check is of the time too."""
    return {name: x for name, x in row.items() if name not in ("timestamp", "check")}


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--num-steps", type=int, default=1500)
    parser.add_argument("--only", choices=CASES, help="one case alone")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="zo_jax_kill_"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    rng, failed = random.Random(options.seed), False
    for i, (name, fields) in enumerate(CASES.items()):
        if options.only not in (None, name):
            continue
        folder = Path(tempfile.mkdtemp(prefix=f"zo_jax_{name}_"))
        arguments = [
            f"--config={ROOT / 'tests/train/tiny.py'}",
            f"--config.train.num_steps={options.num_steps}",
            "--config.train.checkpoint_interval=40",
            "--config.train.eval_interval=25",
            *(f"--config.{field}" for field in fields.split()),
        ]
        if start(folder / "whole", arguments).wait():
            raise SystemExit(f"the run failed; see {folder / 'whole.log'}")
        kills = options.kills if i == 0 or options.only else min(options.kills, 8)
        hit = kill_until_done(folder / "killed", arguments, options.num_steps, kills, rng)
        found = differences(
            folder / "whole", folder / "killed", options.num_steps, options.num_steps + 1
        )
        counts = ", ".join(f"{count} {what}" for what, count in hit.items())
        print(
            f"{name}: {counts}: {'DIFFERENT: ' + ', '.join(found) if found else 'equal to the bit'}"
        )
        sys.stdout.flush()
        failed |= bool(found)
        if not found:
            shutil.rmtree(folder)
    sys.exit(failed)


if __name__ == "__main__":
    main()
