"""Weights in Hugging Face's folders: safetensors in one file or in shards, read and written tensor
by tensor.
"""

from collections.abc import Callable, Iterator
import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from zo_jax import trees
from zo_jax.atomic import write_atomic
from zo_jax.models.quantized import KINDS, Blocks, Quantized, quantize
from zo_jax.models.spec import Leaf
from zo_jax.models.weights import form, is_weight

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Bytes of a file; larger models are written in several.
_SHARD_BYTES = 5 * 10**9
# Bytes of a tensor that tell it from another.
BEGINNING = 4096
# What old files carry beside the parameters: masks and angles.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Source(Protocol):
    """Where tensors come from: a folder of safetensors, or a GGUF file.

    Attributes:
      is_hf: whether they lie as in Hugging Face's files, which have some weights transposed.
    """

    is_hf: bool

    def name(self, leaf: Leaf, layer: int) -> str:
        """What the tensor of a leaf is called there."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors that a model must know."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Of a tensor when it is read."""
        ...

    def read(self, name: str) -> np.ndarray:
        """A tensor."""
        ...

    def beginning(self, name: str) -> bytes:
        """The first bytes of a tensor, as they are there."""
        ...

    def kind(self, name: str) -> str:
        """How a tensor is quantised there: a kind of `quantized.KINDS`, or another word."""
        ...

    def blocks(self, name: str) -> Blocks:
        """A tensor of one of those kinds, as it is there."""
        ...


class Safetensors:
    """The tensors of a folder.

    Args:
      folder: with model.safetensors, or with shards and their index.
      prefix: of the body's tensors, like "model."; files of a body alone lack it.

    Raises:
      ValueError: no file is there, a shard is missing, or a file is damaged.
    """

    is_hf = True

    def __init__(self, folder: Path, prefix: str):
        self._folder, self._files = folder, {}
        for path in self._paths():
            try:
                file = safetensors.safe_open(path, framework="numpy")
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(f"{path} is no whole safetensors file: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)
        self._prefix = prefix if any(name.startswith(prefix) for name in self._files) else ""

    def _paths(self) -> list[Path]:
        single, index = self._folder / SINGLE, self._folder / INDEX
        if single.is_file():
            return [single]
        if not index.is_file():
            raise ValueError(f"{self._folder} must have {SINGLE}, or {INDEX} and its shards")
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if missing := [name for name in names if not (self._folder / name).is_file()]:
            raise ValueError(
                f"{self._folder} lacks {len(missing)} of the {len(names)} shards that {INDEX} "
                f"names, {missing[0]} first; fetch them"
            )
        return [self._folder / name for name in names]

    def name(self, leaf: Leaf, layer: int) -> str:
        return tensor_name(leaf, layer, self._prefix)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        names = [name for name in self._files if not name.endswith(_BUFFERS)]
        return {name: tuple(self._files[name].get_slice(name).get_shape()) for name in names}

    def dtype(self, name: str) -> np.dtype:
        code = self._files[name].get_slice(name).get_dtype()
        if code not in _DTYPES:
            raise ValueError(
                f"{name} must be of type {', '.join(_DTYPES)}; got {code}; take the original "
                f"weights, or a GGUF file"
            )
        return np.dtype(ml_dtypes.bfloat16 if code == "BF16" else _DTYPES[code])

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def beginning(self, name: str) -> bytes:
        return np.asarray(self._files[name].get_slice(name)[:1]).tobytes()[:BEGINNING]

    def kind(self, name: str) -> str:
        return ""

    def blocks(self, name: str) -> Blocks:
        raise ValueError(f"{name} is not quantised")


def tensor_name(leaf: Leaf, layer: int, prefix: str) -> str:
    """A leaf's name in Hugging Face's files; the output head is no part of the body."""
    name = leaf.hf.format(layer)
    return name if name.startswith("lm_head") else prefix + name


def check(leaves: Any, source: Source, is_tied: bool) -> None:
    """Compares what a model needs with what a source has.

    Raises:
      ValueError: a tensor is missing or unknown, or its shape does not fit; the first one is named.
    """
    has = source.shapes()
    needed = {
        source.name(leaf, i): leaf.tensor_shape[:: -1 if leaf.transposed and source.is_hf else 1]
        for leaf in jax.tree.leaves(leaves)
        for i in range(leaf.num_tensors)
    }
    if missing := needed.keys() - has.keys():
        raise ValueError(
            f"the weights lack {len(missing)} of the {len(needed)} tensors of the model, "
            f"{min(missing)} first; "
            "its files or its config are not whole"
        )
    # A tied head is sometimes written out.
    heads = {"lm_head.weight", "output.weight"} if is_tied else set()
    if unknown := has.keys() - needed.keys() - heads:
        raise ValueError(
            f"the weights have {len(unknown)} tensors that the model does not know, {min(unknown)} "
            f"first; the config must "
            "describe them"
        )
    for name, shape in needed.items():
        if has[name] != shape:
            raise ValueError(
                f"{name} must have the shape {list(shape)} by the config; got {list(has[name])}"
            )


def read_params(
    leaves: Any,
    source: Source,
    dtype: Any = None,
    sharding: Any = None,
    keep_quantized: bool = False,
    convert: Callable[[tuple[Any, ...], jax.Array], Any] | None = None,
) -> Any:
    """The parameters on the devices, read leaf by leaf: the host holds one leaf at a time.

    Args:
      leaves: pytree of `Leaf`.
      source: has all of them.
      dtype: of the parameters; None for the file's.
      sharding: a function of a leaf's path (as `jax.tree.map_with_path` has it) and its shape; None
        for the default device.
      keep_quantized: whether what the source has in blocks becomes `Quantized`; its parts are
        arrays of paths of their own.
      convert: what becomes of each array, given its path, before the next is read.
    """

    def put(path: tuple[Any, ...], x: np.ndarray) -> jax.Array:
        return jax.device_put(x, sharding(path, x.shape) if sharding else None)

    def read(path: tuple[Any, ...], leaf: Leaf) -> Any:
        names = _names(leaf, source)
        if keep_quantized and is_kept(leaf, source):
            stack = np.stack if leaf.is_stacked else lambda parts: parts[0]
            blocks = jax.tree.map(lambda *parts: stack(parts), *map(source.blocks, names))
            whole = Quantized(*blocks)
            return jax.tree.map_with_path(lambda part, x: put((*path, *part), x), whole)
        file_dtype = source.dtype(names[0])  # asked for in any case: it refuses what is not read
        stack = np.empty(leaf.shape, dtype or file_dtype)
        layers = stack if leaf.is_stacked else stack[None]
        for layer, name in zip(layers, names, strict=True):
            tensor = source.read(name)
            layer[...] = tensor.T if leaf.transposed and source.is_hf else tensor
        array = put(path, stack)
        return convert(path, array) if convert else array

    return jax.tree.map_with_path(read, leaves)


def shapes_of_params(
    leaves: Any, source: Source, dtype: Any, keep_quantized: bool = False, bits: int = 0
) -> Any:
    """Those of `read_params`, whose weights `bits` quantises, if it is not 0; one layer is read
    where it is quantised in the file.
    """

    def shapes(path: tuple[Any, ...], leaf: Leaf) -> Any:
        plain = jax.ShapeDtypeStruct(leaf.shape, dtype)
        if keep_quantized and is_kept(leaf, source):
            stack = leaf.shape[:1] if leaf.is_stacked else ()
            layer = Quantized(*source.blocks(_names(leaf, source)[0]))
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype), layer)
        if bits and is_quantizable(path):
            return jax.eval_shape(lambda x: quantize(x, bits), plain)
        return plain

    return jax.tree.map_with_path(shapes, leaves)


def is_quantizable(path: tuple[Any, ...]) -> bool:
    """Whether a leaf is a weight, an embedding or a head, not a norm or a bias."""
    return trees.path_name(path).endswith("/weight")


def is_kept(leaf: Leaf, source: Source) -> bool:
    """Whether all layers of a leaf are in blocks of one kind, of those that `Quantized` has."""
    (kind, *others) = {source.kind(name) for name in _names(leaf, source)}
    return not others and kind in KINDS


def _names(leaf: Leaf, source: Source) -> list[str]:
    return [source.name(leaf, i) for i in range(leaf.num_tensors)]


def write_params(folder: Path, leaves: Any, params: Any, prefix: str) -> None:
    """Writes the parameters as safetensors, in files of at most 5 GB; the host holds one of them at
    a time.

    Raises:
      ValueError: the parameters are not those of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(leaves, params))
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = [SINGLE] if len(shards) == 1 else files
    weight_map, total = {}, 0
    for file, shard in zip(files, shards, strict=True):
        tensors = {
            tensor_name(leaf, i, prefix): np.ascontiguousarray(tensor)
            for leaf, x in shard
            for i, tensor in enumerate(_tensors(leaf, x))
        }
        save_tensors(tensors, folder / f"{file}.tmp")
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(x.nbytes for x in tensors.values())
    # Only now that all is written: the folder may hold the model that these parameters were read
    # from.
    for path in [folder / INDEX, *folder.glob("model*.safetensors")]:
        path.unlink(missing_ok=True)
    for file in files:
        os.replace(folder / f"{file}.tmp", folder / file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(folder / INDEX, json.dumps(index, indent=2))


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """A safetensors file, which all may read as they may other files of the folder."""
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _shards(leaves: Any, params: Any) -> Iterator[list[tuple[Leaf, Any]]]:
    """Leaves with their arrays, in groups of at most the size of a file."""
    want, got = jax.tree.structure(leaves), jax.tree.structure(params, is_leaf=is_weight)
    if want != got:
        raise ValueError(f"the parameters must be those of the model, {want}; got {got}")
    shard, size = [], 0
    flat = jax.tree.leaves_with_path(leaves)
    for (path, leaf), x in zip(flat, jax.tree.leaves(params, is_leaf=is_weight), strict=True):
        if x.shape != leaf.shape:
            raise ValueError(
                f"{trees.path_name(path)} must have the shape {list(leaf.shape)}; got "
                f"{list(x.shape)}"
            )
        num_bytes = math.prod(x.shape) * np.dtype(x.dtype).itemsize
        if shard and size + num_bytes > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((leaf, x))
        size += num_bytes
    yield shard


def _tensors(leaf: Leaf, x: Any) -> Iterator[np.ndarray]:
    array = np.asarray(form(x))
    for tensor in array if leaf.is_stacked else array[None]:
        yield tensor.T if leaf.transposed else tensor
