"""What every architecture is made of: products with weights, norms, attention and its cache.

Axes: B batch, T positions of queries, S positions of keys, C width, H heads of queries, K heads of
keys and values, D width of a head, L layers.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from zo_jax.models.config import Config
from zo_jax.models.weights import is_weight, product

# A function of a function, which returns one like it.
Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class Around(NamedTuple):
    """What the parts of a model are evaluated in; values stay what they are, derivatives may not.

    Attributes:
      layer: of every layer.
      unit: of what an MLP does to each of its units.
      attend: of `attend`.
    """

    layer: Wrapper = _as_it_is
    unit: Wrapper = _as_it_is
    attend: Wrapper = _as_it_is


AS_IT_IS = Around()
# Of a layer backprop keeps the inputs alone, and computes the rest again.
CHECKPOINTED = Around(layer=functools.partial(jax.checkpoint, prevent_cse=False))


def layer_slices(config: Config, layers: Any) -> tuple[Any, ...]:
    """What each layer is given: its parameters, its window, its number; stacked."""
    return layers, np.asarray(config.windows, np.int32), np.arange(config.num_layers)


def below_last(layer: Callable[..., Any], x_BTC: jax.Array, slices: Any) -> jax.Array:
    """The residual stream below the last of some layers.

    The last layer is evaluated and dropped: a scan over the others would have copies of their
    weights, since XLA has no views.

    Args:
      layer: ((stream below it, cache), its slice) -> (stream above it, cache).
      x_BTC: the stream below them all.
      slices: of `layer_slices`.
    """
    if len(slices[-1]) == 1:
        return x_BTC
    step = lambda carry, one: ((layer((carry[0], None), one)[0], carry[0]), None)
    return lax.scan(step, (x_BTC, x_BTC), slices)[0][1]


def at_places(x: jax.Array, places_B: jax.Array) -> jax.Array:
    """[B, T, ...] at one place of each row, int32, as [B, 1, ...]."""
    index = lax.expand_dims(places_B, range(1, x.ndim))
    return jnp.take_along_axis(x, index, axis=1)


class Cache(NamedTuple):
    """Keys and values of all positions so far, [L, B, S, K, D] each; slot s of a row holds its
    position s.
    """

    keys: jax.Array
    values: jax.Array


def make_cache(shape_LBSKD: tuple[int, ...], dtype: Any) -> Cache:
    """An empty cache."""
    return Cache(jnp.zeros(shape_LBSKD, dtype), jnp.zeros(shape_LBSKD, dtype))


def linear(x: jax.Array, part: dict[str, Any]) -> jax.Array:
    """x Wᵀ + b in x's dtype, [..., in] to [..., out]; `part` has a weight and perhaps a bias."""
    y = product(x, part["weight"])
    return y + along_last(part["bias"], y) if "bias" in part else y


def rms_norm(x: jax.Array, part: dict[str, Any], epsilon: float) -> jax.Array:
    """x / √(mean x² + ε) in float32, times the scale in x's dtype (Zhang and Sennrich, 2019)."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return y.astype(x.dtype) * along_last(part["scale"], x)


def layer_norm(x: jax.Array, part: dict[str, Any], epsilon: float) -> jax.Array:
    """(x − mean) / √(variance + ε) in float32, scaled and shifted in x's dtype (Ba et al.,
    2016).
    """
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return y.astype(x.dtype) * along_last(part["scale"], x) + along_last(part["bias"], x)


def along_last(vector: Any, like: jax.Array) -> jax.Array:
    """A vector shaped to go with the last axis of an array, in its dtype."""
    if is_weight(vector):
        return vector.along_last(like)
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    positions_BT: jax.Array,
    window: jax.Array,
    cache: Cache | None,
    layer: jax.Array,
    around: Around = AS_IT_IS,
) -> tuple[jax.Array, Cache | None]:
    """softmax(q kᵀ / √D) v over the positions up to a query's own and within its window, and the
    cache with k and v in it.

    Args:
      q_BTHD: queries; H is a multiple of K, and each group of heads shares keys and values.
      k_BTKD: keys of the same positions.
      v_BTKD: values.
      positions_BT: int32; B may be 1 where all rows have the same.
      window: int32 scalar, positions that a query sees, its own among them.
      cache: what came before, or None where the positions are 0..T − 1.
      layer: int32 scalar, whose part of the cache this is.
      around: what `attend` is evaluated in.

    Returns:
      ([B, T, H D], the cache).
    """
    key_positions_BS = positions_BT
    if cache is not None:
        index = layer, jnp.arange(len(k_BTKD))[:, None], positions_BT
        cache = Cache(cache.keys.at[index].set(k_BTKD), cache.values.at[index].set(v_BTKD))
        k_BTKD, v_BTKD = cache.keys[layer], cache.values[layer]
        key_positions_BS = jnp.arange(k_BTKD.shape[1])[None]
    attended = around.attend(attend)
    return attended(q_BTHD, k_BTKD, v_BTKD, positions_BT, key_positions_BS, window), cache


def attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    window: Any,
) -> jax.Array:
    """`attention` of queries to keys at positions of their own, [B, T, H D]."""
    back_BTS = positions_BT[:, :, None] - key_positions_BS[:, None]
    visible_BTS = (back_BTS >= 0) & (back_BTS < window)
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q = q_BTHD.reshape(B, T, K, H // K, D)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k_BSKD, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BTS[:, None, None], scores * D**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKD.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v_BSKD).reshape(B, T, H * D)
