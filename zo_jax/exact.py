"""A part of the parameters whose gradient is exact, beside directions for the rest.

Differentiated is what lies above that part alone: the rest is held constant, and what depends on
neither is evaluated once and kept out of the derivative (`zo_jax.programs.in_halves`). Of an output
head that is what is known in closed form; of the last layers it is a depth split, backprop above
and directions below.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax.programs import in_halves
from zo_jax.trees import Rule, Subset, is_floating, subset_by


class Split(NamedTuple):
    """Two parts of parameters: `exact`, which is differentiated, and `rest`, which has
    directions.
    """

    exact: Subset
    rest: Subset


def split(rule: Rule | Subset, params: Any) -> Split:
    """The two parts.

    Raises:
      ValueError: the rule finds no leaf, or leaves none that is floating for directions.
    """
    exact = rule if isinstance(rule, Subset) else subset_by(rule, params, "exact")
    exact = exact.floating(params)
    rest = exact.rest(params)
    if not any(map(is_floating, jax.tree.leaves(rest.select(params)))):
        raise ValueError(
            "exact must leave a floating leaf of params for directions, got all of them; take "
            "jax.value_and_grad for the whole gradient"
        )
    return Split(exact, rest)


def exact_gradient(
    loss_fn: Callable[[Any, Any], jax.Array], part: Any, batches: Any, num_batches: int
) -> Any:
    """The gradient of `loss_fn(part, batch)` by the part, the mean over batches, like the part.

    A batch whose loss or gradient is not finite is left out of the mean; if all are, it is zero.

    Args:
      loss_fn: of the part and one batch; a floating scalar.
      part: pytree of floating arrays.
      batches: pytree of arrays [num_batches, ...].
      num_batches: of which one after the other is evaluated.
    """
    is_moved = [True] * len(jax.tree.leaves(part))
    one = jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], batches))
    first, second = in_halves(loss_fn, part, is_moved, one, keep_vjp=True)
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def add(total_and_count, batch):
        kept = first(batch)
        loss, gradient = jax.value_and_grad(lambda part: second(kept, part, batch))(part)
        leaves = jax.tree.leaves(gradient)
        finite = [jnp.isfinite(loss), *(jnp.all(jnp.isfinite(x)) for x in leaves)]
        is_usable = jnp.all(jnp.stack(finite))
        total, count = total_and_count
        total = jax.tree.map(lambda t, g: t + jnp.where(is_usable, wide(g), 0), total, gradient)
        return (total, count + is_usable), None

    zeros = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), part)
    start = zeros, jnp.zeros((), jnp.int32)
    if num_batches == 1:
        (total, count), _ = add(start, jax.tree.map(lambda x: x[0], batches))
    else:
        (total, count), _ = lax.scan(add, start, batches, length=num_batches)
    mean = lambda t, p: (t / jnp.maximum(count, 1)).astype(p.dtype)
    return jax.tree.map(mean, total, part)
