"""The loop: a step, its record, its row, and what is due after it.

A run that goes on takes its first steps from the ledger, through the same code: replayed steps get the rows and snapshots that are
missing, and no others.
"""

from collections.abc import Callable
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

from zo_jax import ledger
from zo_jax.replay import arguments
from zo_jax.train import describe, processes, signals
from zo_jax.train.config import Config
from zo_jax.train.data.batches import read_batches
from zo_jax.train.data.corpus import Corpus
from zo_jax.train.model import GPT
from zo_jax.train.run_folder.resume import Run
from zo_jax.train.steps import RunState, StepMetrics, StepRecord, make_train_step, make_update


class Loop:
    """A run between two steps.

    Attributes:
      state: after the steps taken so far.
      step: their number.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        model: GPT,
        run: Run,
        evaluate_params: Callable[[Any], float],
    ):
        self.config, self.corpus, self.run = config, corpus, run
        self.state, self.records = run.state, run.records
        self.evaluate_params = evaluate_params
        self.start = self.step = int(self.state.step)
        self.train_step = make_train_step(config, model, run.layout)
        self.update = (
            make_update(config, model, run.layout) if len(self.records) > self.start else None
        )
        self.pending: tuple[int, StepMetrics, StepRecord | None] | None = None
        self.began: float | None = None
        self.saved_at = time.monotonic()
        self.diverged = False
        # In a log file every refresh is a line.
        self.bar = tqdm.tqdm(
            total=config.train.num_steps,
            initial=self.start,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
            disable=self.start == config.train.num_steps or not processes.is_first(),
        )

    def finish(self) -> RunState:
        """Takes the steps that are left.

        Raises:
          Interrupted, Diverged: all is saved.
          OSError: the run folder; `state` and `step` are of the last step taken.
        """
        train, num_steps = self.config.train, self.config.train.num_steps
        # Several processes stop together, by JAX's preemption service, which catches SIGTERM.
        catch = signals.catch_signals if jax.process_count() == 1 else processes.forward_interrupts
        with self.bar, catch() as signal:
            if self.step == 0:
                self._evaluate()
            while self.step < num_steps:
                replayed = self.step < len(self.records)
                before, self.pending = self.pending, self._take_step(replayed)
                self.step += 1
                # One step behind the device, so that it never waits.
                if before:
                    self._report(before)
                at_end = self.step == num_steps
                stop = signal(self.step) or ("no finite loss" if self.diverged else None)
                if self.step % train.eval_interval == 0 or at_end:
                    self._evaluate()
                if at_end or stop or (not replayed and self._is_due()):
                    self._save(wait=bool(at_end or stop))
                elif (done := self.run.checkpoints.finished()) is not None:
                    self._say(f"saved the checkpoint of step {done}")
                if stop and not at_end:
                    raise self._stopped(stop)
        return self.state

    def _take_step(self, replayed: bool) -> tuple[int, StepMetrics, StepRecord | None]:
        if replayed:
            record = self.records[self.step]
            self.state, new = self.update(self.state, *arguments(record, self.run.layout))
            return self.step + 1, new, None
        corpus = self.corpus
        batches = read_batches(
            self.config, corpus.train_NT, self.step, corpus.fo_NT, self.run.layout
        )
        self.state, new, record = self.train_step(self.state, self.step, *batches)
        return self.step + 1, new, record

    def _report(
        self, taken: tuple[int, StepMetrics, StepRecord | None], eval_loss: float | None = None
    ) -> None:
        """Writes what a step has to tell: its record first, then its row."""
        step, last, record = jax.device_get(taken)
        config, log, writer = self.config, self.run.log, self.run.writer
        if writer and step > len(self.records):
            if record:
                writer.append(step, ledger.REPLAYABLE, *record)
            else:
                nothing = np.full(config.zo.num_queries, np.nan, np.float32)
                writer.append(step, ledger.BACKPROP, 0, last.loss, nothing)
        self.diverged |= bool(0 < config.train.max_skipped <= last.skipped_in_row)
        self._show(step, last)
        logged = step % config.train.log_interval == 0 or step == config.train.num_steps
        if step > log.last_row and (logged or eval_loss is not None):
            row = self._row_of(step) | {
                "current_lr": float(last.learning_rate),
                "loss": float(last.loss),
                "grad_norm": float(last.grad_norm),
                "skipped_steps": int(last.num_skipped),
            }
            if not np.isnan(last.cosine_target):
                row["instruct_cosine_target"] = float(last.cosine_target)
                row["instruct_noise_scale"] = float(last.noise_scale)
            log.write(row | ({} if eval_loss is None else {"eval_loss": eval_loss}))

    def _evaluate(self) -> None:
        """Writes the validation loss, unless that was done before an interruption, and keeps a snapshot if it is due."""
        log = self.run.log
        if self.step > log.last_row:
            eval_loss = self.evaluate_params(self.state.params)
            if self.step == 0:
                log.write(self._row_of(0) | {"eval_loss": eval_loss})
                self._say(f"validation loss before training: {eval_loss:.6f} nats per token")
            else:
                self._flush(eval_loss)
        snapshots, delta = self.run.snapshots, self.config.train.snapshot_delta
        if snapshots and self.step in log.eval_losses and self.step not in snapshots.steps:
            until = lambda end: [log.eval_losses[s] for s in sorted(log.eval_losses) if s < end]
            if _level(until(self.step + 1), delta) > _level(until(self.step), delta):
                snapshots.save(self.step, self.state)

    def _flush(self, eval_loss: float | None = None) -> None:
        if self.pending:
            self._report(self.pending, eval_loss)
            self.pending = None

    def _is_due(self) -> bool:
        train = self.config.train
        minutes = (time.monotonic() - self.saved_at) / 60
        return bool(
            (train.checkpoint_interval and self.step % train.checkpoint_interval == 0)
            or (train.checkpoint_minutes and minutes >= train.checkpoint_minutes)
        )

    def _save(self, wait: bool) -> None:
        """Rows, records and snapshots first: then a checkpoint never knows more than they do."""
        run, checkpoints = self.run, self.run.checkpoints
        self._flush()
        run.workdir.check()
        run.log.sync()
        if run.writer:
            run.writer.sync()
        if run.snapshots:
            run.snapshots.wait()
        self.saved_at = time.monotonic()
        before = checkpoints.save(self.step, self.state)
        for done in (before, checkpoints.wait() if wait else None):
            if done is not None:
                self._say(f"saved the checkpoint of step {done}")

    def _stopped(self, reason: str) -> signals.RunStopped:
        folder = self.run.workdir.path
        if self.diverged:
            optimizer, zo = self.config.optimizer, self.config.zo
            return signals.Diverged(
                f"the last {self.config.train.max_skipped} steps had no finite loss; the run is saved at step "
                f"{self.step} in {folder}. Begin another with a lower optimizer.learning_rate (now "
                f"{optimizer.learning_rate:g}) or zo.epsilon (now {zo.epsilon:g}), or go on with a higher "
                "train.max_skipped"
            )
        return signals.Interrupted(
            f"{reason}: the run is saved at step {self.step} in {folder}; the same command goes on"
        )

    def _row_of(self, step: int) -> dict[str, Any]:
        num_blocks, block_size = self.corpus.train_NT.shape
        return describe.make_row(self.config, step, num_blocks, block_size)

    def _show(self, step: int, last: StepMetrics) -> None:
        # Compilation is in the first step, and not in the rate.
        self.began = self.began or time.monotonic()
        blocks = describe.blocks_until(self.config, step) - describe.blocks_until(
            self.config, self.start + 1
        )
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = blocks * self.corpus.train_NT.shape[1] / seconds
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(
            f"loss {last.loss:.4f}, lr {last.learning_rate:.2e}, |g| {last.grad_norm:.3g}, "
            f"{rate:,.0f} tokens/s, {describe.passes_until(self.config, step):,} passes",
            refresh=False,
        )

    def _say(self, text: str) -> None:
        if processes.is_first():
            self.bar.write(text)
            sys.stdout.flush()


def _level(eval_losses: list[float], delta: float) -> int:
    """By how many times `delta` the loss has fallen below the first."""
    losses = [loss for loss in eval_losses if np.isfinite(loss)]
    return int((losses[0] - min(losses)) / delta) if losses else 0
