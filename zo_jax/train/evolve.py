"""One step of a population: its members are scored, and the scores are the step's projections."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.layout import Layout
from zo_jax.train.config import Config
from zo_jax.train.run_state import RunState, StepMetrics, StepRecord
from zo_jax.train.steps import make_step_key, make_update


def make_population_step(
    config: Config, model: Any, task: Any, layout: Layout | None = None
) -> Callable[..., tuple[RunState, StepMetrics, StepRecord]]:
    """The step of an objective that is no loss: (state, step from 0, batch, None) -> (state,
    metrics, record).

    What is recorded as its loss is minus the mean score. From there on it is a step as any other:
    `update` takes it again from its record, and calls no reward.

    Args:
      config: resolved.
      model: a `train.pretrained.Pretrained`.
      task: with `strategy` and `make_score`, as `tasks.populations.Scored`.
      layout: of the devices that members are spread over; None for one.
    """
    step_key, update = make_step_key(config, layout), make_update(config, model, layout)
    words, score = jax.jit(jax.random.key_data), task.make_score(layout)
    everywhere = (lambda x: x) if layout is None else layout.put_everywhere

    @jax.jit
    def shape(scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(loss, best member's score, projections [q])."""
        scores_M = jnp.mean(scores.reshape(len(scores), -1), axis=1)
        return 0.0 - jnp.mean(scores_M), jnp.max(scores_M), task.strategy.projections(scores)

    def population_step(state, step, batch, fo_batch):
        del fo_batch
        key = step_key(step)
        loss, best, projections = shape(everywhere(score(state.params, key, batch)))
        new, metrics = update(state, key, loss, projections)
        metrics = metrics._replace(best_score=best)
        return new, metrics, StepRecord(words(key), loss, projections)

    return population_step
