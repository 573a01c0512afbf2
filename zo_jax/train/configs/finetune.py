"""A pretrained model learns to tell classes of text apart, with forward passes only: all of its
weights, in the memory of inference.

The argument is the model: a Hugging Face folder or a .gguf file. The examples are a file of one's
own; --config.task.name=sst2 and the like are MeZO's tasks, from the Hub.

Command: python main.py --config=finetune:MODEL --config.task.path=examples.jsonl
Time and accuracy: docs/fine_tuning.md.
"""

from zo_jax.train.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
    ZOConfig,
)


def get_config(model: str = "") -> Config:
    return Config(
        mode="zo",
        model=ModelConfig(path=model),
        task=TaskConfig(
            name="file",
            template="{text} It was",
            labels='{"0": " terrible", "1": " great"}',
            max_tokens=64,
        ),
        zo=ZOConfig(num_queries=1, epsilon=1e-3),
        optimizer=OptimizerConfig(
            name="sgd", learning_rate=6e-5, schedule="cosine", warmup_steps=20
        ),
        train=TrainConfig(num_steps=1000, batch_size=16, eval_interval=250),
    )
