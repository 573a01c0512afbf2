"""A family of directions: what every family promises, and how those of this library keep it.

A direction is a key. It is never stored: a family draws what is random of it, moves parameters
along it, and sums many of them again from their keys. `Family` is that contract, and all that one
of your own needs. `WordFamily` is how the families of this library keep it: a key names a stream of
random words (`zo_jax.noise`), of which every floating leaf owns a part and every row of a leaf a
part of that, so a stack of layers [L, ...] has fresh noise for every layer, scanned or indexed.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import math
from typing import Any, ClassVar, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax import noise
from zo_jax.layout import Layout
from zo_jax.noise import key_words
from zo_jax.trees import Subset, is_floating

# A sum over directions makes one pass over a leaf for so many of them, written out: XLA fuses
# these.
UNROLLED = 8
# Leaves with more words than this are summed one after the other, the smaller ones together.
_LARGE_WORDS = 2**15


class Family:
    """Directions z with E[z zᵀ] = I, so that E[⟨g, z⟩ z] = g. Each is named by a key.

    A family of your own is a class with `draw` and `move`, pure functions that work under `jit` and
    `vmap`; `add` is there for the sake of speed. If it holds arrays it is a registered pytree, as
    `jax.tree_util.register_dataclass` makes one.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> class OneCoordinate(zo_jax.Family):
    ...     '''√d e_j for a random coordinate j of a vector [d].'''
    ...     def draw(self, params, key):
    ...         return jax.random.randint(key, (), 0, params.size)
    ...     def move(self, params, j, scale):
    ...         return params.at[j].add(scale * params.size**0.5)
    >>> loss_fn = lambda w: jnp.sum(w * jnp.array([1.0, 2.0, 3.0]))
    >>> est = zo_jax.estimate_gradient(
    ...     loss_fn, jnp.zeros(3), jax.random.key(0), num_queries=999, perturbation=OneCoordinate())
    >>> bool(jnp.allclose(est.gradient, jnp.array([1.0, 2.0, 3.0]), rtol=0.2))
    True
    """

    def draw(self, params: Any, key: jax.Array) -> Any:
        """What is random of the direction that `key` names: a pytree of arrays, drawn once for all
        scales.
        """
        raise NotImplementedError(f"{type(self).__name__} must define draw(params, key)")

    def move(self, params: Any, direction: Any, scale: Any) -> Any:
        """params + scale · z, for a drawn direction; its leaves are arrays, or `Perturbed` ones
        that are not formed.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define move(params, direction, scale)"
        )

    def moves(self, params: Any) -> list[bool]:
        """For each leaf whether `move` may change it; what depends on no such leaf is evaluated
        once for all directions.
        """
        return [True] * len(jax.tree.leaves(params))

    def parts(self, params: Any) -> list[Subset] | None:
        """If each direction moves one part of the parameters alone, the parts: a loss is then
        evaluated as a function of that part, below which nothing is evaluated twice.
        """
        del params
        return None

    def part_of(self, params: Any, key: jax.Array) -> jax.Array:
        """Which of the `parts` the direction moves that `key` names, int32."""
        raise NotImplementedError(f"{type(self).__name__} has parts, and must define part_of")

    def on_part(self, params: Any, part: int) -> "Family":
        """The family, of the parameters of a part, of those directions that move it."""
        raise NotImplementedError(f"{type(self).__name__} has parts, and must define on_part")

    def start(self, params: Any) -> "Family":
        """The family at the first step of a run; one that learns has its state in it from now
        on.
        """
        del params
        return self

    def learn(self, params: Any, keys: jax.Array, projections: jax.Array) -> "Family":
        """The family at the next step, which may depend on the projections of this one.

        Args:
          params: pytree of arrays or their shapes.
          keys: [q], of the step's queries.
          projections: [q], nan where the loss was not finite.
        """
        del params, keys, projections
        return self

    def add(self, params: Any, keys: jax.Array, weights: jax.Array) -> Any:
        """params + Σᵢ weightsᵢ zᵢ, summed in float32 and rounded once: an update without a gradient
        buffer.
        """
        wide = jax.tree.map(_widened, params)

        def step(total, key_and_weight):
            key, weight = key_and_weight
            moved = self.move(total, self.draw(params, key), weight)
            form = lambda x: x.form() if hasattr(x, "form") else x
            formed = jax.tree.map(form, moved, is_leaf=lambda x: hasattr(x, "form"))
            return jax.tree.map(lambda x, old: x.astype(old.dtype), formed, total), None

        total, _ = lax.scan(step, wide, (keys, jnp.asarray(weights, jnp.float32)))
        return jax.tree.map(lambda x, p: x.astype(p.dtype) if is_floating(p) else p, total, params)

    def on(self, layout: Layout | None) -> "Family":
        """The same directions, to the bit, for parameters that are placed so."""
        del layout
        return self

    def perturb(self, params: Any, key: jax.Array, scale: Any) -> Any:
        """`move` along the direction that `key` names, for functions under `lazily`."""
        return self.move(params, self.draw(params, key), scale)

    def direction(self, params: Any, key: jax.Array) -> Any:
        """The direction that `key` names, as plain float32 arrays (zeros for leaves that are not
        floating).
        """
        zeros = jax.tree.map(
            lambda x: jnp.zeros_like(x, jnp.float32 if is_floating(x) else None), params
        )
        return self.add(zeros, key[None], jnp.ones(1))

    def combine(self, params: Any, keys: jax.Array, weights: jax.Array) -> Any:
        """Σᵢ weightsᵢ zᵢ, with the shapes and dtypes of `params`, summed in float32.

        Args:
          params: pytree of arrays or their shapes; their values do not matter.
          keys: [q] typed PRNG keys.
          weights: float32 [q].
        """
        return self.add(jax.tree.map(jnp.zeros_like, params), keys, weights)

    def combine_with_norm(
        self, params: Any, keys: jax.Array, weights: jax.Array
    ) -> tuple[Any, jax.Array]:
        """`combine`, and the global norm of the sum, float32."""
        total = self.combine(params, keys, weights)
        return total, jnp.sqrt(_sum_of_squares(total))


class Direction(NamedTuple):
    """A direction as its random words: one bit an entry for signs, less for low rank, two words a
    row for normals.

    Attributes:
      words: for each leaf of the parameters uint32 [..., W], or None where the leaf is not
        floating.
      factor: float32 scalar, of the whole direction.
    """

    words: list[jax.Array | None]
    factor: jax.Array


class Entries:
    """How the entries of a direction in one leaf come from the leaf's words; n stands for several
    directions.
    """

    # Whether the words of a leaf that is split over devices are split as it is.
    follows_leaf: ClassVar[bool] = True

    def words_shape(self, leaf: Any) -> tuple[int, ...]:
        """Of the words of a leaf."""
        raise NotImplementedError

    def move(self, leaf: jax.Array, words: jax.Array, scale: jax.Array) -> Any:
        """The leaf moved by scale · z, `Perturbed`."""
        raise NotImplementedError

    def total(self, leaf: Any, words_n: jax.Array, weights_n: jax.Array) -> jax.Array:
        """Σ weights z, float32, of words [n, ...]."""
        raise NotImplementedError

    def gram(self, leaf: Any, words_n: jax.Array) -> jax.Array | None:
        """⟨zᵢ, zⱼ⟩ over the leaf, float32 [n, n]; None where the words do not tell."""
        del leaf, words_n
        return None


class _Leaf(NamedTuple):
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


class _Span(NamedTuple):
    """Consecutive words of the stream, which are drawn at once, and the leaves that own them, in
    order.
    """

    leaves: list[_Leaf]

    @property
    def first(self) -> int:
        """Index in the stream of the first word."""
        return self.leaves[0].first

    @property
    def size(self) -> int:
        """Number of words."""
        return self.leaves[-1].first + self.leaves[-1].num_words - self.first


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
        for span in _spans(self._leaves(params)):
            for leaf, part in zip(span.leaves, self._draw(key, span), strict=True):
                words[leaf.index] = part
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
        return self._add(params, keys, weights, with_norm=False)[0]

    def combine_with_norm(
        self, params: Any, keys: jax.Array, weights: jax.Array
    ) -> tuple[Any, jax.Array]:
        """`combine`, and the global norm of the sum, float32.

        For few directions of signs or low rank the norm comes from their inner products, which
        their words tell, so that no pass over the sum is needed and it need never exist.
        """
        zeros = jax.tree.map(jnp.zeros_like, params)
        total, squared = self._add(zeros, keys, weights, with_norm=True)
        return total, jnp.sqrt(_sum_of_squares(total) if squared is None else squared)

    def _add(
        self, params: Any, keys: jax.Array, weights: jax.Array, with_norm: bool
    ) -> tuple[Any, jax.Array | None]:
        """(`add`, ‖Σᵢ weightsᵢ zᵢ‖² if it is asked for and the words tell it)."""
        leaves, treedef = jax.tree.flatten(params)
        weights = jnp.asarray(weights, jnp.float32) * self._factors(params, keys)
        keys_kn2, weights_kn = self._chunks(key_words(keys), weights)
        in_one = len(weights_kn) == 1
        few = with_norm and in_one and len(weights) <= UNROLLED
        squared = jnp.zeros((), jnp.float32) if few else None
        for span in _spans(self._leaves(params), large_alone=True):
            totals = [_widened(leaf.value) for leaf in span.leaves]
            if in_one:
                keys_n2 = keys_kn2[0]
                if squared is not None:
                    # Never true, which XLA cannot know: it would draw the words of all leaves at
                    # once.
                    keys_n2 = keys_n2 ^ (squared < 0).astype(jnp.uint32)
                words = jax.vmap(lambda key, span=span: self._draw(key, span))(keys_n2)
                totals = _add_span(span, totals, words, weights_kn[0])
                squared = _add_squares(span, squared, words, weights_kn[0])
            else:

                def add_chunk(totals, chunk, span=span):
                    keys_n2, weights_n = chunk
                    words = jax.vmap(lambda key: self._draw(key, span))(keys_n2)
                    return _add_span(span, totals, words, weights_n), None

                totals, _ = lax.scan(add_chunk, totals, (keys_kn2, weights_kn))
            for leaf, total in zip(span.leaves, totals, strict=True):
                leaves[leaf.index] = self._placed(leaf.path, total.astype(leaf.value.dtype))
        return jax.tree.unflatten(treedef, leaves), squared

    def _chunks(self, keys_q2: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [k, n, 2] and weights [k, n] of the directions that are summed at once."""
        n = min(len(weights), self._directions_at_once)
        # Words of directions with the weight 0 are drawn in vain, and change nothing.
        pad = -len(weights) % n
        keys_q2 = jnp.pad(keys_q2, ((0, pad), (0, 0)), "edge")
        return keys_q2.reshape(-1, n, 2), jnp.pad(weights, (0, pad)).reshape(-1, n)

    def _leaves(self, params: Any) -> list[_Leaf]:
        """The floating leaves in the order of the stream: the small ones without a gap, then the
        large ones, each from a whole block of two words on.
        """
        flat = jax.tree.leaves_with_path(params)
        of_leaf = zip(range(len(flat)), flat, self.entries(params), strict=True)
        leaves = [_Leaf(i, *x, entries) for i, x, entries in of_leaf if is_floating(x[1])]
        placed, first = [], 0
        for leaf in sorted(leaves, key=lambda leaf: leaf.is_large):
            first += first % 2 if leaf.is_large else 0
            placed.append(leaf._replace(first=first))
            first += leaf.num_words
        return placed

    def _draw(self, key: jax.Array, span: _Span) -> list[jax.Array]:
        """The words of each leaf of a span, each where its leaf lives."""
        own = self._everywhere(noise.stream(key, span.size, span.first))
        words = []
        for leaf in span.leaves:
            shape, place = leaf.words_shape, self._words_place(leaf)
            if place is not None:
                words.append(noise.table(key, shape, leaf.first, place))
            else:
                start = leaf.first - span.first
                words.append(own[start : start + leaf.num_words].reshape(shape))
        return words

    def _words_place(self, leaf: _Leaf) -> Callable[[jax.Array], jax.Array] | None:
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


def _spans(leaves: list[_Leaf], large_alone: bool = False) -> list[_Span]:
    """The stream in parts, each of which is drawn at once.

    A part is all leaves, or those of one subtree, as it takes the fewest programs: XLA compiles one
    for each draw and each leaf, but the same one for the leaves of subtrees that are alike, such as
    layers written out. Large leaves can be parts of their own, so that their words need not exist
    together.
    """
    if large_alone:
        small = [leaf for leaf in leaves if not leaf.is_large]
        return [*_spans(small), *(_Span([leaf]) for leaf in leaves if leaf.is_large)]

    def num_programs(spans: list[_Span]) -> int:
        kinds = {tuple(leaf.words_shape for leaf in span.leaves) for span in spans}
        return len(spans) + sum(map(len, kinds))

    def subtrees(depth: int) -> list[_Span]:
        parts = itertools.groupby(leaves, key=lambda leaf: leaf.path[:depth])
        return [_Span(list(part)) for _, part in parts]

    depths = range(1 + max((len(leaf.path) for leaf in leaves), default=0))
    return min(map(subtrees, depths), key=num_programs)


def _add_span(
    span: _Span, totals: list[jax.Array], words: list[jax.Array], weights_n: jax.Array
) -> list[jax.Array]:
    """totals + Σ weights z of each leaf of a span."""
    sums = [
        leaf.entries.total(leaf.value, words_n, weights_n)
        for leaf, words_n in zip(span.leaves, words, strict=True)
    ]
    return [x + total.reshape(x.shape) for x, total in zip(totals, sums, strict=True)]


def _add_squares(
    span: _Span, squared: jax.Array | None, words: list[jax.Array], weights_n: jax.Array
) -> jax.Array | None:
    """squared + ‖Σ weights z‖² over the leaves of a span, or None where the words do not tell."""
    for leaf, words_n in zip(span.leaves, words, strict=True):
        gram = None if squared is None else leaf.entries.gram(leaf.value, words_n)
        if squared is None or gram is None:
            return None
        # Rounding can take a sum of zero below it.
        squared = squared + jnp.maximum(weights_n @ gram @ weights_n, 0)
    return squared


def _widened(leaf: Any) -> Any:
    """A floating leaf in float32 or better."""
    if not is_floating(leaf):
        return leaf
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _sum_of_squares(tree: Any) -> jax.Array:
    leaves = [_widened(x) for x in jax.tree.leaves(tree) if is_floating(x)]
    return sum((jnp.sum(jnp.square(x)) for x in leaves), jnp.zeros(()))
