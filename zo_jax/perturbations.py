"""Families of random directions: how to perturb parameters with one, and how to sum many.

A direction is a key. Leaf i of the parameters (in the order of `jax.tree.leaves`) draws from `fold_in(key, i)`, and
its entries come from counter-based noise (`zo_jax.noise`), so a stack of layers [L, ...] has fresh noise for every
layer, whether the layers are scanned or indexed. Only floating leaves are perturbed; others are left alone. Every
family has E[z zᵀ] = I, so that E[⟨g, z⟩ z] = g.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax import noise
from zo_jax.perturbed import Dense, LowRank

# Leaves whose name says that they are vectors, though a stack of layers [L, A] of them has the shape of a matrix.
_VECTOR_NAMES = ("bias", "scale", "b")


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A family of directions; make one with `rademacher`, `gaussian`, `sphere` or `low_rank`."""

    def direction(self, params: Any, key: jax.Array) -> Any:
        """The direction z that `key` names, as plain float32 arrays (zeros for leaves that are not floating)."""
        zeros = jax.tree.map(jnp.zeros_like, params)
        as_float32 = lambda x: x.astype(jnp.float32) if _is_floating(x) else x
        return self.add(jax.tree.map(as_float32, zeros), key[None], jnp.ones(1))

    def perturb(self, params: Any, key: jax.Array, scale: Any) -> Any:
        """params + scale · z, each floating leaf a `Perturbed` array for functions under `lazily`."""
        scale = jnp.asarray(scale, jnp.float32) * self._scale(params, key)
        return _map_leaves(
            lambda path, leaf, leaf_key: self._perturb_leaf(path, leaf, leaf_key, scale),
            params,
            key,
        )

    def combine(self, params: Any, keys: jax.Array, weights: jax.Array) -> Any:
        """Σᵢ weightsᵢ zᵢ, with the shapes and dtypes of `params`, summed in float32 leaf by leaf.

        Args:
          params: pytree; only its shapes and dtypes matter.
          keys: [q] typed PRNG keys.
          weights: float32 [q].
        """
        return self.add(jax.tree.map(jnp.zeros_like, params), keys, weights)

    def add(self, params: Any, keys: jax.Array, weights: jax.Array) -> Any:
        """params + Σᵢ weightsᵢ zᵢ, rounded once: an update without a gradient buffer."""
        weights = jnp.asarray(weights, jnp.float32)
        weights = weights * lax.map(lambda key: self._scale(params, key), keys)
        # Leaf after leaf: each waits for the one before it, so that the workspace of one leaf exists at a time.
        num_leaves = len(jax.tree.leaves(params))
        keys_nq2 = jnp.swapaxes(jax.vmap(lambda key: _leaf_keys(key, num_leaves))(keys), 0, 1)
        return jax.tree.unflatten(
            jax.tree.structure(params),
            [
                self._add_leaf(path, leaf, keys_nq2[i], weights) if _is_floating(leaf) else leaf
                for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(params))
            ],
        )

    def _scale(self, params: Any, key: jax.Array) -> jax.Array:
        """Factor of the whole direction."""
        del params, key
        return jnp.ones((), jnp.float32)

    def _perturb_leaf(self, path, leaf, key_2, scale):
        raise NotImplementedError

    def _add_leaf(self, path, leaf, keys_q2, weights_q):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _DenseFamily(Perturbation):
    """Independent entries."""

    kind: str

    def _perturb_leaf(self, path, leaf, key_2, scale):
        return _dense(leaf, key_2, scale, self.kind)

    def _add_leaf(self, path, leaf, keys_q2, weights_q):
        return _add_dense(leaf, keys_q2, weights_q, self.kind)


@dataclasses.dataclass(frozen=True)
class _Sphere(_DenseFamily):
    """Uniform on the sphere of radius √d: a Gaussian direction over its norm."""

    def _scale(self, params, key):
        leaves = [leaf for leaf in jax.tree.leaves(params) if _is_floating(leaf)]
        squares = _map_leaves(
            lambda _, leaf, key_2: jnp.sum(noise.normals(key_2, _rows(leaf), _width(leaf)) ** 2),
            params,
            key,
            other=lambda leaf: jnp.zeros((), jnp.float32),
        )
        d = sum(leaf.size for leaf in leaves)
        return jnp.sqrt(d / sum(jax.tree.leaves(squares)))


@dataclasses.dataclass(frozen=True)
class _LowRankFamily(Perturbation):
    """Matrices get u vᵀ / √r; other leaves Rademacher signs."""

    rank: int

    def _factors(self, leaf, key_2):
        """u float32 [..., A, r] and v float32 [..., B, r] of independent signs."""
        *stack, a, b = leaf.shape
        rows = jnp.arange(math.prod(stack), dtype=jnp.uint32).reshape(stack)
        draw = lambda key, n: noise.signs(key, rows, n * self.rank).reshape(*stack, n, self.rank)
        # One stream of signs for both factors, u first: columns of a wider row.
        both = draw(key_2, a + b)
        return both[..., :a, :], both[..., a:, :]

    def _is_matrix(self, path, leaf) -> bool:
        if leaf.ndim < 2 or _name(path) in _VECTOR_NAMES:
            return False
        a, b = leaf.shape[-2:]
        return self.rank * (a + b) < a * b

    def _perturb_leaf(self, path, leaf, key_2, scale):
        if not self._is_matrix(path, leaf):
            return _dense(leaf, key_2, scale, "rademacher")
        u, v = self._factors(leaf, key_2)
        return LowRank(leaf, u, v, scale / math.sqrt(self.rank), leaf.dtype)

    def _add_leaf(self, path, leaf, keys_q2, weights_q):
        if not self._is_matrix(path, leaf):
            return _add_dense(leaf, keys_q2, weights_q, "rademacher")
        u, v = jax.vmap(lambda key_2: self._factors(leaf, key_2))(keys_q2)
        u = u * (weights_q / math.sqrt(self.rank)).reshape(-1, *(1,) * leaf.ndim)
        # All queries side by side: one matrix product [..., A, q r] @ [..., q r, B].
        side_by_side = lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1)
        total = side_by_side(u) @ jnp.swapaxes(side_by_side(v), -1, -2)
        return _round_sum(leaf, total)


def rademacher() -> Perturbation:
    """Independent fair signs ±1: the cheapest, and ‖z‖ = √d exactly.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> z = zo_jax.rademacher().direction(jnp.zeros((2, 3)), jax.random.key(0))
    >>> z.shape, bool(jnp.all(jnp.abs(z) == 1))
    ((2, 3), True)
    """
    return _DenseFamily("rademacher")


def gaussian() -> Perturbation:
    """Independent standard normal entries (Nesterov and Spokoiny, 2017).

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> z = zo_jax.gaussian().direction(jnp.zeros((1000,)), jax.random.key(0))
    >>> bool(abs(jnp.std(z) - 1) < 0.1)
    True
    """
    return _DenseFamily("gaussian")


def sphere() -> Perturbation:
    """Uniform on the sphere of radius √d over all leaves; costs one more draw of every entry.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> z = zo_jax.sphere().direction(jnp.zeros((4, 4)), jax.random.key(0))
    >>> round(float(jnp.linalg.norm(z)), 3)
    4.0
    """
    return _Sphere("gaussian")


def low_rank(rank: int = 1) -> Perturbation:
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
    return _LowRankFamily(rank)


def apply_directions(
    params: Any, keys: jax.Array, weights: jax.Array, perturbation: Perturbation | None = None
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


def key_words(key: jax.Array) -> jax.Array:
    """The two uint32 words of typed or raw Threefry keys, [..., 2]."""
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def _leaf_keys(key: jax.Array, num_leaves: int) -> jax.Array:
    """The words of `fold_in(key, i)` for every leaf i, uint32 [n, 2], in one call: it compiles faster."""
    return key_words(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_leaves)))


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _name(path: tuple[Any, ...]) -> str:
    """The last named part of a leaf's path ("value" is the box of Flax NNX)."""
    names = [str(getattr(p, "key", getattr(p, "name", ""))) for p in path]
    names = [name for name in names if name and name != "value"]
    return names[-1] if names else ""


def _rows(leaf: jax.Array) -> jax.Array:
    """The index of every row of a leaf [..., B]: uint32 [...]."""
    shape = leaf.shape[:-1]
    return jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)


def _width(leaf: jax.Array) -> int:
    return leaf.shape[-1]


def _dense(leaf: jax.Array, key_2: jax.Array, scale: jax.Array, kind: str) -> Any:
    leaf = jnp.asarray(leaf)
    if leaf.ndim == 0:
        # A scalar is a row of one; too small for a lazy form.
        row = Dense(leaf.reshape(1), jnp.zeros((), jnp.uint32), key_2, scale, kind, leaf.dtype)
        return row.form()[0]
    return Dense(leaf, _rows(leaf), key_2, scale, kind, leaf.dtype)


def _add_dense(leaf: jax.Array, keys_q2: jax.Array, weights_q: jax.Array, kind: str) -> jax.Array:
    leaf = jnp.asarray(leaf)
    table = leaf.reshape(1) if leaf.ndim == 0 else leaf
    x = table.astype(jnp.promote_types(table.dtype, jnp.float32))

    def step(total, query):
        key_2, weight = query
        return total + Dense(table, _rows(table), key_2, weight, kind, table.dtype).noise(), None

    total, _ = lax.scan(step, x, (keys_q2, weights_q))
    return total.astype(leaf.dtype).reshape(leaf.shape)


def _round_sum(leaf: jax.Array, total: jax.Array) -> jax.Array:
    return (leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) + total).astype(leaf.dtype)


def _map_leaves(
    function: Callable[..., Any],
    params: Any,
    key: jax.Array,
    other: Callable[..., Any] = lambda x: x,
) -> Any:
    """function(path, leaf, key words) of every floating leaf, `other(leaf)` of the rest."""
    flat, treedef = jax.tree.flatten_with_path(params)
    keys_n2 = _leaf_keys(key, len(flat))
    out = [
        function(path, jnp.asarray(leaf), keys_n2[i]) if _is_floating(leaf) else other(leaf)
        for i, (path, leaf) in enumerate(flat)
    ]
    return jax.tree.unflatten(treedef, out)
