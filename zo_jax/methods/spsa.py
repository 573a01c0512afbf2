"""1.5-SPSA: slopes divided by a power of the curvature along their own direction.

Chaubard, "1.5-SPSA: memory-efficient second-order zeroth-order optimization for LLMs", 2025
(github.com/fchaubard/1.5-SPSA-LLM), after Spall, 1992 and 2000. With many probes zᵢ of signs,

    cᵢ = (L(θ + ε zᵢ) - L(θ - ε zᵢ)) / 2 ε,   κᵢ = (L(θ + ε zᵢ) - 2 L(θ) + L(θ - ε zᵢ)) / ε²,
    θ ← θ - (η/n) Σᵢ cᵢ zᵢ / max(|κᵢ|^α, λ).

Its runs take η = ε = 1e-4 to 1e-3, α = 0.1, λ = 1 and 40 to 160 probes. Passes a step: 2 n + 1.
Memory beside the parameters: none.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.estimators import Estimator, mean_weights
from zo_jax.methods.curvature import num_evaluations, slopes_and_curvatures
from zo_jax.methods.method import Method, require_difference, require_share


@dataclasses.dataclass(frozen=True)
class CurvatureSpsa(Method):
    """1.5-SPSA. Its numbers are the slopes [n], then the curvatures [n].

    Attributes:
      power: α; 0 is the plain estimate, if λ is at most 1.
      floor: λ, the least divisor.

    Raises:
      ValueError: the difference is not "central", or an option is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> method = zo_jax.methods.CurvatureSpsa(zo_jax.Estimator(num_queries=16, epsilon=1e-2))
    >>> tx, params = method.transformation(jax.random.key(0)), jnp.ones(4)
    >>> _, state = tx.update(None, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))
    >>> bool(jnp.allclose(state.numbers[16:], 2 * 4, rtol=0.1))  # the curvature along signs
    True
    """

    estimator: Estimator = Estimator(num_queries=40, epsilon=1e-3)
    power: float = 0.1
    floor: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require_difference(self, "central")
        require_share("power", self.power)
        if not self.floor > 0:
            raise ValueError(f"floor must be positive, got {self.floor!r}")

    @property
    def num_numbers(self) -> int:
        return 2 * self.estimator.num_queries

    @property
    def num_evaluations(self) -> int:
        return num_evaluations(self.estimator)

    def project(self, loss_fn, params, memory, step, *batch, **extra):
        del extra
        estimator = self.at(params, memory, step)
        return slopes_and_curvatures(estimator, loss_fn, params, step.key, *batch)

    def weights(self, numbers: jax.Array, epsilon: Any) -> jax.Array:
        del epsilon
        slopes, curvatures = numbers.reshape(2, -1)
        return mean_weights(slopes / jnp.maximum(jnp.abs(curvatures) ** self.power, self.floor))
