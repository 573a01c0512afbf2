"""The format of GGUF files: metadata by their keys, and tensors as blocks of bytes, mapped from the
disk.

The package `gguf` knows the types of blocks and what they stand for. Its own reader takes a quarter
of a millisecond a token of the vocabulary's, and this one none.
"""

import mmap
from pathlib import Path
import struct
from typing import Any, NamedTuple

import gguf
import numpy as np

# Struct codes of the scalar types, by GGUF's numbers; 8 is a string and 9 an array.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Tensor(NamedTuple):
    """A tensor in a file.

    Attributes:
      shape: in NumPy's order.
      kind: the type of its blocks.
      data: uint8 [..., bytes of a row].
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: np.ndarray

    def dequantize(self) -> np.ndarray:
        """Its numbers, float32."""
        if self.kind == gguf.GGMLQuantizationType.F32:
            return self.data.view(np.float32)
        return gguf.dequantize(self.data, self.kind)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata, tensors by their names) of a file.

    Raises:
      ValueError: the file is no GGUF file of version 2 or 3, or ends too early.
    """
    try:
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(buffer)
    except (OSError, struct.error, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no whole GGUF file: {error}") from error


def _parse(buffer: mmap.mmap) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cursor = _Cursor(buffer)
    magic, version = buffer[:4], struct.unpack_from("<I", buffer, 4)[0]
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(
            f"it must begin with GGUF and the version 2 or 3; got {magic!r}, {version}"
        )
    cursor.position = 8
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(num_values)}
    entries = [cursor.tensor_entry() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in entries:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        data_shape = (*shape[:-1], shape[-1] // block * block_bytes)
        data = np.frombuffer(buffer, np.uint8, int(np.prod(data_shape)), start + offset)
        tensors[name] = Tensor(shape, kind, data.reshape(data_shape))
    return metadata, tensors


class _Cursor:
    """A place in a file that moves on with what is read."""

    def __init__(self, buffer: mmap.mmap):
        self.buffer, self.position = buffer, 0

    def scalar(self, code: str) -> Any:
        return self._scalars(code, 1)[0]

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        form = f"<{count}{code}"
        values = struct.unpack_from(form, self.buffer, self.position)
        self.position += struct.calcsize(form)
        return values

    def string(self) -> str:
        length = self.scalar("Q")
        start, self.position = self.position, self.position + length
        raw = self.buffer[start : self.position]
        if len(raw) < length:
            raise ValueError("it ends within a string")
        return raw.decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in (_STRING, _ARRAY):
            return [self.value(kind) for _ in range(count)]
        return list(self._scalars(_SCALARS[kind], count))

    def tensor_entry(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        """(name, shape, type, offset of the data); GGUF has the fastest axis first."""
        name, ndim = self.string(), self.scalar("I")
        shape = tuple(reversed(self._scalars("Q", ndim)))
        return name, shape, gguf.GGMLQuantizationType(self.scalar("I")), self.scalar("Q")
