"""The estimator under every transformation of optax, with every family, through the same
properties.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo_jax

KEY = jax.random.key(3)
# Those that need no more than gradients and parameters, or the value that every one of them is
# given here.
OPTIMIZERS = {
    "adabelief": optax.adabelief,
    "adadelta": optax.adadelta,
    "adafactor": optax.adafactor,
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "adamax": optax.adamax,
    "adamw": optax.adamw,
    "adan": optax.adan,
    "amsgrad": optax.amsgrad,
    "fromage": optax.fromage,
    "lamb": optax.lamb,
    "lars": optax.lars,
    "lion": optax.lion,
    "nadam": optax.nadam,
    "noisy_sgd": functools.partial(optax.noisy_sgd, key=KEY),
    "novograd": optax.novograd,
    "optimistic_gradient_descent": optax.optimistic_gradient_descent,
    "radam": optax.radam,
    "rmsprop": optax.rmsprop,
    "rprop": optax.rprop,
    "sgd": optax.sgd,
    "sign_sgd": optax.sign_sgd,
    "sm3": optax.sm3,
    "yogi": optax.yogi,
    "muon": optax.contrib.muon,
    "prodigy": optax.contrib.prodigy,
    "schedule_free_adamw": optax.contrib.schedule_free_adamw,
    "mudamw": zo_jax.mudamw,
}
FAMILIES = ("rademacher", "gaussian", "sphere", "low_rank")
WITHOUT_RATE = ("prodigy",)


def make(name):
    return OPTIMIZERS[name]() if name in WITHOUT_RATE else OPTIMIZERS[name](1e-2)


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


def problem(dtype):
    keys = jax.random.split(KEY, 2)
    params = {"w": jax.random.normal(keys[0], (6, 5), dtype), "b": jnp.ones(5, dtype)}
    x = jax.random.normal(keys[1], (7, 6))

    def loss_fn(p, x):
        return jnp.mean((x @ p["w"].astype(jnp.float32) + p["b"][None].astype(jnp.float32)) ** 2)

    return params, loss_fn, x


@functools.cache
def run(name, family, dtype):
    """(losses of eight steps, traces of the step, parameters at the end)."""
    params, loss_fn, x = problem(dtype)
    tx = optax.chain(zo_jax.zeroth_order(KEY, perturbation=family, epsilon=1e-2), make(name))
    num_traces = 0

    @jax.jit
    def step(params, state):
        nonlocal num_traces
        num_traces += 1
        value_fn = lambda p: loss_fn(p, x)
        updates, state = tx.update(
            None, state, params, value_fn=value_fn, value=1.0, other="ignored"
        )
        return optax.apply_updates(params, updates), state

    state, losses = jax.jit(tx.init)(params), []
    for _ in range(8):
        params, state = step(params, state)
        losses.append(float(state[0].loss))
    return losses, num_traces, params


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name, family, dtype",
    [
        *((name, "rademacher", "float32") for name in OPTIMIZERS),
        *(("adam", family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16")),
    ],
)
def test_every_transformation_takes_the_estimate(name, family, dtype):
    losses, num_traces, params = run(name, family, dtype)
    assert num_traces == 1, "the step was compiled again"
    assert np.all(np.isfinite(losses))
    assert dtypes(params) == dtypes(problem(dtype)[0])
    start = problem(dtype)[0]
    assert any(
        np.any(np.array(a != b))
        for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True)
    )


@pytest.mark.parametrize("difference", ["central", "forward", "jvp"])
def test_a_chain_equals_the_estimate_handed_on(difference):
    params, loss_fn, x = problem(jnp.float32)
    estimator = zo_jax.Estimator(num_queries=3, difference=difference)
    tx = optax.chain(zo_jax.zeroth_order(KEY, estimator=estimator), optax.adam(0.1))
    updates, state = tx.update(None, tx.init(params), params, value_fn=loss_fn, batch=(x,))
    estimate = estimator.estimate(loss_fn, params, jax.random.fold_in(KEY, 0), x)
    adam = optax.adam(0.1)
    expected, _ = adam.update(estimate.gradient, adam.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)
    np.testing.assert_array_equal(state[0].projections, estimate.projections)


def test_masks_train_their_part_alone():
    params, loss_fn, x = problem(jnp.float32)
    inner = optax.chain(zo_jax.zeroth_order(KEY), optax.sgd(0.1))
    tx = optax.masked(inner, {"w": True, "b": False})
    value_fn = zo_jax.fill_frozen(lambda p: loss_fn(p, x), params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(
        lambda params: tx.update(zeros, tx.init(params), params, value_fn=value_fn)
    )(params)
    assert np.any(updates["w"]) and not np.any(updates["b"])


def test_epsilon_is_a_schedule_of_the_steps():
    loss_fn = lambda p: jnp.sum(jnp.abs(p) ** 3)  # whose central difference depends on epsilon
    params = jnp.array([0.1, -0.2, 0.3])
    schedule = optax.linear_schedule(1.0, 0.5, 2)
    tx = zo_jax.zeroth_order(KEY, epsilon=schedule, num_queries=2)
    state, update = (
        tx.init(params),
        jax.jit(lambda s: tx.update(None, s, params, value_fn=loss_fn)[1]),
    )
    for count in range(3):
        expected = zo_jax.estimate_gradient(
            loss_fn, params, jax.random.fold_in(KEY, count), num_queries=2, epsilon=schedule(count)
        )
        state = update(state)
        np.testing.assert_allclose(state.projections, expected.projections, rtol=1e-4)
    assert update._cache_size() == 1
    with pytest.raises(ValueError, match="only zeroth_order counts steps"):
        zo_jax.estimate_gradient(loss_fn, params, KEY, epsilon=schedule)


def test_inject_hyperparams():
    loss_fn = lambda p: jnp.sum(jnp.abs(p) ** 3)
    params = jnp.array([0.1, -0.2, 0.3])
    tx = optax.inject_hyperparams(zo_jax.zeroth_order)(
        KEY, epsilon=0.5, estimator=zo_jax.Estimator(num_queries=2)
    )
    update = jax.jit(lambda s: tx.update(params, s, params, value_fn=loss_fn)[1])
    state = update(tx.init(params))
    for count, epsilon in ((0, 0.5), (1, 2.0)):
        expected = zo_jax.estimate_gradient(
            loss_fn, params, jax.random.fold_in(KEY, count), num_queries=2, epsilon=epsilon
        )
        np.testing.assert_allclose(state.inner_state.projections, expected.projections, rtol=1e-4)
        state.hyperparams["epsilon"] = jnp.float32(2.0)
        state = update(state)
    assert update._cache_size() == 1
    static = optax.inject_hyperparams(zo_jax.zeroth_order, static_args=("num_queries",))
    assert static(KEY, num_queries=5).init(params).inner_state.projections.shape == (5,)
    traced = optax.inject_hyperparams(zo_jax.zeroth_order)(KEY, num_queries=5)
    with pytest.raises(ValueError, match=r"static_args=\('num_queries',\)"):
        jax.jit(traced.init)(params)
