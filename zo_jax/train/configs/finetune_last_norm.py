"""A pretrained model learns to tell classes of text apart, with forward passes only: by the scale
of its last norm, which weighs what it knows already. Minutes, and a ledger of 22 KB.

The argument is the model: a Hugging Face folder or a .gguf file. The examples are a file of one's
own; --config.task.name=sst2 and the like are MeZO's tasks, from the Hub.

Command: python main.py --config=finetune_last_norm:MODEL --config.task.path=examples.jsonl
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
        scope="^(norm|ln_f)/",
        model=ModelConfig(path=model),
        task=TaskConfig(
            name="file",
            template="{text} It was",
            labels='{"0": " terrible", "1": " great"}',
            max_tokens=64,
        ),
        zo=ZOConfig(num_queries=8, epsilon=1e-2, parallel_batch_size=8),
        optimizer=OptimizerConfig(
            name="adam", learning_rate=0.2, schedule="cosine", warmup_steps=20
        ),
        # What lies below is evaluated once for all epochs, so a large batch costs nothing much.
        train=TrainConfig(num_steps=340, batch_size=250, eval_interval=113, keep_activations=True),
    )
