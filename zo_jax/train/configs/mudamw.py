"""Zeroth order with MuDaMW: Adam's direction, orthogonalised for matrices.

Command: python main.py --config=mudamw
Time: 45 seconds on 2 CPU cores. Loss: validation from 4.14 to 3.13 nats per character.
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
        model=ModelConfig(num_layers=2, num_heads=2, width=32, context_length=64),
        data=DataConfig(source="shakespeare", tokenizer="char", block_size=64),
        zo=ZOConfig(num_queries=64, epsilon=1e-2, perturbation="rademacher"),
        optimizer=OptimizerConfig(
            name="mudamw", eps=1e-6, learning_rate=3e-2, schedule="cosine", warmup_steps=0
        ),
        train=TrainConfig(num_steps=500, batch_size=4),
    )
