"""Directions of examples that share their signs: Flipout.

Wen et al., "Flipout: efficient pseudo-independent weight perturbations on mini-batches", 2018. With
signs U of a matrix [A, B], shared, and signs r [A] and s [B] of a direction's own,

    z = U ∘ (r sᵀ),     x (W + ε z) = x W + ε ((x ∘ r) U) ∘ s,     Σᵢ wᵢ zᵢ = U ∘ (Σᵢ wᵢ rᵢ sᵢᵀ).

Each z is of independent signs, and two of them are uncorrelated; but they are not independent. So
a batch of which every example has a direction takes two products with a matrix, W and U, in the
place of one. This holds for matrices, and stacks of them, that are multiplied or looked up, and
are scanned, sliced by rows, cast or transposed on the way; anywhere else they are formed for each
example, which is right and dear. U is formed for its product: memory of one matrix at a time.
"""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax import noise
from zo_jax.composed import Transposed
from zo_jax.families import rademacher
from zo_jax.family import Family
from zo_jax.methods.shaped import add_rounded
from zo_jax.perturbed import Perturbed, sum_dtype
from zo_jax.rules import is_perturbed, register_rule
from zo_jax.trees import is_floating, matrices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flipped(Perturbed):
    """base + scale · U ∘ (r sᵀ).

    Attributes:
      base: floating [..., A, B].
      words: uint32 [..., A, W], the bits of U.
      r, s: float32 signs [..., A] and [..., B].
      scale: float32 scalar.
      dtype: of the formed array.
    """

    base: jax.Array
    words: jax.Array
    r: jax.Array
    s: jax.Array
    scale: jax.Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    def signs(self) -> jax.Array:
        """U, float32."""
        return noise.signs(self.words, self.shape[-1])

    def form(self):
        z = self.signs() * self.r[..., None] * jnp.expand_dims(self.s, -2)
        return (self.base.astype(sum_dtype(self.base.dtype)) + self.scale * z).astype(self.dtype)

    def cast(self, dtype):
        is_sum = self.dtype == sum_dtype(self.base.dtype)
        return dataclasses.replace(self, dtype=dtype) if is_sum else super().cast(dtype)

    def layers(self):
        if self.ndim < 3:
            return None
        names = ("base", "words", "r", "s")
        rebuild = lambda parts: dataclasses.replace(self, **dict(zip(names, parts, strict=True)))
        return tuple(getattr(self, name) for name in names), rebuild


@register_rule(lax.dot_general_p, Flipped)
def _product(lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any) -> Any:
    """x W + ε ((x ∘ r) U) ∘ s, and the same with W on the left or transposed."""
    w, x = (lhs, rhs) if is_perturbed(lhs) else (rhs, lhs)
    w_is_left = w is lhs
    (left, right), batch = dimension_numbers
    w_axes, x_axes = (left, right) if w_is_left else (right, left)
    is_floating_x = jnp.issubdtype(x.dtype, jnp.floating)
    if w.ndim != 2 or len(w_axes) != 1 or batch[0] or not is_floating_x:
        return NotImplemented

    def dot(w, x):
        operands = (w, x) if w_is_left else (x, w)
        return lax.dot_general_p.bind(*operands, dimension_numbers=dimension_numbers, **params)

    product = dot(w.base.astype(w.dtype), x)
    before, after = (w.r, w.s) if w_axes[0] == 0 else (w.s, w.r)
    flipped = x * _along(before, x_axes[0], x.ndim).astype(x.dtype)
    change = dot(w.signs().astype(w.dtype), flipped)
    after = _along(after, 0 if w_is_left else product.ndim - 1, product.ndim)
    wide = sum_dtype(product.dtype)
    return (product.astype(wide) + w.scale * after * change.astype(wide)).astype(product.dtype)


@register_rule(lax.transpose_p, Flipped)
def _transpose(x: Flipped, *, permutation: Any) -> Transposed:
    return Transposed(x, tuple(permutation))


@register_rule(lax.gather_p, Flipped)
def _look_up(x: Any, indices: Any, **params: Any) -> Any:
    """Rows of a table, formed."""
    numbers = params["dimension_numbers"]
    takes_rows = (
        is_perturbed(x)
        and x.ndim == 2
        and tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(params["slice_sizes"]) == (1, x.shape[1])
        and tuple(numbers.offset_dims) == (indices.ndim - 1,)
    )
    if not takes_rows:
        return NotImplemented

    def rows(part, fill_value=0):
        own = dict(slice_sizes=(1, part.shape[1]), fill_value=fill_value)
        return lax.gather_p.bind(part, indices, **params | own)

    # Zero for rows that do not exist, where these are filled.
    r = rows(x.r[:, None])
    s = _along(x.s, r.ndim - 1, r.ndim)
    z = noise.signs(rows(x.words), x.shape[1]) * r * s
    base = rows(x.base, params["fill_value"])
    return (base.astype(sum_dtype(base.dtype)) + x.scale * z).astype(x.dtype)


def _take_block(x: Flipped, primitive: Any, starts: Any, sizes: Any, **params: Any) -> Any:
    """A block of matrices and of rows, with the columns whole; `primitive` takes it from an array
    of the axes that are named.
    """
    if sizes[-1] != x.shape[-1]:
        return NotImplemented
    n = x.ndim

    def of(part, axes):
        own = [part.shape[-1] if a == n - 1 else sizes[a] for a in axes]
        return primitive(part, [starts[a] for a in axes], own, **params)

    rows = tuple(range(n - 1))
    return dataclasses.replace(
        x,
        base=of(x.base, (*rows, n - 1)),
        words=of(x.words, (*rows, n - 1)),
        r=of(x.r, rows),
        s=of(x.s, (*range(n - 2), n - 1)),
    )


@register_rule(lax.dynamic_slice_p, Flipped)
def _dynamic_slice(x: Any, *starts: Any, slice_sizes: Any, **_: Any) -> Any:
    if len(starts) != x.ndim:
        return NotImplemented
    bind = lambda part, starts, sizes: lax.dynamic_slice_p.bind(
        part, *starts, slice_sizes=tuple(sizes)
    )
    return _take_block(x, bind, starts, slice_sizes)


@register_rule(lax.slice_p, Flipped)
def _slice(x: Flipped, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    if strides is not None and any(stride != 1 for stride in strides):
        return NotImplemented
    sizes = [end - start for start, end in zip(start_indices, limit_indices, strict=True)]
    take = lambda part, starts, sizes: lax.slice(
        part, starts, [start + size for start, size in zip(starts, sizes, strict=True)]
    )
    return _take_block(x, take, start_indices, sizes)


@register_rule(lax.squeeze_p, Flipped)
def _squeeze(x: Flipped, *, dimensions: Any) -> Any:
    if any(axis >= x.ndim - 2 for axis in dimensions):
        return NotImplemented
    parts = {name: getattr(x, name) for name in ("base", "words", "r", "s")}
    squeezed = {name: lax.squeeze(part, dimensions) for name, part in parts.items()}
    return dataclasses.replace(x, **squeezed)


def _along(x: jax.Array, axis: int, ndim: int) -> jax.Array:
    """A vector along an axis of an array of `ndim` axes."""
    return lax.expand_dims(x, [a for a in range(ndim) if a != axis])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flipout(Family):
    """U ∘ (r sᵀ) for each matrix, with U of the family and r, s of a direction's key; other leaves
    independent signs.

    Attributes:
      words: for each leaf the words of U, as the family of signs draws them; None where there are
        none.
    """

    words: Any

    def draw(self, params, key):
        return rademacher().direction(_vectors(params), key)

    def move(self, params, direction, scale):
        leaves, treedef = jax.tree.flatten(params)
        scale = jnp.asarray(scale, jnp.float32)

        def move_leaf(leaf, words, z):
            if isinstance(z, tuple):
                r, s = z
                return Flipped(leaf, words, r, s, scale, leaf.dtype)
            return add_rounded(leaf, scale * z) if is_floating(leaf) else leaf

        moved = map(move_leaf, leaves, self.words, direction)
        return jax.tree.unflatten(treedef, moved)

    def moves(self, params):
        return [is_floating(leaf) for leaf in jax.tree.leaves(params)]

    def add(self, params, keys, weights):
        leaves, treedef = jax.tree.flatten(params)
        directions = jax.vmap(lambda key: self.draw(params, key))(keys)
        weights = jnp.asarray(weights, jnp.float32)

        def add_leaf(leaf, words, z):
            if isinstance(z, tuple):
                r, s = z
                both = jnp.einsum("q,q...a,q...b->...ab", weights, r, s)
                return add_rounded(leaf, noise.signs(words, leaf.shape[-1]) * both)
            if not is_floating(leaf):
                return leaf
            return add_rounded(leaf, jnp.tensordot(weights, z, 1))

        return jax.tree.unflatten(treedef, map(add_leaf, leaves, self.words, directions))


def flipout(params: Any, key: jax.Array) -> Flipout:
    """The family whose shared signs a key names.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> params = jnp.zeros((4, 3))
    >>> family = flipout(params, jax.random.key(0))
    >>> z, y = (family.direction(params, jax.random.key(i)) for i in (1, 2))
    >>> int(jnp.linalg.matrix_rank(z * y))  # what they share is gone
    1
    """
    return Flipout(rademacher().draw(params, key).words)  # pyright: ignore


def _vectors(params: Any) -> list[Any]:
    """The shapes of r and s of each matrix; of other leaves their own."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(matrices(params)), strict=True)

    def of_leaf(x: Any, is_matrix: bool) -> Any:
        if not (is_matrix and is_floating(x)):
            return jax.ShapeDtypeStruct(x.shape, jnp.float32 if is_floating(x) else x.dtype)
        *stack, a, b = x.shape
        return tuple(jax.ShapeDtypeStruct((*stack, n), jnp.float32) for n in (a, b))

    return [of_leaf(*pair) for pair in pairs]
