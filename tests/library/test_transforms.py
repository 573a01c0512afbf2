"""The estimator in optax chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo_jax

KEY = jax.random.key(3)


@pytest.fixture
def problem():
    """A quadratic loss with its minimum at `target`."""
    keys = jax.random.split(jax.random.key(17), 3)
    target = {"body": jax.random.normal(keys[0], (4, 3)), "head": jax.random.normal(keys[1], (5,))}
    params = jax.tree.map(jnp.zeros_like, target)

    def loss(p):
        return sum(jnp.sum((p[name] - target[name]) ** 2) for name in p)

    return params, loss


def train(tx, params, value_fn, updates=None, num_steps=200):
    """`num_steps` steps in one scan."""

    def step(carry, _):
        params, state = carry
        new, state = tx.update(updates, state, params, value_fn=value_fn)
        params = optax.apply_updates(params, new)
        return (params, state), value_fn(params)

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=num_steps))
    (params, state), losses = run(params)
    return params, state, losses


def test_update_is_the_estimate_and_ignores_what_it_does_not_know(problem):
    params, loss = problem
    tx = zo_jax.zeroth_order(KEY, num_queries=3)
    state = tx.init(params)
    seen = set()
    for count in range(2):
        estimate = zo_jax.estimate_gradient(
            loss, params, jax.random.fold_in(KEY, count), num_queries=3
        )
        updates, state = tx.update(
            "anything", state, params, value_fn=loss, value=3.0, unknown=None
        )
        jax.tree.map(np.testing.assert_array_equal, updates, estimate.gradient)
        np.testing.assert_array_equal(state.projections, estimate.projections)
        assert (state.count, state.loss, state.num_failed) == (count + 1, estimate.loss, 0)
        seen.add(float(state.projections[0]))
    assert len(seen) == 2, "each step draws fresh directions"


def test_batch_per_query(problem):
    params, _ = problem
    batch = jnp.arange(1.0, 4.0)
    loss = lambda p, x: x * jnp.sum(p["head"]) + jnp.sum(p["body"] ** 2)
    tx = zo_jax.zeroth_order(KEY, num_queries=3, batch_per_query=True)
    updates, _ = tx.update(None, tx.init(params), params, value_fn=loss, batch=(batch,))
    expected = zo_jax.estimate_gradient(
        loss, params, jax.random.fold_in(KEY, 0), batch, num_queries=3, batch_per_query=True
    )
    jax.tree.map(np.testing.assert_array_equal, updates, expected.gradient)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(optax.cosine_decay_schedule(0.05, 200)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
        optax.contrib.muon(0.05),
        optax.apply_if_finite(optax.adam(0.05), 5),
        optax.MultiSteps(optax.adam(0.2), 4).gradient_transformation(),
    ],
    ids=["schedule", "clip", "muon", "apply_if_finite", "multi_steps"],
)
def test_any_chain_learns(problem, optimizer):
    params, loss = problem
    chain = optax.chain(zo_jax.zeroth_order(KEY), optimizer)
    _, state, losses = train(chain, params, loss)
    assert losses[-1] < 0.05 * loss(params)
    assert state[0].count == 200


@pytest.mark.parametrize(
    "wrap", [lambda tx: optax.apply_if_finite(tx, 5), lambda tx: optax.MultiSteps(tx, 2)]
)
def test_inside_transformations_that_look_at_updates(problem, wrap):
    params, loss = problem
    tx = wrap(optax.chain(zo_jax.zeroth_order(KEY), optax.adam(0.1)))
    _, _, losses = train(tx, params, loss, updates=params)
    assert losses[-1] < 0.05 * loss(params)


@pytest.mark.parametrize("kind", ["masked", "partition"])
def test_frozen_parameters_are_neither_perturbed_nor_updated(problem, kind):
    params, loss = problem
    zo = optax.chain(zo_jax.zeroth_order(KEY, difference="jvp"), optax.adam(0.1))
    if kind == "masked":
        tx = optax.chain(
            optax.masked(zo, {"body": False, "head": True}),
            optax.masked(optax.set_to_zero(), {"body": True, "head": False}),
        )
    else:
        tx = optax.partition(
            {"zo": zo, "frozen": optax.set_to_zero()}, {"body": "frozen", "head": "zo"}
        )
    value_fn = zo_jax.fill_frozen(loss, params)
    updates, _ = tx.update(params, tx.init(params), params, value_fn=value_fn)
    # The projections are those of the head alone.
    alone = optax.chain(zo_jax.zeroth_order(KEY, difference="jvp"), optax.adam(0.1))
    head = {"head": params["head"]}
    expected, _ = alone.update(None, alone.init(head), head, value_fn=lambda p: loss(params | p))
    np.testing.assert_allclose(updates["head"], expected["head"], rtol=1e-6)
    trained, _, losses = train(tx, params, value_fn, updates=params)
    np.testing.assert_array_equal(trained["body"], params["body"])
    body_loss = loss({"body": params["body"]})
    assert losses[-1] - body_loss < 0.05 * (losses[0] - body_loss)


def test_compiled_once(problem):
    params, loss = problem
    tx = optax.chain(zo_jax.zeroth_order(KEY), optax.adam(0.1))
    num_traces = 0

    @jax.jit
    def step(params, state):
        nonlocal num_traces
        num_traces += 1
        updates, state = tx.update(None, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert num_traces == 1


def test_queries_that_fail_are_counted(problem):
    params, _ = problem
    tx = zo_jax.zeroth_order(KEY)
    updates, state = tx.update(
        None, tx.init(params), params, value_fn=lambda p: jnp.sum(p["head"]) * jnp.nan
    )
    assert state.num_failed == 8 and not np.any(updates["head"])


def test_what_is_missing_is_said(problem):
    params, loss = problem
    tx = zo_jax.zeroth_order(KEY)
    state = tx.init(params)
    with pytest.raises(ValueError, match="params"):
        tx.update(None, state, value_fn=loss)
    with pytest.raises(ValueError, match="value_fn=lambda"):
        tx.update(None, state, params)
    with pytest.raises(ValueError, match="threefry"):
        zo_jax.zeroth_order(jax.random.key(0, impl="rbg"))
