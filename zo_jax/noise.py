"""Counter-based noise: the entries of a direction as pure functions of (key, row, column).

A leaf of shape [..., B] is a table of rows of B numbers. Row r takes its random words from Threefry-2x32 blocks
with the counter (r, j), j = 0, 1, ..., so any set of rows can be drawn alone, in any order, on any device, and
always has the same entries. Threefry: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

R stands for the shape of `rows`, of any rank.
"""

import math

import jax
from jax.extend.random import threefry2x32_p
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry2x32(key: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds, written out so that XLA fuses it into the consumer of its words."""
    k0, k1 = key[0], key[1]
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << jnp.uint32(r)) | (x1 >> jnp.uint32(32 - r)))
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


def sign_bits(key: jax.Array, rows: jax.Array, width: int) -> jax.Array:
    """Independent fair bits, 32 from each random word.

    Args:
      key: uint32 [2], the Threefry key of a leaf.
      rows: uint32 [R], indices of the rows to draw.
      width: entries of a row.

    Returns:
      uint32 [R, width] of zeros and ones.
    """
    num_words = -(-width // 32)
    shape = (*rows.shape, -(-num_words // 2))
    # The primitive rather than _threefry2x32: XLA would fuse the latter into the expansion below and compute
    # every word 32 times. Words cost 1/32 of the leaf.
    blocks = threefry2x32_p.bind(
        jnp.broadcast_to(key[0], shape),
        jnp.broadcast_to(key[1], shape),
        jnp.broadcast_to(rows[..., None], shape),
        jnp.broadcast_to(_iota(shape[-1], rows.ndim + 1), shape),
    )
    words = jnp.concatenate(blocks, axis=-1)[..., :num_words]
    bits = (words[..., None] >> _iota(32, rows.ndim + 2)) & jnp.uint32(1)
    return bits.reshape(*rows.shape, num_words * 32)[..., :width]


def signs(key: jax.Array, rows: jax.Array, width: int) -> jax.Array:
    """Independent Rademacher numbers, float32 [R, width]; arguments as of `sign_bits`."""
    return with_signs(jnp.float32(1), sign_bits(key, rows, width))


@jax.custom_jvp
def with_signs(x: jax.Array, bits: jax.Array) -> jax.Array:
    """`x` (float32 scalar) times the sign that each bit names: one exclusive-or an entry."""
    x_bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x_bits ^ (bits << jnp.uint32(31)), jnp.float32)


@with_signs.defjvp
def _with_signs_jvp(primals, tangents):
    # Linear in x, which the bit arithmetic hides from JAX.
    (x, bits), (dx, _) = primals, tangents
    return with_signs(x, bits), with_signs(dx, bits)


def normals(key: jax.Array, rows: jax.Array, width: int) -> jax.Array:
    """Independent standard normal numbers, float32 [R, width]; arguments as of `sign_bits`.

    The inverse of the normal distribution function at the midpoints of 2²³ equal intervals, one random word each:
    the largest magnitude is 5.4.
    """
    half = -(-width // 2)
    shape = (*rows.shape, width)
    column = _iota(width, rows.ndim + 1)
    in_first = column < half
    # Both words of a block are computed for both of the entries that use one: twice the integer work, but all
    # of it fused into one pass, several times faster than drawing words into memory.
    word0, word1 = _threefry2x32(
        key,
        jnp.broadcast_to(rows[..., None], shape),
        jnp.broadcast_to(jnp.where(in_first, column, column - jnp.uint32(half)), shape),
    )
    word = jnp.where(jnp.broadcast_to(in_first, shape), word0, word1)
    # 23 bits k give (2 k + 1 - 2²³) / 2²³: odd multiples, exact in float32, never -1, 0 or 1.
    odd = ((word >> jnp.uint32(9)).astype(jnp.int32) * 2 + (1 - 2**23)).astype(jnp.float32)
    return math.sqrt(2) * jax.lax.erf_inv(odd * jnp.float32(2**-23))


def _iota(size: int, ndim: int) -> jax.Array:
    """0 .. size - 1 along the last of `ndim` axes, uint32."""
    return jnp.arange(size, dtype=jnp.uint32).reshape((1,) * (ndim - 1) + (size,))
