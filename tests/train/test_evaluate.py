import jax
import numpy as np

from zo_jax.train import evaluate
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import make_model


def test_every_block_counts_the_same(tiny_config):
    model = make_model(tiny_config.model, 11)
    params = model.fresh(jax.random.key(0))
    blocks = np.random.default_rng(0).integers(0, 11, (37, 8)).astype(np.int32)
    fn = evaluate.make_evaluate(model)
    loss = jax.jit(lambda tokens: next_token_loss(model, params, tokens))
    for n in (1, 37):
        each = [float(loss(b[None])) for b in blocks[:n]]
        np.testing.assert_allclose(fn(params, blocks[:n]), np.mean(each), rtol=1e-5)


def test_choose_blocks():
    blocks = np.arange(30).reshape(10, 3)
    assert evaluate.choose_blocks(blocks, 99).tolist() == blocks.tolist()
    assert evaluate.choose_blocks(blocks, 2).tolist() == [[0, 1, 2], [27, 28, 29]]


def test_cold_sampling_takes_the_likeliest_token(tiny_config):
    model = make_model(tiny_config.model, 11)
    params = model.fresh(jax.random.key(0))
    window = np.array([3, 5, 0, 0, 0], np.int32)
    got = evaluate.sample(
        model, params, jax.random.key(1), window, np.int32(2), np.float32(1e-6), num_tokens=7
    )
    text = [3, 5]
    hidden_of = jax.jit(model.hidden)
    for _ in range(7):
        hidden = hidden_of(params, np.array([text[-5:]], np.int32))[0, -1]
        text.append(int(np.argmax(params["wte"]["embedding"] @ hidden)))
    assert got.tolist() == text[2:]
