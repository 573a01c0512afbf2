"""Mode instruct: steps along directions that a backprop gradient guides, and their adaptive
schedule.

Formulas: the reference script of "Zeroth Order Optimization for Pretraining Language Models",
ICPRAM 2025.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zo_jax.family import Family
from zo_jax.guided import MIN_NORM, guided
from zo_jax.train.config import InstructConfig
from zo_jax.trees import tree_dot
from zo_jax.update import clip

# Steps whose mean loss the adaptive schedule looks at.
_LOSS_WINDOW = 10


class LossHistory(NamedTuple):
    """What the adaptive schedule remembers.

    Attributes:
      recent: float32 [10], the losses of the last steps, the latest last; inf before there were so
        many.
      lowest: float32, the lowest mean of ten so far.
    """

    recent: jax.Array
    lowest: jax.Array


def new_history() -> LossHistory:
    """The history before the first step."""
    return LossHistory(jnp.full(_LOSS_WINDOW, jnp.inf, jnp.float32), jnp.float32(jnp.inf))


def remember(history: LossHistory, loss: jax.Array) -> LossHistory:
    """The history after one more step; a loss that is not finite leaves it as it is."""
    recent = jnp.append(history.recent[1:], loss.astype(jnp.float32))
    recent = jnp.where(jnp.isfinite(loss), recent, history.recent)
    return LossHistory(recent, jnp.minimum(history.lowest, jnp.mean(recent)))


def adaptive_schedule(
    config: InstructConfig, history: LossHistory | None
) -> tuple[jax.Array, jax.Array]:
    """(cosine target, noise scale) for the losses so far, float32 scalars."""
    cosine, noise_scale = jnp.float32(config.cosine_target), jnp.float32(config.noise_scale)
    if history is None:
        return cosine, noise_scale
    fallen = (config.adaptive_start - history.lowest) / config.adaptive_interval
    k = jnp.where(history.lowest < config.adaptive_start, jnp.floor(fallen), 0)
    return (
        jnp.minimum(cosine + config.cosine_step * k, config.cosine_max),
        jnp.maximum(noise_scale - config.noise_step * k, config.noise_min),
    )


class Part(NamedTuple):
    """Some of a step's queries.

    Attributes:
      family: of their directions.
      key: of their keys.
      first, end: their range among all queries of the step.
      factor: of their estimate.
    """

    family: Family
    key: jax.Array
    first: int
    end: int
    factor: Any = 1.0


# (part) -> (mean loss of its finite queries, projections [n]).
ProjectPart = Callable[[Part], tuple[jax.Array, jax.Array]]


def estimate_guided(
    config: InstructConfig,
    backprop: Any,
    history: LossHistory | None,
    random: Family,
    key: jax.Array,
    num_queries: int,
    project_part: ProjectPart,
) -> tuple[jax.Array, Any, jax.Array, jax.Array]:
    """The estimate of a guided step: (loss, gradient, cosine target, noise scale).

    The first `num_guided` queries go along directions that the backprop gradient guides, the others
    along random ones. If the gradient is zero all do. The loss is nan if no query's was finite.

    Args:
      config: the settings of mode instruct.
      backprop: the gradient of the trained parameters.
      history: of the losses, where the schedule is adaptive.
      random: the family of the other directions.
      key: the step's.
      num_queries: q.
      project_part: the forward passes of some queries.
    """
    cosine, noise_scale = adaptive_schedule(config, history)
    num_guided = min(config.num_guided or num_queries, num_queries)

    norm = jnp.sqrt(tree_dot(backprop, backprop))
    # Along a direction as long as the gradient, c z goes with its third power.
    factor = 1 / jnp.maximum(norm, MIN_NORM) ** 2 if config.normalize else 1.0

    def along_guided():
        family = guided(backprop, cosine, noise_scale, config.method)
        parts = [Part(family, jax.random.fold_in(key, 0), 0, num_guided, factor)]
        if num_guided < num_queries:
            parts.append(Part(random, jax.random.fold_in(key, 1), num_guided, num_queries))
        return _mean_of(parts, backprop, project_part)

    def along_random():
        return _mean_of([Part(random, key, 0, num_queries)], backprop, project_part)

    loss, gradient = jax.lax.cond(norm > MIN_NORM, along_guided, along_random)
    gradient = clip(gradient, config.grad_clip_norm)
    b = config.blend_ratio
    blend = lambda zo, fo: ((1 - b) * zo + b * fo).astype(zo.dtype)
    return loss, jax.tree.map(blend, gradient, backprop), cosine, noise_scale


def _mean_of(parts: list[Part], like: Any, project_part: ProjectPart) -> tuple[jax.Array, Any]:
    """(mean loss, Σ c z over the number of finite queries) of all parts together."""
    projected = [project_part(part) for part in parts]
    finite = [jnp.isfinite(projections) for _, projections in projected]
    count = sum(jnp.sum(f) for f in finite)
    total = jnp.maximum(count, 1)
    losses = [
        jnp.where(jnp.any(f), loss * jnp.sum(f), 0)
        for (loss, _), f in zip(projected, finite, strict=True)
    ]
    sums = [
        part.family.combine(
            like, jax.random.split(part.key, len(c)), part.factor * jnp.where(f, c, 0) / total
        )
        for part, (_, c), f in zip(parts, projected, finite, strict=True)
    ]
    loss = jnp.where(count > 0, sum(losses) / total, jnp.nan)
    return loss, jax.tree.map(lambda *x: sum(x), *sums)
