"""The GPT-2 decoder in Flax Linen: pure init and apply, layers scanned, output head tied or not.

Axes: B batch, T positions, C width of the residual stream, H heads, D width of a head, V
vocabulary, L layers. Every parameter of a block is stacked over L.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from zo_jax.layout import Layout
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


# (regular expression over paths like blocks/fc/kernel, the axis that is split over `model`): the
# first one that is found decides, and what none finds is replicated. Of an MLP the hidden width is
# split, of other products the inputs, and of embeddings the width, for vocabularies are seldom
# even.
RULES = ((r"(^|/)fc/(kernel|bias)$", -1), (r"kernel$", -2), (r"embedding$", -1))


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


class Decoder(nn.Module):
    """Token ids [B, T] to final hidden states [B, T, C]; the fields are those of `GPT`."""

    gpt: "GPT"

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        gpt = self.gpt
        dtypes = dict(dtype=gpt.dtype, param_dtype=gpt.param_dtype)
        embed = lambda num, std, name: nn.Embed(
            num, gpt.width, embedding_init=nn.initializers.normal(std), name=name, **dtypes
        )
        if not gpt.tied_head:
            # Flax makes a parameter when it is first asked for.
            _ = embed(gpt.vocab_size, 0.02, "head").embedding
        x_BTC = embed(gpt.vocab_size, gpt.embedding_std, "wte")(tokens_BT)
        x_BTC += embed(gpt.context_length, gpt.embedding_std / 2, "wpe")(
            jnp.arange(tokens_BT.shape[1])[None]
        )
        block = nn.remat(Block, prevent_cse=False) if gpt.checkpoint_activations else Block
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=gpt.num_layers
        )
        x_BTC, _ = blocks(gpt.num_layers, gpt.num_heads, name="blocks", **dtypes)(x_BTC)
        return nn.LayerNorm(epsilon=1e-5, name="ln_f", **dtypes)(x_BTC)


@dataclasses.dataclass(frozen=True)
class GPT:
    """A decoder that is trained from scratch: its sizes and options, and pure functions of its
    parameters.

    Attributes:
      vocab_size, num_layers, num_heads, width, context_length: sizes.
      dtype: of activations and products.
      param_dtype: of the parameters.
      checkpoint_activations: whether backprop keeps the inputs of a block alone.
      tied_head: whether the output head is the token embedding.
      embedding_std: of the initial token embeddings.
    """

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

    # The name of the subtree whose leaves are stacks of layers.
    stack = "blocks"
    rules = RULES

    @property
    def reduced(self) -> str:
        """Regular expression of scope reduced."""
        head = "wte" if self.tied_head else "head"
        return rf"^blocks/{self.num_layers - 1}/(fc|fc_proj|ln_2)/|^{head}/"

    @property
    def output(self) -> str:
        """Regular expression of the last norm and the output head, if it has one of its own."""
        return "" if self.tied_head else "^(ln_f|head)/"

    @property
    def tables(self) -> tuple[str, ...]:
        """The paths of the leaves that have a row for each token."""
        return ("wte/embedding",) if self.tied_head else ("head/embedding", "wte/embedding")

    def start(self, key: jax.Array, layout: Layout | None = None) -> Any:
        """The parameters that a run begins with, each where it belongs: fresh ones."""
        if layout is None:
            return jax.jit(self.fresh)(key)
        return jax.jit(lambda: self.fresh(key), out_shardings=layout.shardings(self.shapes()))()

    def fresh(self, key: jax.Array) -> Any:
        """Fresh parameters: a nested dict of arrays of `param_dtype`."""
        return Decoder(self).init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def shapes(self) -> Any:
        """Those of the parameters, without allocating any."""
        return jax.eval_shape(self.fresh, jax.random.key(0))

    def hidden(self, params: Any, tokens_BT: jax.Array) -> jax.Array:
        """Final hidden states [B, T, C], from int32 tokens."""
        return Decoder(self).apply({"params": params}, tokens_BT)  # type: ignore[return-value]

    def head(self, params: Any) -> jax.Array:
        """The rows of the output head [V, C]: those of the token embedding, if it is tied to
        it.
        """
        return params.get("head", params["wte"])["embedding"]

    @property
    def num_params(self) -> int:
        """The true number of parameters: V C, twice with a head of its own, + positions C + L (12
        C² + 13 C) + 2 C.
        """
        tables = (1 if self.tied_head else 2) * self.vocab_size + self.context_length
        C = self.width
        return tables * C + self.num_layers * (12 * C * C + 13 * C) + 2 * C

    @property
    def num_bytes(self) -> int:
        """Of the parameters."""
        return self.num_params * jnp.dtype(self.param_dtype).itemsize

    @property
    def summary(self) -> str:
        """What it is, in plain words."""
        return (
            f"GPT, {self.num_params:,} parameters ({self.num_layers} layers, {self.num_heads} "
            f"heads, width {self.width}, {jnp.dtype(self.dtype).name})"
        )


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
