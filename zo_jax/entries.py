"""Rules for what changes the entries of an array one by one, or moves them about: casts, scalars,
slices, axes.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives
import jax.numpy as jnp
import numpy as np

from zo_jax.composed import Transposed
from zo_jax.perturbed import Cast, Dense, Factored, Perturbed
from zo_jax.rules import apply_rule, is_perturbed, register_rule, rule_for


@rule_for(Perturbed, lax.copy_p, primitives.name_p)
def _same(x, **_):
    return x


@rule_for(Perturbed, primitives.stop_gradient_p)
def _stop_gradient(x, **_):
    return jax.tree.map(lax.stop_gradient, x)


@rule_for(Perturbed, lax.convert_element_type_p)
def _convert(x, *, new_dtype, **_):
    return x.cast(new_dtype) if jnp.issubdtype(new_dtype, jnp.floating) else NotImplemented


# What a scalar does to a sum it does to both terms; but a sum that was rounded first is formed.
def _is_a_sum(x: Perturbed) -> bool:
    return x.dtype == x.base.dtype and jnp.finfo(x.dtype).bits >= 16


@rule_for((Dense, Factored), lax.mul_p)
def _mul(a, b, **_):
    x, factor = (a, b) if is_perturbed(a) else (b, a)
    if jnp.ndim(factor) or not _is_a_sum(x):
        return NotImplemented
    scale = x.scale * jnp.asarray(factor, jnp.float32)
    return dataclasses.replace(x, base=x.base * factor, scale=scale)


@rule_for((Dense, Factored), lax.div_p)
def _div(x, divisor, **_):
    if not is_perturbed(x) or jnp.ndim(divisor) or not _is_a_sum(x):
        return NotImplemented
    scale = x.scale / jnp.asarray(divisor, jnp.float32)
    return dataclasses.replace(x, base=x.base / divisor, scale=scale)


@rule_for((Dense, Factored), lax.neg_p)
def _neg(x, **_):
    return dataclasses.replace(x, base=-x.base, scale=-x.scale)


@rule_for((Dense, Factored), primitives.sharding_constraint_p)
def _constrain(x, **params):
    # The direction is drawn where the family says; XLA moves it to the base.
    base = primitives.sharding_constraint_p.bind(x.base, **params)
    return dataclasses.replace(x, base=base)


@rule_for(Perturbed, lax.split_p)
def _split(x, *, sizes, axis):
    parts, start = [], 0
    for size in map(int, sizes):
        starts, limits = [0] * x.ndim, list(x.shape)
        starts[axis], limits[axis] = start, start + size
        params = dict(start_indices=tuple(starts), limit_indices=tuple(limits), strides=None)
        parts.append(apply_rule(lax.slice_p, [x], params))
        start += size
    return NotImplemented if any(part is NotImplemented for part in parts) else parts


# Rearranging: a dense array by whole rows, a factored one along the axes of each factor.


@rule_for(Dense, lax.slice_p)
def _slice_rows(x, *, start_indices, limit_indices, strides):
    strides = strides or (1,) * x.ndim
    if (start_indices[-1], limit_indices[-1], strides[-1]) != (0, x.shape[-1], 1):
        return NotImplemented
    limits = lambda part: (*limit_indices[:-1], part.shape[-1])
    return x.on_rows(lambda part: lax.slice(part, start_indices, limits(part), strides))


@rule_for(Factored, lax.slice_p)
def _slice_factors(x, *, start_indices, limit_indices, strides):
    strides = strides or (1,) * x.ndim

    def part(factor, axes):
        at = lambda values, last: (*(values[a] for a in axes), last)
        rank = factor.shape[-1]
        limits = at(limit_indices, rank)
        return lax.slice(factor, at(start_indices, 0), limits, at(strides, 1)), axes

    return x.on_parts(lax.slice(x.base, start_indices, limit_indices, strides), part)


def _dynamic_slice(x: jax.Array, starts: Sequence[Any], sizes: Sequence[int]) -> jax.Array:
    # The primitive itself: `lax.dynamic_slice` counts negative starts from the end, which the
    # function did already.
    return lax.dynamic_slice_p.bind(x, *starts, slice_sizes=tuple(sizes))


@rule_for(Dense, lax.dynamic_slice_p)
def _dynamic_slice_rows(x, *starts, slice_sizes, **_):
    if slice_sizes[-1] != x.shape[-1] or len(starts) != x.ndim:
        return NotImplemented
    sizes = lambda part: (*slice_sizes[:-1], part.shape[-1])
    return x.on_rows(lambda part: _dynamic_slice(part, starts, sizes(part)))


@rule_for(Factored, lax.dynamic_slice_p)
def _dynamic_slice_factors(x, *starts, slice_sizes, **_):
    if len(starts) != x.ndim:
        return NotImplemented

    def part(factor, axes):
        sizes = (*(slice_sizes[a] for a in axes), factor.shape[-1])
        zero = jnp.zeros((), jnp.result_type(starts[0]))
        return _dynamic_slice(factor, (*(starts[a] for a in axes), zero), sizes), axes

    return x.on_parts(_dynamic_slice(x.base, starts, slice_sizes), part)


@rule_for(Dense, lax.squeeze_p)
def _squeeze_rows(x, *, dimensions):
    if x.ndim - 1 in dimensions:
        return NotImplemented
    return x.on_rows(lambda part: lax.squeeze(part, dimensions))


@rule_for(Factored, lax.squeeze_p)
def _squeeze_factors(x, *, dimensions):
    kept = [a for a in range(x.ndim) if a not in dimensions]

    def part(factor, axes):
        gone = [i for i, a in enumerate(axes) if a in dimensions]
        return lax.squeeze(factor, gone), tuple(kept.index(a) for a in axes if a in kept)

    return x.on_parts(lax.squeeze(x.base, dimensions), part)


@rule_for(Dense, lax.rev_p)
def _reverse_rows(x, *, dimensions):
    if x.ndim - 1 in dimensions:
        return NotImplemented
    return x.on_rows(lambda part: lax.rev(part, dimensions))


@rule_for(Factored, lax.rev_p)
def _reverse_factors(x, *, dimensions):
    part = lambda factor, axes: (
        lax.rev(factor, [i for i, a in enumerate(axes) if a in dimensions]),
        axes,
    )
    return x.on_parts(lax.rev(x.base, dimensions), part)


@rule_for(Dense, lax.transpose_p)
def _transpose_rows(x, *, permutation):
    if permutation[-1] == x.ndim - 1:
        return x.on_rows(lambda part: lax.transpose(part, permutation))
    return Transposed(x, tuple(permutation))


@rule_for(Factored, lax.transpose_p)
def _transpose_factors(x, *, permutation):
    part = lambda factor, axes: (factor, tuple(permutation.index(a) for a in axes))
    return x.on_parts(lax.transpose(x.base, permutation), part)


@rule_for(Transposed, lax.transpose_p)
def _transpose_again(x, *, permutation):
    permutation = tuple(x.permutation[axis] for axis in permutation)
    is_same = permutation == tuple(range(x.ndim))
    return x.array if is_same else Transposed(x.array, permutation)


@rule_for(Dense, lax.reshape_p)
def _reshape_rows(x, *_, new_sizes, dimensions, **params):
    if dimensions is not None or not new_sizes or new_sizes[-1] != x.shape[-1]:
        return NotImplemented
    return x.on_rows(lambda part: part.reshape(*new_sizes[:-1], part.shape[-1]))


@rule_for(Factored, lax.reshape_p)
def _reshape_factors(x, *_, new_sizes, dimensions, **params):
    groups = _groups_of_axes(x.shape, new_sizes)
    # A factor has all axes of a group or none: what was merged varies along all of it.
    is_whole = lambda axes, old: len({a in axes for a in old}) <= 1
    if dimensions is not None or not all(
        is_whole(axes, old) for old, _ in groups for axes in (x.u_axes, x.v_axes)
    ):
        return NotImplemented

    def part(factor, axes):
        new = tuple(a for old, new in groups if old and old[0] in axes for a in new)
        return factor.reshape(*(new_sizes[a] for a in new), factor.shape[-1]), new

    return x.on_parts(x.base.reshape(new_sizes), part)


def _groups_of_axes(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The axes of two shapes of one size in the smallest groups that a reshape turns into each
    other.
    """
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        olds, news, sizes = [], [], [1, 1]
        while True:
            # The shorter side goes on; one that begins with an axis of size 1 is a group of its
            # own.
            if i < len(old) and (sizes[0] < sizes[1] or not (olds or news) or j == len(new)):
                sizes[0] *= old[i]
                olds.append(i)
                i += 1
            else:
                sizes[1] *= new[j]
                news.append(j)
                j += 1
            if sizes[0] == sizes[1]:
                break
        groups.append((olds, news))
    return groups


@rule_for(Dense, lax.broadcast_in_dim_p)
def _broadcast_rows(x, *dynamic, shape, broadcast_dimensions, **_):
    if dynamic or x.ndim == 0 or math.prod(shape) != x.size:
        return NotImplemented  # noise would be drawn again for every copy
    if broadcast_dimensions[-1] != len(shape) - 1:
        return NotImplemented
    return x.on_rows(
        lambda part: lax.broadcast_in_dim(part, (*shape[:-1], part.shape[-1]), broadcast_dimensions)
    )


@rule_for(Factored, lax.broadcast_in_dim_p)
def _broadcast_factors(x, *dynamic, shape, broadcast_dimensions, **_):
    if dynamic:
        return NotImplemented
    grows = [x.shape[a] != shape[new] for a, new in enumerate(broadcast_dimensions)]

    def part(factor, axes):
        gone = [i for i, a in enumerate(axes) if grows[a]]
        kept = tuple(broadcast_dimensions[a] for a in axes if not grows[a])
        return lax.squeeze(factor, gone), kept

    return x.on_parts(lax.broadcast_in_dim(x.base, shape, broadcast_dimensions), part)


def _holds(dtype: Any, number: Any) -> bool:
    """Whether a number that fills gaps is one of a floating dtype: none, nan, or the same in it."""
    return number is None or number != number or np.asarray(number, dtype) == number


def _inside(primitive: core.Primitive, x: Cast, *operands, **params):
    """What moves entries about can be done before the cast."""
    if not is_perturbed(x) or not _holds(x.array.dtype, params.get("fill_value")):
        return NotImplemented
    result = apply_rule(primitive, [x.array, *operands], params)
    if result is NotImplemented:
        return NotImplemented
    return result.cast(x.dtype) if is_perturbed(result) else result.astype(x.dtype)


for _primitive in (
    *(lax.slice_p, lax.dynamic_slice_p, lax.squeeze_p, lax.rev_p, lax.reshape_p, lax.gather_p),
    *(lax.broadcast_in_dim_p, lax.transpose_p, primitives.sharding_constraint_p),
):
    register_rule(_primitive, Cast)(functools.partial(_inside, _primitive))
