import gguf
import jax
import jax.numpy as jnp
from model_files import FROZEN, Q4_0, Q4_1, Q8_0, WIDE, smollm2, write_folder, write_gguf
import numpy as np
import pytest
import reference_models as reference

from zo_jax import models
from zo_jax.models import config, gguf_file, gguf_tokenizer


@pytest.mark.parametrize(
    "name", ["gpt2", "llama 2", "smollm2", "mistral", "llama, biases", "qwen 2", "qwen 3"]
)
def test_logits_are_those_of_transformers(name, tmp_path):
    tensors = write_folder(tmp_path / "hf", reference.CASES[name])
    write_gguf(tmp_path / "m.gguf", reference.CASES[name], tensors)
    m = models.load(tmp_path / "m.gguf")
    logits = np.asarray(m.logits(m.params, reference.TOKENS))[:, reference.POSITIONS]
    assert np.max(np.abs(logits - FROZEN[name])) < 2e-5 * np.std(FROZEN[name])


def test_a_gguf_model_becomes_a_folder(tmp_path):
    fields = reference.CASES["llama 2"]
    tensors = write_folder(tmp_path / "hf", fields)
    write_gguf(tmp_path / "m.gguf", fields, tensors)
    m = models.load(tmp_path / "m.gguf")
    models.save(tmp_path / "out", m, m.params)
    again = models.load(tmp_path / "out")
    assert again.config == m.config
    jax.tree.map(np.testing.assert_array_equal, again.params, m.params)


def test_llama_3_scaling_is_found_in_the_factors(tmp_path):
    fields = reference.CASES["llama 3"] | {"head_dim": 64}
    fields["rope_scaling"] = fields["rope_scaling"] | {"original_max_position_embeddings": 8192}
    tensors = write_folder(tmp_path / "hf", fields)
    write_gguf(tmp_path / "m.gguf", fields, tensors)
    assert models.load(tmp_path / "m.gguf").config.rope == config.from_hf(fields).rope
    fields["rope_scaling"] = fields["rope_scaling"] | {"original_max_position_embeddings": 4096}
    write_gguf(tmp_path / "other.gguf", fields, tensors)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight must hold the factors"):
        models.load(tmp_path / "other.gguf")


@pytest.mark.parametrize("kind", [Q8_0, Q4_0, Q4_1])
def test_blocks_are_dequantised(tmp_path, kind):
    fields = reference.CASES["qwen 2"] | WIDE
    tensors = write_folder(tmp_path / "hf", fields)
    write_gguf(tmp_path / "m.gguf", fields, tensors, kind)
    up = models.load(tmp_path / "m.gguf").params["layers"]["mlp"]["up_proj"]["weight"]
    original = tensors["model.layers.1.mlp.up_proj.weight"]
    # A block of 32 numbers, and what half a step of it is.
    blocks = original.reshape(-1, 32)
    top, bottom = blocks.max(axis=1), blocks.min(axis=1)
    step = {
        Q8_0: np.abs(blocks).max(axis=1) / 127,
        Q4_0: np.abs(blocks).max(axis=1) / 8,
        Q4_1: (top - bottom) / 15,
    }[kind]
    error = np.abs(np.asarray(up[1]).reshape(-1, 32) - blocks)
    # In Q4_0 the largest magnitude is -8 steps, so that 8 steps of the other sign are cut to 7.
    allowed = step * (1.01 if kind == Q4_0 else 0.51)
    assert np.all(error <= allowed[:, None] + 1e-3) and np.any(error > 0.3 * step[:, None])


def test_files_that_are_not_whole_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match="no whole GGUF file"):
        models.load(path)
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ValueError, match="must begin with GGUF"):
        models.load(path)
    tensors = write_folder(tmp_path / "hf", reference.CASES["llama 2"])
    write_gguf(path, reference.CASES["llama 2"], tensors)
    whole = path.read_bytes()
    for size in (len(whole) - 100, 300, 30):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="no whole GGUF file"):
            models.load(path)


def test_missing_tensors_are_named(tmp_path):
    tensors = write_folder(tmp_path / "hf", reference.CASES["llama 2"])
    tensors.pop("model.layers.1.input_layernorm.weight")
    write_gguf(tmp_path / "m.gguf", reference.CASES["llama 2"], tensors)
    with pytest.raises(ValueError, match=r"lack 1 of .*blk\.1\.attn_norm\.weight"):
        models.load(tmp_path / "m.gguf")


def test_metadata_of_every_type_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values = {
        "u": 2**32 - 1,
        "i": -5,
        "f": 0.5,
        "t": True,
        "s": "tälä",
        "a": ["x", "", "yy"],
        "n": [1, 2],
    }
    writer.add_uint32("u", values["u"])
    writer.add_int32("i", values["i"])
    writer.add_float32("f", values["f"])
    writer.add_bool("t", values["t"])
    writer.add_string("s", values["s"])
    writer.add_array("a", values["a"])
    writer.add_array("n", values["n"])
    writer.add_tensor("x", np.arange(6, dtype=np.float16).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = gguf_file.read(tmp_path / "m.gguf")
    assert {k: metadata[k] for k in values} == values
    np.testing.assert_array_equal(tensors["x"].dequantize(), np.arange(6).reshape(2, 3))


BYTES = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "1", "2", "Ġ", "Ġa", "ab", "12"],
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["Ġ a", "a b", "1 2"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


@pytest.mark.parametrize(
    "pre, expected",
    [
        ("gpt-2", ["ab", "Ġa", "Ġ", "12", "</s>"]),
        ("smollm", ["ab", "Ġa", "Ġ", "1", "2", "</s>"]),
        ("llama-bpe", ["<s>", "ab", "Ġa", "Ġ", "12", "</s>"]),
        ("qwen2", ["ab", "Ġa", "Ġ", "1", "2", "</s>"]),
    ],
)
def test_byte_level_tokenizers(pre, expected):
    t = gguf_tokenizer.from_gguf(BYTES | {"tokenizer.ggml.pre": pre})
    ids = t.encode("ab a 12</s>")
    assert [BYTES["tokenizer.ggml.tokens"][i] for i in ids] == expected
    assert t.decode(ids) == "ab a 12"
    assert t.decode(t.encode("ab</s>", special=False), special=True) == "ab</s>"


def test_sentencepiece_merges_by_score_and_spells_bytes():
    pieces = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{i:02X}>": 6 for i in range(256)}
    words = {"▁": -1.0, "a": -2.0, "b": -3.0, "ab": -5.0, "ba": -4.0, "▁a": -6.0}
    t = gguf_tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [*pieces, *words],
            "tokenizer.ggml.token_type": [*pieces.values(), *(1 for _ in words)],
            "tokenizer.ggml.scores": [*(0.0 for _ in pieces), *words.values()],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }
    )
    ids = t.encode("aba é")
    names = [[*pieces, *words][i] for i in ids]
    # "ba" has a better score than "ab"; é is its two bytes.
    assert names == ["<s>", "▁a", "ba", "▁", "<0xC3>", "<0xA9>"]
    assert t.decode(ids) == "aba é"


def test_unknown_tokenizers_are_refused():
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre must be one of .*'chatglm'"):
        gguf_tokenizer.from_gguf(BYTES | {"tokenizer.ggml.pre": "chatglm"})
    with pytest.raises(ValueError, match="must be gpt2 or llama; got 'bert'"):
        gguf_tokenizer.from_gguf(BYTES | {"tokenizer.ggml.model": "bert"})


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    m = models.load(smollm2())
    tokens = m.tokenizer.encode("The capital of France is")
    logits = m.logits(m.params, jnp.asarray(tokens)[None])[0, -1]
    assert m.tokenizer.decode([int(jnp.argmax(logits))]) == " Paris"
    text = "Numbers 1234, accents éß, 日本 and\n\n  spaces"
    assert m.tokenizer.decode(m.tokenizer.encode(text)) == text
