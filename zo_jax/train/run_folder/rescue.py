"""What is saved of a run whose folder fails: a full disk, a folder that is gone."""

import contextlib
from pathlib import Path
import tempfile

import jax

from zo_jax import ledger
from zo_jax.atomic import write_atomic
from zo_jax.train.run_folder import checkpoint
from zo_jax.train.run_folder.checkpoint import open_checkpoints
from zo_jax.train.run_folder.folder import LEDGER
from zo_jax.train.run_folder.resume import Run
from zo_jax.train.run_state import RunState


def rescue(run: Run, state: RunState, error: OSError) -> str:
    """Says what became of a run whose folder failed, after saving it elsewhere if it would lose
    more than the step in flight.
    """
    step, folder = int(state.step), run.workdir.path
    if jax.process_count() > 1:  # a state that several hold together cannot be saved by one
        return f"{error}; put that right and start all processes again: the run goes on from what is saved"  # noqa: E501
    start = max(checkpoint.complete_steps(folder / "checkpoints"), default=0)
    if run.writer:
        with contextlib.suppress(OSError, ledger.LedgerError):
            run.workdir.check()
            kept = ledger.read(run.writer.path)
            if kept.replayable(start) >= step - 1:
                return (
                    f"{error}; the ledger holds steps up to {kept.replayable(start)}: put that "
                    f"right and run the same "
                    "command again"
                )
    try:
        safe = Path(tempfile.mkdtemp(prefix="zo_jax_rescue_"))
        write_atomic(safe / "config.json", run.workdir.config_text)
        with contextlib.suppress(OSError):
            write_atomic(safe / "metrics.csv", run.log.contents())
            if run.writer:
                write_atomic(safe / LEDGER, run.writer.contents())
        part = run.checkpoints.part
        with open_checkpoints(safe / "checkpoints", 2, run.workdir.identity, part) as checkpoints:
            checkpoints.save(step, state)
            checkpoints.wait()
    except OSError as second:
        return f"{error}; and the state of step {step} cannot be saved elsewhere either: {second}"
    return (
        f"{error}; the run at step {step} was saved in {safe} instead of {folder}: the same "
        f"command with "
        f"--workdir={safe} goes on"
    )
