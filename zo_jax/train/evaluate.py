"""What a model is worth: its loss on held-out blocks, and text sampled from it.

Axes: N blocks, B blocks of a batch, T tokens of a block, K batches, W tokens of the model's window.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zo_jax.models.weights import product
from zo_jax.train.config import TrainConfig
from zo_jax.train.losses import next_token_loss

# Blocks evaluated at once: enough to fill the cores; the loss bounds the memory of the logits.
_BATCH = 16


def choose_blocks(blocks_NT: np.ndarray, num_blocks: int) -> np.ndarray:
    """At most `num_blocks` of the blocks, evenly spaced, always the same: int32 [n, T]."""
    n = min(num_blocks, len(blocks_NT))
    return blocks_NT[np.linspace(0, len(blocks_NT) - 1, n).round().astype(np.int64)]


def make_evaluate(model: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """A jitted function (params, blocks [N, T]) -> mean next-token loss in nats, float32.

    Full batches are scanned and what is left over is one smaller batch, so that every block counts
    the same and all of it is one compiled call.
    """

    @jax.jit
    def evaluate(params: Any, blocks_NT: jax.Array) -> jax.Array:
        N, T = blocks_NT.shape
        K, rest = divmod(N, _BATCH)
        loss = functools.partial(next_token_loss, model, params)
        total = jnp.zeros((), jnp.float32)
        if K:
            batches_KBT = blocks_NT[: K * _BATCH].reshape(K, _BATCH, T)
            total += _BATCH * jnp.sum(jax.lax.map(loss, batches_KBT))
        if rest:
            total += rest * loss(blocks_NT[K * _BATCH :])
        return total / N

    return evaluate


@functools.partial(jax.jit, static_argnames=("model", "num_tokens"))
def sample(
    model: Any,
    params: Any,
    key: jax.Array,
    window_W: jax.Array,
    prompt_length: jax.Array,
    temperature: jax.Array,
    *,
    num_tokens: int,
) -> jax.Array:
    """Samples tokens from softmax(logits / temperature), one after the other.

    Args:
      model: the decoder.
      params: its parameters.
      key: PRNG key.
      window_W: int32 [W], the prompt and then anything; W is the most tokens the model looks back.
      prompt_length: int32, tokens of the prompt, from 1 to W.
      temperature: float32, above 0.
      num_tokens: how many to sample.

    Returns:
      int32 [num_tokens], without the prompt.
    """
    W = window_W.shape[0]
    head = model.head(params)

    def step(carry, key):
        window_W, length = carry
        # Attention is causal, so what stands after the last token has no say.
        hidden_C = model.hidden(params, window_W[None])[0, length - 1]
        logits_V = product(hidden_C[None], head, jnp.float32)[0]
        token = jax.random.categorical(key, logits_V / temperature).astype(jnp.int32)
        full = length == W
        window_W = jnp.where(full, jnp.roll(window_W, -1), window_W)
        window_W = window_W.at[jnp.where(full, W - 1, length)].set(token)
        return (window_W, jnp.minimum(length + 1, W)), token

    carry = window_W, jnp.asarray(prompt_length, jnp.int32)
    return jax.lax.scan(step, carry, jax.random.split(key, num_tokens))[1]


def sample_text(model: Any, params: Any, corpus: Any, key: jax.Array, train: TrainConfig) -> str:
    """Text that the model writes after a newline, or a held-out token where there is none.

    Args:
      corpus: a `zo_jax.train.data.corpus.Corpus`; its block size is the window, as in training.
      train: how many tokens, and at which temperature.
    """
    try:
        prompt = corpus.tokenizer.encode("\n")
    except ValueError:  # a corpus of one line has no such character
        prompt = corpus.validation_NT[0, :1]
    window = np.zeros(corpus.train_NT.shape[1] - 1, np.int32)
    prompt = prompt[-len(window) :]
    window[: len(prompt)] = prompt
    tokens = sample(
        model,
        params,
        key,
        window,
        np.int32(len(prompt)),
        np.float32(train.sample_temperature),
        num_tokens=train.sample_tokens,
    )
    return corpus.tokenizer.decode(np.asarray(tokens))
