"""Rows to Weights & Biases, beside TensorBoard, through its own library."""

import contextlib
import importlib
import importlib.util
from pathlib import Path
import secrets
import sys
from typing import Any

from zo_jax.atomic import write_atomic
from zo_jax.train.config import Config, ConfigError

# Seconds for what is still to be sent when a run ends; the rest is for `wandb sync`.
_PATIENCE = 60


def check(config: Config) -> None:
    """Whether what the configuration asks for is installed; imports nothing.

    Raises:
      ConfigError: it is not.
    """
    if config.train.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"train.wandb={config.train.wandb} needs wandb, which is not installed; "
            "pip install 'zo_jax[wandb]', or leave train.wandb empty"
        )


class Tracker:
    """A run of Weights & Biases for that of a folder: the same one however often it goes on.

    Where its files are, and whether it is online, is up to its own variables (WANDB_MODE). It
    never ends a run: if it fails, it says so once and is left alone.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any]):
        """Begins, or goes on.

        Args:
          project: its project.
          folder: of the run; its name there, and where wandb/ with its identity is.
          config: the settings, as nested dictionaries.

        Raises:
          ConfigError: it cannot begin, as a rule because nobody has logged in.
        """
        file = folder / "wandb" / "id"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            write_atomic(file, secrets.token_hex(8))
        wandb: Any = importlib.import_module("wandb")
        # Without the network the end of a run would wait for it for ever.
        quiet = wandb.Settings(
            console="off", silent=True, disable_git=True, finish_timeout=_PATIENCE
        )
        named = dict(project=project, id=file.read_text(), name=folder.name, dir=str(folder))
        try:
            self._run = wandb.init(**named, resume="allow", config=config, settings=quiet)
        except Exception as error:  # of many kinds, which only its library knows
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"train.wandb={project} cannot begin: {reason}; run wandb login, set "
                "WANDB_MODE=offline, or leave train.wandb empty"
            ) from error
        # Online it has what was sent before; offline each start is a file with all of it.
        self._first = self._run.step

    def write(self, step: int, values: dict[str, float]) -> None:
        """Sends a row, unless it is there."""
        if self._run is None or step < self._first:
            return
        try:
            self._run.log(values, step=step)
        except Exception as error:
            print(f"nothing more goes to Weights & Biases: {error!r}", file=sys.stderr)
            self._run = None

    def close(self) -> None:
        """Returns when all is sent, or kept by it for later."""
        if self._run is not None:
            with contextlib.suppress(Exception):
                self._run.finish()
