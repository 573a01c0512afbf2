"""Tiny models that a formula fills, whose logits by transformers are frozen in logits.npz
(`benchmarks/parity.py --freeze`).
"""

from typing import Any
import zlib

import numpy as np

_DECODER = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 11,
    "n_embd": 16,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def _decoder(architecture: str, **fields: Any) -> dict[str, Any]:
    return _DECODER | {"model_type": architecture} | fields


# What config.json says, by a name that says what is special.
CASES = {
    "gpt2": _GPT2,
    "gpt2, untied, inner width, gelu": _GPT2
    | {"tie_word_embeddings": False, "n_inner": 20, "activation_function": "gelu"},
    "llama 2": _decoder("llama", num_key_value_heads=4, rope_theta=10000.0),
    "llama 3": _decoder(
        "llama", rope_theta=500000.0, rope_scaling=_LLAMA3, tie_word_embeddings=True
    ),
    "llama, linear scaling": _decoder(
        "llama", rope_theta=10000.0, rope_scaling={"rope_type": "linear", "factor": 4.0}
    ),
    "llama, biases": _decoder("llama", attention_bias=True, mlp_bias=True),
    "llama, wide heads": _decoder("llama", head_dim=8),
    "smollm2": _decoder(
        "llama",
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_theta=1e5,
        tie_word_embeddings=True,
    ),
    "mistral": _decoder("mistral", sliding_window=None, rope_theta=1e6),
    "mistral, window": _decoder("mistral", sliding_window=3),
    "qwen 2": _decoder("qwen2", tie_word_embeddings=True, rope_theta=1e6),
    "qwen 2, windows": _decoder(
        "qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "qwen 3": _decoder("qwen3", head_dim=8, tie_word_embeddings=True),
    "qwen 3, biases": _decoder("qwen3", head_dim=8, attention_bias=True),
}
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 10)).astype(np.int32)
# Of the logits [B, T, V] those at these positions are frozen.
POSITIONS = (0, 5, 9)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor that a Hugging Face name stands for, float32."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) == 1:
        x = 0.2 * x + (1 if name.endswith("weight") else 0)
    else:
        x = x * 0.4
    return x.astype(np.float32)
