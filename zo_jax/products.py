"""Products with perturbed arrays: what `dot_general` does with them.

Axes are labelled as in einsum: a label is a number, shared by the axes of both operands that are
contracted or go along.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax.composed import Transposed
from zo_jax.perturbed import Cast, Dense, Factored, sum_dtype
from zo_jax.rules import apply_rule, is_perturbed, rule_for

# A product with a larger table of rows goes block by block: the perturbed rows stay in cache and no
# perturbed copy of the table exists. Entries of a block: 4 MB in float32.
_BLOCK_ENTRIES = 2**20
MIN_BLOCKED = 4 * _BLOCK_ENTRIES

# Entries of an array whose product with a vector is worth a program of its own.
_WORTH_A_PROGRAM = 2**17

# The label of the rank.
_R = -1
# And of two columns where there is one.
_PAIR = -2


class _Labels(NamedTuple):
    """The labels of a product's operands and result."""

    lhs: list[int]
    rhs: list[int]
    out: list[int]


def _labels(lhs_ndim: int, rhs_ndim: int, dimension_numbers: Any) -> _Labels:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    lhs, rhs = list(range(lhs_ndim)), list(range(lhs_ndim, lhs_ndim + rhs_ndim))
    for i, j in zip((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch), strict=True):
        rhs[j] = lhs[i]
    out = [lhs[i] for i in lhs_batch]
    out += [a for a in lhs if a not in rhs] + [a for a in rhs if a not in lhs]
    return _Labels(lhs, rhs, out)


@rule_for(Factored, lax.dot_general_p)
def _product_with_factors(lhs, rhs, **params):
    """x (W + s u vᵀ) = x W + s (x u) vᵀ, if the change costs less than the product."""
    x, other = (lhs, rhs) if is_perturbed(lhs) else (rhs, lhs)
    if x is lhs and other.ndim - 1 in params["dimension_numbers"][0][1]:
        return _with_matrix_last(lhs, rhs, **params)
    labels = _labels(lhs.ndim, rhs.ndim, params["dimension_numbers"])
    x_labels, other_labels = (labels.lhs, labels.rhs) if x is lhs else (labels.rhs, labels.lhs)
    # What is rounded to fewer than 16 bits is another array than its terms.
    if jnp.finfo(x.dtype).bits < 16 or not jnp.issubdtype(other.dtype, jnp.floating):
        return NotImplemented

    sizes = dict(zip((*x_labels, *other_labels), (*x.shape, *other.shape), strict=True))
    sizes[_R] = x.u.shape[-1]
    count = lambda *of: math.prod(sizes[a] for a in {a for labels in of for a in labels})
    u_labels = [*(x_labels[a] for a in x.u_axes), _R]
    v_labels = [*(x_labels[a] for a in x.v_axes), _R]
    first_then_second = []
    for first, second in ((u_labels, v_labels), (v_labels, u_labels)):
        inner = [a for a in _union(other_labels, first) if a in labels.out or a in second]
        first_then_second.append((count(other_labels, first) + count(inner, second), inner))
    u_is_first = first_then_second[0][0] <= first_then_second[1][0]
    cost, inner = first_then_second[0 if u_is_first else 1]
    if cost >= count(x_labels, other_labels):
        return NotImplemented

    operands = [x.base.astype(x.dtype) if operand is x else operand for operand in (lhs, rhs)]
    product = lax.dot_general_p.bind(*operands, **params)
    # In float32: the perturbation is small beside the product and must survive the sum.
    wide = other.astype(sum_dtype(other.dtype))
    factors = [(x.u, u_labels), (x.v, v_labels)]
    (first, first_labels), (second, second_labels) = factors if u_is_first else factors[::-1]
    inner_product = x.scale * _contract(wide, other_labels, first, first_labels, inner)
    present = [a for a in labels.out if a in inner or a in second_labels]
    change = _contract(inner_product, inner, second, second_labels, present)
    change = _spread(change, present, labels.out)
    return (product.astype(change.dtype) + change).astype(product.dtype)


def _with_matrix_last(lhs, rhs, *, dimension_numbers, precision, **params):
    """W x where the vectors x are rows of an array (a function of one vector, mapped): as x Wᵀ,
    transposed.

    What comes after mostly transposes it back. XLA does that in the product alone, but not in a sum
    of it and another.
    """
    contract, batch = dimension_numbers
    precision = precision[::-1] if isinstance(precision, tuple) else precision
    numbers = contract[::-1], batch[::-1]
    out = _product_with_factors(rhs, lhs, dimension_numbers=numbers, precision=precision, **params)
    if out is NotImplemented:
        return NotImplemented
    n, num_batch = out.ndim, len(batch[0])
    middle = rhs.ndim - len(contract[1])
    return lax.transpose(out, (*range(num_batch), *range(middle, n), *range(num_batch, middle)))


def _union(*of: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(a for labels in of for a in labels))


def _contract(
    a: jax.Array, a_labels: list[int], b: jax.Array, b_labels: list[int], out_labels: list[int]
) -> jax.Array:
    """The product of two arrays with labelled axes, summed over what the result lacks."""
    if _R in b_labels and b.shape[b_labels.index(_R)] == 1:
        # With a rank of 1 there may be nothing to sum.
        b, b_labels = _without(_R, b, b_labels)
        if _R in a_labels:
            a, a_labels = _without(_R, a, a_labels)
        if _R in out_labels:
            out = [x for x in out_labels if x != _R]
            return jnp.expand_dims(_contract(a, a_labels, b, b_labels, out), out_labels.index(_R))
    if set(out_labels) == {*a_labels, *b_labels}:  # broadcast: XLA fuses it with what comes after
        return _spread(a, a_labels, out_labels) * _spread(b, b_labels, out_labels)
    if len(b_labels) == 1 and a.size < _WORTH_A_PROGRAM:
        # XLA for CPUs compiles a program for each product with a vector, and none for two columns,
        # which takes longer to run.
        pair = jnp.stack([b, jnp.zeros_like(b)], axis=-1)
        return _contract(a, a_labels, pair, [*b_labels, _PAIR], [*out_labels, _PAIR])[..., 0]
    # Numbers from 0 as einsum wants them.
    names = {x: i for i, x in enumerate(_union(a_labels, b_labels))}
    name = lambda labels: [names[x] for x in labels]
    return jnp.einsum(a, name(a_labels), b, name(b_labels), name(out_labels))


def _without(label: int, x: jax.Array, labels: list[int]) -> tuple[jax.Array, list[int]]:
    """Without an axis of size 1."""
    return lax.squeeze(x, [labels.index(label)]), [a for a in labels if a != label]


def _spread(x: jax.Array, labels: list[int], out_labels: list[int]) -> jax.Array:
    """With its axes in the order of the result's, of size 1 where it has none."""
    kept = [a for a in out_labels if a in labels]
    x = lax.transpose(x, [labels.index(a) for a in kept])
    return lax.expand_dims(x, [i for i, a in enumerate(out_labels) if a not in labels])


@rule_for((Dense, Cast), lax.dot_general_p)
def _product_in_parts(lhs, rhs, **params):
    """With a large table or stack part by part, each perturbed in cache: no perturbed copy of the
    whole exists.
    """
    x, other = (lhs, rhs) if is_perturbed(lhs) else (rhs, lhs)
    is_lhs = x is lhs
    contract, batch = params["dimension_numbers"]
    order = slice(None) if is_lhs else slice(None, None, -1)
    (x_contract, other_contract), (x_batch, other_batch) = contract[order], batch[order]

    def dot(x, other, **changed):
        operands = (x, other) if is_lhs else (other, x)
        return lax.dot_general_p.bind(*operands, **params | changed)

    if tuple(x_batch) == (0,) and x.size >= _BLOCK_ENTRIES and x.layers() is not None:
        less = lambda axes, than: tuple(a - (a > than) for a in axes)
        pair = less(x_contract, 0), less(other_contract, other_batch[0])
        return _slice_by_slice(
            x,
            jnp.moveaxis(other, other_batch[0], 0),
            functools.partial(dot, dimension_numbers=(pair[order], ((), ()))),
        )
    if x.ndim == 2 and not x_batch and tuple(x_contract) == (1,) and x.size >= MIN_BLOCKED:
        return _block_by_block(x, lambda rows: dot(rows, other), is_lhs)
    return NotImplemented


def _slice_by_slice(x, other, dot):
    """A stack of matrices with a stack of other operands (experts)."""
    arrays, rebuild = x.layers()
    return lax.map(lambda pair: dot(rebuild(pair[0]).form(), pair[1]), (arrays, other))


def _block_by_block(table, dot, is_lhs):
    """Over the rows of a table that is contracted along its last axis (an output head)."""
    num_rows, width = table.shape
    num_blocks = -(-table.size // _BLOCK_ENTRIES)
    block_rows = -(-num_rows // num_blocks)
    out = jax.eval_shape(dot, jax.ShapeDtypeStruct(table.shape, table.dtype))
    axis = 0 if is_lhs else len(out.shape) - 1

    def rows(start):
        starts = start, jnp.zeros((), start.dtype)
        sizes = dict(slice_sizes=(block_rows, width))
        return apply_rule(lax.dynamic_slice_p, [table, *starts], sizes)

    def put_block(i, out):
        # The last block starts early enough to be whole; the rows that it shares are computed
        # twice.
        start = jnp.minimum(i * block_rows, num_rows - block_rows)
        return lax.dynamic_update_slice_in_dim(out, dot(rows(start).form()), start, axis)

    return lax.fori_loop(0, num_blocks, put_block, jnp.zeros(out.shape, out.dtype))


@rule_for(Transposed, lax.dot_general_p)
def _product_with_transposed(lhs, rhs, *, dimension_numbers, **params):
    """The product with the array as it lies in memory, and the axes of the result put in order."""
    x, other = (lhs, rhs) if is_perturbed(lhs) else (rhs, lhs)
    i = 0 if x is lhs else 1
    there = lambda pair: tuple(
        tuple(x.permutation[a] for a in axes) if side == i else tuple(axes)
        for side, axes in enumerate(pair)
    )
    contract, batch = dimension_numbers
    free = [a for a in range(x.ndim) if a not in contract[i] and a not in batch[i]]
    free_there = [x.permutation[a] for a in free]
    operands = [x.array, other] if x is lhs else [other, x.array]
    params = params | dict(dimension_numbers=(there(contract), there(batch)))
    out = apply_rule(lax.dot_general_p, operands, params)
    if out is NotImplemented or free_there == sorted(free_there):
        return out
    first = len(batch[i]) if x is lhs else out.ndim - len(free)
    order = list(range(out.ndim))
    order[first : first + len(free)] = [first + sorted(free_there).index(a) for a in free_there]
    return lax.transpose(out, order)
