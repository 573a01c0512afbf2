"""Parameters of few bits: sums in float32, rounded without bias."""

from typing import Any
import zlib

import jax
from jax import lax
import jax.numpy as jnp

from zo_jax import noise


def apply(params: Any, updates: Any, key: jax.Array, rounding: str = "stochastic") -> Any:
    """params + updates, summed in float32 and rounded to the dtypes of params.

    "nearest" loses updates below half the spacing of the parameters. "stochastic" rounds up or down
    with the chances that make the result right on average (Gupta et al., "Deep learning with
    limited numerical precision", 2015), by 16 random bits an entry from the key.

    >>> import jax, jax.numpy as jnp
    >>> p, u = jnp.ones(10_000, jnp.bfloat16), jnp.full(10_000, 1e-4)
    >>> mean = lambda x: round(float(jnp.mean(x.astype(jnp.float32))) - 1, 5)
    >>> mean(apply(p, u, jax.random.key(0), "nearest")), abs(mean(apply(p, u, jax.random.key(0))) - 1e-4) < 3e-5
    (0.0, True)
    """  # noqa: E501

    def of_leaf(path: Any, p: jax.Array, u: jax.Array) -> jax.Array:
        exact = p.astype(jnp.float32) + u
        near = exact.astype(p.dtype)
        if rounding == "nearest" or p.dtype == jnp.float32:
            return near
        # One stream a leaf, named by its path, so that it does not depend on what else is trained.
        name = zlib.crc32(jax.tree_util.keystr(path).encode())
        bits = noise.rounding_bits(jax.random.key_data(jax.random.fold_in(key, name)), p.shape)
        if (
            p.dtype == jnp.bfloat16
        ):  # the upper half of float32: a carry out of the lower half rounds up
            whole = lax.bitcast_convert_type(exact, jnp.uint32) + (bits >> 16)
            up_or_down = lax.bitcast_convert_type(whole & jnp.uint32(0xFFFF0000), jnp.float32)
            return jnp.where(jnp.isfinite(exact), up_or_down, exact).astype(p.dtype)
        error = exact - near.astype(jnp.float32)
        toward = jnp.where(error > 0, jnp.inf, -jnp.inf).astype(p.dtype)
        other = jnp.nextafter(near, toward)
        gap = jnp.abs(other.astype(jnp.float32) - near.astype(jnp.float32))
        chance = jnp.where(error == 0, 0, jnp.abs(error) / gap)
        return jnp.where(((bits >> 16).astype(jnp.float32) + 0.5) * 2**-16 < chance, other, near)

    return jax.tree.map_with_path(of_leaf, params, updates)
