"""Rules for look-ups and for layers put in a stack: indices that are out of bounds do what they do
to the formed array.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from zo_jax.composed import Stack
from zo_jax.perturbed import Cast, Dense, Factored, Perturbed
from zo_jax.rules import is_perturbed, rule_for


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
    """`part` looked up along an axis, which the axes of the indices replace in front; zero where
    they are out of bounds.
    """
    n = indices.ndim - 1
    numbers = lax.GatherDimensionNumbers(tuple(range(n, n + part.ndim - 1)), (axis,), (axis,))
    sizes = (*part.shape[:axis], 1, *part.shape[axis + 1 :])
    return lax.gather(part, indices, numbers, sizes, mode=mode, fill_value=0)


@rule_for(Dense, lax.gather_p)
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


@rule_for(Factored, lax.gather_p)
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


@rule_for((Dense, Factored, Cast), lax.scatter_p)
def _scatter_layers(operand, indices, updates, **params):
    numbers, ndim = params["dimension_numbers"], operand.ndim
    if not _is_stack(updates) or is_perturbed(operand) or is_perturbed(indices):
        return NotImplemented
    one_by_one = (tuple(range(1, ndim)), (0,), (updates.shape[0], 1))
    at_once = (tuple(range(ndim)), (), (1,))
    layout = numbers.update_window_dims, numbers.inserted_window_dims, indices.shape
    sets_layers = (
        layout in (one_by_one, at_once)
        and updates.shape[1:] == operand.shape[1:]
        and numbers.scatter_dims_to_operand_dims == (0,)
    )
    if not sets_layers:
        return NotImplemented
    # The positions are scattered as the layers would be: what is out of bounds or there twice comes
    # out the same.
    size, num_updates = operand.shape[0], updates.shape[0]
    windows, inserted = ((), (0,)) if layout == one_by_one else ((0,), ())
    position = lax.scatter(
        jnp.full(size, -1, jnp.int32),
        indices,
        jnp.arange(num_updates, dtype=jnp.int32),
        lax.ScatterDimensionNumbers(windows, inserted, (0,)),
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
    )
    first, are_last = size - num_updates, False
    if isinstance(indices, np.ndarray):
        wanted = np.arange(first, size)[:, None] if layout == one_by_one else [first]
        are_last = np.array_equal(indices, wanted)
    return Stack(operand, position, updates, first if are_last else None)


@rule_for((Dense, Factored, Cast), lax.concatenate_p)
def _append_layers(*parts, dimension):
    *known, last = parts
    if dimension != 0 or not known or not _is_stack(last):
        return NotImplemented
    first = sum(part.shape[0] for part in known)
    base = lax.concatenate([*known, jnp.zeros(last.shape, last.dtype)], 0)
    position = jnp.arange(base.shape[0], dtype=jnp.int32) - first
    return Stack(base, jnp.maximum(position, -1), last, first)


def _is_stack(x: Any) -> bool:
    return is_perturbed(x) and x.ndim > 1 and x.layers() is not None
