"""Families of random directions: how to perturb parameters with one, and how to sum many.

A direction is a key, which names a stream of random words (`zo_jax.noise`). Every floating leaf of the parameters owns
a part of the stream, and every row of a leaf a part of that, so a stack of layers [L, ...] has fresh noise for every
layer, whether the layers are scanned or indexed. Leaves that are not floating are left alone. Every family has
E[z zᵀ] = I, so that E[⟨g, z⟩ z] = g.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from zo_jax import noise
from zo_jax.perturbed import Dense, LowRank, outer
from zo_jax.sharding import Layout

# Leaves whose name says that they are vectors, though a stack of layers [L, A] of them has the shape of a matrix.
_VECTOR_NAMES = ("bias", "scale", "b")
# A sum over directions makes one pass over a leaf for so many of them, written out: XLA fuses these.
_UNROLLED = 8
# Leaves with more words than this are summed one after the other, the smaller ones together.
_LARGE_WORDS = 2**15
# Normal numbers that stay in cache while their norm is taken.
_IN_CACHE = 2**18


class Direction(NamedTuple):
    """A direction as its random words: one bit an entry for signs, less for low rank, two words a row for normals.

    Attributes:
      words: for each leaf of the parameters uint32 [..., W], or None where the leaf is not floating.
      factor: float32 scalar, of the whole direction.
    """

    words: list[jax.Array | None]
    factor: jax.Array


class _Group(NamedTuple):
    """Leaves whose words are drawn together.

    Attributes:
      indices: of the leaves.
      shapes: of their words.
      starts: where each begins in the group.
      first: index in the stream of the first word.
      size: number of words.
      place: puts the words where they belong, if parameters are placed at all.
      is_split: whether there is one leaf alone, which is split over devices.
    """

    indices: list[int]
    shapes: list[tuple[int, ...]]
    starts: list[int]
    first: int
    size: int
    place: Callable[[jax.Array], jax.Array] = lambda words: words
    is_split: bool = False

    def draw(self, key: jax.Array) -> list[jax.Array]:
        """Each leaf's words, from the two words of a key."""
        if self.is_split:
            return [noise.table(key, self.shapes[0], self.first, self.place)]
        return self.split(self.place(noise.stream(key, self.size, self.first)))

    def split(self, words: jax.Array) -> list[jax.Array]:
        """Each leaf's part of [..., size]."""
        return [
            words[..., start : start + math.prod(shape)].reshape(*words.shape[:-1], *shape)
            for start, shape in zip(self.starts, self.shapes, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A family of directions; make one with `rademacher`, `gaussian`, `sphere` or `low_rank`.

    Attributes:
      layout: where parameters live that are split over devices; their words are then drawn where they are.
    """

    layout: Layout | None = dataclasses.field(default=None, kw_only=True)

    # Directions whose words exist at once while they are summed.
    _queries_at_once: ClassVar[int] = _UNROLLED

    def on(self, layout: Layout | None) -> "Perturbation":
        """The same directions, to the bit, for parameters that are placed so."""
        return dataclasses.replace(self, layout=layout)

    def direction(self, params: Any, key: jax.Array) -> Any:
        """The direction z that `key` names, as plain float32 arrays (zeros for leaves that are not floating)."""
        zeros = jax.tree.map(
            lambda x: jnp.zeros_like(x, jnp.float32 if _is_floating(x) else None), params
        )
        return self.add(zeros, key[None], jnp.ones(1))

    def perturb(self, params: Any, key: jax.Array, scale: Any) -> Any:
        """params + scale · z, each floating leaf a `Perturbed` array for functions under `lazily`."""
        return self.move(params, self.draw(params, key), scale)

    def draw(self, params: Any, key: jax.Array) -> Direction:
        """The direction that `key` names, for `move`: drawn once for several scales."""
        leaves = jax.tree.leaves(params)
        groups = self._groups(params)
        words: list[jax.Array | None] = [None] * len(leaves)
        # In one call, which compiles faster than many, unless they are placed.
        apart = self.layout is not None
        stream = None if apart else noise.stream(key_words(key), groups[-1].first + groups[-1].size)
        for group in groups:
            if apart:
                parts = group.draw(key_words(key))
            else:
                parts = group.split(stream[group.first : group.first + group.size])
            for i, part in zip(group.indices, parts, strict=True):
                words[i] = part
        return Direction(words, self._factor(leaves, words))

    def move(self, params: Any, direction: Direction, scale: Any) -> Any:
        """`perturb`, given the direction's words."""
        scale = jnp.asarray(scale, jnp.float32) * direction.factor
        flat, treedef = jax.tree.flatten_with_path(params)
        moved = [
            leaf if words is None else self._move_leaf(path, jnp.asarray(leaf), words, scale)
            for (path, leaf), words in zip(flat, direction.words, strict=True)
        ]
        return jax.tree.unflatten(treedef, moved)

    def combine(self, params: Any, keys: jax.Array, weights: jax.Array) -> Any:
        """Σᵢ weightsᵢ zᵢ, with the shapes and dtypes of `params`, summed in float32 leaf by leaf.

        Args:
          params: pytree; only its shapes and dtypes matter.
          keys: [q] typed PRNG keys.
          weights: float32 [q].
        """
        return self.add(jax.tree.map(jnp.zeros_like, params), keys, weights)

    def combine_with_norm(
        self, params: Any, keys: jax.Array, weights: jax.Array
    ) -> tuple[Any, jax.Array]:
        """`combine`, and the global norm of the sum, float32.

        For few directions of signs or low rank the norm comes from their inner products, which their words tell, so that no
        pass over the sum is needed and it need never exist.
        """
        total, squared = self._add(jax.tree.map(jnp.zeros_like, params), keys, weights, True)
        if squared is None:
            leaves = [x for x in jax.tree.leaves(total) if _is_floating(x)]
            squared = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)
        return total, jnp.sqrt(squared)

    def add(self, params: Any, keys: jax.Array, weights: jax.Array) -> Any:
        """params + Σᵢ weightsᵢ zᵢ, summed in float32 and rounded once: an update without a gradient buffer."""
        return self._add(params, keys, weights)[0]

    def _add(
        self, params: Any, keys: jax.Array, weights: jax.Array, with_norm: bool = False
    ) -> tuple[Any, jax.Array | None]:
        """(`add`, ‖Σᵢ weightsᵢ zᵢ‖² if it is asked for and needs no pass over the sum)."""
        flat, treedef = jax.tree.flatten_with_path(params)
        leaves = [leaf for _, leaf in flat]
        weights = jnp.asarray(weights, jnp.float32) * self._factors(params, keys)
        num_queries = weights.shape[0]
        n = min(num_queries, self._queries_at_once)
        pad = -num_queries % n
        # Words of directions with the weight 0 are drawn in vain, and change nothing.
        keys_kn2 = jnp.pad(key_words(keys), ((0, pad), (0, 0)), "edge").reshape(-1, n, 2)
        weights_kn = jnp.pad(weights, (0, pad)).reshape(-1, n)
        cheap = with_norm and num_queries == n <= _UNROLLED
        squared = jnp.zeros((), jnp.float32) if cheap else None
        for group in self._groups(params):

            def add_some(xs, keys_and_weights, group=group):
                keys_n2, weights_n = keys_and_weights
                parts = jax.vmap(group.draw)(keys_n2)
                sums = [
                    self._sum_leaf(*flat[i], words, weights_n)
                    for i, words in zip(group.indices, parts, strict=True)
                ]
                return [
                    x + total.reshape(x.shape) for x, total in zip(xs, sums, strict=True)
                ], parts

            wide = [jnp.promote_types(leaves[i].dtype, jnp.float32) for i in group.indices]
            xs = [leaves[i].astype(dtype) for i, dtype in zip(group.indices, wide, strict=True)]
            if len(weights_kn) == 1:
                keys_n2 = keys_kn2[0]
                if squared is not None:
                    # Never true, which XLA cannot know: it would draw the words of all leaves at once.
                    keys_n2 = keys_n2 ^ (squared < 0).astype(jnp.uint32)
                xs, parts = add_some(xs, (keys_n2, weights_kn[0]))
                for i, words in zip(group.indices, parts, strict=True):
                    gram = None if squared is None else self._gram_leaf(*flat[i], words)
                    if gram is None:
                        squared = None
                    else:  # rounding can take a sum of zero below it
                        squared = squared + jnp.maximum(weights @ gram @ weights, 0)
            else:
                without_words = lambda xs, x, add_some=add_some: (add_some(xs, x)[0], None)
                xs, _ = lax.scan(without_words, xs, (keys_kn2, weights_kn))
            for i, x in zip(group.indices, xs, strict=True):
                leaves[i] = self._place(flat[i][0], x.astype(leaves[i].dtype))
        return jax.tree.unflatten(treedef, leaves), squared

    def _groups(self, params: Any) -> list[_Group]:
        """The floating leaves in groups, in the order of the stream: first the small ones, all in one."""
        small, large = [], []
        for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(params)):
            if _is_floating(leaf):
                shape = self._words_shape(path, leaf)
                member = i, shape, self._words_place(path, leaf, shape)
                (large if math.prod(shape) > _LARGE_WORDS else small).append(member)
        groups, first = [], 0
        for members in [small, *([member] for member in large)]:
            together, start = [], 0
            for i, shape, place in members:
                if place is None:
                    together.append((i, shape, start))
                else:
                    size = math.prod(shape)
                    groups.append(_Group([i], [shape], [0], first + start, size, place, True))
                start += math.prod(shape)
            if together:
                parts = map(list, zip(*together, strict=True))
                groups.append(_Group(*parts, first, start, self._everywhere))
            first += start + start % 2
        return groups

    def _words_place(self, path, leaf, words_shape):
        """Puts the words of a leaf where they belong, if it is split over devices; otherwise None."""
        layout = self.layout
        if layout is None or layout.axis(path, leaf.shape) is None:
            return None
        return lambda x: layout.place(x, layout.words_spec(path, leaf, words_shape))

    def _everywhere(self, x):
        """On every device, so that XLA does not split what is cheaper to have."""
        return x if self.layout is None else self.layout.place(x, PartitionSpec())

    def _place(self, path, x):
        """A leaf where it belongs."""
        if self.layout is None:
            return x
        return self.layout.place(x, self.layout.sharding(path, x.shape).spec)

    def _factors(self, params: Any, keys: jax.Array) -> Any:
        """The factors of many directions: 1, or float32 [q]."""
        return 1

    def _factor(self, leaves: Sequence[jax.Array], words: list[jax.Array | None]) -> jax.Array:
        """The factor of a direction."""
        return jnp.ones((), jnp.float32)

    def _words_shape(self, path, leaf) -> tuple[int, ...]:
        """Shape of the words of a leaf."""
        raise NotImplementedError

    def _move_leaf(self, path, leaf, words, scale):
        """The leaf moved by scale · z, `Perturbed`."""
        raise NotImplementedError

    def _sum_leaf(self, path, leaf, words_n, weights_n):
        """Σ weights z, float32, of n directions' words [n, ...]."""
        raise NotImplementedError

    def _gram_leaf(self, path, leaf, words_n):
        """⟨zᵢ, zⱼ⟩ over a leaf, float32 [n, n], from n directions' words; None where they do not tell."""
        return None


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class _Rademacher(Perturbation):
    """Independent signs."""

    def _words_shape(self, path, leaf):
        return _sign_words_shape(leaf)

    def _move_leaf(self, path, leaf, words, scale):
        return _dense(leaf, words, scale, "rademacher")

    def _sum_leaf(self, path, leaf, words_n, weights_n):
        return _sum_signs(leaf, words_n, weights_n)

    def _gram_leaf(self, path, leaf, words_n):
        return noise.agreements(words_n, _width(leaf))


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class _Gaussian(Perturbation):
    """Independent normal entries."""

    # Each is a long program: written out for several they would take long to compile.
    _queries_at_once: ClassVar[int] = 1

    def _words_shape(self, path, leaf):
        return (*leaf.shape[:-1], noise.NORMAL_WORDS_PER_ROW)

    def _move_leaf(self, path, leaf, words, scale):
        return _dense(leaf, words, scale, "gaussian")

    def _sum_leaf(self, path, leaf, words_n, weights_n):
        return weights_n[0] * noise.normals(words_n[0], _width(leaf))


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class _Sphere(_Gaussian):
    """Uniform on the sphere of radius √d: a Gaussian direction over its norm."""

    def _factor(self, leaves, words):
        floating = [(leaf, w) for leaf, w in zip(leaves, words, strict=True) if w is not None]
        at_once = _IN_CACHE if self.layout is None else math.inf
        squares = [_sum_of_squares(w, _width(leaf), at_once) for leaf, w in floating]
        return jnp.sqrt(sum(leaf.size for leaf, _ in floating) / sum(squares))

    def _factors(self, params, keys):
        return lax.map(lambda key_2: self.draw(params, key_2).factor, key_words(keys))


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["rank", "layout"])
@dataclasses.dataclass(frozen=True)
class _LowRank(Perturbation):
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
            return noise.agreements(words_n, _width(leaf))
        # ⟨u uᵀ', v vᵀ'⟩ of every pair of directions and of their ranks, summed over a stack.
        u, v = (x.reshape(len(words_n), -1, *x.shape[-2:]) for x in self._factors_of(leaf, words_n))
        inner = lambda x: jnp.einsum("isak,jsal->ijskl", x, x)
        return jnp.sum(inner(u) * inner(v), axis=(2, 3, 4)) / self.rank


def rademacher() -> Perturbation:
    """Independent fair signs ±1: the cheapest, and ‖z‖ = √d exactly.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> z = zo_jax.rademacher().direction(jnp.zeros((2, 3)), jax.random.key(0))
    >>> z.shape, bool(jnp.all(jnp.abs(z) == 1))
    ((2, 3), True)
    """
    return _Rademacher()


def gaussian() -> Perturbation:
    """Independent standard normal entries (Nesterov and Spokoiny, 2017).

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> z = zo_jax.gaussian().direction(jnp.zeros((1000,)), jax.random.key(0))
    >>> bool(abs(jnp.std(z) - 1) < 0.1)
    True
    """
    return _Gaussian()


def sphere() -> Perturbation:
    """Uniform on the sphere of radius √d over all leaves; costs one more draw of every entry.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> z = zo_jax.sphere().direction(jnp.zeros((4, 4)), jax.random.key(0))
    >>> round(float(jnp.linalg.norm(z)), 3)
    4.0
    """
    return _Sphere()


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
    return _LowRank(rank=rank)


def by_name(name: str, rank: int = 1) -> Perturbation:
    """The family that a configuration or a ledger names: rademacher, gaussian, sphere, or low_rank of a rank."""
    families = {"rademacher": rademacher, "gaussian": gaussian, "sphere": sphere}
    return low_rank(rank) if name == "low_rank" else families[name]()


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


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf is a matrix or a stack of them, by its shape and the last name of its path."""
    return leaf.ndim >= 2 and _name(path) not in _VECTOR_NAMES


def key_words(key: jax.Array) -> jax.Array:
    """The two uint32 words of typed or raw Threefry keys, [..., 2]."""
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _name(path: tuple[Any, ...]) -> str:
    """The last named part of a leaf's path ("value" is the box of Flax NNX)."""
    names = [str(getattr(p, "key", getattr(p, "name", ""))) for p in path]
    names = [name for name in names if name and name != "value"]
    return names[-1] if names else ""


def _width(leaf: jax.Array) -> int:
    """Entries of a row; a scalar is a row of one."""
    return leaf.shape[-1] if leaf.ndim else 1


def _sign_words_shape(leaf: jax.Array) -> tuple[int, ...]:
    return (*leaf.shape[:-1], noise.sign_words_per_row(_width(leaf)))


def _dense(leaf: jax.Array, words: jax.Array, scale: jax.Array, kind: str) -> Any:
    if leaf.ndim == 0:  # too small for a lazy form
        return Dense(leaf.reshape(1), words, scale, kind, leaf.dtype).form()[0]
    return Dense(leaf, words, scale, kind, leaf.dtype)


def _sum_signs(leaf: jax.Array, words_n: jax.Array, weights_n: jax.Array) -> jax.Array:
    """Σ weights z, float32 [..., B], of sign words [n, ..., W]."""
    z = lambda words: noise.sign_bits(words, _width(leaf))
    n = len(weights_n)
    if n <= _UNROLLED:
        return sum(noise.with_signs(weights_n[i], z(words_n[i])) for i in range(n))
    add = lambda total, x: (total + noise.with_signs(x[0], z(x[1])), None)
    zero = jnp.zeros((*words_n.shape[1:-1], _width(leaf)), jnp.float32)
    return lax.scan(add, zero, (weights_n, words_n))[0]


def _sum_of_squares(words: jax.Array, width: int, at_once: float) -> jax.Array:
    """Of the normal numbers of a leaf; of a large one `at_once` entries at a time, whole rows."""
    of_rows = lambda words: jnp.sum(noise.normals(words, width) ** 2)
    if words.size // words.shape[-1] * width <= 4 * at_once:
        return of_rows(words)
    rows = words.reshape(-1, words.shape[-1])
    at_once = max(1, int(at_once) // width)
    return jnp.sum(lax.map(of_rows, rows, batch_size=at_once))
