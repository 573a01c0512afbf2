"""Damages the files of runs, lets them go on, and compares them with runs that nothing happened to.

  python benchmarks/damage.py                            1,000 damages, in all four modes
  python benchmarks/damage.py --count=50 --mode=fo --seed=3 --workers=1

A damage is done to one file or folder of a run that was killed at a step, or that was complete:
bits flipped, cut, deleted, filled with garbage, taken from another run, a folder put in the place
of a file, digits and lines of a text changed. Then the same command runs again, in a process that
does it for many. What may come of it: the run ends identical to its reference; or it ends with its
final state identical, and what it has lost is told in a line; or it is refused with one line. What
may not: something lost without a word, another final state, a traceback.
"""

import argparse
import collections
import contextlib
import functools
import multiprocessing
import os
from pathlib import Path
import random
import shutil
import sys
import tempfile
import traceback
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests/train"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="zo_jax_damage_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import logging

from kill import differences, read_states, state_like
import shared_programs
import tiny

from zo_jax.train import run
from zo_jax.train.config import Config
from zo_jax.train.signals import RunStopped

MODES = ("zo", "calibrate", "instruct", "fo")
NUM_STEPS, KILLED_AT = 12, 9
# Lines of a run that say nothing of a damage.
USUAL = ("step ", "saved the checkpoint", "validation loss", "continuing from the", "this run is")


def configure(mode: str, folder: Path, seed: int = 0) -> Config:
    """The tiny experiment, on a text of its own."""
    config = tiny.get_config()
    config.mode, config.seed = mode, seed
    if mode == "fo":
        tiny.to_backprop(config)
    config.data.source, config.data.path = "text", str(folder / "bottles.txt")
    config.train.num_steps, config.train.keep_checkpoints = NUM_STEPS, 3
    config.train.checkpoint_interval, config.train.snapshot_delta = 4, 1e-3
    if mode in ("calibrate", "instruct"):
        config.fo.bp_interval = 5
        config.instruct.adaptive = mode == "instruct"
    return config


def prepare(task: tuple[str, Path]) -> None:
    """Makes the runs of a mode: one killed after a step, one complete, which is the reference, and
    one of another seed.

    Besides them it keeps what a run says that nothing has happened to.
    """
    mode, folder = task
    with captured(folder / f"{mode}.log"):
        for name, seed in (("killed", 0), ("other", 1)):
            config = configure(mode, folder, seed)
            config.train.num_steps = KILLED_AT
            run.train_and_evaluate(config, folder / mode / name)
            shutil.rmtree(folder / mode / name / "checkpoints" / str(KILLED_AT))
        shutil.copytree(folder / mode / "killed", folder / mode / "complete")
        run.train_and_evaluate(configure(mode, folder), folder / mode / "complete")
    work = folder / f"usual_{mode}" / "run"
    shutil.copytree(folder / mode / "complete", work)
    _, text = go_on(mode, folder, work)
    (folder / mode / "usual.log").write_text(text.replace(str(work), ""))
    shutil.rmtree(work)


def damage(base: Path, other: Path, rng: random.Random) -> str:
    """Does one thing to a run folder; says what."""
    tops = sorted(path for path in base.iterdir())
    top = rng.choice(tops)
    path = rng.choice([top, *sorted(top.rglob("*"))])
    name = path.relative_to(base)
    if path.is_dir():
        how = rng.choice(["delete", "a file in its place", "swap", "garbage in it", "rename"])
        theirs = other / name
        if how == "rename" and path.parent.name in ("checkpoints", "snapshots"):
            path.rename(path.with_name(str(rng.choice([1, 3, 7, 11]))))
        elif how == "garbage in it":
            (path / rng.choice(["5", "x", "_METADATA"])).write_bytes(rng.randbytes(50))
        elif how == "swap" and theirs.is_dir():
            shutil.rmtree(path)
            shutil.copytree(theirs, path)
        else:
            shutil.rmtree(path)
            if how == "a file in its place":
                path.write_bytes(rng.randbytes(20))
        return f"{name}/: {how}"
    data = bytearray(path.read_bytes())
    lines = data.splitlines(keepends=True)
    kinds = ["flip", "flips", "cut", "delete", "garbage", "swap", "empty", "a folder in its place"]
    if path.suffix in (".csv", ".json", ".jsonl"):
        kinds += ["digit", "letter", "lose a line", "join lines", "byte order mark", "twice"] * 2
    how = rng.choice(kinds)
    at = rng.randrange(len(data)) if data else 0
    if how in ("flip", "flips"):
        for _ in range(1 if how == "flip" else 8):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "garbage":
        data = bytearray(rng.randbytes(len(data)))
    elif how == "swap":
        data = bytearray((other / name).read_bytes() if (other / name).is_file() else b"")
    elif how == "empty":
        data.clear()
    elif how in ("digit", "letter"):
        digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
        if digits:
            data[rng.choice(digits)] = ord(rng.choice("0123456789" if how == "digit" else "exyz"))
    elif how == "byte order mark":
        data[:0] = b"\xef\xbb\xbf"
    elif how in ("lose a line", "join lines", "twice") and lines:
        i = rng.randrange(len(lines))
        lines[i] = {"lose a line": b"", "twice": lines[i] * 2}.get(how, lines[i].rstrip(b"\n"))
        data = bytearray(b"".join(lines))
    path.unlink()
    if how == "a folder in its place":
        path.mkdir()
    elif how != "delete":
        path.write_bytes(data)
    return f"{name}: {how}"


@functools.cache
def reference(whole: Path) -> tuple[Any, dict]:
    """A state like those of a run that nothing happened to, and its states."""
    like = state_like(whole)
    return like, read_states(whole, like)


@contextlib.contextmanager
def captured(path: Path):
    """Everything that is written to stdout and stderr, by whatever it is."""
    saved = os.dup(1), os.dup(2)
    sys.stdout.flush(), sys.stderr.flush()
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(saved[0], 1), os.dup2(saved[1], 2)
            os.close(saved[0]), os.close(saved[1])


def go_on(mode: str, folder: Path, work: Path) -> tuple[str, str]:
    """(how it ended: "" if it did, "refused" or "TRACEBACK"; what it said)."""
    log, how = work.with_suffix(".log"), ""
    with captured(log):
        try:
            run.train_and_evaluate(configure(mode, folder), work)
        except (*run.FAILURES, RunStopped) as error:
            how = "refused" if "\n" not in str(error).strip() else "TRACEBACK"
            print(f"error: {error}")
        except Exception:
            how = "TRACEBACK"
            traceback.print_exc()
    text = log.read_text(errors="replace")
    return ("TRACEBACK" if "Traceback" in text or "Exception ignored" in text else how), text


def try_one(task: tuple[str, Path, int]) -> tuple[str, str, str]:
    """(what came of it, what was done, what was said or differs)."""
    mode, folder, seed = task
    rng = random.Random(f"{mode} {seed}")
    state = rng.choice(["killed", "complete"])
    work = folder / f"work_{os.getpid()}" / "run"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(folder / mode / state, work)
    what = f"{mode} {seed}, {state}: {damage(work, folder / mode / 'other', rng)}"
    how, text = go_on(mode, folder, work)
    if how:
        return how, what, text
    whole = folder / mode / "complete"
    like, states = reference(whole)
    found = differences(whole, work, states, like, NUM_STEPS, NUM_STEPS + 1)
    told = [line for line in text.splitlines() if not line.startswith(USUAL)]
    usual = (folder / mode / "usual.log").read_text().splitlines()
    told = [line for line in told if line.strip() and line.replace(str(work), "") not in usual]
    said = "\n".join([*found, "said:", *told])
    if any(name.startswith("state") for name in found):
        return "ANOTHER STATE", what, said
    return ("identical" if not found else "told" if told else "SILENT"), what, said


def begin_worker() -> None:
    logging.getLogger("absl").setLevel(logging.WARNING)
    shared_programs.share()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the damages")
    parser.add_argument("--mode", choices=MODES, help="one mode alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--verbose", action="store_true", help="show every damage")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="zo_jax_damage_"))
    modes = [options.mode] if options.mode else list(MODES)
    (folder / "bottles.txt").write_text(tiny.TEXT)
    tasks = [
        (mode, folder, options.seed * 1_000_000 + i)
        for i in range(options.count)
        for mode in [modes[i % len(modes)]]
    ]
    counts, failed = {mode: collections.Counter() for mode in modes}, 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, begin_worker) as pool:
        pool.map(prepare, [(mode, folder) for mode in modes], chunksize=1)
        for task, (outcome, what, said) in zip(tasks, pool.imap(try_one, tasks), strict=True):
            counts[task[0]][outcome] += 1
            failed += outcome.isupper()
            if outcome.isupper() or options.verbose:
                print(f"{outcome}: {what}\n  " + said.strip().replace("\n", "\n  "), flush=True)
    for mode in modes:
        parts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts[mode].items()))
        print(f"{mode}: {counts[mode].total()} damages: {parts}")
    print(f"{options.count} damages, {failed} of them silent, of another state or with a traceback")
    shutil.rmtree(folder)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
