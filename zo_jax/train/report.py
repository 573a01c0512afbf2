"""What the steps of a run tell: their records in the ledger, their rows, validation losses and
snapshots, and the progress.
"""

import contextlib
import time
from typing import NamedTuple

import jax
import numpy as np

from zo_jax import ledger
from zo_jax.train import describe, processes
from zo_jax.train.config import Config
from zo_jax.train.progress import Progress
from zo_jax.train.run_folder.checkpoint import Checkpoints
from zo_jax.train.run_folder.reports import make_row
from zo_jax.train.run_folder.resume import Run
from zo_jax.train.run_state import RunState, StepMetrics, StepRecord
from zo_jax.train.tasks.task import Task

# Steps after which is told that most have no signal.
_ENOUGH = 20


class Taken(NamedTuple):
    """A step, perhaps still on the device: its number, what it told, and its record unless it was
    replayed or used backprop.
    """

    step: int
    metrics: StepMetrics
    record: StepRecord | None


class Report:
    """Tells of steps one behind the device, so that it never waits.

    Attributes:
      diverged: whether too many steps in a row had no finite loss.
      progress: where lines for the user go.
    """

    def __init__(self, config: Config, task: Task, run: Run):
        self.config, self.task, self.run = config, task, run
        self.start, self.diverged = int(run.state.step), False
        self._pending: Taken | None = None
        self._began: float | None = None
        self._told_flat = False
        num_steps = config.train.num_steps
        self.progress = Progress(
            self.start, num_steps, on=self.start < num_steps and processes.is_first()
        )

    def take(self, taken: Taken) -> None:
        """Notes a step, and tells of the one before it."""
        before, self._pending = self._pending, taken
        if before:
            self._tell(before)

    def flush(self, results: dict[str, float] | None = None) -> None:
        """Tells of the last step, with what was measured after it."""
        last, self._pending = self._pending, None
        if last:
            self._tell(last, results)

    def evaluate(self, step: int, state: RunState) -> None:
        """Tells what is measured on held-out examples, unless that was done before an interruption,
        and keeps a snapshot and the best state if they are due.
        """
        log, reports = self.run.log, self.run.workdir.reports
        if step not in log.steps:
            results = self.task.evaluate(state.params)
            if step == 0:
                log.write(make_row(self.config, self.task, 0, None, results))
            else:
                self.flush(results)
            when = f"after step {step}" if step else "before training"
            told = describe.tell_results(results, self.task.unit)
            self.progress.say(f"validation loss {when}: {told}")
            for sample in self.task.samples if step == 0 else ():
                self.progress.say(sample)
        snapshots, best = self.run.snapshots, self.run.best
        if snapshots and reports.has_snapshot(step, log.results) and step not in snapshots.steps:
            self._keep(snapshots, step, state)
        if best and reports.best_step(self.task.measure, log.results) == step not in best.steps:
            self._keep(best, step, state)

    def _keep(self, checkpoints: Checkpoints, step: int, state: RunState) -> None:
        # Several processes cannot write two at once: orbax has one name for the barriers of both.
        self.tell_saved(self.run.checkpoints.wait())
        for others in (self.run.snapshots, self.run.best):
            if others:
                others.wait()
        checkpoints.save(step, state)

    def tell_saved(self, step: int | None) -> None:
        """Tells that the checkpoint of a step is complete, if it is that of one."""
        if step is not None:
            self.progress.say(f"saved the checkpoint of step {step}")

    def settle(self, step: int, state: RunState) -> None:
        """After a write has failed: what is still to tell of the steps taken goes where it is kept
        in memory.
        """
        if jax.process_count() > 1:  # the others do not evaluate now
            return
        with contextlib.suppress(OSError):
            is_due = self._pending and self.run.workdir.reports.has_evaluation(step)
            self.flush(self.task.evaluate(state.params) if is_due else None)

    def _tell(self, taken: Taken, results: dict[str, float] | None = None) -> None:
        """Writes what a step has to tell: its record and its row.

        The record comes first, so that no row is lost that replay cannot make again. A reward's row
        says more than its record, and comes before it: a run that is killed between them takes the
        step again.
        """
        step, last, record = jax.device_get(taken)
        self.diverged |= bool(0 < self.config.train.max_skipped <= last.skipped_in_row)
        self._show(step, last)
        write_row = lambda: self._write_row(step, last, results)
        write_record = lambda: self._record(step, last, record)
        first, then = write_record, write_row
        if self.config.objective.name != "loss":
            first, then = write_row, write_record
            self._tell_signal(step, last)
        try:
            first()
        finally:  # what cannot be written is kept in memory, of both
            then()

    def _write_row(
        self, step: int, last: StepMetrics, results: dict[str, float] | None = None
    ) -> None:
        log = self.run.log
        due = results is not None or self.run.workdir.reports.has_row(step)
        if due and step not in log.steps:
            log.write(make_row(self.config, self.task, step, last, results))

    def _tell_signal(self, step: int, last: StepMetrics) -> None:
        """Says once if most steps have no signal."""
        if step >= _ENOUGH and last.num_flat > step / 2 and not self._told_flat:
            self._told_flat = True
            self.progress.say(describe.tell_flat(step, int(last.num_flat)))

    def _record(self, step: int, last: StepMetrics, record: StepRecord | None) -> None:
        writer = self.run.writer
        if not writer or step <= len(self.run.records):
            return
        if record:
            writer.append(step, ledger.REPLAYABLE, *record)
        else:
            nothing = np.full(self.config.zo.num_queries, np.nan, np.float32)
            writer.append(step, ledger.BACKPROP, 0, last.loss, nothing)

    def _validation(self) -> str:
        """The latest validation loss, for the line of progress."""
        results = self.run.log.results if self.config.objective.name == "loss" else {}
        return f"validation {results[max(results)]['eval_loss']:.4f}, " if results else ""

    def _show(self, step: int, last: StepMetrics) -> None:
        # Compilation is in the first step, and not in the rate.
        self._began = self._began or time.monotonic()
        blocks = describe.blocks_until(self.config, step) - describe.blocks_until(
            self.config, self.start + 1
        )
        rate = blocks * self.task.tokens_per_example / max(time.monotonic() - self._began, 1e-9)
        what = f"loss {last.loss:.4f}"
        if self.config.objective.name != "loss":
            what = f"{self.config.objective.name} {-last.loss:.4f}, best {last.best_score:.4f}"
        self.progress.show(
            step,
            f"{what}, {self._validation()}lr {last.learning_rate:.2e}, |g| {last.grad_norm:.3g}, "
            f"{rate:,.0f} tokens/s, {describe.passes_until(self.config, step):,} passes",
        )
