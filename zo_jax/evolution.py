"""Evolution strategies: many members around the parameters, each with a score that is to be raised.

Rechenberg, "Evolutionsstrategie", 1973; Salimans et al., "Evolution strategies as a scalable
alternative to reinforcement learning", 2017. Members are θ + σ zᵢ, in antithetic pairs θ ± σ zᵢ if
asked for, and

    ĝ = (1/q) Σᵢ cᵢ zᵢ,   cᵢ = -(fᵢ⁺ - fᵢ⁻) / 2σ   or   cᵢ = -fᵢ / σ,

with f the shaped scores: an estimate of the gradient of -f, to be descended. A step is its key and
its q projections, as every step of this library, so ledgers replay it without a score.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zo_jax.estimators import Estimator, typed_key
from zo_jax.families import by_name
from zo_jax.family import Family
from zo_jax.noise import key_words, own_words
from zo_jax.trees import as_arrays

SHAPINGS = ("raw", "zscore", "prompt", "ranks")


class Members(NamedTuple):
    """A population: member i is θ + scales[i] · z of keys[i].

    Attributes:
      keys: [M] typed PRNG keys; the two of an antithetic pair have the same.
      scales: float32 [M].
    """

    keys: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class Evolution:
    """A population, and what its scores say.

    `ask` and `tell` are the two halves of a step for scores that are found elsewhere, by any
    simulator; `evolution` is both of them for a function of the parameters that JAX can trace.

    Attributes:
      population: M, the members; an even number with antithetic pairs.
      sigma: σ, how far they are.
      perturbation: family of directions, or its name; of low rank, a population generates text at
        once (`zo_jax.models.population`).
      antithetic: whether members come in pairs, with opposite directions.
      shaping: what is made of scores before they weigh directions; see `shape_scores`.
      parallel_batch_size: members evaluated at once by `evolution`.

    Raises:
      ValueError: an option is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> es = zo_jax.Evolution(population=8, sigma=0.1)
    >>> params, key = jnp.zeros(4), jax.random.key(0)
    >>> members = es.ask(key)
    >>> scores = [-float(jnp.sum((es.member(params, members, i) - 1) ** 2)) for i in range(8)]
    >>> gradient = es.tell(params, key, jnp.array(scores))
    >>> bool(jnp.sum(gradient) < 0)  # downwards is towards 1
    True
    """

    population: int = 32
    sigma: float = 1e-2
    perturbation: Family | str = "low_rank"
    antithetic: bool = True
    shaping: str = "zscore"
    parallel_batch_size: int = 1

    def __post_init__(self):
        if self.population < 2 or (self.antithetic and self.population % 2):
            raise ValueError(
                f"population must be at least 2, and even with antithetic pairs; got "
                f"{self.population}"
            )
        if not 0 < self.sigma < np.inf:
            raise ValueError(f"sigma must be positive and finite; got {self.sigma!r}")
        if self.shaping not in SHAPINGS:
            raise ValueError(f"shaping must be one of {', '.join(SHAPINGS)}; got {self.shaping!r}")
        if isinstance(self.perturbation, str):
            object.__setattr__(self, "perturbation", by_name(self.perturbation))

    @property
    def family(self) -> Family:
        """The family of directions."""
        assert isinstance(self.perturbation, Family)
        return self.perturbation

    @property
    def num_queries(self) -> int:
        """q, the directions."""
        return self.population // 2 if self.antithetic else self.population

    def ask(self, key: jax.Array) -> Members:
        """The population of a step, from its key; of a pair the first goes along the direction."""
        keys = jax.random.split(typed_key(key), self.num_queries)
        sides = (1.0, -1.0) if self.antithetic else (1.0,)
        scales = jnp.tile(jnp.array(sides) * self.sigma, self.num_queries)
        return Members(jnp.repeat(keys, len(sides), axis=0), scales.astype(jnp.float32))

    def member(self, params: Any, members: Members, i: int) -> Any:
        """The parameters of a member, as arrays."""
        moved = self.family.perturb(as_arrays(params), members.keys[i], members.scales[i])
        is_leaf = lambda x: hasattr(x, "form")
        return jax.tree.map(lambda x: x.form() if is_leaf(x) else x, moved, is_leaf=is_leaf)

    def projections(self, scores: jax.Array) -> jax.Array:
        """The projections [q] of the directions, from scores [M] or [M, P]; see `shape_scores`.

        A pair, or a member, with a score that is not finite is nan.
        """
        fitness = shape_scores(scores, self.shaping)
        if self.antithetic:
            plus, minus = fitness.reshape(-1, 2).T
            return -(plus - minus) / (2 * self.sigma)
        return -fitness / self.sigma

    def tell(self, params: Any, key: jax.Array, scores: jax.Array) -> Any:
        """The gradient estimate, like `params`, to be descended.

        Args:
          params: those that the members were moved from.
          key: that of `ask`.
          scores: of the members [M], or for each of P prompts [M, P]; more is better.
        """
        estimator = Estimator(num_queries=self.num_queries, perturbation=self.family)
        return estimator.combine(params, key, self.projections(jnp.asarray(scores)))


def shape_scores(scores: jax.Array, shaping: str) -> jax.Array:
    """Fitness [M] from the scores of M members, of each prompt by itself where there are several.

    - raw: the mean over prompts.
    - zscore: that, less the mean of the population, over its standard deviation.
    - prompt: each prompt's scores so, and the mean over prompts: every prompt counts the same.
    - ranks: the rank of the mean, from -1/2 to 1/2, of equal ones their mean rank (Wierstra et al.,
      "Natural evolution strategies", 2014).

    If all are equal they say nothing, and fitness is 0 but for raw. What is not finite stays nan
    and has no part in the others'.

    Args:
      scores: floating [M] or [M, P].
      shaping: one of those.

    >>> import jax.numpy as jnp
    >>> shape_scores(jnp.array([3.0, 1.0, 2.0, 1.0, 9.0]), "ranks").tolist()
    [0.25, -0.375, 0.0, -0.375, 0.5]
    """
    scores_MP = scores.reshape(len(scores), -1).astype(jnp.float32)
    mean_M = jnp.mean(scores_MP, axis=1)
    if shaping == "raw":
        return jnp.where(jnp.isfinite(mean_M), mean_M, jnp.nan)
    if shaping == "zscore":
        return _standardised(mean_M[:, None])[:, 0]
    if shaping == "prompt":
        return jnp.mean(_standardised(scores_MP), axis=1)
    finite = jnp.isfinite(mean_M)
    is_less = (mean_M[None] < mean_M[:, None]) & finite[None]
    is_equal = (mean_M[None] == mean_M[:, None]) & finite[None]
    rank = jnp.sum(is_less, axis=1) + (jnp.sum(is_equal, axis=1) - 1) / 2
    centred = rank / jnp.maximum(jnp.sum(finite) - 1, 1) - 0.5
    centred = jnp.where(jnp.all(is_equal | ~finite[None] | ~finite[:, None]), 0.0, centred)
    return jnp.where(finite, centred, jnp.nan)


def _standardised(scores_MP: jax.Array) -> jax.Array:
    """Less the mean over members, over their standard deviation; 0 if that is 0."""
    finite = jnp.isfinite(scores_MP)
    known = jnp.where(finite, scores_MP, 0)
    total = functools.partial(jnp.sum, axis=0, keepdims=True)
    count = jnp.maximum(total(finite), 1)
    centred = jnp.where(finite, known - total(known) / count, 0)
    deviation = jnp.sqrt(total(centred**2) / count)
    # Equal scores differ from their mean by rounding.
    is_flat = deviation <= 1e-6 * jnp.max(jnp.abs(known), axis=0, keepdims=True)
    shaped = jnp.where(is_flat, 0, centred / jnp.where(is_flat, 1, deviation))
    return jnp.where(finite, shaped, jnp.nan)


class EvolutionState(NamedTuple):
    """State of `evolution`.

    Attributes:
      key: uint32 [2], the words of the key that was given; that of a step is `fold_in(key, count)`.
      count: int32, steps taken.
      scores: float32 [M], of the last step's members.
      projections: float32 [q], of the last step.
      num_flat: int32, steps so far whose population had no signal: equal scores.
    """

    key: jax.Array
    count: jax.Array
    scores: jax.Array
    projections: jax.Array
    num_flat: jax.Array


def evolution(
    key: jax.Array, *, strategy: Evolution | None = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates with an evolution strategy's estimate, for a score that is to be raised.

    `update(updates, state, params, fitness_fn=...)` evaluates `fitness_fn(params, key)` for every
    member, with the same key for all members of a step; what it draws from it is common to them.
    The updates may be None, as with `zeroth_order`.

    Args:
      key: a PRNG key of the threefry implementation.
      strategy: an `Evolution`; default `Evolution()`.
      **options: fields of `Evolution`, which replace those of `strategy`.

    Returns:
      The transformation, for the place of the gradient in an optax chain; its state is an
      `EvolutionState`.

    Raises:
      ValueError: as `Evolution`; or, from `update`, `params` or `fitness_fn` is missing.

    >>> import jax, jax.numpy as jnp, optax, zo_jax
    >>> score = lambda params, key: -jnp.sum((params - 1) ** 2)
    >>> tx = optax.chain(zo_jax.evolution(jax.random.key(0), population=16), optax.sgd(0.001))
    >>> params = jnp.zeros(4)
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...     updates, state = tx.update(None, state, params, fitness_fn=score)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(score(params, None) > -0.1)
    True
    """
    words = key_words(typed_key(key))
    es = dataclasses.replace(strategy or Evolution(), **options)
    estimator = Estimator(
        num_queries=es.num_queries,
        perturbation=es.family,
        parallel_batch_size=min(es.parallel_batch_size, es.num_queries),
    )
    sides = np.array([es.sigma, -es.sigma] if es.antithetic else [es.sigma], np.float32)

    def init_fn(params: Any) -> EvolutionState:
        del params
        zero = lambda: jnp.zeros((), jnp.int32)
        scores = jnp.zeros(es.population, jnp.float32)
        return EvolutionState(own_words(words), zero(), scores, jnp.zeros(es.num_queries), zero())

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        fitness_fn: Callable[..., jax.Array] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, EvolutionState]:
        del updates, extra_args
        if params is None or fitness_fn is None:
            raise ValueError(
                "evolution scores perturbed parameters: pass both, as tx.update(None, state, "
                "params, fitness_fn=lambda params, key: score)"
            )
        step_key = jax.random.fold_in(typed_key(state.key), state.count)
        common = jax.random.fold_in(step_key, 2**31)
        scores = estimator.losses_along(
            lambda params: fitness_fn(params, common), params, step_key, sides
        ).reshape(-1)
        projections = es.projections(scores)
        is_flat = ~jnp.any(jnp.isfinite(projections) & (projections != 0))
        return estimator.combine(params, step_key, projections), EvolutionState(
            key=state.key,
            count=jnp.asarray(optax.safe_increment(state.count)),
            scores=scores.astype(jnp.float32),
            projections=projections,
            num_flat=state.num_flat + is_flat.astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
