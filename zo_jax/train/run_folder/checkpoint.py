"""Checkpoints of the training state. The only module that knows orbax."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import sys
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from zo_jax.fingerprint import fingerprint


class CheckpointError(ValueError):
    """Checkpoints are there, but none can be read; the message says what to do."""


class Checkpoints:
    """The checkpoints of a folder. Each appears as a whole, when it is complete, and carries the state's fingerprint.

    What killed runs left behind is removed on opening. Nothing in a checkpoint is executed: it is arrays and JSON.
    """

    def __init__(self, folder: Path, keep: int | None = 2):
        """Opens a folder, made if it is not there, of which the latest `keep` checkpoints are kept, or all."""
        policies = ocp.training.preservation_policies
        self.folder = Path(folder).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.LatestN(keep) if keep else policies.PreserveAll(),
            cleanup_tmp_directories=True,
        )
        self._writing: tuple[int, Any] | None = None

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [found.step for found in self._checkpointer.checkpoints]

    def save(self, step: int, state: Any) -> int | None:
        """Writes the state [pytree of arrays] as the checkpoint of a step, in the background.

        It is copied before this returns, so that it may be donated. Waits for the one before it, and returns the step of that one.

        Raises:
          OSError: the one before it, or this one, cannot be written.
        """
        before = self.wait()
        with _disk_errors(self.folder):
            response = self._checkpointer.save_async(
                step,
                {"state": state, "fingerprint": fingerprint(state)},
                force=True,
                overwrite=True,
            )
        self._writing = step, response
        return before

    def finished(self) -> int | None:
        """The step of a checkpoint that has become complete since `save`, told once."""
        if self._writing and not self._checkpointer.is_saving_in_progress():
            return self.wait()
        return None

    def wait(self) -> int | None:
        """Returns when all is written: the step of the checkpoint that was being, if there was one.

        Raises:
          OSError: it could not be.
        """
        if not self._writing:
            return None
        (step, response), self._writing = self._writing, None
        with _disk_errors(self.folder):
            response.result()
        return step

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """(step, state) of the latest checkpoint that is whole, None if there is none; tells of those that are not."""
        for step in reversed(self.steps):
            try:
                return step, restore(self.folder, step, like)
            except Exception as error:  # a damaged file can raise anything
                reason = (str(error) or type(error).__name__).splitlines()[0]
                print(
                    f"the checkpoint of step {step} cannot be used: {reason}; trying the one before it",
                    file=sys.stderr,
                )
        return None

    def close(self) -> None:
        """Waits, and closes. Errors of the disk were raised before, or are not worth hiding those that led here."""
        with contextlib.suppress(Exception):
            self._checkpointer.close()


@contextlib.contextmanager
def open_checkpoints(folder: Path, keep: int | None = 2) -> Iterator[Checkpoints]:
    """`Checkpoints`, closed at the end."""
    checkpoints = Checkpoints(folder, keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a folder, which another process may be writing to, ascending."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def restore(folder: Path, step: int, like: Any) -> Any:
    """The state of a step, placed as the arrays of `like` are.

    Raises:
      CheckpointError: its bits are not those that were saved.
      Exception: whatever a damaged file raises.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        {"state": like, "fingerprint": fingerprint(like)},
    )
    found = ocp.load(Path(folder).absolute() / str(step), abstract)
    if int(fingerprint(found["state"])) != int(found["fingerprint"]):
        raise CheckpointError("its bits are not those that were saved (wrong fingerprint)")
    return found["state"]


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """What orbax and tensorstore raise when they cannot write is a ValueError, or anything else; here an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise OSError(f"{folder}: {lines[0]}") from error
