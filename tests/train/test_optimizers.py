"""Optimisers against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zo_jax.mudamw import mudamw, orthogonalize
from zo_jax.train.config import OptimizerConfig
from zo_jax.train.optimizers import (
    make_optimizer,
    make_optimizer_in_turns,
    make_schedule,
    matrices,
    scale_part,
)
from zo_jax.trees import ALL, Subset

SHAPES = {
    "embedding": {"embedding": (7, 4)},
    "blocks": {"kernel": (3, 4, 6), "bias": (3, 6), "scale": (3, 4)},
    "head": {"kernel": (5, 2)},
    "norm": {"scale": (4,)},
}
IS_MATRIX = {
    "embedding": {"embedding": True},
    "blocks": {"kernel": True, "bias": False, "scale": False},
    "head": {"kernel": True},
    "norm": {"scale": False},
}


def draw(seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda shape: rng.normal(size=shape), SHAPES, is_leaf=is_shape)


def numpy_newton_schulz(x):
    if x.ndim == 3:
        return np.stack([numpy_newton_schulz(layer) for layer in x])
    y = x / (np.linalg.norm(x) + 1e-7)
    y = y.T if x.shape[0] > x.shape[1] else y
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return y.T if x.shape[0] > x.shape[1] else y


def numpy_mudamw(params, gradients, rate, b1, b2, eps, decay, cautious, is_matrix):
    m, v = np.zeros_like(params), np.zeros_like(params)
    for t, g in enumerate(gradients, start=1):
        params = params - rate(t - 1) * decay * params
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step_size = rate(t - 1) * np.sqrt(1 - b2**t) / (1 - b1**t)
        mask = m * g > 0
        u = (m * mask * mask.size / (mask.sum() + 1) if cautious else m) / (np.sqrt(v) + eps)
        if is_matrix:
            u, step_size = numpy_newton_schulz(u), step_size * 0.2 * np.sqrt(max(params.shape[-2:]))
        params = params - step_size * u
    return params


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
def test_mudamw_equals_numpy(cautious, embeddings):
    rate = lambda t: 0.1 / (t + 1)
    tx = mudamw(
        rate,
        weight_decay=0.1,
        cautious=cautious,
        matrix_mask=lambda p: matrices(p, embeddings=embeddings),
    )
    start, gradients = draw(0), [draw(seed) for seed in range(1, 11)]
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for gradient in gradients:
        params, state = step(
            params, state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
        )
    is_matrix = IS_MATRIX | {"embedding": {"embedding": embeddings}}
    expected = jax.tree.map(
        lambda p, is_m, *g: numpy_mudamw(p, g, rate, 0.9, 0.999, 1e-6, 0.1, cautious, is_m),
        start,
        is_matrix,
        *gradients,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, expected
    )
    assert state.count == 10


def test_mudamw_decay_mask_and_missing_params():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = mudamw(0.1, weight_decay=0.5, mask={"kernel": True, "bias": False})
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05)
    np.testing.assert_array_equal(updates["bias"], 0)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(zeros, tx.init(params))


def test_biases_and_scales_are_no_matrices():
    params = jax.tree.map(np.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    assert matrices(params) == IS_MATRIX
    assert matrices(params, embeddings=False) == IS_MATRIX | {"embedding": {"embedding": False}}


def test_orthogonalize_brings_singular_values_near_one():
    x = jax.random.normal(jax.random.key(0), (2, 8, 5))
    singular_values = jnp.linalg.svd(orthogonalize(x), compute_uv=False)
    assert float(singular_values.min()) > 0.5 and float(singular_values.max()) < 1.3


@pytest.mark.parametrize(
    "fields",
    [
        dict(name="sgd", momentum=0.9, learning_rate=0.02),
        dict(name="adam"),
        dict(name="adamw", weight_decay=0.01),
        dict(name="muon", weight_decay=0.01),
        dict(name="muon", orthogonalize_embedding=False),
        dict(name="mudamw", cautious=True, learning_rate=0.2),
    ],
    ids=str,
)
def test_every_optimizer_descends_with_a_schedule(fields):
    config = OptimizerConfig(**dict(learning_rate=0.05, schedule="cosine", warmup_steps=3) | fields)
    tx = make_optimizer(config, 60)
    target = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw(0))
    loss = lambda p: sum(
        jnp.sum((a - b) ** 2)
        for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True)
    )

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=60)[0][0]

    params = jax.tree.map(jnp.zeros_like, target)
    assert loss(train(params)) < 0.75 * loss(params)


def test_a_part_has_a_rate_of_its_own():
    """Whole leaves, some layers of a stack, and what is not in the part."""
    params = {"head": jnp.ones(3), "stack": jnp.ones((3, 2)), "wte": jnp.ones((2, 2))}
    part = Subset((None, np.array([0, 2]), ALL))
    tx = optax.chain(optax.sgd(1.0), scale_part(part, 0.25))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["head"], -np.ones(3))
    np.testing.assert_array_equal(updates["stack"][:, 0], [-0.25, -1, -0.25])
    np.testing.assert_array_equal(updates["wte"], -0.25 * np.ones((2, 2)))


def test_two_kinds_of_steps_have_moments_and_rates_of_their_own():
    config = OptimizerConfig(
        name="adam", learning_rate=0.1, schedule="cosine", warmup_steps=0, min_learning_rate=0.01
    )
    interval, rate, num_steps = 3, 5.0, 9
    of_estimate, of_gradient = (
        make_optimizer_in_turns(config, num_steps, interval, rate, kind) for kind in (False, True)
    )
    whole = make_schedule(config, num_steps)
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(num_steps, 4)).astype(np.float32)
    gradients[np.arange(num_steps) % interval != 2] *= 1e3  # estimates are long
    params = jnp.zeros(4)
    state = of_estimate.init(params)
    # Each kind alone, by a plain Adam at the rates of the steps at which it comes.
    alone = {kind: optax.scale_by_adam() for kind in (False, True)}
    states = {kind: tx.init(params) for kind, tx in alone.items()}
    for step, gradient in enumerate(gradients):
        kind = step % interval == interval - 1
        tx = of_gradient if kind else of_estimate
        updates, state = tx.update(jnp.asarray(gradient), state, params)
        direction, states[kind] = alone[kind].update(jnp.asarray(gradient), states[kind])
        # Estimates are spread evenly over the run, to less than a step.
        at = step if kind else (step - step // interval) * interval / (interval - 1)
        expected = -(rate if kind else 1.0) * whole(jnp.float32(at)) * direction
        np.testing.assert_allclose(updates, expected, rtol=1e-5)
