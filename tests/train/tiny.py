"""The smallest experiment that trains, for the tests."""

from zo_jax.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    ZOConfig,
)

TEXT = "".join(f"{i} green bottles hanging on the wall.\n" for i in range(99, 0, -1))


def get_config() -> Config:
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, width=8, context_length=16),
        data=DataConfig(block_size=8),
        zo=ZOConfig(num_queries=3),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(
            num_steps=6,
            batch_size=2,
            log_interval=1,
            eval_interval=3,
            eval_blocks=20,
            checkpoint_interval=2,
            sample_tokens=12,
        ),
    )


def to_backprop(config: Config) -> None:
    """Makes it a run of backprop alone, which has no settings of queries."""
    config.mode, config.zo = "fo", ZOConfig()
