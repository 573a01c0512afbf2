"""The table of docs/learning.md for the GPT of 20 million parameters with GPT-2's vocabulary, every
row for the same seconds of steps.

  python benchmarks/learning_20m.py --tokenizer=FOLDER             all rows, two hours and a half
  python benchmarks/learning_20m.py --tokenizer=FOLDER --methods=feedback,backprop --seconds=60

FOLDER has GPT-2's vocab.json (or encoder.json) and merges.txt (or vocab.bpe); without it they come
from the Hub. The head is the token embedding. Batches are 8 blocks of 64 tokens. Optimiser and
schedule are those of configs/default.py, of zeroth order those of configs/gpt2_20m.py. The rates of
every row are those times the factor of --factors that has the lowest validation loss after a tenth
of the seconds, first seed. Seconds are those of the steps, without compilation and evaluation, and
of all cores together, so that other work beside a run does not shorten it. The rows are printed as
soon as they are known.
"""

import argparse
import time
from typing import Any

import jax
import learning
import numpy as np

from zo_jax.train import experiment, run_state
from zo_jax.train.config import Config, FeedbackConfig
from zo_jax.train.model import SIZES
from zo_jax.train.validation import validate

ZEROTH_ORDER = {
    "zo": "zeroth order on all weights",
    "zo_tokens": "the same, directions of one layer or of tokens as common each",
}
METHODS = (
    "feedback",
    "none",
    "last",
    "random",
    "embedding",
    "block_local",
    "block_local_upper",
    "backprop",
    *ZEROTH_ORDER,
)
EVAL_BLOCKS, TIMED_STEPS, NUM_POINTS = 64, 4, 6
HEADER = "| method | rates x | steps | tokens | core seconds | loss, nats a token | along the run |"


def make_config(method: str, seed: int, factor: float, tokenizer: str, num_steps: int) -> Config:
    config = experiment.load("default")
    config.seed = seed
    small = experiment.load("gpt2_20m")
    config.data = small.data
    config.data.tokenizer_path, config.data.block_size = tokenizer, 64
    for name, value in SIZES["20M"]._asdict().items():
        setattr(config.model, name, value)
    config.model.tied_head, config.model.embedding_std = True, small.model.embedding_std
    if method in ZEROTH_ORDER:
        config.mode, config.feedback = "zo", FeedbackConfig()
        config.zo, config.optimizer = small.zo, small.optimizer
        if method == "zo_tokens":
            config.zo.groups = "tokens"
    else:
        learning.METHODS[method].change(config)
    learning.scale_rates(config, factor)
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, num_steps // 10)
    config.train.num_steps = num_steps
    validate(config)
    return config


def steps_in(seconds: float, *settings) -> int:
    """How many steps that takes, by the time of a few."""
    trainer = learning.Trainer(make_config(*settings, TIMED_STEPS), EVAL_BLOCKS)
    state = run_state.init_state(trainer.config, trainer.model)
    _, spent = trainer.take(state, 0, TIMED_STEPS, time.process_time)
    return max(1, round(seconds * TIMED_STEPS / spent))


def run(
    method: str, seed: int, factor: float, tokenizer: str, num_steps: int
) -> tuple[dict[str, Any], int]:
    """What a run reaches, as `learning.Trainer.run` has it, and the tokens that it reads."""
    trainer = learning.Trainer(make_config(method, seed, factor, tokenizer, num_steps), EVAL_BLOCKS)
    config = trainer.config
    tokens = num_steps * config.train.batch_size * config.data.block_size
    return trainer.run(NUM_POINTS, time.process_time), tokens


def tell(method: str, options: argparse.Namespace) -> str:
    first = options.seeds[0]
    num_steps = steps_in(options.seconds, method, first, 1.0, options.tokenizer)
    tried = {}
    for factor in options.factors if len(options.factors) > 1 else ():
        row, _ = run(method, first, factor, options.tokenizer, max(1, num_steps // 10))
        tried[factor] = row["loss"][-1]
    factor = min(options.factors, key=lambda f: np.nan_to_num(tried.get(f, 0.0), nan=np.inf))
    found = [run(method, seed, factor, options.tokenizer, num_steps) for seed in options.seeds]
    column = lambda name: [row[name][-1] for row, _ in found]
    label = ZEROTH_ORDER.get(method) or learning.METHODS[method].label
    is_edge = len(tried) > 1 and factor in (min(options.factors), max(options.factors))
    along = " ".join(f"{loss:.2f}" for loss in found[0][0]["loss"])
    return (
        f"| {label} | {factor:g}{' (edge)' if is_edge else ''} | {num_steps:,} | "
        f"{found[0][1]:,} | {np.mean(column('seconds')):.0f} | "
        f"{learning.mean_and_spread(column('loss'))} | {along} |"
    )


def main() -> None:
    split = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", type=split(str), default=list(METHODS))
    parser.add_argument("--seeds", type=split(int), default=[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--factors", type=split(float), default=[0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--tokenizer", default="", help="folder with GPT-2's; none: from the Hub")
    options = parser.parse_args()
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"--methods must be of {', '.join(METHODS)}; got {', '.join(unknown)}")
    print(f"{jax.devices()[0].device_kind}\n\n{HEADER}\n|{'---|' * 7}", flush=True)
    for method in options.methods:
        print(tell(method, options), flush=True)


if __name__ == "__main__":
    main()
