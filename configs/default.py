"""A character model of Shakespeare, trained with forward passes only."""

from zo_jax.config import (
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
        model=ModelConfig(num_layers=2, num_heads=2, width=64, context_length=64),
        data=DataConfig(block_size=64),
        zo=ZOConfig(num_queries=16, epsilon=1e-2, perturbation="rademacher"),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=50),
        train=TrainConfig(num_steps=1000, batch_size=16, eval_interval=100),
    )
