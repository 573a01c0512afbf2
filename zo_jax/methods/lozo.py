"""LOZO: low-rank directions of which one factor is kept, and momentum of the other.

Chen et al., "Enhancing zeroth-order fine-tuning for language models with low-rank structures",
arXiv 2410.07698. For a matrix [A, B], with U [A, r] fresh and V [B, r] kept for ν steps, both of
normal numbers,

    c = (L(θ + ε U Vᵀ) - L(θ - ε U Vᵀ)) / 2 ε,   g = c U Vᵀ / r.

Directions here have unit variance, z = U Vᵀ / √r, so g = c z, and ε is that of z: √r times the
paper's. Other leaves get normal numbers. LOZO-M, with β > 0, has momentum of c U alone, which a new
V takes over by projection:

    N = β N + (1 - β) c U,   g = N Vᵀ / r,   N ← N V_oldᵀ V_new / B  when V changes.

r = 2 to 8 and ν = 50 to 100 in its runs. Passes a step: 2 q. Memory beside the parameters: none, as
V is drawn again from its key; for LOZO-M, N [A, r] a matrix, and other leaves' own size.
"""

import dataclasses
import math
from typing import Any

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
class LozoDirections(Subspace):
    """U Vᵀ / √r with V kept; coordinates are U."""

    def coordinates_shape(self, leaf):
        return (*leaf.shape[:-1], self.rank)

    def factors(self, kept, x):
        return x / math.sqrt(self.rank), kept


@dataclasses.dataclass(frozen=True)
class Lozo(Method):
    """LOZO, and with `decay` LOZO-M.

    Attributes:
      rank: r.
      period: ν, steps for which V is kept.
      decay: β; 0 for no momentum.

    Raises:
      ValueError: an option is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.Lozo(rank=2).transformation(jax.random.key(0))
    >>> params = {"w": jnp.ones((6, 5)), "b": jnp.ones(5)}
    >>> loss_fn = lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["b"] ** 2)
    >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss_fn)
    >>> int(jnp.linalg.matrix_rank(updates["w"])), state.memory
    (2, ())
    """

    estimator: Estimator = Estimator(num_queries=1)
    rank: int = 2
    period: int = 50
    decay: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require_positive("rank", self.rank)
        require_positive("period", self.period)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")

    def family(self, params: Any, memory: Any, step: Step) -> LozoDirections:
        draw = lambda key, leaf: normal_columns(key, leaf, -1, self.rank)
        key = step.lasting(self.period)
        return LozoDirections(keep_factors(params, key, self.rank, draw), self.rank)

    def init(self, params: Any) -> Any:
        if not self.decay:
            return ()
        return self.family(params, (), FIRST).zero_coordinates(params)

    def combine(self, params, memory, step, numbers):
        if not self.decay:
            return super().combine(params, memory, step, numbers)
        estimator = self.at(params, memory, step)
        family: Any = estimator.family
        # In the first step there is nothing that another V could have left behind.
        before = self.family(params, memory, step._replace(count=jnp.maximum(step.count - 1, 0)))
        is_new = (step.count > 0) & (step.count % self.period == 0)
        keys = estimator.keys(step.key)
        fresh = family.sum_of_coordinates(params, keys, self.weights(numbers, estimator.epsilon))

        def next_momentum(momentum, old, new, x):
            if new is not None:
                projected = momentum @ (jnp.swapaxes(old, -1, -2) @ new) / new.shape[-2]
                momentum = jnp.where(is_new, projected, momentum)
            return (self.decay * momentum + (1 - self.decay) * x).astype(x.dtype)

        memory = [*map(next_momentum, memory, before.kept, family.kept, fresh)]
        return like_params(params, family.lift(memory)), memory
