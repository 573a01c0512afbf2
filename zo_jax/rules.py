"""What primitives do with perturbed arrays, without forming them: a registry of rules, and those for moving entries about.

The rules for products are in `zo_jax.products`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives
import jax.numpy as jnp

from zo_jax.perturbed import Cast, Dense, Factored, Perturbed, Stack, Transposed

Rule = Callable[..., Any]

_rules: dict[tuple[core.Primitive, type[Perturbed]], Rule] = {}


def register_rule(primitive: core.Primitive, kind: type[Perturbed]) -> Callable[[Rule], Rule]:
    """A decorator that makes a function what `primitive` does with perturbed arrays of a class, and of classes derived from it.

    The function is called as `rule(*operands, **params)`: the operands as they stand, one of which is of that class and the
    others arrays, and the parameters of the primitive. It returns the result, an array or a `Perturbed` one (a sequence of them
    if the primitive has several results), of the shape and dtype that the primitive gives; or NotImplemented, upon which the
    rule of the next class in the order of inheritance is asked, and where there is none the array is formed. The rules of the
    library can be replaced in the same way.

    Args:
      primitive: such as `jax.lax.conv_general_dilated_p`.
      kind: `Dense`, `LowRank`, `Perturbed` (for all), or a class of one's own.

    Raises:
      ValueError: one of the two is something else.

    A convolution over single pixels is a product over channels, for which a low-rank kernel need not be formed:

    >>> import jax, jax.numpy as jnp, zo_jax
    >>> from jax import lax
    >>> @zo_jax.register_rule(lax.conv_general_dilated_p, zo_jax.LowRank)
    ... def over_single_pixels(image, kernel, *, dimension_numbers, feature_group_count, **params):
    ...     out_axis, in_axis, *space = dimension_numbers.rhs_spec
    ...     is_product = all(kernel.shape[i] == 1 for i in space) and (in_axis, out_axis) == (2, 3)
    ...     if not isinstance(kernel, zo_jax.LowRank) or not is_product or feature_group_count > 1:
    ...         return NotImplemented
    ...     conv = lambda x, k: lax.conv_general_dilated_p.bind(
    ...         x, k, dimension_numbers=dimension_numbers, feature_group_count=1, **params)
    ...     inner = conv(image, kernel.u.astype(image.dtype))
    ...     v = jnp.swapaxes(kernel.v, 2, 3).astype(image.dtype)
    ...     one = dict(params, window_strides=(1, 1), padding=((0, 0), (0, 0)), lhs_dilation=(1, 1))
    ...     outer = lax.conv_general_dilated_p.bind(
    ...         inner, v, dimension_numbers=dimension_numbers, feature_group_count=1, **one)
    ...     return conv(image, kernel.base) + (kernel.scale * outer).astype(image.dtype)
    >>> loss = lambda kernel, image: jnp.sum(
    ...     lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    >>> kernel = zo_jax.low_rank(1).perturb(jnp.ones((1, 1, 4, 8)), jax.random.key(0), 0.5)
    >>> with zo_jax.record_formed() as formed:
    ...     lazy = zo_jax.lazily(loss)(kernel, jnp.ones((1, 3, 3, 4)))
    >>> formed, bool(jnp.allclose(lazy, loss(kernel.form(), jnp.ones((1, 3, 3, 4))), rtol=1e-5))
    ([], True)
    """
    if not isinstance(primitive, core.Primitive):
        raise ValueError(
            f"a rule needs a primitive such as jax.lax.dot_general_p, got {primitive!r}; jax.make_jaxpr shows "
            "which ones a function uses"
        )
    if not (isinstance(kind, type) and issubclass(kind, Perturbed)):
        raise ValueError(f"a rule needs zo_jax.Perturbed or a class derived from it, got {kind!r}")

    def register(rule: Rule) -> Rule:
        _rules[primitive, kind] = rule
        return rule

    return register


def is_perturbed(x: Any) -> bool:
    return isinstance(x, Perturbed)


def apply_rule(primitive: core.Primitive, operands: Sequence[Any], params: dict[str, Any]) -> Any:
    """What the rules make of the operands, one of them perturbed; or NotImplemented."""
    (kind,) = (type(x) for x in operands if is_perturbed(x))
    for base in kind.__mro__:
        rule = _rules.get((primitive, base))
        result = NotImplemented if rule is None else rule(*operands, **params)
        if result is not NotImplemented:
            return result
    return NotImplemented


def _rule(
    kinds: type[Perturbed] | tuple[type[Perturbed], ...], *of: core.Primitive
) -> Callable[[Rule], Rule]:
    """`register_rule` for several."""

    def register(rule: Rule) -> Rule:
        for kind in kinds if isinstance(kinds, tuple) else (kinds,):
            for primitive in of:
                register_rule(primitive, kind)(rule)
        return rule

    return register


@_rule(Perturbed, lax.copy_p, primitives.name_p)
def _same(x, **_):
    return x


@_rule(Perturbed, primitives.stop_gradient_p)
def _stop_gradient(x, **_):
    return jax.tree.map(lax.stop_gradient, x)


@_rule(Perturbed, lax.convert_element_type_p)
def _convert(x, *, new_dtype, **_):
    return x.cast(new_dtype) if jnp.issubdtype(new_dtype, jnp.floating) else NotImplemented


# What a scalar does to a sum it does to both terms; but a sum that was rounded first is formed.
def _is_a_sum(x: Perturbed) -> bool:
    return x.dtype == x.base.dtype and jnp.finfo(x.dtype).bits >= 16


@_rule((Dense, Factored), lax.mul_p)
def _mul(a, b, **_):
    x, factor = (a, b) if is_perturbed(a) else (b, a)
    if jnp.ndim(factor) or not _is_a_sum(x):
        return NotImplemented
    scale = x.scale * jnp.asarray(factor, jnp.float32)
    return dataclasses.replace(x, base=x.base * factor, scale=scale)


@_rule((Dense, Factored), lax.div_p)
def _div(x, divisor, **_):
    if not is_perturbed(x) or jnp.ndim(divisor) or not _is_a_sum(x):
        return NotImplemented
    scale = x.scale / jnp.asarray(divisor, jnp.float32)
    return dataclasses.replace(x, base=x.base / divisor, scale=scale)


@_rule((Dense, Factored), lax.neg_p)
def _neg(x, **_):
    return dataclasses.replace(x, base=-x.base, scale=-x.scale)


@_rule((Dense, Factored), primitives.sharding_constraint_p)
def _constrain(x, **params):
    # The direction is drawn where the family says; XLA moves it to the base.
    base = primitives.sharding_constraint_p.bind(x.base, **params)
    return dataclasses.replace(x, base=base)


@_rule(Perturbed, lax.split_p)
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


@_rule(Dense, lax.slice_p)
def _slice_rows(x, *, start_indices, limit_indices, strides):
    strides = strides or (1,) * x.ndim
    if (start_indices[-1], limit_indices[-1], strides[-1]) != (0, x.shape[-1], 1):
        return NotImplemented
    limits = lambda part: (*limit_indices[:-1], part.shape[-1])
    return x.on_rows(lambda part: lax.slice(part, start_indices, limits(part), strides))


@_rule(Factored, lax.slice_p)
def _slice_factors(x, *, start_indices, limit_indices, strides):
    strides = strides or (1,) * x.ndim

    def part(factor, axes):
        at = lambda values, last: (*(values[a] for a in axes), last)
        rank = factor.shape[-1]
        limits = at(limit_indices, rank)
        return lax.slice(factor, at(start_indices, 0), limits, at(strides, 1)), axes

    return x.on_parts(lax.slice(x.base, start_indices, limit_indices, strides), part)


def _dynamic_slice(x: jax.Array, starts: Sequence[Any], sizes: Sequence[int]) -> jax.Array:
    # The primitive itself: `lax.dynamic_slice` counts negative starts from the end, which the function did already.
    return lax.dynamic_slice_p.bind(x, *starts, slice_sizes=tuple(sizes))


@_rule(Dense, lax.dynamic_slice_p)
def _dynamic_slice_rows(x, *starts, slice_sizes, **_):
    if slice_sizes[-1] != x.shape[-1] or len(starts) != x.ndim:
        return NotImplemented
    sizes = lambda part: (*slice_sizes[:-1], part.shape[-1])
    return x.on_rows(lambda part: _dynamic_slice(part, starts, sizes(part)))


@_rule(Factored, lax.dynamic_slice_p)
def _dynamic_slice_factors(x, *starts, slice_sizes, **_):
    if len(starts) != x.ndim:
        return NotImplemented

    def part(factor, axes):
        sizes = (*(slice_sizes[a] for a in axes), factor.shape[-1])
        zero = jnp.zeros((), jnp.result_type(starts[0]))
        return _dynamic_slice(factor, (*(starts[a] for a in axes), zero), sizes), axes

    return x.on_parts(_dynamic_slice(x.base, starts, slice_sizes), part)


@_rule(Dense, lax.squeeze_p)
def _squeeze_rows(x, *, dimensions):
    if x.ndim - 1 in dimensions:
        return NotImplemented
    return x.on_rows(lambda part: lax.squeeze(part, dimensions))


@_rule(Factored, lax.squeeze_p)
def _squeeze_factors(x, *, dimensions):
    kept = [a for a in range(x.ndim) if a not in dimensions]

    def part(factor, axes):
        gone = [i for i, a in enumerate(axes) if a in dimensions]
        return lax.squeeze(factor, gone), tuple(kept.index(a) for a in axes if a in kept)

    return x.on_parts(lax.squeeze(x.base, dimensions), part)


@_rule(Dense, lax.rev_p)
def _reverse_rows(x, *, dimensions):
    if x.ndim - 1 in dimensions:
        return NotImplemented
    return x.on_rows(lambda part: lax.rev(part, dimensions))


@_rule(Factored, lax.rev_p)
def _reverse_factors(x, *, dimensions):
    part = lambda factor, axes: (
        lax.rev(factor, [i for i, a in enumerate(axes) if a in dimensions]),
        axes,
    )
    return x.on_parts(lax.rev(x.base, dimensions), part)


@_rule(Dense, lax.transpose_p)
def _transpose_rows(x, *, permutation):
    if permutation[-1] == x.ndim - 1:
        return x.on_rows(lambda part: lax.transpose(part, permutation))
    return Transposed(x, tuple(permutation))


@_rule(Factored, lax.transpose_p)
def _transpose_factors(x, *, permutation):
    part = lambda factor, axes: (factor, tuple(permutation.index(a) for a in axes))
    return x.on_parts(lax.transpose(x.base, permutation), part)


@_rule(Transposed, lax.transpose_p)
def _transpose_again(x, *, permutation):
    permutation = tuple(x.permutation[axis] for axis in permutation)
    is_same = permutation == tuple(range(x.ndim))
    return x.array if is_same else Transposed(x.array, permutation)


@_rule(Dense, lax.reshape_p)
def _reshape_rows(x, *_, new_sizes, dimensions, **params):
    if dimensions is not None or not new_sizes or new_sizes[-1] != x.shape[-1]:
        return NotImplemented
    return x.on_rows(lambda part: part.reshape(*new_sizes[:-1], part.shape[-1]))


@_rule(Factored, lax.reshape_p)
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
    """The axes of two shapes of one size in the smallest groups that a reshape turns into each other."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        olds, news, sizes = [], [], [1, 1]
        while True:
            # The shorter side goes on; one that begins with an axis of size 1 is a group of its own.
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


@_rule(Dense, lax.broadcast_in_dim_p)
def _broadcast_rows(x, *dynamic, shape, broadcast_dimensions, **_):
    if dynamic or x.ndim == 0 or math.prod(shape) != x.size:
        return NotImplemented  # noise would be drawn again for every copy
    if broadcast_dimensions[-1] != len(shape) - 1:
        return NotImplemented
    return x.on_rows(
        lambda part: lax.broadcast_in_dim(part, (*shape[:-1], part.shape[-1]), broadcast_dimensions)
    )


@_rule(Factored, lax.broadcast_in_dim_p)
def _broadcast_factors(x, *dynamic, shape, broadcast_dimensions, **_):
    if dynamic:
        return NotImplemented
    grows = [x.shape[a] != shape[new] for a, new in enumerate(broadcast_dimensions)]

    def part(factor, axes):
        gone = [i for i, a in enumerate(axes) if grows[a]]
        kept = tuple(broadcast_dimensions[a] for a in axes if not grows[a])
        return lax.squeeze(factor, gone), kept

    return x.on_parts(lax.broadcast_in_dim(x.base, shape, broadcast_dimensions), part)


# Look-ups: indices that are out of bounds do what they do to the formed array.


def _looked_up_axis(x: Perturbed, indices: jax.Array, params: dict[str, Any]) -> int | None:
    """The axis along which a gather takes whole slices, if it is such a look-up."""
    numbers, sizes = params["dimension_numbers"], tuple(params["slice_sizes"])
    if len(numbers.start_index_map) != 1 or indices.shape[-1] != 1:
        return None
    (axis,) = numbers.start_index_map
    is_look_up = (
        numbers.collapsed_slice_dims == (axis,)
        and sizes == (*x.shape[:axis], 1, *x.shape[axis + 1 :])
        and not numbers.operand_batching_dims
    )
    return axis if is_look_up else None


def _take(part: jax.Array, axis: int, indices: jax.Array, mode: Any) -> jax.Array:
    """`part` looked up along an axis, which the axes of the indices replace in front; zero where they are out of bounds."""
    n = indices.ndim - 1
    numbers = lax.GatherDimensionNumbers(tuple(range(n, n + part.ndim - 1)), (axis,), (axis,))
    sizes = (*part.shape[:axis], 1, *part.shape[axis + 1 :])
    return lax.gather(part, indices, numbers, sizes, mode=mode, fill_value=0)


@_rule(Dense, lax.gather_p)
def _gather_rows(x, indices, **params):
    axis = _looked_up_axis(x, indices, params) if is_perturbed(x) else None
    offsets = params["dimension_numbers"].offset_dims
    ndim = indices.ndim + x.ndim - 2
    if axis in (None, x.ndim - 1) or ndim - 1 not in offsets:
        return NotImplemented

    def look_up(part):
        sizes = (*params["slice_sizes"][:-1], part.shape[-1])
        fill = params["fill_value"] if part is x.base else 0
        return lax.gather_p.bind(part, indices, **params | dict(slice_sizes=sizes, fill_value=fill))

    rows = x.on_rows(look_up)
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return rows
    is_in = _take(jnp.ones(x.shape[axis], bool), 0, indices, params["mode"])
    along = [d for d in range(ndim) if d not in offsets]
    is_in = lax.broadcast_in_dim(is_in, rows.shape, along)
    return jnp.where(is_in, rows.form(), rows.base.astype(x.dtype))


@_rule(Factored, lax.gather_p)
def _gather_factors(x, indices, **params):
    axis = _looked_up_axis(x, indices, params) if is_perturbed(x) else None
    num_factors = (axis in x.u_axes) + (axis in x.v_axes)
    if axis is None or num_factors == 0:
        return NotImplemented
    offsets = params["dimension_numbers"].offset_dims
    along = [d for d in range(indices.ndim - 1 + len(offsets)) if d not in offsets]
    others = [a for a in range(x.ndim) if a != axis]

    def part(factor, axes):
        kept = tuple(offsets[others.index(a)] for a in axes if a != axis)
        if axis not in axes:
            return factor, kept
        return _take(factor, axes.index(axis), indices, params["mode"]), (*along, *kept)

    rows = x.on_parts(lax.gather_p.bind(x.base, indices, **params), part)
    # Rows of a matrix are few, and used one by one; whole matrices stay as they are.
    return rows.form() if num_factors == 1 else rows


@_rule((Dense, Factored, Cast), lax.scatter_p)
def _scatter_layers(operand, indices, updates, **params):
    numbers = params["dimension_numbers"]
    sets_layers = (
        is_perturbed(updates)
        and not (is_perturbed(operand) or is_perturbed(indices))
        and updates.layers() is not None
        and updates.shape[1:] == operand.shape[1:]
        and indices.shape == (updates.shape[0], 1)
        and numbers.update_window_dims == tuple(range(1, operand.ndim))
        and numbers.inserted_window_dims == (0,)
        and numbers.scatter_dims_to_operand_dims == (0,)
    )
    if not sets_layers:
        return NotImplemented
    # The positions are scattered as the layers would be: what is out of bounds or there twice comes out the same.
    position = lax.scatter(
        jnp.full(operand.shape[0], -1, jnp.int32),
        indices,
        jnp.arange(updates.shape[0], dtype=jnp.int32),
        lax.ScatterDimensionNumbers((), (0,), (0,)),
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
    )
    return Stack(operand, position, updates)


def _inside(primitive: core.Primitive, x: Cast, *operands, **params):
    """What moves entries about can be done before the cast."""
    if not is_perturbed(x) or params.get("fill_value") is not None:
        return NotImplemented  # a number of the wide dtype
    result = apply_rule(primitive, [x.array, *operands], params)
    if result is NotImplemented:
        return NotImplemented
    return result.cast(x.dtype) if is_perturbed(result) else result.astype(x.dtype)


for _primitive in (
    *(lax.slice_p, lax.dynamic_slice_p, lax.squeeze_p, lax.rev_p, lax.reshape_p, lax.gather_p),
    *(lax.broadcast_in_dim_p, lax.transpose_p, primitives.sharding_constraint_p),
):
    register_rule(_primitive, Cast)(functools.partial(_inside, _primitive))
