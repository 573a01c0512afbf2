"""MeZO-SVRG: small batches corrected by the estimate of a large one.

Gautam et al., "Variance-reduced zeroth-order methods for fine-tuning language models", arXiv
2404.08080. Every k steps a snapshot θ̄ is taken, with an estimate g on a large batch F; with
ĝ(θ; B) the estimate at θ on a batch B,

    θ ← θ - η₁ g                                      in a step with a snapshot, θ̄ = θ, g = ĝ(θ; F),
    θ ← θ - η₂ (ĝ(θ; B) - ĝ(θ̄; B) + g)               in the others, with the same z in both.

The paper takes η₁ > η₂: `optax.scale_by_schedule` of the count, which is a multiple of k in steps
with a snapshot. Passes a step: 4 q, of the small batch; with a snapshot 2 q, of the large one.
Memory beside the parameters: the snapshot, as large as they; of g its key and q numbers.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax.estimators import Estimator
from zo_jax.methods.method import Method, Step, require_positive
from zo_jax.methods.shaped import as_float32_shapes


class Snapshot(NamedTuple):
    """The memory of `MezoSvrg`.

    Attributes:
      params: θ̄.
      count: int32, the step in which it was taken.
      projections: float32 [q], of the large batch.
    """

    params: Any
    count: jax.Array
    projections: jax.Array


@dataclasses.dataclass(frozen=True)
class MezoSvrg(Method):
    """MeZO-SVRG. Its numbers [q] are the projections of the large batch in a step with a snapshot,
    in the others the differences of those at θ and at θ̄.

    `update` takes `full_batch=` beside `batch=`, the large batch: of another size if need be, read
    in steps with a snapshot; by default `batch`.

    Attributes:
      period: k.
      small_batch: first examples of `batch`, along the first axis of its leaves, that steps between
        two snapshots read; None for all of them.

    Raises:
      ValueError: the period or the size of a batch is no positive integer, or queries have batches
        of their own.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.MezoSvrg(period=2).transformation(jax.random.key(0))
    >>> params, x = jnp.ones(3), jnp.arange(6.0).reshape(2, 3)
    >>> loss_fn = lambda p, x: jnp.mean((x @ p) ** 2)
    >>> updates, state = tx.update(
    ...     None, tx.init(params), params, value_fn=loss_fn, batch=(x[:1],), full_batch=(x,))
    >>> float(state.loss) > 20  # that of the large batch: (3² + 12²) / 2
    True
    """

    estimator: Estimator = Estimator(num_queries=1)
    period: int = 5
    small_batch: int | None = None

    def __post_init__(self):
        super().__post_init__()
        require_positive("period", self.period)
        if self.small_batch is not None:
            require_positive("small_batch", self.small_batch)
        if self.estimator.batch_per_query:
            raise ValueError(
                "MezoSvrg compares the estimates of whole batches: set batch_per_query=False"
            )

    @property
    def num_evaluations(self) -> int:
        """Of a step between two snapshots; one that takes a snapshot has half as many, of the large
        batch.
        """
        return 2 * self.estimator.num_evaluations

    def evaluations_until(self, count: int) -> int:
        num_snapshots = -(-count // self.period)
        return (2 * count - num_snapshots) * self.estimator.num_evaluations

    def init(self, params: Any) -> Snapshot:
        copy = jax.tree.map(jnp.copy, params)
        return Snapshot(copy, jnp.int32(0), jnp.zeros(self.num_numbers, jnp.float32))

    def project(
        self,
        loss_fn: Callable[..., Any],
        params: Any,
        memory: Snapshot,
        step: Step,
        *batch: Any,
        full_batch: tuple[Any, ...] | None = None,
        **extra: Any,
    ) -> tuple[jax.Array, jax.Array]:
        del extra
        estimator = self.at(params, memory, step)
        large = batch if full_batch is None else full_batch
        n = self.small_batch
        small = batch if n is None else jax.tree.map(lambda x: x[:n], batch)
        at = lambda params, batch: estimator.project(loss_fn, params, step.key, *batch)

        def of_snapshot():
            return at(params, large)

        def of_difference():
            loss, here = at(params, small)
            _, there = at(memory.params, small)
            return loss, here - there

        return lax.cond(self._takes_snapshot(step), of_snapshot, of_difference)

    def combine(self, params, memory, step, numbers):
        is_new = self._takes_snapshot(step)
        new = Snapshot(params, step.count, numbers.astype(jnp.float32))
        memory = jax.tree.map(lambda x, old: jnp.where(is_new, x, old), new, memory)
        at_snapshot = step._replace(count=memory.count)
        shapes, estimator = as_float32_shapes(params), self.at(params, memory, step)
        sum_of = lambda step, c: estimator.family.combine(
            shapes, estimator.keys(step.key), self.weights(c, None)
        )
        large = sum_of(at_snapshot, memory.projections)
        small = sum_of(step, jnp.where(is_new, jnp.zeros_like(numbers), numbers))
        total = jax.tree.map(lambda a, b, p: (a + b).astype(p.dtype), large, small, params)
        return total, memory

    def _takes_snapshot(self, step: Step) -> jax.Array:
        return step.count % self.period == 0
