import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import make_model


@pytest.fixture
def case(tiny_config):
    model = make_model(tiny_config.model, 11)
    params = model.fresh(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 11, (3, 8)).astype(np.int32)
    return model, params, tokens


def numpy_loss(model, params, tokens):
    hidden = np.asarray(model.hidden(params, tokens[:, :-1]), np.float64)
    logits = hidden @ np.asarray(params["wte"]["embedding"], np.float64).T
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = [
        probabilities[b, t, tokens[b, t + 1]] for b in range(3) for t in range(tokens.shape[1] - 1)
    ]
    return -np.mean(np.log(picked))


# Blocks of the 11 words and chunks of the 21 tokens: that hold everything, divide them, leave a
# remainder, and of one.
@pytest.mark.parametrize("words, tokens", [(1000, 1000), (11, 7), (4, 5), (1, 1)])
def test_loss_and_gradient_equal_the_whole(monkeypatch, case, words, tokens):
    monkeypatch.setattr("zo_jax.train.losses._BLOCK_WORDS", words)
    monkeypatch.setattr("zo_jax.train.losses._CHUNK_TOKENS", tokens)
    model, params, tokens_BT = case

    def whole(params):
        hidden = model.hidden(params, tokens_BT[:, :-1])
        log_probs = jax.nn.log_softmax(hidden @ params["wte"]["embedding"].T)
        return -jnp.mean(jnp.take_along_axis(log_probs, tokens_BT[:, 1:, None], axis=-1))

    loss, gradient = jax.jit(jax.value_and_grad(lambda p: next_token_loss(model, p, tokens_BT)))(
        params
    )
    np.testing.assert_allclose(loss, numpy_loss(*case), rtol=1e-5)
    expected = jax.jit(jax.grad(whole))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected
    )


def test_large_logits_do_not_overflow(case):
    model, params, tokens_BT = case
    params = jax.tree.map(lambda x: 1e3 * x, params)
    assert np.isfinite(next_token_loss(model, params, tokens_BT))
