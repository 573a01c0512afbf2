"""Perturbed arrays that are made of others: with axes in another order, or layers in a stack of
which some are perturbed.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax.perturbed import Factored, Perturbed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed(Perturbed):
    """A `Dense` array, or a cast one, with its axes in another order, the array itself left as it
    lies in memory.
    """

    array: Perturbed
    permutation: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def base(self) -> jax.Array:  # pyright: ignore
        return lax.transpose(self.array.base, self.permutation)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape[axis] for axis in self.permutation)

    @property
    def dtype(self) -> Any:  # pyright: ignore
        return self.array.dtype

    @property
    def label(self) -> str:
        return self.array.label

    def form(self) -> jax.Array:
        return lax.transpose(self.array.form(), self.permutation)

    def cast(self, dtype: Any) -> Perturbed:
        return Transposed(self.array.cast(dtype), self.permutation)

    def layers(self):
        layers = self.array.layers()
        if layers is None or self.permutation[0] != 0:
            return None
        arrays, rebuild = layers
        permutation = tuple(axis - 1 for axis in self.permutation[1:])
        return arrays, lambda parts: Transposed(rebuild(parts), permutation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack(Perturbed):
    """A stack of layers [L, ...] of which some are perturbed: what
    `stack.at[indices].set(perturbed)` makes, or `concatenate([stack, perturbed])`.

    Attributes:
      base: the stack; its entries in perturbed layers do not count.
      position: int32 [L], which of the perturbed layers each layer is; -1 where it is none.
      trained: the perturbed layers [k, ...].
      first: if they are known to be the last ones, in order, the index of the first.
    """

    base: jax.Array
    position: jax.Array
    trained: Any
    first: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def dtype(self) -> Any:  # pyright: ignore
        return self.base.dtype

    @property
    def label(self) -> str:
        return self.trained.label

    def rows_from(self, first):
        return self.trained if first == self.first else None

    def form(self) -> jax.Array:
        if self.first is not None:
            return lax.concatenate([self.base[: self.first], self.trained.form()], 0)
        is_trained = self.position >= 0
        layers = self.trained.form()[jnp.where(is_trained, self.position, 0)]
        return jnp.where(lax.expand_dims(is_trained, range(1, self.ndim)), layers, self.base)

    def layers(self):
        def rebuild(parts):
            base, position = parts
            if not isinstance(self.trained, Factored):
                return OneOf(base, position, self.trained)
            layer: Any = self.trained.layer(position)
            base = base.astype(layer.base.dtype)
            base = lax.cond(position < 0, lambda: base, lambda: layer.base)
            return dataclasses.replace(
                layer, base=base, scale=jnp.where(position < 0, 0, layer.scale)
            )

        return (self.base, self.position), rebuild


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OneOf(Perturbed):
    """A layer of a `Stack`: `trained[position]`, or `base` if the position is -1."""

    base: jax.Array
    position: jax.Array
    trained: Any

    @property
    def dtype(self) -> Any:  # pyright: ignore
        return self.base.dtype

    @property
    def label(self) -> str:
        return self.trained.label

    def form(self) -> jax.Array:
        return lax.cond(
            self.position < 0,
            lambda: self.base,
            lambda: self.trained.layer(self.position).form(),
        )
