"""Modes feedback and block_local against jax.grad where they are exact, and against what they are
said to be where they are not.
"""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zo_jax.train import feedback, run_state, steps
from zo_jax.train.config import FeedbackConfig
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import Block, make_model
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.settings import ConfigError
from zo_jax.train.validation import validate

VOCAB = 11


@pytest.fixture
def feedback_config(tiny_config):
    tiny_config.mode, tiny_config.zo = "feedback", type(tiny_config.zo)()
    tiny_config.model.num_layers, tiny_config.model.tied_head = 2, False
    return tiny_config


@functools.cache
def _setup(model):
    start = jax.jit(model.fresh)(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(start)
    rng = np.random.default_rng(1)
    moved = [x + 0.4 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, 8)).astype(np.int32)
    return model, jax.tree.unflatten(treedef, moved), tokens


def setup(config):
    """A model at a point where no bias is zero and no scale one, and tokens [3, 8]."""
    return _setup(make_model(config.model, VOCAB))


# By configuration: many tests look at the same gradient.
GRADIENTS = {}


def gradient_of(config, key=0):
    model, params, tokens = setup(config)
    if repr(config) not in GRADIENTS:
        GRADIENTS[repr(config)] = jax.jit(feedback.make_gradient(config, model))
    return GRADIENTS[repr(config)](params, jax.random.key(key), tokens)


@functools.cache
def _true_gradient(model):
    _, params, tokens = _setup(model)
    loss = lambda params: next_token_loss(model, params, tokens)
    return jax.jit(jax.value_and_grad(loss))(params)


def true_gradient(config):
    return _true_gradient(make_model(config.model, VOCAB))


def assert_close(a, b, rtol=1e-4, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def layer(gradient, i, *names):
    return {name: jax.tree.map(lambda x: x[i], gradient["blocks"][name]) for name in names}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["feedback", "block_local"])
def test_loss_is_that_of_the_model(feedback_config, mode, tied):
    feedback_config.mode, feedback_config.model.tied_head = mode, tied
    loss, gradient = gradient_of(feedback_config)
    expected, like = true_gradient(feedback_config)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, like)


def test_head_last_norm_and_last_writer_equal_backprop(feedback_config):
    _, gradient = gradient_of(feedback_config)
    _, expected = true_gradient(feedback_config)
    pick = lambda g: (g["head"], g["ln_f"], layer(g, 1, "fc_proj"))
    assert_close(pick(gradient), pick(expected))


def test_last_units_equal_backprop_but_for_the_square_of_sigma(feedback_config):
    _, expected = true_gradient(feedback_config)
    pick = lambda g: np.concatenate(
        [np.ravel(x) for x in jax.tree.leaves(layer(g, 1, "fc", "ln_2"))]
    )
    misses = []
    for sigma in (0.2, 0.1):
        feedback_config.feedback.sigma = sigma
        misses.append(np.linalg.norm(pick(gradient_of(feedback_config)[1]) - pick(expected)))
    assert 3 < misses[0] / misses[1] < 5 and misses[1] < 1e-2 * np.linalg.norm(pick(expected))


def test_tied_head_adds_its_gradient_to_the_embedding(feedback_config):
    feedback_config.model.tied_head, feedback_config.feedback.errors = True, "last"
    model, params, tokens = setup(feedback_config)
    hidden_BTC = model.hidden(params, tokens[:, :-1])

    def loss(head_VC):
        log_probs_BTV = jax.nn.log_softmax(hidden_BTC @ head_VC.T)
        return -jnp.mean(jnp.take_along_axis(log_probs_BTV, tokens[:, 1:, None], axis=-1))

    _, gradient = gradient_of(feedback_config)
    expected = jax.grad(loss)(model.head(params))
    np.testing.assert_allclose(gradient["wte"]["embedding"], expected, rtol=1e-4, atol=1e-6)


def test_block_local_with_one_block_equals_backprop(feedback_config):
    feedback_config.mode, feedback_config.model.num_layers = "block_local", 1
    _, gradient = gradient_of(feedback_config)
    assert_close(gradient, true_gradient(feedback_config)[1])


def test_block_local_is_exact_in_the_last_block_alone(feedback_config):
    feedback_config.mode = "block_local"
    _, gradient = gradient_of(feedback_config)
    _, expected = true_gradient(feedback_config)
    names = tuple(expected["blocks"])
    assert_close(layer(gradient, 1, *names), layer(expected, 1, *names))
    with pytest.raises(AssertionError):
        assert_close(layer(gradient, 0, *names), layer(expected, 0, *names))


@pytest.mark.parametrize("matrix", ["identity", "random"])
def test_errors_inside_blocks_are_their_derivatives(feedback_config, matrix):
    """But for the square of sigma; by draws in the mean of many, whose variance falls so."""
    feedback_config.mode, feedback_config.feedback = "block_local", FeedbackConfig(matrix=matrix)
    flat = lambda config, key=0: np.concatenate(
        [np.ravel(x) for x in jax.tree.leaves(gradient_of(config, key)[1])]
    )
    expected = flat(feedback_config)
    gap = lambda found: np.linalg.norm(found - expected) / np.linalg.norm(expected)
    feedback_config.mode, misses = "feedback", []
    for sigma in (0.2, 0.1):
        options = FeedbackConfig(attention="closed_form", sigma=sigma, matrix=matrix)
        feedback_config.feedback = options
        misses.append(gap(flat(feedback_config)))
    assert 3 < misses[0] / misses[1] < 5 and misses[1] < 1e-2
    feedback_config.feedback = FeedbackConfig(num_draws=32, matrix=matrix)
    found = np.array([flat(feedback_config, key) for key in range(64)])
    one, mean = np.mean([gap(x) ** 2 for x in found]), gap(found.mean(0)) ** 2
    assert mean < 2 * one / 64 + misses[1] ** 2


def output_error(model, params, tokens):
    """d loss / d the end of the residual stream, by jax.grad of all that comes after it."""
    block = Block(model.num_layers, model.num_heads, model.dtype, model.param_dtype)
    x_BTC = params["wte"]["embedding"][tokens[:, :-1]]
    x_BTC += params["wpe"]["embedding"][None, : x_BTC.shape[1]]
    for i in range(model.num_layers):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        x_BTC, _ = block.apply({"params": own}, x_BTC)

    def loss(x_BTC):
        h_BTC = nn.LayerNorm(epsilon=1e-5).apply({"params": params["ln_f"]}, x_BTC)
        log_probs_BTV = jax.nn.log_softmax(h_BTC @ model.head(params).T)
        return -jnp.mean(jnp.take_along_axis(log_probs_BTV, tokens[:, 1:, None], axis=-1))

    return np.asarray(jax.grad(loss)(x_BTC))


def sums_of_errors(gradient, length):
    """What the gradient says of each writer's error, summed over blocks and tokens (of positions:
    over blocks).
    """
    biases = [gradient["blocks"][name]["bias"][i] for i in range(2) for name in ("proj", "fc_proj")]
    return biases, gradient["wpe"]["embedding"][:length]


def test_every_writer_gets_the_output_error(feedback_config):
    feedback_config.feedback.handed_to = "sublayers"
    error_BTC = output_error(*setup(feedback_config))
    _, _, tokens = setup(feedback_config)
    _, gradient = gradient_of(feedback_config)
    biases, positions = sums_of_errors(gradient, 7)
    for bias in biases:
        np.testing.assert_allclose(bias, error_BTC.sum((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(positions, error_BTC.sum(0), rtol=1e-4, atol=1e-6)
    by_token_VC = np.zeros((VOCAB, error_BTC.shape[-1]))
    np.add.at(by_token_VC, tokens[:, :-1], error_BTC)
    np.testing.assert_allclose(gradient["wte"]["embedding"], by_token_VC, rtol=1e-4, atol=1e-6)


def test_random_feedback_and_errors_of_the_last_layer_alone(feedback_config):
    error_BTC = output_error(*setup(feedback_config))
    total_C = error_BTC.sum((0, 1))
    feedback_config.feedback.matrix = "random"
    feedback_config.feedback.handed_to = "sublayers"
    biases, positions = sums_of_errors(gradient_of(feedback_config)[1], 7)
    again, _ = sums_of_errors(gradient_of(feedback_config, key=5)[1], 7)
    np.testing.assert_allclose(biases[-1], total_C, rtol=1e-4, atol=1e-6)
    assert not any(np.allclose(bias, total_C, rtol=0.1) for bias in biases[:-1])
    np.testing.assert_array_equal(biases, again, "the matrices are of the run, not of the step")
    # A linear map of the errors: that of positions takes 7 of them to 7.
    map_CC = np.linalg.lstsq(error_BTC.sum(0), positions, rcond=None)[0]
    np.testing.assert_allclose(error_BTC.sum(0) @ map_CC, positions, atol=1e-5)

    feedback_config.feedback = FeedbackConfig(errors="last")
    _, gradient = gradient_of(feedback_config)
    zero, _ = sums_of_errors(gradient, 7)
    assert not np.any(zero[:-1]) and not np.any(gradient["wte"]["embedding"])
    np.testing.assert_allclose(zero[-1], total_C, rtol=1e-4, atol=1e-6)


def test_mode_feedback_differentiates_nothing(monkeypatch, feedback_config):
    model, params, tokens = setup(feedback_config)

    def refuse(*_args, **_options):
        raise AssertionError("differentiated")

    for name in ("grad", "value_and_grad", "vjp", "jvp", "linearize", "jacrev", "jacfwd"):
        monkeypatch.setattr(jax, name, refuse)
    for attention in ("weights", "qkv", "closed_form", "none"):
        feedback_config.feedback.attention = attention
        make = feedback.make_gradient(feedback_config, model)
        jax.eval_shape(make, params, jax.random.key(0), tokens)
    feedback_config.mode, feedback_config.feedback = "block_local", FeedbackConfig()
    with pytest.raises(AssertionError, match="differentiated"):
        make = feedback.make_gradient(feedback_config, model)
        jax.eval_shape(make, params, jax.random.key(0), tokens)


@pytest.mark.parametrize(
    "name, value, others",
    [
        ("attention", "qkv", {}),
        ("attention", "closed_form", {}),
        ("attention", "none", {}),
        ("num_draws", 5, {}),
        ("sigma", 0.2, {}),
        ("discount", 0.5, {"attention": "qkv"}),
        ("errors", "last", {}),
        ("matrix", "random", {}),
        ("handed_to", "sublayers", {}),
    ],
)
def test_every_setting_has_an_effect(feedback_config, name, value, others):
    feedback_config.feedback = FeedbackConfig(**others)
    validate(feedback_config)
    _, before = gradient_of(feedback_config)
    feedback_config.feedback = dataclasses.replace(feedback_config.feedback, **{name: value})
    validate(feedback_config)
    _, after = gradient_of(feedback_config)
    with pytest.raises(AssertionError):
        assert_close(before, after)


@pytest.mark.parametrize(
    "section, name, value, message",
    [
        ("model", "compute_dtype", "bfloat16", "needs model.param_dtype=float32"),
        ("feedback", "num_draws", 33, "from 1 to 32"),
        ("feedback", "sigma", 0.5, "noise on the weights of attention, .* at most 0.2"),
        ("feedback", "discount", 0.5, "only if feedback.attention is qkv"),
        ("fo", "batch_size", 3, "only if mode is fo or calibrate or instruct"),
        ("zo", "num_queries", 3, "only if mode is zo or calibrate or instruct"),
        ("optimizer", "adam_learning_rate", 0.1, "only if optimizer.name is muon"),
    ],
)
def test_bad_fields(feedback_config, section, name, value, message):
    validate(feedback_config)
    setattr(getattr(feedback_config, section), name, value)
    with pytest.raises(ConfigError, match=message):
        validate(feedback_config)


@pytest.mark.parametrize("mode", ["feedback", "block_local"])
def test_steps_are_compiled_once_donated_and_of_their_key(feedback_config, mode):
    feedback_config.mode = mode
    model, _, tokens = setup(feedback_config)
    step = steps.make_feedback_step(feedback_config, model)
    state = run_state.init_state(feedback_config, model)
    for _ in range(3):
        before = state
        state, metrics = step(state, jnp.asarray(tokens))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert step._cache_size() == 1 and state.step == 3 and np.isfinite(metrics.loss)
    again = run_state.init_state(feedback_config, model)
    for _ in range(3):
        again, _ = step(again, jnp.asarray(tokens))
    assert_close(state.params, again.params, rtol=0, atol=0)
    _, one = gradient_of(feedback_config, key=0)
    _, other = gradient_of(feedback_config, key=1)
    differs = not np.array_equal(one["blocks"]["qkv"]["kernel"], other["blocks"]["qkv"]["kernel"])
    assert differs is (mode == "feedback"), "only draws have a key"


def test_muon_leaves_the_embeddings_to_adam_at_a_rate_of_its_own(feedback_config):
    optimizer = feedback_config.optimizer
    optimizer.name, optimizer.orthogonalize_embedding = "muon", False
    optimizer.learning_rate, optimizer.adam_learning_rate = 1e-3, 1e-2
    model, _, tokens = setup(feedback_config)
    before = jax.tree.map(np.asarray, run_state.init_state(feedback_config, model).params)
    step = steps.make_feedback_step(feedback_config, model)
    after = step(run_state.init_state(feedback_config, model), jnp.asarray(tokens))[0].params
    moved = lambda *path: np.abs(_at(after, *path) - _at(before, *path))
    # Adam's first step (with Nesterov's momentum, as Muon has it) is the same in every entry;
    # Muon's is a nearly orthogonal matrix.
    adam = optax.adam(1e-2, nesterov=True)
    first = abs(float(adam.update(1.0, adam.init(1.0))[0]))
    np.testing.assert_allclose(moved("head", "embedding"), first, rtol=1e-3)
    np.testing.assert_allclose(moved("blocks", "fc_proj", "bias"), first, rtol=1e-3)
    update = moved("blocks", "fc", "kernel")[1]
    assert update.max() < 2e-3 and np.linalg.norm(update) > 1e-3


def _at(tree, *path):
    for name in path:
        tree = tree[name]
    return np.asarray(tree)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["feedback", "block_local"])
def test_runs_resume_bit_exactly_and_say_what_they_are(feedback_config, tmp_path, capsys, mode):
    feedback_config.mode, feedback_config.train.sample_tokens = mode, 0
    whole = train_and_evaluate(feedback_config, tmp_path / "whole")
    said = capsys.readouterr().out
    assert "a biased direction, no zeroth-order estimate" in said
    assert ("forward passes only, no backprop" in said) is (mode == "feedback")
    feedback_config.train.num_steps = 3
    train_and_evaluate(feedback_config, tmp_path / "part")
    feedback_config.train.num_steps = 6
    assert train_and_evaluate(feedback_config, tmp_path / "part") == whole
    assert "continuing from the checkpoint of step" in capsys.readouterr().out
    assert not (tmp_path / "whole/ledger.bin").exists(), "no record could replay such a step"
