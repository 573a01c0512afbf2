"""A model as its configuration, its parameters and pure functions of them; read from and written to
what people have.

Axes: B batch, T positions, V vocabulary, C width.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
from pathlib import Path
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zo_jax.atomic import write_atomic
from zo_jax.models import checkpoint, config, decoder, gguf, gguf_tokenizer, gpt2, tokenizer
from zo_jax.models.config import Config
from zo_jax.models.layers import AS_IT_IS, Around
from zo_jax.models.quantized import quantize as to_quantized
from zo_jax.models.weights import is_weight, product
from zo_jax.trees import path_name

# What belongs to the tokenizer and to generation; copied by `save`.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def architecture(config: Config) -> Any:
    """The module with the functions of an architecture: `leaves`, `hidden`, `hidden_at`, `head`,
    and the prefix of its tensors.
    """
    return gpt2 if config.architecture == "gpt2" else decoder


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A pretrained model.

    Attributes:
      config: its sizes and options.
      params: pytree of arrays named as in Hugging Face's files, with the layers stacked in front; a
        vector of a norm is called scale, and weights are [out, in].
      dtype: of the activations.
      tokenizer: text to tokens and back; None where the folder has none.
      folder: where it was read, or None.
    """

    config: Config
    params: Any
    dtype: Any = jnp.float32
    tokenizer: Any = None
    folder: Path | None = None

    def hidden(self, params: Any, tokens_BT: jax.Array, around: Around = AS_IT_IS) -> jax.Array:
        """Final hidden states [B, T, C] in the model's dtype, from int32 tokens; `around` is as of
        `decoder.hidden`.
        """
        functions = architecture(self.config)
        return functions.hidden(self.config, params, tokens_BT, self.dtype, around=around)[0]

    def hidden_at(
        self, params: Any, tokens_BT: jax.Array, places_B: jax.Array, around: Around = AS_IT_IS
    ) -> jax.Array:
        """Final hidden states at one place of each row, [B, C] in the model's dtype, from int32
        tokens and places: the last layer is evaluated there alone, but for keys and values.
        """
        functions = architecture(self.config)
        return functions.hidden_at(self.config, params, tokens_BT, places_B, self.dtype, around)

    def head(self, params: Any) -> Any:
        """The output head [V, C]."""
        return architecture(self.config).head(params)

    def logits(self, params: Any, tokens_BT: jax.Array) -> jax.Array:
        """Logits of the next token at each position, float32 [B, T, V], from int32 tokens.

        >>> import jax, jax.numpy as jnp
        >>> from zo_jax import models
        >>> m = models.create(dict(model_type="gpt2", vocab_size=11, n_embd=8, n_head=2, n_layer=2), jax.random.key(0))
        >>> m.logits(m.params, jnp.zeros((1, 4), jnp.int32)).shape
        (1, 4, 11)
        """  # noqa: E501
        return product(self.hidden(params, tokens_BT), self.head(params), jnp.float32)

    def loss(
        self, params: Any, tokens_BT: jax.Array, weights_BT: jax.Array | None = None
    ) -> jax.Array:
        """Mean cross-entropy of predicting token t + 1 from tokens 1..t, float32, in nats.

        All logits exist at once; `hidden` and `head` are there for a loss that goes block by block.

        Args:
          params: the parameters.
          tokens_BT: int32.
          weights_BT: floating, what each token counts as a target (the first has no say); None for
            1 each.
        """
        logits_BTV = self.logits(params, tokens_BT[:, :-1])
        targets_BT1 = tokens_BT[:, 1:, None]
        picked_BT = jnp.take_along_axis(logits_BTV, targets_BT1, axis=-1)[..., 0]
        losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
        if weights_BT is None:
            return jnp.mean(losses_BT)
        return jnp.sum(losses_BT * weights_BT[:, 1:]) / jnp.sum(weights_BT[:, 1:])


class Files(NamedTuple):
    """The files of a model, whose weights are still to be read.

    Attributes:
      config: sizes and options.
      tokenizer: None where the files have none.
      tensors: the weights.
      folder: None of a GGUF file.
    """

    config: Config
    tokenizer: Any
    tensors: checkpoint.Source
    folder: Path | None

    def read(
        self,
        dtype: Any = None,
        sharding: Callable[[tuple[Any, ...], tuple[int, ...]], Any] | None = None,
        keep_quantized: bool = False,
        bits: int = 0,
    ) -> Any:
        """The parameters; `bits` quantises each weight once it is read, as `quantize` does, the
        rest is as in `load`.
        """
        leaves = architecture(self.config).leaves(self.config)
        convert = (lambda path, x: _quantized(path, x, bits)) if bits else None
        return checkpoint.read_params(
            leaves, self.tensors, dtype, sharding, keep_quantized, convert
        )

    def shapes(self, dtype: Any, keep_quantized: bool = False, bits: int = 0) -> Any:
        """Those of the parameters that `read` returns."""
        leaves = architecture(self.config).leaves(self.config)
        return checkpoint.shapes_of_params(leaves, self.tensors, dtype, keep_quantized, bits)

    @property
    def digest(self) -> str:
        """What tells these weights from others: 64 bits of a hash over the beginning of every
        tensor, in hexadecimal.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        for name, shape in sorted(self.tensors.shapes().items()):
            digest.update(f"{name} {shape} ".encode() + self.tensors.beginning(name))
        return digest.hexdigest()[:16]


def open_files(path: str | Path) -> Files:
    """What `load` reads, without the weights: their names and shapes are checked.

    Raises:
      ValueError: as `load`.
    """
    path = Path(path).expanduser()
    if path.suffix == ".gguf":
        tensors = gguf.Gguf(path)
        c, tokens = gguf.read_config(tensors), gguf_tokenizer.from_gguf(tensors.metadata)
    else:
        c, tokens = _read_config(path), tokenizer.from_folder(path)
        tensors = checkpoint.Safetensors(path, architecture(c).PREFIX)
    checkpoint.check(architecture(c).leaves(c), tensors, c.tied)
    return Files(c, tokens, tensors, path if path.is_dir() else None)


def load(
    path: str | Path,
    dtype: Any = None,
    *,
    sharding: Callable[[tuple[Any, ...], tuple[int, ...]], Any] | None = None,
    keep_quantized: bool = False,
) -> Model:
    """Reads a model from a Hugging Face folder or a GGUF file.

    Args:
      path: a folder with config.json, safetensors (one file, or shards with their index), and
        perhaps a tokenizer.json; or a file that ends in .gguf.
      dtype: of parameters and activations; None for the folder's, and float32 of a GGUF file.
      sharding: a function of a leaf's path and shape (`zo_jax.layout.Layout.sharding` is one) that
        says where it goes; None for the default device.
      keep_quantized: whether weights in a GGUF file's blocks Q8_0, Q4_0 and Q4_1 stay so, as
        `Quantized`; others are dequantised.

    Returns:
      A `Model`. While it is read the host holds one leaf, a stack of layers, beside what is on the
      devices.

    Raises:
      ValueError: an architecture or option that is not computed, a missing or unknown tensor, a
        shape that does not fit the config, a missing shard or a damaged file.

    >>> import jax, tempfile
    >>> from zo_jax import models
    >>> fields = dict(model_type="gpt2", vocab_size=11, n_embd=8, n_head=2, n_layer=2)
    >>> m, folder = models.create(fields, jax.random.key(0)), tempfile.mkdtemp()
    >>> models.save(folder, m, m.params)
    >>> models.load(folder).config == m.config
    True
    """
    files = open_files(path)
    params = files.read(dtype, sharding, keep_quantized)
    dtype = dtype or architecture(files.config).head(params).dtype
    return Model(files.config, params, dtype, files.tokenizer, files.folder)


def _read_config(folder: Path) -> Config:
    """Of config.json, and what ends a text of generation_config.json, which knows better."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} must be a folder with a config.json, or a .gguf file")
    fields = _read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        ends = _read_json(folder / "generation_config.json").get("eos_token_id")
        fields |= {} if ends is None else {"eos_token_id": ends}
    return config.from_hf(fields)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def create(fields: dict[str, Any], key: jax.Array, dtype: Any = jnp.float32) -> Model:
    """A model with fresh weights: normal with deviation 0.02, scales 1, biases 0.

    Args:
      fields: those of a config.json.
      key: PRNG key.
      dtype: of parameters and activations.

    Raises:
      ValueError: an architecture or an option that is not computed.

    >>> import jax
    >>> from zo_jax import models
    >>> m = models.create(dict(model_type="llama", vocab_size=11, hidden_size=8, num_hidden_layers=3,
    ...     num_attention_heads=2, intermediate_size=16), jax.random.key(0))
    >>> m.params["layers"]["mlp"]["up_proj"]["weight"].shape
    (3, 16, 8)
    """  # noqa: E501
    c = config.from_hf(fields)
    leaves, treedef = jax.tree.flatten_with_path(architecture(c).leaves(c))
    keys = jax.random.split(key, len(leaves))
    constants = {"scale": jnp.ones, "bias": jnp.zeros}

    def fresh(path, leaf, key):
        constant = constants.get(path_name(path).rpartition("/")[2])
        if constant:
            return constant(leaf.shape, dtype)
        return (0.02 * jax.random.normal(key, leaf.shape)).astype(dtype)

    arrays = [fresh(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)]
    return Model(c, jax.tree.unflatten(treedef, arrays), dtype)


def quantize(model: Model, bits: int = 8) -> Model:
    """The model with its weights, embeddings and head quantised; norms and biases stay.

    Args:
      model: of floating weights.
      bits: 8, rows of int8 with a scale each; or 4, blocks of 32 with scale and offset.

    Raises:
      ValueError: another number of bits, or rows that 4 bits do not fit.

    >>> import jax
    >>> from zo_jax import models
    >>> fields = dict(model_type="gpt2", vocab_size=11, n_embd=8, n_head=2, n_layer=2)
    >>> small = models.quantize(models.create(fields, jax.random.key(0)))
    >>> leaves = jax.tree.leaves(small.params, is_leaf=lambda x: isinstance(x, models.Quantized))
    >>> any(isinstance(x, models.Quantized) for x in leaves)
    True
    """

    params = jax.tree.map_with_path(
        lambda path, x: _quantized(path, x, bits), model.params, is_leaf=is_weight
    )
    return dataclasses.replace(model, params=params)


def _quantized(path: tuple[Any, ...], x: Any, bits: int) -> Any:
    is_matrix = checkpoint.is_quantizable(path) and not is_weight(x)
    return to_quantized(x, bits) if is_matrix else x


def save(folder: str | Path, model: Model, params: Any) -> None:
    """Writes a folder that transformers and `load` read: config.json, safetensors, and the
    tokenizer's files.

    Args:
      folder: made where it is not there.
      model: whose configuration and tokenizer these are.
      params: parameters like `model.params`; what is quantised is written in float32.

    Raises:
      ValueError: the parameters do not have the model's names and shapes.

    >>> import jax, pathlib, tempfile
    >>> from zo_jax import models
    >>> fields = dict(model_type="gpt2", vocab_size=11, n_embd=8, n_head=2, n_layer=2)
    >>> m, folder = models.create(fields, jax.random.key(0)), tempfile.mkdtemp()
    >>> models.save(folder, m, m.params)
    >>> sorted(path.name for path in pathlib.Path(folder).iterdir())
    ['config.json', 'model.safetensors']
    """
    folder = Path(folder)
    functions = architecture(model.config)
    checkpoint.write_params(folder, functions.leaves(model.config), params, functions.PREFIX)
    # The original has more fields than this package reads.
    original = _read_json(model.folder / "config.json") if model.folder else {}
    fields = original or config.to_hf(model.config)
    fields["dtype"] = fields["torch_dtype"] = jnp.dtype(functions.head(params).dtype).name
    write_atomic(folder / "config.json", json.dumps(fields, indent=2) + "\n")
    if model.folder:
        _copy_tokenizer(model.folder, folder)
    elif model.tokenizer:
        model.tokenizer.write(folder)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    if source.resolve() == folder.resolve():
        return
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
