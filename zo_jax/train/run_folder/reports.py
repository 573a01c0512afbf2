"""What a run writes at which step: rows, validation losses, snapshots. Known exactly, so that what
is missing is known too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from zo_jax.train import describe
from zo_jax.train.config import Config
from zo_jax.train.run_state import StepMetrics
from zo_jax.train.tasks.task import MEASURES, Task

# What evaluations have measured, by step.
Results = Mapping[int, Mapping[str, float]]


class Interval(NamedTuple):
    """What held for the steps past `after_step`, until the next one's."""

    after_step: int
    log_interval: int
    eval_interval: int
    num_steps: int
    snapshot_delta: float


class Reports:
    """What the steps of a run write: its settings, and those that it had before it went on with
    others.
    """

    def __init__(self, intervals: list[Interval]):
        self.intervals = intervals

    def go_on(self, config: Config, step: int) -> "Reports":
        """These, with the settings of the configuration from a step on."""
        train = config.train
        new = Interval(
            step, train.log_interval, train.eval_interval, train.num_steps, train.snapshot_delta
        )
        before = [interval for interval in self.intervals if interval.after_step < step]
        return Reports(before if before and before[-1][1:] == new[1:] else [*before, new])

    def has_evaluation(self, step: int) -> bool:
        """Whether the validation loss after a step is told."""
        interval = self._at(step)
        return step % interval.eval_interval == 0 or step == interval.num_steps

    def has_row(self, step: int) -> bool:
        """Whether a step has a row in metrics.csv."""
        return step % self._at(step).log_interval == 0 or self.has_evaluation(step)

    def has_snapshot(self, step: int, results: Results) -> bool:
        """Whether the validation loss has at this step fallen by as much more as makes a
        snapshot.
        """
        delta = self._at(step).snapshot_delta
        if not delta or step not in results:
            return False
        until = lambda end: [results[s]["eval_loss"] for s in sorted(results) if s < end]
        return _level(until(step + 1), delta) > _level(until(step), delta)

    @staticmethod
    def best_step(measure: str, results: Results) -> int:
        """The step, the first of equal ones, of the best result; -1 if there is none."""
        sign = 1 if MEASURES[measure] else -1
        steps = [step for step in sorted(results) if np.isfinite(results[step][measure])]
        return max(steps, key=lambda s: sign * results[s][measure], default=-1)

    def _at(self, step: int) -> Interval:
        return next(x for x in reversed(self.intervals) if x.after_step < step or not x.after_step)


def make_row(
    config: Config,
    task: Task,
    step: int,
    last: StepMetrics | None,
    results: Mapping[str, float] | None,
) -> dict[str, Any]:
    """The row of a step, from what it told (None: before the first), and what an evaluation after
    it has measured, if there was one.
    """
    row = describe.make_row(config, step, task.num_examples, task.tokens_per_example)
    if last is not None:
        row |= {
            "current_lr": float(last.learning_rate),
            "loss": float(last.loss),
            "grad_norm": float(last.grad_norm),
            "skipped_steps": int(last.num_skipped),
        }
        if not np.isnan(last.cosine_target):
            row["instruct_cosine_target"] = float(last.cosine_target)
            row["instruct_noise_scale"] = float(last.noise_scale)
        if config.objective.name != "loss":
            row |= {"reward": 0.0 - float(last.loss), "flat_steps": int(last.num_flat)}
            # Its record does not have it: replay leaves it out.
            if not np.isnan(last.best_score):
                row["best_reward"] = float(last.best_score)
        if config.optimizer.anchor:
            row["drift"] = float(last.drift)
    return row | dict(results or {})


def _level(eval_losses: list[float], delta: float) -> int:
    """By how many times `delta` the loss has fallen below the first."""
    losses = [loss for loss in eval_losses if np.isfinite(loss)]
    return int((losses[0] - min(losses)) / delta) if losses else 0
