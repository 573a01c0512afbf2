"""Pytrees of parameters: which leaves count, what they are called, and a part of them as a tree of its own."""

from types import EllipsisType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# All of a leaf, or of a tree.
ALL = ...


class Subset(NamedTuple):
    """A part of parameters: whole leaves, or layers of a stack.

    Attributes:
      indices: for each leaf the indices of its chosen layers, or ALL of it, or None for none; or ALL leaves.
    """

    indices: tuple[Any, ...] | EllipsisType

    def select(self, params: Any) -> Any:
        """The part: `params` with None for a leaf outside; of a stack in part the chosen layers [k, ...]."""
        if self.indices is ALL:
            return params
        leaves, treedef = jax.tree.flatten(params)
        pick = lambda leaf, i: leaf if i is ALL else None if i is None else leaf[i]
        picked = [pick(leaf, i) for leaf, i in zip(leaves, self.indices, strict=True)]
        return jax.tree.unflatten(treedef, picked)

    def merge(self, params: Any, part: Any) -> Any:
        """`params` with the part in its place."""
        if self.indices is ALL:
            return part
        leaves, treedef = jax.tree.flatten(params)
        new = jax.tree.leaves(part, is_leaf=lambda x: x is None)
        put = lambda leaf, x, i: x if i is ALL else leaf if i is None else leaf.at[i].set(x)
        return jax.tree.unflatten(treedef, map(put, leaves, new, self.indices))

    def floating(self, params: Any) -> "Subset":
        """Less the leaves that are not floating."""
        leaves = jax.tree.leaves(params)
        if all(map(is_floating, leaves)):
            return self
        indices = [ALL] * len(leaves) if self.indices is ALL else self.indices
        pairs = zip(leaves, indices, strict=True)
        return Subset(tuple(i if is_floating(leaf) else None for leaf, i in pairs))


WHOLE = Subset(ALL)


def path_name(path: tuple[Any, ...]) -> str:
    """The names of a leaf's path joined by slashes, like "blocks/fc/kernel"; of indices their numbers."""
    names = (str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", "")))) for p in path)
    return "/".join(names)


def is_floating(leaf: Any) -> bool:
    """Whether a leaf has a real floating dtype."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def tree_dot(a: Any, b: Any) -> jax.Array:
    """⟨a, b⟩ over all leaves, float32."""
    products = jax.tree.map(lambda x, y: _sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
    return sum(jax.tree.leaves(products))


def _sum(x: jax.Array) -> jax.Array:
    """A sum by rows: of 10⁸ float32 numbers one after the other the last would be lost."""
    return jnp.sum(jnp.sum(x, axis=-1)) if x.ndim else x
