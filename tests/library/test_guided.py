"""Directions guided by a gradient, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo_jax
from zo_jax.guided import in_support, largest_coordinates


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def numpy_support(g, fraction):
    """The smallest set, largest first, ties in the order of their indices."""
    order = np.argsort(-np.abs(g), kind="stable")
    energy = np.cumsum(g[order] ** 2)
    size = np.searchsorted(energy, fraction * energy[-1] * (1 - 1e-6)) + 1
    mask = np.zeros(g.size, bool)
    mask[order[:size]] = True
    return mask


@pytest.fixture
def gradient():
    keys = jax.random.split(jax.random.key(4), 3)
    return {
        "a": jax.random.normal(keys[0], (3, 5)),
        "b": 10 * jax.random.normal(keys[1], (7,)),
        "c": 0.1 * jax.random.normal(keys[2], (2, 2, 2)),
    }


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.81, 0.99, 0.9998])
def test_support_is_the_smallest_set(gradient, fraction):
    support = jax.jit(largest_coordinates)(gradient, jnp.float32(fraction))
    mask = flat(in_support(gradient, support)).astype(bool)
    np.testing.assert_array_equal(mask, numpy_support(flat(gradient), fraction))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_ties_are_taken_in_order(fraction):
    gradient = [jnp.array([1.0, -1.0, 1.0]), jnp.array([2.0, 1.0, -1.0, 0.0])]
    support = largest_coordinates(gradient, jnp.float32(fraction))
    mask = flat(in_support(gradient, support)).astype(bool)
    np.testing.assert_array_equal(mask, numpy_support(flat(gradient), fraction))


def test_hybrid_directions(gradient):
    q, scale = 200, 0.5
    z = jax.jit(zo_jax.instruct_directions, static_argnums=2)(
        gradient, jax.random.key(0), q, 0.95, scale
    )
    z = np.stack([flat(jax.tree.map(lambda x: x[i], z)) for i in range(q)])
    g = flat(gradient)
    mask = numpy_support(g, 0.95**2)
    np.testing.assert_array_equal(
        z[:, mask], np.broadcast_to(g[mask].astype(np.float32), (q, mask.sum()))
    )
    noise = z[:, ~mask] / (scale * np.linalg.norm(g) / np.sqrt(g.size))
    # Means and variances of q · (d - |S|) normal numbers, within five standard errors.
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs((noise**2).mean() - 1) < 5 * np.sqrt(2 / noise.size)


@pytest.mark.parametrize("cosine", [-0.7, 0.0, 0.3, 1.0])
def test_gram_schmidt_directions_have_the_cosine(gradient, cosine):
    z = zo_jax.instruct_directions(gradient, jax.random.key(1), 3, cosine, method="gram_schmidt")
    g = flat(gradient)
    for i in range(3):
        zi = flat(jax.tree.map(lambda x: x[i], z))
        np.testing.assert_allclose(np.linalg.norm(zi), np.linalg.norm(g), rtol=1e-5)
        expected = np.clip(cosine, -0.9999, 0.9999)
        np.testing.assert_allclose(
            zi @ g / np.linalg.norm(zi) / np.linalg.norm(g), expected, atol=1e-5
        )


def test_a_guided_family_is_its_directions(gradient):
    loss = lambda p: sum(jnp.sum(jnp.sin(x) * x) for x in jax.tree.leaves(p))
    params = jax.tree.map(lambda x: 0.1 * x, gradient)
    key, q = jax.random.key(2), 3
    z = zo_jax.instruct_directions(gradient, key, q)
    estimate = zo_jax.estimate_gradient(
        loss, params, key, num_queries=q, difference="jvp", perturbation=zo_jax.guided(gradient)
    )
    true = flat(jax.grad(loss)(params))
    rows = np.stack([flat(jax.tree.map(lambda x: x[i], z)) for i in range(q)])
    np.testing.assert_allclose(estimate.projections, rows @ true, rtol=1e-4)
    np.testing.assert_allclose(flat(estimate.gradient), rows.T @ (rows @ true) / q, rtol=1e-4)


def test_bad_input(gradient):
    for kwargs, message in (
        (dict(method="x"), "method must be"),
        (dict(cosine_target=1.5), "cosine_target"),
        (dict(noise_scale=-1.0), "noise_scale"),
    ):
        with pytest.raises(ValueError, match=message):
            zo_jax.instruct_directions(gradient, jax.random.key(0), 2, **kwargs)
