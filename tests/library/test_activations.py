"""Noise on activations against exact gradients under the same credit."""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
from programs import values
import pytest

import zo_jax
from zo_jax.train.losses import cross_entropy
from zo_jax.train.model import GPT

KEY = jax.random.key(4)
B, T, C, V = 2, 4, 3, 5
PARAMS = {
    "embedding": values((V, C), 1),
    "layers": {"w": 0.6 * values((2, C, C), 2), "b": 0.3 * values((2, C), 3)},
    "scale": 1 + 0.2 * values((C,), 4),
    "head": values((C, V), 5),
    "steps": jnp.arange(2),
}
X_BT = jnp.array(np.random.default_rng(0).integers(0, V, (B, T)))
MIX_TT = jnp.tril(jnp.ones((T, T))) / jnp.arange(1, T + 1)[:, None]


def losses(params, x_BT, offsets=None):
    """Layers that mix over earlier tokens; `offsets` are added where the parameters act."""
    at = offsets or {name: 0 for name in ("embedding", "layers", "scale", "head")}
    h_BTC = params["embedding"][x_BT] + at["embedding"]
    layers = params["layers"]
    per_layer = jnp.zeros((2, B, T, C)) + at["layers"]

    def layer(h_BTC, p_and_offset):
        p, offset = p_and_offset
        y_BTC = h_BTC @ p["w"] + p["b"][None, None] + offset
        return h_BTC + jnp.einsum("tu,buc->btc", MIX_TT, jnp.tanh(y_BTC)), None

    h_BTC, _ = lax.scan(layer, h_BTC, (layers, per_layer))
    scaled_BTC = h_BTC * params["scale"][None, None] + at["scale"]
    logits_BTV = scaled_BTC @ params["head"] + at["head"]
    return jax.nn.logsumexp(logits_BTV, axis=-1) ** 2


def exact_under_credit(discount):
    """The gradient with d loss_u / d y_t times discount^(u - t), 0 for u < t, by a Jacobian."""
    zeros = {"embedding": jnp.zeros((B, T, C)), "layers": jnp.zeros((2, B, T, C))}
    zeros |= {"scale": jnp.zeros((B, T, C)), "head": jnp.zeros((B, T, V))}
    jacobian = jax.jit(jax.jacobian(lambda o: losses(PARAMS, X_BT, o)))(zeros)
    ahead = np.arange(T)[None] - np.arange(T)[:, None]
    weight_tu = np.where(ahead >= 0, float(discount) ** np.maximum(ahead, 0), 0)
    error = lambda J: np.einsum("tu,bubtc->btc", weight_tu, J) / (B * T)
    g = {k: error(jacobian[k]) for k in ("embedding", "scale", "head")}
    g["layers"] = np.stack([error(jacobian["layers"][:, :, i]) for i in range(2)])
    # What goes in, by hand.
    h = np.asarray(PARAMS["embedding"])[X_BT]
    w, b = (np.asarray(PARAMS["layers"][k]) for k in "wb")
    dw = []
    for i in range(2):
        dw.append(np.einsum("btc,btd->cd", h, g["layers"][i]))
        h = h + np.einsum("tu,buc->btc", MIX_TT, np.tanh(h @ w[i] + b[i]))
    embedding = np.zeros((V, C))
    np.add.at(embedding, np.asarray(X_BT), g["embedding"])
    scaled = h * np.asarray(PARAMS["scale"])
    return {
        "embedding": embedding,
        "layers": {"w": np.stack(dw), "b": g["layers"].sum(axis=(1, 2))},
        "scale": np.sum(h * g["scale"], axis=(0, 1)),
        "head": np.einsum("btc,btv->cv", scaled, g["head"]),
    }


def check_mean(discount, **options):
    """That of many draws against the exact gradient under the same credit, which is returned."""
    options |= dict(num_draws=400, sigma=0.02, discount=discount)
    estimate = lambda key: zo_jax.activation_gradient(losses, PARAMS, key, X_BT, **options).gradient
    means = jax.jit(lambda keys: lax.map(estimate, keys))(jax.random.split(KEY, 20))
    expected = exact_under_credit(discount)
    del means["steps"]
    for found, wanted in zip(jax.tree.leaves(means), jax.tree.leaves(expected), strict=True):
        mean, error = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / np.sqrt(20)
        # Five standard errors (of twenty means of 400), and the bias of the differences.
        assert np.all(np.abs(mean - wanted) <= 5 * error + 2e-3)
        # They are small enough to tell.
        assert np.linalg.norm(error) < 0.3 * np.linalg.norm(wanted)
    return expected


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_the_mean_of_many_draws_is_the_gradient_under_the_same_credit(discount):
    expected = check_mean(discount)
    exact = zo_jax.mean_activation_gradient(losses, PARAMS, X_BT, discount=discount)
    del exact["steps"]
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    if discount == 1:
        true = jax.grad(lambda p: jnp.mean(losses(p, X_BT)), allow_int=True)(PARAMS)
        del true["steps"]
        for a, b in zip(jax.tree.leaves(true), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_of_a_gpt_with_an_exact_head():
    """Flax, scanned layers and a cross-entropy in blocks, as they stand."""
    model = GPT(11, 2, 2, 8, 6, tied_head=False, embedding_std=0.5)
    # Matrices large enough that every layer matters.
    params = jax.tree.map(lambda x: 8 * x if x.ndim == 3 else x, model.fresh(KEY))
    tokens_BT = jnp.array(np.random.default_rng(1).integers(0, 11, (2, 7)))

    def token_losses(params, tokens_BT):
        hidden_NC = model.hidden(params, tokens_BT[:, :-1]).reshape(-1, 8)
        return cross_entropy(hidden_NC, model.head(params), tokens_BT[:, 1:].reshape(-1)).reshape(
            2, 6
        )

    options = dict(exact="^head/", num_draws=1000, sigma=0.05)
    estimate = lambda key: zo_jax.activation_gradient(
        token_losses, params, key, tokens_BT, **options
    )
    found = jax.jit(lambda keys: lax.map(estimate, keys))(jax.random.split(KEY, 8))
    true = jax.jit(jax.grad(lambda p: jnp.mean(token_losses(p, tokens_BT))))(params)
    np.testing.assert_allclose(
        found.gradient["head"]["embedding"][0], true["head"]["embedding"], rtol=1e-4, atol=1e-6
    )
    flat = lambda tree: jnp.concatenate(
        [jnp.ravel(x) for k, v in sorted(tree.items()) if k != "head" for x in jax.tree.leaves(v)]
    )
    mean, g = flat(jax.tree.map(lambda x: jnp.mean(x, axis=0), found.gradient)), flat(true)
    cosine = mean @ g / (jnp.linalg.norm(mean) * jnp.linalg.norm(g))
    assert cosine > 0.8
    np.testing.assert_allclose(mean @ g / (g @ g), 1, atol=0.2)
    for x, t in zip(jax.tree.leaves(found.gradient), jax.tree.leaves(true), strict=True):
        error = np.std(x, axis=0, ddof=1) / np.sqrt(8)
        assert np.linalg.norm(np.mean(x, axis=0) - t) <= 2.5 * np.linalg.norm(error) + 1e-4
    with pytest.raises(ValueError, match=r"but head/embedding are used in another way"):
        zo_jax.activation_gradient(token_losses, params, KEY, tokens_BT)


def test_an_optax_chain_trains_with_it():
    tx = optax.chain(zo_jax.activation_zeroth_order(KEY, num_draws=4), optax.adam(3e-2))
    params = {k: v for k, v in PARAMS.items() if k != "steps"}

    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=losses, batch=(X_BT,))
        return optax.apply_updates(params, updates), state

    state, before = tx.init(params), jnp.mean(losses(params, X_BT))
    for _ in range(60):
        params, state = step(params, state)
    assert state[0].loss < 0.5 * before and state[0].count == 60


def test_draws_that_are_not_finite_are_left_out():
    bad = lambda w: jnp.sum(
        jnp.where(jnp.ones((1, 2, 3)) @ w > 3, jnp.inf, jnp.ones((1, 2, 3)) @ w), axis=-1
    )
    est = zo_jax.activation_gradient(bad, jnp.ones((3, 2)), KEY, num_draws=3)
    assert est.num_failed == 3 and not np.any(est.gradient) and np.isfinite(est.loss)


def test_bad_arguments():
    call = lambda fn=losses, **options: zo_jax.activation_gradient(fn, PARAMS, KEY, X_BT, **options)
    for options, match in (
        ({"num_draws": 0}, "num_draws must be an integer"),
        ({"sigma": 0.0}, "sigma must be finite and above 0"),
        ({"discount": 1.5}, "discount must be from 0 to 1"),
        ({"fn": lambda p, x: jnp.mean(losses(p, x))}, r"every token \[B, T\], got shape \(\)"),
        ({"fn": lambda p, x: losses(p, x) + jnp.sum(p["scale"] ** 2)}, "but scale are used"),
    ):
        with pytest.raises(ValueError, match=match):
            call(**options)
    with pytest.raises(ValueError, match="pass params and value_fn"):
        zo_jax.activation_zeroth_order(KEY).update(None, None)
    for options, match in (
        ({"num_draws": 0}, "num_draws must be an integer"),
        ({"sigmaa": 1.0}, "must be those of activation_gradient, got 'sigmaa'"),
    ):
        with pytest.raises(ValueError, match=match):
            zo_jax.activation_zeroth_order(KEY, **options)


@pytest.mark.parametrize("sizes", [(2, 4), (4, 4), (5, 6), (4, 5), (1, 1)])
def test_axes_in_another_order_are_refused_of_any_length(sizes):
    """Also where shapes do not tell sequences from tokens."""
    x_BTC, w = jnp.ones((*sizes, 3)), jnp.ones((3, 3))

    def in_order(w, x_BTC):
        return jnp.sum(jnp.tanh(jnp.cumsum(x_BTC @ w, axis=1)), axis=-1)

    def time_major(w, x_BTC):
        h_TBC = jnp.swapaxes(x_BTC, 0, 1) @ w
        return jnp.sum(jnp.tanh(jnp.cumsum(h_TBC, axis=0)), axis=-1).T

    def by_heads(w, x_BTC):  # [B, H, T, D] with five heads
        h_BHTC = jnp.repeat(x_BTC[:, None], 5, axis=1) @ w
        return jnp.sum(jnp.tanh(jnp.cumsum(h_BHTC, axis=2)), axis=(1, 3))

    call = lambda f, **options: zo_jax.activation_gradient(f, w, KEY, x_BTC, **options)
    call(in_order, num_draws=np.int64(2))
    for other in (time_major, by_heads):
        with pytest.raises(ValueError, match="parameters must act linearly on activations"):
            call(other)


def output_error(params, x_BT):
    """Of the last hidden state, in closed form."""
    h_BTC = params["embedding"][x_BT] * params["scale"][None, None]
    logits_BTV = h_BTC @ params["head"]
    lse_BT1 = jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
    return (2 * lse_BT1 * jax.nn.softmax(logits_BTV)) @ params["head"].T


def first_feedback(**options):
    return zo_jax.activation_feedback(losses, output_error, PARAMS, X_BT, **options)


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_feedback_changes_no_mean(discount):
    """Whatever it has learned: here matrices of noise."""
    feedback = first_feedback()
    rng = np.random.default_rng(2)
    noise = lambda x: jnp.array(0.3 * rng.normal(size=x.shape), jnp.float32)
    feedback = jax.tree.map(noise, feedback)
    feedback = dataclasses.replace(
        feedback,
        squares=jnp.eye(C),
        confirmed=jnp.array(rng.uniform(size=feedback.confirmed.shape), jnp.float32),
        predicted=jnp.ones_like(feedback.predicted),
    )
    assert jnp.all((feedback.weights > 0) & (feedback.weights < 1))
    check_mean(discount, feedback=feedback)


def test_feedback_learns_the_regression_of_errors_on_the_output_s():
    """One step's averages against sums over tokens, and what they predict against NumPy."""
    from zo_jax.activation_errors import trace

    feedback = first_feedback(memory=1.0, ridge=0.2)
    sites = trace(losses, PARAMS, (X_BT,), None)[3].sites
    rng = np.random.default_rng(3)
    e = rng.normal(size=(B, T, C)).astype(np.float32)
    errors = [rng.normal(size=site.shape).astype(np.float32) for site in sites]
    told = rng.uniform(size=(2, len(sites))).astype(np.float32)
    feedback = feedback.learn(e, errors, sites, *told)
    np.testing.assert_allclose(feedback.weights, np.clip(told[0] / told[1], 0, 1), rtol=1e-5)
    flat = e.reshape(-1, C).astype(np.float64)
    squares = flat.T @ flat / len(flat)
    np.testing.assert_allclose(feedback.squares, squares, rtol=1e-5)
    inverse = np.linalg.inv(squares + 0.2 * np.trace(squares) / C * np.eye(C))
    for site, g, p in zip(sites, errors, feedback.predict(e, sites), strict=True):
        # Layers, tokens, width.
        g = g.reshape((site.loops and g.shape[0]) or 1, B * T, -1)
        predicted = np.stack([flat @ inverse @ (flat.T @ one / len(flat)) for one in g])
        np.testing.assert_allclose(p.reshape(g.shape), predicted, rtol=2e-3, atol=1e-5)


def test_an_optax_chain_keeps_its_feedback():
    params = {k: v for k, v in PARAMS.items() if k != "steps"}
    feedback = zo_jax.activation_feedback(losses, output_error, params, X_BT)
    tx = zo_jax.activation_zeroth_order(KEY, num_draws=2, feedback=feedback)
    state = tx.init(params)
    update = lambda state: tx.update(None, state, params, value_fn=losses, batch=(X_BT,))
    step = jax.jit(update, donate_argnums=0)
    for _ in range(3):
        _, state = step(state)
    assert float(jnp.trace(state.feedback.squares)) > 0
    assert all(float(jnp.max(jnp.abs(x))) > 0 for x in state.feedback.products)
    assert jnp.all(state.feedback.predicted > 0)
    # What was given is what another run begins with.
    assert float(jnp.trace(tx.init(params).feedback.squares)) == 0


def test_bad_feedback():
    for options, match in (
        ({"memory": 0.5}, "memory must be finite and at least 1 step"),
        ({"ridge": 0.0}, "ridge must be finite and above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            first_feedback(**options)
    with pytest.raises(ValueError, match=r"an error of every token, \[2, 4, 'E'\], got \[2, 4\]"):
        zo_jax.activation_feedback(losses, lambda p, x: jnp.zeros((B, T)), PARAMS, X_BT)
    other = zo_jax.activation_feedback(
        lambda p, x: jnp.sum(p["embedding"][x], axis=-1),
        lambda p, x: p["embedding"][x],
        {"embedding": PARAMS["embedding"]},
        X_BT,
    )
    with pytest.raises(ValueError, match="feedback was made for 1 places"):
        zo_jax.activation_gradient(losses, PARAMS, KEY, X_BT, feedback=other)


def test_a_step_that_tells_nothing_teaches_no_feedback():
    good = {k: v for k, v in PARAMS.items() if k != "steps"}
    bad = good | {"head": good["head"].at[0, 0].set(jnp.inf)}
    feedback = zo_jax.activation_feedback(losses, output_error, good, X_BT)
    step = jax.jit(
        lambda params, key, feedback: zo_jax.activation_gradient(
            losses, params, key, X_BT, num_draws=2, feedback=feedback
        )
    )
    before = step(good, KEY, feedback).feedback
    found = step(bad, KEY, before)
    for a, b in zip(jax.tree.leaves(found.feedback), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    again = step(good, KEY, found.feedback)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(again.gradient))


def test_it_runs_with_double_precision_at_hand():
    w, x_BTC = values((3, 2), 1), values((2, 4, 3), 2)
    squares = lambda w, x_BTC: jnp.sum((x_BTC @ w) ** 2, axis=-1)
    feedback = zo_jax.activation_feedback(squares, lambda w, x_BTC: x_BTC @ w, w, x_BTC)
    with jax.enable_x64(True):
        for given in (None, feedback):
            found = zo_jax.activation_gradient(squares, w, KEY, x_BTC, num_draws=2, feedback=given)
            assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found.gradient))
            assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found.feedback))


def test_a_parameter_without_a_use_has_no_gradient():
    found = zo_jax.activation_gradient(
        lambda w, x_BT: 1.0 * x_BT, jnp.ones(3), KEY, X_BT, num_draws=2
    )
    np.testing.assert_array_equal(found.gradient, np.zeros(3))
