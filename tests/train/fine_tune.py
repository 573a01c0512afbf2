"""A pretrained model of a few thousand parameters, examples for it, and an experiment that trains
in seconds.
"""

import dataclasses
import json
import string

import jax
import numpy as np

from zo_jax import models
from zo_jax.train.config import (
    Config,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
    ZOConfig,
)
from zo_jax.train.data.tokenization import CharTokenizer
from zo_jax.train.export import as_tokenizer

FIELDS = dict(
    model_type="llama",
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    max_position_embeddings=80,
    tie_word_embeddings=True,
    eos_token_id=0,
)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LABELS = json.dumps({"0": "-", "1": "+"})


def tokenizer():
    characters = "\n" + "".join(sorted(set(string.printable[:95])))
    return dataclasses.replace(as_tokenizer(CharTokenizer(characters)), chat_template=TEMPLATE)


def write_base(folder, seed=0, **fields):
    """A Hugging Face folder; its weights are large enough for a model that tells prompts apart."""
    m = models.create(FIELDS | fields, jax.random.key(seed))
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, m.params)
    models.save(folder, dataclasses.replace(m, tokenizer=tokenizer()), params)
    return folder


def write_examples(path, count=40, seed=0):
    """Words, and whether there is an a among them."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        text = "".join(rng.choice(list("bcd"), rng.integers(2, 12)))
        if i % 2:
            text = text[:1] + "a" + text[1:]
        rows.append({"text": text, "label": i % 2, "answer": text[::-1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def get_config(folder, **task):
    """Mode zo with low-rank factors; the folder has a base and examples."""
    fields = dict(name="file", template="{text}:", max_tokens=24)
    sizes = dict(num_train=20, num_validation=8, num_test=6)
    labels = {} if "target" in task else dict(labels=LABELS)
    return Config(
        scope="lora",
        model=ModelConfig(path=str(folder / "base")),
        lora=LoraConfig(rank=2),
        task=TaskConfig(path=str(folder / "examples.jsonl"), **fields | sizes | labels | task),
        zo=ZOConfig(num_queries=2, epsilon=1e-2),
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-2),
        train=TrainConfig(num_steps=4, batch_size=4, log_interval=1, eval_interval=2),
    )
