"""How much each number inside a sub-layer has to do with the error of its output, found by
evaluating that sub-layer alone.

Axes: B blocks, T tokens (that ask), S tokens (that are read), H heads, D width of a head. Errors
are derivatives of the loss, or what is taken for them; an error of an output comes in, and an error
of what lies inside goes out.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

# Signs are the bits of one word, so a site has as many draws at most.
MAX_DRAWS = 32
# A row of weights with noise of size s sums to 1 ± s (standard deviation), and is divided by that.
MAX_SIZE = 0.2


def unit_error(
    function: Callable[[jax.Array], jax.Array], u: jax.Array, error: jax.Array, size: float
) -> jax.Array:
    """The error of what goes into a function of single units: error ∘ (f(u + s) - f(u - s)) / 2s, s
    = size · rms(u).

    Args:
      function: of each number by itself.
      u: its input, of any shape.
      error: of its output, of that shape.
      size: of the difference, relative to the root mean square of u.

    Returns:
      As u; it misses error ∘ f'(u) by O(s²).

    >>> u = jnp.array([-1.0, 0.0, 2.0])
    >>> unit_error(jnp.square, u, jnp.ones(3), 0.1).round(4).tolist()
    [-2.0, 0.0, 4.0]
    """
    s = size * _rms(u)
    return error * (function(u + s) - function(u - s)) / (2 * s)


def attention_weights(q_BTHD: jax.Array, k_BSHD: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √D), 0 for tokens to come, float [B, H, T, S].

    >>> attention_weights(*jnp.zeros((2, 1, 2, 1, 4)))[0, 0].tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    logits_BHTS = jnp.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD) / math.sqrt(q_BTHD.shape[-1])
    T, S = logits_BHTS.shape[-2:]
    is_past_TS = jnp.tril(jnp.ones((T, S), bool))
    return jax.nn.softmax(jnp.where(is_past_TS[None, None], logits_BHTS, -jnp.inf))


def attention(q_BTHD: jax.Array, k_BSHD: jax.Array, v_BSHD: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √D) v of causal attention, float [B, T, H, D].

    >>> q = k = jnp.zeros((1, 2, 1, 1))
    >>> attention(q, k, jnp.array([2.0, 4.0]).reshape(1, 2, 1, 1)).ravel().tolist()
    [2.0, 3.0]
    """
    weights_BHTS = attention_weights(q_BTHD, k_BSHD)
    return jnp.einsum("bhts,bshd->bthd", weights_BHTS, v_BSHD)


def attention_error(
    method: str,
    qkv: tuple[jax.Array, ...],
    error_BTHD: jax.Array,
    key: jax.Array,
    *,
    num_draws: int,
    size: float,
    discount: float,
) -> tuple[jax.Array, ...]:
    """The errors of q, k and v, given that of the output of `attention`.

    Methods:
      weights: signs a, times s and the root of each weight w, are added to the weights of a token,
        which change that token's output z alone. With
        c = ⟨error, z(w + s √w a) - z(w - s √w a)⟩ / 2s the error of w is the mean of c a / √w, and
        w times as large is that of its logit. The rest is linear: q, k and v get theirs through the
        transposes of q kᵀ and of the weights. The mean over many draws is the derivative of
        `attention`, but for O(s²), s small: the weights of a token sum to 1 ± s with noise.
      qkv: signs are added to q, to k and to v, each in passes of its own. What later tokens read of
        k and v is credited with their scores too, `discount` for each token that lies between.
        Biased.
      closed_form: the logits' error by the derivative of a softmax, w ∘ (⟨error, v⟩ - ⟨error, z⟩),
        with no draw.
      none: zero.

    Args:
      method: one of those.
      qkv: q, k and v, each [B, T, H, D].
      error_BTHD: of the output.
      key: of the signs.
      num_draws: of signs, for each of the sites, at most `MAX_DRAWS`.
      size: s; of q, k and v relative to their root mean square.
      discount: in [0, 1], of method qkv.

    Returns:
      Three arrays [B, T, H, D].

    Source: "local scores" are node perturbation (Williams, "Simple statistical gradient-following
    algorithms", 1992) of a part of the network whose output's error is known.

    >>> q, k, v, error = jax.random.normal(jax.random.key(0), (4, 1, 3, 2, 4))
    >>> options = dict(num_draws=32, size=0.05, discount=0.0)
    >>> errors = attention_error("weights", (q, k, v), error, jax.random.key(1), **options)
    >>> _, derivative = jax.vjp(attention, q, k, v)
    >>> bool(jnp.allclose(errors[2], derivative(error)[2], atol=1e-5))  # of v it is linear
    True
    """
    if method == "none":
        return tuple(map(jnp.zeros_like, qkv))
    if method == "qkv":
        return _by_parts(qkv, error_BTHD, key, num_draws, size, discount)
    q_BTHD, k_BSHD, v_BSHD = qkv
    weights_BHTS = attention_weights(q_BTHD, k_BSHD)
    # What the value of each token would be worth to the token that reads it.
    worth_BHTS = jnp.einsum("bthd,bshd->bhts", error_BTHD, v_BSHD)
    if method == "closed_form":
        mean_BHT1 = jnp.sum(weights_BHTS * worth_BHTS, axis=-1, keepdims=True)
        d_logits_BHTS = weights_BHTS * (worth_BHTS - mean_BHT1)
    else:
        d_logits_BHTS = _by_rows(weights_BHTS, worth_BHTS, key, num_draws, size)
    d_logits_BHTS /= math.sqrt(q_BTHD.shape[-1])
    return (
        jnp.einsum("bhts,bshd->bthd", d_logits_BHTS, k_BSHD),
        jnp.einsum("bhts,bthd->bshd", d_logits_BHTS, q_BTHD),
        jnp.einsum("bhts,bthd->bshd", weights_BHTS, error_BTHD),
    )


def _by_rows(weights_BHTS, worth_BHTS, key, num_draws, size):
    """The error of the logits by signs added to the weights; ⟨error, z⟩ is the mean worth."""
    root_BHTS = jnp.sqrt(weights_BHTS)

    def mean_worth(moved_BHTS):
        total_BHT1 = jnp.sum(moved_BHTS, axis=-1, keepdims=True)
        return jnp.sum(moved_BHTS * worth_BHTS, axis=-1, keepdims=True) / total_BHT1

    def score(signs_BHTS):
        step_BHTS = size * root_BHTS * signs_BHTS
        change_BHT1 = mean_worth(weights_BHTS + step_BHTS) - mean_worth(weights_BHTS - step_BHTS)
        return change_BHT1 / (2 * size) * signs_BHTS

    return root_BHTS * _mean(score, key, weights_BHTS.shape, num_draws)


def _by_parts(qkv, error_BTHD, key, num_draws, size, discount):
    T = error_BTHD.shape[1]
    ahead_TT = jnp.arange(T)[None] - jnp.arange(T)[:, None]
    credit_TT = jnp.where(ahead_TT >= 0, discount ** jnp.maximum(ahead_TT, 0), 0)

    def error_of(part: int, key: jax.Array) -> jax.Array:
        s = size * _rms(qkv[part])

        def score(signs: jax.Array) -> jax.Array:
            moved = lambda step: attention(
                *(x + step * signs if i == part else x for i, x in enumerate(qkv))
            )
            score_BTH = jnp.sum(error_BTHD * (moved(s) - moved(-s)), axis=-1) / (2 * s)
            if part:  # later tokens read keys and values; a query is its own token's
                score_BTH = jnp.einsum("ts,bsh->bth", credit_TT, score_BTH)
            return score_BTH[..., None] * signs

        return _mean(score, key, qkv[part].shape, num_draws)

    return tuple(error_of(part, jax.random.fold_in(key, part)) for part in range(3))


def _mean(score: Callable[[jax.Array], jax.Array], key: Any, shape: Any, num_draws: int):
    """The mean of a function of signs over draws of them."""
    words = jax.random.bits(key, shape)
    total = jnp.zeros(shape)
    for draw in range(num_draws):
        total += score(1 - 2 * ((words >> draw) & 1).astype(jnp.float32))
    return total / num_draws


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)) + 1e-12)
