"""Rows and snapshots that a run has lost, made again by replay: from its seed or its checkpoints, and its ledger."""

from collections.abc import Callable, Iterable

import jax

from zo_jax.layout import Layout
from zo_jax.ledger import Ledger
from zo_jax.replay import arguments
from zo_jax.train.steps import RunState, StepMetrics


def find_start(ledger: Ledger | None, starts: Iterable[int], step: int) -> int | None:
    """The latest of the steps whose states are at hand from which replay makes a step again; None if there is none."""
    if step == 0:
        return 0
    usable = [s for s in starts if s < step and ledger and ledger.replayable(s) >= step]
    return max(usable, default=None)


def visit_steps(
    steps: list[int],
    ledger: Ledger | None,
    starts: list[int],
    load: Callable[[int], RunState],
    update: Callable[..., tuple[RunState, StepMetrics]],
    layout: Layout | None,
    visit: Callable[[int, RunState, StepMetrics | None], None],
) -> None:
    """Calls `visit` with (step, the state after it, what it told or None before the first) for steps that can be made again.

    Args:
      steps: ascending.
      ledger: of the run, if it has one.
      starts: steps whose states `load` gives.
      update: that of training, which donates the state.
      layout: the run's.
    """
    state, position = None, -1
    for step in steps:
        start = find_start(ledger, starts, step)
        if start is None:
            continue
        if position < start:
            state, position = load(start), start
        told = None
        for record in ledger.records[position:step] if ledger else ():
            state, told = update(state, *arguments(record, layout))
        position = step
        visit(step, state, jax.device_get(told))
