"""ZO-MOPI: the momentum's few largest singular directions, found by power iterations.

"ZO-MOPI", arXiv 2605.09034: making all singular values of an estimate 1, as ZO-Muon does, raises
its noise; here only the k largest directions of a momentum stay. With P [A, r] and Ψᵢ [r, B] as in
ZO-Muon, G = (1/N) Σᵢ cᵢ Ψᵢ, and V [B, k] from the step before,

    M = β M + (1 - β) G,   V ← QR(Mᵀ M V),   U = M V with columns of norm 1,   θ ← θ - η P U Vᵀ.

A new P takes the momentum over by projection, M ← P_newᵀ P_old M. Other leaves get normal numbers
and their momentum. Passes a step: 2 N. Memory beside the parameters: (r + k) B numbers a matrix,
and other leaves' own size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.estimators import Estimator
from zo_jax.methods.method import FIRST, require_positive
from zo_jax.methods.subspace import keep_factors, like_params, orthonormal_columns
from zo_jax.methods.zo_muon import ZoMuon


@dataclasses.dataclass(frozen=True)
class Mopi(ZoMuon):
    """ZO-MOPI.

    Attributes:
      num_directions: k, at most r.
      decay: β.

    Raises:
      ValueError: an option is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.Mopi(rank=3, num_directions=1).transformation(jax.random.key(0))
    >>> params = jnp.ones((6, 5))
    >>> updates, _ = tx.update(None, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))
    >>> int(jnp.linalg.matrix_rank(updates)), round(float(jnp.linalg.norm(updates)), 3)
    (1, 1.0)
    """

    estimator: Estimator = Estimator(num_queries=4)
    num_directions: int = 8
    decay: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        require_positive("num_directions", self.num_directions)
        if self.num_directions > self.rank:
            raise ValueError(
                f"num_directions must be at most the rank {self.rank}, got {self.num_directions}"
            )
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")

    def init(self, params: Any) -> Any:
        """For each leaf its momentum, and V for matrices."""
        family = self.family(params, (), FIRST)
        k = self.num_directions
        draw = lambda key, leaf: orthonormal_columns(key, leaf, -1, k)
        first = keep_factors(params, jax.random.key(0), self.rank, draw)
        return list(zip(family.zero_coordinates(params), first, strict=True))

    def combine(self, params, memory, step, numbers):
        estimator = self.at(params, memory, step)
        family: Any = estimator.family
        before = self.family(params, memory, step._replace(count=jnp.maximum(step.count - 1, 0)))
        is_new = (step.count > 0) & (step.count % self.period == 0)
        weights = self.weights(numbers, estimator.epsilon)
        fresh = family.sum_of_coordinates(params, estimator.keys(step.key), weights)

        def next_memory(kept_before, kept, old, x):
            momentum, v = old
            if kept is not None:
                projected = jnp.swapaxes(kept, -1, -2) @ kept_before @ momentum
                momentum = jnp.where(is_new, projected, momentum)
            momentum = (self.decay * momentum + (1 - self.decay) * x).astype(x.dtype)
            return momentum, v if kept is None else _power_iteration(momentum, v)

        memory = [*map(next_memory, before.kept, family.kept, memory, fresh)]
        signs = [m if v is None else _partial_sign(m, v) for m, v in memory]
        return like_params(params, family.lift(signs)), memory


def _power_iteration(momentum: jax.Array, v: jax.Array) -> jax.Array:
    """V closer to the largest right singular directions; as it was where nothing is known."""
    moved = jnp.swapaxes(momentum, -1, -2) @ (momentum @ v)
    size = jnp.max(jnp.abs(moved), axis=(-2, -1), keepdims=True)
    new = jnp.linalg.qr(moved / jnp.where(size > 0, size, 1))[0]
    return jnp.where(size > 0, new, v)


def _partial_sign(momentum: jax.Array, v: jax.Array) -> jax.Array:
    """U Vᵀ, [..., r, B]."""
    u = momentum @ v
    norms = jnp.linalg.norm(u, axis=-2, keepdims=True)
    # A column that is rounding beside the largest is no direction.
    known = norms > 1e-6 * jnp.max(norms, axis=-1, keepdims=True)
    u = jnp.where(known, u / jnp.where(known, norms, 1), 0)
    return u @ jnp.swapaxes(v, -1, -2)
