"""What a step does to a run once its forward passes are done: a function of the key and the projections.

A run replays bit for bit because training and replay call the same compiled `update`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import optax

from zo_jax import instruct, noise
from zo_jax.directions import Perturbation
from zo_jax.estimators import mean_weights
from zo_jax.scopes import FULL, Scope
from zo_jax.sharding import Layout

# No entry of a direction is larger.
_LARGEST_ENTRY = 1e3


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
    opt_state = optimizer.init(_as_float32(scope.select(params)))
    return TrainState(zero(), params, opt_state, zero(), zero(), instruct.new_history())


def make_update(
    optimizer: optax.GradientTransformation,
    perturbation: Perturbation,
    *,
    scope: Scope = FULL,
    clip_norm: float = 0.0,
    rounding: str = "stochastic",
    layout: Layout | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted optimisation of a step: (state, key, loss, projections [q]) -> (state, metrics).

    ĝ = 1/q Σ cᵢ zᵢ is summed again from the key; the data has no part in it but the projections c. If none of them is finite
    the step changes nothing, but is counted. The state is donated.

    Args:
      optimizer: an optax transformation, of gradients.
      perturbation: the family of the directions z.
      scope: the parameters that are trained.
      clip_norm: largest global norm of ĝ (0: any).
      rounding: of parameters that are not float32, "stochastic" or "nearest"; see `apply`.
      layout: where the state lives; each device then sums and applies what it holds.

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
        weights = mean_weights(projections_q)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), scope.select(state.params)
        )
        family = perturbation.on(layout)
        gradient, norm = family.combine_with_norm(shapes, keys, weights)
        if clip_norm:
            gradient, norm = clip(gradient, clip_norm), jnp.minimum(norm, clip_norm)
        # Told without the gradient, whose leaves can then be made and applied one by one.
        usable = jnp.any(jnp.isfinite(projections_q))
        usable &= jnp.isfinite(_LARGEST_ENTRY * jnp.sum(jnp.abs(weights)))
        new, metrics = descend(optimizer, scope, state, loss, gradient, norm, usable, key, rounding)
        return (new if layout is None else layout.constrain(new)), metrics

    return jax.jit(update, donate_argnums=0)


def descend(
    optimizer: optax.GradientTransformation,
    scope: Scope,
    state: TrainState,
    loss: jax.Array,
    gradient: Any,
    grad_norm: jax.Array,
    usable: jax.Array,
    key: jax.Array,
    rounding: str,
) -> tuple[TrainState, StepMetrics]:
    """One optimiser step, or, if the gradient is not usable, only the count of it.

    The optimiser works in float32 whatever the dtype of the parameters: a second moment in bfloat16 could not decay.
    """
    gradient = _as_float32(gradient)
    old = scope.select(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, _as_float32(old))
    trained = apply(old, updates, key, rounding)
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


def apply(params: Any, updates: Any, key: jax.Array, rounding: str = "stochastic") -> Any:
    """params + updates, summed in float32 and rounded to the dtypes of params.

    "nearest" loses updates below half the spacing of the parameters. "stochastic" rounds up or down with the chances that
    make the result right on average (Gupta et al., "Deep learning with limited numerical precision", 2015), by 16 random
    bits an entry from the key.

    >>> import jax, jax.numpy as jnp
    >>> p, u = jnp.ones(10_000, jnp.bfloat16), jnp.full(10_000, 1e-4)
    >>> mean = lambda x: round(float(jnp.mean(x.astype(jnp.float32))) - 1, 5)
    >>> mean(apply(p, u, jax.random.key(0), "nearest")), abs(mean(apply(p, u, jax.random.key(0))) - 1e-4) < 3e-5
    (0.0, True)
    """

    def of_leaf(path: Any, p: jax.Array, u: jax.Array) -> jax.Array:
        exact = p.astype(jnp.float32) + u
        near = exact.astype(p.dtype)
        if rounding == "nearest" or p.dtype == jnp.float32:
            return near
        # One stream a leaf, named by its path, so that it does not depend on what else is trained.
        name = zlib.crc32(jax.tree_util.keystr(path).encode())
        bits = noise.rounding_bits(jax.random.key_data(jax.random.fold_in(key, name)), p.shape)
        if (
            p.dtype == jnp.bfloat16
        ):  # the upper half of float32: a carry out of the lower half rounds up
            whole = lax.bitcast_convert_type(exact, jnp.uint32) + (bits >> 16)
            up_or_down = lax.bitcast_convert_type(whole & jnp.uint32(0xFFFF0000), jnp.float32)
            return jnp.where(jnp.isfinite(exact), up_or_down, exact).astype(p.dtype)
        error = exact - near.astype(jnp.float32)
        toward = jnp.where(error > 0, jnp.inf, -jnp.inf).astype(p.dtype)
        other = jnp.nextafter(near, toward)
        gap = jnp.abs(other.astype(jnp.float32) - near.astype(jnp.float32))
        chance = jnp.where(error == 0, 0, jnp.abs(error) / gap)
        return jnp.where(((bits >> 16).astype(jnp.float32) + 0.5) * 2**-16 < chance, other, near)

    return jax.tree.map_with_path(of_leaf, params, updates)


def _as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def clip(gradient: Any, norm: float) -> Any:
    """The gradient with its global norm brought down to `norm`, unless that is 0."""
    if not norm:
        return gradient
    size = jnp.sqrt(instruct.tree_dot(gradient, gradient))
    factor = jnp.minimum(1.0, norm / jnp.maximum(size, instruct.MIN_NORM))
    return jax.tree.map(lambda g: (factor * g).astype(g.dtype), gradient)
