import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo_jax
from zo_jax.evolution import SHAPINGS, shape_scores

PARAMS = {"w": jnp.ones((6, 5)), "b": jnp.zeros(5)}


def score(params, key=None):
    return -jnp.sum((params["w"] - 2.0) ** 2) - jnp.sum((params["b"] + 1.0) ** 2)


def test_scores_are_shaped_as_they_are_in_numpy():
    scores = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    scores[2] = scores[5]
    mean = scores.mean(axis=1)
    z = lambda x: (x - x.mean(axis=0)) / x.std(axis=0)
    order = np.argsort(mean, kind="stable")
    ranks = np.empty(7)
    ranks[order] = np.arange(7)
    ranks[[2, 5]] = ranks[[2, 5]].mean()
    expected = {
        "raw": mean,
        "zscore": z(mean),
        "prompt": z(scores).mean(axis=1),
        "ranks": ranks / 6 - 0.5,
    }
    assert set(expected) == set(SHAPINGS)
    for name, values in expected.items():
        np.testing.assert_allclose(shape_scores(scores, name), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHAPINGS)
def test_equal_scores_say_nothing_and_nan_spoils_no_other(name):
    equal = shape_scores(jnp.full((6, 2), 0.1), name)
    np.testing.assert_allclose(equal, 0.1 if name == "raw" else 0, atol=1e-6)
    scores = np.random.default_rng(1).normal(size=5).astype(np.float32)
    with_nan = np.concatenate([scores, [np.nan]])
    got = shape_scores(with_nan, name)
    assert np.isnan(got[-1])
    np.testing.assert_allclose(got[:-1], shape_scores(scores, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("antithetic", [True, False])
def test_tell_is_the_sum_over_the_directions(antithetic):
    es = zo_jax.Evolution(population=8, sigma=0.1, antithetic=antithetic, shaping="raw")
    key = jax.random.key(3)
    members = es.ask(key)
    scores = np.array([float(score(es.member(PARAMS, members, i))) for i in range(8)])
    gradient = es.tell(PARAMS, key, jnp.asarray(scores))
    expected = jax.tree.map(jnp.zeros_like, PARAMS)
    for i in range(8):
        z = es.family.direction(PARAMS, members.keys[i])
        side = np.sign(members.scales[i])
        # Of a pair both sides have half a say.
        weight = -side * scores[i] / 0.1 / 8
        expected = jax.tree.map(lambda total, z, w=weight: total + w * z, expected, z)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradient, expected
    )
    if antithetic:
        np.testing.assert_array_equal(
            jax.random.key_data(members.keys[0]), jax.random.key_data(members.keys[1])
        )


def test_pairs_of_raw_scores_are_the_zeroth_order_estimate_of_their_loss():
    es = zo_jax.Evolution(population=8, sigma=1e-2, shaping="raw")
    key = jax.random.key(0)
    members = es.ask(key)
    scores = jnp.array([score(es.member(PARAMS, members, i)) for i in range(8)])
    estimate = zo_jax.estimate_gradient(
        lambda p: -score(p), PARAMS, key, num_queries=4, epsilon=1e-2, perturbation="low_rank"
    )
    np.testing.assert_allclose(es.projections(scores), estimate.projections, rtol=1e-2)


def test_the_transformation_climbs_under_jit_and_counts_what_is_flat():
    tx = optax.chain(
        zo_jax.evolution(jax.random.key(0), population=32, sigma=0.1, parallel_batch_size=16),
        optax.sgd(0.01),
    )
    state, params = tx.init(PARAMS), PARAMS
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(None, state, params, fitness_fn=score)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)
    assert score(params) > 0.1 * score(PARAMS) and len(traces) == 1
    assert int(state[0].num_flat) == 0 and state[0].scores.shape == (32,)
    flat = zo_jax.evolution(jax.random.key(0), population=4)
    updates, state = flat.update(None, flat.init(PARAMS), PARAMS, fitness_fn=lambda p, k: 1.0)
    assert int(state.num_flat) == 1 and not any(map(np.any, jax.tree.leaves(updates)))


def test_what_is_drawn_in_a_score_is_common_to_a_step():
    drawn = lambda params, key: jax.random.normal(key)
    tx = zo_jax.evolution(jax.random.key(0), population=4, shaping="raw")
    _, one = tx.update(None, tx.init(PARAMS), PARAMS, fitness_fn=drawn)
    _, two = tx.update(None, one, PARAMS, fitness_fn=drawn)
    assert len(set(one.scores.tolist())) == 1 and one.scores[0] != two.scores[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(population=3), "even with antithetic pairs"),
        (dict(population=1, antithetic=False), "at least 2"),
        (dict(sigma=0.0), "sigma must be positive"),
        (dict(shaping="best"), "shaping must be one of raw"),
        (dict(perturbation="x"), "perturbation must be a Family or one of"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        zo_jax.Evolution(**options)
    tx = zo_jax.evolution(jax.random.key(0))
    with pytest.raises(ValueError, match="pass both"):
        tx.update(None, tx.init(PARAMS), PARAMS)
