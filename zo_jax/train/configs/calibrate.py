"""Zeroth order; every tenth step the backprop gradient of a larger batch, with moments and a rate
of its own.

Command: python main.py --config=calibrate
Time: 53 seconds on a CPU core. Loss: validation from 4.14 to 2.81 nats per character.
"""

from zo_jax.train.config import (
    Config,
    DataConfig,
    FOConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    ZOConfig,
)


def get_config() -> Config:
    return Config(
        mode="calibrate",
        model=ModelConfig(num_layers=2, num_heads=2, width=32, context_length=64),
        data=DataConfig(source="shakespeare", tokenizer="char", block_size=64),
        zo=ZOConfig(num_queries=64, epsilon=1e-2, perturbation="rademacher"),
        fo=FOConfig(bp_interval=10, batch_size=64, relative_rate=0.2),
        optimizer=OptimizerConfig(
            name="adam", learning_rate=1e-2, schedule="cosine", warmup_steps=0
        ),
        train=TrainConfig(num_steps=500, batch_size=4),
    )
