"""Directions made from a backprop gradient: the guided half of Instruct.

Formulas: the reference script of "Zeroth Order Optimization for Pretraining Language Models",
ICPRAM 2025. d is the number of coordinates, ‖·‖ the norm over all leaves together.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp

from zo_jax.estimators import typed_key
from zo_jax.families import gaussian
from zo_jax.family import Family
from zo_jax.layout import Layout
from zo_jax.trees import is_floating, tree_dot

METHODS = ("hybrid", "gram_schmidt")
# Coordinates of a leaf that are looked at at once, and of a partial sum of them.
_CHUNK, _ROW = 2**18, 2**9
# A gradient of at most this norm guides nothing.
MIN_NORM = 1e-12


class Support(NamedTuple):
    """A set of coordinates: those whose |g| has bits above `bits`, and of those that equal it the
    first `num_ties`.

    Attributes:
      bits: uint32, the bits of a float32.
      tie_end: uint32, the index in all coordinates (leaf after leaf) before which ties are in.
    """

    bits: jax.Array
    tie_end: jax.Array


def largest_coordinates(gradient: Any, fraction: jax.Array) -> Support:
    """The smallest set of coordinates, largest |g| first, with at least `fraction` of the energy Σ
    g².

    Exact, ties included: floats of one sign are ordered as their bits are, so 31 halvings of the
    range of bits find the smallest
    |g| in the set, and where it stands more than once as many halvings of the indices find the last one in. A
    halving is one fused pass over the gradient; nothing of its size is written.

    Args:
      gradient: pytree of floating arrays.
      fraction: float32 scalar in [0, 1].
    """  # noqa: E501
    leaves = _leaves(gradient)
    wanted = fraction * _energy_from(leaves, jnp.uint32(0))
    bits = _largest(lambda bits: _energy_from(leaves, bits) >= wanted, 31)
    above = _energy_from(leaves, bits + jnp.uint32(1))
    value = lax.bitcast_convert_type(bits, jnp.float32)
    num_ties = jnp.ceil((wanted - above) / jnp.maximum(value**2, jnp.finfo(jnp.float32).tiny))
    enough = num_ties.astype(jnp.uint32)
    # The largest end before which there are fewer ties than wanted is the index of the last one in.
    last = lax.cond(
        _count_ties(leaves, value, jnp.uint32(2**32 - 1)) <= enough,
        lambda: jnp.uint32(2**32 - 2),
        lambda: _largest(lambda end: _count_ties(leaves, value, end) < enough, 32),
    )
    return Support(bits, last + 1)


def _largest(holds: Callable[[jax.Array], jax.Array], num_bits: int) -> jax.Array:
    """The largest number below 2 ** num_bits, uint32, for which a condition holds that holds for
    all numbers below it.
    """

    def set_bit(i, low):
        candidate = low | (jnp.uint32(1) << (jnp.uint32(num_bits - 1) - i.astype(jnp.uint32)))
        return jnp.where(holds(candidate), candidate, low)

    return lax.fori_loop(0, num_bits, set_bit, jnp.uint32(0))


def _energy_from(leaves: list[jax.Array], bits: jax.Array) -> jax.Array:
    """Σ x² of the coordinates whose |x| has at least these bits."""
    value = lax.bitcast_convert_type(bits, jnp.float32)
    energy = lambda x, _: jnp.where(jnp.abs(x) >= value, x * x, 0)
    return sum((_sum_in_chunks(energy, x, 0) for x in leaves), jnp.zeros(()))


def _count_ties(leaves: list[jax.Array], value: jax.Array, end: jax.Array) -> jax.Array:
    """How many coordinates before an index have this |x|, uint32."""
    is_in = lambda x, index: ((jnp.abs(x) == value) & (index < end)).astype(jnp.uint32)
    offsets = itertools.accumulate((x.size for x in leaves), initial=0)
    counts = (_sum_in_chunks(is_in, x, i) for x, i in zip(leaves, offsets, strict=False))
    return sum(counts, jnp.uint32(0))


def in_support(gradient: Any, support: Support) -> Any:
    """For each leaf, which coordinates are in the set: a pytree of bool arrays."""
    leaves, treedef = jax.tree.flatten(gradient)
    masks, offset = [], 0
    for leaf in leaves:
        bits = _bits(jnp.asarray(leaf, jnp.float32))
        tied = (bits == support.bits) & (_indices(leaf, offset) < support.tie_end)
        masks.append((bits > support.bits) | tied)
        offset += leaf.size
    return jax.tree.unflatten(treedef, masks)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["gradient", "cosine", "noise_scale", "norm", "support"],
    meta_fields=["method", "layout"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Guided(Family):
    """A family of directions around a gradient, to be used in the trace in which it is made.

    Attributes:
      gradient: pytree like the parameters; leaves that are not floating guide nothing.
      cosine: float32 scalar, as `instruct_directions` has it after clipping.
      noise_scale: float32 scalar.
      method: "hybrid" or "gram_schmidt".
      norm: float32 scalar, of the gradient.
      support: of the hybrid directions, else None.
    """

    gradient: Any
    cosine: jax.Array
    noise_scale: jax.Array
    method: str
    norm: jax.Array
    support: Support | None
    layout: Layout | None = None

    def on(self, layout: Layout | None) -> "Guided":
        return dataclasses.replace(self, layout=layout)

    def draw(self, params: Any, key: jax.Array) -> list[jax.Array | None]:
        """The direction itself, float32, leaf by leaf; None where the gradient is not floating."""
        del params
        g = _leaves(self.gradient)
        n = _leaves(gaussian().on(self.layout).direction(g, key))
        if self.support is not None:
            scale = self.noise_scale * self.norm / math.sqrt(sum(x.size for x in g))
            masks = in_support(g, self.support)
            z = [jnp.where(m, g, scale * n) for m, g, n in zip(masks, g, n, strict=True)]
        else:
            along = tree_dot(n, g) / jnp.maximum(self.norm**2, jnp.finfo(jnp.float32).tiny)
            u = [n - along * g for n, g in zip(n, g, strict=True)]
            sine = jnp.sqrt(1 - self.cosine**2) * self.norm / jnp.sqrt(tree_dot(u, u))
            z = [self.cosine * g + sine * u for g, u in zip(g, u, strict=True)]
        z = iter(z)
        return [next(z) if is_floating(x) else None for x in jax.tree.leaves(self.gradient)]

    def move(self, params: Any, direction: list[jax.Array | None], scale: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)

        def move_leaf(p, z):
            if z is None or not is_floating(p):
                return p
            return (p.astype(jnp.promote_types(p.dtype, jnp.float32)) + scale * z).astype(p.dtype)

        return jax.tree.unflatten(treedef, map(move_leaf, leaves, direction))


def _leaves(gradient: Any) -> list[jax.Array]:
    """The floating leaves of a gradient, float32."""
    return [jnp.asarray(g, jnp.float32) for g in jax.tree.leaves(gradient) if is_floating(g)]


def guided(
    gradient: Any, cosine_target: Any = 0.9, noise_scale: Any = 0.5, method: str = "hybrid"
) -> Guided:
    """The family of directions around a gradient; see `instruct_directions`.

    Raises:
      ValueError: the method does not exist, or a cosine target that is known here is outside [-1,
        1].

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> loss_fn, params = lambda p: jnp.sum(p**2), jnp.array([3.0, 0.0, 4.0])
    >>> family = zo_jax.guided(jax.grad(loss_fn)(params), method="gram_schmidt")
    >>> est = zo_jax.estimate_gradient(loss_fn, params, jax.random.key(0), perturbation=family)
    >>> g, a = 2 * params, est.gradient
    >>> bool(a @ g > 0.8 * jnp.linalg.norm(a) * jnp.linalg.norm(g))
    True
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if not isinstance(cosine_target, Tracer) and not -1 <= float(cosine_target) <= 1:
        raise ValueError(f"cosine_target must be in [-1, 1], got {cosine_target!r}")
    if not isinstance(noise_scale, Tracer) and not 0 <= float(noise_scale) < math.inf:
        raise ValueError(f"noise_scale must be finite and at least 0, got {noise_scale!r}")
    cosine = jnp.asarray(cosine_target, jnp.float32)
    support = None
    if method == "hybrid":
        cosine = jnp.clip(jnp.abs(cosine), 0.9, 0.9999)
        support = largest_coordinates(gradient, cosine**2)
    else:
        cosine = jnp.clip(cosine, -0.9999, 0.9999)
    leaves = _leaves(gradient)
    norm = jnp.sqrt(tree_dot(leaves, leaves))
    return Guided(gradient, cosine, jnp.asarray(noise_scale, jnp.float32), method, norm, support)


def instruct_directions(
    gradient: Any,
    key: jax.Array,
    num_queries: int,
    cosine_target: Any = 0.9,
    noise_scale: Any = 0.5,
    method: str = "hybrid",
) -> Any:
    """Directions that a backprop gradient g guides.

    - hybrid: g_j on the smallest set S of coordinates, largest |g_j| first, with Σ_S g_j² ≥ m²
      ‖g‖², m = clip(|c|, 0.9, 0.9999); elsewhere independent N(0, (s ‖g‖ / √d)²).
    - gram_schmidt: c g + √(1 - c²) ‖g‖ u, with u a random unit vector orthogonal to g: its cosine
      to g is c, in [-0.9999, 0.9999].

    They are made one after the other under `lax.map`. Their sum or their effect on a loss needs but
    one at a time: `guided` is the same as a family of directions, for `estimate_gradient(...,
    perturbation=guided(gradient))`.

    Args:
      gradient: pytree of floating arrays.
      key: a PRNG key; direction i draws from `jax.random.split(key, num_queries)[i]`.
      num_queries: q.
      cosine_target: c.
      noise_scale: s.
      method: "hybrid" or "gram_schmidt".

    Returns:
      Like `gradient`, float32, with a leading axis q.

    Raises:
      ValueError: as `guided`.

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> g = jnp.array([3.0, -0.1, 0.2, 4.0])
    >>> z = zo_jax.instruct_directions(g, jax.random.key(0), 2, noise_scale=0.0)
    >>> (z + 0.0).tolist()
    [[3.0, 0.0, 0.0, 4.0], [3.0, 0.0, 0.0, 4.0]]
    """
    family = guided(gradient, cosine_target, noise_scale, method)
    keys = jax.random.split(typed_key(key), num_queries)
    return lax.map(lambda key: family.direction(gradient, key), keys)


def _sum_in_chunks(function: Any, x: jax.Array, offset: int) -> jax.Array:
    """Σ function(x, index) over a leaf whose first index is `offset`, a cache's worth at a time.

    XLA would write the terms of a long sum to memory first, and takes what is the same in every
    turn of an outer loop out of it, as a copy of the leaf; from a chunk's slice it can do neither.
    """
    x = x.reshape(-1)

    def part(start, size):
        terms = function(
            lax.dynamic_slice_in_dim(x, start, size),
            start.astype(jnp.uint32) + lax.iota(jnp.uint32, size) + jnp.uint32(offset),
        )
        return jnp.sum(jnp.sum(terms.reshape(-1, _ROW), axis=1) if size % _ROW == 0 else terms)

    num_chunks, rest = divmod(x.size, _CHUNK)
    total = part(jnp.int32(x.size - rest), rest) if rest else 0
    if num_chunks:
        parts = lax.map(lambda i: part(i * _CHUNK, _CHUNK), jnp.arange(num_chunks))
        total += jnp.sum(parts)
    return jnp.asarray(total)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of |x|, uint32: ordered as |x| is."""
    return lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)


def _indices(leaf: jax.Array, offset: int) -> jax.Array:
    """The index of each coordinate in all of them, uint32, of the shape of the leaf."""
    return lax.iota(jnp.uint32, leaf.size).reshape(leaf.shape) + jnp.uint32(offset)
