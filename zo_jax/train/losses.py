"""Next-token cross-entropy, block by block over the vocabulary: the logits of a batch never exist
at once.

Axes: N tokens, C width of the residual stream, V vocabulary, W words of a block.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax.models.weights import is_weight, product

# Words of a block: in cache with the logits of some hundred tokens, and long enough for a fast
# product.
_BLOCK_WORDS = 1024
# Tokens whose logits of a block exist at once: 32 MB in float32.
_CHUNK_TOKENS = 8192
# Tokens whose logits of the whole vocabulary exist at once, of a head that is no array.
_WEIGHT_TOKENS = 256


@jax.custom_vjp
def cross_entropy(hidden_NC: jax.Array, head_VC: jax.Array, targets_N: jax.Array) -> jax.Array:
    """Cross-entropy of each token, log Σ exp(h W) - h w_target, float32 [N], in nats.

    One pass over the blocks of the vocabulary with a running maximum and sum (Milakov and
    Gimelshein, "Online normalizer calculation for softmax", 2018); the gradient is a second pass,
    with the logits computed again.

    Args:
      hidden_NC: floating; its dtype is that of the products, summed in float32.
      head_VC: floating, the rows of the output head.
      targets_N: int32 in [0, V).
    """
    return _forward(hidden_NC, head_VC, targets_N)[0]


def _forward(hidden_NC, head_VC, targets_N):
    def add_block(i, carry):
        top_N, total_N = carry
        logits_NW, _ = _block_logits(hidden_NC, head_VC, i)
        new_N = jnp.maximum(top_N, jnp.max(logits_NW, axis=1))
        sum_N = jnp.sum(jnp.exp(logits_NW - new_N[:, None]), axis=1)
        return new_N, total_N * jnp.exp(top_N - new_N) + sum_N

    N = len(targets_N)
    start = jnp.full(N, -jnp.inf, jnp.float32), jnp.zeros(N, jnp.float32)
    top_N, total_N = lax.fori_loop(0, _num_blocks(head_VC), add_block, start)
    rows_NC = head_VC[targets_N].astype(hidden_NC.dtype)
    picked_N = jnp.einsum("nc,nc->n", hidden_NC, rows_NC, preferred_element_type=jnp.float32)
    log_sum_N = top_N + jnp.log(total_N)
    return log_sum_N - picked_N, (hidden_NC, head_VC, targets_N, log_sum_N)


def _backward(residuals, cotangent_N):
    hidden_NC, head_VC, targets_N, log_sum_N = residuals
    num_blocks = _num_blocks(head_VC)
    product = lambda equation, x, y: jnp.einsum(
        equation, x.astype(hidden_NC.dtype), y, preferred_element_type=jnp.float32
    )

    def add_block(j, carry):
        d_hidden_NC, d_head_VC = carry
        # From the last block to the first: the one before overwrites the rows that the last has of
        # it.
        i = num_blocks - 1 - j
        logits_NW, (start, block_WC, words_1W) = _block_logits(hidden_NC, head_VC, i)
        # What the block before has too counts for it alone: the logits there are -inf.
        is_target_NW = (words_1W == targets_N[:, None]) & jnp.isfinite(logits_NW)
        d_logits_NW = cotangent_N[:, None] * (
            jnp.exp(logits_NW - log_sum_N[:, None]) - is_target_NW.astype(jnp.float32)
        )
        d_hidden_NC += product("nw,wc->nc", d_logits_NW, block_WC)
        d_block_WC = product("nw,nc->wc", d_logits_NW, hidden_NC)
        d_block_WC = d_block_WC.astype(d_head_VC.dtype)
        return d_hidden_NC, lax.dynamic_update_slice_in_dim(d_head_VC, d_block_WC, start, 0)

    start = jnp.zeros(hidden_NC.shape, jnp.float32), jnp.zeros_like(head_VC)
    d_hidden_NC, d_head_VC = lax.fori_loop(0, num_blocks, add_block, start)
    return d_hidden_NC.astype(hidden_NC.dtype), d_head_VC, None


cross_entropy.defvjp(_forward, _backward)


def cross_entropy_gradient(
    hidden_NC: jax.Array, head_VC: jax.Array, targets_N: jax.Array, weight: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cross_entropy` [N], and of `weight` times its sum the gradient by hidden_NC and head_VC, in
    closed form: softmax - onehot.
    """
    losses_N, kept = _forward(hidden_NC, head_VC, targets_N)
    return losses_N, *_backward(kept, jnp.full_like(losses_N, weight))[:2]


def _num_blocks(head_VC: jax.Array) -> int:
    return -(-len(head_VC) // _BLOCK_WORDS)


def _block_logits(hidden_NC: jax.Array, head_VC: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
    """Logits of block i, float32 [N, W], and (first word, rows [W, C], words [1, W]) of the
    block.
    """
    V = head_VC.shape[0]
    W = min(V, _BLOCK_WORDS)
    # The last block starts early enough to be whole.
    start = jnp.minimum(i * W, V - W)
    block_WC = lax.dynamic_slice_in_dim(head_VC, start, W).astype(hidden_NC.dtype)
    logits_NW = lax.dot_general(
        hidden_NC, block_WC, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    words_1W = (start + jnp.arange(W))[None]
    return jnp.where(words_1W >= i * W, logits_NW, -jnp.inf), (start, block_WC, words_1W)


def head_losses(hidden_NC: jax.Array, head: Any, targets_N: jax.Array) -> jax.Array:
    """`cross_entropy` [N] of any output head, in chunks of tokens.

    A head that is no array (quantised, or with an adapter) is multiplied as a whole with fewer
    tokens at once, and their logits exist.
    """
    N = len(targets_N)
    one = _weight_cross_entropy if is_weight(head) else cross_entropy
    num_chunks = -(-N // (_WEIGHT_TOKENS if is_weight(head) else _CHUNK_TOKENS))
    if num_chunks == 1:  # not a loop of one: its backward pass would hold the head's gradient twice
        return one(hidden_NC, head, targets_N)
    pad = -N % num_chunks
    chunks = jax.tree.map(
        lambda x: jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(
            num_chunks, -1, *x.shape[1:]
        ),
        (hidden_NC, targets_N),
    )
    losses_KN = lax.map(lambda chunk: one(chunk[0], head, chunk[1]), chunks)
    return losses_KN.reshape(-1)[:N]


@jax.checkpoint
def _weight_cross_entropy(hidden_NC: jax.Array, head: Any, targets_N: jax.Array) -> jax.Array:
    logits_NV = product(hidden_NC, head, jnp.float32)
    picked_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits_NV, axis=-1) - picked_N


def next_token_losses(model: Any, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Cross-entropy of predicting token t + 1 from tokens 1..t, in nats, float32 [B, T - 1].

    Args:
      model: with `hidden` and `head`, such as a `train.model.GPT` or a `models.Model`.
      params: its parameters.
      tokens_BT: int32.
    """
    B, T = tokens_BT.shape
    N = B * (T - 1)
    hidden_NC = model.hidden(params, tokens_BT[:, :-1]).reshape(N, -1)
    losses_N = head_losses(hidden_NC, model.head(params), tokens_BT[:, 1:].reshape(N))
    return losses_N.reshape(B, T - 1)


def next_token_loss(model: Any, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """The mean of `next_token_losses`."""
    losses_BT = next_token_losses(model, params, tokens_BT)
    return jnp.sum(losses_BT) / losses_BT.size
