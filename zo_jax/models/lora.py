"""Low-rank adapters: the base stays as it is, and W + s · up · down is trained in its place, in the
two factors alone.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. Files are those of PEFT.

Axes: L layers, r rank.
"""

import dataclasses
import json
import math
from pathlib import Path
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from zo_jax.atomic import write_atomic
from zo_jax.models.checkpoint import save_tensors, tensor_name
from zo_jax.models.config import Config
from zo_jax.models.model import Model, architecture
from zo_jax.models.spec import Leaf
from zo_jax.models.weights import Weight, form, product, rows
from zo_jax.trees import path_name

# Queries and values, as PEFT has it; GPT-2 has them in one.
TARGETS = r"/(q_proj|v_proj|c_attn)$"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "wte", "wpe")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """What is trained of a weight; of fewer than all L layers, that of the last ones.

    Attributes:
      down: floating [L, r, in].
      up: floating [L, out, r].
      scale: s, alpha / r.
    """

    down: jax.Array
    up: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(Weight):
    """A weight with factors; the sum is not formed in products."""

    weight: Any
    factors: Factors

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def product(self, x: jax.Array, out_dtype: Any) -> jax.Array:
        y = product(x, self.weight, out_dtype)
        inner = product(x.astype(self.factors.down.dtype), self.factors.down)
        return y + (self.factors.scale * product(inner, self.factors.up)).astype(y.dtype)

    def rows(self, indices: jax.Array) -> jax.Array:
        found = rows(self.weight, indices, self.factors.up.dtype)
        return found + self.factors.scale * (self.factors.up[indices] @ self.factors.down)

    def form(self) -> jax.Array:
        change = jnp.einsum("...or,...ri->...oi", self.factors.up, self.factors.down)
        return form(self.weight).astype(jnp.float32) + self.factors.scale * change


def init(
    key: jax.Array,
    model: Model,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str = TARGETS,
    num_layers: int = 0,
) -> dict[str, Factors]:
    """Fresh factors: down uniform in ±1/√in, up zero, so that the model is at first the base.

    Args:
      key: PRNG key.
      model: the base.
      rank: r.
      alpha: the change is alpha / r · up · down.
      targets: regular expression, searched in names like layers/self_attn/q_proj.
      num_layers: only the last so many layers have factors (0: all). What lies below them is then
        evaluated once for all queries of an estimate.

    Returns:
      float32 factors by the names of their weights: the parameters to train. The loss is, for
      example, `lambda factors, base, tokens: model.loss(lora.attach(base, factors), tokens)`.

    Raises:
      ValueError: the rank is below 1, no weight is found, or the model has fewer layers.

    >>> import jax
    >>> from zo_jax import models
    >>> m = models.create(dict(model_type="gpt2", vocab_size=11, n_embd=8, n_head=2, n_layer=2), jax.random.key(0))
    >>> factors = models.lora.init(jax.random.key(1), m, rank=2)
    >>> {name: (f.down.shape, f.up.shape) for name, f in factors.items()}
    {'h/attn/c_attn': ((2, 2, 8), (2, 24, 2))}
    """  # noqa: E501
    if rank < 1:
        raise ValueError(f"the rank must be at least 1; got {rank}")
    if not 0 <= num_layers <= model.config.num_layers:
        raise ValueError(
            f"num_layers must be at most the model's {model.config.num_layers}; got {num_layers}"
        )
    leaves = _adaptable(model.config)
    found = {name: leaf for name, leaf in leaves.items() if re.search(targets, name)}
    if not found:
        raise ValueError(f"targets must find one of {', '.join(leaves)}; {targets!r} finds none")
    keys = jax.random.split(key, len(found))
    return {
        name: _fresh(key, leaf, rank, alpha / rank, num_layers)
        for key, (name, leaf) in zip(keys, found.items(), strict=True)
    }


def _fresh(key: jax.Array, leaf: Leaf, rank: int, scale: float, num_layers: int) -> Factors:
    *layers, out, width = leaf.shape
    if layers and num_layers:
        layers = [num_layers]
    bound = 1 / math.sqrt(width)
    down = jax.random.uniform(key, (*layers, rank, width), minval=-bound, maxval=bound)
    return Factors(down, jnp.zeros((*layers, out, rank)), float(scale))


def _adaptable(config: Config) -> dict[str, Leaf]:
    """The weights of products, by the names of their parts."""
    flat = jax.tree.leaves_with_path(architecture(config).leaves(config))
    named = {path_name(path).removesuffix("/weight"): leaf for path, leaf in flat}
    return {
        name: leaf
        for name, leaf in named.items()
        if len(leaf.tensor_shape) == 2 and name not in _EMBEDDINGS
    }


def attach(params: Any, factors: dict[str, Factors]) -> Any:
    """The parameters with `Adapted` weights, for the functions of a model."""
    return _replace(params, factors, lambda weight, f: Adapted(weight, _in_all_layers(weight, f)))


def _in_all_layers(weight: Any, f: Factors) -> Factors:
    """Factors of the last layers, with zeros for those before."""
    # The factors of a population are weights themselves, whose arrays have layers in front too.
    num_layers = len(jax.tree.leaves(f.down)[0])
    before = weight.shape[0] - num_layers if len(weight.shape) == 3 else 0
    if not before:
        return f
    zeros = lambda x: jnp.zeros((before, *x.shape[1:]), x.dtype)
    pad = lambda part: jax.tree.map(lambda x: jnp.concatenate([zeros(x), x]), part)
    return dataclasses.replace(f, down=pad(f.down), up=pad(f.up))


def merge(model: Model, params: Any, factors: dict[str, Factors]) -> Any:
    """The parameters W + s · up · down, summed in float32; what was quantised becomes of the
    model's dtype.

    Args:
      model: the base.
      params: like `model.params`.
      factors: of `init` or `load`.
    """

    def merged(weight: Any, f: Factors) -> jax.Array:
        dtype = model.dtype if isinstance(weight, Weight) else weight.dtype
        return Adapted(weight, _in_all_layers(weight, f)).form().astype(dtype)

    return _replace(params, factors, merged)


def _replace(params: Any, factors: dict[str, Factors], function: Any) -> Any:
    """The parameters with function(weight, factors) for each weight that has factors."""

    def replaced(tree: Any, names: list[str], f: Factors) -> Any:
        if not names:
            return tree | {"weight": function(tree["weight"], f)}
        return tree | {names[0]: replaced(tree[names[0]], names[1:], f)}

    for name, f in factors.items():
        params = replaced(params, name.split("/"), f)
    return params


def save(folder: str | Path, model: Model, factors: dict[str, Factors]) -> None:
    """Writes the factors as PEFT does: adapter_config.json and adapter_model.safetensors.

    Args:
      folder: made where it is not there.
      model: the base.
      factors: of `init` or `load`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix, leaves = architecture(model.config).PREFIX, _adaptable(model.config)
    tensors, modules = {}, set()
    layers: list[int] = []
    for name, f in factors.items():
        leaf = leaves[name]
        modules.add(leaf.hf.split("{}.")[-1].removesuffix(".weight"))
        if leaf.is_stacked:
            layers = list(range(leaf.num_tensors - len(f.down), leaf.num_tensors))
        for k, i in enumerate(layers if leaf.is_stacked else [0]):
            for part, x in zip(_part_names(leaf, i, prefix), (f.down, f.up), strict=True):
                tensors[part] = np.ascontiguousarray(np.asarray(x)[k if leaf.is_stacked else ...])
    first = next(iter(factors.values()))
    rank = first.down.shape[-2]
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.folder or ""),
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "fan_in_fan_out": any(leaves[name].transposed for name in factors),
    }
    if 0 < len(layers) < model.config.num_layers:
        fields["layers_to_transform"] = layers
    save_tensors(tensors, folder / _WEIGHTS)
    write_atomic(folder / _CONFIG, json.dumps(fields, indent=2) + "\n")


def load(folder: str | Path, model: Model) -> dict[str, Factors]:
    """The factors of a folder that PEFT or `save` wrote.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      model: the base.

    Raises:
      ValueError: a file is missing or damaged, the adapter is not a plain LoRA, or its tensors do
        not fit the model.
    """
    folder = Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must be an adapter's folder; it has no {name}")
    scale = _read_scale(json.loads((folder / _CONFIG).read_text()))
    try:
        tensors = safetensors.numpy.load_file(folder / _WEIGHTS)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / _WEIGHTS} is no whole safetensors file: {error}") from error
    # Beside the factors of a head PEFT writes the head, which is the base's.
    tensors = {k: v for k, v in tensors.items() if not k.endswith(".base_layer.weight")}
    prefix, factors = architecture(model.config).PREFIX, {}
    for name, leaf in _adaptable(model.config).items():
        parts = [_part_names(leaf, i, prefix) for i in range(leaf.num_tensors)]
        is_there = [any(part in tensors for part in pair) for pair in parts]
        if not any(is_there):
            continue
        parts = parts[is_there.index(True) :]
        if missing := [part for pair in parts for part in pair if part not in tensors]:
            raise ValueError(
                f"an adapter must have all layers of {name}, or the last ones; {missing[0]} is "
                f"missing in {folder}"
            )
        down, up = (np.stack([tensors.pop(pair[k]) for pair in parts]) for k in (0, 1))
        if not leaf.is_stacked:
            down, up = down[0], up[0]
        if (*up.shape[-2:-1], down.shape[-1]) != leaf.tensor_shape:
            raise ValueError(
                f"the factors of {name} must make {list(leaf.shape)}; got {list(up.shape)} times "
                f"{list(down.shape)}"
            )
        factors[name] = Factors(jnp.asarray(down), jnp.asarray(up), scale)
    if tensors or not factors:
        raise ValueError(
            f"{folder} must adapt weights of the model alone; it has "
            f"{min(tensors, default='no tensors')}"
        )
    return factors


def _part_names(leaf: Leaf, layer: int, prefix: str) -> tuple[str, str]:
    base = _PREFIX + tensor_name(leaf, layer, prefix).removesuffix(".weight")
    return f"{base}.lora_A.weight", f"{base}.lora_B.weight"


def _read_scale(fields: dict[str, Any]) -> float:
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"peft_type in {_CONFIG} must be LORA; got {fields.get('peft_type')!r}")
    for name in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"):
        if fields.get(name):
            raise ValueError(f"{name} in {_CONFIG} must be empty; got {fields[name]!r}")
    rank = fields["r"]
    return fields["lora_alpha"] / (math.sqrt(rank) if fields.get("use_rslora") else rank)
