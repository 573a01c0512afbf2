"""Zeroth order on the weights of a character GPT of 0.11 million parameters, with the gradient of
the output head in closed form.

Directions of one layer, or of one embedding, each; the queries are shared out by what the
projections tell. A run without a ledger: it goes on from checkpoints. Loss values alone:
configs/zo_plain.py.

Command: python main.py --config=zo
Time and loss: docs/learning.md.
"""

from zo_jax.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    ZOConfig,
)


def get_config() -> Config:
    return Config(
        mode="zo",
        model=ModelConfig(
            num_layers=2,
            num_heads=4,
            width=64,
            context_length=64,
            tied_head=False,
            embedding_std=0.5,
        ),
        data=DataConfig(source="shakespeare", tokenizer="char", block_size=64),
        zo=ZOConfig(num_queries=16, epsilon=1e-2, groups="layers", exact="head", relative_rate=0.1),
        optimizer=OptimizerConfig(
            name="adam",
            learning_rate=1e-2,
            b2=0.99,
            schedule="cosine",
            warmup_steps=0,
            min_learning_rate=2e-4,
        ),
        train=TrainConfig(num_steps=3000, batch_size=8, eval_interval=300),
    )
