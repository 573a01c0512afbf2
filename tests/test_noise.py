"""Counter-based noise: reference values, independence of layout, distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax import noise

KEY = jnp.array([123, 456], jnp.uint32)


def test_written_out_threefry_equals_jaxs():
    x0, x1 = jnp.arange(6, dtype=jnp.uint32), jnp.arange(6, dtype=jnp.uint32) * 7
    ours = noise._threefry2x32(KEY, x0, x1)
    k0, k1 = (jnp.broadcast_to(k, (6,)) for k in KEY)
    theirs = noise.threefry2x32_p.bind(k0, k1, x0, x1)
    np.testing.assert_array_equal(np.array(ours), np.array(theirs))


@pytest.mark.parametrize("draw", [noise.signs, noise.normals])
@pytest.mark.parametrize("width", [1, 31, 64, 65])
def test_any_rows_alone_have_the_same_entries(draw, width):
    rows = jnp.arange(12, dtype=jnp.uint32).reshape(3, 4)
    whole = draw(KEY, rows, width)
    assert whole.shape == (3, 4, width) and whole.dtype == jnp.float32
    some = draw(KEY, jnp.array([7, 2], jnp.uint32), width)
    np.testing.assert_array_equal(some, whole.reshape(12, width)[np.array([7, 2])])
    np.testing.assert_array_equal(jax.jit(draw, static_argnums=2)(KEY, rows, width), whole)


@pytest.mark.parametrize("draw", [noise.signs, noise.normals])
def test_moments(draw):
    # 2²⁰ numbers: the mean has standard error 2⁻¹⁰, and so has any correlation; bounds of five of them.
    z = np.array(draw(KEY, jnp.arange(1024, dtype=jnp.uint32), 1024), np.float64)
    bound = 5 / 1024
    assert abs(z.mean()) < bound
    assert abs((z**2).mean() - 1) < 2 * bound
    for other in (np.roll(z, 1, 0), np.roll(z, 1, 1), np.roll(z, 512, 1), np.roll(z, 32, 1)):
        assert abs((z * other).mean()) < bound


def test_normals_follow_the_normal_distribution():
    # Kolmogorov-Smirnov distance of n numbers: above 1.95 / √n with probability 0.001; the key is fixed.
    z = np.sort(np.array(noise.normals(KEY, jnp.arange(256, dtype=jnp.uint32), 256)).ravel())
    cdf = np.array(jax.scipy.stats.norm.cdf(z))
    distance = np.abs(cdf - (np.arange(z.size) + 0.5) / z.size).max()
    assert distance < 1.95 / np.sqrt(z.size)
    assert np.isfinite(z).all()
