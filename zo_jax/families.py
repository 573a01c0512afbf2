"""Families of random directions: signs, normals, the sphere, low rank. Each has E[z zᵀ] = I."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax.family import Family
from zo_jax.kinds import Factors, Normals, Signs, sum_of_squares, width_of
from zo_jax.noise import key_words
from zo_jax.trees import matrices, path_name
from zo_jax.word_family import WordFamily

# Signs of a leaf that may exist beside its words.
_MOST_SIGNS = 2**17
# Normal numbers that stay in cache while their norm is taken.
_IN_CACHE = 2**18


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
        squares = [sum_of_squares(w, width_of(leaf), at_once) for leaf, w in floating]
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
        factors = Factors(self.rank, self.layout)
        return [
            factors if is_matrix and self._is_worth_it(leaf) else Signs(leaf.size <= _MOST_SIGNS)
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
