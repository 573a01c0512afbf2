"""The run folder: whose it is, and whether a run may continue in it."""

import dataclasses
import fcntl
import json
import os
from pathlib import Path
import shutil
import socket
from typing import Any
import zlib

from zo_jax.atomic import write_atomic
from zo_jax.train import processes
from zo_jax.train.config import EXTENDABLE, Config, ConfigError
from zo_jax.train.data.corpus import Corpus

# The name of a run's ledger in its folder.
LEDGER = "ledger.bin"
RUN_FILES = (
    *("metrics.csv", "evaluations.jsonl", "tensorboard", "loss_curve.png", "sample.txt"),
    *(LEDGER, "checkpoints", "snapshots", "config.json"),
)


class Workdir:
    """A run folder that this process, and those that run with it, have for their own, until it is closed or dies."""

    def __init__(self, path: Path):
        """Makes the folder if it is not there, and locks it.

        Raises:
          ConfigError: another process has it, or it cannot be made.
        """
        self.path, self._lock = path, None
        if not processes.is_first():
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a+")
        except OSError as error:
            raise ConfigError(f"--workdir cannot be written to: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise ConfigError(
                f"{path} is in use by {owner}; wait until it ends, or use another --workdir"
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()

    def check(self) -> None:
        """Raises OSError if the folder is no longer there, or another in its place."""
        if not self._lock:
            return
        there, here = (self.path / ".lock").stat(), os.fstat(self._lock.fileno())
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            raise OSError(f"{self.path} is not the folder that the run began in")

    def claim(self, config: Config, corpus: Corpus, restart: bool) -> None:
        """Writes config.json, or sees that the one there is this run's.

        Raises:
          ConfigError: the folder holds another run; nothing in it was changed.
        """
        file = self.path / "config.json"
        if restart:
            for name in RUN_FILES:  # config.json last: without it the rest would belong to no run
                old = self.path / name
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        here = dataclasses.asdict(config)
        # A text file can change behind its path, and a run must not continue on another text.
        blocks = 0
        for blocks_NT in (corpus.train_NT, corpus.validation_NT, corpus.fo_NT):
            blocks = blocks if blocks_NT is None else zlib.crc32(blocks_NT.tobytes(), blocks)
        here["corpus"] = {"num_tokens": corpus.num_tokens, "crc32": blocks}
        if file.exists():
            there = _read_json(file)
            _check_same(_flat(there), _flat(here), config.optimizer.schedule, self.path)
        elif found := [name for name in RUN_FILES if (self.path / name).exists()]:
            raise ConfigError(
                f"{self.path} holds {', '.join(found)}, but no config.json to say what run they are of; "
                "use --restart to delete them, or another --workdir"
            )
        self.config_text = json.dumps(here, indent=2) + "\n"
        try:
            write_atomic(file, self.config_text)
        except OSError as error:
            raise ConfigError(f"--workdir cannot be written to: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        there = json.loads(file.read_text())
        if not isinstance(there, dict):
            raise ValueError(f"it is a {type(there).__name__}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} is not the JSON of a configuration ({error}); use --restart, or another --workdir"
        ) from error
    return there


def _check_same(there: dict[str, Any], here: dict[str, Any], schedule: str, workdir: Path) -> None:
    free = set(EXTENDABLE)
    if schedule == "cosine":  # the length is part of the learning rate
        free.remove("train.num_steps")
    names = [*here, *(name for name in there if name not in here)]
    different = [
        f"{name} (there {there.get(name, 'absent')!r}, here {here.get(name, 'absent')!r})"
        for name in names
        if name not in free and there.get(name) != here.get(name)
    ]
    if different:
        raise ConfigError(
            f"{workdir} holds a run with a different configuration: {', '.join(different)}; a run may go on with "
            f"another {', '.join(sorted(free))} alone; use another --workdir, or --restart to delete that run"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat
