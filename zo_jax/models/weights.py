"""What a model does with a weight: products and look-ups, whether it is an array or something that
stands for one.

A weight is [out, in], as in Hugging Face's files.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


class Weight:
    """A pytree node in the place of a weight: quantised numbers, or a weight with an adapter."""

    def product(self, x: jax.Array, out_dtype: Any) -> jax.Array:
        """x Wᵀ, [..., in] to [..., out]."""
        raise NotImplementedError

    def rows(self, indices: jax.Array) -> jax.Array:
        """Rows of the weight, [..., in]."""
        raise NotImplementedError

    def form(self) -> jax.Array:
        """The weight itself, float32 or better."""
        raise NotImplementedError

    def along_last(self, like: jax.Array) -> jax.Array:
        """Of a vector, shaped to go with the last axis of an array, in its dtype."""
        raise NotImplementedError


def product(x: jax.Array, weight: Any, out_dtype: Any = None) -> jax.Array:
    """x Wᵀ, [..., in] to [..., out], in x's dtype or the one asked for."""
    out_dtype = out_dtype or x.dtype
    if isinstance(weight, Weight):
        return weight.product(x, out_dtype)
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    weight = weight.astype(x.dtype)
    return lax.dot_general(x, weight, contract_last, preferred_element_type=out_dtype)


def rows(weight: Any, indices: jax.Array, dtype: Any) -> jax.Array:
    """weight[indices] of a table [N, C], in a dtype."""
    found = weight.rows(indices) if isinstance(weight, Weight) else weight[indices]
    return found.astype(dtype)


def form(weight: Any) -> jax.Array:
    """A weight as an array."""
    return weight.form() if isinstance(weight, Weight) else jnp.asarray(weight)


def is_weight(x: Any) -> bool:
    return isinstance(x, Weight)
