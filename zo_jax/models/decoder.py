"""The decoder of Llama, Mistral and Qwen: RMSNorm, rotary positions, grouped-query attention,
SwiGLU.

Axes: B batch, T positions, C width, V vocabulary, L layers, H heads, K heads of keys and values, D
width of a head.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax.models import rope
from zo_jax.models.config import Config
from zo_jax.models.layers import (
    AS_IT_IS,
    Around,
    Cache,
    at_places,
    attend,
    attention,
    below_last,
    layer_slices,
    linear,
    rms_norm,
)
from zo_jax.models.spec import Leaf, matrix, norm
from zo_jax.models.weights import rows

PREFIX = "model."


def leaves(config: Config) -> dict[str, Any]:
    """The parameters' names and shapes, nested as in Hugging Face's, with the layers stacked."""
    c, L = config, config.num_layers
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def project(name, gguf, out, width, bias):
        return matrix(f"layers.{{}}.{name}", f"blk.{{}}.{gguf}", (L, out, width), bias=bias)

    def layer_norm(name: str, gguf: str, width: int) -> dict[str, Leaf]:
        return norm(f"layers.{{}}.{name}", f"blk.{{}}.{gguf}", (L, width))

    attn = {
        "q_proj": project("self_attn.q_proj", "attn_q", heads, c.width, c.qkv_bias),
        "k_proj": project("self_attn.k_proj", "attn_k", kv_heads, c.width, c.qkv_bias),
        "v_proj": project("self_attn.v_proj", "attn_v", kv_heads, c.width, c.qkv_bias),
        "o_proj": project("self_attn.o_proj", "attn_output", c.width, heads, c.output_bias),
    }
    if c.query_key_norm:
        attn["q_norm"] = layer_norm("self_attn.q_norm", "attn_q_norm", c.head_dim)
        attn["k_norm"] = layer_norm("self_attn.k_norm", "attn_k_norm", c.head_dim)
    tree = {
        "embed_tokens": matrix("embed_tokens", "token_embd", (c.vocab_size, c.width)),
        "layers": {
            "input_layernorm": layer_norm("input_layernorm", "attn_norm", c.width),
            "self_attn": attn,
            "post_attention_layernorm": layer_norm("post_attention_layernorm", "ffn_norm", c.width),
            "mlp": {
                "gate_proj": project(
                    "mlp.gate_proj", "ffn_gate", c.hidden_width, c.width, c.mlp_bias
                ),
                "up_proj": project("mlp.up_proj", "ffn_up", c.hidden_width, c.width, c.mlp_bias),
                "down_proj": project(
                    "mlp.down_proj", "ffn_down", c.width, c.hidden_width, c.mlp_bias
                ),
            },
        },
        "norm": norm("norm", "output_norm", (c.width,)),
    }
    if not c.tied:
        tree["lm_head"] = matrix("lm_head", "output", (c.vocab_size, c.width))
    return tree


def head(params: Any) -> Any:
    """The output head [V, C]."""
    return params.get("lm_head", params["embed_tokens"])["weight"]


def hidden(
    config: Config,
    params: Any,
    tokens_BT: jax.Array,
    dtype: Any,
    start_B: jax.Array | None = None,
    cache: Cache | None = None,
    around: Around = AS_IT_IS,
) -> tuple[jax.Array, Cache | None]:
    """Final hidden states [B, T, C] in `dtype`, and the cache.

    Args:
      config: sizes and options.
      params: a pytree of the shapes of `leaves(config)`.
      tokens_BT: int32.
      dtype: of the activations; norms, angles and softmax are computed in float32.
      start_B: int32, the position of each row's first token; None for 0.
      cache: keys and values of the positions before.
      around: what layers and their parts are evaluated in. A layer is a function ((stream below
        it, cache), (its parameters, window, number)) -> (stream above it, cache).
    """
    x_BTC = rows(params["embed_tokens"]["weight"], tokens_BT, dtype)
    x_BTC, cache = stream(config, params["layers"], x_BTC, start_B, cache, around)
    return rms_norm(x_BTC, params["norm"], config.norm_epsilon), cache


def stream(
    config: Config,
    layers: Any,
    x_BTC: jax.Array,
    start_B: jax.Array | None = None,
    cache: Cache | None = None,
    around: Around = AS_IT_IS,
) -> tuple[jax.Array, Cache | None]:
    """The residual stream above the layers, and the cache; the other arguments are those of
    `hidden`.

    Args:
      config: of the layers, which may be some of a model's: `num_layers` and `windows` say how
        many.
      layers: their parameters, stacked.
      x_BTC: the residual stream below them.
    """
    layer = _layer(config, x_BTC, start_B, around)
    step = lambda carry, slices: (layer(carry, slices), None)
    return lax.scan(step, (x_BTC, cache), layer_slices(config, layers))[0]


def _layer(config: Config, x_BTC: jax.Array, start_B: jax.Array | None, around: Around) -> Any:
    """A layer as a function of (the stream below it, the cache) and its slice of `layer_slices`."""
    positions_BT = jnp.arange(x_BTC.shape[1])[None]
    if start_B is not None:
        positions_BT = positions_BT + start_B[:, None]
    cos_sin = rope.turns(config.rope, config.head_dim, positions_BT)

    def layer(carry, slices):
        x_BTC, cache = carry
        p, window, i = slices
        h_BTC = rms_norm(x_BTC, p["input_layernorm"], config.norm_epsilon)
        attn = p["self_attn"]
        q, k = (_turned(config, attn, h_BTC, cos_sin, name) for name in "qk")
        v = _heads(config, attn, h_BTC, "v")
        y_BTC, cache = attention(q, k, v, positions_BT, window, cache, i, around)
        return _after_attention(config, p, x_BTC, y_BTC, around), cache

    return around.layer(layer)


def hidden_at(
    config: Config,
    params: Any,
    tokens_BT: jax.Array,
    places_B: jax.Array,
    dtype: Any,
    around: Around = AS_IT_IS,
) -> jax.Array:
    """`hidden` at one place of each row, [B, C].

    Args:
      config, params, tokens_BT, dtype: as of `hidden`.
      places_B: int32, the place that is read.
      around: as of `stream_at`.
    """
    x_BTC = rows(params["embed_tokens"]["weight"], tokens_BT, dtype)
    x_BC = stream_at(config, params["layers"], x_BTC, places_B, around)
    return rms_norm(x_BC, params["norm"], config.norm_epsilon)


def stream_at(
    config: Config, layers: Any, x_BTC: jax.Array, places_B: jax.Array, around: Around = AS_IT_IS
) -> jax.Array:
    """`stream` at one place of each row, [B, C]: of the last layer, whose output is read there
    alone, only keys and values are evaluated everywhere.

    Args:
      config, layers, x_BTC: as of `stream`.
      places_B: int32, the place that is read.
      around: as of `hidden`; the last layer, read at one place, is a function of (its parameters,
        the stream below it).
    """
    x_BTC = below_last(_layer(config, x_BTC, None, around), x_BTC, layer_slices(config, layers))
    positions_BT = jnp.arange(x_BTC.shape[1])[None]
    places_B1 = places_B[:, None]
    turns = functools.partial(rope.turns, config.rope, config.head_dim)

    def last(p, x_BTC):
        h_BTC, attn = rms_norm(x_BTC, p["input_layernorm"], config.norm_epsilon), p["self_attn"]
        q = _turned(config, attn, at_places(h_BTC, places_B), turns(places_B1), "q")
        k = _turned(config, attn, h_BTC, turns(positions_BT), "k")
        v = _heads(config, attn, h_BTC, "v")
        y_B1C = around.attend(attend)(q, k, v, places_B1, positions_BT, config.windows[-1])
        return _after_attention(config, p, at_places(x_BTC, places_B), y_B1C, around)

    return around.layer(last)(jax.tree.map(lambda x: x[-1], layers), x_BTC)[:, 0]


def _heads(config, p, h_BTC, name):
    """[B, T, heads, D] of the projection q, k or v."""
    return linear(h_BTC, p[f"{name}_proj"]).reshape(*h_BTC.shape[:2], -1, config.head_dim)


def _turned(config, p, h_BTC, cos_sin, name):
    """Queries or keys, turned by the angles of their positions."""
    heads = _heads(config, p, h_BTC, name)
    if config.query_key_norm:
        heads = rms_norm(heads, p[f"{name}_norm"], config.norm_epsilon)
    return rope.turn(heads, *cos_sin)


def _after_attention(config, p, x_BTC, y_BTC, around):
    """The residual stream above a layer, from that below it and what the heads read."""
    x_BTC = x_BTC + linear(y_BTC, p["self_attn"]["o_proj"])
    h_BTC = rms_norm(x_BTC, p["post_attention_layernorm"], config.norm_epsilon)
    return x_BTC + _swiglu(p["mlp"], h_BTC, around.unit(jax.nn.silu))


def _swiglu(p, h_BTC, silu):
    """down(silu(gate h) · up h) (Shazeer, 2020)."""
    gate_BTF = silu(linear(h_BTC, p["gate_proj"]))
    return linear(gate_BTF * linear(h_BTC, p["up_proj"]), p["down_proj"])
