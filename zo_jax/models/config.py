"""What a model is: its sizes and options, from and to a Hugging Face config.json."""

import dataclasses
from typing import Any

from zo_jax.models.rope import Rope

ARCHITECTURES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
# GPT-2's names of activations. Only these two are Hugging Face's "gelu" by error function and by
# tanh.
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# A window that no context fills.
NO_WINDOW = 2**30


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and options of a decoder.

    Attributes:
      architecture: one of ARCHITECTURES.
      vocab_size: V.
      width: C, of the residual stream.
      num_layers: L.
      num_heads: H, of queries.
      num_kv_heads: K, of keys and values; H is a multiple.
      head_dim: D.
      hidden_width: F, of the feed-forward layer.
      context_length: positions that the model was trained with.
      norm_epsilon: added to the variance in norms.
      activation: "silu", "gelu" or "gelu_tanh".
      tied: whether the output head is the embedding.
      qkv_bias: whether the projections to queries, keys and values have one.
      output_bias: likewise that of the heads.
      mlp_bias: likewise those of the feed-forward layer.
      query_key_norm: whether queries and keys have an RMSNorm.
      rope: rotary positions; of no account for GPT-2, whose positions are learned.
      windows: for each layer how many positions it looks back, its own among them; NO_WINDOW for
        all.
      bos_token: begins a text, or None.
      eos_tokens: end a text.
    """

    architecture: str
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_width: int
    context_length: int
    norm_epsilon: float
    activation: str
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    query_key_norm: bool
    rope: Rope
    windows: tuple[int, ...]
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"model_type must be one of {', '.join(ARCHITECTURES)}; got {self.architecture!r}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"the heads must be a multiple of those of keys and values; got {self.num_heads} "
                f"and {self.num_kv_heads}"
            )
        if self.architecture != "gpt2" and self.head_dim % 2:
            raise ValueError(
                f"rotary positions need heads of even width; got head_dim {self.head_dim}"
            )


def from_hf(fields: dict[str, Any]) -> Config:
    """The configuration that a config.json describes, of any version of transformers.

    Args:
      fields: the file's object.

    Raises:
      ValueError: an architecture or an option that this package does not compute, or a field that
        is not there.

    >>> from zo_jax.models.config import from_hf
    >>> config = from_hf(dict(model_type="llama", vocab_size=8, hidden_size=16, num_hidden_layers=1,
    ...     num_attention_heads=2, intermediate_size=32))
    >>> config.head_dim, config.num_kv_heads
    (8, 2)
    """
    architecture = fields.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"model_type in config.json must be one of {', '.join(ARCHITECTURES)}; got "
            f"{architecture!r}"
        )
    if fields.get("quantization_config"):
        raise ValueError(
            "config.json has a quantization_config, whose weights are not read; take the original "
            "weights or a GGUF file"
        )
    try:
        return _gpt2(fields) if architecture == "gpt2" else _decoder(architecture, fields)
    except KeyError as error:
        raise ValueError(
            f"config.json of a {architecture} model must have the field {error}"
        ) from error


def _gpt2(fields: dict[str, Any]) -> Config:
    width, num_heads, num_layers = fields["n_embd"], fields["n_head"], fields["n_layer"]
    if fields.get("scale_attn_by_inverse_layer_idx") or not fields.get("scale_attn_weights", True):
        raise ValueError(
            "scale_attn_by_inverse_layer_idx must be false and scale_attn_weights true; other "
            "scales are not computed"
        )
    activation = fields.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise ValueError(
            f"activation_function must be one of {', '.join(_GPT2_ACTIVATIONS)}; got {activation!r}"
        )
    return Config(
        architecture="gpt2",
        vocab_size=fields["vocab_size"],
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        hidden_width=fields.get("n_inner") or 4 * width,
        context_length=fields.get("n_positions", 1024),
        norm_epsilon=fields.get("layer_norm_epsilon", 1e-5),
        activation=_GPT2_ACTIVATIONS[activation],
        tied=fields.get("tie_word_embeddings", True),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        query_key_norm=False,
        rope=Rope(),
        windows=(NO_WINDOW,) * num_layers,
        **_special_tokens(fields),
    )


def _decoder(architecture: str, fields: dict[str, Any]) -> Config:
    width, num_heads = fields["hidden_size"], fields["num_attention_heads"]
    if fields.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"hidden_act of a {architecture} model must be silu; got {fields['hidden_act']!r}"
        )
    bias = bool(fields.get("attention_bias", False)) and architecture in ("llama", "qwen3")
    return Config(
        architecture=architecture,
        vocab_size=fields["vocab_size"],
        width=width,
        num_layers=fields["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads") or num_heads,
        head_dim=fields.get("head_dim") or (128 if architecture == "qwen3" else width // num_heads),
        hidden_width=fields["intermediate_size"],
        context_length=fields.get("max_position_embeddings", 2048),
        norm_epsilon=fields.get("rms_norm_eps", 1e-6),
        activation="silu",
        tied=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=bias or architecture == "qwen2",
        output_bias=bias,
        mlp_bias=bool(fields.get("mlp_bias", False)) and architecture == "llama",
        query_key_norm=architecture == "qwen3",
        rope=_rope(fields),
        windows=_windows(architecture, fields),
        **_special_tokens(fields),
    )


def _rope(fields: dict[str, Any]) -> Rope:
    """transformers 5 has one field, rope_parameters; earlier ones rope_theta and rope_scaling."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or fields.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind != "llama3":
        return Rope(theta, kind, float(scaling.get("factor", 1.0)))
    return Rope(
        theta,
        kind,
        float(scaling["factor"]),
        float(scaling["low_freq_factor"]),
        float(scaling["high_freq_factor"]),
        int(scaling["original_max_position_embeddings"]),
    )


def _windows(architecture: str, fields: dict[str, Any]) -> tuple[int, ...]:
    """Mistral's layers all have a window; Qwen's have where `use_sliding_window` says so; Llama's
    have none.
    """
    num_layers = fields["num_hidden_layers"]
    window = fields.get("sliding_window")
    uses = {"llama": False, "mistral": True}.get(
        architecture, fields.get("use_sliding_window", False)
    )
    if not uses or window is None:
        return (NO_WINDOW,) * num_layers
    if architecture == "mistral":
        return (window,) * num_layers
    first = fields.get("max_window_layers", 28)
    kinds = fields.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
    ]
    return tuple(window if kind == "sliding_attention" else NO_WINDOW for kind in kinds)


def _special_tokens(fields: dict[str, Any]) -> dict[str, Any]:
    eos = fields.get("eos_token_id")
    return {
        "bos_token": fields.get("bos_token_id"),
        "eos_tokens": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    }


def to_hf(config: Config) -> dict[str, Any]:
    """The fields of a config.json that `from_hf` and transformers read as this configuration."""
    tokens = {
        "bos_token_id": config.bos_token,
        "eos_token_id": list(config.eos_tokens) if len(config.eos_tokens) > 1 else None,
    }
    if len(config.eos_tokens) == 1:
        tokens["eos_token_id"] = config.eos_tokens[0]
    common = {
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        **tokens,
    }
    if config.architecture == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": config.width,
            "n_head": config.num_heads,
            "n_layer": config.num_layers,
            "n_inner": config.hidden_width,
            "n_positions": config.context_length,
            "layer_norm_epsilon": config.norm_epsilon,
            "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.activation],
        }
    class_name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    windowed = [window != NO_WINDOW for window in config.windows]
    return common | {
        "architectures": [f"{class_name[config.architecture]}ForCausalLM"],
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.hidden_width,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": min(config.windows) if any(windowed) else None,
        **(_qwen_windows(windowed) if config.architecture.startswith("qwen") else {}),
        **_rope_fields(config.rope),
    }


def _qwen_windows(windowed: list[bool]) -> dict[str, Any]:
    return {
        "use_sliding_window": any(windowed),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windowed],
    }


def _rope_fields(rope: Rope) -> dict[str, Any]:
    """In the form of all versions; transformers 5 reads it too."""
    scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_factor,
            "high_freq_factor": rope.high_factor,
            "original_max_position_embeddings": rope.original_context,
        }
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
    }
