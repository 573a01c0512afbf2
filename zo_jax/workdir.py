"""The run folder: whose it is, and whether a run may continue in it."""

import dataclasses
import json
from pathlib import Path
import shutil
from typing import Any
import zlib

from zo_jax import metrics
from zo_jax.config import EXTENDABLE, Config, ConfigError
from zo_jax.data import Corpus

RUN_FILES = (
    *("metrics.csv", "evaluations.jsonl", "tensorboard", "loss_curve.png", "sample.txt"),
    *("checkpoints", "snapshots", "config.json"),
)


def claim_workdir(config: Config, corpus: Corpus, workdir: Path, restart: bool) -> None:
    """Makes the run folder and writes config.json, or sees that the one there is this run's.

    Raises:
      ConfigError: the folder holds another run; nothing in it was changed.
    """
    path = workdir / "config.json"
    if restart:
        for name in RUN_FILES:  # config.json last: without it the rest would belong to no run
            file = workdir / name
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    here = dataclasses.asdict(config)
    # A text file can change behind its path, and a run must not continue on another text.
    blocks = 0
    for blocks_NT in (corpus.train_NT, corpus.validation_NT, corpus.fo_NT):
        blocks = blocks if blocks_NT is None else zlib.crc32(blocks_NT.tobytes(), blocks)
    here["corpus"] = {"num_tokens": corpus.num_tokens, "crc32": blocks}
    if path.exists():
        try:
            there = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(
                f"{path} is no JSON ({error}); use --restart, or another --workdir"
            ) from error
        _check_same(_flat(there), _flat(here), config.optimizer.schedule, workdir)
    elif found := [name for name in RUN_FILES if (workdir / name).exists()]:
        raise ConfigError(
            f"{workdir} holds {', '.join(found)}, but no config.json to say what run they are of; "
            "use --restart to delete them, or another --workdir"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        metrics.write_atomic(path, json.dumps(here, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--workdir cannot be written to: {error}") from error


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
            f"{workdir} holds a run with a different configuration: {', '.join(different)}; use "
            "another --workdir, or --restart to delete that run"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat
