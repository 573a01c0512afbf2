"""The reference script's own settings, for a machine with a GPU and the Hugging Face Hub.

Command: python main.py --config=icpram2025:20M
Sizes, after the colon: 20M, 200M, 500M, 1B. For the script's other modes add --config.mode=fo, or
--config.mode=calibrate or instruct with --config.fo.bp_interval=10.
Time and loss: not measured, for want of a GPU.
Source: "Zeroth Order Optimization for Pretraining Language Models", ICPRAM 2025.
"""

from zo_jax.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    ZOConfig,
)


def get_config(size: str = "20M") -> Config:
    return Config(
        mode="zo",
        scope="reduced",
        model=ModelConfig(size=size),
        data=DataConfig(source="cosmopedia-100k", tokenizer="gpt2", block_size=128),
        zo=ZOConfig(
            num_queries=1,
            epsilon=1e-4,
            perturbation="gaussian",
            parallel_batch_size=1,
            batch_per_query=True,
        ),
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-5),
        train=TrainConfig(num_epochs=1, batch_size=8, log_interval=10, snapshot_delta=0.5),
    )
