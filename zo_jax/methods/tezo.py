"""TeZO: directions of which r numbers a matrix change from step to step.

Sun et al., "TeZO: empowering the low-rankness on the temporal dimension in the zeroth-order
optimization for fine-tuning LLMs", arXiv 2501.19057. For a matrix [A, B], with U [A, r] and V
[B, r] of normal numbers, drawn once, and τ [r] of fresh ones,

    z = U diag(τ) Vᵀ / √r,     g = c z.

The 1 / √r makes entries of unit variance. Other leaves get normal numbers. The momentum of TeZO-m
lives in r numbers a matrix:

    m = β m + (1 - β) c τ,     g = U diag(m) Vᵀ / √r.

Passes a step: 2 q. Memory beside the parameters: none, as U and V are drawn again from their key;
with momentum, r numbers a matrix and other leaves' own size. TeZO-Adam, whose second moment has the
squares of U and V, is not here.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.estimators import Estimator
from zo_jax.methods.method import FIRST, Method, Step, require_positive
from zo_jax.methods.subspace import (
    Subspace,
    keep_factors,
    like_params,
    normal_columns,
    subspace_family,
)


@subspace_family
class TezoDirections(Subspace):
    """U diag(τ) Vᵀ / √r with U and V kept; coordinates are τ [..., 1, r]."""

    def coordinates_shape(self, leaf):
        return (*leaf.shape[:-2], 1, self.rank)

    def factors(self, kept, x):
        u, v = kept
        return u * jnp.broadcast_to(x / math.sqrt(self.rank), u.shape), v


@dataclasses.dataclass(frozen=True)
class Tezo(Method):
    """TeZO, and with `decay` TeZO-m.

    Attributes:
      rank: r.
      decay: β; 0 for no momentum.

    Raises:
      ValueError: an option is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.Tezo(rank=3, decay=0.9).transformation(jax.random.key(0))
    >>> params = jnp.ones((6, 5))
    >>> updates, state = tx.update(None, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))
    >>> int(jnp.linalg.matrix_rank(updates)), state.memory[0].shape
    (3, (1, 3))
    """

    estimator: Estimator = Estimator(num_queries=1)
    rank: int = 24
    decay: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require_positive("rank", self.rank)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")

    def family(self, params: Any, memory: Any, step: Step) -> TezoDirections:
        def draw(key: jax.Array, leaf: Any) -> tuple[jax.Array, jax.Array]:
            rows, columns = jax.random.split(key)
            of = lambda key, axis: normal_columns(key, leaf, axis, self.rank)
            return of(rows, -2), of(columns, -1)

        return TezoDirections(keep_factors(params, step.lasting(None), self.rank, draw), self.rank)

    def init(self, params: Any) -> Any:
        if not self.decay:
            return ()
        return self.family(params, (), FIRST).zero_coordinates(params)

    def combine(self, params, memory, step, numbers):
        if not self.decay:
            return super().combine(params, memory, step, numbers)
        estimator = self.at(params, memory, step)
        family: Any = estimator.family
        keys = estimator.keys(step.key)
        fresh = family.sum_of_coordinates(params, keys, self.weights(numbers, estimator.epsilon))
        mean = lambda m, x: (self.decay * m + (1 - self.decay) * x).astype(x.dtype)
        memory = [*map(mean, memory, fresh)]
        return like_params(params, family.lift(memory)), memory
