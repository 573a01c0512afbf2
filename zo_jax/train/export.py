"""A run's model as those of `zo_jax.models` are: for generation, and for Hugging Face's files."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tokenizers

from zo_jax.models.config import NO_WINDOW
from zo_jax.models.config import Config as Architecture
from zo_jax.models.model import Model
from zo_jax.models.rope import Rope
from zo_jax.models.tokenizer import Tokenizer, from_folder
from zo_jax.train.config import Config, ConfigError, from_dict
from zo_jax.train.data.tokenization import BPETokenizer, CharTokenizer, ModelTokenizer
from zo_jax.train.model import GPT, make_model
from zo_jax.train.pretrained import Pretrained, open_pretrained
from zo_jax.train.run_folder import checkpoint
from zo_jax.train.run_folder.folder import read_config
from zo_jax.train.run_state import RunState, init_state, kept_part


def export(model: Any, params: Any, tokenizer: Tokenizer | None = None) -> Model:
    """The model of a run's parameters; low-rank factors are merged into their weights.

    Args:
      model: a `GPT`, whose layers are GPT-2's by other names, or a `Pretrained`.
      params: its parameters.
      tokenizer: of a `GPT`; a pretrained model has its own.
    """
    if isinstance(model, Pretrained):
        merged = model.model
        return Model(
            merged.config, model.merged(params), merged.dtype, merged.tokenizer, merged.folder
        )
    blocks = params["blocks"]
    # Flax's kernels are [in, out].
    dense = lambda part: {
        "weight": jnp.swapaxes(part["kernel"], -1, -2),
        "bias": part["bias"],
    }
    table = lambda part: {"weight": part["embedding"]}
    tree = {
        "wte": table(params["wte"]),
        "wpe": table(params["wpe"]),
        "h": {
            "ln_1": blocks["ln_1"],
            "attn": {"c_attn": dense(blocks["qkv"]), "c_proj": dense(blocks["proj"])},
            "ln_2": blocks["ln_2"],
            "mlp": {"c_fc": dense(blocks["fc"]), "c_proj": dense(blocks["fc_proj"])},
        },
        "ln_f": params["ln_f"],
    }
    if "head" in params:
        tree["lm_head"] = table(params["head"])
    return Model(_architecture(model, tokenizer), tree, model.dtype, tokenizer)


def _architecture(gpt: GPT, tokenizer: Tokenizer | None) -> Architecture:
    end = tokenizer and tokenizer.backend.token_to_id("<|endoftext|>")
    return Architecture(
        architecture="gpt2",
        vocab_size=gpt.vocab_size,
        width=gpt.width,
        num_layers=gpt.num_layers,
        num_heads=gpt.num_heads,
        num_kv_heads=gpt.num_heads,
        head_dim=gpt.width // gpt.num_heads,
        hidden_width=4 * gpt.width,
        context_length=gpt.context_length,
        norm_epsilon=1e-5,
        activation="gelu_tanh",
        tied=gpt.tied_head,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        query_key_norm=False,
        rope=Rope(),
        windows=(NO_WINDOW,) * gpt.num_layers,
        bos_token=end,
        eos_tokens=() if end is None else (end,),
    )


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """A corpus's tokenizer as those of models are."""
    if isinstance(tokenizer, ModelTokenizer):
        return tokenizer.tokenizer
    if isinstance(tokenizer, BPETokenizer):
        return Tokenizer(tokenizer.bpe)
    assert isinstance(tokenizer, CharTokenizer)
    vocab = {character: i for i, character in enumerate(tokenizer.characters)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"[\s\S]"), behavior="isolated"
    )
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, rather than a model of Hugging Face's."""
    try:
        return "identity" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def load_run(folder: Path) -> Model:
    """The model of a run's best state, or of its latest.

    Raises:
      ConfigError: the folder holds no run, none of its states is whole, or its base is not there.
    """
    config = saved_config(folder)
    tokenizer = None if config.model.path else from_folder(folder)
    if not config.model.path and tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer.json, which a run writes when it begins")
    model = open_pretrained(config) or make_model(
        config.model, tokenizer.backend.get_vocab_size() if tokenizer else 0
    )
    return export(model, load_state(config, model, folder).params, tokenizer)


def load_state(config: Config, model: Any, folder: Path) -> RunState:
    """The best state of a run, or its latest.

    Raises:
      ConfigError: none is whole.
    """
    content = read_config(folder / "config.json")
    start, part = init_state(config, model), kept_part(config, model)
    if isinstance(model, Pretrained) and content.get("base") not in (
        None,
        base := model.base_fingerprint(start.params),
    ):
        raise ConfigError(
            f"model.path={config.model.path} holds other weights than the run in {folder} began "
            f"with (fingerprint {base:08x}, there {content['base']:08x}); bring the former ones"
        )
    reasons = []
    for name in ("best", "checkpoints"):
        for step in reversed(checkpoint.complete_steps(folder / name)):
            try:
                return checkpoint.restore(folder / name, step, start, content["identity"], part)
            except checkpoint.CheckpointError as error:
                reasons.append(f"{name}/{step}: {error}")
    raise ConfigError(f"{folder} has no state that is whole: {'; '.join(reasons) or 'none at all'}")


def saved_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
      ConfigError: the folder holds none.
    """
    content = read_config(folder / "config.json")
    fields = {name: content[name] for name in Config.__dataclass_fields__ if name in content}
    return from_dict(fields)
