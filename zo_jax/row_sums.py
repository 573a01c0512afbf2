"""Sums of directions over a large array, made block by block of its rows: neither the random words
of the array nor the sum need exist whole.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Entries of a block: it and the words of its directions stay in cache.
_BLOCK_ENTRIES = 2**18


@dataclasses.dataclass(frozen=True, eq=False)
class RowSum:
    """Σᵢ weightsᵢ zᵢ in an array [..., B] of R rows of B entries.

    Attributes:
      shape: of the array.
      dtype: of the sum as a gradient.
      add: (part, first row) -> part + the sum in these rows, of a part float32 [n, B]; the first
        row and n are even, but for the last rows.
    """

    shape: tuple[int, ...]
    dtype: Any
    add: Callable[[jax.Array, Any], jax.Array]

    def block(self, first: Any, num_rows: int) -> jax.Array:
        """The sum in some rows, [num_rows, B]."""
        zeros = jnp.zeros((num_rows, self.shape[-1]), jnp.promote_types(self.dtype, jnp.float32))
        return self.add(zeros, first).astype(self.dtype)

    def added_to(self, x: jax.Array, is_wanted: Any) -> jax.Array:
        """x plus the sum, rounded once to the dtype of x; or x."""

        def add(parts: list[jax.Array], first: Any) -> tuple[list[jax.Array], Any]:
            (part,) = parts
            wide = part.astype(jnp.promote_types(part.dtype, jnp.float32))
            return [self.add(wide, first).astype(part.dtype)], 0

        return map_rows(add, [x], is_wanted)[0][0]


def map_rows(
    function: Callable[[list[jax.Array], Any], tuple[list[jax.Array], Any]],
    arrays: Sequence[jax.Array],
    is_wanted: Any,
) -> tuple[list[jax.Array], jax.Array]:
    """`function` of arrays [..., B] of one shape, block by block of rows, in their place; and the
    sum of a number of each block, float32.

    XLA would fuse the function with the write of its result, and not vectorise it then (26 times as
    slow): a branch is a border that it does not fuse across.

    Args:
      function: (parts [n, B] of the arrays, first row) -> (new parts, number).
      arrays: what is changed.
      is_wanted: bool; without it the arrays stay as they are, and the number is 0.
    """
    shape = arrays[0].shape
    num_rows = math.prod(shape[:-1])

    def step(first: Any, count: int, carry: Any) -> Any:
        arrays, total = carry
        cut = lambda arrays: [lax.dynamic_slice_in_dim(x, first, count) for x in arrays]

        def changed(arrays):
            parts, number = function(list(map(_of_bits, cut(arrays), dtypes)), first)
            return list(map(_bits, parts)), jnp.float32(number)

        def same(arrays):
            return cut(arrays), jnp.float32(0)

        parts, number = lax.cond(is_wanted, changed, same, arrays)
        put = lambda x, part: lax.dynamic_update_slice_in_dim(x, part, first, 0)
        return list(map(put, arrays, parts)), total + number

    dtypes = [x.dtype for x in arrays]
    flat = [_bits(x).reshape(num_rows, shape[-1]) for x in arrays]
    flat, total = over_blocks(num_rows, shape[-1], step, (flat, jnp.float32(0)))
    return [_of_bits(x.reshape(shape), dtype) for x, dtype in zip(flat, dtypes, strict=True)], total


def _bits(x: jax.Array) -> jax.Array:
    """On CPUs bfloat16 as its bits: XLA has no write of it there, and would convert the whole array
    to float32 and back for every block. The bits are a copy, which an evaluation in bfloat16, whose
    weights XLA converts as well, has room for.
    """
    if x.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        return x
    return lax.bitcast_convert_type(x, jnp.uint16)


def _of_bits(x: jax.Array, dtype: Any) -> jax.Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def over_blocks(num_rows: int, width: int, step: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """carry = step(first row, number of rows, carry) for each block of rows, one after the
    other.
    """
    size = block_rows(num_rows, width)
    num_whole = num_rows // size
    whole = lambda i, carry: step(i * np.uint32(size), size, carry)
    carry = lax.fori_loop(np.uint32(0), np.uint32(num_whole), whole, carry)
    rest = num_rows - num_whole * size
    return step(np.uint32(num_whole * size), rest, carry) if rest else carry


def block_rows(num_rows: int, width: int) -> int:
    """Rows of a block: even, and such as leave no rest if there are any near."""
    most = max(2, min(num_rows, _BLOCK_ENTRIES // width) // 2 * 2)
    divisors = (n for n in range(most, most // 2, -2) if num_rows % n == 0)
    return next(divisors, most)
