"""Directions that move one group of the parameters each, as often as its gradient is worth it.

Of a group g with d_g parameters and a gradient of norm n_g an estimate along q_g directions of that
group alone has the variance d_g n_g² / q_g. If an evaluation along one of them costs k_g, the sum
over the groups is least, at a given cost, for q_g proportional to √(d_g / k_g) n_g, and then it is
(Σ √(d_g k_g) n_g)², where directions of all parameters at once have d n² (with k = 1): less, unless
all groups have the same gradient per coordinate.

Which group a direction moves is drawn, with a probability p_g, and the direction is 1 / √p_g times
one of the group: so E[z zᵀ] = I whatever p is, and the estimate is unbiased. The norms are learned
from projections: along a direction of group g the mean of c² p_g is n_g².
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from zo_jax.family import Family
from zo_jax.groups import Groups, OfGroups, base_of, check_groups, find_groups, put_moved, sizes_of
from zo_jax.tiers import Tiers, sort_into_tiers
from zo_jax.trees import Subset

# This part of the queries is not shared out by norms: half of it by sizes, so that no direction
# goes further than √(2 / part) times as far as one of all parameters, half evenly, so that every
# group is looked at.
_EXPLORED = 0.1
# Queries that the guess "all coordinates alike" counts for.
_PRIOR_QUERIES = 1.0
# Projections that are not learned from: sums of squares of larger ones overflow.
_LARGEST = 1e16
# Folded into a query's key for the word that chooses its group.
_CHOICE = 0x67726F75


class Norms(NamedTuple):
    """What a run has learned.

    Attributes:
      squares: float32 [G], the sum of c² p over each group's queries, earlier steps discounted.
      counts: float32 [G], the number of these queries, discounted so too.
      ends: float32 [G], p_1 + .. + p_g.
    """

    squares: jax.Array
    counts: jax.Array
    ends: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grouped(OfGroups):
    """See `grouped`.

    Attributes:
      base: the family of the directions of a group.
      norms: what is learned; None before `start`.
      groups, costs, memory: as in `grouped`.
      tiers: of the rows of leaves that `counts` of `grouped` names.
    """

    base: Family
    norms: Norms | None
    groups: Groups = dataclasses.field(metadata={"static": True})
    costs: tuple[tuple[str, float], ...] = dataclasses.field(metadata={"static": True})
    memory: float = dataclasses.field(metadata={"static": True})
    tiers: Tiers = dataclasses.field(default=(), metadata={"static": True})

    def start(self, params: Any) -> "Grouped":
        return dataclasses.replace(self, norms=self._first(params))

    def learn(self, params: Any, keys: jax.Array, projections: jax.Array) -> "Grouped":
        norms = self._norms(params)
        group = jax.vmap(lambda key: _choose(norms.ends, key))(keys)
        usable = jnp.abs(projections) < _LARGEST  # false of nan
        c = jnp.where(usable, projections, 0).astype(jnp.float32)
        p = _probabilities(norms.ends)
        is_in_GQ = (jnp.arange(len(p))[:, None] == group[None]) & usable[None]
        keep = 1 - 1 / self.memory
        squares = jnp.sum(jnp.where(is_in_GQ, (c**2)[None], 0), axis=1) * p
        squares = keep * norms.squares + squares
        counts = keep * norms.counts + jnp.sum(is_in_GQ, axis=1)
        new = _learned(squares, counts, *self._sizes_and_costs(params))
        return dataclasses.replace(self, norms=new)

    def shares(self, params: Any) -> dict[str, jax.Array]:
        """The part of the queries that each group has, by its name, float32 scalars."""
        names = [name for name, _ in self._found(params)]
        return dict(zip(names, _probabilities(self._norms(params).ends), strict=True))

    def gradient_norms(self, params: Any) -> dict[str, jax.Array]:
        """What is known of the norm of each group's gradient, by its name, float32 scalars."""
        norms = self._norms(params)
        squared = _squared_norms(norms.squares, norms.counts, self._sizes_and_costs(params)[0])
        names = [name for name, _ in self._found(params)]
        return dict(zip(names, jnp.sqrt(squared), strict=True))

    def parts(self, params: Any) -> list[Subset]:
        return [subset for _, subset in self._found(params)]

    def part_of(self, params: Any, key: jax.Array) -> jax.Array:
        return _choose(self._norms(params).ends, key)

    def on_part(self, params: Any, part: int) -> Family:
        p = _probabilities(self._norms(params).ends)[part]
        return _Times(self.base, lax.rsqrt(p))

    def draw(self, params: Any, key: jax.Array) -> Any:
        own = [self.base.draw(part.select(params), key) for part in self.parts(params)]
        return self.part_of(params, key), own

    def move(self, params: Any, direction: Any, scale: Any) -> Any:
        which, own = direction
        leaves, treedef = jax.tree.flatten(params)
        p = _probabilities(self._norms(params).ends)
        for i, (part, drawn) in enumerate(zip(self.parts(params), own, strict=True)):
            size = jnp.where(which == i, scale * lax.rsqrt(p[i]), 0)
            put_moved(leaves, part, self.base.move(part.select(params), drawn, size))
        return jax.tree.unflatten(treedef, leaves)

    def _found(self, params: Any) -> list[tuple[str, Subset]]:
        return find_groups(self.groups, params, self.tiers)

    def summands(
        self, params: Any, keys: jax.Array, weights: jax.Array
    ) -> list[tuple[Subset, jax.Array, jax.Array]]:
        ends = self._norms(params).ends
        p = _probabilities(ends)
        group = jax.vmap(lambda key: _choose(ends, key))(keys)
        own = lambda i: jnp.where(group == i, weights * lax.rsqrt(p[i]), 0)  # 0 for the others'
        return [(part, keys, own(i)) for i, part in enumerate(self.parts(params))]

    def _first(self, params: Any) -> Norms:
        sizes, costs = self._sizes_and_costs(params)
        zeros = jnp.zeros(len(sizes), jnp.float32)
        return _learned(zeros, zeros, sizes, costs)

    def _norms(self, params: Any) -> Norms:
        norms = self.norms if self.norms is not None else self._first(params)
        count = len(self._found(params))
        if norms.ends.shape != (count,):
            raise ValueError(
                f"the family learned the norms of {norms.ends.shape[0]} groups, but the parameters "
                f"have {count}; start it with them: family.start(params)"
            )
        return norms

    def _sizes_and_costs(self, params: Any) -> tuple[np.ndarray, np.ndarray]:
        found = self._found(params)
        costs = dict(self.costs)
        if unknown := costs.keys() - {name for name, _ in found}:
            raise ValueError(
                f"costs has {min(unknown)!r}, which is no group; the groups are "
                f"{', '.join(name for name, _ in found)}"
            )
        own = [costs.get(name, 1.0) for name, _ in found]
        return sizes_of(found, params), np.array(own, np.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Times(Family):
    """The directions of another family times a factor."""

    base: Family
    factor: jax.Array

    def draw(self, params: Any, key: jax.Array) -> Any:
        return self.base.draw(params, key)

    def move(self, params: Any, direction: Any, scale: Any) -> Any:
        return self.base.move(params, direction, scale * self.factor)

    def moves(self, params: Any) -> list[bool]:
        return self.base.moves(params)


def grouped(
    groups: Groups = "layers",
    perturbation: Family | str = "rademacher",
    *,
    counts: Mapping[str, Any] | None = None,
    costs: Mapping[str, float] | None = None,
    memory: float = 50.0,
) -> Grouped:
    """Directions of one group of the parameters each, with queries shared out by what is learned of
    the groups' gradients.

    A query moves one group, drawn with a probability proportional to √(d / k) n: d its number of
    parameters, k its cost, n the norm of its gradient, for the variance that is least at equal
    cost. The estimate is unbiased whatever is learned. Before anything is, the shares go by the
    sizes, and the variance is that of directions of all parameters; a tenth of the queries stays
    shared out by size and evenly. Groups above the first layers cost less, for what lies below a
    group is evaluated once for all queries, or where these are fewer than two a group once for
    both sides of a query (with `parallel_batch_size` 1). Where that is most of an evaluation, say
    so by `costs`. The loss is compiled once for each group.

    The family is a value, and `learn` returns the next one. `zeroth_order` and the program keep it
    in their states, and so does `Update`, given it at the start: `update.init(params,
    estimator.start(params))`; so a run resumes and replays exactly. In a loop of your own: `family
    = estimator.learn(params, key, estimate.projections)`.

    Args:
      groups: "layers": every layer of a stack (or of a list) is a group, and every other top-level
        entry of the parameters; "leaves": every leaf, of a stack all layers together; or a function
        (path, leaf) -> the name of the group of a leaf, or the names of those of the layers of a
        stack [L, ...].
      perturbation: the family of directions inside a group, or its name.
      counts: of leaves whose rows have groups of their own, by how often each row is used: the path
        of a leaf [R, ...] -> [R] numbers. Its groups are the 64 rows that are used most, the next
        up to 512, to 4,096, to 32,768 and so on, named path/0, path/1, ... Of an embedding of many
        tokens nearly all of the gradient is in the first: `{"wte/embedding": np.bincount(tokens,
        minlength=R)}`, tokens those of the training text.
      costs: of an evaluation along a direction of a group, by the group's name; 1 for the others.
      memory: steps that what is learned reaches back.

    Raises:
      ValueError: an argument is out of range; or, from any use, `costs` names no group, `counts` no
        leaf or another number of rows than it has, or `groups` returns another number of names than
        a stack has layers.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> params = {"blocks": {"w": jnp.zeros((2, 3, 3))}, "head": jnp.zeros((3, 4))}
    >>> loss_fn = lambda p: jnp.sum(p["head"]) + 0.1 * jnp.sum(p["blocks"]["w"])
    >>> estimator = zo_jax.Estimator(num_queries=16)
    >>> family = zo_jax.grouped().start(params)
    >>> for i in range(20):
    ...     key = jax.random.key(i)
    ...     _, c = zo_jax.project(loss_fn, params, key, estimator=estimator, perturbation=family)
    ...     family = family.learn(params, estimator.keys(key), c)
    >>> {name: bool(share > 0.5) for name, share in family.shares(params).items()}
    {'blocks/0': False, 'blocks/1': False, 'head': True}
    """
    base = base_of(perturbation)
    check_groups(groups)
    costs = dict(costs or {})
    if bad := [name for name, cost in costs.items() if not 0 < cost < float("inf")]:
        raise ValueError(f"costs must be finite and above 0, got {costs[bad[0]]!r} of {bad[0]}")
    if not 1 < memory < float("inf"):
        raise ValueError(f"memory must be finite and above 1 step, got {memory!r}")
    pairs = tuple(sorted((name, float(cost)) for name, cost in costs.items()))
    return Grouped(base, None, groups, pairs, float(memory), sort_into_tiers(counts or {}))


def _choose(ends: jax.Array, key: jax.Array) -> jax.Array:
    """The group of a query, int32, by a word of its key."""
    word = jax.random.key_data(jax.random.fold_in(key, _CHOICE))[0]
    uniform = (word >> 8).astype(jnp.float32) * jnp.float32(2**-24)
    return jnp.minimum(jnp.sum(uniform >= ends, dtype=jnp.int32), len(ends) - 1)


def _probabilities(ends: jax.Array) -> jax.Array:
    return jnp.diff(ends, prepend=0.0)


def _learned(squares: jax.Array, counts: jax.Array, sizes: np.ndarray, costs: np.ndarray) -> Norms:
    """The shares for what is known of the norms."""
    wanted = jnp.sqrt(_squared_norms(squares, counts, sizes) * sizes / costs)
    shared = wanted / jnp.sum(wanted)
    fixed = 0.5 * sizes / np.sum(sizes) + 0.5 / len(sizes)
    p = (1 - _EXPLORED) * shared + _EXPLORED * fixed
    ends = jnp.cumsum(p)
    return Norms(squares, counts, (ends / ends[-1]).astype(jnp.float32))


def _squared_norms(squares: jax.Array, counts: jax.Array, sizes: np.ndarray) -> jax.Array:
    # Where nothing is known all coordinates are taken to be alike.
    known = jnp.sum(squares)
    per_coordinate = jnp.where(known > 0, known / jnp.maximum(jnp.sum(counts * sizes), 1), 1)
    return (squares + _PRIOR_QUERIES * per_coordinate * sizes) / (counts + _PRIOR_QUERIES)
