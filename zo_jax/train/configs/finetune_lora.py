"""A pretrained model learns to tell classes of text apart, with forward passes only: low-rank
factors beside its weights, which stay as they are.

The argument is the model: a Hugging Face folder or a .gguf file. The examples are a file of one's
own; --config.task.name=sst2 and the like are MeZO's tasks, from the Hub.

Command: python main.py --config=finetune_lora:MODEL --config.task.path=examples.jsonl
Time and accuracy: docs/fine_tuning.md.
"""

from zo_jax.train.config import (
    Config,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
    ZOConfig,
)


def get_config(model: str = "") -> Config:
    return Config(
        mode="zo",
        scope="lora",
        model=ModelConfig(path=model),
        # Of the last block's MLP alone: all that lies below, and its products with the weights as
        # they are, is evaluated once for all epochs (train.keep_activations), and a query costs
        # next to nothing.
        lora=LoraConfig(rank=1, alpha=16.0, targets="mlp/", num_layers=1),
        task=TaskConfig(
            name="file",
            template="{text} It was",
            labels='{"0": " terrible", "1": " great"}',
            max_tokens=64,
        ),
        zo=ZOConfig(num_queries=128, epsilon=1e-2, parallel_batch_size=16),
        optimizer=OptimizerConfig(
            name="adam", learning_rate=2e-3, schedule="cosine", warmup_steps=20
        ),
        train=TrainConfig(num_steps=6000, batch_size=16, eval_interval=2000, keep_activations=True),
    )
