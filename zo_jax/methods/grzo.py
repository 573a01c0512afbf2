"""GRZO: a direction for every example of a batch, in the forward passes of the batch.

Tan et al., "GRZO: group-relative zeroth-order optimization for large language model fine-tuning",
arXiv 2606.02857. With a direction zᵢ of each of the B examples xᵢ,

    δᵢ = L(θ + σ zᵢ; xᵢ) - L(θ - σ zᵢ; xᵢ),     g = Σᵢ δᵢ zᵢ / (2 σ B (std(δ) + 1e-8)),

std over B. The directions are Flipout's (`zo_jax.methods.flipout`), with signs U of the step and
rᵢ, sᵢ of the example; or those of any family, of low rank at almost the cost of the batch. Passes a
step: 2 of the batch, at twice the products with Flipout. Memory beside the parameters: none between
steps; in the passes U of one matrix, or the factors of B directions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.estimators import Estimator, mean_weights
from zo_jax.methods.flipout import flipout
from zo_jax.methods.method import Method, require_difference

_SMALL = 1e-8


@dataclasses.dataclass(frozen=True)
class Grzo(Method):
    """GRZO. Its numbers [B] are the projections of the examples.

    The loss is a mean over examples, or the losses of all [B]; every leaf of the batch has the
    examples along its first axis, and the loss is evaluated on one at a time, mapped over all.

    Attributes:
      estimator: with as many queries as there are examples.
      use_flipout: otherwise the directions are the estimator's.
      normalise: divide by the standard deviation; otherwise the plain mean of cᵢ zᵢ.

    Raises:
      ValueError: the difference is not "central", or, from `update`, the batch has not one example
        for each query.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> x = jnp.arange(24.0).reshape(4, 6) / 24
    >>> loss_fn = lambda p, x: jnp.mean((x @ p["w"]) ** 2)
    >>> params = {"w": jnp.ones((6, 3))}
    >>> tx = zo_jax.methods.Grzo(zo_jax.Estimator(num_queries=4)).transformation(jax.random.key(0))
    >>> updates, state = tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=(x,))
    >>> state.numbers.shape
    (4,)
    """

    estimator: Estimator = Estimator(num_queries=16)
    use_flipout: bool = True
    normalise: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_difference(self, "central")
        q = self.estimator.num_queries
        options = dict(batch_per_query=True, parallel_batch_size=q)
        object.__setattr__(self, "estimator", dataclasses.replace(self.estimator, **options))

    @property
    def num_evaluations(self) -> int:
        return 2

    def family(self, params, memory, step):
        if not self.use_flipout:
            return self.estimator.family
        return flipout(params, jax.random.fold_in(step.key, 2**31))

    def project(self, loss_fn, params, memory, step, *batch, **extra):
        del extra
        q = self.estimator.num_queries
        for leaf in jax.tree.leaves(batch):
            if jnp.shape(leaf)[:1] != (q,):
                raise ValueError(
                    f"Grzo has a direction for each of num_queries = {q} examples: every leaf of "
                    f"the batch needs a leading axis of that size, got shape {jnp.shape(leaf)}"
                )
        one_by_one = jax.tree.map(lambda x: jnp.expand_dims(x, 1), batch)
        of_example = lambda params, *batch: jnp.mean(loss_fn(params, *batch))
        estimator = self.at(params, memory, step)
        return estimator.project(of_example, params, step.key, *one_by_one)

    def weights(self, numbers: jax.Array, epsilon: Any) -> jax.Array:
        weights = mean_weights(numbers)
        if not self.normalise:
            return weights
        finite = jnp.isfinite(numbers)
        count = jnp.maximum(jnp.sum(finite), 1)
        mean = jnp.sum(jnp.where(finite, numbers, 0)) / count
        deviation = jnp.sqrt(jnp.sum(jnp.where(finite, numbers - mean, 0) ** 2) / count)
        return weights / (2 * epsilon * deviation + _SMALL)
