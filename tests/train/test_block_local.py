"""Modes block_local and feedback on a pretrained model: the output error at every layer, against
layers that are differentiated one by one.
"""

import csv
import shutil

import fine_tune
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zo_jax.models import decoder
from zo_jax.models.layers import AS_IT_IS, layer_slices, rms_norm
from zo_jax.models.weights import rows
from zo_jax.train import feedback, run_state
from zo_jax.train.config import ConfigError, FeedbackConfig, LoraConfig, ZOConfig
from zo_jax.train.run import train_and_evaluate
from zo_jax.train.subject import load_sources, make_subject
from zo_jax.train.validation import resolve, validate

LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With bases of three layers, and examples."""
    path = tmp_path_factory.mktemp("block_local")
    fine_tune.write_base(path / "base", num_hidden_layers=LAYERS)
    fine_tune.write_examples(path / "examples.jsonl")
    return path


def make(folder, mode="block_local", scope="full", **options):
    config = fine_tune.get_config(folder)
    config.mode, config.scope, config.feedback = mode, scope, FeedbackConfig(**options)
    config.zo, config.lora = ZOConfig(), LoraConfig()
    validate(config)
    config = resolve(config, 20)
    subject = make_subject(config, load_sources(config))
    return config, subject, run_state.init_state(config, subject.model).params


def layer_by_layer(config, subject, params, batch):
    """The gradient with each layer's own derivative of what it is handed, in one loop."""
    model = subject.model.model
    c, layers = model.config, params["layers"]
    x_BTC = rows(params["embed_tokens"]["weight"], batch.tokens, jnp.float32)
    layer = decoder._layer(c, x_BTC, None, AS_IT_IS)
    below = [x_BTC]
    slices = [jax.tree.map(lambda x, i=i: x[i], layer_slices(c, layers)) for i in range(LAYERS)]
    for one in slices:
        below.append(layer((below[-1], None), one)[0])
    read = jnp.arange(len(batch.length)), batch.length - 1
    labels = params["embed_tokens"]["weight"][jnp.asarray(subject.task.labels)]

    def above(x_BTC, norm, labels):
        scores = rms_norm(x_BTC, norm, c.norm_epsilon)[read] @ labels.T
        return -jnp.mean(jax.nn.log_softmax(scores)[jnp.arange(len(scores)), batch.right])

    loss, end = jax.value_and_grad(above, (0, 1, 2))(below[-1], params["norm"], labels)
    error_at = feedback._make_error_at(config, LAYERS)
    own, errors = [], []
    for i, (x, (p, *rest)) in enumerate(zip(below[:-1], slices, strict=True)):
        of_layer = lambda p, x, rest=rest: layer((x, None), (p, *rest))[0]
        of_params, of_stream = jax.vjp(of_layer, p, x)[1](error_at(end[0], 2 * i + 2))
        own.append(of_params)
        errors.append(of_stream)
    embed = jnp.zeros_like(params["embed_tokens"]["weight"])
    embed = embed.at[batch.tokens].add(errors[0])
    embed = embed.at[jnp.asarray(subject.task.labels)].add(end[2])
    return loss, {
        "embed_tokens": {"weight": embed},
        "layers": jax.tree.map(lambda *x: jnp.stack(x), *own),
        "norm": end[1],
    }


@pytest.mark.parametrize("options", [{}, {"matrix": "random"}, {"errors": "last"}])
def test_gradient_is_that_of_layers_one_by_one(folder, options):
    config, subject, params = make(folder, **options)
    batch = subject.task.batches(0)[1]
    loss, gradient = jax.jit(jax.value_and_grad(subject.task.loss))(params, batch)
    expected_loss, expected = layer_by_layer(config, subject, params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.max(jnp.abs(b))))
    jax.tree.map(close, gradient, expected)


def test_loss_and_top_layer_are_those_of_backprop_and_the_rest_is_not(folder):
    _, subject, params = make(folder)
    _, plain, _ = make(folder, "fo")
    batch = subject.task.batches(0)[1]
    (loss, gradient), (expected_loss, expected) = (
        jax.jit(jax.value_and_grad(one.task.loss))(params, batch) for one in (subject, plain)
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    of_layer = lambda tree, i: np.concatenate(
        [x[i].ravel() for x in jax.tree.leaves(tree["layers"])]
    )
    np.testing.assert_allclose(of_layer(gradient, -1), of_layer(expected, -1), atol=1e-6, rtol=1e-4)
    assert not np.allclose(of_layer(gradient, 0), of_layer(expected, 0), rtol=0.1, atol=1e-8)


@pytest.mark.parametrize("fields", [dict(num_hidden_layers=LAYERS), "gpt2"])
def test_feedback_is_block_local_with_differences_of_units(folder, tmp_path, fields):
    """The error of the units is of second order in sigma; with nothing through attention what is
    below it has no gradient."""
    fields = dict(GPT2, n_layer=LAYERS) if fields == "gpt2" else fields
    fine_tune.write_base(tmp_path / "base", **fields)
    shutil.copy(folder / "examples.jsonl", tmp_path)

    def gradient(*args, **options):
        _, subject, params = make(tmp_path, *args, **options)
        params = jax.tree.map(lambda x: 4 * x if x.ndim == 3 else x, params)  # units off zero
        batch = subject.task.batches(0)[1]
        loss, found = jax.jit(jax.value_and_grad(subject.task.loss))(params, batch)
        return loss, found

    loss, exact = gradient("block_local")
    closed = dict(attention="closed_form")
    flat = lambda tree: np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    gap = {}
    for sigma in (0.03, 0.12):
        own_loss, found = gradient("feedback", sigma=sigma, **closed)
        assert float(own_loss) == float(loss)
        gap[sigma] = np.linalg.norm(flat(found) - flat(exact)) / np.linalg.norm(flat(exact))
    assert 0 < gap[0.03] < 0.01
    assert 8 < gap[0.12] / gap[0.03] < 32  # 16

    _, none = gradient("feedback", attention="none", sigma=0.1)
    paths = jax.tree.leaves_with_path(none)
    is_in = lambda path, *parts: any(part in jax.tree_util.keystr(path) for part in parts)
    read = [x for path, x in paths if is_in(path, "q_proj", "v_proj", "c_attn")]
    assert read and not any(map(jnp.any, read))
    assert any(jnp.any(x) for path, x in paths if is_in(path, "mlp"))


@pytest.mark.parametrize("attention", ["weights", "qkv"])
def test_draws_are_of_the_GPT_from_scratch(folder, attention):
    with pytest.raises(ConfigError, match="attention=closed_form, or none"):
        make(folder, "feedback", attention=attention)


GPT2 = dict(model_type="gpt2", n_embd=32, n_head=4, n_layer=1, n_positions=80)


@pytest.mark.parametrize("fields", [dict(num_hidden_layers=1), GPT2])
@pytest.mark.parametrize("scope", ["full", "lora"])
def test_with_one_layer_it_is_backprop(folder, tmp_path, fields, scope):
    fine_tune.write_base(tmp_path / "base", **fields)
    shutil.copy(folder / "examples.jsonl", tmp_path)
    (_, one, params), (_, plain, _) = (
        make(tmp_path, mode, scope) for mode in ("block_local", "fo")
    )
    # The factors begin with a change of zero.
    params = jax.tree.map(lambda x: x + 0.02 if x.dtype == jnp.float32 else x, params)
    batch = one.task.batches(0)[1]
    found, expected = (jax.jit(jax.grad(x.task.loss))(params, batch) for x in (one, plain))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.max(jnp.abs(b))))
    jax.tree.map(close, found, expected)


def test_backprop_keeps_the_stream_alone(folder):
    """Of a layer beside its input nothing is kept."""

    def temp(mode, checkpoint):
        config, subject, params = make(folder, mode)
        config.model.checkpoint_activations = checkpoint
        validate(config)
        subject = make_subject(config, load_sources(config))
        batch = jax.tree.map(
            lambda x: jnp.tile(x, (16, *[1] * (x.ndim - 1))), subject.task.batches(0)[1]
        )
        step = jax.jit(jax.value_and_grad(subject.task.loss))
        return step.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temp("block_local", False) < 0.75 * temp("fo", False)
    assert temp("fo", True) < 0.75 * temp("fo", False)


def test_a_run_learns_and_its_banner_says_what_it_is(folder, tmp_path, capsys):
    config, _, _ = make(folder)
    config.optimizer.name, config.optimizer.learning_rate = "adam", 1e-2
    config.train.num_steps, config.train.eval_interval = 12, 6
    train_and_evaluate(config, tmp_path / "run")
    assert "backprop inside every block, none between them" in capsys.readouterr().out
    with (tmp_path / "run/metrics.csv").open() as file:
        losses = [float(row["eval_loss"]) for row in csv.DictReader(file) if row["eval_loss"]]
    assert losses[-1] < losses[0] - 0.1
