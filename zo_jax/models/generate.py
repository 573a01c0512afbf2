"""Text from a model: prompts of different lengths at once, with a cache of keys and values.

A row's position s is slot s of its cache, so no row is padded on the left and none sees another's
padding: what stands beyond a prompt's end is written over before it can be seen.

Axes: B prompts, P tokens of the longest, S slots of the cache, V vocabulary, N tokens of a chunk.
"""

from collections.abc import Sequence
import functools
import time
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from zo_jax.models.config import Config
from zo_jax.models.layers import Cache, make_cache
from zo_jax.models.model import Model, architecture
from zo_jax.models.weights import product

# Tokens between two looks for stop strings.
_CHUNK = 16
# Lengths are rounded up to a multiple, so that similar prompts share a compiled program; those of
# short prompts to a smaller one, since of many rows most of the padding would be read for nothing.
_ROUND, _ROUND_SHORT = 32, 8

Prompt = str | Sequence[dict[str, str]] | Sequence[int] | np.ndarray


class Generated(NamedTuple):
    """What a model wrote.

    Attributes:
      texts: one a prompt, without it, and without the stop string or token; empty texts where there
        is no tokenizer.
      tokens: int32 [num_tokens] each, without the stop token.
      tokens_per_second: of all rows together, after the prompts are read and everything is
        compiled.
    """

    texts: list[str]
    tokens: list[np.ndarray]
    tokens_per_second: float


class _State(NamedTuple):
    """Between two tokens.

    Attributes:
      cache: keys and values.
      logits_BV: of the next token.
      lengths_B: tokens so far.
      done_B: rows that have met a stop.
    """

    cache: Cache
    logits_BV: jax.Array
    lengths_B: jax.Array
    done_B: jax.Array


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    seed: int = 0,
    streams: Sequence[int] | np.ndarray | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Generated:
    """Continues prompts, each as if it were alone.

    A token is drawn from the smallest set of the likeliest tokens that holds `top_p` of
    softmax(logits / temperature) (Holtzman et al., "The Curious Case of Neural Text Degeneration",
    2020).

    Args:
      model: with a tokenizer, unless all prompts are token ids and there is no stop string.
      params: like `model.params`.
      prompts: each a text, a conversation (dicts with "role" and "content"), or int32 token ids.
      max_tokens: the most that are written to a prompt.
      temperature: 0 for the likeliest token.
      top_p: in (0, 1].
      stop: strings that end a text.
      stop_tokens: ids that end a text; None for the model's.
      seed: of the draws; prompt i draws by key `fold_in(key(seed), streams[i])` and by position.
      streams: for each prompt the number of its stream; None for its own number.
      sharding: of the prompts over devices, which hold `params`; None for where these are.

    Raises:
      ValueError: a prompt is empty or too long, the model has no tokenizer or no chat template, or
        a setting is out of range.

    >>> import jax, numpy as np
    >>> from zo_jax import models
    >>> m = models.create(dict(model_type="gpt2", vocab_size=11, n_embd=8, n_head=2, n_layer=2), jax.random.key(0))
    >>> models.generate(m, m.params, [[1, 2, 3], [4]], max_tokens=5).tokens[1].shape
    (5,)
    """  # noqa: E501
    ids = [_encode(model, prompt) for prompt in prompts]
    _check(model.config, ids, max_tokens, temperature, top_p)
    if stop and model.tokenizer is None:
        raise ValueError("stop strings need a tokenizer, which the model's folder lacks")
    stops = model.config.eos_tokens if stop_tokens is None else stop_tokens
    # At least one, which no token is.
    stops = jnp.asarray([*stops, -1], jnp.int32)
    streams = np.arange(len(ids)) if streams is None else np.asarray(streams)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), streams)
    static = {"config": model.config, "dtype": jnp.dtype(model.dtype)}

    lengths_B = np.asarray([len(row) for row in ids], np.int32)
    limit = model.config.context_length
    slots = min(_round_up(int(lengths_B.max()) + max_tokens), limit)
    longest = int(lengths_B.max())
    width = _round_up(longest, _ROUND_SHORT if longest <= _ROUND else _ROUND)
    tokens_BP = np.zeros((len(ids), min(width, slots)), np.int32)
    for row, prompt in zip(tokens_BP, ids, strict=True):
        row[: len(prompt)] = prompt
    if sharding is not None:
        tokens_BP, lengths_B, row_keys = jax.device_put((tokens_BP, lengths_B, row_keys), sharding)
    state = _read(params, tokens_BP, lengths_B, num_slots=slots, **static)
    write = functools.partial(
        _write, temperature=jnp.float32(temperature), top_p=jnp.float32(top_p), **static
    )
    # No tokens: compiles, so that what is timed is what it says.
    _, state = write(params, state, row_keys, stops, jnp.int32(0))
    jax.block_until_ready(state)

    start, written = time.perf_counter(), [np.zeros(0, np.int32) for _ in ids]
    ends: list[int | None] = [None] * len(ids)
    count = 0
    while count < max_tokens and not np.all(state.done_B):
        room = min(_CHUNK, max_tokens - count)
        chunk_BN, state = write(params, state, row_keys, stops, jnp.int32(room))
        rows = np.asarray(chunk_BN)
        written = [np.concatenate([a, b[b >= 0]]) for a, b in zip(written, rows, strict=True)]
        count += room
        for i in range(len(ids)) if stop else ():
            if ends[i] is None:
                ends[i] = _find_stop(model.tokenizer, ids[i], written[i], stop)
        stopped_B = jnp.asarray([end is not None for end in ends])
        state = state._replace(done_B=state.done_B | stopped_B)
    seconds = time.perf_counter() - start

    tokens = [row[:end] for row, end in zip(written, ends, strict=True)]
    texts = [
        _cut(_text(model.tokenizer, prompt, row), stop) if model.tokenizer else ""
        for prompt, row in zip(ids, tokens, strict=True)
    ]
    return Generated(texts, tokens, sum(map(len, written)) / max(seconds, 1e-9))


def _encode(model: Model, prompt: Prompt) -> np.ndarray:
    is_text = isinstance(prompt, str)
    is_chat = not is_text and len(prompt) > 0 and isinstance(prompt[0], dict)
    if not is_text and not is_chat:
        return np.asarray(prompt, np.int32)
    if model.tokenizer is None:
        raise ValueError(
            "the model's folder has no tokenizer.json; give prompts as token ids, or add the file"
        )
    if is_chat:
        return model.tokenizer.encode(model.tokenizer.chat(prompt), special=False)
    ids = model.tokenizer.encode(prompt)
    bos = model.config.bos_token
    return ids if len(ids) or bos is None else np.asarray([bos], np.int32)


def _check(
    c: Config, ids: Sequence[np.ndarray], max_tokens: int, temperature: float, top_p: float
) -> None:
    if not ids or min(map(len, ids)) == 0:
        raise ValueError(
            "prompts must be at least one, and each of at least one token; got an empty one"
        )
    if max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "max_tokens must be at least 1, temperature at least 0 and top_p in (0, 1]; got "
            f"{max_tokens}, {temperature}, {top_p}"
        )
    longest = max(map(len, ids))
    if longest + max_tokens > c.context_length:
        raise ValueError(
            f"a prompt of {longest} tokens and max_tokens {max_tokens} are more than the model's "
            f"context of {c.context_length}; "
            "shorten one"
        )
    if any(np.min(row) < 0 or np.max(row) >= c.vocab_size for row in ids):
        raise ValueError(f"token ids must be in [0, {c.vocab_size}); a prompt has others")


def _round_up(n: int, multiple: int = _ROUND) -> int:
    return -(-n // multiple) * multiple


@functools.partial(jax.jit, static_argnames=("config", "dtype", "num_slots"))
def _read(
    params: Any,
    tokens_BP: jax.Array,
    lengths_B: jax.Array,
    *,
    config: Config,
    dtype: Any,
    num_slots: int,
) -> _State:
    """The prompts in the cache, and the logits after them."""
    B = len(tokens_BP)
    c, functions = config, architecture(config)
    shape = c.num_layers, B, num_slots, c.num_kv_heads, c.head_dim
    starts_B = jnp.zeros(B, jnp.int32)
    hidden_BPC, cache = functions.hidden(
        c, params, tokens_BP, dtype, starts_B, make_cache(shape, dtype)
    )
    last_BC = hidden_BPC[jnp.arange(B), lengths_B - 1]
    logits_BV = product(last_BC, functions.head(params), jnp.float32)
    return _State(cache, logits_BV, lengths_B, jnp.zeros(B, bool))


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames=("state",))
def _write(
    params: Any,
    state: _State,
    row_keys: jax.Array,
    stops: jax.Array,
    num_tokens: jax.Array,
    *,
    config: Config,
    dtype: Any,
    temperature: jax.Array,
    top_p: jax.Array,
) -> tuple[jax.Array, _State]:
    """At most `num_tokens` more tokens, int32 [B, N]; -1 where a row is done."""
    functions = architecture(config)

    def step(carry):
        i, chunk_BN, state = carry
        keys = jax.vmap(jax.random.fold_in)(row_keys, state.lengths_B)
        tokens_B = _sample(keys, state.logits_BV, temperature, top_p)
        done_B = state.done_B | jnp.any(tokens_B[:, None] == stops[None], axis=1)
        chunk_BN = chunk_BN.at[:, i].set(jnp.where(done_B, -1, tokens_B))
        hidden_B1C, cache = functions.hidden(
            config, params, tokens_B[:, None], dtype, state.lengths_B, state.cache
        )
        logits_BV = product(hidden_B1C[:, 0], functions.head(params), jnp.float32)
        lengths_B = state.lengths_B + jnp.where(done_B, 0, 1)
        return i + 1, chunk_BN, _State(cache, logits_BV, lengths_B, done_B)

    def goes_on(carry):
        i, _, state = carry
        return (i < num_tokens) & ~jnp.all(state.done_B)

    chunk_BN = jnp.full((len(state.done_B), _CHUNK), -1, jnp.int32)
    _, chunk_BN, state = lax.while_loop(goes_on, step, (jnp.int32(0), chunk_BN, state))
    return chunk_BN, state


def _sample(
    keys: jax.Array, logits_BV: jax.Array, temperature: jax.Array, top_p: jax.Array
) -> jax.Array:
    def draw(logits_BV):
        logits_BV = logits_BV / temperature
        logits_BV = lax.cond(top_p < 1, lambda x: _likeliest(x, top_p), lambda x: x, logits_BV)
        return jax.vmap(jax.random.categorical)(keys, logits_BV)

    likeliest = lambda logits_BV: jnp.argmax(logits_BV, axis=-1)
    return lax.cond(temperature > 0, draw, likeliest, logits_BV).astype(jnp.int32)


def _likeliest(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits, -inf outside the smallest set of the likeliest tokens that holds `top_p`."""
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    is_in_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < top_p
    lowest_B1 = jnp.min(jnp.where(is_in_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)


def _text(tokenizer: Any, prompt: np.ndarray, tokens: np.ndarray) -> str:
    """The tokens' text where it stands: some tokenizers spell the first token of a text in another
    way.
    """
    return tokenizer.decode(np.concatenate([prompt, tokens]))[len(tokenizer.decode(prompt)) :]


def _find_stop(
    tokenizer: Any, prompt: np.ndarray, tokens: np.ndarray, stop: Sequence[str]
) -> int | None:
    """After how many tokens a stop string is whole; None where there is none."""
    has_stop = lambda n: any(s in _text(tokenizer, prompt, tokens[:n]) for s in stop)
    if not has_stop(len(tokens)):
        return None
    return next(n for n in range(len(tokens) + 1) if has_stop(n))


def _cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]
