"""A small model that has read nested brackets learns to close what a prompt leaves open, from a
reward alone: 1 for each completion that is right, 0 for one that is not.

The argument is the model, as `zo-jax export` writes it of a run of configs/brackets.py; the prompts
are written by `python -m zo_jax.train.rewards.brackets brackets`.

Command: python main.py --config=reward_brackets:MODEL --workdir=runs/reward_brackets
Time and reward: docs/rewards.md.
"""

from pathlib import Path

from zo_jax.train.config import (
    Config,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
    ZOConfig,
)

REWARD = Path(__file__).parents[1] / "rewards" / "brackets.py"


def get_config(model: str = "") -> Config:
    return Config(
        mode="zo",
        model=ModelConfig(path=model),
        task=TaskConfig(
            name="file",
            path="brackets/prompts.jsonl",
            template="{prompt}",
            num_train=1000,
            num_validation=500,
            num_test=500,
        ),
        objective=ObjectiveConfig(
            name="reward", path=f"{REWARD}:valid", max_new_tokens=10, stop="\n"
        ),
        zo=ZOConfig(num_queries=16, epsilon=0.012, perturbation="low_rank"),
        optimizer=OptimizerConfig(
            name="adam",
            learning_rate=3e-3,
            schedule="cosine",
            warmup_steps=0,
            min_learning_rate=1e-5,
        ),
        train=TrainConfig(num_steps=400, batch_size=32, eval_interval=50),
    )
