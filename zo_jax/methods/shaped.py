"""Directions made of dense ones entry by entry: scaled, masked, turned towards another.

`Wrapped` is such a family over one whose leaves are `Dense`: a subclass says what it makes of an
array that is perturbed where it is used, and of a sum of directions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from zo_jax.family import Family
from zo_jax.perturbed import Dense
from zo_jax.trees import is_floating


class Wrapped(Family):
    """A family over a dense one, `base`: signs, normal numbers or the sphere."""

    base: Family

    def perturbed(self, i: int, z: Dense, scale: jax.Array) -> Dense:
        """Leaf i moved by scale times its direction, from the leaf moved by z itself."""
        raise NotImplementedError

    def total(self, i: int, leaf: jax.Array, z: jax.Array, weight: jax.Array) -> jax.Array:
        """Σ weights of directions of leaf i, float32, from Σ weights z and Σ weights."""
        raise NotImplementedError

    def on(self, layout):
        return dataclasses.replace(self, base=self.base.on(layout))  # pyright: ignore

    def draw(self, params, key):
        return self.base.draw(params, key)

    def moves(self, params):
        return self.base.moves(params)

    def move(self, params, direction, scale):
        leaves, treedef = jax.tree.flatten(params)
        scale = jnp.asarray(scale, jnp.float32)
        # A scalar is moved at once, and from zero so that nothing of it is lost.
        bases = [x if jnp.ndim(x) or not is_floating(x) else jnp.float32(0) for x in leaves]
        moved = self.base.move(jax.tree.unflatten(treedef, bases), direction, jnp.float32(1))
        moved = jax.tree.leaves(moved, is_leaf=lambda x: hasattr(x, "form"))

        def move_leaf(i, leaf, z):
            if not is_floating(leaf):
                return leaf
            if isinstance(z, Dense):
                return self.perturbed(i, z, scale)
            if jnp.ndim(leaf):
                raise ValueError(
                    f"the directions must be dense: signs, normal numbers or the sphere; got "
                    f"{type(z).__name__}, take another perturbation"
                )
            return add_rounded(leaf, scale * self.total(i, leaf, z, jnp.float32(1)))

        return jax.tree.unflatten(treedef, map(move_leaf, range(len(leaves)), leaves, moved))

    def add(self, params, keys, weights):
        leaves, treedef = jax.tree.flatten(params)
        total = jax.tree.leaves(self.base.combine(as_float32_shapes(params), keys, weights))
        weight = jnp.sum(jnp.asarray(weights, jnp.float32))

        def add_leaf(i, leaf, z):
            if not is_floating(leaf):
                return leaf
            return add_rounded(leaf, self.total(i, leaf, z, weight))

        return jax.tree.unflatten(treedef, map(add_leaf, range(len(leaves)), leaves, total))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShapedArray(Dense):
    """base + scale · (amplitude · factor ∘ z + along_amplitude · along).

    Attributes:
      amplitude, along_amplitude: float32 scalars.
      factor, along: float32 [..., B] like the base, or None.
    """

    amplitude: jax.Array
    along_amplitude: jax.Array
    factor: Any
    along: Any

    def noise(self):
        z = Dense(self.base, self.words, self.amplitude, self.kind, self.dtype).noise()
        return self.scale * _shaped(z, self.factor, self.along, self.along_amplitude)

    def on_rows(self, function):
        of = lambda x: None if x is None else function(x)
        parts = dict(base=function(self.base), words=function(self.words))
        return dataclasses.replace(self, **parts, factor=of(self.factor), along=of(self.along))

    def layers(self):
        if self.ndim < 2:
            return None
        names = ("base", "words", "factor", "along")
        rebuild = lambda parts: dataclasses.replace(self, **dict(zip(names, parts, strict=True)))
        return tuple(getattr(self, name) for name in names), rebuild


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shaped(Wrapped):
    """Directions amplitude · factor ∘ z + along_amplitude · along.

    Attributes:
      base: the family of z.
      amplitude, along_amplitude: float32 scalars.
      factor, along: for each leaf a float32 array like it, or None; or None for all.
    """

    base: Family
    amplitude: Any = 1.0
    along_amplitude: Any = 0.0
    factor: Any = None
    along: Any = None

    def perturbed(self, i, z, scale):
        return ShapedArray(
            base=z.base,
            words=z.words,
            scale=scale,
            kind=z.kind,
            dtype=z.dtype,
            amplitude=z.scale * jnp.float32(self.amplitude),
            along_amplitude=jnp.float32(self.along_amplitude),
            factor=self.factor and self.factor[i],
            along=self.along and self.along[i],
        )

    def total(self, i, leaf, z, weight):
        factor, along = self.factor and self.factor[i], self.along and self.along[i]
        return _shaped(self.amplitude * z, factor, along, self.along_amplitude * weight)


def _shaped(z: jax.Array, factor: Any, along: Any, along_amplitude: Any) -> jax.Array:
    z = z if factor is None else factor * z
    return z if along is None else z + along_amplitude * along


def add_rounded(leaf: jax.Array, change: jax.Array) -> jax.Array:
    """A sum in float32 or better, rounded once."""
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return (wide + change).astype(leaf.dtype)


def as_float32_shapes(params: Any) -> Any:
    """The shapes of parameters, with float32 for floating leaves."""

    def of(x):
        dtype = jnp.float32 if is_floating(x) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype)

    return jax.tree.map(of, params)


def float32_leaves(params: Any, value: float) -> list[jax.Array | None]:
    """For each leaf an array like it, of one value; None where it is not floating."""
    full = lambda x: jnp.full(x.shape, value, jnp.float32) if is_floating(x) else None
    return [full(x) for x in jax.tree.leaves(params)]
