"""Decay towards the parameters that training began with, against forgetting.

With decoupled weight decay (Loshchilov and Hutter, 2019) a step takes η λ θ from the parameters;
here it takes η λ (θ - θ₀), so that what the objective does not ask for stays what it was.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class AnchorState(NamedTuple):
    """State of `anchor`.

    Attributes:
      count: int32, steps taken.
      start: the parameters at the first step, as they came.
    """

    count: jax.Array
    start: Any


def anchor(
    strength: float, learning_rate: float | Callable[[jax.Array], Any]
) -> optax.GradientTransformation:
    """Adds -η λ (θ - θ₀) to the updates, for the last place in an optax chain.

    The state holds a copy of the parameters that `init` is given. With parameters of 16 bits, sum
    with `Update`, which rounds without bias: a decay below half their spacing would be lost.

    Args:
      strength: λ, finite and at least 0.
      learning_rate: η, a number or a schedule of the steps taken.

    Raises:
      ValueError: the strength is out of range; or, from `update`, params are missing.

    >>> import jax.numpy as jnp, optax, zo_jax
    >>> tx = optax.chain(optax.sgd(0.1), zo_jax.anchor(0.5, 0.1))
    >>> state, params = tx.init(jnp.ones(2)), jnp.array([1.0, 3.0])
    >>> tx.update(jnp.zeros(2), state, params)[0]  # 0.1 · 0.5 · (3 - 1)
    Array([-0. , -0.1], dtype=float32)
    """
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength must be finite and at least 0; got {strength!r}")

    def init_fn(params: Any) -> AnchorState:
        start = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        return AnchorState(jnp.zeros((), jnp.int32), start)

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, AnchorState]:
        if params is None:
            raise ValueError(
                "anchor pulls parameters: pass them, as tx.update(grads, state, params)"
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        pulled = lambda u, p, start: u - rate * strength * (p - start).astype(u.dtype)
        updates = jax.tree.map(pulled, updates, params, state.start)
        return updates, AnchorState(jnp.asarray(optax.safe_increment(state.count)), state.start)

    return optax.GradientTransformation(init_fn, update_fn)


def distance(state: AnchorState, params: Any) -> jax.Array:
    """‖θ - θ₀‖ over all leaves, float32.

    >>> import jax.numpy as jnp, zo_jax
    >>> state = zo_jax.anchor(0.5, 0.1).init(jnp.zeros(2))
    >>> float(distance(state, jnp.array([3.0, 4.0])))
    5.0
    """
    change = lambda p, start: p.astype(jnp.float32) - start.astype(jnp.float32)
    return jnp.asarray(optax.global_norm(jax.tree.map(change, params, state.start)))
