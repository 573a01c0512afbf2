"""Counter-based noise: the entries of a direction as pure functions of its key.

A key names a stream of random words: block i of Threefry-2x32 with the counter (0, i) gives words 2
i and 2 i + 1, so any part of the stream can be drawn alone, in any order, on any device, and is
always the same. A leaf of shape [..., B] is a table of rows, each of which owns some consecutive
words of the stream: one word for 32 signs, or two that are the key of the row's own stream of
normal numbers. Threefry: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

R stands for the shape of a table of rows, of any rank.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
# Polynomials of the inverse error function: Giles' table for single precision.
_CENTRAL = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_TAIL = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)


def _mix(x0: jax.Array, x1: jax.Array, rotations: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Four rounds of Threefry-2x32."""
    for r in rotations:
        x0 = x0 + x1
        x1 = x0 ^ ((x1 << jnp.uint32(r)) | (x1 >> jnp.uint32(32 - r)))
    return x0, x1


def _threefry2x32(
    k0: jax.Array, k1: jax.Array, x0: jax.Array, x1: jax.Array, num_rounds: int = 20
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32, written out so that XLA fuses it into the consumer of its words."""
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY))
    x0, x1 = x0 + k0, x1 + k1
    for i in range(-(-num_rounds // 4)):
        rotations = _ROTATIONS[i % 2][: num_rounds - 4 * i]
        x0, x1 = _mix(x0, x1, rotations)
        if len(rotations) == 4:
            x0 = x0 + schedule[(i + 1) % 3]
            x1 = x1 + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


def key_words(key: jax.Array) -> jax.Array:
    """The two uint32 words of typed or raw Threefry keys, [..., 2]."""
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def own_words(words: jax.Array) -> jax.Array:
    """A copy of a key's words for a state that may be donated: the key is the caller's, and perhaps
    in another state too.
    """
    return jnp.array(words, copy=True)


def stream(key: jax.Array, size: int, first: int = 0, block: Any = None) -> jax.Array:
    """Consecutive words of a key's stream, uint32 [size].

    Args:
      key: uint32 [2].
      size: number of words.
      first: index of the first word.
      block: uint32 scalar, first // 2, where XLA is not to know it; see `opaque`.
    """
    before = first % 2  # words of the first block that come before it
    count = -(-(before + size) // 2)
    index = jnp.arange(count, dtype=jnp.uint32) + (
        jnp.uint32(first // 2) if block is None else block
    )
    return jnp.stack(_blocks(key, index), axis=-1).reshape(-1)[before : before + size]


def made_once(make: Callable[[], Any], is_wanted: jax.Array) -> Any:
    """What `make` gives, arrays, made before they are used; or zeros.

    XLA for CPUs would make them anew for every entry that needs them, and a branch is a border that
    it does not fuse across. XLA for GPUs fuses well, and would wait for the condition.
    """
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make))
    return lax.platform_dependent(cpu=lambda: lax.cond(is_wanted, make, zeros), default=make)


# Compiled once a shape when called eagerly too.
@jax.jit
def signs_once(words: jax.Array) -> jax.Array:
    """`signs` of words [S], float32 [32 S], made before they are used: what uses each of them many
    times, such as a bias for every token, then reads a number, and is a shorter program.
    """
    # True, which XLA cannot know.
    return made_once(lambda: signs(words, 32 * words.shape[-1]), opaque([1])[0] == 1)


def opaque(numbers: Sequence[int]) -> list[jax.Array]:
    """The numbers modulo 2³², uint32 scalars, as XLA does not know them.

    Programs that differ in such a number alone are one, which XLA compiles once.
    """
    before = [jnp.uint32((n - 1) % 2**32) for n in numbers]
    return lax.fori_loop(np.uint32(0), np.uint32(2), _count, before)


def _count(turn: jax.Array, xs: list[jax.Array]) -> list[jax.Array]:
    return [x + turn for x in xs]


def table(
    key: jax.Array,
    shape: tuple[int, ...],
    first: int,
    place: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The same words as `stream(key, prod(shape), first)`, uint32 [..., W], each drawn where its
    row lives.

    Args:
      key: uint32 [2].
      first: index of the first word.
      shape: of the table, W last.
      place: puts an array [..., W] or [..., W / 2] on the devices that are to hold it.
    """
    *rows, width = shape
    # Words of a block that stand side by side in every row.
    step = 2 if width % 2 == 0 and first % 2 == 0 else 1
    index = place(positions((*rows, width // step)) + jnp.uint32(first // step))
    if step == 2:
        both = [place(x) for x in _blocks(key, index)]
        return place(jnp.stack(both, axis=-1).reshape(shape))
    x0, x1 = _blocks(key, index >> 1)
    return place(jnp.where(index & 1, x1, x0))


def _eight_rounds(i: jax.Array, state: Any) -> Any:
    """Of Threefry, a turn of the loop that makes words.

    XLA would fuse words that come out of no loop into each of their uses, and draw them 32 times
    over for their 32 signs; JAX's own primitive loops over four rounds, and takes twice as long. A
    function of the module: drawn eagerly, a loop over one that is new each time is traced each
    time.
    """
    x0, x1, (a, b, c) = state
    count = jnp.uint32(2) * i.astype(jnp.uint32) + jnp.uint32(1)
    x0, x1 = _mix(x0 + a, x1 + b + count, _ROTATIONS[1])
    x0, x1 = _mix(x0 + b, x1 + c + count + jnp.uint32(1), _ROTATIONS[0])
    return x0, x1, (c, a, b)


def _blocks(key: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two words of each block of a key's stream: `_threefry2x32` of the counter (0, index)."""
    k0, k1 = key[0], key[1]
    x0, x1 = _mix(jnp.broadcast_to(k0, index.shape), index + k1, _ROTATIONS[0])

    schedule = (k1, k0 ^ k1 ^ jnp.uint32(_PARITY), k0)
    x0, x1, (a, b, _) = lax.fori_loop(0, 2, _eight_rounds, (x0, x1, schedule))
    return x0 + a, x1 + b + jnp.uint32(5)


def sign_words_per_row(width: int) -> int:
    """Words that a row of `width` signs owns."""
    return -(-width // 32)


# Words that a row of normal numbers owns.
NORMAL_WORDS_PER_ROW = 2


def sign_bits(words: jax.Array, width: int) -> jax.Array:
    """Independent fair signs, uint32 [R, width] of 0 and 2³¹, from words [R,
    sign_words_per_row(width)].
    """
    # Shifted down and up: with one shift and a mask of the highest bit a loss takes a fifth longer.
    bits = ((words[..., None] >> _iota(32, words.ndim + 1)) & jnp.uint32(1)) << jnp.uint32(31)
    return bits.reshape(*words.shape[:-1], words.shape[-1] * 32)[..., :width]


def signs(words: jax.Array, width: int) -> jax.Array:
    """Independent Rademacher numbers, float32 [R, width]; arguments as of `sign_bits`."""
    return with_signs(jnp.float32(1), sign_bits(words, width))


def agreements(words_n: jax.Array, width: int) -> jax.Array:
    """⟨zᵢ, zⱼ⟩ of n tables of signs, float32 [n, n], from their words [n, R, W]: entries that agree
    less those that do not.
    """
    n, num_words = len(words_n), words_n.shape[-1]
    # The bits past the end of a row are no signs.
    last = (1 << (width - 32 * (num_words - 1))) - 1
    mask = jnp.full(num_words, 0xFFFFFFFF, jnp.uint32).at[-1].set(last)
    num_entries = words_n[0].size // num_words * width

    def differences(pair):
        i, j = pair
        differ = lax.population_count((words_n[i] ^ words_n[j]) & _along_last(mask, words_n[0]))
        return jnp.sum(jnp.sum(differ, axis=-1).astype(jnp.float32))

    # One pair after the other: XLA would keep the counts of all pairs at once.
    i, j = jnp.triu_indices(n, 1)
    gram = jnp.full((n, n), num_entries, jnp.float32)
    if n == 1:
        return gram
    inner = num_entries - 2 * lax.map(differences, (i, j))
    return gram.at[i, j].set(inner).at[j, i].set(inner)


def rounding_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A random word an entry, uint32 of a shape, from a key [2]: fused into its use, and the same
    on every mesh.
    """
    k0, k1 = jnp.full(shape, key[0]), jnp.full(shape, key[1])
    zeros = jnp.zeros(shape, jnp.uint32)
    return _threefry2x32(k0, k1, zeros, positions(shape), num_rounds=13)[0]


def positions(shape: tuple[int, ...]) -> jax.Array:
    """The index of each entry in all of them, modulo 2³², uint32 of a shape: made where the entries
    live.
    """
    total, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        total += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return total


def _along_last(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.reshape((1,) * (like.ndim - 1) + x.shape)


@jax.custom_jvp
def with_signs(x: jax.Array, bits: jax.Array) -> jax.Array:
    """`x` (float32 scalar) times the signs that `sign_bits` gives: one exclusive-or an entry."""
    x_bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(x_bits ^ bits, jnp.float32)


@with_signs.defjvp
def _with_signs_jvp(primals, tangents):
    # Linear in x, which the bit arithmetic hides from JAX; a product with the signs can be
    # transposed.
    (x, bits), (dx, _) = primals, tangents
    return with_signs(x, bits), dx * with_signs(jnp.float32(1), bits)


def add_signs(base: jax.Array, x: jax.Array, words: jax.Array) -> jax.Array:
    """`base` [R, B] plus `x` (float32 scalar) times the signs of `words`, in one pass over memory:
    with x times the signs first, XLA for CPUs writes them down and reads them again for a product.
    """
    # Signs that know of x are drawn anew in a loop over values of x, where a table of the words
    # of all entries would have been kept for it.
    words, x = lax.optimization_barrier((words, x))
    return jnp.where(sign_bits(words, base.shape[-1]) != 0, base - x, base + x)


# Compiled as a whole when called eagerly too, so that the rounding is the same.
@functools.partial(jax.jit, static_argnums=1)
def normals(words: jax.Array, width: int) -> jax.Array:
    """Independent standard normal numbers, float32 [R, width], from the keys of the rows, uint32
    [R, 2].

    The inverse of the normal distribution function at the midpoints of 2²³ equal intervals, one
    random word each: the largest magnitude is 5.4. Every entry has a word of its own, so the words
    are of Threefry with 13 rounds, the fewest that pass BigCrush (Salmon et al., table 2).
    """
    half = -(-width // 2)
    shape = (*words.shape[:-1], width)
    column = _iota(width, len(shape))
    in_first = column < half
    # Both words of a block are computed for both of the entries that use one: twice the integer
    # work, but all of it fused into one pass, several times faster than drawing words into memory.
    along_row = lambda x: lax.broadcast_in_dim(x, shape, tuple(range(len(shape) - 1)))
    word0, word1 = _threefry2x32(
        along_row(words[..., 0]),
        along_row(words[..., 1]),
        jnp.zeros(shape, jnp.uint32),
        jnp.broadcast_to(jnp.where(in_first, column, column - jnp.uint32(half)), shape),
        num_rounds=13,
    )
    word = jnp.where(jnp.broadcast_to(in_first, shape), word0, word1)
    # 23 bits k give (2 k + 1 - 2²³) / 2²³: odd multiples, exact in float32, never -1, 0 or 1.
    odd = ((word >> jnp.uint32(9)).astype(jnp.int32) * 2 + (1 - 2**23)).astype(jnp.float32)
    return math.sqrt(2) * _erf_inv(odd * jnp.float32(2**-23))


def _erf_inv(x: jax.Array) -> jax.Array:
    """The inverse error function, float32, to a relative error of 3e-7 (Giles, "Approximating the
    erfinv function", 2010).

    Twice as fast as XLA's, which takes the logarithm so that it is exact for any x near 0 too.
    """
    w = -jnp.log((1 - x) * (1 + x))
    return x * jnp.where(w < 5, _horner(_CENTRAL, w - 2.5), _horner(_TAIL, jnp.sqrt(w) - 3))


def _horner(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    """The polynomial with these coefficients, the highest power's first."""
    total = jnp.float32(coefficients[0])
    for c in coefficients[1:]:
        total = total * x + jnp.float32(c)
    return total


def _iota(size: int, ndim: int) -> jax.Array:
    """0 .. size - 1 along the last of `ndim` axes, uint32."""
    return jnp.arange(size, dtype=jnp.uint32).reshape((1,) * (ndim - 1) + (size,))
