"""Checkpoints of the training state. The only module that knows orbax."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import sys
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp


class CheckpointError(ValueError):
    """Checkpoints are there, but none can be read; the message says what to do."""


@contextlib.contextmanager
def open_checkpoints(folder: Path, keep: int | None = 2) -> Iterator[ocp.training.Checkpointer]:
    """The checkpoints of a run, of which the latest `keep` are kept, or all of them.

    A checkpoint appears as a whole, when it is complete; what killed runs left behind is removed.
    """
    policies = ocp.training.preservation_policies
    with ocp.training.Checkpointer(
        folder.absolute(),
        preservation_policy=policies.LatestN(keep) if keep else policies.PreserveAll(),
        cleanup_tmp_directories=True,
    ) as checkpoints:
        yield checkpoints


def save(checkpoints: ocp.training.Checkpointer, step: int, state: Any) -> None:
    """Writes the state [pytree of arrays] as the checkpoint of a step, and waits until it is."""
    checkpoints.save(step, state, force=True, overwrite=True)


def restore_latest(checkpoints: ocp.training.Checkpointer, like: Any) -> tuple[int, Any] | None:
    """(step, state) of the latest checkpoint that can be read; None if there is none at all.

    Args:
      checkpoints: from `open_checkpoints`.
      like: the state to expect: a pytree of arrays or `jax.ShapeDtypeStruct`.

    Raises:
      CheckpointError: none of those that are there can be read.
    """
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
    )
    steps = sorted((found.step for found in checkpoints.checkpoints), reverse=True)
    reason = None
    for step in steps:
        try:
            return step, checkpoints.load(step, abstract)
        except Exception as error:  # a damaged file can raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"the checkpoint of step {step} cannot be read: {reason}", file=sys.stderr)
    if steps:
        raise CheckpointError(
            f"no checkpoint in {checkpoints.directory} can be read ({reason}); use --restart to "
            "delete the run and train from scratch, or another --workdir"
        )
    return None
