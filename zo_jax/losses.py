"""Next-token cross-entropy, computed in chunks so that the logits of a whole batch never exist at once."""

from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.model import GPT

# Logits of a chunk: about 8 million float32 numbers, 34 MB.
_LOGITS_PER_CHUNK = 2**23


def cross_entropy_sum(
    hidden_NC: jax.Array, head_VC: jax.Array, targets_N: jax.Array, weights_N: jax.Array
) -> jax.Array:
    """Sum of weighted cross-entropies of N tokens, float32."""
    logits_NV = jax.lax.dot_general(
        hidden_NC, head_VC, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    picked_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=1)[:, 0]
    return jnp.sum(weights_N * (jax.nn.logsumexp(logits_NV, axis=1) - picked_N))


def next_token_loss(model: GPT, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy of predicting token t + 1 from tokens 1..t, in nats, float32."""
    B, T = tokens_BT.shape
    hidden_BTC = model.apply({"params": params}, tokens_BT[:, :-1])
    head_VC = params["wte"]["embedding"].astype(model.dtype)
    num_tokens = B * (T - 1)
    num_chunks = -(-num_tokens * model.vocab_size // _LOGITS_PER_CHUNK)
    chunk = -(-num_tokens // num_chunks)
    pad = -num_tokens % chunk
    hidden_NC = jnp.pad(hidden_BTC.reshape(num_tokens, -1), ((0, pad), (0, 0)))
    targets_N = jnp.pad(tokens_BT[:, 1:].reshape(num_tokens), (0, pad))
    weights_N = (jnp.arange(num_tokens + pad) < num_tokens).astype(jnp.float32)

    @jax.checkpoint
    def add_chunk(total, chunk_xs):
        hidden, targets, weights = chunk_xs
        return total + cross_entropy_sum(hidden, head_VC, targets, weights), None

    chunks = jax.tree.map(
        lambda x: x.reshape(-1, chunk, *x.shape[1:]), (hidden_NC, targets_N, weights_N)
    )
    total, _ = jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), chunks)
    return total / num_tokens
