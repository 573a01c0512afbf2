"""What a model makes of encoded examples: their losses, and how it ranks what may follow.

Axes: B examples of a batch, K options, T tokens, C width, A tokens of the longest option.
"""

from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.models.weights import rows
from zo_jax.train.losses import head_losses
from zo_jax.train.tasks.encode import Chosen, Labelled, Written


def labelled_scores(model: Any, params: Any, batch: Labelled, labels: jax.Array) -> jax.Array:
    """The logits of the labels' tokens after each prompt, float32 [B, K].

    Only these rows of the output head are read, and only at the prompts' ends; and what lies above
    the last layer's keys and values is evaluated there alone.

    Args:
      model: with `hidden_at` and `head`.
      params: its parameters.
      batch: of B examples.
      labels: int32 [K], the labels' tokens.
    """
    last_BC = model.hidden_at(params, batch.tokens, batch.length - 1)
    head_KC = rows(model.head(params), labels, last_BC.dtype)
    return jnp.einsum("bc,kc->bk", last_BC, head_KC, preferred_element_type=jnp.float32)


def chosen_scores(model: Any, params: Any, batch: Chosen, num_scored: int) -> jax.Array:
    """The mean log-probability of each option's tokens, float32 [B, K]; -inf where there is none.

    Args:
      num_scored: A, tokens of the longest option.
    """
    B, K, T = batch.tokens.shape
    flat = Written(batch.tokens.reshape(B * K, T), batch.start.reshape(-1), batch.end.reshape(-1))
    scores = -written_losses(model, params, flat, num_scored).reshape(B, K)
    return jnp.where(batch.end > 0, scores, -jnp.inf)


def written_losses(model: Any, params: Any, batch: Written, num_scored: int) -> jax.Array:
    """The mean cross-entropy of each answer's tokens, float32 [B].

    Only at their places the output head is evaluated.

    Args:
      num_scored: A, tokens of the longest answer.
    """
    B, T = batch.tokens.shape
    A = min(num_scored, T - 1)
    hidden_BTC = model.hidden(params, batch.tokens[:, :-1])
    # Position p predicts token p + 1.
    places_BA = batch.start[:, None] - 1 + jnp.arange(A)[None]
    is_scored_BA = places_BA + 1 < batch.end[:, None]
    places_BA = jnp.clip(places_BA, 0, T - 2)
    hidden_BAC = jnp.take_along_axis(hidden_BTC, places_BA[..., None], axis=1)
    targets_BA = jnp.take_along_axis(batch.tokens, places_BA + 1, axis=1)
    head = model.head(params)
    losses = head_losses(hidden_BAC.reshape(B * A, -1), head, targets_BA.reshape(B * A))
    total_B = jnp.sum(jnp.where(is_scored_BA, losses.reshape(B, A), 0), axis=1)
    return total_B / jnp.maximum(jnp.sum(is_scored_BA, axis=1), 1).astype(total_B.dtype)


def choice_losses(scores_BK: jax.Array, right_BK: jax.Array) -> jax.Array:
    """Cross-entropy of choosing a right option by softmax of the scores, float32 [B].

    Args:
      scores_BK: -inf where there is no option.
      right_BK: bool.
    """
    right = jnp.where(right_BK, scores_BK, -jnp.inf)
    return jax.nn.logsumexp(scores_BK, axis=1) - jax.nn.logsumexp(right, axis=1)
