"""Plain evolution strategies, and EGGROLL, as methods that descend a loss.

Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning", 2017;
Qiu et al., "Evolution strategies at scale", arXiv 2509.24372; Sarkar et al., "Evolution strategies
at the hyperscale" (EGGROLL), arXiv 2511.16652. Of N members θ + σ zᵢ with shaped scores fᵢ of -L,

    g = -(1 / N σ) Σᵢ fᵢ zᵢ.

EGGROLL's zᵢ = A Bᵀ / √r are never formed, its members come in pairs ±z, and its fᵢ are z-scores.
It is `zo_jax.evolution`, which is for scores of any kind, seen as one of the methods. Passes a
step: N. Memory beside the parameters: none.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from zo_jax.estimators import Estimator
from zo_jax.evolution import Evolution
from zo_jax.family import Family
from zo_jax.methods.method import Method


@dataclasses.dataclass(frozen=True)
class EvolutionStrategy(Method):
    """An evolution strategy for losses. Its numbers are the projections [q] of the directions.

    Attributes:
      strategy: population, σ, directions, pairs and the shaping of scores.
      estimator: how losses are evaluated otherwise: `batch_chunks`, `parallel_batch_size`, `mesh`;
        what the strategy says besides replaces what it has.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.eggroll(population=8, sigma=0.1).transformation(jax.random.key(0))
    >>> params = jnp.ones((6, 5))
    >>> updates, _ = tx.update(None, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))
    >>> bool(jnp.sum(updates) > 0)  # a gradient, to be descended
    True
    """

    strategy: Evolution = Evolution(perturbation="gaussian", antithetic=False)

    def __post_init__(self):
        super().__post_init__()
        if self.estimator.batch_per_query:
            raise ValueError(
                "EvolutionStrategy compares the members of a population: they need the same batch; "
                "set batch_per_query=False"
            )
        es = self.strategy
        estimator = dataclasses.replace(
            self.estimator, num_queries=es.num_queries, epsilon=es.sigma, perturbation=es.family
        )
        object.__setattr__(self, "estimator", estimator)

    @property
    def num_evaluations(self) -> int:
        return self.strategy.population

    def project(self, loss_fn, params, memory, step, *batch, **extra):
        del extra
        es, estimator = self.strategy, self.at(params, memory, step)
        sides = np.array([es.sigma, -es.sigma] if es.antithetic else [es.sigma], np.float32)
        losses = estimator.losses_along(loss_fn, params, step.key, sides, *batch).reshape(-1)
        finite = jnp.isfinite(losses)
        total = jnp.sum(jnp.where(finite, losses, 0))
        loss = jnp.where(jnp.any(finite), total / jnp.maximum(jnp.sum(finite), 1), jnp.nan)
        return loss, es.projections(-losses)


def evolution_strategy(
    population: int = 30, sigma: float = 1e-3, estimator: Estimator = Estimator(), **options: Any
) -> EvolutionStrategy:
    """Gaussian members without pairs, z-scored: "Evolution strategies at scale".

    Args:
      population: N.
      sigma: σ.
      estimator: as of `EvolutionStrategy`.
      **options: other fields of `zo_jax.Evolution`.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> method = zo_jax.methods.evolution_strategy(population=8, sigma=0.1)
    >>> tx, params = method.transformation(jax.random.key(0)), jnp.ones(5)
    >>> updates, _ = tx.update(None, tx.init(params), params, value_fn=lambda p: jnp.sum(p**2))
    >>> updates.shape
    (5,)
    """
    options = dict(perturbation="gaussian", antithetic=False) | options
    return EvolutionStrategy(estimator, Evolution(population, sigma, **options))


def eggroll(
    population: int = 64,
    sigma: float = 1e-2,
    perturbation: Family | str = "low_rank",
    estimator: Estimator = Estimator(),
    **options: Any,
) -> EvolutionStrategy:
    """EGGROLL: pairs of low-rank members, z-scored. The factors are those of `low_rank`, of signs;
    EGGROLL's are normal.

    Its code multiplies the updates by √N; here that is left to the learning rate.

    Args:
      population: N, even.
      sigma: σ.
      perturbation: directions; `zo_jax.low_rank(r)`.
      estimator: as of `EvolutionStrategy`.
      **options: other fields of `zo_jax.Evolution`.

    >>> import zo_jax
    >>> zo_jax.methods.eggroll(population=8).strategy.antithetic
    True
    """
    return EvolutionStrategy(estimator, Evolution(population, sigma, perturbation, **options))
