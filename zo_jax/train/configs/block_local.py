"""default.py with backprop inside every block, and none between them: each takes the output error
for its own.

Command: python main.py --config=block_local
Time and loss: docs/learning.md.
"""

from zo_jax.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        mode="block_local",
        model=ModelConfig(
            num_layers=2,
            num_heads=4,
            width=64,
            context_length=64,
            tied_head=False,
            embedding_std=0.5,
        ),
        data=DataConfig(source="shakespeare", tokenizer="char", block_size=64),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=2e-2,
            adam_learning_rate=1e-2,
            b2=0.99,
            schedule="cosine",
            warmup_steps=0,
            min_learning_rate=4e-4,
            orthogonalize_embedding=False,
        ),
        train=TrainConfig(num_steps=3600, batch_size=8, eval_interval=300),
    )
