"""ConMeZO: directions in a cone around a momentum.

Behric et al., "ConMeZO: adaptive descent-direction sampling for gradient-free finetuning of large
language models", arXiv 2511.02757. With d parameters, a momentum m and u uniform on the unit
sphere,

    z = √d (cos ϑ m / ‖m‖ + sin ϑ u),     g = c z,     m ← β m + (1 - β) g.

ϑ = 1.35 rad and β = 0.95 in its runs. While m is 0, z = √d u. Passes a step: 2 q. Memory beside the
parameters: m, a float32 number a parameter.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.estimators import Estimator
from zo_jax.methods.method import Method
from zo_jax.methods.shaped import Shaped, as_float32_shapes, float32_leaves


@dataclasses.dataclass(frozen=True)
class ConMezo(Method):
    """ConMeZO.

    Attributes:
      angle: ϑ in radians, from 0 (along the momentum) to π/2 (anywhere).
      decay: β.

    Raises:
      ValueError: an option is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.ConMezo().transformation(jax.random.key(0))
    >>> params = jnp.ones(4)
    >>> updates, state = tx.update(None, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))
    >>> bool(jnp.allclose(state.memory[0], 0.05 * updates, rtol=1e-5))
    True
    """

    estimator: Estimator = Estimator(num_queries=1, perturbation="sphere")
    angle: float = 1.35
    decay: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.angle <= math.pi / 2:
            raise ValueError(f"angle must be in [0, pi/2], got {self.angle!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay!r}")

    def init(self, params: Any) -> Any:
        """m, for each leaf; None where it is not floating."""
        return float32_leaves(params, 0.0)

    def family(self, params, memory, step):
        known = [m for m in memory if m is not None]
        norm = jnp.sqrt(sum((jnp.sum(m**2) for m in known), jnp.zeros(())))
        size = math.sqrt(sum(m.size for m in known))
        has_momentum = norm > 0
        cosine = jnp.where(has_momentum, math.cos(self.angle), 0)
        sine = jnp.where(has_momentum, math.sin(self.angle), 1)
        return Shaped(
            self.estimator.family,
            amplitude=sine,
            along_amplitude=size * cosine / jnp.where(has_momentum, norm, 1),
            along=memory,
        )

    def combine(self, params, memory, step, numbers):
        estimator = self.at(params, memory, step)
        keys, weights = estimator.keys(step.key), self.weights(numbers, estimator.epsilon)
        g = jax.tree.leaves(estimator.family.combine(as_float32_shapes(params), keys, weights))
        mean = lambda m, g: None if m is None else self.decay * m + (1 - self.decay) * g
        new = [mean(*pair) for pair in zip(memory, g, strict=True)]
        leaves, treedef = jax.tree.flatten(params)
        rounded = [x.astype(p.dtype) for x, p in zip(g, leaves, strict=True)]
        return jax.tree.unflatten(treedef, rounded), new
