"""Optimisers and learning rates by name: optax's, and MuDaMW."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zo_jax.anchor import anchor
from zo_jax.mudamw import matrices, mudamw
from zo_jax.train.config import OptimizerConfig
from zo_jax.trees import Subset


class Turns(NamedTuple):
    """States of the optimisers of two kinds of steps.

    Attributes:
      estimates: of steps along directions.
      gradients: of steps along backprop gradients.
    """

    estimates: Any
    gradients: Any


def make_schedule(config: OptimizerConfig, num_steps: int) -> Callable[[Any], Any]:
    """Learning rate of a step counted from 0, float32: constant, or warm-up to the peak and cosine
    decay.

    With t counted from 1 and w steps of warm-up: η t / w up to t = w, then the cosine of
    `optax.cosine_decay_schedule` to `min_learning_rate` at the last step.

    Args:
      config: a validated configuration.
      num_steps: of the run.
    """
    if config.schedule == "constant":
        return lambda step: jnp.full_like(step, config.learning_rate, jnp.float32)
    cosine = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=num_steps,
        end_value=config.min_learning_rate,
    )
    return lambda step: cosine(step + 1)  # so that the first step moves


def make_optimizer(
    config: OptimizerConfig, num_steps: int, scaled: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """The optimiser that a validated configuration names, for a run of so many steps; with an
    anchor, the last part of the chain is that.

    Args:
      config: a validated configuration.
      num_steps: of the run.
      scaled: what is made of its updates, as `scale_part`.
    """
    schedule = make_schedule(config, num_steps)
    optimizer = _make_optimizer(config, schedule)
    if scaled:
        optimizer = optax.chain(optimizer, scaled)
    return _anchored(optimizer, config, schedule)


def make_optimizer_in_turns(
    config: OptimizerConfig, num_steps: int, interval: int, rate: float, is_gradient: bool
) -> optax.GradientTransformation:
    """Of a run in which every `interval`-th step is along a gradient, the others along estimates:
    the optimiser of one kind of steps.

    Both kinds have moments of their own. Estimates are √(d / q) times as long as the gradient, so
    that in moments of both kinds a gradient would hardly count.

    Args:
      config: a validated configuration.
      num_steps: of the run, of both kinds.
      interval: from one gradient to the next.
      rate: learning rate of steps along gradients, over that of estimates.
      is_gradient: which kind; a step of one leaves the other's state as it is.
    """
    whole = make_schedule(config, num_steps)
    # Each optimiser counts its own steps.
    of_estimates = _make_optimizer(config, lambda n: whole(n * interval / max(1, interval - 1)))
    of_gradients = _make_optimizer(config, lambda n: rate * whole((n + 1) * interval - 1))

    def init(params: Any) -> Turns:
        return Turns(of_estimates.init(params), of_gradients.init(params))

    def update(gradient: Any, state: Turns, params: Any = None) -> tuple[Any, Turns]:
        if is_gradient:
            updates, own = of_gradients.update(gradient, state.gradients, params)
            return updates, state._replace(gradients=own)
        updates, own = of_estimates.update(gradient, state.estimates, params)
        return updates, state._replace(estimates=own)

    return _anchored(optax.GradientTransformation(init, update), config, whole)


def _anchored(
    optimizer: optax.GradientTransformation, config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    if not config.anchor:
        return optimizer
    return optax.chain(optimizer, anchor(config.anchor, schedule))


def scale_part(part: Subset, factor: float) -> optax.GradientTransformation:
    """Updates with those of a part of the parameters times a factor: after an optimiser, a learning
    rate of its own for that part.
    """

    def scale(updates: Any, params: Any) -> Any:
        del params
        scaled = jax.tree.map(lambda x: factor * x, part.select(updates))
        return part.merge(updates, scaled)

    return optax.stateless(scale)


def _make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    moments: dict[str, Any] = dict(b1=config.b1, b2=config.b2, eps=config.eps)
    decay: dict[str, Any] = dict(weight_decay=config.weight_decay, mask=matrices)

    def orthogonalized(params: Any) -> Any:
        return matrices(params, config.orthogonalize_embedding)

    if config.name == "sgd":
        return optax.sgd(schedule, momentum=config.momentum or None)
    if config.name == "adam":
        return optax.adam(schedule, **moments)
    if config.name == "adamw":
        return optax.adamw(schedule, **moments, **decay)
    if config.name == "mudamw":
        return mudamw(
            schedule, **moments, **decay, cautious=config.cautious, matrix_mask=orthogonalized
        )
    rest = schedule  # of what Muon leaves to Adam
    if config.adam_learning_rate:
        ratio = config.adam_learning_rate / config.learning_rate
        rest = lambda step: ratio * schedule(step)
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def dimensions_of(params: Any) -> Any:
        return jax.tree.map(lambda yes: dimensions if yes else None, orthogonalized(params))

    return optax.contrib.muon(
        schedule,
        adam_learning_rate=rest,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        weight_decay_mask=matrices,
        muon_weight_dimension_numbers=dimensions_of,
    )
