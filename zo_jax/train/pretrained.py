"""A pretrained model as what a run trains: its own weights, or low-rank factors beside them.

The parameters of a run are those of the model; with scope lora they are `base`, which stays as it
is, and `lora`, the factors. Only what is trained is kept in checkpoints: the rest is read again
from the model's files.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.fingerprint import fingerprint
from zo_jax.layout import Layout
from zo_jax.models import lora
from zo_jax.models.layers import AS_IT_IS, CHECKPOINTED, Around, at_places
from zo_jax.models.model import Files, Model, architecture, open_files
from zo_jax.train import feedback
from zo_jax.train.config import FEEDBACK_MODES, Config, ConfigError

# What is split over the devices of the axis `model`: the outputs of what reads the residual stream
# or a hidden layer's inputs, the inputs of what writes into it, and the width of embeddings.
RULES = (
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj|c_attn|c_fc)/weight$", -2),
    (r"(o_proj|down_proj|c_proj)/weight$", -1),
    (r"(embed_tokens|lm_head|wte|wpe)/weight$", -1),
)
# What the folder of a run has, and no model's.
_OF_RUN = "metrics.csv"
_BITS = {"none": 0, "file": 0, "int8": 8, "int4": 4}


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A pretrained model, of which no weights are read yet.

    Attributes:
      files: where it is.
      settings: of the run, validated.
    """

    files: Files
    settings: Config

    rules = RULES

    @property
    def tokenizer(self) -> Any:
        return self.files.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.files.config.vocab_size

    @property
    def context_length(self) -> int:
        return self.files.config.context_length

    @property
    def num_layers(self) -> int:
        return self.files.config.num_layers

    @property
    def num_heads(self) -> int:
        return self.files.config.num_heads

    @property
    def width(self) -> int:
        return self.files.config.width

    @property
    def has_factors(self) -> bool:
        """Whether low-rank factors are trained."""
        return self.settings.scope == "lora"

    @property
    def stack(self) -> str:
        """The name of the subtree whose leaves are stacks of layers."""
        return "h" if self.files.config.architecture == "gpt2" else "layers"

    @property
    def reduced(self) -> str:
        """Regular expression of scope reduced."""
        last = self.num_layers - 1
        if self.files.config.architecture == "gpt2":
            return rf"^h/{last}/(mlp|ln_2)/|^(lm_head|{_unless(self.files.config.tied, 'wte')})/"
        head = _unless(self.files.config.tied, "embed_tokens")
        return rf"^layers/{last}/(mlp|post_attention_layernorm)/|^(lm_head|{head})/"

    @property
    def tables(self) -> tuple[str, ...]:
        """The paths of the leaves that have a row for each token."""
        embedding = "wte" if self.files.config.architecture == "gpt2" else "embed_tokens"
        head = () if self.files.config.tied else ("lm_head/weight",)
        return (f"{embedding}/weight", *head)

    @property
    def output(self) -> str:
        """Regular expression of the last norm and the output head, if it has one of its own."""
        return "" if self.files.config.tied else "^(norm|ln_f|lm_head)/"

    @property
    def model(self) -> Model:
        """The model's functions, without its weights."""
        dtype = jnp.dtype(self.settings.model.compute_dtype)
        return Model(self.files.config, None, dtype, self.tokenizer, self.files.folder)

    def start(self, key: jax.Array, layout: Layout | None = None) -> Any:
        """The parameters that a run begins with, each where it belongs: read from the files, and
        fresh factors.
        """
        place = layout.sharding if layout else None
        quantized = self.settings.model.quantized
        base = self.files.read(
            jnp.dtype(self.settings.model.param_dtype),
            place,
            keep_quantized=quantized == "file",
            bits=_BITS[quantized],
        )
        if not self.has_factors:
            return base
        factors = self._factors(key)
        return {"base": base, "lora": layout.put_everywhere(factors) if layout else factors}

    def shapes(self) -> Any:
        """Those of the parameters of a run."""
        quantized = self.settings.model.quantized
        dtype = jnp.dtype(self.settings.model.param_dtype)
        base = self.files.shapes(dtype, quantized == "file", _BITS[quantized])
        if not self.has_factors:
            return base
        return {"base": base, "lora": jax.eval_shape(self._factors, jax.random.key(0))}

    @property
    def num_params(self) -> int:
        """Of the model, without factors; a quantised number counts as one."""
        leaves = architecture(self.files.config).leaves(self.files.config)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves))

    def _factors(self, key: jax.Array) -> dict[str, lora.Factors]:
        options = self.settings.lora
        try:
            return lora.init(
                key,
                self.model,
                options.rank,
                options.alpha,
                options.targets,
                options.num_layers,
            )
        except ValueError as error:
            raise ConfigError(f"lora: {error}") from error

    def weights(self, params: Any) -> Any:
        """The parameters of the model's functions, from those of the run."""
        return lora.attach(params["base"], params["lora"]) if self.has_factors else params

    def merged(self, params: Any) -> Any:
        """The parameters of a model of its own, without factors."""
        if not self.has_factors:
            return params
        return lora.merge(self.model, params["base"], params["lora"])

    def hidden(self, params: Any, tokens_BT: jax.Array) -> jax.Array:
        """Final hidden states [B, T, C], from int32 tokens."""
        return self.model.hidden(self.weights(params), tokens_BT, self._around)

    def hidden_at(self, params: Any, tokens_BT: jax.Array, places_B: jax.Array) -> jax.Array:
        """Final hidden states at one place of each row, [B, C]."""
        if self._hands_errors:  # everywhere
            return at_places(self.hidden(params, tokens_BT), places_B)[:, 0]
        return self.model.hidden_at(self.weights(params), tokens_BT, places_B, self._around)

    @property
    def _around(self) -> Around:
        """What layers and their parts are evaluated in."""
        if self._hands_errors:
            return feedback.make_around(self.settings, self.num_layers)
        return CHECKPOINTED if self.settings.model.checkpoint_activations else AS_IT_IS

    @property
    def _hands_errors(self) -> bool:
        """Whether backprop goes the way of residual feedback."""
        return self.settings.mode in FEEDBACK_MODES

    def head(self, params: Any) -> Any:
        """The output head [V, C]."""
        return self.model.head(self.weights(params))

    def base_fingerprint(self, params: Any) -> int:
        """Of the weights as they are read: what tells a base from another."""
        return int(fingerprint(params["base"] if self.has_factors else params))

    @property
    def num_bytes(self) -> int:
        """Of the parameters."""
        leaves = jax.tree.leaves(self.shapes())
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    @property
    def summary(self) -> str:
        """What it is, in plain words."""
        c, model = self.files.config, self.settings.model
        kept = {"none": model.param_dtype, "file": "quantised as in its file"}
        return (
            f"{c.architecture} from {self.settings.model.path}, {self.num_params:,} parameters "
            f"({c.num_layers} layers, {c.num_heads} heads, width {c.width}; weights "
            f"{kept.get(model.quantized, model.quantized)}, products {model.compute_dtype})"
        )


def open_pretrained(config: Config) -> Pretrained | None:
    """The pretrained model of a validated configuration, or None if it names none.

    Raises:
      ConfigError: there is no such model, or it cannot be trained as asked.
    """
    if not config.model.path:
        return None
    path = Path(config.model.path).expanduser()
    if (path / _OF_RUN).exists():
        raise ConfigError(
            f"model.path={config.model.path} is the folder of a run; write its model with zo-jax "
            f"export {config.model.path} --out=MODEL, and set model.path=MODEL"
        )
    try:
        files = open_files(path)
    except ValueError as error:
        raise ConfigError(f"model.path={config.model.path}: {error}") from error
    if config.model.quantized == "file" and path.suffix != ".gguf":
        raise ConfigError(
            f"model.quantized=file keeps the blocks of a .gguf file; got model.path="
            f"{config.model.path}; set it to int8 or int4"
        )
    return Pretrained(files, config)


def _unless(is_tied: bool, name: str) -> str:
    """The embedding's name where it is the head too; else what no name is."""
    return name if is_tied else "$"
