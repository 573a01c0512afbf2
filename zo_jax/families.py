"""Families of random directions: signs, normals, the sphere, low rank. Each has E[z zᵀ] = I."""

from collections.abc import Callable
import dataclasses
import functools
import math
import operator
from typing import Any, ClassVar

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax import noise
from zo_jax.family import Family
from zo_jax.layout import Layout
from zo_jax.noise import key_words
from zo_jax.perturbed import Dense, LowRank, outer
from zo_jax.spans import Entries, cut
from zo_jax.trees import matrices, path_name
from zo_jax.word_family import UNROLLED, WordFamily

# Normal numbers that stay in cache while their norm is taken.
_IN_CACHE = 2**18


class Signs(Entries):
    """Independent fair signs, a bit an entry."""

    def words_shape(self, leaf):
        return (*leaf.shape[:-1], noise.sign_words_per_row(_width(leaf)))

    def move(self, leaf, words, scale):
        return _dense(leaf, words, scale, "rademacher")

    def total(self, leaf, words_n, weights_n):
        return _sum_of_signs(words_n, _width(leaf), weights_n)

    def prepare(self, leaves, starts, words_n, weights_n):
        # One sum for all: a program that sums the signs of one leaf is long, and finds its words by
        # arithmetic that takes longer than the sum.
        total = _sum_of_signs(words_n, 32 * words_n.shape[-1], weights_n)
        placed = zip(leaves, starts, strict=True)
        return [cut(total, start, self.words_shape(leaf), 32) for leaf, start in placed]

    def total_of(self, leaf, prepared, weights_n):
        del weights_n
        return prepared[..., : _width(leaf)]

    def gram(self, leaf, words_n):
        return noise.agreements(words_n, _width(leaf))


class Normals(Entries):
    """Independent standard normal numbers, two words a row."""

    def words_shape(self, leaf):
        return (*leaf.shape[:-1], noise.NORMAL_WORDS_PER_ROW)

    def move(self, leaf, words, scale):
        return _dense(leaf, words, scale, "gaussian")

    def total(self, leaf, words_n, weights_n):
        z = (w * noise.normals(x, _width(leaf)) for w, x in zip(weights_n, words_n, strict=True))
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

    def words_shape(self, leaf):
        *stack, a, b = leaf.shape
        return (*stack, noise.sign_words_per_row((a + b) * self.rank))

    def move(self, leaf, words, scale):
        u, v = self._factors(leaf, words)
        return LowRank(leaf, u, v, scale / math.sqrt(self.rank), leaf.dtype)

    def total(self, leaf, words_n, weights_n):
        u, v = self._factors(leaf, words_n)
        return self._sum(leaf, u, v, weights_n)

    def prepare(self, leaves, starts, words_n, weights_n):
        # A product would draw the signs of both factors for each of its entries.
        placed = list(zip(leaves, starts, strict=True))

        def make():
            signs_n = noise.signs(words_n, 32 * words_n.shape[-1])
            of_leaf = lambda leaf, start: cut(signs_n, start, self.words_shape(leaf), 32)
            return [of_leaf(leaf, start) for leaf, start in placed]

        return noise.made_once(make, jnp.any(weights_n != 0))

    def total_of(self, leaf, prepared, weights_n):
        u, v = self._split(leaf, prepared)
        return self._sum(leaf, u, v, weights_n)

    def _sum(self, leaf, u, v, weights_n):
        u = u * (weights_n / math.sqrt(self.rank)).reshape(-1, *(1,) * leaf.ndim)
        # All directions side by side: one matrix product [..., A, n r] @ [..., n r, B].
        side_by_side = lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)
        return outer(self._everywhere(side_by_side(u)), self._everywhere(side_by_side(v)))

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


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class _Rademacher(WordFamily):
    """Independent signs."""

    def entries(self, params):
        return [Signs()] * len(jax.tree.leaves(params))


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class _Gaussian(WordFamily):
    """Independent normal entries."""

    # Each is a long program: written out for several they would take long to compile.
    _directions_at_once: ClassVar[int] = 1

    def entries(self, params):
        return [Normals()] * len(jax.tree.leaves(params))


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class _Sphere(_Gaussian):
    """Uniform on the sphere of radius √d: a Gaussian direction over its norm."""

    def _factor(self, params, words):
        leaves = jax.tree.leaves(params)
        floating = [(x, w) for x, w in zip(leaves, words, strict=True) if w is not None]
        at_once = _IN_CACHE if self.layout is None else math.inf
        squares = [_sum_of_squares(w, _width(leaf), at_once) for leaf, w in floating]
        return jnp.sqrt(sum(leaf.size for leaf, _ in floating) / sum(squares))

    def _factors(self, params, keys):
        return lax.map(lambda key_2: self.draw(params, key_2).factor, key_words(keys))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[], meta_fields=["rank", "is_matrix", "layout"]
)
@dataclasses.dataclass(frozen=True)
class _LowRank(WordFamily):
    """Matrices get u vᵀ / √r; other leaves independent signs."""

    rank: int
    is_matrix: Callable[[str, Any], bool] | None = None

    # The sum is one matrix product over the directions, whose factors exist together.
    _directions_at_once: ClassVar[int] = 16

    def entries(self, params):
        factors, signs = Factors(self.rank, self.layout), Signs()
        return [
            factors if is_matrix and self._is_worth_it(leaf) else signs
            for leaf, is_matrix in zip(jax.tree.leaves(params), self._matrices(params), strict=True)
        ]

    def _matrices(self, params) -> list[bool]:
        if self.is_matrix is None:
            return jax.tree.leaves(matrices(params))
        of_leaf = jax.tree.leaves_with_path(params)
        return [x.ndim >= 2 and bool(self.is_matrix(path_name(path), x)) for path, x in of_leaf]

    def _is_worth_it(self, leaf) -> bool:
        return self.rank * sum(leaf.shape[-2:]) < math.prod(leaf.shape[-2:])


def rademacher() -> Family:
    """Independent fair signs ±1: the cheapest, and ‖z‖ = √d exactly.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> z = zo_jax.rademacher().direction(jnp.zeros((2, 3)), jax.random.key(0))
    >>> z.shape, bool(jnp.all(jnp.abs(z) == 1))
    ((2, 3), True)
    """
    return _Rademacher()


def gaussian() -> Family:
    """Independent standard normal entries (Nesterov and Spokoiny, 2017).

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> z = zo_jax.gaussian().direction(jnp.zeros((1000,)), jax.random.key(0))
    >>> bool(abs(jnp.std(z) - 1) < 0.1)
    True
    """
    return _Gaussian()


def sphere() -> Family:
    """Uniform on the sphere of radius √d over all leaves; costs one more draw of every entry.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> z = zo_jax.sphere().direction(jnp.zeros((4, 4)), jax.random.key(0))
    >>> round(float(jnp.linalg.norm(z)), 3)
    4.0
    """
    return _Sphere()


def low_rank(rank: int = 1, is_matrix: Callable[[str, Any], bool] | None = None) -> Family:
    """u vᵀ / √rank with factors of independent signs, unit variance per entry, never formed in
    matrix products.

    Every matrix of a leaf [..., A, B] gets its own factors; vectors, and matrices for which rank ·
    (A + B) ≥ A · B, get dense signs. After Sarkar et al., "Evolution strategies at the hyperscale",
    2025 (EGGROLL), which uses Gaussian factors; with signs, ‖z‖² = d for rank 1, so the estimate's
    variance is that of dense signs.

    Args:
      rank: of the directions of a matrix.
      is_matrix: `is_matrix(path, leaf)` says whether a leaf of two or more axes, at a path like
        "blocks/fc/kernel", is a matrix or a stack of them; default by shape
        (`zo_jax.trees.matrices`): yes, unless it is [L, B] in a subtree of which all leaves are
        stacks of L.

    Raises:
      ValueError: `rank` is not a positive integer.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> z = zo_jax.low_rank(1).direction(jnp.zeros((8, 8)), jax.random.key(0))
    >>> int(jnp.linalg.matrix_rank(z))
    1
    """
    if isinstance(rank, bool) or not hasattr(rank, "__index__") or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    return _LowRank(rank=int(rank), is_matrix=is_matrix)


# The names of families that take no arguments.
_BY_NAME = {"rademacher": rademacher, "gaussian": gaussian, "sphere": sphere}
NAMES = (*_BY_NAME, "low_rank")


def by_name(name: str, rank: int = 1) -> Family:
    """The family of a name: "rademacher", "gaussian", "sphere", or "low_rank" of a rank.

    Raises:
      ValueError: there is none of that name.

    >>> import zo_jax
    >>> zo_jax.by_name("low_rank", rank=2) == zo_jax.low_rank(2)
    True
    """
    if name == "low_rank":
        return low_rank(rank)
    if name not in _BY_NAME:
        raise ValueError(
            f"perturbation must be a Family or one of {', '.join(NAMES)}; got {name!r}"
        )
    return _BY_NAME[name]()


def apply_directions(
    params: Any, keys: jax.Array, weights: jax.Array, perturbation: Family | str = "rademacher"
) -> Any:
    """params + Σᵢ weightsᵢ zᵢ, leaf by leaf: the whole SGD update without a gradient buffer.

    Args:
      params: pytree of arrays.
      keys: [q] typed PRNG keys, as of `jax.random.split(key, q)`.
      weights: float32 [q]; for SGD, -learning_rate · projections / q.
      perturbation: the family of directions, or its name.

    Returns:
      Like `params`; sums in float32, rounded once.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> zo_jax.apply_directions(jnp.zeros(3), keys, jnp.zeros(2)).tolist()
    [0.0, 0.0, 0.0]
    """
    family = perturbation if isinstance(perturbation, Family) else by_name(perturbation)
    return family.add(params, keys, weights)


def _width(leaf: Any) -> int:
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


def _sum_of_squares(words: jax.Array, width: int, at_once: float) -> jax.Array:
    """Of the normal numbers of a leaf; of a large one `at_once` entries at a time, whole rows."""
    of_rows = lambda words: jnp.sum(noise.normals(words, width) ** 2)
    if words.size // words.shape[-1] * width <= 4 * at_once:
        return of_rows(words)
    rows = words.reshape(-1, words.shape[-1])
    at_once = max(1, int(at_once) // width)
    return jnp.sum(lax.map(of_rows, rows, batch_size=at_once))
