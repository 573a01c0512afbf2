"""The estimator as an optax gradient transformation: the first link of a chain, in place of
backpropagation.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zo_jax.estimators import Estimator, make_estimator, takes_options, typed_key
from zo_jax.noise import key_words, own_words


class ZerothOrderState(NamedTuple):
    """State of `zeroth_order`.

    Attributes:
      key: uint32 [2], the words of the key that was given; the key of a step is `fold_in(key,
        count)`.
      count: int32, steps taken.
      loss: float32, of the last step (inf before the first).
      projections: float32 [num_queries], of the last step; nan where the loss was not finite.
      num_failed: int32, queries of the last step whose loss was not finite.
      family: of the directions, where it learns from their projections; otherwise None.
    """

    key: jax.Array
    count: jax.Array
    loss: jax.Array
    projections: jax.Array
    num_failed: jax.Array
    family: Any = None


@takes_options
def zeroth_order(
    key: jax.Array, *, estimator: Estimator | None = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates, whatever they are, with a zeroth-order estimate of the gradient.

    `update(updates, state, params, value_fn=..., batch=())` evaluates `value_fn(params, *batch)`.
    Each step draws fresh directions, from the key and its own count. The updates may be None,
    unless a transformation around this one looks at them: to `optax.masked`, `optax.partition`,
    `optax.apply_if_finite` and `optax.MultiSteps` hand any pytree like the parameters, and see
    `fill_frozen` for the first two.

    Args:
      key: a PRNG key of the threefry implementation.
      estimator: an `Estimator`; default `Estimator()`.
      **options: fields of `Estimator`, which replace those of `estimator`. `epsilon` may be an
        optax schedule of the steps taken, or a number that `optax.inject_hyperparams` injects.

    Returns:
      The transformation; its state is a `ZerothOrderState`.

    Raises:
      ValueError: as `Estimator`; `has_aux` is set, which a transformation has no place for; or,
        from `update`, `params` or `value_fn` is missing.

    >>> import jax, jax.numpy as jnp, optax, zo_jax
    >>> loss_fn = lambda p: jnp.sum((p - 1) ** 2)
    >>> tx = optax.chain(zo_jax.zeroth_order(jax.random.key(0)), optax.sgd(0.05))
    >>> params = jnp.zeros(4)
    >>> state = tx.init(params)
    >>> for _ in range(50):
    ...     updates, state = tx.update(None, state, params, value_fn=loss_fn)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(loss_fn(params) < 1e-2)
    True
    """
    words = key_words(typed_key(key))
    configured = make_estimator(estimator, options)
    if configured.has_aux:
        raise ValueError(
            "zeroth_order returns updates alone: set has_aux=False, and return the loss from "
            "value_fn"
        )

    def init_fn(params: Any) -> ZerothOrderState:
        # Of a float64 loss the state is float64, and all losses are unless JAX is told to have
        # such.
        dtypes = [jnp.float32, *(x.dtype for x in jax.tree.leaves(params) if hasattr(x, "dtype"))]
        dtype = jnp.float64 if jnp.dtype("float64") in dtypes else jnp.float32
        started = configured.start(params)
        return ZerothOrderState(
            key=own_words(words),
            count=jnp.zeros((), jnp.int32),
            loss=jnp.full((), jnp.inf, dtype),
            projections=jnp.zeros(configured.num_queries, dtype),
            num_failed=jnp.zeros((), jnp.int32),
            family=None if started is configured.family else started,
        )

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value_fn: Callable[..., jax.Array] | None = None,
        batch: tuple[Any, ...] = (),
        **extra_args: Any,
    ) -> tuple[Any, ZerothOrderState]:
        del updates, extra_args
        if params is None:
            raise ValueError(
                "zeroth_order perturbs the parameters: pass them to update, as "
                "tx.update(None, state, params, value_fn=...)"
            )
        if value_fn is None:
            raise ValueError(
                "zeroth_order evaluates the loss itself: pass it to update as "
                "value_fn=lambda params: loss_fn(params, *batch)"
            )
        epsilon = configured.epsilon
        if callable(epsilon):
            epsilon = epsilon(state.count)
        family = configured.family if state.family is None else state.family
        now = dataclasses.replace(configured, epsilon=epsilon, perturbation=family)
        step_key = jax.random.fold_in(typed_key(state.key), state.count)
        estimate = now.estimate(value_fn, params, step_key, *batch)
        if state.family is not None:
            family = now.learn(params, step_key, estimate.projections)
        return estimate.gradient, ZerothOrderState(
            key=state.key,
            count=jnp.asarray(optax.safe_increment(state.count)),
            loss=estimate.loss.astype(state.loss.dtype),
            projections=estimate.projections.astype(state.projections.dtype),
            num_failed=estimate.num_failed,
            family=None if state.family is None else family,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def fill_frozen(value_fn: Callable[..., jax.Array], params: Any) -> Callable[..., jax.Array]:
    """`value_fn` for a transformation inside `optax.masked` or `optax.partition`.

    Those hand the estimator only the parameters that it trains, with an `optax.MaskedNode` in the
    place of every other; here the others come from `params`. They are neither perturbed nor copied.

    Args:
      value_fn: `value_fn(params, *batch)` of the whole parameters.
      params: the whole parameters.

    >>> import jax, jax.numpy as jnp, optax, zo_jax
    >>> params = {"body": jnp.ones(3), "head": jnp.zeros(3)}
    >>> loss_fn = lambda p: jnp.sum((p["body"] + p["head"] - 3) ** 2)
    >>> tx = optax.partition(
    ...     {"zo": optax.chain(zo_jax.zeroth_order(jax.random.key(0)), optax.sgd(0.05)), "freeze": optax.set_to_zero()},
    ...     {"body": "freeze", "head": "zo"})
    >>> updates, _ = tx.update(params, tx.init(params), params, value_fn=zo_jax.fill_frozen(loss_fn, params))
    >>> float(jnp.abs(updates["body"]).max()), bool(jnp.all(updates["head"] > 0))
    (0.0, True)
    """  # noqa: E501
    is_frozen = lambda x: isinstance(x, optax.MaskedNode)

    def filled(trained: Any, *batch: Any) -> jax.Array:
        whole = jax.tree.map(
            lambda new, old: old if is_frozen(new) else new, trained, params, is_leaf=is_frozen
        )
        return value_fn(whole, *batch)

    return filled
