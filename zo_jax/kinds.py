"""The kinds of entries that directions have in a leaf: signs, normal numbers, low-rank factors."""

import dataclasses
import functools
import math
import operator
from typing import Any, ClassVar

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax import noise
from zo_jax.layout import Layout
from zo_jax.perturbed import Dense, LowRank, outer
from zo_jax.spans import Entries, cut
from zo_jax.word_family import UNROLLED

# Entries of a sum of low rank that may exist before it is added: a product needs no program of its
# own, so that models of many layers that are written out compile faster.
_SMALL = 2**18


@dataclasses.dataclass(frozen=True)
class Signs(Entries):
    """Independent fair signs, a bit an entry.

    Attributes:
      has_signs: as of `Entries`.
    """

    has_signs: bool = False

    def words_shape(self, leaf):
        return (*leaf.shape[:-1], noise.sign_words_per_row(width_of(leaf)))

    def move(self, leaf, words, scale):
        if self.has_signs:
            return _dense(leaf, words[..., : width_of(leaf)], scale, "drawn")
        return _dense(leaf, words, scale, "rademacher")

    def total(self, leaf, words_n, weights_n):
        return _sum_of_signs(words_n, width_of(leaf), weights_n)

    def prepare(self, leaves, starts, words_n, weights_n):
        # One sum for all: a program that sums the signs of one leaf is long, and finds its words by
        # arithmetic that takes longer than the sum.
        make = lambda: _sum_of_signs(words_n, 32 * words_n.shape[-1], weights_n)
        total = noise.made_once(make, jnp.any(weights_n != 0)) if self.has_signs else make()
        placed = zip(leaves, starts, strict=True)
        return [cut(total, start, self.words_shape(leaf), 32) for leaf, start in placed]

    def total_of(self, leaf, prepared, weights_n):
        del weights_n
        return prepared[..., : width_of(leaf)]

    def gram(self, leaf, words_n):
        return noise.agreements(words_n, width_of(leaf))


class Normals(Entries):
    """Independent standard normal numbers, two words a row."""

    def words_shape(self, leaf):
        return (*leaf.shape[:-1], noise.NORMAL_WORDS_PER_ROW)

    def move(self, leaf, words, scale):
        return _dense(leaf, words, scale, "gaussian")

    def total(self, leaf, words_n, weights_n):
        z = (w * noise.normals(x, width_of(leaf)) for w, x in zip(weights_n, words_n, strict=True))
        return sum(z)


@dataclasses.dataclass(frozen=True)
class Factors(Entries):
    """u vᵀ / √r for each matrix of a leaf [..., A, B], with u [A, r] and v [B, r] of independent
    signs.

    Attributes:
      rank: r.
      layout: of the parameters.
    """

    rank: int
    layout: Layout | None = None

    # Of the factors there are too few to split.
    follows_leaf: ClassVar[bool] = False
    by_rows: ClassVar[bool] = False
    has_signs: ClassVar[bool] = True  # pyright: ignore

    def words_shape(self, leaf):
        *stack, a, b = leaf.shape
        return (*stack, noise.sign_words_per_row((a + b) * self.rank))

    def move(self, leaf, words, scale):
        u, v = self._split(leaf, words)
        return LowRank(leaf, u, v, scale / math.sqrt(self.rank), leaf.dtype)

    def total(self, leaf, words_n, weights_n):
        return self._sum(leaf, *self._factors(leaf, words_n), weights_n / math.sqrt(self.rank))

    def prepare(self, leaves, starts, words_n, weights_n):
        # A product would draw the signs of both factors for each of its entries.
        make = lambda: (noise.signs(words_n, 32 * words_n.shape[-1]), weights_n)
        signs_n, weights_n = noise.made_once(make, jnp.any(weights_n != 0))
        scales_n = weights_n / math.sqrt(self.rank)
        of_leaf = lambda leaf, start: cut(signs_n, start, self.words_shape(leaf), 32)
        return [(of_leaf(*placed), scales_n) for placed in zip(leaves, starts, strict=True)]

    def total_of(self, leaf, prepared, weights_n):
        signs_n, scales_n = prepared
        return self._sum(leaf, *self._split(leaf, signs_n), scales_n)

    def _sum(self, leaf, u, v, scales_n):
        u = u * scales_n.reshape(-1, *(1,) * leaf.ndim)
        # All directions side by side: one matrix product [..., A, n r] @ [..., n r, B].
        side_by_side = lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)
        u, v = (self._everywhere(side_by_side(x)) for x in (u, v))
        if leaf.size <= _SMALL:
            return jnp.einsum("...ak,...bk->...ab", u, v, precision=lax.Precision.HIGHEST)
        return outer(u, v)

    def gram(self, leaf, words_n):
        # ⟨u uᵀ', v vᵀ'⟩ of every pair of directions and of their ranks, summed over a stack.
        u, v = (x.reshape(len(words_n), -1, *x.shape[-2:]) for x in self._factors(leaf, words_n))
        inner = lambda x: jnp.einsum("isak,jsal->ijskl", x, x)
        return jnp.sum(inner(u) * inner(v), axis=(2, 3, 4)) / self.rank

    def _factors(self, leaf, words):
        return self._split(leaf, noise.signs(words, self.rank * sum(leaf.shape[-2:])))

    def _split(self, leaf, both):
        """u float32 [..., A, r] and v float32 [..., B, r], from one row of signs [(A + B) r]."""
        a, b = leaf.shape[-2:]
        both = both[..., : (a + b) * self.rank]
        both = self._everywhere(both.reshape(*both.shape[:-1], a + b, self.rank))
        return self._everywhere(both[..., :a, :]), self._everywhere(both[..., a:, :])

    def _everywhere(self, x):
        return x if self.layout is None else self.layout.everywhere(x)


def sum_of_squares(words: jax.Array, width: int, at_once: float) -> jax.Array:
    """Of the normal numbers of a leaf; of a large one `at_once` entries at a time, whole rows."""
    of_rows = lambda words: jnp.sum(noise.normals(words, width) ** 2)
    if words.size // words.shape[-1] * width <= 4 * at_once:
        return of_rows(words)
    rows = words.reshape(-1, words.shape[-1])
    at_once = max(1, int(at_once) // width)
    return jnp.sum(lax.map(of_rows, rows, batch_size=at_once))


def width_of(leaf: Any) -> int:
    """Entries of a row; a scalar is a row of one."""
    return leaf.shape[-1] if leaf.ndim else 1


def _sum_of_signs(words_n: jax.Array, width: int, weights_n: jax.Array) -> jax.Array:
    """Σ weights z of signs from words [n, ..., W], float32 [..., width]."""
    z = lambda words: noise.sign_bits(words, width)
    n = len(weights_n)
    if n <= UNROLLED:
        terms = [noise.with_signs(weights_n[i], z(words_n[i])) for i in range(n)]
        return functools.reduce(operator.add, terms)
    add = lambda total, x: (total + noise.with_signs(x[0], z(x[1])), None)
    zero = jnp.zeros((*words_n.shape[1:-1], width), jnp.float32)
    return lax.scan(add, zero, (weights_n, words_n))[0]


def _dense(leaf: jax.Array, words: jax.Array, scale: jax.Array, kind: str) -> Any:
    if leaf.ndim == 0:  # too small for a lazy form
        return Dense(leaf.reshape(1), words, scale, kind, leaf.dtype).form()[0]
    return Dense(leaf, words, scale, kind, leaf.dtype)
