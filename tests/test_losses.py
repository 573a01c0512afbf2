import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax import losses
from zo_jax.losses import next_token_loss
from zo_jax.model import init_params, make_model


@pytest.fixture
def case(tiny_config):
    model = make_model(tiny_config.model, 11)
    params = init_params(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 11, (3, 8)).astype(np.int32)
    return model, params, tokens


def numpy_loss(model, params, tokens):
    hidden = np.asarray(model.apply({"params": params}, tokens[:, :-1]), np.float64)
    logits = hidden @ np.asarray(params["wte"]["embedding"], np.float64).T
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = [
        probabilities[b, t, tokens[b, t + 1]] for b in range(3) for t in range(tokens.shape[1] - 1)
    ]
    return -np.mean(np.log(picked))


# Chunks that hold everything, that divide the 21 tokens, that leave a remainder, and of one token.
@pytest.mark.parametrize("chunk", [1000, 7, 5, 1])
def test_chunks_equal_numpy(monkeypatch, case, chunk):
    monkeypatch.setattr(losses, "_LOGITS_PER_CHUNK", chunk * 11)
    np.testing.assert_allclose(next_token_loss(*case), numpy_loss(*case), rtol=1e-5)


@pytest.mark.parametrize("chunk", [7, 5])
def test_chunked_gradient_equals_the_whole(monkeypatch, case, chunk):
    model, params, tokens = case

    def whole(params):
        hidden = model.apply({"params": params}, tokens[:, :-1])
        log_probs = jax.nn.log_softmax(hidden @ params["wte"]["embedding"].T)
        return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))

    monkeypatch.setattr(losses, "_LOGITS_PER_CHUNK", chunk * 11)
    chunked = jax.grad(lambda params: next_token_loss(model, params, tokens))(params)
    for got, expected in zip(
        jax.tree.leaves(chunked), jax.tree.leaves(jax.grad(whole)(params)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
