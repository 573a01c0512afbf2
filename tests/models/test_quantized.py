import gguf
import jax
import jax.numpy as jnp
from model_files import Q4_0, Q4_1, Q8_0, WIDE, smollm2, write_folder, write_gguf
import numpy as np
import pytest
import reference_models as reference

from zo_jax import models
from zo_jax.models import quantized
from zo_jax.models.gguf import Gguf

CASES = {
    "llama": reference.CASES["llama 2"] | WIDE,
    "gpt2": reference.CASES["gpt2"] | {"n_embd": 64},
}


@pytest.fixture
def weight():
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 64)), jnp.float32)


def test_rows_of_8_bits(weight):
    q = quantized.quantize(weight, 8)
    assert q.codes.dtype == jnp.int8 and q.scales.shape == (3, 5, 1) and q.shape == weight.shape
    step = np.abs(weight).max(axis=-1, keepdims=True) / 127
    error = np.abs(q.dequantize() - weight)
    assert np.all(error <= 0.501 * step) and np.any(error > 0.4 * step)
    assert q.nbytes == 3 * 5 * (64 + 4)


def test_blocks_of_4_bits(weight):
    q = quantized.quantize(weight, 4)
    assert q.codes.shape == (3, 5, 2, 16) and q.shape == weight.shape
    blocks = np.asarray(weight).reshape(3, 5, 2, 32)
    step = (blocks.max(axis=-1) - blocks.min(axis=-1))[..., None] / 15
    error = np.abs(np.asarray(q.dequantize()).reshape(blocks.shape) - blocks)
    # The rounding of scale and offset to float16 too.
    assert np.all(error <= 0.5 * step + 0.01) and np.any(error > 0.4 * step)
    assert q.nbytes == 3 * 5 * (32 + 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_constant_and_zero_rows_are_exact(bits):
    weight = jnp.stack([jnp.zeros(32), jnp.full(32, 0.5)])
    np.testing.assert_allclose(quantized.quantize(weight, bits).dequantize(), weight, rtol=1e-6)


@pytest.mark.parametrize("num_rows", [96, 95, 3])
def test_a_large_weight_goes_block_by_block(monkeypatch, num_rows):
    rng = np.random.default_rng(0)
    q = quantized.quantize(jnp.asarray(rng.standard_normal((num_rows, 64)), jnp.float32), 4)
    x = jnp.asarray(rng.standard_normal((2, 5, 64)), jnp.float32)
    monkeypatch.setattr(quantized, "_CACHED", 64 * 20)
    y = q.product(x, jnp.float32)
    np.testing.assert_allclose(y, x @ q.dequantize().T, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(q.product(x, jnp.float32) ** 2))(x)
    np.testing.assert_allclose(gradient, 2 * y @ q.dequantize(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_products_and_rows(weight, bits):
    q = quantized.quantize(weight[0], bits)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 7, 64)), jnp.float32)
    y = q.product(x, jnp.float32)
    np.testing.assert_allclose(y, np.einsum("bti,oi->bto", x, q.dequantize()), rtol=1e-4, atol=1e-4)
    indices = jnp.array([[4, 0], [2, 4]])
    np.testing.assert_array_equal(q.rows(indices), q.dequantize()[indices])


def test_what_cannot_be_quantised(weight):
    with pytest.raises(ValueError, match="bits must be 8 or 4; got 3"):
        quantized.quantize(weight, 3)
    with pytest.raises(ValueError, match=r"multiple of 32.*\[3, 5, 33\]"):
        quantized.quantize(weight[..., :33], 4)


@pytest.mark.parametrize("kind", [Q8_0, Q4_0, Q4_1])
def test_blocks_of_gguf_are_the_numbers_of_its_package(kind):
    x = np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    data = gguf.quants.quantize(x, kind)
    parts = quantized.from_gguf(kind.name, data)
    q = jax.tree.map(jnp.asarray, quantized.Quantized(*parts))
    np.testing.assert_allclose(q.dequantize(), gguf.dequantize(data, kind), rtol=1e-6, atol=1e-7)
    assert kind.name in quantized.KINDS


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [Q8_0, Q4_1])
def test_a_file_kept_quantised_computes_what_it_does_dequantised(name, kind, tmp_path):
    tensors = write_folder(tmp_path / "hf", CASES[name])
    write_gguf(tmp_path / "m.gguf", CASES[name], tensors, kind)
    m, q = (models.load(tmp_path / "m.gguf", keep_quantized=keep) for keep in (False, True))
    expected = m.logits(m.params, reference.TOKENS)
    logits = jax.jit(q.logits)(q.params, reference.TOKENS)
    assert np.max(np.abs(logits - expected)) < 2e-5 * np.std(expected)
    size = lambda m: sum(x.nbytes for x in jax.tree.leaves(m.params))
    assert size(q) < 0.35 * size(m)
    out = models.generate(q, q.params, [[1, 2, 3]], max_tokens=8)
    plain = models.generate(m, m.params, [[1, 2, 3]], max_tokens=8)
    np.testing.assert_array_equal(out.tokens[0], plain.tokens[0])


@pytest.mark.parametrize("bits, bound", [(8, 0.1), (4, 0.6)])
def test_a_quantised_model_is_near_the_model(bits, bound, tmp_path):
    write_folder(tmp_path, CASES["llama"])
    m = models.load(tmp_path)
    q = models.quantize(m, bits)
    expected = np.asarray(m.logits(m.params, reference.TOKENS))
    error = np.asarray(jax.jit(q.logits)(q.params, reference.TOKENS)) - expected
    assert 1e-4 < np.sqrt(np.mean(error**2)) / np.std(expected) < bound
    models.save(tmp_path / "out", q, q.params)
    again = models.load(tmp_path / "out")
    same = lambda x, y: np.testing.assert_array_equal(x.dequantize(), y)
    up = lambda m: m.params["layers"]["mlp"]["up_proj"]["weight"]
    same(up(q), up(again))


def test_one_layer_at_a_time_is_dequantised():
    fields = CASES["llama"] | {
        "num_hidden_layers": 12,
        "hidden_size": 256,
        "intermediate_size": 512,
    }
    m = models.create(fields, jax.random.key(0))
    q = models.quantize(m)
    temporary = lambda m: (
        jax.jit(m.logits)
        .lower(m.params, reference.TOKENS)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    layer = sum(x.nbytes for x in jax.tree.leaves(m.params["layers"])) / 12
    assert temporary(q) < temporary(m) + 2 * layer


def test_layers_of_different_kinds_are_dequantised(tmp_path, monkeypatch):
    tensors = write_folder(tmp_path / "hf", CASES["llama"])
    write_gguf(tmp_path / "m.gguf", CASES["llama"], tensors, Q8_0)
    kind = Gguf.kind
    of_other = lambda self, name: "Q6_K" if name == "blk.1.ffn_up.weight" else kind(self, name)
    monkeypatch.setattr(Gguf, "kind", of_other)
    m = models.load(tmp_path / "m.gguf", keep_quantized=True)
    assert isinstance(m.params["layers"]["mlp"]["up_proj"]["weight"], jax.Array)


@pytest.mark.slow
def test_smollm2_kept_quantised_knows_the_capital_of_france():
    m = models.load(smollm2(), keep_quantized=True)
    assert sum(x.nbytes for x in jax.tree.leaves(m.params)) < 100e6
    out = models.generate(m, m.params, ["The capital of France is"], max_tokens=2)
    assert out.texts[0].startswith(" Paris")
