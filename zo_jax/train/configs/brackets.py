"""A character GPT of 26 thousand parameters reads rows of nested brackets: the start of
configs/reward_brackets.py.

The text is written by `python -m zo_jax.train.rewards.brackets brackets`.

Command: python main.py --config=brackets --workdir=runs/brackets
Time and loss: docs/rewards.md.
"""

from zo_jax.train.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        mode="fo",
        model=ModelConfig(num_layers=2, num_heads=4, width=32, context_length=32),
        data=DataConfig(source="text", path="brackets/brackets.txt", block_size=32),
        optimizer=OptimizerConfig(name="adam", learning_rate=2e-3),
        train=TrainConfig(num_steps=400, batch_size=16, eval_interval=100),
    )
