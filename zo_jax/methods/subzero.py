"""SubZero: directions in a subspace of each matrix's rows and columns.

Yu et al., "Zeroth-order fine-tuning of LLMs in random subspaces", arXiv 2410.08989. For a matrix
[A, B], with U [A, r] and V [B, r] column-orthonormal (the QR decompositions of normal numbers),
kept for T₀ steps, and Z [r, r] of fresh normal numbers,

    z = √(A B / r²) U Z Vᵀ,     g = c z.

The factor is that of its public code (github.com/zimingyy/SubZero), and makes entries of unit
variance. Other leaves get normal numbers. Passes a step: 2 q. Memory beside the parameters: none,
as U and V are drawn again from their key.
"""

import dataclasses
import math
from typing import Any

import jax

from zo_jax.estimators import Estimator
from zo_jax.methods.method import Method, Step, require_positive
from zo_jax.methods.subspace import Subspace, keep_factors, orthonormal_columns, subspace_family


@subspace_family
class SubZeroDirections(Subspace):
    """√(A B) / r · U Z Vᵀ with U and V kept; coordinates are Z."""

    def coordinates_shape(self, leaf):
        return (*leaf.shape[:-2], self.rank, self.rank)

    def factors(self, kept, x):
        u, v = kept
        return math.sqrt(u.shape[-2] * v.shape[-2]) / self.rank * (u @ x), v


@dataclasses.dataclass(frozen=True)
class SubZero(Method):
    """SubZero.

    Attributes:
      rank: r.
      period: T₀, steps for which the subspaces are kept.

    Raises:
      ValueError: an option is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.SubZero(rank=2).transformation(jax.random.key(0))
    >>> params = jnp.ones((6, 5))
    >>> updates, _ = tx.update(None, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))
    >>> int(jnp.linalg.matrix_rank(updates))
    2
    """

    estimator: Estimator = Estimator(num_queries=1)
    rank: int = 32
    period: int = 500

    def __post_init__(self):
        super().__post_init__()
        require_positive("rank", self.rank)
        require_positive("period", self.period)

    def family(self, params: Any, memory: Any, step: Step) -> SubZeroDirections:
        def draw(key: jax.Array, leaf: Any) -> tuple[jax.Array, jax.Array]:
            rows, columns = jax.random.split(key)
            of = lambda key, axis: orthonormal_columns(key, leaf, axis, self.rank)
            return of(rows, -2), of(columns, -1)

        kept = keep_factors(params, step.lasting(self.period), self.rank, draw)
        return SubZeroDirections(kept, self.rank)
