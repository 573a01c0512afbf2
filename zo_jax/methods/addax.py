"""Addax: zeroth-order estimates where sequences are long, backpropagation where they are short.

Li et al., "Addax: utilizing zeroth-order gradients to improve memory efficiency and performance of
SGD for fine-tuning language models", arXiv 2410.06441. With a batch B₀ of long sequences and B₁ of
short ones,

    g = α ĝ(θ; B₀) + (1 - α) ∇L(θ; B₁).

α is 1e-4 to 1e-3 in its runs. Passes a step: those of the estimator, and a forward and a backward
pass of B₁. Memory beside the parameters: a gradient, and the activations of B₁. It does not replay
from numbers: backpropagation has a part in it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zo_jax.estimators import Estimator
from zo_jax.methods.method import require_positive, require_share
from zo_jax.transforms import ZerothOrderState, zeroth_order
from zo_jax.trees import is_floating


def addax(
    key: jax.Array,
    alpha: float = 1e-3,
    estimator: Estimator = Estimator(),
    small_batch: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Addax in the place of the gradient in an optax chain.

    `update(updates, state, params, value_fn=..., batch=..., fo_batch=...)` estimates on `batch` and
    differentiates on `fo_batch`. By default both are `batch`, or parts of it.

    Args:
      key: a PRNG key of the threefry implementation.
      alpha: α, in [0, 1].
      estimator: how ĝ is estimated.
      small_batch: first examples of `batch`, along the first axis of its leaves, that are
        differentiated where there is no `fo_batch`, and the others estimated on; None for all of
        them in both.

    Returns:
      The transformation; its state is a `zo_jax.ZerothOrderState`, the loss that of both batches,
      with the weights α and 1 - α.

    Raises:
      ValueError: α is out of range, the size no positive integer; as `zo_jax.zeroth_order`.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> tx = zo_jax.methods.addax(jax.random.key(0), alpha=0.0)
    >>> params = jnp.ones(3)
    >>> loss_fn = lambda p, x: jnp.sum(p**2 * x)
    >>> updates, _ = tx.update(
    ...     None, tx.init(params), params, value_fn=loss_fn, batch=(jnp.ones(3),))
    >>> updates.tolist()
    [2.0, 2.0, 2.0]
    """
    require_share("alpha", alpha)
    if small_batch is not None:
        require_positive("small_batch", small_batch)
        if estimator.batch_per_query:
            raise ValueError("small_batch is a part of one batch: set batch_per_query=False")
    estimate = zeroth_order(key, estimator=estimator)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value_fn: Callable[..., jax.Array] | None = None,
        batch: tuple[Any, ...] = (),
        fo_batch: tuple[Any, ...] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ZerothOrderState]:
        del updates, extra_args
        short = batch if fo_batch is None else fo_batch
        if fo_batch is None and small_batch is not None:
            short = jax.tree.map(lambda x: x[:small_batch], batch)
            batch = jax.tree.map(lambda x: x[small_batch:], batch)
        estimated, new = estimate.update(None, state, params, value_fn=value_fn, batch=batch)
        loss, exact = jax.value_and_grad(value_fn, allow_int=True)(params, *short)  # pyright: ignore

        def mixed(g: jax.Array, exact: jax.Array) -> jax.Array:
            if not is_floating(g):
                return g
            wide = jnp.promote_types(g.dtype, jnp.float32)
            total = alpha * g.astype(wide) + (1 - alpha) * exact.astype(wide)
            return total.astype(g.dtype)

        loss = (alpha * new.loss + (1 - alpha) * loss).astype(new.loss.dtype)
        return jax.tree.map(mixed, estimated, exact), new._replace(loss=loss)

    return optax.GradientTransformationExtraArgs(estimate.init, update_fn)
