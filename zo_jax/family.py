"""A direction as a key, and what every family of directions has in common: drawing, perturbing, summing.

A direction is a key, which names a stream of random words (`zo_jax.noise`). Every floating leaf of the parameters owns
a part of the stream, and every row of a leaf a part of that, so a stack of layers [L, ...] has fresh noise for every
layer, whether the layers are scanned or indexed. Leaves that are not floating are left alone.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from zo_jax import noise
from zo_jax.layout import Layout
from zo_jax.noise import key_words
from zo_jax.trees import is_floating

# Leaves whose name says that they are vectors, though a stack of layers [L, A] of them has the shape of a matrix.
_VECTOR_NAMES = ("bias", "scale", "b")
# A sum over directions makes one pass over a leaf for so many of them, written out: XLA fuses these.
UNROLLED = 8
# Leaves with more words than this are summed one after the other, the smaller ones together.
_LARGE_WORDS = 2**15


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
class Family:
    """A family of directions; make one with `rademacher`, `gaussian`, `sphere` or `low_rank`.

    Attributes:
      layout: where parameters live that are split over devices; their words are then drawn where they are.
    """

    layout: Layout | None = dataclasses.field(default=None, kw_only=True)

    # Directions whose words exist at once while they are summed.
    _queries_at_once: ClassVar[int] = UNROLLED

    def on(self, layout: Layout | None) -> "Family":
        """The same directions, to the bit, for parameters that are placed so."""
        return dataclasses.replace(self, layout=layout)

    def direction(self, params: Any, key: jax.Array) -> Any:
        """The direction z that `key` names, as plain float32 arrays (zeros for leaves that are not floating)."""
        zeros = jax.tree.map(
            lambda x: jnp.zeros_like(x, jnp.float32 if is_floating(x) else None), params
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
            leaves = [x for x in jax.tree.leaves(total) if is_floating(x)]
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
        cheap = with_norm and num_queries == n <= UNROLLED
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
            if is_floating(leaf):
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


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf is a matrix or a stack of them, by its shape and the last name of its path."""
    return leaf.ndim >= 2 and _name(path) not in _VECTOR_NAMES


def _name(path: tuple[Any, ...]) -> str:
    """The last named part of a leaf's path ("value" is the box of Flax NNX)."""
    names = [str(getattr(p, "key", getattr(p, "name", ""))) for p in path]
    names = [name for name in names if name and name != "value"]
    return names[-1] if names else ""


def width_of(leaf: jax.Array) -> int:
    """Entries of a row; a scalar is a row of one."""
    return leaf.shape[-1] if leaf.ndim else 1
