"""The GPT-2 decoder in Flax Linen: pure init and apply, layers scanned, output head tied or not.

Axes: B batch, T positions, C width of the residual stream, H heads, D width of a head, V
vocabulary, L layers. Every parameter of a block is stacked over L.
"""

import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from zo_jax.train.config import ModelConfig


class Size(NamedTuple):
    """Shape of a named model."""

    num_layers: int
    num_heads: int
    width: int


# The layers and heads of 20M to 1B are those of the reference script; the widths bring the true
# parameter count, with GPT-2's 50257 tokens and 1024 positions, within 5 % of the label.
SIZES = {
    "20M": Size(6, 4, 280),
    "200M": Size(12, 12, 1008),
    "500M": Size(24, 16, 1232),
    "1B": Size(36, 20, 1460),
    "gpt2": Size(12, 12, 768),
    "gpt2-medium": Size(24, 16, 1024),
    "gpt2-large": Size(36, 20, 1280),
}


class Block(nn.Module):
    """One pre-LayerNorm transformer block."""

    num_layers: int
    num_heads: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BTC: jax.Array) -> tuple[jax.Array, None]:
        B, T, C = x_BTC.shape
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dense = lambda width, name, scale=1.0: nn.Dense(
            width, kernel_init=nn.initializers.normal(0.02 * scale), name=name, **dtypes
        )
        norm = lambda name: nn.LayerNorm(epsilon=1e-5, name=name, **dtypes)
        # GPT-2 scales down the layers that write into the residual stream: 2 L of them add up.
        residual_scale = 1 / math.sqrt(2 * self.num_layers)

        qkv_BTC = dense(3 * C, "qkv")(norm("ln_1")(x_BTC))
        q_BTHD, k_BTHD, v_BTHD = (
            y.reshape(B, T, self.num_heads, C // self.num_heads)
            for y in jnp.split(qkv_BTC, 3, axis=-1)
        )
        if self.dtype == jnp.float16:  # which not all backends can multiply and sum in float32
            q_BTHD, k_BTHD, v_BTHD = (y.astype(jnp.float32) for y in (q_BTHD, k_BTHD, v_BTHD))
        y_BTHD = jax.nn.dot_product_attention(q_BTHD, k_BTHD, v_BTHD, is_causal=True)
        y_BTHD = y_BTHD.astype(self.dtype)
        x_BTC = x_BTC + dense(C, "proj", residual_scale)(y_BTHD.reshape(B, T, C))
        h_BTC = nn.gelu(dense(4 * C, "fc")(norm("ln_2")(x_BTC)), approximate=True)
        return x_BTC + dense(C, "fc_proj", residual_scale)(h_BTC), None


class GPT(nn.Module):
    """Token ids [B, T] to final hidden states [B, T, C]; the output head is `head_of(params)`."""

    vocab_size: int
    num_layers: int
    num_heads: int
    width: int
    context_length: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    checkpoint_activations: bool = False
    tied_head: bool = True
    embedding_std: float = 0.02

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        embed = lambda num, std, name: nn.Embed(
            num, self.width, embedding_init=nn.initializers.normal(std), name=name, **dtypes
        )
        if not self.tied_head:
            # Flax makes a parameter when it is first asked for.
            _ = embed(self.vocab_size, 0.02, "head").embedding
        x_BTC = embed(self.vocab_size, self.embedding_std, "wte")(tokens_BT)
        x_BTC += embed(self.context_length, self.embedding_std / 2, "wpe")(
            jnp.arange(tokens_BT.shape[1])[None]
        )
        block = nn.remat(Block, prevent_cse=False) if self.checkpoint_activations else Block
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.num_layers
        )
        x_BTC, _ = blocks(self.num_layers, self.num_heads, name="blocks", **dtypes)(x_BTC)
        return nn.LayerNorm(epsilon=1e-5, name="ln_f", **dtypes)(x_BTC)


def make_model(config: ModelConfig, vocab_size: int) -> GPT:
    """The model that a validated configuration describes."""
    size = SIZES.get(config.size) or Size(config.num_layers, config.num_heads, config.width)
    return GPT(
        vocab_size=vocab_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        width=size.width,
        context_length=config.context_length,
        dtype=jnp.dtype(config.compute_dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        checkpoint_activations=config.checkpoint_activations,
        tied_head=config.tied_head,
        embedding_std=config.embedding_std,
    )


def head_of(params: Any) -> jax.Array:
    """The rows of the output head [V, C]: those of the token embedding, if the head is tied to
    it.
    """
    return params.get("head", params["wte"])["embedding"]


def init_params(model: GPT, key: jax.Array) -> Any:
    """Fresh parameters: a nested dict of arrays of `model.param_dtype`."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def count_params(model: GPT) -> int:
    """The true number of parameters, without allocating any."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
