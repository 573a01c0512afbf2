"""An instructed model answers sums of small numbers, and learns from the score of its answers
alone: low-rank factors beside its weights, questions and scores of reasoning-gym.

The argument is the model: a Hugging Face folder or a .gguf file. The questions are written by
`python -m zo_jax.train.rewards.chain_sum sums`, which needs `pip install 'zo_jax[rewards]'`.

Command: python main.py --config=reward_chain_sum:MODEL --workdir=runs/reward_chain_sum
Time and reward: docs/rewards.md.
"""

from pathlib import Path

from zo_jax.train.config import (
    Config,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
    ZOConfig,
)

REWARD = Path(__file__).parents[1] / "rewards" / "chain_sum.py"


def get_config(model: str = "") -> Config:
    return Config(
        mode="zo",
        scope="lora",
        model=ModelConfig(path=model),
        lora=LoraConfig(rank=8, alpha=16.0),
        task=TaskConfig(
            name="file",
            path="sums/chain_sum.jsonl",
            # The conversation without the model's system prompt.
            template="<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
            max_tokens=48,
            num_train=1000,
            num_validation=64,
            num_test=200,
        ),
        objective=ObjectiveConfig(
            name="reward", path=f"{REWARD}:score", max_new_tokens=8, shaping="ranks"
        ),
        # Many members of few prompts say more than fewer of many.
        zo=ZOConfig(num_queries=12, epsilon=0.05, perturbation="low_rank"),
        optimizer=OptimizerConfig(name="adam", learning_rate=2e-2),
        train=TrainConfig(num_steps=40, batch_size=4, eval_interval=10),
    )
