"""The loop: a step, what it tells, and what is due after it.

A run that goes on takes its first steps from the ledger, through the same code: replayed steps get
the rows and snapshots that are missing, and no others.
"""

import time
from typing import Any

import jax

from zo_jax.replay import arguments
from zo_jax.train import processes, signals
from zo_jax.train.activation_cache import ActivationCache
from zo_jax.train.choices import scope_of
from zo_jax.train.config import Config
from zo_jax.train.evolve import make_population_step
from zo_jax.train.report import Report, Taken
from zo_jax.train.rewards.pool import RewardFailed
from zo_jax.train.run_folder.resume import Run
from zo_jax.train.run_state import RunState
from zo_jax.train.steps import make_train_step, make_update
from zo_jax.train.tasks.task import Task


class Loop:
    """A run between two steps.

    Attributes:
      state: after the steps taken so far.
      step: their number.
    """

    def __init__(
        self,
        config: Config,
        model: Any,
        task: Task,
        run: Run,
    ):
        self.config, self.task, self.run = config, task, run
        self.state, self.records = run.state, run.records
        self.step = int(self.state.step)
        self.report = Report(config, task, run)
        loss = task.loss
        self.cache = None
        if config.train.keep_activations:
            is_backprop = config.mode == "fo"
            scope = scope_of(config, model)
            loss = self.cache = ActivationCache(task.loss, scope, keep_vjp=is_backprop)
        if config.objective.name == "loss":
            self.train_step = make_train_step(config, model, run.layout, loss)
        else:
            self.train_step = make_population_step(config, model, task, run.layout)
        self.update = (
            make_update(config, model, run.layout) if len(self.records) > self.step else None
        )
        self.saved_at = time.monotonic()

    def finish(self) -> RunState:
        """Takes the steps that are left.

        Raises:
          Interrupted, Diverged, RewardFailed: all is saved.
          OSError: the run folder; `state` and `step` are of the last step taken, and the log has
            all that they told.
        """
        try:
            self._take_steps()
        except RewardFailed:
            if self.step:
                self._save(wait=True)
            raise
        except OSError:
            self.report.settle(self.step, self.state)
            raise
        return self.state

    def _take_steps(self) -> None:
        num_steps, report = self.config.train.num_steps, self.report
        reports = self.run.workdir.reports
        # Several processes stop together, by JAX's preemption service, which catches SIGTERM.
        catch = signals.catch_signals if jax.process_count() == 1 else processes.forward_interrupts
        with report.progress, catch() as signal:
            if self.step == 0:
                report.evaluate(0, self.state)
            while self.step < num_steps:
                replayed = self.step < len(self.records)
                taken = self._take_step(replayed)
                self.step += 1
                report.take(taken)
                at_end = self.step == num_steps
                stop = signal(self.step) or ("no finite loss" if report.diverged else None)
                if reports.has_evaluation(self.step) or at_end:
                    report.evaluate(self.step, self.state)
                if at_end or stop or (not replayed and self._is_due()):
                    self._save(wait=bool(at_end or stop))
                else:
                    report.tell_saved(self.run.checkpoints.finished())
                if stop and not at_end:
                    raise self._stopped(stop)

    def _take_step(self, replayed: bool) -> Taken:
        if replayed and self.update:
            record = self.records[self.step]
            self.state, new = self.update(self.state, *arguments(record, self.run.layout))
            return Taken(self.step + 1, new, None)
        batches = self.task.batches(self.step, self.run.layout)
        if self.cache:
            params = self.state.params
            batches = [x and self.cache.of(params, x) for x in batches]
        self.state, new, record = self.train_step(self.state, self.step, *batches)
        return Taken(self.step + 1, new, record)

    def _is_due(self) -> bool:
        train = self.config.train
        if train.checkpoint_interval and self.step % train.checkpoint_interval == 0:
            return True
        if not train.checkpoint_minutes:
            return False
        # Several processes write a checkpoint together, so that one clock counts.
        return processes.first_tells(
            lambda: time.monotonic() - self.saved_at >= 60 * train.checkpoint_minutes
        )

    def _save(self, wait: bool) -> None:
        """Rows, records and snapshots first: then a checkpoint never knows more than they do."""
        run, checkpoints = self.run, self.run.checkpoints
        self.report.flush()
        run.workdir.check()
        run.log.sync()
        if run.writer:
            run.writer.sync()
        for kept in (run.snapshots, run.best):
            if kept:
                kept.wait()
        self.saved_at = time.monotonic()
        self.report.tell_saved(checkpoints.save(self.step, self.state))
        if wait:
            self.report.tell_saved(checkpoints.wait())

    def _stopped(self, reason: str) -> signals.RunStopped:
        folder = self.run.workdir.path
        if self.report.diverged:
            optimizer, zo = self.config.optimizer, self.config.zo
            return signals.Diverged(
                f"the last {self.config.train.max_skipped} steps had no finite loss; the run is "
                f"saved at step "
                f"{self.step} in {folder}. Begin another with a lower optimizer.learning_rate (now "
                f"{optimizer.learning_rate:g}) or zo.epsilon (now {zo.epsilon:g}), or go on with a "
                f"higher "
                "train.max_skipped"
            )
        return signals.Interrupted(
            f"{reason}: the run is saved at step {self.step} in {folder}; the same command goes on"
        )
