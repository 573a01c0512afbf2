"""Weights that stay quantised in memory, and become numbers where they are used, a layer at a time.

Axes: ... layers, N blocks of a row, K numbers of a block.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from zo_jax.models.weights import Weight, product

# The blocks of GGUF that stay as they are.
KINDS = ("Q8_0", "Q4_0", "Q4_1")
# Numbers of a block of 4 bits, as in GGUF.
_BLOCK = 32
# Numbers that stay in cache between the codes and the product: 4 MB.
_CACHED = 2**20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(Weight):
    """A weight [..., out, in] in blocks along its rows: each number is scale · code + offset.

    The scales are floating and would be perturbed as parameters: keep it out of what is trained
    (`zo_jax.models.lora` trains factors beside it).

    Attributes:
      codes: int8 [..., out, N, K]; or uint8 [..., out, N, K / 2], byte i with code i in its low
        half and code i + K / 2 in its high one, as in GGUF.
      scales: floating [..., out, N].
      offsets: floating [..., out, N], or None for zero.

    >>> import jax.numpy as jnp
    >>> q = quantize(jnp.array([[1.27, -0.5], [0.0, 2.54]]), bits=8)
    >>> q.codes[:, 0].tolist(), q.shape
    ([[127, -50], [0, 127]], (2, 2))
    """

    codes: jax.Array
    scales: jax.Array
    offsets: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        *rest, num_blocks, size = self.codes.shape
        return (*rest, num_blocks * size * (2 if self.codes.dtype == jnp.uint8 else 1))

    @property
    def dtype(self) -> Any:
        """Of the numbers."""
        return jnp.dtype(jnp.float32)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def dequantize(self) -> jax.Array:
        """The numbers, float32 [..., out, in]."""
        codes = self.codes
        if codes.dtype == jnp.uint8:
            # Shifts rather than two halves put together, which XLA would not fuse with what comes
            # after.
            shifts = jnp.array([0, 4], jnp.uint8).reshape((1,) * (codes.ndim - 1) + (2, 1))
            codes = ((codes[..., None, :] >> shifts) & 15).reshape(*codes.shape[:-1], -1)
        numbers = codes.astype(jnp.float32) * self.scales.astype(jnp.float32)[..., None]
        if self.offsets is not None:
            numbers = numbers + self.offsets.astype(jnp.float32)[..., None]
        return numbers.reshape(self.shape)

    form = dequantize

    def product(self, x: jax.Array, out_dtype: Any) -> jax.Array:
        """Block by block over the rows of a large weight, whose numbers never exist at once."""
        num_rows, width = self.shape
        num_blocks = -(-num_rows * width // _CACHED)
        block_rows = -(-num_rows // num_blocks)

        def put_block(i: jax.Array, y: jax.Array) -> jax.Array:
            # The last block starts early enough to be whole; the rows that it shares are computed
            # twice.
            start = jnp.minimum(i * block_rows, num_rows - block_rows)
            part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, block_rows), self)
            block = product(x, part.dequantize(), out_dtype)
            return lax.dynamic_update_slice_in_dim(y, block, start, y.ndim - 1)

        if num_blocks == 1:
            return product(x, self.dequantize(), out_dtype)
        y = jnp.zeros((*x.shape[:-1], num_rows), out_dtype)
        return lax.fori_loop(0, num_blocks, put_block, y)

    def rows(self, indices: jax.Array) -> jax.Array:
        return jax.tree.map(lambda part: part[indices], self).dequantize()


class Blocks(NamedTuple):
    """The parts of a `Quantized` as NumPy arrays, of one layer."""

    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None


def from_gguf(kind: str, data: np.ndarray) -> Blocks:
    """Blocks of a GGUF file, with their scales as they are there.

    Q8_0: a float16 scale d and 32 bytes q, d q. Q4_0: d and 32 halves of bytes, d (q − 8). Q4_1: d,
      m, and halves, d q + m.

    Args:
      kind: GGUF's name, one of KINDS.
      data: uint8 [out, bytes of a row].
    """
    num_scales = 2 if kind == "Q4_1" else 1
    size = 2 * num_scales + (_BLOCK if kind == "Q8_0" else _BLOCK // 2)
    blocks = data.reshape(len(data), -1, size)
    scales = np.ascontiguousarray(blocks[..., : 2 * num_scales]).view(np.float16)
    codes = blocks[..., 2 * num_scales :]
    if kind == "Q8_0":
        return Blocks(codes.view(np.int8), scales[..., 0], None)
    offsets = scales[..., 1] if kind == "Q4_1" else np.float16(-8) * scales[..., 0]
    return Blocks(codes, scales[..., 0], offsets)


def quantize(weight: jax.Array, bits: int) -> Quantized:
    """The nearest quantised weight.

    8 bits: rows of int8 with a float32 scale max |w| / 127 each. 4 bits: blocks of 32 with float16
    scale (max − min) / 15 and offset min, like GGUF's Q4_1.

    Args:
      weight: floating [..., out, in].
      bits: 8 or 4.

    Raises:
      ValueError: another number of bits, or 4 bits and rows that are no whole blocks.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 8 or 4; got {bits}")
    if bits == 4 and weight.shape[-1] % _BLOCK:
        raise ValueError(
            f"4 bits need rows of a multiple of {_BLOCK} numbers; got a weight "
            f"{list(weight.shape)}; take bits=8"
        )
    return (_to_8_bits if bits == 8 else _to_4_bits)(weight)


@jax.jit
def _to_8_bits(weight: jax.Array) -> Quantized:
    x = weight.astype(jnp.float32)[..., None, :]
    scales = jnp.max(jnp.abs(x), axis=-1) / 127
    codes = jnp.round(x / jnp.where(scales == 0, 1, scales)[..., None])
    return Quantized(codes.astype(jnp.int8), scales)


@jax.jit
def _to_4_bits(weight: jax.Array) -> Quantized:
    x = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, _BLOCK)
    lowest = jnp.min(x, axis=-1).astype(jnp.float16)
    scales = ((jnp.max(x, axis=-1) - lowest.astype(jnp.float32)) / 15).astype(jnp.float16)
    step = jnp.where(scales == 0, 1, scales).astype(jnp.float32)
    codes = jnp.round((x - lowest.astype(jnp.float32)[..., None]) / step[..., None])
    codes = jnp.clip(codes, 0, 15).astype(jnp.uint8)
    low, high = jnp.split(codes, 2, axis=-1)
    return Quantized(low | (high << 4), scales, lowest)
