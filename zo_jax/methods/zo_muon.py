"""ZO-Muon: the estimate in a subspace, with all its singular values made 1.

Lang et al., "Powering up zeroth-order training via subspace gradient orthogonalization", arXiv
2602.17155. For a matrix [A, B], with P [A, r] column-orthonormal, kept for some steps, and Ψᵢ
[r, B] of fresh normal numbers,

    G = (1/N) Σᵢ ((L(θ + μ P Ψᵢ) - L(θ)) / μ) Ψᵢ,     θ ← θ - η P msign(G),

msign(G) = X Yᵀ of the singular value decomposition X Σ Yᵀ (here by that decomposition, in the paper
by Newton-Schulz iterations). r = 64 to 128 and N = 4 to 16 in its runs. Other leaves get normal
numbers and the plain mean, whose scale is another: partition them (`optax.partition`) where that
matters. Passes a step: N + 1. Memory beside the parameters: none, as P is drawn again from its key.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.estimators import Estimator
from zo_jax.methods.method import Method, Step, require_positive
from zo_jax.methods.subspace import (
    Subspace,
    keep_factors,
    like_params,
    orthonormal_columns,
    subspace_family,
)


@subspace_family
class RowSpaceDirections(Subspace):
    """P Ψ with P kept; coordinates are Ψ."""

    def coordinates_shape(self, leaf):
        return (*leaf.shape[:-2], self.rank, leaf.shape[-1])

    def factors(self, kept, x):
        return kept, jnp.swapaxes(x, -1, -2)


@dataclasses.dataclass(frozen=True)
class ZoMuon(Method):
    """ZO-Muon.

    Attributes:
      rank: r.
      period: steps for which P is kept.

    Raises:
      ValueError: an option is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.ZoMuon(rank=2).transformation(jax.random.key(0))
    >>> params = jnp.ones((6, 5))
    >>> updates, _ = tx.update(None, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))
    >>> jnp.round(jnp.linalg.svd(updates, compute_uv=False), 3).tolist()
    [1.0, 1.0, 0.0, 0.0, 0.0]
    """

    estimator: Estimator = Estimator(num_queries=4, difference="forward")
    rank: int = 64
    period: int = 100

    def __post_init__(self):
        super().__post_init__()
        require_positive("rank", self.rank)
        require_positive("period", self.period)

    def family(self, params: Any, memory: Any, step: Step) -> RowSpaceDirections:
        draw = lambda key, leaf: orthonormal_columns(key, leaf, -2, self.rank)
        kept = keep_factors(params, step.lasting(self.period), self.rank, draw)
        return RowSpaceDirections(kept, self.rank)

    def combine(self, params, memory, step, numbers):
        estimator = self.at(params, memory, step)
        family: Any = estimator.family
        weights = self.weights(numbers, estimator.epsilon)
        total = family.sum_of_coordinates(params, estimator.keys(step.key), weights)
        signs = [
            x if kept is None else matrix_sign(x)
            for kept, x in zip(family.kept, total, strict=True)
        ]
        return like_params(params, family.lift(signs)), memory


def matrix_sign(x: jax.Array) -> jax.Array:
    """U Vᵀ of the singular value decomposition U Σ Vᵀ of [..., r, B]; 0 of 0, for no direction of
    it is known.

    >>> import jax.numpy as jnp
    >>> jnp.round(matrix_sign(jnp.array([[0.0, -3.0], [0.5, 0.0]])), 3).tolist()
    [[0.0, -1.0], [1.0, 0.0]]
    """
    u, values, vt = jnp.linalg.svd(x, full_matrices=False)
    largest = jnp.max(values, axis=-1, keepdims=True)
    # What is rounding beside the largest is no direction.
    known = (values > 1e-6 * largest).astype(x.dtype)
    return (u * known[..., None, :]) @ vt
