"""Models in GGUF files, the format of llama.cpp: their configuration, and their tensors as
arrays.
"""

from pathlib import Path

import jax
import numpy as np

from zo_jax.models import gguf_file, quantized
from zo_jax.models.checkpoint import BEGINNING
from zo_jax.models.config import NO_WINDOW, Config
from zo_jax.models.rope import Rope, frequencies
from zo_jax.models.spec import Leaf

# Factors of the slowed frequencies, which the configuration has too.
_ROPE_FACTORS = "rope_freqs.weight"


class Gguf:
    """A GGUF file as a source of tensors.

    Args:
      path: the file.

    Attributes:
      metadata: its values by their keys.

    Raises:
      ValueError: the file is none or is damaged.
    """

    is_hf = False

    def __init__(self, path: Path):
        self.metadata, self.tensors = gguf_file.read(path)

    def name(self, leaf: Leaf, layer: int) -> str:
        return leaf.gguf.format(layer)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tensor.shape for name, tensor in self.tensors.items() if name != _ROPE_FACTORS
        }

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, dequantised."""
        return self.in_order(name, self.tensors[name].dequantize())

    def beginning(self, name: str) -> bytes:
        return self.tensors[name].data.reshape(-1)[:BEGINNING].tobytes()

    def kind(self, name: str) -> str:
        return self.tensors[name].kind.name

    def blocks(self, name: str) -> quantized.Blocks:
        tensor = self.tensors[name]
        found = quantized.from_gguf(tensor.kind.name, tensor.data)
        return jax.tree.map(lambda part: self.in_order(name, part), found)

    def in_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows in Hugging Face's order.

        llama.cpp turns neighbouring coordinates of a head, Hugging Face those that are half a head
        apart, and so the rows of Llama's queries and keys change places.
        """
        arch = self.metadata["general.architecture"]
        part = name.split(".")[-2]
        if arch != "llama" or part not in ("attn_q", "attn_k"):
            return rows
        key = "head_count" if part == "attn_q" else "head_count_kv"
        num_heads = self.metadata[f"llama.attention.{key}"]
        pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
        return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def read_config(file: Gguf) -> Config:
    """The configuration that a GGUF file describes, in its metadata and by the tensors that it has.

    Raises:
      ValueError: an architecture or an option that this package does not compute, or a value that
        is not there.
    """
    arch = file.metadata.get("general.architecture")
    if arch not in ("gpt2", "llama", "qwen2", "qwen3"):
        raise ValueError(
            f"general.architecture of a GGUF file must be gpt2, llama, qwen2 or qwen3; got {arch!r}"
        )
    try:
        return _read_config(file, arch)
    except KeyError as error:
        raise ValueError(f"a GGUF file of a {arch} model must have {error}") from error


def _read_config(file: Gguf, arch: str) -> Config:
    metadata, shapes = file.metadata, file.shapes()
    has = lambda tensor: f"blk.0.{tensor}" in shapes
    width, num_layers = metadata[f"{arch}.embedding_length"], metadata[f"{arch}.block_count"]
    num_heads = metadata[f"{arch}.attention.head_count"]
    head_dim = metadata.get(f"{arch}.attention.key_length", width // num_heads)
    is_gpt2 = arch == "gpt2"
    epsilon = "layer_norm_epsilon" if is_gpt2 else "layer_norm_rms_epsilon"
    token_ids = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot")]
    ends = [metadata[name] for name in token_ids if name in metadata]
    return Config(
        architecture=arch,
        vocab_size=shapes["token_embd.weight"][0],
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=metadata.get(f"{arch}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        hidden_width=metadata[f"{arch}.feed_forward_length"],
        context_length=metadata[f"{arch}.context_length"],
        norm_epsilon=metadata[f"{arch}.attention.{epsilon}"],
        activation="gelu_tanh" if is_gpt2 else "silu",
        tied="output.weight" not in shapes,
        qkv_bias=has("attn_q.bias") or is_gpt2,
        output_bias=has("attn_output.bias"),
        mlp_bias=has("ffn_up.bias"),
        query_key_norm=has("attn_q_norm.weight"),
        rope=Rope() if is_gpt2 else _rope(file, arch, head_dim),
        windows=(NO_WINDOW,) * num_layers,
        bos_token=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_tokens=tuple(dict.fromkeys(ends)),
    )


def _rope(file: Gguf, arch: str, head_dim: int) -> Rope:
    metadata = file.metadata
    theta = metadata.get(f"{arch}.rope.freq_base", 10000.0)
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind != "none":
        return Rope(theta, kind, metadata[f"{arch}.rope.scaling.factor"])
    if _ROPE_FACTORS not in file.tensors:
        return Rope(theta)
    # Of Llama 3's scaling the file has the factors alone; the other numbers are the same for all
    # that were released.
    factors = file.tensors[_ROPE_FACTORS].dequantize()
    rope = Rope(theta, "llama3", float(factors.max()))
    found = frequencies(Rope(theta), head_dim) / frequencies(rope, head_dim)
    if not np.allclose(found, factors, rtol=1e-4):
        raise ValueError(
            f"{_ROPE_FACTORS} must hold the factors of Llama 3's rotary positions; it holds "
            f"others; take the Hugging Face folder"
        )
    return rope
