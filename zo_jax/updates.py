"""What a step does to a run once its forward passes are done: a function of the key and the projections.

A run replays bit for bit because training and replay call the same compiled `update`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zo_jax import instruct
from zo_jax.estimators import mean_weights
from zo_jax.perturbations import Perturbation
from zo_jax.scopes import FULL, Scope


class TrainState(NamedTuple):
    """All that a run changes. Keys and batches are functions of the seed and the step.

    Attributes:
      step: int32, steps taken.
      params: the model's parameters.
      opt_state: optax's state, of the parameters that are trained.
      num_skipped: int32, those of the steps that changed nothing, for want of a finite loss.
      skipped_in_row: int32, those of them since the last step that changed something.
      history: of the losses.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    num_skipped: jax.Array
    skipped_in_row: jax.Array
    history: instruct.LossHistory


class StepMetrics(NamedTuple):
    """Scalars of one step, nan where it has no such thing.

    Attributes:
      loss, grad_norm: float32.
      num_updates: int32, steps of the optimiser before this one, of which its schedule is a function.
      num_skipped, skipped_in_row: as in `TrainState`, after this step.
      cosine_target, noise_scale: float32, of guided directions.
    """

    loss: jax.Array
    grad_norm: jax.Array
    num_updates: jax.Array
    num_skipped: jax.Array
    skipped_in_row: jax.Array
    cosine_target: jax.Array
    noise_scale: jax.Array


def new_state(
    params: Any, optimizer: optax.GradientTransformation, scope: Scope = FULL
) -> TrainState:
    """The state before the first step."""
    zero = lambda: jnp.zeros((), jnp.int32)
    opt_state = optimizer.init(scope.select(params))
    return TrainState(zero(), params, opt_state, zero(), zero(), instruct.new_history())


def make_update(
    optimizer: optax.GradientTransformation,
    perturbation: Perturbation,
    *,
    scope: Scope = FULL,
    clip_norm: float = 0.0,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted optimisation of a step: (state, key, loss, projections [q]) -> (state, metrics).

    ĝ = 1/q Σ cᵢ zᵢ is summed again from the key; the data has no part in it but the projections c. If none of them is finite
    the step changes nothing, but is counted. The state is donated.

    Args:
      optimizer: an optax transformation, of gradients.
      perturbation: the family of the directions z.
      scope: the parameters that are trained.
      clip_norm: largest global norm of ĝ (0: any).

    >>> import jax, jax.numpy as jnp, optax, zo_jax
    >>> loss_fn, params = lambda p: jnp.sum((p - 1) ** 2), jnp.zeros(4)
    >>> optimizer = optax.sgd(0.05)
    >>> state, update = new_state(params, optimizer), make_update(optimizer, zo_jax.rademacher())
    >>> for step in range(50):
    ...     key = jax.random.fold_in(jax.random.key(0), step)
    ...     state, _ = update(state, key, *zo_jax.project(loss_fn, state.params, key, num_queries=8))
    >>> bool(loss_fn(state.params) < 1e-2)
    True
    """

    def update(
        state: TrainState, key: jax.Array, loss: jax.Array, projections_q: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        keys = jax.random.split(key, len(projections_q))
        gradient = perturbation.combine(
            scope.select(state.params), keys, mean_weights(projections_q)
        )
        gradient = clip(gradient, clip_norm)
        usable = jnp.any(jnp.isfinite(projections_q))
        return descend(optimizer, scope, state, loss, gradient, usable)

    return jax.jit(update, donate_argnums=0)


def descend(
    optimizer: optax.GradientTransformation,
    scope: Scope,
    state: TrainState,
    loss: jax.Array,
    gradient: Any,
    usable: jax.Array,
) -> tuple[TrainState, StepMetrics]:
    """One optimiser step, or, if the gradient is not usable, only the count of it."""
    grad_norm = optax.global_norm(jax.tree.map(lambda x: x.astype(jnp.float32), gradient))
    usable &= jnp.isfinite(grad_norm)
    old = scope.select(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, old)
    trained = optax.apply_updates(old, updates)
    # Adam's momentum would move the parameters with a zero gradient too.
    trained, opt_state = jax.tree.map(
        lambda new, old: jnp.where(usable, new, old).astype(old.dtype),
        (trained, opt_state),
        (old, state.opt_state),
    )
    skipped = (~usable).astype(jnp.int32)
    new = TrainState(
        step=state.step + 1,
        params=scope.merge(state.params, trained),
        opt_state=opt_state,
        num_skipped=state.num_skipped + skipped,
        skipped_in_row=skipped * (state.skipped_in_row + 1),
        history=instruct.remember(state.history, loss),
    )
    nan = jnp.float32(jnp.nan)
    num_updates = state.step - state.num_skipped
    return new, StepMetrics(
        loss, grad_norm, num_updates, new.num_skipped, new.skipped_in_row, nan, nan
    )


def clip(gradient: Any, norm: float) -> Any:
    """The gradient with its global norm brought down to `norm`, unless that is 0."""
    if not norm:
        return gradient
    size = jnp.sqrt(instruct.tree_dot(gradient, gradient))
    factor = jnp.minimum(1.0, norm / jnp.maximum(size, instruct.MIN_NORM))
    return jax.tree.map(lambda g: (factor * g).astype(g.dtype), gradient)
