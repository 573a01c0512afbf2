"""Losses on both sides of the parameters and at them: slope and curvature along directions."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.estimators import Estimator


def slopes_and_curvatures(
    estimator: Estimator, loss_fn: Callable[..., Any], params: Any, key: jax.Array, *batch: Any
) -> tuple[jax.Array, jax.Array]:
    """(loss, numbers [2 q]): the slopes c [q], then the curvatures κ [q], of the directions.

        c = (L(θ + ε z) - L(θ - ε z)) / 2 ε,   κ = (L(θ + ε z) - 2 L(θ) + L(θ - ε z)) / ε²

    Both are nan where one of the losses is not finite. 2 q + 1 evaluations; with `batch_per_query`
    3 q, for each query has a loss at the parameters of its own.
    """
    epsilon = jnp.float32(estimator.epsilon)
    along = estimator.losses_along
    if estimator.batch_per_query:
        scales = jnp.stack([epsilon, -epsilon, jnp.float32(0)])
        plus, minus, base = along(loss_fn, params, key, scales, *batch).T
    else:
        scales = jnp.stack([epsilon, -epsilon])
        plus, minus = along(loss_fn, params, key, scales, *batch).T
        base = loss_at(estimator, loss_fn, params, key, *batch)
    slopes = (plus - minus) / (2 * epsilon)
    curvatures = (plus - 2 * base + minus) / epsilon**2
    finite = jnp.isfinite(slopes) & jnp.isfinite(curvatures)
    numbers = jnp.stack([jnp.where(finite, x, jnp.nan) for x in (slopes, curvatures)])
    total = jnp.sum(jnp.where(finite, (plus + minus) / 2, 0))
    loss = jnp.where(jnp.any(finite), total / jnp.maximum(jnp.sum(finite), 1), jnp.nan)
    return loss, numbers.reshape(-1)


def num_evaluations(estimator: Estimator) -> int:
    """Of `slopes_and_curvatures`."""
    q = estimator.num_queries
    return 3 * q if estimator.batch_per_query else 2 * q + 1


def loss_at(
    estimator: Estimator, loss_fn: Callable[..., Any], params: Any, key: jax.Array, *batch: Any
) -> jax.Array:
    """The loss at the parameters themselves, of a batch that all queries share."""
    one = dataclasses.replace(estimator, num_queries=1, mesh=None)
    return one.losses_along(loss_fn, params, key, jnp.zeros(1), *batch)[0, 0]
