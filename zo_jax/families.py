"""Families of random directions, each with E[z zᵀ] = I, so that E[⟨g, z⟩ z] = g."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax import noise
from zo_jax.family import UNROLLED, Family, is_matrix, width_of
from zo_jax.noise import key_words
from zo_jax.perturbed import Dense, LowRank, outer

# Normal numbers that stay in cache while their norm is taken.
_IN_CACHE = 2**18


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class _Rademacher(Family):
    """Independent signs."""

    def _words_shape(self, path, leaf):
        return _sign_words_shape(leaf)

    def _move_leaf(self, path, leaf, words, scale):
        return _dense(leaf, words, scale, "rademacher")

    def _sum_leaf(self, path, leaf, words_n, weights_n):
        return _sum_signs(leaf, words_n, weights_n)

    def _gram_leaf(self, path, leaf, words_n):
        return noise.agreements(words_n, width_of(leaf))


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class _Gaussian(Family):
    """Independent normal entries."""

    # Each is a long program: written out for several they would take long to compile.
    _queries_at_once: ClassVar[int] = 1

    def _words_shape(self, path, leaf):
        return (*leaf.shape[:-1], noise.NORMAL_WORDS_PER_ROW)

    def _move_leaf(self, path, leaf, words, scale):
        return _dense(leaf, words, scale, "gaussian")

    def _sum_leaf(self, path, leaf, words_n, weights_n):
        return weights_n[0] * noise.normals(words_n[0], width_of(leaf))


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class _Sphere(_Gaussian):
    """Uniform on the sphere of radius √d: a Gaussian direction over its norm."""

    def _factor(self, leaves, words):
        floating = [(leaf, w) for leaf, w in zip(leaves, words, strict=True) if w is not None]
        at_once = _IN_CACHE if self.layout is None else math.inf
        squares = [_sum_of_squares(w, width_of(leaf), at_once) for leaf, w in floating]
        return jnp.sqrt(sum(leaf.size for leaf, _ in floating) / sum(squares))

    def _factors(self, params, keys):
        return lax.map(lambda key_2: self.draw(params, key_2).factor, key_words(keys))


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["rank", "layout"])
@dataclasses.dataclass(frozen=True)
class _LowRank(Family):
    """Matrices get u vᵀ / √r; other leaves independent signs."""

    rank: int

    # The sum is one matrix product over the directions.
    _queries_at_once: ClassVar[int] = 64

    def _words_shape(self, path, leaf):
        if not self._is_matrix(path, leaf):
            return _sign_words_shape(leaf)
        *stack, a, b = leaf.shape
        return (*stack, noise.sign_words_per_row((a + b) * self.rank))

    def _words_place(self, path, leaf, words_shape):
        if self._is_matrix(path, leaf):
            return None  # of the factors: too few to split
        return super()._words_place(path, leaf, words_shape)

    def _factors_of(self, leaf, words):
        """u float32 [..., A, r] and v float32 [..., B, r] of independent signs, from one row [(A + B) r]."""
        a, b = leaf.shape[-2:]
        both = noise.signs(words, (a + b) * self.rank)
        both = self._everywhere(both.reshape(*both.shape[:-1], a + b, self.rank))
        return self._everywhere(both[..., :a, :]), self._everywhere(both[..., a:, :])

    def _is_matrix(self, path, leaf) -> bool:
        return is_matrix(path, leaf) and self.rank * sum(leaf.shape[-2:]) < math.prod(
            leaf.shape[-2:]
        )

    def _move_leaf(self, path, leaf, words, scale):
        if not self._is_matrix(path, leaf):
            return _dense(leaf, words, scale, "rademacher")
        u, v = self._factors_of(leaf, words)
        return LowRank(leaf, u, v, scale / math.sqrt(self.rank), leaf.dtype)

    def _sum_leaf(self, path, leaf, words_n, weights_n):
        if not self._is_matrix(path, leaf):
            return _sum_signs(leaf, words_n, weights_n)
        u, v = self._factors_of(leaf, words_n)
        u = u * (weights_n / math.sqrt(self.rank)).reshape(-1, *(1,) * leaf.ndim)
        # All queries side by side: one matrix product [..., A, n r] @ [..., n r, B].
        side_by_side = lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)
        return outer(self._everywhere(side_by_side(u)), self._everywhere(side_by_side(v)))

    def _gram_leaf(self, path, leaf, words_n):
        if not self._is_matrix(path, leaf):
            return noise.agreements(words_n, width_of(leaf))
        # ⟨u uᵀ', v vᵀ'⟩ of every pair of directions and of their ranks, summed over a stack.
        u, v = (x.reshape(len(words_n), -1, *x.shape[-2:]) for x in self._factors_of(leaf, words_n))
        inner = lambda x: jnp.einsum("isak,jsal->ijskl", x, x)
        return jnp.sum(inner(u) * inner(v), axis=(2, 3, 4)) / self.rank


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


def low_rank(rank: int = 1) -> Family:
    """u vᵀ / √rank with factors of independent signs, unit variance per entry, never formed in matrix products.

    Every matrix of a leaf [..., A, B] gets its own factors. Vectors, leaves named "bias" or "scale", and matrices for which
    rank · (A + B) ≥ A · B get dense signs. After Sarkar et al., "Evolution strategies at the hyperscale", 2025
    (EGGROLL), which uses Gaussian factors; with signs, ‖z‖² = d for rank 1, so the estimate's variance is that of dense signs.

    Raises:
      ValueError: `rank` is not a positive integer.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> z = zo_jax.low_rank(1).direction(jnp.zeros((8, 8)), jax.random.key(0))
    >>> int(jnp.linalg.matrix_rank(z))
    1
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    return _LowRank(rank=rank)


def by_name(name: str, rank: int = 1) -> Family:
    """The family that a configuration or a ledger names: rademacher, gaussian, sphere, or low_rank of a rank."""
    families = {"rademacher": rademacher, "gaussian": gaussian, "sphere": sphere}
    return low_rank(rank) if name == "low_rank" else families[name]()


def apply_directions(
    params: Any, keys: jax.Array, weights: jax.Array, perturbation: Family | None = None
) -> Any:
    """params + Σᵢ weightsᵢ zᵢ, leaf by leaf: the whole SGD update without a gradient buffer.

    Args:
      params: pytree of arrays.
      keys: [q] typed PRNG keys, as of `jax.random.split(key, q)`.
      weights: float32 [q]; for SGD, -learning_rate · projections / q.
      perturbation: the family of directions; default `rademacher()`.

    Returns:
      Like `params`; sums in float32, rounded once.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> zo_jax.apply_directions(jnp.zeros(3), keys, jnp.zeros(2)).tolist()
    [0.0, 0.0, 0.0]
    """
    return (perturbation or rademacher()).add(params, keys, weights)


def _sign_words_shape(leaf: jax.Array) -> tuple[int, ...]:
    return (*leaf.shape[:-1], noise.sign_words_per_row(width_of(leaf)))


def _dense(leaf: jax.Array, words: jax.Array, scale: jax.Array, kind: str) -> Any:
    if leaf.ndim == 0:  # too small for a lazy form
        return Dense(leaf.reshape(1), words, scale, kind, leaf.dtype).form()[0]
    return Dense(leaf, words, scale, kind, leaf.dtype)


def _sum_signs(leaf: jax.Array, words_n: jax.Array, weights_n: jax.Array) -> jax.Array:
    """Σ weights z, float32 [..., B], of sign words [n, ..., W]."""
    z = lambda words: noise.sign_bits(words, width_of(leaf))
    n = len(weights_n)
    if n <= UNROLLED:
        return sum(noise.with_signs(weights_n[i], z(words_n[i])) for i in range(n))
    add = lambda total, x: (total + noise.with_signs(x[0], z(x[1])), None)
    zero = jnp.zeros((*words_n.shape[1:-1], width_of(leaf)), jnp.float32)
    return lax.scan(add, zero, (weights_n, words_n))[0]


def _sum_of_squares(words: jax.Array, width: int, at_once: float) -> jax.Array:
    """Of the normal numbers of a leaf; of a large one `at_once` entries at a time, whole rows."""
    of_rows = lambda words: jnp.sum(noise.normals(words, width) ** 2)
    if words.size // words.shape[-1] * width <= 4 * at_once:
        return of_rows(words)
    rows = words.reshape(-1, words.shape[-1])
    at_once = max(1, int(at_once) // width)
    return jnp.sum(lax.map(of_rows, rows, batch_size=at_once))
