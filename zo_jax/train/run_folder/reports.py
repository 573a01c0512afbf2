"""What a run writes at which step: rows, validation losses, snapshots. Known exactly, so that what
is missing is known too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from zo_jax.train import describe
from zo_jax.train.config import Config
from zo_jax.train.steps import StepMetrics


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

    def has_snapshot(self, step: int, eval_losses: Mapping[int, float]) -> bool:
        """Whether the validation loss [by step] has at this step fallen by as much more as makes a
        snapshot.
        """
        delta = self._at(step).snapshot_delta
        if not delta or step not in eval_losses:
            return False
        until = lambda end: [eval_losses[s] for s in sorted(eval_losses) if s < end]
        return _level(until(step + 1), delta) > _level(until(step), delta)

    def _at(self, step: int) -> Interval:
        return next(x for x in reversed(self.intervals) if x.after_step < step or not x.after_step)


def make_row(
    config: Config,
    shape_NT: tuple[int, int],
    step: int,
    last: StepMetrics | None,
    eval_loss: float | None,
) -> dict[str, Any]:
    """The row of a step, whose training blocks have a shape [N, T], from what it told (None: before
    the first).
    """
    row = describe.make_row(config, step, *shape_NT)
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
    return row if eval_loss is None else row | {"eval_loss": eval_loss}


def _level(eval_losses: list[float], delta: float) -> int:
    """By how many times `delta` the loss has fallen below the first."""
    losses = [loss for loss in eval_losses if np.isfinite(loss)]
    return int((losses[0] - min(losses)) / delta) if losses else 0
