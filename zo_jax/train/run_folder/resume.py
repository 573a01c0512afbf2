"""Where a run goes on: what its folder holds, opened for writing; and what is saved when the folder fails.

The state is that of the latest checkpoint that is whole, or of the seed, and the ledger has the steps after it.
"""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np

from zo_jax import ledger
from zo_jax.atomic import write_atomic
from zo_jax.layout import Layout
from zo_jax.replay import make_header
from zo_jax.train import processes
from zo_jax.train.config import GRADIENT_MODES, QUERY_MODES, Config, ConfigError, fixed_fields
from zo_jax.train.model import GPT
from zo_jax.train.run_folder.checkpoint import CheckpointError, Checkpoints, open_checkpoints
from zo_jax.train.run_folder.folder import LEDGER, Workdir
from zo_jax.train.run_folder.metrics import Follower, Log
from zo_jax.train.steps import RunState, init_state


def run_header(config: Config, model: GPT, start: RunState) -> dict[str, Any]:
    """The header of a run's ledger, from its resolved configuration."""
    return make_header(
        start,
        num_queries=config.zo.num_queries,
        perturbation=config.zo.perturbation,
        rank=config.zo.rank,
        scope=config.scope,
        clip_norm=config.instruct.grad_clip_norm,
        rounding=config.optimizer.rounding,
        vocab_size=model.vocab_size,
        config=fixed_fields(config),
    )


class Run(NamedTuple):
    """A run that is open.

    Attributes:
      workdir: its folder.
      layout: its devices, None for one alone.
      state: where it begins.
      records: the ledger's, of which those after `state.step` are to be replayed.
      log, checkpoints: what it writes to.
      snapshots: where it keeps some, or None.
      writer: of the ledger; None in modes without queries, and in all processes but the first.
    """

    workdir: Workdir
    layout: Layout | None
    state: RunState
    records: np.ndarray
    log: Log
    checkpoints: Checkpoints
    snapshots: Checkpoints | None
    writer: ledger.Writer | None


@contextlib.contextmanager
def open_run(
    config: Config, model: GPT, workdir: Workdir, layout: Layout | None = None
) -> Iterator[Run]:
    """Opens what a claimed run folder holds, and says from where it goes on.

    Raises:
      ConfigError: the run is past its last step.
      CheckpointError: there are checkpoints, but none can be read, and no ledger can replace them.
    """
    train, folder = config.train, workdir.path
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            open_checkpoints(folder / "checkpoints", train.keep_checkpoints)
        )
        state = init_state(config, model, layout)
        header = run_header(config, model, state)
        restored = checkpoints.restore_latest(state)
        start, state = restored or (0, state)

        def open_files():
            there = None if config.mode in GRADIENT_MODES else _read_ledger(folder / LEDGER, header)
            last = there.replayable(start) if there else start
            if checkpoints.steps and not restored and last == 0:
                raise CheckpointError(
                    f"no checkpoint in {checkpoints.folder} can be used; use --restart to delete the run and train from "
                    "scratch, or another --workdir"
                )
            if last > train.num_steps:
                raise ConfigError(
                    f"the run in {folder} is at step {last}, past train.num_steps={train.num_steps}; raise "
                    "it, use --restart to train from scratch, or another --workdir"
                )
            writer = None
            if config.mode in QUERY_MODES:
                writer = ledger.Writer(folder / LEDGER, header, last)
            return writer, Log(folder, last)

        writer, log = processes.first_does(open_files) or (None, Follower(folder))
        stack.enter_context(log)
        # What the first process has mended is what all of them replay.
        rows = np.zeros(0)
        if config.mode in QUERY_MODES:
            rows = ledger.read(folder / LEDGER).records
        if writer:
            stack.callback(writer.close)
            if writer.lost:
                print(
                    f"the ledger lacks {len(writer.lost)} of the steps up to {len(rows)}: no replay can pass step "
                    f"{writer.lost[-1]} but from a later checkpoint"
                )
        snapshots = None
        if train.snapshot_delta:
            snapshots = stack.enter_context(open_checkpoints(folder / "snapshots", keep=None))
        last = max(start, len(rows))
        if start == train.num_steps:
            processes.say(
                f"this run is complete: {start} of {train.num_steps} steps; nothing to train"
            )
        elif last:
            origin = f"the checkpoint of step {start}" if restored else "the seed"
            replayed = f", replaying steps {start + 1} to {last} from the ledger"
            processes.say(f"continuing from {origin}{replayed if last > start else ''}")
        yield Run(workdir, layout, state, rows, log, checkpoints, snapshots, writer)


def _read_ledger(path: Path, header: dict) -> ledger.Ledger | None:
    """The ledger of a run folder; one that is not this run's is put aside, for the run goes on without it."""
    if not path.exists():
        return None
    try:
        there = ledger.read(path)
        if not ledger.same_run(there.header, header):
            raise ledger.LedgerError(f"{path} is the ledger of another run")
    except ledger.LedgerError as error:
        aside = path.with_name(path.name + ".damaged")
        os.replace(path, aside)
        print(f"{error}; it is now {aside.name}, and a new one begins", file=sys.stderr)
        return None
    if there.corrupt:
        print(
            f"{path}: the records of steps {', '.join(map(str, there.corrupt[:10]))} are damaged",
            file=sys.stderr,
        )
    if there.header.get("versions") != header["versions"]:
        print(
            f"the run began with {there.header.get('versions')}, and goes on with {header['versions']}: its numbers may "
            "differ in their last bits",
            file=sys.stderr,
        )
    return there


def rescue(run: Run, state: RunState, error: OSError) -> str:
    """Says what became of a run whose folder failed, after saving it elsewhere if it would lose more than the step in flight."""
    step, folder = int(state.step), run.workdir.path
    if run.writer:
        with contextlib.suppress(OSError, ledger.LedgerError):
            run.workdir.check()
            kept = ledger.read(run.writer.path)
            start = max(run.checkpoints.steps, default=0)
            if kept.replayable(start) >= step - 1:
                return (
                    f"{error}; the ledger holds steps up to {kept.replayable(start)}: put that right and run the same "
                    "command again"
                )
    try:
        safe = Path(tempfile.mkdtemp(prefix="zo_jax_rescue_"))
        write_atomic(safe / "config.json", run.workdir.config_text)
        with contextlib.suppress(OSError):
            write_atomic(safe / "metrics.csv", run.log.contents())
            if run.writer:
                write_atomic(safe / LEDGER, run.writer.contents())
        with open_checkpoints(safe / "checkpoints") as checkpoints:
            checkpoints.save(step, state)
            checkpoints.wait()
    except OSError as second:
        return f"{error}; and the state of step {step} cannot be saved elsewhere either: {second}"
    return (
        f"{error}; the run at step {step} was saved in {safe} instead of {folder}: the same command with "
        f"--workdir={safe} goes on"
    )
