"""Checkpoints of the training state. The only module that knows orbax."""

from collections.abc import Iterator
import contextlib
import gc
import logging
from pathlib import Path
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from zo_jax.atomic import set_aside
from zo_jax.fingerprint import fingerprint
from zo_jax.train import processes
from zo_jax.train.run_folder import identity as identities
from zo_jax.trees import WHOLE, Subset


class CheckpointError(ValueError):
    """Checkpoints are there, but none can be read; the message says what to do."""


class Checkpoints:
    """The checkpoints of a folder. Each appears as a whole, when it is complete, and carries a
    seal; see `restore`.

    What killed runs left behind is removed on opening. Nothing in a checkpoint is executed: it is
    arrays and JSON.
    """

    def __init__(
        self, folder: Path, keep: int | None = 2, identity: str = "", part: Subset = WHOLE
    ):
        """Opens a folder, made if it is not there, of which the latest `keep` checkpoints are kept,
        or all.

        What is saved is a part of each state, sealed with the run's identity.
        """
        policies = ocp.training.preservation_policies
        self.folder, self.identity, self.part = Path(folder).absolute(), identity, part
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

        It is copied before this returns, so that it may be donated. Waits for the one before it,
        and returns the step of that one.

        Raises:
          OSError: the one before it, or this one, cannot be written.
          AnotherProcessFailed: one of several that write it together has ended.
        """
        before, state = self.wait(), self.part.select(state)
        with _disk_errors(self.folder):
            response = self._checkpointer.save_async(
                step,
                {
                    "state": state,
                    "seal": _seal(state, *identities.words(self.identity), np.uint32(step)),
                },
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
          OSError, AnotherProcessFailed: as `save`.
        """
        if not self._writing:
            return None
        (step, response), self._writing = self._writing, None
        with _disk_errors(self.folder):
            response.result()
        return step

    def close(self) -> None:
        """Waits, and closes. Errors of the disk were raised before, or are not worth hiding those
        that led here.
        """
        with contextlib.suppress(Exception):
            self._checkpointer.close()


@contextlib.contextmanager
def open_checkpoints(
    folder: Path, keep: int | None = 2, identity: str = "", part: Subset = WHOLE
) -> Iterator[Checkpoints]:
    """`Checkpoints`, closed at the end."""
    checkpoints = Checkpoints(folder, keep, identity, part)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a folder, which another process may be writing to,
    ascending.
    """
    return _steps(folder, "(0|[1-9][0-9]*)")


def find_whole(
    folder: Path, like: Any, identity: str = "", part: Subset = WHOLE
) -> tuple[list[int], list[int], Any]:
    """Reads all checkpoints of a folder, puts aside those that are damaged or of another run, and
    tells of them.

    Must come before the folder is opened.

    Returns:
      (steps of those that are whole; of those that have been put aside, now or before; the state of
      the latest that is whole, or None).
    """
    whole, latest = [], None
    # What the first process finds is what all of them read together.
    for step in processes.first_tells(lambda: complete_steps(folder)[::-1]):
        try:
            state = restore(folder, step, like, identity, part)
            whole, latest = [step, *whole], state if latest is None else latest
        except CheckpointError as error:
            word = f"the checkpoint of step {step} in {folder} cannot be used: {error}; it is now"
            put_aside = lambda word=word, path=folder / str(step): print(
                word, set_aside(path), file=sys.stderr
            )
            processes.first_does(put_aside)
    aside = processes.first_tells(lambda: _steps(folder, r"(0|[1-9][0-9]*)\.damaged"))
    return whole, [step for step in aside if step not in whole], latest


def _steps(folder: Path, pattern: str) -> list[int]:
    """The numbers in the names of a folder's files that are wholly like a pattern, ascending."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(pattern, name)))


def restore(
    folder: Path,
    step: int,
    like: Any,
    identity: str = "",
    part: Subset = WHOLE,
    give_up: bool = False,
) -> Any:
    """The state of a step, placed as the arrays of `like` are; what is not in the part that was
    kept is from there. The rest of `like` is deleted first, if it is given up.

    Its seal must be right: the fingerprint of its bits, the identity of the run (unless none is
    given), and the step.

    Raises:
      CheckpointError: it is not, or a file is damaged.
    """
    mine, kept = identities.words(identity), part.select(like)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        {"state": kept, "seal": _seal(kept, *mine, np.uint32(step))},
    )
    for array in jax.tree.leaves(kept) if give_up else ():
        array.delete()
    found, reason = None, ""
    with _quiet():
        try:
            found = ocp.load(Path(folder).absolute() / str(step), abstract)
        except Exception as error:  # a damaged file can raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    # A file that one of several processes cannot read is lost to all.
    if not processes.all_agree(not reason) or found is None:
        raise CheckpointError(reason or "another process cannot read it")
    there, *of_run, of_step = np.asarray(found["seal"])
    if identity and tuple(of_run) != mine:
        raise CheckpointError("it is of another run")
    if of_step != step:
        raise CheckpointError(f"it is that of step {of_step}")
    if fingerprint(found["state"]) != there:
        raise CheckpointError("its bits are not those that were saved (wrong fingerprint)")
    return part.merge(like, found["state"])


@jax.jit
def _seal(state: Any, *words: Any) -> jax.Array:
    """uint32 [4]: the fingerprint of a state, and what is given besides."""
    return jnp.stack([fingerprint(state), *(jnp.asarray(word, jnp.uint32) for word in words)])


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname


# What goes wrong, orbax raises too, and that is told in one line; its log has the frames of every
# thread besides.
logging.getLogger("absl").addFilter(_is_not_of_orbax)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, tasks of orbax that nothing awaits any more print no frames."""
    hook = sys.unraisablehook
    try:
        sys.unraisablehook = lambda _: None
        yield
        gc.collect()
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """What orbax and tensorstore raise when they cannot write is a ValueError, or anything else;
    here an OSError.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        processes.check_alive(error)
        lines = str(error).splitlines() or [type(error).__name__]
        raise OSError(f"{folder}: {lines[0]}") from error
