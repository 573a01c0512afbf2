"""What backprop gradients between estimates bring: modes calibrate and instruct beside zeroth order
alone and beside their backprop steps alone.

  python benchmarks/hybrids.py                    the table of docs/modes.md, an hour on a core
  python benchmarks/hybrids.py --intervals=10 --methods=zo,calibrate --seeds=0
  python benchmarks/hybrids.py --fo-batch=64      gradients of 64 blocks, where estimates have 4
  python benchmarks/hybrids.py --cosines          what gradients of few blocks are worth

The character GPT of configs/calibrate.py, Adam with cosine decay. Every method has the same steps,
of which every interval-th has a backprop gradient; "nothing between" has these steps and no others.
Rates of every row are the best of its grid by the mean validation loss of the seeds. Seconds are
those of the steps, without compilation and evaluation.
"""

import argparse
import dataclasses
import itertools
import time
from typing import Any, NamedTuple

import jax
from learning import mean_and_spread
import numpy as np
import optax

from zo_jax.train import experiment, run_state, steps
from zo_jax.train.config import Config, FOConfig, InstructConfig, ZOConfig
from zo_jax.train.data.batches import read_batches
from zo_jax.train.data.corpus import load_corpus
from zo_jax.train.evaluate import choose_blocks, make_evaluate
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import make_model
from zo_jax.train.validation import resolve, validate

HEADER = "| method | interval | rate | of backprop steps | seconds | validation loss | seeds |"
RATES = (3e-3, 1e-2, 3e-2)
RELATIVE_RATES = (0.1, 0.3, 1.0, 3.0)


class Method(NamedTuple):
    """A row of the table.

    Attributes:
      label: what it is.
      mode: of the program.
      relative_rates: of steps of backprop, that are tried; 0 is one optimiser for both.
      rates: learning rates that are tried.
      cosine: of guided directions to the gradient.
      normalize: whether estimates along them are at its scale.
    """

    label: str
    mode: str
    relative_rates: tuple[float, ...] = (0.0,)
    rates: tuple[float, ...] = RATES
    cosine: float = 0.9
    normalize: bool = False


METHODS = {
    "zo": Method("zeroth order alone", "zo"),
    "between": Method("the backprop steps alone, nothing between", "fo", rates=(*RATES, 0.1, 0.3)),
    "calibrate_one": Method("calibrate, one optimiser", "calibrate"),
    "instruct_one": Method("instruct, one optimiser", "instruct"),
    "calibrate": Method("calibrate, moments and rates of their own", "calibrate", RELATIVE_RATES),
    "instruct": Method("instruct, moments and rates of their own", "instruct", RELATIVE_RATES),
    "instruct_near": Method(
        "instruct, guided directions of cosine 0.999", "instruct", RELATIVE_RATES, cosine=0.999
    ),
    "instruct_scale": Method(
        "instruct, cosine 0.999, at the gradient's scale",
        "instruct",
        RELATIVE_RATES,
        cosine=0.999,
        normalize=True,
    ),
}


def make_config(
    method: Method, interval: int, rate: float, relative: float, num_steps: int, fo_batch: int
) -> Config:
    config = experiment.load("calibrate" if method.mode != "instruct" else "instruct")
    config.mode = method.mode
    config.zo.num_queries = 16
    config.optimizer.learning_rate, config.optimizer.min_learning_rate = rate, 0.02 * rate
    config.train.num_steps = num_steps
    config.fo = FOConfig(bp_interval=interval, relative_rate=relative, batch_size=fo_batch)
    if method.mode in ("zo", "fo"):
        config.fo = FOConfig()
    if method.mode == "fo":
        config.train.batch_size = fo_batch or config.train.batch_size
        config.zo, config.train.num_steps = ZOConfig(), num_steps // interval
    config.instruct = InstructConfig()
    if method.mode == "instruct":
        config.instruct = InstructConfig(
            method="gram_schmidt", cosine_target=method.cosine, normalize=method.normalize
        )
    validate(config)
    return config


class Runner:
    """Runs on one corpus and model."""

    def __init__(self):
        config = experiment.load("calibrate")
        self.corpus = load_corpus(config.data)
        self.model = make_model(config.model, self.corpus.tokenizer.vocab_size)
        self.evaluate = make_evaluate(self.model)
        self.held_out = choose_blocks(self.corpus.validation_NT, 256)

    def run(self, config: Config) -> tuple[float, float]:
        """Validation loss and seconds of a run with the configuration's seed."""
        config = resolve(config, len(self.corpus.train_NT))
        take = steps.make_train_step(config, self.model)  # its keys are the seed's

        def run(num_steps: int) -> tuple[float, float]:
            state: Any = run_state.init_state(config, self.model)
            start = time.perf_counter()
            for step in range(num_steps):
                state, *_ = take(state, step, *read_batches(config, self.corpus.train_NT, step))
            jax.block_until_ready(state)
            seconds = time.perf_counter() - start
            return float(self.evaluate(state.params, self.held_out)), seconds

        # Compiles both kinds of steps.
        run(min(config.train.num_steps, max(1, config.fo.bp_interval)))
        return run(config.train.num_steps)


def tell_cosines(runner: Runner, num_steps: int, interval: int = 50) -> None:
    """Along a run of zeroth order, the cosine of the gradient of some blocks to that of 256."""
    config = make_config(METHODS["zo"], interval, 1e-2, 0.0, num_steps, 0)
    config = resolve(config, len(runner.corpus.train_NT))
    loss_fn = lambda params, tokens_BT: next_token_loss(runner.model, params, tokens_BT)
    gradient = jax.jit(jax.grad(loss_fn))
    take = steps.make_train_step(config, runner.model)
    state: Any = run_state.init_state(config, runner.model)
    sizes = (4, 16, 64)
    print(f"| step | {' | '.join(f'{size} blocks' for size in sizes)} |\n|{'---|' * 4}")
    for step in range(num_steps):
        if step % interval == 0:
            chosen = np.random.default_rng([1, step]).permutation(len(runner.corpus.train_NT))
            of = lambda first, end, chosen=chosen, params=state.params: gradient(
                params, runner.corpus.train_NT[chosen[first:end]]
            )
            true = of(-256, None)
            norm = lambda tree: float(optax.global_norm(tree))
            found = [of(0, size) for size in sizes]
            dots = [optax.tree.vdot(one, true) / norm(one) / norm(true) for one in found]
            print(f"| {step} | {' | '.join(f'{float(dot):.2f}' for dot in dots)} |", flush=True)
        state, *_ = take(state, step, *read_batches(config, runner.corpus.train_NT, step))


def tell(
    name: str, interval: int, num_steps: int, fo_batch: int, seeds: list[int], runner: Runner
) -> str:
    method, length = METHODS[name], (num_steps, fo_batch)
    settings = list(itertools.product(method.rates, method.relative_rates))
    tried: dict[tuple[float, float], list[tuple[float, float]]] = {}
    for rate, relative in settings:
        config = make_config(method, interval, rate, relative, *length)
        tried[rate, relative] = [
            runner.run(dataclasses.replace(config, seed=seed)) for seed in seeds
        ]
    mean = lambda setting: np.mean([loss for loss, _ in tried[setting]])
    best = min(settings, key=lambda setting: np.nan_to_num(mean(setting), nan=np.inf))
    found = tried[best]
    losses = [loss for loss, _ in found]
    rate, relative = best
    edge = " (edge)" if rate in (method.rates[0], method.rates[-1]) else ""
    return (
        f"| {method.label} | {interval if method.mode != 'zo' else ''} | {rate:g}{edge} | "
        f"{f'{relative:g} x' if relative else ''} | {np.mean([s for _, s in found]):.1f} | "
        f"{mean_and_spread(losses)} | {len(losses)} |"
    )


def main() -> None:
    split = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", type=split(str), default=list(METHODS))
    parser.add_argument("--intervals", type=split(int), default=[10, 50])
    parser.add_argument("--seeds", type=split(int), default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument(
        "--fo-batch", type=int, default=0, help="blocks of a backprop gradient (0: as an estimate)"
    )
    parser.add_argument("--cosines", action="store_true", help="gradients of few blocks instead")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"--methods must be of {', '.join(METHODS)}; got {', '.join(unknown)}")
    runner = Runner()
    if args.cosines:
        return tell_cosines(runner, args.steps)
    print(f"{HEADER}\n|{'---|' * (HEADER.count('|') - 1)}", flush=True)
    for i, interval in enumerate(args.intervals):
        for name in args.methods:
            if name != "zo" or i == 0:
                print(
                    tell(name, interval, args.steps, args.fo_batch, args.seeds, runner), flush=True
                )


if __name__ == "__main__":
    main()
