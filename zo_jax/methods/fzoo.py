"""FZOO: a step as long as the losses differ little.

Dang et al., "FZOO: fast zeroth-order optimizer for fine-tuning large language models towards
Adam-scale speed", arXiv 2506.09034. With signs uᵢ, lᵢ = L(θ + ε uᵢ) and l₀ = L(θ),

    g = (1/N) Σᵢ (lᵢ - l₀) uᵢ / ε,     θ ← θ - η g / std(l₁, ..., l_N).

Passes a step: N + 1. Memory beside the parameters: none. std(lᵢ) is ε std(cᵢ) of the projections
cᵢ = (lᵢ - l₀) / ε, so a step replays from these.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.estimators import Estimator, mean_weights
from zo_jax.methods.method import Method, require_difference


@dataclasses.dataclass(frozen=True)
class Fzoo(Method):
    """FZOO: the forward-difference estimate over the standard deviation of its losses.

    The deviation is that of the N losses with a finite value, over N - 1. If it is zero, nothing
    is updated.

    Raises:
      ValueError: the difference is not "forward", there are fewer than two queries, or they have
        batches of their own.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.Fzoo().transformation(jax.random.key(0))
    >>> params = jnp.ones(4)
    >>> updates, state = tx.update(None, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))
    >>> updates.shape, state.numbers.shape
    ((4,), (8,))
    """

    estimator: Estimator = Estimator(num_queries=8, difference="forward")

    def __post_init__(self):
        super().__post_init__()
        require_difference(self, "forward")
        if self.estimator.num_queries < 2:
            raise ValueError("Fzoo needs num_queries of at least 2: one loss has no deviation")
        if self.estimator.batch_per_query:
            raise ValueError("Fzoo compares the losses of one batch: set batch_per_query=False")

    def weights(self, numbers: jax.Array, epsilon: Any) -> jax.Array:
        return fzoo_weights(numbers, epsilon)


def fzoo_weights(projections: jax.Array, epsilon: Any) -> jax.Array:
    """The weights of the directions: cᵢ / N, over ε std(c).

    Args:
      projections: floating [N].
      epsilon: ε.

    >>> import jax.numpy as jnp
    >>> weights = fzoo_weights(jnp.array([3.0, 1.0, jnp.nan]), 0.5)
    >>> [round(x, 3) for x in weights.tolist()]
    [2.121, 0.707, 0.0]
    """
    deviation = epsilon * _standard_deviation(projections)
    weights = mean_weights(projections)
    return jnp.where(deviation > 0, weights / jnp.where(deviation > 0, deviation, 1), 0)


def weights_of(method: dict[str, Any] | None) -> Callable[[jax.Array], jax.Array]:
    """What makes weights of projections in a run: `mean_weights` for None, and for `{"name":
    "fzoo", "epsilon": ε}` FZOO's; JSON, for ledgers to keep.

    Raises:
      ValueError: there is no such method.

    >>> import zo_jax
    >>> zo_jax.methods.weights_of(None) is zo_jax.mean_weights
    True
    """
    if method is None:
        return mean_weights
    if method.get("name") != "fzoo" or not method.get("epsilon", 0) > 0:
        raise ValueError(
            f'the method must be None or {{"name": "fzoo", "epsilon": a number}}, got {method!r}'
        )
    return functools.partial(fzoo_weights, epsilon=method["epsilon"])


def _standard_deviation(x: jax.Array) -> jax.Array:
    """Of the finite ones of x [N], over their number less 1."""
    finite = jnp.isfinite(x)
    count = jnp.sum(finite)
    mean = jnp.sum(jnp.where(finite, x, 0)) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(finite, x - mean, 0) ** 2)
    return jnp.sqrt(squares / jnp.maximum(count - 1, 1))
