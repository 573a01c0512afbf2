"""GPT-2: LayerNorm, learned positions, one projection for queries, keys and values.

Axes: B batch, T positions, C width, V vocabulary, P positions learned, L layers, H heads, D width
of a head.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax.models.config import Config
from zo_jax.models.layers import (
    AS_IT_IS,
    Around,
    Cache,
    at_places,
    attend,
    attention,
    below_last,
    layer_norm,
    layer_slices,
    linear,
)
from zo_jax.models.spec import Leaf, matrix, norm
from zo_jax.models.weights import is_weight, rows

PREFIX = "transformer."
_ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def leaves(config: Config) -> dict[str, Any]:
    """The parameters' names and shapes, nested as in Hugging Face's, with the layers stacked."""
    c, L = config, config.num_layers

    def project(name: str, gguf: str, out: int, width: int) -> dict[str, Leaf]:
        shape = L, out, width
        return matrix(f"h.{{}}.{name}", f"blk.{{}}.{gguf}", shape, bias=True, transposed=True)

    tree = {
        "wte": matrix("wte", "token_embd", (c.vocab_size, c.width)),
        "wpe": matrix("wpe", "position_embd", (c.context_length, c.width)),
        "h": {
            "ln_1": norm("h.{}.ln_1", "blk.{}.attn_norm", (L, c.width), bias=True),
            "attn": {
                "c_attn": project("attn.c_attn", "attn_qkv", 3 * c.width, c.width),
                "c_proj": project("attn.c_proj", "attn_output", c.width, c.width),
            },
            "ln_2": norm("h.{}.ln_2", "blk.{}.ffn_norm", (L, c.width), bias=True),
            "mlp": {
                "c_fc": project("mlp.c_fc", "ffn_up", c.hidden_width, c.width),
                "c_proj": project("mlp.c_proj", "ffn_down", c.width, c.hidden_width),
            },
        },
        "ln_f": norm("ln_f", "output_norm", (c.width,), bias=True),
    }
    if not c.tied:
        tree["lm_head"] = matrix("lm_head", "output", (c.vocab_size, c.width))
    return tree


def head(params: Any) -> Any:
    """The output head [V, C]."""
    return params.get("lm_head", params["wte"])["weight"]


def hidden(
    config: Config,
    params: Any,
    tokens_BT: jax.Array,
    dtype: Any,
    start_B: jax.Array | None = None,
    cache: Cache | None = None,
    around: Around = AS_IT_IS,
) -> tuple[jax.Array, Cache | None]:
    """Final hidden states [B, T, C] in `dtype`, and the cache; the arguments are those of
    `decoder.hidden`.

    Raises:
      ValueError: there are more positions than were learned.
    """
    _check_length(config, tokens_BT.shape[1] if cache is None else cache.keys.shape[2])
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    if start_B is not None:
        positions_BT = positions_BT + start_B[:, None]
    x_BTC = _embedded(params, tokens_BT, positions_BT, dtype)
    layer = _layer(config, positions_BT, around)
    step = lambda carry, slices: (layer(carry, slices), None)
    (x_BTC, cache), _ = lax.scan(step, (x_BTC, cache), layer_slices(config, params["h"]))
    return layer_norm(x_BTC, params["ln_f"], config.norm_epsilon), cache


def hidden_at(
    config: Config,
    params: Any,
    tokens_BT: jax.Array,
    places_B: jax.Array,
    dtype: Any,
    around: Around = AS_IT_IS,
) -> jax.Array:
    """`hidden` at one place of each row, [B, C]: of the last layer, whose output is read there
    alone, only its first product is evaluated everywhere. The arguments are those of
    `decoder.hidden_at`.

    Raises:
      ValueError: as `hidden`.
    """
    _check_length(config, tokens_BT.shape[1])
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    x_BTC = _embedded(params, tokens_BT, positions_BT, dtype)
    layer = _layer(config, positions_BT, around)
    x_BTC = below_last(layer, x_BTC, layer_slices(config, params["h"]))

    def last(p: Any, x_BTC: jax.Array) -> jax.Array:
        q, k, v = _heads(config, p, x_BTC)
        y_B1C = around.attend(attend)(
            at_places(q, places_B), k, v, places_B[:, None], positions_BT, config.windows[-1]
        )
        return _after_attention(config, p, at_places(x_BTC, places_B), y_B1C, around)

    x_B1C = around.layer(last)(jax.tree.map(lambda x: x[-1], params["h"]), x_BTC)
    return layer_norm(x_B1C, params["ln_f"], config.norm_epsilon)[:, 0]


def _check_length(config: Config, positions: int) -> None:
    if positions > config.context_length:
        raise ValueError(
            f"GPT-2 has {config.context_length} learned positions; got {positions} tokens; shorten "
            f"them"
        )


def _embedded(params: Any, tokens_BT: jax.Array, positions_BT: jax.Array, dtype: Any) -> jax.Array:
    """The residual stream below the layers."""
    # Of a population the positions of every row are its member's.
    if is_weight(params["wpe"]["weight"]):
        positions_BT = jnp.broadcast_to(positions_BT, tokens_BT.shape)
    x_BTC = rows(params["wte"]["weight"], tokens_BT, dtype)
    return x_BTC + rows(params["wpe"]["weight"], positions_BT, dtype)


def _layer(config: Config, positions_BT: jax.Array, around: Around) -> Any:
    """A layer as a function of (the stream below it, the cache) and its slice of `layer_slices`."""

    def layer(carry, slices):
        x_BTC, cache = carry
        p, window, i = slices
        q, k, v = _heads(config, p, x_BTC)
        y_BTC, cache = attention(q, k, v, positions_BT, window, cache, i, around)
        return _after_attention(config, p, x_BTC, y_BTC, around), cache

    return around.layer(layer)


def _heads(config, p, x_BTC):
    """Queries, keys and values, [B, T, H, D] each."""
    h_BTC = layer_norm(x_BTC, p["ln_1"], config.norm_epsilon)
    qkv = jnp.split(linear(h_BTC, p["attn"]["c_attn"]), 3, axis=-1)
    return [y.reshape(*y.shape[:2], config.num_heads, config.head_dim) for y in qkv]


def _after_attention(config, p, x_BTC, y_BTC, around):
    """The residual stream above a layer, from that below it and what the heads read."""
    x_BTC = x_BTC + linear(y_BTC, p["attn"]["c_proj"])
    h_BTC = linear(layer_norm(x_BTC, p["ln_2"], config.norm_epsilon), p["mlp"]["c_fc"])
    activation = around.unit(_ACTIVATIONS[config.activation])
    return x_BTC + linear(activation(h_BTC), p["mlp"]["c_proj"])
