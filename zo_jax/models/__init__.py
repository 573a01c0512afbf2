"""Pretrained language models as pure functions of pytrees: GPT-2, Llama, SmolLM2, Mistral, Qwen 2
and 3.
"""

from zo_jax.models import lora
from zo_jax.models.config import Config
from zo_jax.models.generate import Generated, generate
from zo_jax.models.model import Model, create, load, quantize, save
from zo_jax.models.quantized import Quantized

__all__ = [
    "Config",
    "Generated",
    "Model",
    "Quantized",
    "create",
    "generate",
    "load",
    "lora",
    "quantize",
    "save",
]
