"""Local credit: scores against derivatives of one part, and whole models under jax.grad against the
program's modes, which are written without it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zo_jax
from zo_jax import credit
from zo_jax.train import feedback
from zo_jax.train.config import Config, FeedbackConfig, ModelConfig
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import make_model

V, H = 11, 2
gelu = functools.partial(jax.nn.gelu, approximate=True)


def test_unit_error_misses_the_derivative_by_the_square_of_the_difference():
    u = jnp.linspace(-3, 3, 41)
    error = jnp.cos(7 * u)
    exact = error * jax.vmap(jax.grad(jax.nn.gelu))(u)
    miss = [
        np.abs(credit.unit_error(jax.nn.gelu, u, error, size) - exact).max() for size in (0.2, 0.1)
    ]
    assert 3.5 < miss[0] / miss[1] < 4.5 and miss[1] < 0.02


def heads(seed):
    """q, k, v, and an error of attention's output, each [2, 6, 2, 4]."""
    return [jax.random.normal(k, (2, 6, 2, 4)) for k in jax.random.split(jax.random.key(seed), 4)]


def attention_errors(method, keys, **options):
    *qkv, error = heads(0)
    options = dict(num_draws=4, size=0.02, discount=1.0) | options
    return jax.lax.map(lambda k: credit.attention_error(method, qkv, error, k, **options), keys)


def attention_derivative():
    *qkv, error = heads(0)
    plain = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    out, derivative = jax.vjp(plain, *qkv)
    np.testing.assert_allclose(credit.attention(*qkv), out, rtol=1e-5, atol=1e-6)
    return derivative(error)


def test_closed_form_is_the_derivative_of_attention():
    found = attention_errors("closed_form", jax.random.split(jax.random.key(0), 1))
    for one, exact in zip(found, attention_derivative(), strict=True):
        np.testing.assert_allclose(one[0], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["weights", "qkv"])
def test_the_mean_of_local_scores_is_the_derivative_of_attention(method):
    """If ĝ has the mean g and E‖ĝ - g‖² = R ‖g‖², the mean of M has R / M. Twice that, and 1 % for
    the O(s²), is the bound.
    """
    num = 2000
    found = attention_errors(method, jax.random.split(jax.random.key(1), num))
    for draws, exact in zip(found, attention_derivative(), strict=True):
        draws, exact = np.asarray(draws), np.asarray(exact)
        square = np.sum(exact**2)
        each = np.mean(np.sum((draws - exact) ** 2, axis=(1, 2, 3, 4))) / square
        miss = np.sqrt(np.sum((draws.mean(0) - exact) ** 2) / square)
        assert miss < np.sqrt(2 * each / num) + 0.01
        assert each < 30, "a bound that 2,000 draws bring below 0.2"


def test_more_draws_are_less_noise():
    keys = jax.random.split(jax.random.key(2), 300)
    exact = np.asarray(attention_derivative()[0])
    noise = lambda n: np.mean(
        (attention_errors("weights", keys, num_draws=n)[0] - exact[None]) ** 2
    )
    np.testing.assert_allclose(noise(2) / noise(8), 4, rtol=0.2)


@pytest.mark.parametrize("method", ["weights", "qkv", "closed_form"])
def test_attention_error_knows_nothing_of_the_future(method):
    """A token's error is no reason for what stands after it."""
    *qkv, error = heads(3)
    options = dict(num_draws=3, size=0.05, discount=0.9)
    early = error.at[:, 3:].set(0)
    for one in credit.attention_error(method, qkv, early, jax.random.key(0), **options):
        assert np.any(one[:, :3]) and not np.any(one[:, 3:])


def norm(p, x):
    normed = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return normed * p["scale"][None, None] + p["bias"][None, None]


def linear(p, x):
    return x @ p["kernel"] + p["bias"][None, None]


def block(p, x, unit=gelu, attend=credit.attention):
    """Of the GPT, with its units and its attention handed in."""
    qkv = jnp.split(linear(p["qkv"], norm(p["ln_1"], x)), 3, axis=-1)
    z = attend(*(part.reshape(*x.shape[:2], H, -1) for part in qkv))
    x = x + linear(p["proj"], z.reshape(x.shape))
    return x + linear(p["fc_proj"], unit(linear(p["fc"], norm(p["ln_2"], x))))


def local_gradient(params, tokens, **parts):
    """Of the loss with every block but the first in `residual_feedback`."""

    def loss(params):
        x = feedback.embed(params, tokens[:, :-1])
        for i in range(3):
            own = functools.partial(block, **parts)
            own = zo_jax.residual_feedback(own) if i else own
            x = own(jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]), x)
        logits = norm(params["ln_f"], x) @ params["head"]["embedding"].T
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -jnp.mean(picked)

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("mode", ["block_local", "feedback"])
def test_a_model_under_jax_grad_learns_as_the_program_does(mode):
    config = Config(
        mode=mode,
        model=ModelConfig(num_layers=3, num_heads=H, width=8, context_length=8, tied_head=False),
        feedback=FeedbackConfig(attention="closed_form", sigma=0.1),
    )
    model = make_model(config.model, V)
    start = jax.jit(model.fresh)(jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.4 * rng.standard_normal(x.shape, np.float32), start)
    tokens = rng.integers(0, V, (3, 8)).astype(np.int32)
    expected = jax.jit(feedback.make_gradient(config, model))(params, jax.random.key(0), tokens)
    parts = {} if mode == "block_local" else {"unit": zo_jax.by_differences(gelu, 0.1)}
    loss, gradient = local_gradient(params, tokens, **parts)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_allclose(loss, next_token_loss(model, params, tokens), rtol=1e-5)
    for name in gradient:
        for x, y in zip(*map(jax.tree.leaves, (gradient[name], expected[1][name])), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
    # And that is not the gradient.
    true = jax.jit(jax.grad(lambda p: next_token_loss(model, p, tokens)))(params)
    off = jnp.abs(gradient["blocks"]["fc"]["kernel"] - true["blocks"]["fc"]["kernel"])
    assert off[-1].max() < 1e-2 and off[0].max() > 1e-2


def test_attention_by_draws_hands_on_the_errors_of_its_draws():
    *qkv, error = heads(3)
    key = jax.random.key(5)
    attend = functools.partial(zo_jax.attention_by_draws, key=key, num_draws=4, size=0.1)
    out, pull = jax.vjp(attend, *qkv)
    np.testing.assert_array_equal(out, credit.attention(*qkv))
    options = dict(num_draws=4, size=0.1, discount=0.0)
    expected = credit.attention_error("weights", qkv, error, key, **options)
    for x, y in zip(pull(error), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    assert jax.jit(jax.vmap(attend))(*(x[None] for x in qkv)).shape == (1, *out.shape)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_draws": 33}, "num_draws must be from 1 to 32, got 33"),
        ({"size": 0.5}, "size must be above 0 and at most 0.2, got 0.5"),
        ({"size": 0.0}, "size must be above 0"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        zo_jax.attention_by_draws(*heads(0)[:3], jax.random.key(0), **options)
