import json

import jax
import jax.numpy as jnp
from model_files import FROZEN, write_folder
import numpy as np
import pytest
import reference_models as reference
import safetensors.numpy

import zo_jax
from zo_jax import models
from zo_jax.models import checkpoint, config, decoder
from zo_jax.models.layers import AS_IT_IS, CHECKPOINTED


@pytest.mark.parametrize("name", reference.CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
    write_folder(tmp_path, reference.CASES[name])
    m = models.load(tmp_path)
    logits = np.asarray(m.logits(m.params, reference.TOKENS))[:, reference.POSITIONS]
    assert logits.dtype == np.float32
    assert np.max(np.abs(logits - FROZEN[name])) < 2e-5 * np.std(FROZEN[name])


@pytest.mark.parametrize("name", [name for name in reference.CASES if "gpt2" not in name])
@pytest.mark.parametrize("around", [AS_IT_IS, CHECKPOINTED])
def test_the_stream_at_one_place_of_each_row(name, around):
    m = models.create(reference.CASES[name], jax.random.key(0))
    layers, places = m.params["layers"], jnp.array([0, 9, 4])
    x = jax.random.normal(jax.random.key(1), (3, 10, m.config.width))
    whole, _ = decoder.stream(m.config, layers, x)
    found = decoder.stream_at(m.config, layers, x, places, around)
    np.testing.assert_allclose(found, whole[jnp.arange(3), places], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", reference.CASES)
def test_hidden_states_at_one_place_of_each_row_and_their_gradient(name):
    m = models.create(reference.CASES[name], jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 10), 0, m.config.vocab_size)
    places, mix = jnp.array([0, 9, 4]), jax.random.normal(jax.random.key(2), (3, m.config.width))
    whole = lambda params: m.hidden(params, tokens)[jnp.arange(3), places]
    at_places = lambda params: m.hidden_at(params, tokens, places)
    np.testing.assert_allclose(at_places(m.params), whole(m.params), atol=1e-5, rtol=1e-5)
    expected, found = (
        jax.grad(lambda params, f=f: jnp.sum(f(params) * mix))(m.params) for f in (whole, at_places)
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.max(jnp.abs(b))))
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama 3", "qwen 3, biases"])
def test_saved_model_is_the_same_to_the_bit(name, tmp_path):
    tensors = write_folder(tmp_path / "a", reference.CASES[name])
    m = models.load(tmp_path / "a")
    models.save(tmp_path / "b", m, m.params)
    assert (
        json.loads((tmp_path / "b/config.json").read_text()).items()
        >= reference.CASES[name].items()
    )
    written = safetensors.numpy.load_file(tmp_path / "b/model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", reference.CASES)
def test_configuration_survives_its_own_form(name):
    c = config.from_hf(reference.CASES[name])
    assert config.from_hf(json.loads(json.dumps(config.to_hf(c)))) == c


def test_rope_fields_of_transformers_5():
    old = reference.CASES["llama 3"]
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    assert config.from_hf(new) == config.from_hf(old)


def test_shards_are_written_and_read(tmp_path, monkeypatch):
    fields = reference.CASES["qwen 2"]
    write_folder(tmp_path / "a", fields)
    m = models.load(tmp_path / "a")
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 4000)
    models.save(tmp_path / "b", m, m.params)
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "b" / checkpoint.SINGLE).exists()
    again = models.load(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, again.params, m.params)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of the {len(shards)} shards.*{shards[1].name}"):
        models.load(tmp_path / "b")
    # One file takes the place of the shards.
    monkeypatch.undo()
    models.save(tmp_path / "b", m, m.params)
    assert [path.name for path in (tmp_path / "b").glob("model*")] == [checkpoint.SINGLE]


def test_files_of_a_body_alone_and_with_buffers_are_read(tmp_path):
    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)

    write_folder(tmp_path / "a", reference.CASES["gpt2"], bare)
    m = models.load(tmp_path / "a")
    assert np.std(m.params["h"]["attn"]["c_attn"]["weight"][0]) > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_the_file_and_dtype_asked_for(tmp_path, dtype):
    def cast(tensors):
        for name, x in tensors.items():
            tensors[name] = x.astype(jnp.dtype(dtype))

    write_folder(tmp_path, reference.CASES["llama 3"], cast)
    m = models.load(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(m.params)} == {jnp.dtype(dtype)}
    assert m.hidden(m.params, reference.TOKENS).dtype == jnp.dtype(dtype)
    as_float32 = models.load(tmp_path, jnp.float32)
    expected = as_float32.logits(as_float32.params, reference.TOKENS)
    logits = m.logits(m.params, reference.TOKENS)
    assert logits.dtype == jnp.float32
    # A few roundings of 2^-8 or 2^-11 a layer.
    bound = {"bfloat16": 0.1, "float16": 0.02}[dtype]
    assert np.max(np.abs(logits - expected)) < bound * np.std(expected)


def test_a_leaf_goes_where_it_is_told(tmp_path):
    write_folder(tmp_path, reference.CASES["llama 3"])
    asked = {}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def sharding(path, shape):
        asked[zo_jax.trees.path_name(path)] = shape
        return place

    m = models.load(tmp_path, sharding=sharding)
    shapes = {zo_jax.trees.path_name(p): x.shape for p, x in jax.tree.leaves_with_path(m.params)}
    assert asked == shapes and shapes["layers/mlp/down_proj/weight"] == (2, 16, 24)
    assert all(x.sharding == place for x in jax.tree.leaves(m.params))


def test_loss_is_the_mean_cross_entropy():
    m = models.create(reference.CASES["llama 3"], jax.random.key(0))
    tokens = reference.TOKENS
    logits = np.asarray(jax.jit(m.logits)(m.params, tokens), np.float64)[:, :-1]
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    losses = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    loss = jax.jit(m.loss)
    assert float(loss(m.params, tokens)) == pytest.approx(losses.mean(), rel=1e-6)
    weights = np.arange(20, dtype=np.float32).reshape(2, 10)
    expected = np.sum(losses * weights[:, 1:]) / np.sum(weights[:, 1:])
    assert float(loss(m.params, tokens, weights)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "qwen 3, biases",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("llama 3", "mistral, window", "qwen 2")
        ),
    ],
)
def test_estimated_along_low_rank_directions_without_forming_a_matrix(name):
    m = models.create(reference.CASES[name], jax.random.key(0))

    @jax.jit
    def estimate(params, tokens):
        return zo_jax.estimate_gradient(
            m.loss,
            params,
            jax.random.key(1),
            tokens,
            num_queries=2,
            difference="jvp",
            perturbation=zo_jax.low_rank(1),
        )

    with zo_jax.record_formed() as formed:
        est = estimate(m.params, reference.TOKENS)
    # What is formed are biases and scales, shaped to go with a batch.
    assert formed and all(np.prod(x.shape) == max(x.shape) for x in formed)
    gradient = jax.jit(jax.grad(m.loss))(m.params, reference.TOKENS)
    direction_of = jax.jit(zo_jax.low_rank(1).direction)
    for key, projection in zip(
        jax.random.split(jax.random.key(1), 2), est.projections, strict=True
    ):
        direction = direction_of(m.params, key)
        assert float(projection) == pytest.approx(
            float(zo_jax.trees.tree_dot(direction, gradient)), rel=1e-3, abs=1e-4
        )


def remove(name):
    return lambda tensors: tensors.pop(name)


def add(name, shape):
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            remove("model.layers.1.mlp.up_proj.weight"),
            r"lack 1 of .*layers\.1\.mlp\.up_proj\.weight",
        ),
        (add("model.layers.0.self_attn.q_proj.bias", 16), r"has? 1 tensors.*q_proj\.bias|have 1"),
        (add("model.norm.weight", 15), r"model\.norm\.weight must have the shape \[16\].*\[15\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    write_folder(tmp_path, reference.CASES["llama 3"], change)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "bert"}, "model_type.*'bert'"),
        ({"hidden_act": "relu"}, "hidden_act.*'relu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "multiple.*4 and 3"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_configurations_that_are_not_computed_are_refused(change, message):
    fields = {k: v for k, v in (reference.CASES["llama 3"] | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        config.from_hf(fields)


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        models.load(tmp_path)
    write_folder(tmp_path, reference.CASES["gpt2"])
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        models.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must have model\.safetensors"):
        models.load(tmp_path)


def test_parameters_of_another_model_are_not_saved(tmp_path):
    a = models.create(reference.CASES["llama 3"], jax.random.key(0))
    b = models.create(reference.CASES["llama 2"], jax.random.key(0))
    with pytest.raises(ValueError, match="lm_head"):
        models.save(tmp_path, a, b.params)
    wrong = jax.tree.map(lambda x: x[:1], a.params)
    with pytest.raises(ValueError, match="embed_tokens/weight must have the shape"):
        models.save(tmp_path, a, wrong)


def test_more_positions_than_gpt2_has_are_refused():
    m = models.create(reference.CASES["gpt2"], jax.random.key(0))
    with pytest.raises(ValueError, match="32 learned positions; got 33"):
        m.logits(m.params, jnp.zeros((1, 33), jnp.int32))
