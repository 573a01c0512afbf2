"""Arrays that are perturbed, and what can be done with them without forming them.

A `Perturbed` array stands for base + scale · z. `Dense` knows its direction z entry by entry, by counter-based
noise; `LowRank` as a product of two thin factors. Each has rules, by the name of a JAX primitive, that give the
primitive's result from the parts; a rule returns None where it does not apply, and the array is then formed.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax import noise

# A product with a larger table of rows goes block by block: the perturbed rows stay in cache and no perturbed
# copy of the table exists. Entries of a block: 4 MB in float32.
_BLOCK_ENTRIES = 2**20
# Products of two factors of at most this rank are sums of broadcast products.
_FUSED_RANK = 8
MIN_BLOCKED = 4 * _BLOCK_ENTRIES


class Perturbed:
    """base + scale · z, of a shape and a dtype, not formed."""

    dtype: Any
    base: jax.Array
    rules: ClassVar[dict[str, Callable[..., Any]]] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    def form(self) -> jax.Array:
        """The array itself: summed in float32 or better, then rounded once to `dtype`."""
        raise NotImplementedError

    def layers(self) -> tuple[Any, Callable[[Any], "Perturbed"]] | None:
        """(arrays with the leading axis, function from their slices to a slice of self), for a scan."""
        return None


def _accumulator_dtype(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Perturbed):
    """A direction with independent entries.

    Attributes:
      base: floating [..., B].
      words: uint32 [..., W], the words of the noise stream that each row of B entries owns.
      scale: float32 scalar.
      kind: "rademacher" or "gaussian".
      dtype: of the formed array.
    """

    base: jax.Array
    words: jax.Array
    scale: jax.Array
    kind: str = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    def form(self) -> jax.Array:
        x = self.base.astype(_accumulator_dtype(self.base.dtype))
        return (x + self.noise()).astype(self.dtype)

    def noise(self) -> jax.Array:
        """scale · z, float32, of the shape of self."""
        if self.kind == "rademacher":
            return noise.with_signs(self.scale, noise.sign_bits(self.words, self.shape[-1]))
        return self.scale * noise.normals(self.words, self.shape[-1])

    def layers(self):
        if self.ndim < 2:
            return None
        rebuild = lambda parts: dataclasses.replace(self, base=parts[0], words=parts[1])
        return (self.base, self.words), rebuild

    def layer(self, i: jax.Array) -> "Dense":
        """Slice i along the first axis."""
        return self._on_rows(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False))

    def _on_rows(self, function: Callable[[jax.Array], jax.Array]) -> "Dense":
        """`function`, which leaves the last axis alone, on both parts."""
        return dataclasses.replace(self, base=function(self.base), words=function(self.words))

    def _convert(self, params):
        if not jnp.issubdtype(params["new_dtype"], jnp.floating):
            return None
        return dataclasses.replace(self, dtype=params["new_dtype"])

    def _slice(self, params):
        start, limit = params["start_indices"], params["limit_indices"]
        strides = params["strides"] or (1,) * self.ndim
        if (start[-1], limit[-1], strides[-1]) != (0, self.shape[-1], 1):
            return None
        return self._on_rows(lambda x: lax.slice(x, start, (*limit[:-1], x.shape[-1]), strides))

    def _dynamic_slice(self, params, *starts):
        sizes = params["slice_sizes"]
        if self.ndim < 2 or sizes[-1] != self.shape[-1] or len(starts) != self.ndim:
            return None
        return self._on_rows(lambda x: lax.dynamic_slice(x, starts, (*sizes[:-1], x.shape[-1])))

    def _squeeze(self, params):
        dimensions = params["dimensions"]
        if self.ndim - 1 in dimensions:
            return None
        return self._on_rows(lambda x: lax.squeeze(x, dimensions))

    def _reshape(self, params, *_):
        shape = params["new_sizes"]
        if params.get("dimensions") is not None or not shape or shape[-1] != self.shape[-1]:
            return None
        return self._on_rows(lambda x: x.reshape(*shape[:-1], x.shape[-1]))

    def _gather(self, params, indices):
        base = _gather_rows(self.base, params, indices)
        if base is None:
            return None
        words = self.words[jnp.clip(indices[..., 0], 0, self.shape[0] - 1)]
        return dataclasses.replace(self, base=base, words=words)

    def _transpose(self, params):
        return Transposed(self) if params["permutation"] == (1, 0) else None

    def _dot_general(self, params, other, other_is_lhs):
        """Block by block over the rows of a large table, contracted along its last axis (an output head)."""
        (contract_other, contract_self), batch = _dot_dimensions(params, other_is_lhs)
        size = self.base.size
        if any(batch) or contract_self != (1,) or self.ndim != 2 or size < MIN_BLOCKED:
            return None
        num_rows = self.shape[0]
        num_blocks = -(-size // _BLOCK_ENTRIES)
        block_rows = -(-num_rows // num_blocks)
        free_shape = tuple(n for i, n in enumerate(other.shape) if i != contract_other[0])
        axis = len(free_shape) if other_is_lhs else 0
        out_shape = (*free_shape, num_rows) if other_is_lhs else (num_rows, *free_shape)
        dot = lambda table: _bind_dot(params, table, other, other_is_lhs)

        def put_block(i, out):
            # The last block starts early enough to be whole; the rows that it shares are computed twice.
            start = jnp.minimum(i * block_rows, num_rows - block_rows)
            block = self._on_rows(lambda x: lax.dynamic_slice_in_dim(x, start, block_rows))
            return lax.dynamic_update_slice_in_dim(out, dot(block.form()), start, axis)

        out_dtype = jax.eval_shape(dot, jax.ShapeDtypeStruct(self.shape, self.dtype)).dtype
        return lax.fori_loop(0, num_blocks, put_block, jnp.zeros(out_shape, out_dtype))

    rules = {
        "convert_element_type": _convert,
        "slice": _slice,
        "dynamic_slice": _dynamic_slice,
        "squeeze": _squeeze,
        "reshape": _reshape,
        "gather": _gather,
        "transpose": _transpose,
        "dot_general": _dot_general,
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Perturbed):
    """A direction u vᵀ, never formed in products, look-ups, transposes, casts and slices of layers.

    Attributes:
      base: floating [..., A, B].
      u: float32 [..., A, r].
      v: float32 [..., B, r].
      scale: float32 scalar; the 1 / √r of unit variance is in it.
      dtype: of the formed array.
    """

    base: jax.Array
    u: jax.Array
    v: jax.Array
    scale: jax.Array
    dtype: Any = dataclasses.field(metadata={"static": True})

    def form(self) -> jax.Array:
        x = self.base.astype(_accumulator_dtype(self.base.dtype))
        return (x + self.scale * outer(self.u, self.v)).astype(self.dtype)

    def layers(self):
        if self.ndim < 3:
            return None
        rebuild = lambda parts: dataclasses.replace(self, base=parts[0], u=parts[1], v=parts[2])
        return (self.base, self.u, self.v), rebuild

    def _convert(self, params):
        if not jnp.issubdtype(params["new_dtype"], jnp.floating):
            return None
        return dataclasses.replace(self, dtype=params["new_dtype"])

    def layer(self, i: jax.Array) -> "LowRank":
        """Slice i along the first axis of a stack."""
        return self._on_layers(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False))

    def _on_layers(self, function: Callable[[jax.Array], jax.Array]) -> "LowRank":
        """`function`, which acts on leading axes only, on all three parts."""
        return dataclasses.replace(
            self, base=function(self.base), u=function(self.u), v=function(self.v)
        )

    def _slice(self, params):
        start, limit = params["start_indices"], params["limit_indices"]
        strides = params["strides"] or (1,) * self.ndim
        n = self.ndim - 2
        whole = start[n:] == (0, 0) and limit[n:] == self.shape[n:] and strides[n:] == (1, 1)
        if not n or not whole:
            return None
        return self._on_layers(lambda x: lax.slice(x, start, (*limit[:n], *x.shape[n:]), strides))

    def _dynamic_slice(self, params, *starts):
        sizes, n = params["slice_sizes"], self.ndim - 2
        if len(starts) != self.ndim or sizes[-1] != self.shape[-1]:
            return None
        if not n:  # rows of a matrix
            rows = lambda x: lax.dynamic_slice(x, starts, (sizes[0], x.shape[1]))
            return dataclasses.replace(self, base=rows(self.base), u=rows(self.u))
        if sizes[n] != self.shape[n]:
            return None
        return self._on_layers(lambda x: lax.dynamic_slice(x, starts, (*sizes[:n], *x.shape[n:])))

    def _squeeze(self, params):
        dimensions = params["dimensions"]
        if max(dimensions, default=0) >= self.ndim - 2:
            return None
        return self._on_layers(lambda x: lax.squeeze(x, dimensions))

    def _reshape(self, params, *_):
        shape = params["new_sizes"]
        if params.get("dimensions") is not None or shape[-2:] != self.shape[-2:]:
            return None
        return self._on_layers(lambda x: x.reshape(*shape[:-2], *x.shape[-2:]))

    def _gather(self, params, indices):
        base = _gather_rows(self.base, params, indices)
        if base is None:
            return None
        u = self.u[jnp.clip(indices[..., 0], 0, self.shape[0] - 1)]
        x = base.astype(_accumulator_dtype(base.dtype))
        return (x + self.scale * _outer_rows(u, self.v)).astype(self.dtype)

    def _transpose(self, params):
        permutation, n = params["permutation"], self.ndim - 2
        if permutation != (*range(n), n + 1, n):
            return None
        return dataclasses.replace(self, base=jnp.swapaxes(self.base, -1, -2), u=self.v, v=self.u)

    def _dot_general(self, params, other, other_is_lhs):
        """x (W + s u vᵀ) = x W + s (x u) vᵀ."""
        (contract_other, contract_self), batch = _dot_dimensions(params, other_is_lhs)
        if any(batch) or self.ndim != 2 or len(contract_self) != 1:
            return None
        inner, outer = (self.u, self.v) if contract_self == (0,) else (self.v, self.u)
        product = _bind_dot(params, self.base.astype(self.dtype), other, other_is_lhs)
        # In float32: the perturbation is small beside the product and must survive the sum.
        x = other.astype(_accumulator_dtype(other.dtype))
        inner_x = lax.dot_general(x, inner, ((contract_other, (0,)), ((), ())))
        change = self.scale * _outer_rows(inner_x, outer)
        if not other_is_lhs:
            change = jnp.moveaxis(change, -1, 0)
        return (product.astype(change.dtype) + change).astype(product.dtype)

    rules = {
        "convert_element_type": _convert,
        "slice": _slice,
        "dynamic_slice": _dynamic_slice,
        "squeeze": _squeeze,
        "reshape": _reshape,
        "gather": _gather,
        "transpose": _transpose,
        "dot_general": _dot_general,
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed(Perturbed):
    """The transpose of a `Dense` table [A, B]: products go to the table."""

    table: Dense

    @property
    def base(self) -> jax.Array:
        return jnp.swapaxes(self.table.base, 0, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape[::-1]

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> Any:
        return self.table.dtype

    def form(self) -> jax.Array:
        return jnp.swapaxes(self.table.form(), 0, 1)

    def _convert(self, params):
        table = self.table._convert(params)
        return table and Transposed(table)

    def _transpose(self, params):
        return self.table

    def _dot_general(self, params, other, other_is_lhs):
        (lhs_contract, rhs_contract), batch = params["dimension_numbers"]
        flip = lambda dimensions: tuple(1 - d for d in dimensions)
        if any(batch):
            return None
        if other_is_lhs:
            rhs_contract = flip(rhs_contract)
        else:
            lhs_contract = flip(lhs_contract)
        dimension_numbers = ((lhs_contract, rhs_contract), batch)
        params = {**params, "dimension_numbers": dimension_numbers}
        return self.table._dot_general(params, other, other_is_lhs)

    rules = {
        "convert_element_type": _convert,
        "transpose": _transpose,
        "dot_general": _dot_general,
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack(Perturbed):
    """A stack of layers [L, ...] of which some are perturbed: what `stack.at[indices].set(perturbed)` makes.

    Attributes:
      base: the stack; its entries at the indices do not count.
      indices: int32 [k], distinct.
      trained: the perturbed layers [k, ...].
    """

    base: jax.Array
    indices: jax.Array
    trained: Any

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def form(self) -> jax.Array:
        return self.base.at[self.indices].set(self.trained.form())

    def layers(self):
        position = jnp.full(self.shape[0], -1, jnp.int32)
        position = position.at[self.indices].set(jnp.arange(len(self.indices), dtype=jnp.int32))
        return (self.base, position), lambda parts: _OneOf(*parts, self.trained)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _OneOf(Perturbed):
    """A layer of a `Stack`: `trained[position]`, or `base` if the position is -1."""

    base: jax.Array
    position: jax.Array
    trained: Any

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def form(self) -> jax.Array:
        return lax.cond(
            self.position < 0,
            lambda: self.base,
            lambda: self.trained.layer(self.position).form(),
        )


def scatter_layers(params, operand: jax.Array, indices: jax.Array, updates: Any) -> Stack | None:
    """The result of a scatter that sets whole layers of a stack, or None if it is another one."""
    numbers = params["dimension_numbers"]
    sets_layers = (
        isinstance(updates, (Dense, LowRank))
        and updates.dtype == operand.dtype
        and (updates.ndim >= 3 or (isinstance(updates, Dense) and updates.ndim == 2))
        and updates.shape[1:] == operand.shape[1:]
        and indices.shape == (updates.shape[0], 1)
        and numbers.update_window_dims == tuple(range(1, operand.ndim))
        and numbers.inserted_window_dims == (0,)
        and numbers.scatter_dims_to_operand_dims == (0,)
    )
    return Stack(operand, indices[:, 0], updates) if sets_layers else None


def _dot_dimensions(params, other_is_lhs):
    """((contracting of the other, contracting of self), batch dimensions) of a dot_general."""
    (lhs, rhs), batch = params["dimension_numbers"]
    pair = (lhs, rhs) if other_is_lhs else (rhs, lhs)
    return tuple(tuple(dimensions) for dimensions in pair), batch


def _bind_dot(params, table, other, other_is_lhs):
    operands = (other, table) if other_is_lhs else (table, other)
    return lax.dot_general_p.bind(*operands, **params)


def _gather_rows(table: jax.Array, params, indices: jax.Array) -> jax.Array | None:
    """The gather, if it is a look-up of whole rows of a matrix (the result's last axis is the row)."""
    numbers = params["dimension_numbers"]
    is_look_up = (
        table.ndim == 2
        and tuple(params["slice_sizes"]) == (1, table.shape[1])
        and numbers.offset_dims == (indices.ndim - 1,)
        and numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
    )
    return lax.gather_p.bind(table, indices, **params) if is_look_up else None


def outer(u: jax.Array, v: jax.Array) -> jax.Array:
    """u vᵀ of [..., A, r] and [..., B, r], [..., A, B].

    A small rank as a sum of broadcast products: XLA fuses it with what comes after, so that it needs no memory, and it is
    faster than a matrix product.
    """
    rank = u.shape[-1]
    if rank <= _FUSED_RANK:
        return sum(u[..., :, None, k] * v[..., None, :, k] for k in range(rank))
    return u @ jnp.swapaxes(v, -1, -2)


def _outer_rows(u: jax.Array, v: jax.Array) -> jax.Array:
    """[..., r] and [B, r] to [..., B]."""
    if u.shape[-1] == 1:
        return u * v.reshape((1,) * (u.ndim - 1) + (-1,))
    return lax.dot_general(u, v, (((u.ndim - 1,), (1,)), ((), ())))
