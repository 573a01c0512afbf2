"""Counter-based noise: reference values, independence of layout, distribution."""

import statistics

import jax
from jax.extend.random import threefry2x32_p
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax import noise

KEY = jnp.array([123, 456], jnp.uint32)


def draw_signs(size, width, key=KEY):
    num_words = noise.sign_words_per_row(width)
    return noise.signs(noise.stream(key, size * num_words).reshape(size, num_words), width)


def draw_normals(size, width, key=KEY):
    return noise.normals(noise.stream(key, size * 2).reshape(size, 2), width)


def test_stream_is_threefry_with_a_counter():
    counter = jnp.arange(5, dtype=jnp.uint32)
    k0, k1 = (jnp.broadcast_to(k, (5,)) for k in KEY)
    words = np.stack(threefry2x32_p.bind(k0, k1, jnp.zeros_like(counter), counter), -1).reshape(-1)
    np.testing.assert_array_equal(noise.stream(KEY, 10), words)
    np.testing.assert_array_equal(noise.stream(KEY, 9), words[:9])
    np.testing.assert_array_equal(noise.stream(KEY, 3, first=4), words[4:7])
    np.testing.assert_array_equal(
        np.stack(noise._threefry2x32(k0, k1, counter * 0, counter), -1).reshape(-1), words
    )


@pytest.mark.parametrize("width", [1, 31, 64, 65])
def test_any_rows_alone_have_the_same_entries(width):
    words = noise.stream(KEY, 12 * 3).reshape(3, 4, 3)
    some = np.array([7, 2])
    whole = noise.signs(words, width)
    assert whole.shape == (3, 4, width) and whole.dtype == jnp.float32
    np.testing.assert_array_equal(
        noise.signs(words.reshape(12, 3)[some], width), whole.reshape(12, -1)[some]
    )
    whole = noise.normals(words[..., :2], width)
    assert whole.shape == (3, 4, width) and whole.dtype == jnp.float32
    rows = noise.normals(words.reshape(12, 3)[some, :2], width)
    np.testing.assert_allclose(rows, whole.reshape(12, -1)[some], rtol=1e-6)


@pytest.mark.parametrize("draw", [draw_signs, draw_normals])
def test_moments(draw):
    # 2²⁰ numbers: the mean has standard error 2⁻¹⁰, and so has any correlation; bounds of five of
    # them.
    z = np.array(draw(1024, 1024), np.float64)
    bound = 5 / 1024
    assert abs(z.mean()) < bound
    assert abs((z**2).mean() - 1) < 2 * bound
    for other in (np.roll(z, 1, 0), np.roll(z, 1, 1), np.roll(z, 512, 1), np.roll(z, 32, 1)):
        assert abs((z * other).mean()) < bound
    other_key = np.array(draw(1024, 1024, jnp.array([123, 457], jnp.uint32)), np.float64)
    assert abs((z * other_key).mean()) < bound


def test_normals_follow_the_normal_distribution():
    # Kolmogorov-Smirnov distance of n numbers: above 1.95 / √n with probability 0.001; the key is
    # fixed.
    z = np.sort(np.array(draw_normals(256, 256)).ravel())
    cdf = np.array(jax.scipy.stats.norm.cdf(z))
    distance = np.abs(cdf - (np.arange(z.size) + 0.5) / z.size).max()
    assert distance < 1.95 / np.sqrt(z.size)
    assert np.isfinite(z).all()


def test_normals_invert_the_distribution_function():
    x = np.linspace(1 - 2**23, 2**23 - 1, 10001).astype(np.int64) * 2.0**-23
    expected = np.array([statistics.NormalDist().inv_cdf((1 + v) / 2) for v in x])
    ours = np.sqrt(2) * np.array(noise._erf_inv(jnp.asarray(x, jnp.float32)), np.float64)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-12)


def test_positions_count_the_entries():
    np.testing.assert_array_equal(noise.positions((3, 1, 5)), np.arange(15).reshape(3, 1, 5))
    assert noise.positions(()).shape == () and noise.positions((2,)).dtype == jnp.uint32


def test_a_table_is_the_stream():
    for shape, first in (((3, 4, 6), 8), ((5, 3), 2), ((5, 3), 7)):
        words = noise.table(KEY, shape, first, lambda x: x)
        size = first + np.prod(shape)
        np.testing.assert_array_equal(words.reshape(-1), noise.stream(KEY, int(size))[first:])


def test_rounding_words_are_those_of_the_flat_array():
    flat = noise.rounding_bits(KEY, (24,))
    np.testing.assert_array_equal(noise.rounding_bits(KEY, (2, 3, 4)).reshape(-1), flat)


def test_signs_are_linear_in_their_size_in_every_mode():
    bits = jnp.array([[0, 1, 1], [1, 0, 0]], jnp.uint32)
    z = 1 - 2 * np.float32(bits)
    bits <<= 31
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    loss = lambda x: jnp.sum(weight * noise.with_signs(x, bits) ** 3)
    x = jnp.float32(1.5)
    np.testing.assert_allclose(jax.jacfwd(noise.with_signs)(x, bits), z)
    first, second = 3 * np.sum(weight * z) * 1.5**2, 6 * np.sum(weight * z) * 1.5
    np.testing.assert_allclose(jax.grad(loss)(x), first, rtol=1e-5)
    for twice in (jax.grad(jax.grad(loss)), jax.jacfwd(jax.grad(loss)), jax.grad(jax.jacfwd(loss))):
        np.testing.assert_allclose(twice(x), second, rtol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(loss))(jnp.array([1.5, 3.0])), [first, 4 * first], rtol=1e-5
    )
    linear = jax.linear_transpose(
        lambda dx: jax.jvp(lambda x: noise.with_signs(x, bits), (x,), (dx,))[1], x
    )
    np.testing.assert_allclose(linear(jnp.asarray(weight))[0], np.sum(weight * z))
