"""HiZOO: directions scaled by a diagonal estimate of the inverse Hessian.

Zhao et al., "Second-order fine-tuning without pain for LLMs: a Hessian informed zeroth-order
optimizer", arXiv 2402.15173. With a diagonal S and u of normal numbers,

    z = S^½ u,   c = (L(θ + ε z) - L(θ - ε z)) / 2 ε,   κ = (L(θ + ε z) - 2 L(θ) + L(θ - ε z)) / ε²,
    S⁻¹ ← (1 - α) S⁻¹ + α |κ/2 · u² S⁻¹|,     θ ← θ - η c S^½ u  with the new S,

u² S⁻¹ being the diagonal of S^-½ u uᵀ S^-½. The new S in the last step is that of its public code
(github.com/Yanjun-Zhao/HiZOO). For several queries |·| is of their mean, and so is c u. α = 1e-8 to
1e-6 in its runs, S⁻¹ = 1 in the beginning. Passes a step: 2 q + 1. Memory beside the parameters:
S⁻¹, a float32 number a parameter, and one direction while it is updated.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax.estimators import Estimator
from zo_jax.methods.curvature import num_evaluations, slopes_and_curvatures
from zo_jax.methods.method import Method, require_difference, require_share
from zo_jax.methods.shaped import Shaped, as_float32_shapes, float32_leaves


@dataclasses.dataclass(frozen=True)
class Hizoo(Method):
    """HiZOO. Its numbers are the slopes [q], then the curvatures [q].

    Attributes:
      smoothing: α.

    Raises:
      ValueError: the difference is not "central", or α is not in [0, 1].

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> method = zo_jax.methods.Hizoo(zo_jax.Estimator(num_queries=8, epsilon=1e-2,
    ...     perturbation="gaussian"), smoothing=0.1)
    >>> curvature = jnp.array([1.0, 100.0])
    >>> tx, params = method.transformation(jax.random.key(0)), jnp.ones(2)
    >>> loss_fn = lambda p: jnp.sum(curvature * p**2)
    >>> step = jax.jit(lambda state: tx.update(None, state, params, value_fn=loss_fn)[1])
    >>> state = tx.init(params)
    >>> for _ in range(20):
    ...     state = step(state)
    >>> bool(state.memory[0][1] > state.memory[0][0])
    True
    """

    estimator: Estimator = Estimator(num_queries=1, perturbation="gaussian")
    smoothing: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        require_difference(self, "central")
        require_share("smoothing", self.smoothing)

    @property
    def num_numbers(self) -> int:
        return 2 * self.estimator.num_queries

    @property
    def num_evaluations(self) -> int:
        return num_evaluations(self.estimator)

    def init(self, params: Any) -> Any:
        """S⁻¹, for each leaf; None where it is not floating."""
        return float32_leaves(params, 1.0)

    def family(self, params, memory, step):
        roots = [None if x is None else lax.rsqrt(x) for x in memory]
        return Shaped(self.estimator.family, factor=roots)

    def project(self, loss_fn, params, memory, step, *batch, **extra):
        del extra
        estimator = self.at(params, memory, step)
        return slopes_and_curvatures(estimator, loss_fn, params, step.key, *batch)

    def combine(self, params, memory, step, numbers):
        slopes, curvatures = numbers.reshape(2, -1)
        keys = self.estimator.keys(step.key)
        squares = self._sum_of_squares(params, keys, super().weights(curvatures, None))

        def next_inverse(inverse, square):
            if inverse is None:
                return None
            new = jnp.abs(square) / 2 * inverse
            mixed = (1 - self.smoothing) * inverse + self.smoothing * new
            # Where the curvature vanishes S would have no end.
            return jnp.maximum(mixed, jnp.finfo(jnp.float32).tiny)

        memory = [next_inverse(*pair) for pair in zip(memory, squares, strict=True)]
        family = self.family(params, memory, step)
        return family.combine(params, keys, super().weights(slopes, None)), memory

    def _sum_of_squares(self, params, keys, weights) -> list[Any]:
        """Σᵢ weightsᵢ uᵢ², float32, for each leaf; None where it is not floating."""
        shapes, base = as_float32_shapes(params), self.estimator.family

        def step(total, pair):
            key, weight = pair
            u = jax.tree.leaves(base.direction(shapes, key))
            add = lambda t, x: None if t is None else t + weight * x**2
            return [add(t, x) for t, x in zip(total, u, strict=True)], None

        return lax.scan(step, float32_leaves(params, 0.0), (keys, weights))[0]
