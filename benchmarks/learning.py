"""Learning past what pairs of characters tell, with forward passes only, and what each part of it
gives: the table of docs/learning.md.

  python benchmarks/learning.py                  all rows, three seeds, steps of configs/default.py
  python benchmarks/learning.py --methods=feedback,backprop --seeds=0 --steps=400
  python benchmarks/learning.py --depths=2,4,8 --methods=feedback,block_local,backprop
  python benchmarks/learning.py --factors=0.5,1,2

The model, data, batches and optimiser of every row are those of configs/default.py, but for what
its name says; the rows of configs/zo.py have its own. The rates of a row are those times the one of
--factors with the lowest loss in the end, first seed. A row is printed as soon as it is known, and
its runs are kept in the file --out, where a later call finds them; another configuration wants
another file. A forward pass is one of the network; a backprop gradient counts as three, and a step
of the feedback modes as four: they evaluate every block once more by itself. Seconds are those of
the steps, without compilation and evaluation.
"""

import argparse
from collections.abc import Callable
import dataclasses
import itertools
import json
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from zo_jax.train import experiment, run_state, steps
from zo_jax.train.config import Config, FeedbackConfig, ZOConfig
from zo_jax.train.data.batches import read_batches
from zo_jax.train.data.corpus import load_corpus
from zo_jax.train.evaluate import choose_blocks, make_evaluate
from zo_jax.train.model import make_model
from zo_jax.train.validation import resolve, validate

# A pass up the network and products as costly as two more; where every block is looked at by itself
# it is evaluated there again.
PASSES_OF_A_STEP = {"fo": 3, "feedback": 4, "block_local": 4}
NUM_POINTS, EVAL_BLOCKS = 12, 256
HEADER = (
    "| method | layers | rates x | seeds | steps | forward passes | seconds | validation loss |"
)


class Method(NamedTuple):
    """A row of the table.

    Attributes:
      label: what it is, in the table.
      change: makes the configuration of configs/default.py that of the row.
    """

    label: str
    change: Callable[[Config], None]


def _feedback(**fields: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for name, value in fields.items():
            setattr(config.feedback, name, value)
        if config.feedback.attention in ("none", "closed_form"):
            config.feedback.num_draws = FeedbackConfig().num_draws  # there are none

    return change


def _feedback_upper(config: Config) -> None:
    feedback = config.feedback
    _mode("feedback", upper_half=True)(config)
    config.feedback = feedback


def _scope(pattern: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config.scope = pattern
        _mode("fo")(config)

    return change


def _mode(mode: str, upper_half: bool = False) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config.mode, config.feedback = mode, FeedbackConfig()
        if upper_half:
            layers = range(config.model.num_layers // 2, config.model.num_layers)
            head = "wte" if config.model.tied_head else "head"
            config.scope = rf"^blocks/({'|'.join(map(str, layers))})/|^ln_f/|^{head}/"

    return change


def _zeroth_order(config: Config) -> None:
    """The directions and the optimiser of configs/zo.py, whose rates were chosen for it."""
    own = experiment.load("zo")
    config.mode, config.feedback = "zo", FeedbackConfig()
    config.zo, config.optimizer = own.zo, own.optimizer
    passes = config.train.num_steps * PASSES_OF_A_STEP["feedback"]
    config.train.num_steps = max(1, passes // passes_of_a_step(config))


def _config_zo(change: Callable[[Config], None] = lambda config: None) -> Callable[[Config], None]:
    """configs/zo.py itself, its own model, batches and steps."""

    def become(config: Config) -> None:
        own, seed = experiment.load("zo"), config.seed
        own.model.num_layers = config.model.num_layers
        change(own)
        for field in dataclasses.fields(Config):
            setattr(config, field.name, getattr(own, field.name))
        config.seed = seed

    return become


def _plainly(config: Config) -> None:
    config.zo.exact = config.zo.groups = "none"
    config.zo.relative_rate = 1.0


def _same_rate(config: Config) -> None:
    config.zo.relative_rate = 1.0


def _head_alone(config: Config) -> None:
    config.mode, config.zo, config.scope = "fo", ZOConfig(), "^(ln_f|head)/"


def _head_alone_as_long(config: Config) -> None:
    passes = config.train.num_steps * passes_of_a_step(config)
    _head_alone(config)
    config.train.num_steps = passes // passes_of_a_step(config)


METHODS = {
    "feedback": Method(
        "feedback, draws on the weights of attention (the default run)", _feedback()
    ),
    "closed_form": Method("the same, softmax in closed form", _feedback(attention="closed_form")),
    "draws_16": Method("the same, 16 draws", _feedback(num_draws=16)),
    "sublayers": Method(
        "feedback, the output error for every sublayer", _feedback(handed_to="sublayers")
    ),
    "feedback_upper": Method("control: lower half frozen", _feedback_upper),
    "qkv": Method("the same, draws on queries, keys and values", _feedback(attention="qkv")),
    "none": Method("control: nothing through attention", _feedback(attention="none")),
    "last": Method(
        "control: errors of all but the last MLP and head at zero", _feedback(errors="last")
    ),
    "random": Method("control: random feedback", _feedback(matrix="random")),
    "head": Method("head alone, exact", _scope("^(ln_f|head)/")),
    "embedding": Method("embeddings and head alone, exact", _scope("^(ln_f|head|wte|wpe)/")),
    "block_local": Method("block_local: backprop inside every block", _mode("block_local")),
    "block_local_upper": Method("its control: lower half frozen", _mode("block_local", True)),
    "backprop": Method("backprop", _mode("fo")),
    "config_zo": Method("configs/zo.py: directions, and the head in closed form", _config_zo()),
    "config_zo_head": Method(
        "its control: the head alone, the rest frozen", _config_zo(_head_alone)
    ),
    "config_zo_head_passes": Method(
        "its control: the head alone for as many passes", _config_zo(_head_alone_as_long)
    ),
    "config_zo_plain": Method(
        "its control: directions of all parameters for all of it", _config_zo(_plainly)
    ),
    "config_zo_same_rate": Method(
        "its control: one rate for directions and head", _config_zo(_same_rate)
    ),
    "zo": Method("zeroth order as in configs/zo.py, equal passes", _zeroth_order),
}
# Rows with a model, batches, steps and rates of their own.
OWN_RATES = [method for method in METHODS if method.startswith("config_zo")]


def passes_of_a_step(config: Config) -> int:
    zo = config.zo
    if config.mode != "zo":
        return PASSES_OF_A_STEP[config.mode]
    return 2 * zo.num_queries + (PASSES_OF_A_STEP["fo"] if zo.exact != "none" else 0)


def make_config(method: str, depth: int, seed: int, num_steps: int, factor: float = 1.0) -> Config:
    config = experiment.load("default")
    config.seed, config.model.num_layers = seed, depth
    config.train.num_steps = num_steps or config.train.num_steps
    METHODS[method].change(config)
    scale_rates(config, factor)
    validate(config)
    return config


def scale_rates(config: Config, factor: float) -> None:
    for name in ("learning_rate", "adam_learning_rate", "min_learning_rate"):
        setattr(config.optimizer, name, factor * getattr(config.optimizer, name))


class Trainer:
    """A configuration with its compiled step."""

    def __init__(self, config: Config, eval_blocks: int = EVAL_BLOCKS):
        corpus = load_corpus(config.data)
        self.config = resolve(config, len(corpus.train_NT), corpus.count_tokens)
        self.model = make_model(config.model, corpus.tokenizer.vocab_size)
        self.evaluate, self.train_NT = make_evaluate(self.model), corpus.train_NT
        self.held_out = choose_blocks(corpus.validation_NT, eval_blocks)
        self.train_step = steps.make_train_step(self.config, self.model)
        self.take(run_state.init_state(self.config, self.model), 0, 1)  # compiles

    def take(
        self, state: Any, first: int, end: int, clock: Callable[[], float] = time.perf_counter
    ) -> tuple[Any, float]:
        """The state after the steps from `first` to before `end`, and their seconds."""
        start = clock()
        for step in range(first, end):
            batches = read_batches(self.config, self.train_NT, step)
            state, _, _ = self.train_step(state, step, *batches)
        jax.block_until_ready(state)
        return state, clock() - start

    def run(
        self, num_points: int = NUM_POINTS, clock: Callable[[], float] = time.perf_counter
    ) -> dict[str, Any]:
        """Steps, forward passes, seconds and validation losses along a run."""
        state = run_state.init_state(self.config, self.model)
        ends = np.linspace(0, self.config.train.num_steps, num_points + 1).astype(int)
        seconds, losses = [0.0], [float(self.evaluate(state.params, self.held_out))]
        for first, end in itertools.pairwise(ends.tolist()):
            state, spent = self.take(state, first, end, clock)
            seconds.append(seconds[-1] + spent)
            losses.append(float(self.evaluate(state.params, self.held_out)))
        passes = ends * passes_of_a_step(self.config)
        return dict(steps=ends.tolist(), passes=passes.tolist(), seconds=seconds, loss=losses)


def run(method: str, depth: int, seed: int, num_steps: int, factor: float) -> dict[str, Any]:
    config = make_config(method, depth, seed, num_steps, factor)
    return dict(key=[method, depth, seed, num_steps, factor]) | Trainer(config).run()


def tell(label: str, depth: int, factor: str, found: list[dict]) -> str:
    """A row of the table, of the runs of all seeds."""
    losses, seconds = ([row[name][-1] for row in found] for name in ("loss", "seconds"))
    last = found[-1]
    return (
        f"| {label} | {depth} | {factor} | {len(found)} | {last['steps'][-1]:,} | "
        f"{last['passes'][-1]:,} | {np.mean(seconds):.0f} | {mean_and_spread(losses)} |"
    )


def mean_and_spread(values: list[float]) -> str:
    """Of a column of the table: the mean, and the standard deviation if there are several."""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def draw(runs: dict[str, dict], path: Path) -> None:
    """Curves by passes and by seconds, by their labels."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 6), sharey=True)
    colors = plt.get_cmap("tab20").colors  # pyright: ignore
    for (label, row), color in zip(runs.items(), itertools.cycle(colors), strict=False):
        for ax, name in zip(axes, ("passes", "seconds"), strict=True):
            ax.plot(row[name][1:], row["loss"][1:], marker=".", label=label, color=color)
    axes[0].set(
        xlabel="forward passes", ylabel="validation loss, nats a character", ylim=(1.7, 3.0)
    )
    axes[1].set(xlabel="seconds of steps")
    for ax in axes:
        ax.set_xscale("log")
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="lower center")
    figure.tight_layout(rect=(0, 0.18, 1, 1))
    figure.savefig(path, dpi=120)


def main() -> None:
    split = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", type=split(str), default=list(METHODS))
    parser.add_argument("--depths", type=split(int), default=[2])
    parser.add_argument("--seeds", type=split(int), default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="of the default run and of backprop")
    parser.add_argument("--factors", type=split(float), default=[1.0], help="of the rates")
    parser.add_argument("--out", type=Path, default=Path("runs/learning.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("runs/learning.png"))
    args = parser.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"--methods must be of {', '.join(METHODS)}; got {', '.join(unknown)}")
    for path in (args.out, args.figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.out.open()] if args.out.exists() else []
    known = {tuple(row["key"]): row for row in rows}

    def found(*key: Any) -> dict[str, Any]:
        if key not in known:
            known[key] = run(*key)
            with args.out.open("a") as file:
                file.write(json.dumps(known[key]) + "\n")
        return known[key]

    print(f"{HEADER}\n|{'---|' * HEADER.count(' | ')}---|", flush=True)
    drawn = {}
    for depth in args.depths:
        for method in args.methods:
            factors = [1.0] if method in OWN_RATES else args.factors
            of = lambda factor, seed, method=method, depth=depth: found(
                method, depth, seed, args.steps, factor
            )
            first = {factor: of(factor, args.seeds[0]) for factor in factors}
            factor = min(factors, key=lambda f: np.nan_to_num(first[f]["loss"][-1], nan=np.inf))
            label = METHODS[method].label
            runs = [of(factor, seed) for seed in args.seeds]
            is_edge = len(factors) > 1 and factor in (min(factors), max(factors))
            rates = f"{factor:g}{' (edge)' if is_edge else ''}"
            print(tell(label, depth, rates, runs), flush=True)
            if depth == args.depths[0]:
                drawn[label] = runs[0]
    draw(drawn, args.figure)


if __name__ == "__main__":
    main()
