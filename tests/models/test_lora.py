import functools
import json

import jax
import jax.numpy as jnp
from model_files import write_folder
import numpy as np
import pytest
import reference_models as reference
import safetensors.numpy

import zo_jax
from zo_jax import models
from zo_jax.models import lora
from zo_jax.models.quantized import quantize

ALL = r"(_proj|c_attn|c_fc|lm_head)$"


@pytest.fixture(params=["gpt2", "llama, biases", "qwen 3"])
def model(request, tmp_path):
    write_folder(tmp_path / "base", reference.CASES[request.param])
    return models.load(tmp_path / "base")


def random_factors(m, targets=ALL, rank=3):
    factors = lora.init(jax.random.key(0), m, rank, 6.0, targets)
    leaves, treedef = jax.tree.flatten(factors)
    rng = np.random.default_rng(0)
    return treedef.unflatten(
        [jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    )


def test_fresh_factors_change_nothing(model):
    factors = lora.init(jax.random.key(0), model, 2)
    assert all(
        not np.any(f.up) and np.all(np.std(f.down, axis=(1, 2)) > 0.05) for f in factors.values()
    )
    adapted = model.logits(lora.attach(model.params, factors), reference.TOKENS)
    expected = model.logits(model.params, reference.TOKENS)
    # They add zero, but XLA may sum in another order: a few last bits.
    assert np.max(np.abs(adapted - expected)) < 4e-6 * np.std(expected)


def test_attached_is_merged(model):
    factors = random_factors(model)
    merged = lora.merge(model, model.params, factors)
    expected = model.logits(merged, reference.TOKENS)
    adapted = jax.jit(model.logits)(lora.attach(model.params, factors), reference.TOKENS)
    assert np.max(np.abs(adapted - expected)) < 2e-5 * np.std(expected)
    assert np.max(np.abs(adapted - model.logits(model.params, reference.TOKENS))) > 0.1 * np.std(
        expected
    )


def test_merged_weights_are_the_sum(model):
    factors = random_factors(model)
    merged = lora.merge(model, model.params, factors)
    for name, f in factors.items():
        weight, change = model.params, merged
        for part in name.split("/"):
            weight, change = weight[part], change[part]
        expected = weight["weight"] + 6.0 / 3 * np.asarray(f.up) @ np.asarray(f.down)
        np.testing.assert_allclose(change["weight"], expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)


def test_saved_factors_are_the_same_and_named_as_peft_names_them(model, tmp_path):
    factors = random_factors(model)
    lora.save(tmp_path / "adapter", model, factors)
    again = lora.load(tmp_path / "adapter", model)
    assert jax.tree.structure(again) == jax.tree.structure(factors)
    jax.tree.map(np.testing.assert_array_equal, again, factors)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter/adapter_model.safetensors")
    is_gpt2 = model.config.architecture == "gpt2"
    name = "transformer.h.1.mlp.c_fc" if is_gpt2 else "model.layers.1.mlp.up_proj"
    width, out = (16, 64) if is_gpt2 else (16, 24)
    assert tensors[f"base_model.model.{name}.lora_A.weight"].shape == (3, width)
    assert tensors[f"base_model.model.{name}.lora_B.weight"].shape == (out, 3)
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["fan_in_fan_out"]) == (3, 6.0, is_gpt2)


def test_factors_beside_a_quantised_base(model):
    q = models.quantize(model)
    factors = random_factors(model, r"(q_proj|c_attn)$")
    expected = model.logits(lora.merge(q, q.params, factors), reference.TOKENS)
    adapted = jax.jit(q.logits)(lora.attach(q.params, factors), reference.TOKENS)
    assert np.max(np.abs(adapted - expected)) < 2e-5 * np.std(expected)


def test_the_estimator_trains_factors_beside_a_frozen_base():
    model = models.create(reference.CASES["qwen 3"], jax.random.key(0))
    q = models.quantize(model)
    factors = random_factors(model)
    loss = lambda factors, base, tokens: q.loss(lora.attach(base, factors), tokens)

    @jax.jit
    def estimate(factors, base, tokens):
        return zo_jax.estimate_gradient(
            loss, factors, jax.random.key(1), base, tokens, num_queries=2, difference="jvp"
        )

    est = estimate(factors, q.params, reference.TOKENS)
    assert jax.tree.structure(est.gradient) == jax.tree.structure(factors)
    gradient = jax.jit(jax.grad(loss))(factors, q.params, reference.TOKENS)
    for key, projection in zip(
        jax.random.split(jax.random.key(1), 2), est.projections, strict=True
    ):
        direction = zo_jax.rademacher().direction(factors, key)
        expected = float(zo_jax.trees.tree_dot(direction, gradient))
        assert float(projection) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_rows_of_an_adapted_table():
    rng = np.random.default_rng(0)
    table, down, up = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((9, 32), (2, 32), (9, 2))
    )
    adapted = lora.Adapted(quantize(table, 8), lora.Factors(down, up, 0.5))
    indices = jnp.array([3, 8, 3])
    np.testing.assert_allclose(adapted.rows(indices), adapted.form()[indices], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "peft_type.*'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(model, tmp_path, change, message):
    lora.save(tmp_path, model, random_factors(model))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        lora.load(tmp_path, model)


def test_adapters_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="'nothing' finds none"):
        lora.init(jax.random.key(0), model, targets="nothing")
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        lora.load(tmp_path, model)
    lora.save(tmp_path, model, random_factors(model))
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    one = next(name for name in sorted(tensors) if ".1." in name)
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != one}, "all layers of"),
        (tensors | {"other": np.ones(1, np.float32)}, "it has other"),
        ({}, "no tensors"),
    ):
        safetensors.numpy.save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            lora.load(tmp_path, model)


def test_rank_stabilised_scale(model, tmp_path):
    lora.save(tmp_path, model, random_factors(model))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
    assert next(iter(lora.load(tmp_path, model).values())).scale == pytest.approx(6.0 / np.sqrt(3))


def test_factors_of_the_last_layers_alone(model, tmp_path):
    factors = lora.init(jax.random.key(0), model, 3, 6.0, ALL, num_layers=1)
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
    factors = jax.tree.map(draw, factors)
    name = next(name for name in factors if name.startswith(("layers", "h/")))
    assert len(factors[name].down) == 1 < model.config.num_layers
    merged = lora.merge(model, model.params, factors)
    find = lambda params: functools.reduce(dict.get, name.split("/"), params)["weight"]
    weight, change = find(model.params), find(merged)
    np.testing.assert_array_equal(change[:-1], weight[:-1])
    f = factors[name]
    expected = weight[-1] + 2.0 * np.asarray(f.up[0]) @ np.asarray(f.down[0])
    np.testing.assert_allclose(change[-1], expected, rtol=1e-5, atol=1e-6)
    logits = jax.jit(model.logits)
    adapted = logits(lora.attach(model.params, factors), reference.TOKENS)
    whole = logits(merged, reference.TOKENS)
    assert np.max(np.abs(adapted - whole)) < 2e-5 * np.std(whole)
    lora.save(tmp_path / "adapter", model, factors)
    again = lora.load(tmp_path / "adapter", model)
    jax.tree.map(np.testing.assert_array_equal, again, factors)
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert fields["layers_to_transform"] == [model.config.num_layers - 1]
    with pytest.raises(ValueError, match="num_layers must be at most"):
        lora.init(jax.random.key(0), model, 3, num_layers=99)
