"""Directions of few numbers: each matrix moves along u vᵀ, made of Gaussian coordinates and of
factors that are kept.

The coordinates x of a direction are drawn as any Gaussian direction is, but of smaller parameters,
and lifted: z = lift(x), linear. So a sum of directions is the lift of a sum of coordinates, which
is where momenta and orthogonalisations of the subspace methods live. Leaves that are no matrices
are their own coordinates.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.families import gaussian
from zo_jax.family import Family
from zo_jax.perturbed import LowRank, outer
from zo_jax.trees import is_floating, matrices


@dataclasses.dataclass(frozen=True)
class Subspace(Family):
    """A family that lifts coordinates; a subclass says how, for a matrix.

    Attributes:
      kept: for each leaf of the parameters its kept factors, a tuple of float32 arrays, or None if
        it is not treated as a matrix.
      rank: r.
    """

    kept: list[Any]
    rank: int

    def coordinates_shape(self, leaf: Any) -> tuple[int, ...]:
        """Of the coordinates of a matrix [..., A, B]."""
        raise NotImplementedError

    def factors(self, kept: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """u [..., A, r] and v [..., B, r] of a direction u vᵀ with coordinates x."""
        raise NotImplementedError

    def draw(self, params, key):
        return gaussian().direction(self._shapes(params), key)

    def move(self, params, direction, scale):
        leaves, treedef = jax.tree.flatten(params)
        scale = jnp.asarray(scale, jnp.float32)

        def move_leaf(leaf, kept, x):
            if not is_floating(leaf):
                return leaf
            if kept is not None:
                return LowRank(leaf, *self.factors(kept, x), scale, leaf.dtype)
            return _rounded(leaf, scale * x)

        moved = map(move_leaf, leaves, self.kept, direction)
        return jax.tree.unflatten(treedef, moved)

    def moves(self, params):
        return [is_floating(leaf) for leaf in jax.tree.leaves(params)]

    def add(self, params, keys, weights):
        total = self.lift(self.sum_of_coordinates(params, keys, weights))
        leaves, treedef = jax.tree.flatten(params)
        add = lambda leaf, x: _rounded(leaf, x) if is_floating(leaf) else leaf
        return jax.tree.unflatten(treedef, map(add, leaves, total))

    def sum_of_coordinates(self, params: Any, keys: jax.Array, weights: jax.Array) -> list[Any]:
        """Σᵢ weightsᵢ xᵢ, float32, for each leaf."""
        return gaussian().combine(self._shapes(params), keys, weights)

    def zero_coordinates(self, params: Any) -> list[jax.Array]:
        """Zeros like a sum of coordinates."""
        return [jnp.zeros(x.shape, x.dtype) for x in self._shapes(params)]

    def lift(self, coordinates: list[Any]) -> list[jax.Array]:
        """The sum of directions, float32, for each leaf, from that of coordinates."""
        pairs = zip(self.kept, coordinates, strict=True)
        return [x if kept is None else outer(*self.factors(kept, x)) for kept, x in pairs]

    def _shapes(self, params: Any) -> list[jax.ShapeDtypeStruct]:
        def of_leaf(leaf, kept):
            dtype = jnp.float32 if is_floating(leaf) else leaf.dtype
            shape = leaf.shape if kept is None else self.coordinates_shape(leaf)
            return jax.ShapeDtypeStruct(shape, dtype)

        return [*map(of_leaf, jax.tree.leaves(params), self.kept)]


def subspace_family(cls: Any) -> Any:
    """A decorator for subclasses: dataclasses and pytrees, whose arrays are the kept factors."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    meta = [field.name for field in dataclasses.fields(cls) if field.name != "kept"]
    return jax.tree_util.register_dataclass(cls, data_fields=["kept"], meta_fields=meta)


def keep_factors(params: Any, key: jax.Array, rank: int, draw: Any) -> list[Any]:
    """The kept factors of each leaf: `draw(key, leaf)` for matrices with more than `rank` rows and
    columns, else None.
    """
    leaves = jax.tree.leaves(params)
    are_matrices = jax.tree.leaves(matrices(params))
    treated = [
        is_matrix and is_floating(leaf) and rank < min(leaf.shape[-2:])
        for leaf, is_matrix in zip(leaves, are_matrices, strict=True)
    ]
    keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
    return [
        draw(k, leaf) if is_in else None
        for k, leaf, is_in in zip(keys, leaves, treated, strict=True)
    ]


def normal_columns(key: jax.Array, leaf: Any, axis: int, rank: int) -> jax.Array:
    """[..., n, r] of independent normal numbers, n the size of an axis (-2 or -1) of a matrix."""
    return jax.random.normal(key, (*leaf.shape[:-2], leaf.shape[axis], rank), jnp.float32)


def orthonormal_columns(key: jax.Array, leaf: Any, axis: int, rank: int) -> jax.Array:
    """[..., n, r] with orthonormal columns: the QR decomposition of `normal_columns`."""
    return jnp.linalg.qr(normal_columns(key, leaf, axis, rank))[0]


def like_params(params: Any, leaves: list[jax.Array]) -> Any:
    """Float32 leaves as updates of the parameters: of their dtypes, zero where not floating."""
    old, treedef = jax.tree.flatten(params)
    cast = lambda x, p: x.astype(p.dtype) if is_floating(p) else jnp.zeros_like(p)
    return jax.tree.unflatten(treedef, map(cast, leaves, old))


def _rounded(leaf: jax.Array, change: jax.Array) -> jax.Array:
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return (wide + change).astype(leaf.dtype)
