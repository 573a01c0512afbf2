"""A number for the bits of a pytree: what says whether a checkpoint, or a replay, is the run's to
the bit.

Checkpoints need it because tensorstore reads a flipped bit of an array without a word.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

_GOLDEN = (
    0x9E3779B9  # 2³² over the golden ratio: Weyl's sequence, which spreads positions over all words
)


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """The sum modulo 2³² of a hash of every entry's bits and its position.

    Every change of a single entry is noticed, for the hash is one to one; any other with a chance
    of 1 - 2⁻³². It is a sum of integers, so the same on every mesh, and its shards are added where
    they are. No defence against somebody who means to deceive.

    Args:
      tree: pytree of arrays or typed PRNG keys, of any dtype.

    Returns:
      uint32 scalar.

    >>> import jax.numpy as jnp
    >>> a = fingerprint({"w": jnp.zeros(3), "b": jnp.ones(2)})
    >>> int(a) == int(fingerprint({"w": jnp.zeros(3), "b": jnp.ones(2).at[1].set(1 + 1e-7)}))
    False
    """
    leaves = jax.tree.leaves(tree)
    sums = [_of_leaf(leaf, (i + 1) * 0x85EBCA6B % 2**32) for i, leaf in enumerate(leaves)]
    return sum(sums, jnp.zeros((), jnp.uint32))


@jax.jit
def likeness(tree: Any) -> jax.Array:
    """A number that last bits hardly change and other draws of the same arrays do: Σ x cos(i) over
    all entries.

    Args:
      tree: pytree of arrays; those that are not floating, and entries that are not finite, count
        nothing.

    Returns:
      float32 scalar.

    >>> import jax.numpy as jnp
    >>> w = jnp.linspace(-1, 1, 100)
    >>> bool(abs(likeness(w) - likeness(w * (1 + 1e-6))) < 1e-5), bool(abs(likeness(w) - likeness(w[::-1])) > 0.1)
    (True, True)
    """  # noqa: E501
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            position = jnp.zeros(leaf.shape, jnp.float32)
            for axis in range(leaf.ndim):
                index = lax.broadcasted_iota(jnp.float32, leaf.shape, axis)
                position += index * (axis + 1)
            finite = jnp.where(jnp.isfinite(leaf), leaf, 0).astype(jnp.float32)
            total += jnp.sum(finite * jnp.cos(position))
    return total


def _of_leaf(leaf: Any, salt: int) -> jax.Array:
    words = _words(jnp.asarray(leaf))
    position = jnp.full(words.shape, salt, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        step = np.uint32(stride * _GOLDEN % 2**32)
        position += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * step
        stride *= words.shape[axis]
    return jnp.sum(_mix(words + _mix(position)), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32, with one more axis for wide dtypes."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = x.dtype.itemsize
    if width < 4:
        return lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[width]).astype(jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (Appleby, 2011): one to one, and every bit depends on every
    other.
    """
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
