"""Which words of a direction's stream are whose, and which are drawn at once."""

from collections.abc import Sequence
import itertools
import math
from typing import Any, ClassVar, NamedTuple

import jax
from jax import lax
import numpy as np

from zo_jax import noise
from zo_jax.trees import is_floating

# Leaves with more words than this are summed one after the other, the smaller ones together.
_LARGE_WORDS = 2**15
# Leaves of so many entries are summed block by block of their rows.
_LARGE_ENTRIES = 2**20
# Of the smaller ones so many words are drawn at once, of every direction. A second part would have
# programs of its own: with half as many words 24 layers written out compile a quarter longer.
_WORDS_AT_ONCE = 2**18


class Entries:
    """How the entries of a direction in one leaf come from the leaf's words; n stands for several
    directions.
    """

    # Whether the words of a leaf that is split over devices are split as it is.
    follows_leaf: ClassVar[bool] = True
    # Whether each row of entries comes from a row of words.
    by_rows: ClassVar[bool] = True
    # Whether a leaf moves along signs that exist, rather than along words; the leaf is small, or
    # has fewer signs than entries.
    has_signs: bool = False

    def words_shape(self, leaf: Any) -> tuple[int, ...]:
        """Of the words of a leaf."""
        raise NotImplementedError

    def move(self, leaf: jax.Array, words: jax.Array, scale: jax.Array) -> Any:
        """The leaf moved by scale · z, `Perturbed`; `words` are float32 signs [..., 32 W] where
        `has_signs`.
        """
        raise NotImplementedError

    def total(self, leaf: Any, words_n: jax.Array, weights_n: jax.Array) -> jax.Array:
        """Σ weights z, float32, of words [n, ...]."""
        raise NotImplementedError

    def prepare(
        self, leaves: Sequence[Any], starts: Sequence[Any], words_n: jax.Array, weights_n: jax.Array
    ) -> list[Any]:
        """What the sum in each of the leaves of a span with such entries is made of.

        Args:
          leaves: the leaves.
          starts: of their words among those of the span.
          words_n: of the span, [n, S].
          weights_n: float32 [n].
        """
        del weights_n
        placed = zip(leaves, starts, strict=True)
        return [cut(words_n, start, self.words_shape(leaf)) for leaf, start in placed]

    def total_of(self, leaf: Any, prepared: Any, weights_n: jax.Array) -> jax.Array:
        """`total`, from what `prepare` made."""
        return self.total(leaf, prepared, weights_n)

    def gram(self, leaf: Any, words_n: jax.Array) -> jax.Array | None:
        """⟨zᵢ, zⱼ⟩ over the leaf, float32 [n, n]; None where the words do not tell."""
        del leaf, words_n
        return None


def cut(x: jax.Array, start: Any, shape: tuple[int, ...], per_word: int = 1) -> jax.Array:
    """A leaf's part, [..., *shape], of what was made of the words of a span, [..., S * per_word]:
    `per_word` numbers of each word, side by side.
    """
    *rows, width = shape
    size = math.prod(shape) * per_word
    if x.shape[-1] != size:
        if per_word != 1:
            start = start * per_word
        x = lax.dynamic_slice_in_dim(x, start, size, axis=-1)
    return x.reshape(*x.shape[:-1], *rows, width * per_word)


class Leaf(NamedTuple):
    """A floating leaf: its place among all leaves, its path, itself, its share of a direction, and
    the index in the stream of its first word.
    """

    index: int
    path: tuple[Any, ...]
    value: Any
    entries: Entries
    first: int = 0

    @property
    def words_shape(self) -> tuple[int, ...]:
        return self.entries.words_shape(self.value)

    @property
    def num_words(self) -> int:
        return math.prod(self.words_shape)

    @property
    def is_large(self) -> bool:
        return self.num_words > _LARGE_WORDS

    @property
    def is_alone(self) -> bool:
        """Whether its words are drawn apart from those of other leaves."""
        return self.is_large or self.goes_by_rows

    @property
    def goes_by_rows(self) -> bool:
        """Whether the leaf is summed block by block of its rows."""
        has_rows = self.entries.by_rows and math.prod(self.value.shape[:-1]) > 1
        return has_rows and self.value.size >= _LARGE_ENTRIES and self.first % 2 == 0

    @property
    def kind(self) -> tuple[Any, ...]:
        """The same for leaves whose programs differ in the place of their words alone."""
        return self.entries, self.value.shape, self.value.dtype


class Span(NamedTuple):
    """Consecutive words of the stream, which are drawn at once, and the leaves that own them, in
    order.

    Attributes:
      leaves: the owners.
      starts: of the words of each leaf, counted from the first one of the span.
      block: `first // 2`.
    """

    leaves: list[Leaf]
    starts: list[Any]
    block: Any

    @property
    def first(self) -> int:
        """Index in the stream of the first word."""
        return self.leaves[0].first

    @property
    def size(self) -> int:
        """Number of words."""
        return self.leaves[-1].first + self.leaves[-1].num_words - self.first


def place_leaves(params: Any, entries: Sequence[Entries]) -> list[Leaf]:
    """The floating leaves in the order of the stream: the small ones without a gap, then the large
    ones, each from a whole block of two words on.
    """
    flat = jax.tree.leaves_with_path(params)
    of_leaf = zip(range(len(flat)), flat, entries, strict=True)
    leaves = [Leaf(i, *x, entries) for i, x, entries in of_leaf if is_floating(x[1])]
    placed, first = [], 0
    for leaf in sorted(leaves, key=lambda leaf: leaf.is_large):
        first += first % 2 if leaf.is_large else 0
        placed.append(leaf._replace(first=first))
        first += leaf.num_words
    return placed


def make_spans(leaves: list[Leaf]) -> list[Span]:
    """The stream in parts, each of which is drawn at once.

    A large leaf is a part of its own, so that the words of large leaves need not exist together.
    Where the words of a leaf begin is `opaque` if others are like it.
    """
    parts: list[list[Leaf]] = []
    for leaf in leaves:
        fits = parts and leaf.first + leaf.num_words - parts[-1][0].first <= _WORDS_AT_ONCE
        if fits and not leaf.is_alone and not parts[-1][-1].is_alone:
            parts[-1].append(leaf)
        else:
            parts.append([leaf])

    spans = []
    for part in parts:
        places = [
            leaf.first // 2 if len(part) == 1 else leaf.first - part[0].first for leaf in part
        ]
        spans.append((part, places))
    places = iter(_opaque_where_alike(leaves, [place for _, places in spans for place in places]))
    result = []
    for part, of_leaves in spans:
        numbers = [next(places) for _ in of_leaves]
        if len(part) == 1:
            result.append(Span(part, [0], numbers[0]))
        else:
            result.append(Span(part, numbers, part[0].first // 2))
    return result


def _opaque_where_alike(leaves: list[Leaf], places: list[int]) -> list[Any]:
    """A number for each leaf, as XLA does not know it where the leaves of a subtree differ from
    those of another in these numbers alone, as in layers written out.
    """

    def subtrees(depth: int) -> list[list[int]]:
        key = lambda i: (leaves[i].is_alone, leaves[i].path[:depth])
        return [list(part) for _, part in itertools.groupby(range(len(leaves)), key)]

    def num_programs(parts: list[list[int]]) -> int:
        kinds = {(leaves[i].kind, places[i] - places[part[0]]) for part in parts for i in part}
        return len(parts) + len(kinds)

    depths = range(1 + max((len(leaf.path) for leaf in leaves), default=0))
    parts = min(map(subtrees, depths), key=num_programs)
    if len(parts) <= 2:
        return places
    bases = noise.opaque([places[part[0]] for part in parts])
    return [
        # Places begin again with each span.
        lax.add(base, np.uint32((places[i] - places[part[0]]) % 2**32))
        for part, base in zip(parts, bases, strict=True)
        for i in part
    ]
