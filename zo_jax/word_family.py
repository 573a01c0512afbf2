"""How the families of this library keep the contract: a key names a stream of random words
(`zo_jax.noise`), of which every floating leaf owns a part and every row of a leaf a part of that,
so a stack of layers [L, ...] has fresh noise for every layer, scanned or indexed.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from zo_jax import noise
from zo_jax.family import Family, sum_of_squares, widened
from zo_jax.layout import Layout
from zo_jax.noise import key_words
from zo_jax.row_sums import RowSum
from zo_jax.spans import Entries, Leaf, Span, cut, make_spans, place_leaves
from zo_jax.trees import is_floating

# A sum over directions makes one pass over a leaf for so many of them, written out: XLA fuses
# these.
UNROLLED = 8


class Direction(NamedTuple):
    """A direction as its random words: one bit an entry for signs, less for low rank, two words a
    row for normals.

    Attributes:
      words: for each leaf of the parameters uint32 [..., W], or None where the leaf is not
        floating; float32 signs [..., 32 W] of leaves whose entries have them.
      factor: float32 scalar, of the whole direction.
    """

    words: list[jax.Array | None]
    factor: jax.Array


@dataclasses.dataclass(frozen=True)
class WordFamily(Family):
    """A family whose directions are words of a stream; each subclass says by `entries` what they
    mean for a leaf.

    Attributes:
      layout: where parameters live that are split over devices; their words are then drawn where
        they are.
    """

    layout: Layout | None = dataclasses.field(default=None, kw_only=True)

    # Directions whose words exist at once while they are summed.
    _directions_at_once: ClassVar[int] = UNROLLED

    def entries(self, params: Any) -> list[Entries]:
        """The entries of each leaf of the parameters, in order."""
        raise NotImplementedError

    def moves(self, params: Any) -> list[bool]:
        return [is_floating(leaf) for leaf in jax.tree.leaves(params)]

    def on(self, layout: Layout | None) -> "WordFamily":
        return dataclasses.replace(self, layout=layout)

    def draw(self, params: Any, key: jax.Array) -> Direction:
        words: list[jax.Array | None] = [None] * len(jax.tree.leaves(params))
        key = key_words(key)
        for span in make_spans(self._leaves(params)):
            own = self._draw(key, span)
            has_signs = any(leaf.entries.has_signs for leaf in span.leaves)
            signs = noise.signs_once(own) if has_signs else None
            for leaf, start in zip(span.leaves, span.starts, strict=True):
                words[leaf.index] = (
                    cut(signs, start, leaf.words_shape, 32)
                    if signs is not None and leaf.entries.has_signs
                    else self._words_of(leaf, key, own, start)
                )
        return Direction(words, self._factor(params, words))

    def move(self, params: Any, direction: Direction, scale: Any) -> Any:
        scale = jnp.asarray(scale, jnp.float32) * direction.factor
        leaves, treedef = jax.tree.flatten(params)
        for leaf in self._leaves(params):
            words = direction.words[leaf.index]
            assert words is not None, "the direction is of other parameters"
            leaves[leaf.index] = leaf.entries.move(jnp.asarray(leaf.value), words, scale)
        return jax.tree.unflatten(treedef, leaves)

    def add(self, params: Any, keys: jax.Array, weights: jax.Array) -> Any:
        leaves, _ = self._sums(params, keys, weights, with_norm=False)
        return self._formed(params, leaves, weights)

    def combine_with_norm(
        self, params: Any, keys: jax.Array, weights: jax.Array
    ) -> tuple[Any, jax.Array]:
        """`combine`, and the global norm of the sum, float32.

        For few directions of signs or low rank the norm comes from their inner products, which
        their words tell, so that no pass over the sum is needed and it need never exist.
        """
        leaves, squared = self.sums(params, keys, weights)
        total = self._formed(jax.tree.map(jnp.zeros_like, params), leaves, weights)
        formed = [
            x
            for x, leaf in zip(jax.tree.leaves(total), leaves, strict=True)
            if isinstance(leaf, RowSum)
        ]
        return total, jnp.sqrt(squared + sum_of_squares(formed))

    def sums(self, params: Any, keys: jax.Array, weights: jax.Array) -> tuple[list[Any], jax.Array]:
        zeros = jax.tree.map(jnp.zeros_like, params)
        leaves, squared = self._sums(zeros, keys, weights, with_norm=True)
        arrays = [x for x in leaves if not isinstance(x, RowSum)]
        return leaves, sum_of_squares(arrays) if squared is None else squared

    def _formed(self, params: Any, leaves: list[Any], weights: jax.Array) -> Any:
        """The leaves that `_sums` gives for parameters as arrays."""
        old, treedef = jax.tree.flatten(params)
        is_wanted = jnp.any(weights != 0)
        new = [
            x.added_to(p, is_wanted) if isinstance(x, RowSum) else x
            for x, p in zip(leaves, old, strict=True)
        ]
        return jax.tree.unflatten(treedef, new)

    def _sums(
        self, params: Any, keys: jax.Array, weights: jax.Array, with_norm: bool
    ) -> tuple[list[Any], jax.Array | None]:
        """(Each leaf plus Σᵢ weightsᵢ zᵢ, or the sum itself as a `RowSum`; ‖Σᵢ weightsᵢ zᵢ‖² of the
        arrays if it is asked for and the words tell it).
        """
        leaves: list[Any] = jax.tree.leaves(params)
        weights = jnp.asarray(weights, jnp.float32) * self._factors(params, keys)
        keys_kn2, weights_kn = self._chunks(key_words(keys), weights)
        few = with_norm and len(weights_kn) == 1 and len(weights) <= UNROLLED
        squared = jnp.zeros((), jnp.float32) if few else None
        # Leaves that are alike are calls of one function, which is traced once.
        of_leaves = self._leaves(params)
        count = collections.Counter(leaf.kind for leaf in of_leaves)
        functions: dict[Any, Callable[..., Any]] = {}

        def add_leaf(leaf: Leaf, *args: Any) -> tuple[jax.Array, jax.Array | None]:
            function = functools.partial(self._add_leaf, leaf)
            if self.layout is not None or count[leaf.kind] == 1:
                return function(*args)
            return functions.setdefault(leaf.kind, jax.jit(function))(*args)

        def add_directions(span, totals, squared, keys_n2, weights_n):
            if squared is not None:
                # Never true, which XLA cannot know: it would draw the words of all leaves at once.
                keys_n2 = keys_n2 ^ (squared < 0).astype(jnp.uint32)
            own_n = jax.vmap(lambda key: self._draw(key, span))(keys_n2)
            prepared = self._prepared(span, own_n, weights_n)
            sums = []
            for leaf, start, total, own in zip(
                span.leaves, span.starts, totals, prepared, strict=True
            ):
                drawn_n = keys_n2, weights_n, own_n, own
                total, squared = add_leaf(leaf, total, squared, *drawn_n, start)
                sums.append(total)
            return sums, squared

        for span in make_spans(of_leaves):
            if span.leaves[0].goes_by_rows and self.layout is None:
                leaf = span.leaves[0]
                leaves[leaf.index] = _row_sum(leaf, span.block, keys_kn2, weights_kn)
                continue
            totals = [widened(leaf.value) for leaf in span.leaves]
            if len(weights_kn) == 1:
                totals, squared = add_directions(span, totals, squared, keys_kn2[0], weights_kn[0])
            else:
                add_chunk = lambda totals, chunk, span=span: add_directions(
                    span, totals, None, *chunk
                )
                totals, _ = lax.scan(add_chunk, totals, (keys_kn2, weights_kn))
            for leaf, total in zip(span.leaves, totals, strict=True):
                leaves[leaf.index] = self._placed(leaf.path, total.astype(leaf.value.dtype))
        return leaves, squared

    def _prepared(self, span: Span, own_n: jax.Array, weights_n: jax.Array) -> list[Any]:
        """What the sum in each leaf of a span is made of; None where one is split over devices, and
        each is summed where it lives.
        """
        prepared: list[Any] = [None] * len(span.leaves)
        if any(self._words_place(leaf) for leaf in span.leaves):
            return prepared
        for entries in {leaf.entries: None for leaf in span.leaves}:
            mine = [i for i, leaf in enumerate(span.leaves) if leaf.entries == entries]
            values = [span.leaves[i].value for i in mine]
            made = entries.prepare(values, [span.starts[i] for i in mine], own_n, weights_n)
            for i, one in zip(mine, made, strict=True):
                prepared[i] = one
        return prepared

    def _add_leaf(
        self,
        leaf: Leaf,
        total: jax.Array,
        squared: jax.Array | None,
        keys_n2: jax.Array,
        weights_n: jax.Array,
        own_n: jax.Array,
        prepared: Any,
        start: Any,
    ) -> tuple[jax.Array, jax.Array | None]:
        """(total + Σ weights z in a leaf, squared + the square of that sum's norm, or None where
        the words do not tell it).
        """
        words_of = lambda key, own: self._words_of(leaf, key, own, start)
        words_n = jax.vmap(words_of)(keys_n2, own_n)  # made only if it is used
        if prepared is None:
            new = leaf.entries.total(leaf.value, words_n, weights_n)
        else:
            new = leaf.entries.total_of(leaf.value, prepared, weights_n)
        total = total + new.reshape(total.shape)
        gram = None if squared is None else leaf.entries.gram(leaf.value, words_n)
        if squared is None or gram is None:
            return total, None
        # Rounding can take a sum of zero below it.
        return total, squared + jnp.maximum(weights_n @ gram @ weights_n, 0)

    def _chunks(self, keys_q2: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [k, n, 2] and weights [k, n] of the directions that are summed at once."""
        n = min(len(weights), self._directions_at_once)
        # Words of directions with the weight 0 are drawn in vain, and change nothing.
        pad = -len(weights) % n
        keys_q2 = jnp.pad(keys_q2, ((0, pad), (0, 0)), "edge")
        return keys_q2.reshape(-1, n, 2), jnp.pad(weights, (0, pad)).reshape(-1, n)

    def _leaves(self, params: Any) -> list[Leaf]:
        return place_leaves(params, self.entries(params))

    def _draw(self, key: jax.Array, span: Span) -> jax.Array:
        """The words of a span."""
        return self._everywhere(noise.stream(key, span.size, span.first, span.block))

    def _words_of(self, leaf: Leaf, key: jax.Array, own: jax.Array, start: Any) -> jax.Array:
        """The words of a leaf where it lives, from those of its span."""
        shape, place = leaf.words_shape, self._words_place(leaf)
        if place is not None:
            return noise.table(key, shape, leaf.first, place)
        return cut(own, start, shape)

    def _words_place(self, leaf: Leaf) -> Callable[[jax.Array], jax.Array] | None:
        """Puts the words of a leaf where they belong, if they are split over devices as the leaf
        is; otherwise None.
        """
        layout = self.layout
        if layout is None or not leaf.entries.follows_leaf:
            return None
        if layout.axis(leaf.path, leaf.value.shape) is None:
            return None
        spec = layout.words_spec(leaf.path, leaf.value, leaf.words_shape)
        return lambda x: layout.place(x, spec)

    def _everywhere(self, x: jax.Array) -> jax.Array:
        """On every device, so that XLA does not split what is cheaper to have."""
        return x if self.layout is None else self.layout.everywhere(x)

    def _placed(self, path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        """A leaf where it belongs."""
        if self.layout is None:
            return x
        return self.layout.place(x, self.layout.sharding(path, x.shape).spec)

    def _factor(self, params: Any, words: Sequence[jax.Array | None]) -> jax.Array:
        """The factor of a direction."""
        del params, words
        return jnp.ones((), jnp.float32)

    def _factors(self, params: Any, keys: jax.Array) -> Any:
        """The factors of many directions: 1, or float32 [q]."""
        del params, keys
        return 1


def _row_sum(leaf: Leaf, block: Any, keys_kn2: jax.Array, weights_kn: jax.Array) -> RowSum:
    """Σ weights z of a leaf, whose words begin with a block of the stream."""
    words_per_row = leaf.words_shape[-1]

    def add(part: jax.Array, first: Any) -> jax.Array:
        num_rows = len(part)
        # The first row is even, so its words begin with a block.
        own_block = jnp.uint32(block) + first // np.uint32(2) * np.uint32(words_per_row)

        def draw(key: jax.Array) -> jax.Array:
            words = noise.stream(key, num_rows * words_per_row, 0, own_block)
            return words.reshape(num_rows, words_per_row)

        def add_chunk(total: jax.Array, chunk: Any) -> tuple[jax.Array, None]:
            keys_n2, weights_n = chunk
            return total + leaf.entries.total(part, jax.vmap(draw)(keys_n2), weights_n), None

        if len(weights_kn) == 1:
            return add_chunk(part, (keys_kn2[0], weights_kn[0]))[0]
        return lax.scan(add_chunk, part, (keys_kn2, weights_kn))[0]

    return RowSum(leaf.value.shape, leaf.value.dtype, add)
