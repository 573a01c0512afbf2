"""Parts of a model that learn from the error of their own output: what `jax.grad` makes of them is
no derivative through the model, but local credit, in any model.

With e the error of the residual stream's end, which head and last norm have in closed form, a block
in `residual_feedback` takes e for the error of its own output, as if the blocks above changed
nothing: exact for the last block, biased below. Inside it the MLP's units have differences in the
place of a derivative (`by_differences`), and attention draws (`attention_by_draws`): evaluations of
that part alone (`zo_jax.credit`). What is left are closed forms of linear maps and norms.
Axes: B blocks, T tokens, H heads, D width of a head.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax

from zo_jax import credit


def residual_feedback(block: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A block of a residual stream whose error goes on below as it came, past the block.

    The parameters of the block get their gradient from the error of the block's output; what lies
    below gets that error too, and nothing of what the block made of its input. Left as it is the
    first block hands the embeddings its own. Values are the same.

    Args:
      block: `block(params, x, *others)` -> like x, what is read below included (x + f(x)).

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> block = lambda w, x: x + jnp.tanh(w * x)
    >>> handed = zo_jax.residual_feedback(block)
    >>> w, x = jnp.float32(2.0), jnp.float32(0.3)
    >>> bool(handed(w, x) == block(w, x))
    True
    >>> dw, dx = jax.grad(handed, argnums=(0, 1))(w, x)
    >>> bool(dw == jax.grad(block)(w, x)), float(dx)
    (True, 1.0)
    """

    @functools.wraps(block)
    def handed(params: Any, x: jax.Array, *others: Any) -> jax.Array:
        still = jax.lax.stop_gradient(x)
        return block(params, still, *others) + (x - still)

    return handed


def by_differences(
    function: Callable[[jax.Array], jax.Array], size: float = 0.05
) -> Callable[[jax.Array], jax.Array]:
    """A function of single units with a difference of two evaluations in the place of its
    derivative, as `zo_jax.credit.unit_error` takes it.

    Args:
      function: of each number by itself.
      size: of the difference, relative to the root mean square of what goes in.

    >>> import jax, zo_jax
    >>> step = lambda u: (u > 0).astype(u.dtype)  # whose derivative is 0
    >>> u = jax.numpy.array([-3.0, 0.1, 3.0])
    >>> slope = jax.grad(lambda u: zo_jax.by_differences(step, 0.1)(u).sum())(u)
    >>> slope.round(1).tolist()
    [0.0, 2.0, 0.0]
    """

    @jax.custom_vjp
    def unit(u: jax.Array) -> jax.Array:
        return function(u)

    unit.defvjp(
        lambda u: (function(u), u),
        lambda u, error: (credit.unit_error(function, u, error, size),),
    )
    return unit


def attention_by_draws(
    q_BTHD: jax.Array,
    k_BTHD: jax.Array,
    v_BTHD: jax.Array,
    key: jax.Array,
    *,
    num_draws: int = 8,
    size: float = 0.05,
) -> jax.Array:
    """softmax(q kᵀ / √D) v of causal attention, whose errors come from signs that are added to its
    weights, as method "weights" of `zo_jax.credit.attention_error` has it: no derivative of the
    softmax, and its derivative in the mean, but for O(size²).

    Args:
      q_BTHD, k_BTHD, v_BTHD: queries, keys and values, float32.
      key: of the signs, a new one for every step and layer.
      num_draws: of signs, from 1 to 32.
      size: of the signs, relative to the root of a weight; small beside 1.

    Returns:
      float32 [B, T, H, D].

    Raises:
      ValueError: `num_draws` or `size` is out of range.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> x = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 4))
    >>> z = lambda x: jnp.sum(jnp.sin(zo_jax.attention_by_draws(*x, jax.random.key(1))))
    >>> jax.grad(z)(x).shape
    (3, 2, 5, 2, 4)
    """
    if not 1 <= num_draws <= credit.MAX_DRAWS:
        raise ValueError(f"num_draws must be from 1 to {credit.MAX_DRAWS}, got {num_draws!r}")
    if not 0 < size <= credit.MAX_SIZE:
        raise ValueError(f"size must be above 0 and at most {credit.MAX_SIZE}, got {size!r}")

    @jax.custom_vjp
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, key: jax.Array) -> jax.Array:
        del key
        return credit.attention(q, k, v)

    def errors(kept: Any, error_BTHD: jax.Array) -> Any:
        q, k, v, key = kept
        found = credit.attention_error(
            "weights", (q, k, v), error_BTHD, key, num_draws=num_draws, size=size, discount=0.0
        )
        return *found, None

    attend.defvjp(lambda *args: (credit.attention(*args[:3]), args), errors)
    return attend(q_BTHD, k_BTHD, v_BTHD, key)
