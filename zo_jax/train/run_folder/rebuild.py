"""Rows and snapshots that a run has lost, made again by replay: from its seed or its checkpoints,
and its ledger.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from zo_jax.layout import Layout
from zo_jax.ledger import Ledger
from zo_jax.replay import arguments
from zo_jax.train.run_state import RunState, StepMetrics


class Past(NamedTuple):
    """What replay needs to take the steps of a run again.

    Attributes:
      ledger: of the run, if it has one.
      starts: steps whose states `load` gives, 0 among them.
      load: the state after one of them.
      make_update: makes the update of training, which donates the state.
      layout: the run's.
    """

    ledger: Ledger | None
    starts: list[int]
    load: Callable[[int], RunState]
    make_update: Callable[[], Callable[..., tuple[RunState, StepMetrics]]]
    layout: Layout | None

    def visit(
        self, steps: list[int], call: Callable[[int, RunState, StepMetrics | None], None]
    ) -> None:
        """Calls a function with (step, the state after it, what it told or None before the first)
        where replay reaches.

        Args:
          steps: ascending.
          call: must leave the state as it is.
        """
        update = self.make_update() if self.ledger and steps else None
        state, position = self.load(0), 0
        for step in steps:
            start = self._find_start(step)
            if start is None:
                continue
            if position < start:
                state, position = self.load(start), start
            told = None
            if self.ledger and update:
                for record in self.ledger.records[position:step]:
                    state, told = update(state, *arguments(record, self.layout))
            position = step
            call(step, state, jax.device_get(told))

    def _find_start(self, step: int) -> int | None:
        """The latest state from which replay makes a step again; None if there is none."""
        if step == 0:
            return 0
        ledger = self.ledger
        usable = [s for s in self.starts if s < step and ledger and ledger.replayable(s) >= step]
        return max(usable, default=None)
