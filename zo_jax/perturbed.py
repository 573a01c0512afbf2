"""Arrays that are perturbed: what they stand for, and how to form them.

A `Perturbed` array stands for base + scale · z. `Dense` knows its direction z entry by entry, by
counter-based noise; `LowRank` as a product of two thin factors. Others arise when these are cast,
transposed, sliced or put in a stack. What a primitive does with them is said in `zo_jax.rules`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import operator
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax import noise

# Products of two factors of at most this rank are sums of broadcast products.
_FUSED_RANK = 8


class Perturbed:
    """base + scale · z, of a shape and a dtype, not formed.

    A class of one's own is a pytree (`jax.tree_util.register_dataclass`) that has `base`, `dtype`
    and `form`. What has no rule (`zo_jax.register_rule`) forms it, so it is right without any.
    """

    dtype: Any
    base: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def label(self) -> str:
        """The kind of direction, for people."""
        return type(self).__name__

    def form(self) -> jax.Array:
        """The array itself: summed in float32 or better, then rounded once to `dtype`."""
        raise NotImplementedError

    def cast(self, dtype: Any) -> "Perturbed":
        """The array in another floating dtype; what a former dtype rounded stays rounded."""
        return self if dtype == self.dtype else Cast(self, dtype)

    def layers(self) -> "tuple[Any, Callable[[Any], Perturbed]] | None":
        """(arrays with the leading axis, function from their slices to a slice of self), if there
        are such.
        """
        return None

    def rows_from(self, first: int) -> "Perturbed | None":
        """The rows from `first` on, if they are an array of their own."""
        del first
        return None

    def layer(self, i: jax.Array) -> "Perturbed":
        """Slice i along the first axis, of one that has `layers`."""
        layers = self.layers()
        assert layers is not None
        arrays, rebuild = layers
        at = lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False)
        return rebuild(jax.tree.map(at, arrays))


def sum_dtype(dtype: Any) -> Any:
    """In which a base of this dtype and its perturbation are summed."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def _holds(wide: Any, narrow: Any) -> bool:
    """Whether every number of one floating dtype is one of another."""
    w, n = jnp.finfo(wide), jnp.finfo(narrow)
    return w.nmant >= n.nmant and w.maxexp >= n.maxexp and w.minexp <= n.minexp


def _cast_of_a_sum(x: Any, dtype: Any) -> Perturbed:
    # A sum that is not rounded yet need not exist before it is rounded.
    if x.dtype == sum_dtype(x.base.dtype):
        return dataclasses.replace(x, dtype=dtype)
    return Perturbed.cast(x, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Perturbed):
    """A direction with independent entries.

    Attributes:
      base: floating [..., B].
      words: uint32 [..., W], the words of the noise stream that each row of B entries owns; of
        kind "drawn" float32 [..., B], z itself.
      scale: float32 scalar.
      kind: "rademacher", "gaussian" or "drawn".
      dtype: of the formed array.
    """

    base: jax.Array
    words: jax.Array
    scale: jax.Array
    kind: str = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    def form(self) -> jax.Array:
        base = self.base.astype(sum_dtype(self.base.dtype))
        if self.kind == "rademacher":
            return noise.add_signs(base, self.scale, self.words).astype(self.dtype)
        return (base + self.noise()).astype(self.dtype)

    def noise(self) -> jax.Array:
        """scale · z, float32, of the shape of self."""
        if self.kind == "rademacher":
            return noise.with_signs(self.scale, noise.sign_bits(self.words, self.shape[-1]))
        if self.kind == "drawn":
            return self.scale * self.words
        return self.scale * noise.normals(self.words, self.shape[-1])

    def cast(self, dtype: Any) -> Perturbed:
        return _cast_of_a_sum(self, dtype)

    def on_rows(self, function: Callable[[jax.Array], jax.Array]) -> "Dense":
        """`function`, which leaves the last axis alone, on both parts."""
        return dataclasses.replace(self, base=function(self.base), words=function(self.words))

    def layers(self):
        if self.ndim < 2:
            return None
        rebuild = lambda parts: dataclasses.replace(self, base=parts[0], words=parts[1])
        return (self.base, self.words), rebuild


class Factored(Perturbed):
    """A direction that is a product of two factors, each of which varies along some of the axes: z
    = Σᵣ u v.

    Attributes:
      base: floating.
      u, v: float32, their axes those of base that `u_axes` and `v_axes` name, in order, and r last.
      scale: float32 scalar; the 1 / √r of unit variance is in it.
      dtype: of the formed array.
    """

    u: jax.Array
    v: jax.Array
    scale: jax.Array
    u_axes: tuple[int, ...]
    v_axes: tuple[int, ...]

    @property
    def label(self) -> str:
        return "LowRank"

    def form(self) -> jax.Array:
        x = self.base.astype(sum_dtype(self.base.dtype))
        z = _outer_on_axes(self.u, self.u_axes, self.v, self.v_axes, self.ndim)
        return (x + self.scale * z).astype(self.dtype)

    def cast(self, dtype: Any) -> Perturbed:
        return _cast_of_a_sum(self, dtype)

    def on_parts(
        self,
        base: jax.Array,
        part: Callable[[jax.Array, tuple[int, ...]], tuple[jax.Array, tuple[int, ...]]],
    ) -> "Factored":
        """With another base, and each factor and its axes as `part` makes them from what they
        are.
        """
        u, v = part(self.u, self.u_axes), part(self.v, self.v_axes)
        return _factored(base, u, v, self.scale, self.dtype)

    def layers(self):
        if not self.ndim:
            return None
        has_layers = [0 in self.u_axes, 0 in self.v_axes]
        factors, axes = (self.u, self.v), (self.u_axes, self.v_axes)

        def rebuild(parts):
            base, *sliced = parts
            rest = iter(sliced)
            u, v = (
                (next(rest) if has else factor, tuple(a - 1 for a in of if a))
                for factor, of, has in zip(factors, axes, has_layers, strict=True)
            )
            return _factored(base, u, v, self.scale, self.dtype)

        return (
            self.base,
            *(factor for factor, has in zip(factors, has_layers, strict=True) if has),
        ), rebuild


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Factored):
    """A direction u vᵀ of each matrix.

    Attributes:
      base: floating [..., A, B].
      u: float32 [..., A, r].
      v: float32 [..., B, r].
      scale: float32 scalar; the 1 / √r of unit variance is in it.
      dtype: of the formed array.
    """

    base: jax.Array
    u: jax.Array
    v: jax.Array
    scale: jax.Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def u_axes(self) -> tuple[int, ...]:  # pyright: ignore
        return tuple(range(self.ndim - 1))

    @property
    def v_axes(self) -> tuple[int, ...]:  # pyright: ignore
        return (*range(self.ndim - 2), self.ndim - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnAxes(Factored):
    """A direction of two factors that are not those of matrices in the last two axes: part of a
    `LowRank`, or rearranged.
    """

    base: jax.Array
    u: jax.Array
    v: jax.Array
    scale: jax.Array
    dtype: Any = dataclasses.field(metadata={"static": True})
    u_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    v_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def _factored(
    base: jax.Array,
    u: tuple[jax.Array, tuple[int, ...]],
    v: tuple[jax.Array, tuple[int, ...]],
    scale: jax.Array,
    dtype: Any,
) -> Factored:
    """A `LowRank` if the factors, each given with its axes, are those of matrices; otherwise
    `OnAxes`.
    """
    (u_part, u_axes), (v_part, v_axes) = _in_order(*u), _in_order(*v)
    n = base.ndim
    rows, columns = tuple(range(n - 1)), (*range(n - 2), n - 1)
    if n >= 2 and (u_axes, v_axes) == (rows, columns):
        return LowRank(base, u_part, v_part, scale, dtype)
    if n >= 2 and (v_axes, u_axes) == (rows, columns):
        return LowRank(base, v_part, u_part, scale, dtype)
    return OnAxes(base, u_part, v_part, scale, dtype, u_axes, v_axes)


def _in_order(part: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    if order == list(range(len(axes))):
        return part, axes
    return lax.transpose(part, (*order, len(axes))), tuple(axes[i] for i in order)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cast(Perturbed):
    """A perturbed array in another dtype, where rounding to its own comes first: what is rounded
    stays rounded.
    """

    array: Perturbed
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def base(self) -> jax.Array:  # pyright: ignore
        return self.array.base.astype(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def label(self) -> str:
        return self.array.label

    def form(self) -> jax.Array:
        return self.array.form().astype(self.dtype)

    def cast(self, dtype: Any) -> Perturbed:
        # Nothing was lost on the way to a wider dtype.
        same = _holds(self.dtype, self.array.dtype)
        return self.array.cast(dtype) if same else super().cast(dtype)

    def layers(self):
        layers = self.array.layers()
        if layers is None:
            return None
        arrays, rebuild = layers
        return arrays, lambda parts: rebuild(parts).cast(self.dtype)

    def rows_from(self, first):
        rows = self.array.rows_from(first)
        return rows and rows.cast(self.dtype)


def outer(u: jax.Array, v: jax.Array) -> jax.Array:
    """u vᵀ of [..., A, r] and [..., B, r], [..., A, B].

    A small rank as a sum of broadcast products: XLA fuses it with what comes after, so that it
    needs no memory, and it is faster than a matrix product.
    """
    n = u.ndim
    return _outer_on_axes(u, tuple(range(n - 1)), v, (*range(n - 2), n - 1), n)


def _outer_on_axes(
    u: jax.Array, u_axes: Sequence[int], v: jax.Array, v_axes: Sequence[int], ndim: int
) -> jax.Array:
    """Σᵣ u v of two factors with the given axes of an array of `ndim` axes; of size 1 along those
    that neither has.
    """
    absent = lambda *axes: [a for a in range(ndim) if not any(a in of for of in axes)]
    if u.shape[-1] <= _FUSED_RANK:
        u, v = lax.expand_dims(u, absent(u_axes)), lax.expand_dims(v, absent(v_axes))
        return functools.reduce(operator.add, (u[..., k] * v[..., k] for k in range(u.shape[-1])))
    both = sorted({*u_axes, *v_axes})
    z = jnp.einsum(u, [*u_axes, ndim], v, [*v_axes, ndim], both)
    return lax.expand_dims(z, absent(both))
