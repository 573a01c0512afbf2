"""The run folder: whose it is, and whether a run may continue in it."""

import dataclasses
import fcntl
import json
import os
from pathlib import Path
import shutil
import socket
import sys
from typing import Any
import zlib

from zo_jax.atomic import set_aside, write_atomic
from zo_jax.models.tokenizer import Tokenizer
from zo_jax.train import processes
from zo_jax.train.config import Config, ConfigError
from zo_jax.train.run_folder import identity as identities
from zo_jax.train.run_folder.reports import Interval, Reports

# The name of a run's ledger in its folder.
LEDGER = "ledger.bin"
_FOLDERS = ("tensorboard", "wandb", "checkpoints", "snapshots", "best")
_FILES = (
    *("metrics.csv", "evaluations.jsonl", "loss_curve.png", "sample.txt", "results.json"),
    *("tokenizer.json", LEDGER),
)
RUN_FILES = (*_FILES, *_FOLDERS, "config.json")


class Workdir:
    """A run folder that this process, and those that run with it, have for their own, until it is
    closed or dies.

    Attributes:
      path: of the folder.
      identity: of the run in it, once it is claimed.
      reports: what the run writes at which step.
      found: the settings that were found by measurement, by name.
      config_text: of config.json, in the first process.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, None
        self.identity, self.reports, self.config_text = "", Reports([]), ""
        self._base: int | None = None
        self.found: dict[str, float] = {}
        self._config: dict[str, Any] = {}

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()

    def lock(self) -> None:
        """Makes the folder if it is not there, and locks it.

        Raises:
          ConfigError: another process has it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+", errors="replace")
        except OSError as error:
            raise ConfigError(f"--workdir cannot be written to: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            self._lock = None
            raise ConfigError(
                f"{self.path} is in use by {owner}; wait until it ends, or use another --workdir"
            ) from error
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()

    def check(self) -> None:
        """Raises OSError if the folder is no longer there, or another in its place."""
        if not self._lock:
            return
        there, here = (self.path / ".lock").stat(), os.fstat(self._lock.fileno())
        if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            raise OSError(f"{self.path} is not the folder that the run began in")

    def claim(self, config: Config, digests: dict[str, Any], restart: bool) -> None:
        """Locks the folder, and writes config.json, or sees that the one there is this run's. For
        all processes.

        Raises:
          ConfigError: the folder holds another run; nothing in it was changed.
        """

        def claim() -> tuple[str, list[Interval], dict[str, float]]:
            self.lock()
            self._claim(config, digests, restart)
            return self.identity, self.reports.intervals, self.found

        self.identity, intervals, self.found = processes.first_tells(claim)
        self.reports = Reports([Interval(*interval) for interval in intervals])

    def _claim(self, config: Config, digests: dict[str, Any], restart: bool) -> None:
        file = self.path / "config.json"
        if restart:
            for name in RUN_FILES:  # config.json last: without it the rest would belong to no run
                old = self.path / name
                is_folder = old.is_dir() and not old.is_symlink()
                shutil.rmtree(old) if is_folder else old.unlink(missing_ok=True)
        self._config = dataclasses.asdict(config) | {"corpus": digests}
        self.identity = identities.identify(config, digests)
        if os.path.lexists(file):
            there = read_config(file)
            self._check_same(there, config)
            self.identity = there["identity"]
            self.reports = Reports([Interval(**interval) for interval in there["reports"]])
            self._base, self.found = there.get("base"), there.get("found", {})
        elif found := [name for name in RUN_FILES if (self.path / name).exists()]:
            raise ConfigError(
                f"{self.path} holds {', '.join(found)}, but no config.json to say what run they "
                f"are of; "
                "use --restart to delete them, or another --workdir"
            )
        else:  # before all other files, which without it would belong to no run
            try:
                self.begin(Reports([]).go_on(config, 0))
            except OSError as error:
                raise ConfigError(f"--workdir cannot be written to: {error}") from error
        self._clear()

    def begin(self, reports: Reports) -> None:
        """Writes config.json, with what the run writes at which step."""
        self.reports = reports
        content = self._config | {
            "identity": self.identity,
            "reports": [interval._asdict() for interval in reports.intervals],
        }
        if self._base is not None:
            content["base"] = self._base
        if self.found:
            content["found"] = self.found
        content["check"] = _check(content)
        self.config_text = json.dumps(content, indent=2) + "\n"
        write_atomic(self.path / "config.json", self.config_text)

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Writes tokenizer.json, without which the model could not be used; for all processes."""
        write = lambda: write_atomic(
            self.path / "tokenizer.json", tokenizer.backend.to_str() + "\n"
        )
        processes.first_does(write)

    def claim_base(self, fingerprint: int) -> None:
        """Sees that the weights of the pretrained model are those that the run began with; `go_on`
        writes of which they are.

        Raises:
          ConfigError: they are others.
        """
        if self._base not in (None, fingerprint):
            raise ConfigError(
                f"model.path holds other weights than {self.path} began with (fingerprint "
                f"{fingerprint:08x}, there {self._base:08x}); give the former ones, or use another "
                f"--workdir"
            )
        self._base = fingerprint

    def keep_found(self, found: dict[str, float]) -> None:
        """Writes the settings that were found, with which the run goes on. For all processes."""
        self.found = found
        processes.first_does(lambda: self.begin(self.reports))

    def go_on(self, config: Config, step: int) -> None:
        """From a step on, the run writes what the configuration says. For all processes."""
        self.reports = self.reports.go_on(config, step)
        processes.first_does(lambda: self.begin(self.reports))

    def _check_same(self, there: dict[str, Any], config: Config) -> None:
        ours = ("identity", "reports", "base", "found", "check")
        before = {name: x for name, x in there.items() if name not in ours}
        before, here = identities.flatten(before), identities.flatten(self._config)
        different, notes = identities.compare(before, here, config)
        if different:
            free = ", ".join(sorted(identities.extendable(config)))
            raise ConfigError(
                f"{self.path} holds a run with a different configuration: {', '.join(different)}; "
                f"a run may go on with "
                f"another {free} alone; use another --workdir, or --restart to delete that run"
            )
        for note in notes:
            print(note, file=sys.stderr)

    def _clear(self) -> None:
        """Puts aside folders in the place of files, and files in that of folders."""
        for name in (*_FILES, *_FOLDERS):
            path = self.path / name
            if path.exists() and path.is_dir() != (name in _FOLDERS):
                kind = "no folder" if name in _FOLDERS else "a folder"
                print(f"{path} is {kind}; it is now {set_aside(path)}", file=sys.stderr)


def read_identity(folder: Path) -> str | None:
    """The identity of the run in a folder; None if there is no config.json.

    Raises:
      ConfigError: it cannot be read.
    """
    file = folder / "config.json"
    return read_config(file)["identity"] if file.exists() else None


def read_config(file: Path) -> dict[str, Any]:
    """What config.json holds: the resolved configuration, and what tells the run from others.

    Raises:
      ConfigError: it is not there, or is damaged.
    """
    try:
        there = json.loads(file.read_text())
        if not isinstance(there, dict):
            raise ValueError(f"it is a {type(there).__name__}")
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(
            f"{file} is not the JSON of a configuration ({error}); use --restart, or another "
            f"--workdir"
        ) from error
    if there.get("check") != _check(there):
        raise ConfigError(
            f"{file} is damaged, was changed by hand, or is of a version that ordered batches "
            f"otherwise (its check is "
            "missing or wrong): put the former one back, or use --restart, or another --workdir"
        )
    return there


def _check(content: dict[str, Any]) -> str:
    text = json.dumps({k: v for k, v in content.items() if k != "check"}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"
