"""Counter-based noise: the entries of a direction as pure functions of its key.

A key names a stream of random words: block i of Threefry-2x32 with the counter (0, i) gives words 2 i and 2 i + 1, so
any part of the stream can be drawn alone, in any order, on any device, and is always the same. A leaf of shape
[..., B] is a table of rows, each of which owns some consecutive words of the stream: one word for 32 signs, or two
that are the key of the row's own stream of normal numbers. Threefry: Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011.

R stands for the shape of a table of rows, of any rank.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_CHUNK_BLOCKS = 2**16


def _threefry2x32(
    k0: jax.Array, k1: jax.Array, x0: jax.Array, x1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds, written out so that XLA fuses it into the consumer of its words."""
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << jnp.uint32(r)) | (x1 >> jnp.uint32(32 - r)))
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


def stream(key: jax.Array, size: int, first: int = 0) -> jax.Array:
    """Consecutive words of a key's stream, uint32 [size].

    Args:
      key: uint32 [2].
      size: number of words.
      first: index of the first word, even.
    """
    num_blocks = -(-size // 2)
    # In a loop of at least two steps: XLA would fuse words drawn outside one into each of their uses and
    # draw them 32 times over for their 32 signs. Chunks stay in cache.
    num_chunks = max(2, -(-num_blocks // _CHUNK_BLOCKS))
    chunk = max(1, -(-num_blocks // num_chunks))
    offsets = jnp.arange(chunk, dtype=jnp.uint32)
    zeros = jnp.zeros_like(offsets)

    def draw(start):
        return jnp.stack(_threefry2x32(key[0], key[1], zeros, start + offsets), axis=-1)

    starts = jnp.arange(num_chunks, dtype=jnp.uint32) * jnp.uint32(chunk) + jnp.uint32(first // 2)
    return lax.map(draw, starts).reshape(-1)[:size]


def sign_words_per_row(width: int) -> int:
    """Words that a row of `width` signs owns."""
    return -(-width // 32)


# Words that a row of normal numbers owns.
NORMAL_WORDS_PER_ROW = 2


def sign_bits(words: jax.Array, width: int) -> jax.Array:
    """Independent fair bits, uint32 [R, width] of zeros and ones, from words [R, sign_words_per_row(width)]."""
    bits = (words[..., None] >> _iota(32, words.ndim + 1)) & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], words.shape[-1] * 32)[..., :width]


def signs(words: jax.Array, width: int) -> jax.Array:
    """Independent Rademacher numbers, float32 [R, width]; arguments as of `sign_bits`."""
    return with_signs(jnp.float32(1), sign_bits(words, width))


@jax.custom_jvp
def with_signs(x: jax.Array, bits: jax.Array) -> jax.Array:
    """`x` (float32 scalar) times the sign that each bit names: one exclusive-or an entry."""
    x_bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(x_bits ^ (bits << jnp.uint32(31)), jnp.float32)


@with_signs.defjvp
def _with_signs_jvp(primals, tangents):
    # Linear in x, which the bit arithmetic hides from JAX.
    (x, bits), (dx, _) = primals, tangents
    return with_signs(x, bits), with_signs(dx, bits)


def normals(words: jax.Array, width: int) -> jax.Array:
    """Independent standard normal numbers, float32 [R, width], from the keys of the rows, uint32 [R, 2].

    The inverse of the normal distribution function at the midpoints of 2²³ equal intervals, one random word each:
    the largest magnitude is 5.4.
    """
    half = -(-width // 2)
    shape = (*words.shape[:-1], width)
    column = _iota(width, len(shape))
    in_first = column < half
    # Both words of a block are computed for both of the entries that use one: twice the integer work, but all
    # of it fused into one pass, several times faster than drawing words into memory.
    word0, word1 = _threefry2x32(
        jnp.broadcast_to(words[..., :1], shape),
        jnp.broadcast_to(words[..., 1:], shape),
        jnp.zeros(shape, jnp.uint32),
        jnp.broadcast_to(jnp.where(in_first, column, column - jnp.uint32(half)), shape),
    )
    word = jnp.where(jnp.broadcast_to(in_first, shape), word0, word1)
    # 23 bits k give (2 k + 1 - 2²³) / 2²³: odd multiples, exact in float32, never -1, 0 or 1.
    odd = ((word >> jnp.uint32(9)).astype(jnp.int32) * 2 + (1 - 2**23)).astype(jnp.float32)
    return math.sqrt(2) * lax.erf_inv(odd * jnp.float32(2**-23))


def _iota(size: int, ndim: int) -> jax.Array:
    """0 .. size - 1 along the last of `ndim` axes, uint32."""
    return jnp.arange(size, dtype=jnp.uint32).reshape((1,) * (ndim - 1) + (size,))
