"""Optimisers and learning rates by name: optax's, and MuDaMW."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zo_jax.anchor import anchor
from zo_jax.mudamw import matrices, mudamw
from zo_jax.train.config import OptimizerConfig
from zo_jax.trees import Subset


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
    optimizer = _make_optimizer(config, num_steps)
    if scaled:
        optimizer = optax.chain(optimizer, scaled)
    if not config.anchor:
        return optimizer
    return optax.chain(optimizer, anchor(config.anchor, make_schedule(config, num_steps)))


def scale_part(part: Subset, factor: float) -> optax.GradientTransformation:
    """Updates with those of a part of the parameters times a factor: after an optimiser, a learning
    rate of its own for that part.
    """

    def scale(updates: Any, params: Any) -> Any:
        del params
        scaled = jax.tree.map(lambda x: factor * x, part.select(updates))
        return part.merge(updates, scaled)

    return optax.stateless(scale)


def _make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    schedule = make_schedule(config, num_steps)
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
    ratio = (config.adam_learning_rate or config.learning_rate) / config.learning_rate
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def dimensions_of(params: Any) -> Any:
        return jax.tree.map(lambda yes: dimensions if yes else None, orthogonalized(params))

    return optax.contrib.muon(
        schedule,
        adam_learning_rate=lambda step: ratio * schedule(step),
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        weight_decay_mask=matrices,
        muon_weight_dimension_numbers=dimensions_of,
    )
