"""A character GPT of 0.11 million parameters learns Shakespeare with forward passes only, past what
pairs of characters tell.

The error of the output, known in closed form, is handed to every block as its own (residual
feedback); inside a block the credit comes from evaluating its parts alone. A biased direction, no
zeroth-order estimate of the gradient: that is configs/zo.py.

Command: python main.py
Time and loss: docs/learning.md.
"""

from zo_jax.train.config import (
    Config,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        mode="feedback",
        model=ModelConfig(
            num_layers=2,
            num_heads=4,
            width=64,
            context_length=64,
            tied_head=False,
            embedding_std=0.5,
        ),
        data=DataConfig(source="shakespeare", tokenizer="char", block_size=64),
        feedback=FeedbackConfig(attention="weights", num_draws=8, sigma=0.05),
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
