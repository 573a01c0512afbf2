"""All modes and optimisers on the embedded corpus, at equal forward passes and at equal wall time.

  python benchmarks/modes.py    writes the table of docs/modes.md and docs/modes.png, some twenty
                                minutes on 2 CPU cores

Every pair of a mode and an optimiser is run with each learning rate of its grid; the best by the
loss at equal passes is run with two more seeds. A forward pass is one evaluation of the loss on a
batch; a backprop gradient counts as three. The time is that of the steps, without compilation and
evaluation.
"""

import dataclasses
import functools
from pathlib import Path
import time

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from zo_jax import trees
from zo_jax.guided import guided
from zo_jax.train import choices, run_state, steps
from zo_jax.train.config import (
    Config,
    DataConfig,
    FOConfig,
    InstructConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    ZOConfig,
)
from zo_jax.train.data.batches import read_batches
from zo_jax.train.data.corpus import load_corpus
from zo_jax.train.evaluate import choose_blocks, make_evaluate
from zo_jax.train.losses import next_token_loss
from zo_jax.train.model import make_model
from zo_jax.train.validation import validate

PASSES, SECONDS, NUM_EVALUATIONS = 6400, 2.0, 10
SEEDS = (0, 1, 2)
BACKPROP_PASSES = 3
MODES = ("zo", "calibrate", "instruct hybrid", "instruct gram_schmidt", "fo")
# Learning rates. Plain SGD takes the estimate's norm, √(d / q) times the gradient's, into its step.
ADAPTIVE = (3e-3, 1e-2, 3e-2)
GRID = {
    "sgd": (1e-4, 1e-3, 1e-2),
    "adam": ADAPTIVE,
    "adamw": ADAPTIVE,
    "muon": ADAPTIVE,
    "mudamw": ADAPTIVE,
}
SGD_BACKPROP = (0.1, 0.3, 1.0)


def make_config(mode: str, optimizer: str, seed: int) -> Config:
    mode, _, method = mode.partition(" ")
    hybrid = mode in ("calibrate", "instruct")
    config = Config(
        mode=mode,
        seed=seed,
        model=ModelConfig(num_layers=2, num_heads=2, width=32, context_length=64),
        data=DataConfig(block_size=64),
        zo=ZOConfig() if mode == "fo" else ZOConfig(num_queries=16, epsilon=1e-2),
        fo=FOConfig(bp_interval=10 if hybrid else 0),
        instruct=InstructConfig(method=method) if method else InstructConfig(),
        optimizer=OptimizerConfig(
            name=optimizer, weight_decay=0.01 if optimizer == "adamw" else 0.0
        ),
        train=TrainConfig(num_steps=10_000, batch_size=4),
    )
    validate(config)
    return config


class Trainer:
    """The programs of one mode and optimiser, compiled once for all learning rates and seeds."""

    def __init__(self, mode, optimizer, corpus, model, evaluate, held_out):
        self.mode, self.optimizer = mode, optimizer
        self.corpus, self.model, self.evaluate, self.held_out = corpus, model, evaluate, held_out
        config = make_config(mode, optimizer, 0)
        with_rate = lambda rate: dataclasses.replace(
            config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate)
        )

        def zo_step(state, rate, key, tokens):
            c = with_rate(rate)
            loss, projections = steps.make_project(c, model)(state.params, key, tokens)
            return steps.make_update(c, model)(state, key, loss, projections)

        step = functools.partial(jax.jit, donate_argnums=0)
        self.zo_step = step(zo_step)
        self.fo_step = step(lambda s, rate, t: steps.make_fo_step(with_rate(rate), model)(s, t))
        self.guided_step = step(
            lambda s, rate, key, t, f: steps.make_guided_step(with_rate(rate), model)(s, key, t, f)
        )
        self.cosine = jax.jit(functools.partial(_cosine, config, model))
        self.fold_in = jax.jit(jax.random.fold_in)

    def run(self, rate: float, seed: int) -> dict[str, np.ndarray]:
        """Evaluations along a run: passes, seconds, losses and cosines of the estimate to the
        gradient.
        """
        config = make_config(self.mode, self.optimizer, seed)
        state, key = run_state.init_state(config, self.model), choices.base_key(config)
        rate = jnp.float32(rate)
        self._step(config, jax.tree.map(jnp.copy, state), rate, key, 0)  # compiles
        for step in range(10 if config.fo.bp_interval else 0):
            self._step(config, jax.tree.map(jnp.copy, state), rate, key, step)
        passes = step = 0
        seconds, points = 0.0, []
        while True:
            points.append((passes, seconds, *self._look(config, state, key, step)))
            if passes >= PASSES and seconds >= SECONDS:
                return dict(
                    zip(("passes", "seconds", "loss", "cosine"), np.array(points).T, strict=True)
                )
            start, until = time.perf_counter(), passes + PASSES / NUM_EVALUATIONS
            while passes < until:
                state, count = self._step(config, state, rate, key, step)
                passes, step = passes + count, step + 1
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start

    def _step(self, config, state, rate, key, step):
        tokens, fo_tokens = read_batches(config, self.corpus.train_NT, step)
        count = 2 * config.zo.num_queries * (tokens is not None)
        count += BACKPROP_PASSES * (fo_tokens is not None)
        if fo_tokens is None:
            return self.zo_step(state, rate, self.fold_in(key, step), tokens)[0], count
        if tokens is None:
            return self.fo_step(state, rate, fo_tokens)[0], count
        return self.guided_step(state, rate, self.fold_in(key, step), tokens, fo_tokens)[0], count

    def _look(self, config, state, key, step):
        tokens, fo_tokens = read_batches(config, self.corpus.train_NT, step)
        batch = fo_tokens if tokens is None else tokens
        loss = float(self.evaluate(state.params, self.held_out))
        return loss, float(self.cosine(state.params, self.fold_in(key, 10**6 + step), batch))


def _cosine(config, model, params, key, tokens):
    """Of the mode's estimate (of instruct: that of a guided step) to the gradient of the same
    batch.
    """
    loss = lambda params, tokens: next_token_loss(model, params, tokens)
    true = jax.grad(loss)(params, tokens)
    if config.mode == "fo":
        return jnp.float32(1)
    estimator, settings = choices.make_estimator(config), config.instruct
    if config.mode == "instruct":
        family = guided(true, settings.cosine_target, settings.noise_scale, settings.method)
        estimator = dataclasses.replace(estimator, perturbation=family)
    estimate = estimator.estimate(loss, params, jax.random.fold_in(key, 0), tokens).gradient
    dot = trees.tree_dot
    return dot(estimate, true) / jnp.sqrt(dot(estimate, estimate) * dot(true, true))


def at(run: dict[str, np.ndarray], column: str, limit: float) -> float:
    """The loss of the last evaluation within a budget."""
    return float(run["loss"][run[column] <= limit * 1.001][-1])


def main() -> None:
    corpus = load_corpus(DataConfig(block_size=64))
    model = make_model(make_config("zo", "adam", 0).model, corpus.tokenizer.vocab_size)
    evaluate, held_out = make_evaluate(model), choose_blocks(corpus.validation_NT, 64)
    lines, curves, rows = [], {}, []
    for mode in MODES:
        for optimizer, grid in GRID.items():
            grid = SGD_BACKPROP if (mode, optimizer) == ("fo", "sgd") else grid
            trainer = Trainer(mode, optimizer, corpus, model, evaluate, held_out)
            first = {rate: trainer.run(rate, SEEDS[0]) for rate in grid}
            score = lambda rate, first=first: np.nan_to_num(
                at(first[rate], "passes", PASSES), nan=np.inf
            )
            best = min(grid, key=score)
            runs = [first[best], *(trainer.run(best, seed) for seed in SEEDS[1:])]
            by_passes = np.array([at(run, "passes", PASSES) for run in runs])
            by_time = np.array([at(run, "seconds", SECONDS) for run in runs])
            cosine = np.mean([run["cosine"].mean() for run in runs])
            rows.append((mode, optimizer, best, by_passes, by_time, cosine))
            curves[mode, optimizer] = runs[0]
            edge = " (edge)" if best in (grid[0], grid[-1]) else ""
            lines.append(
                f"| {mode} | {optimizer} | {best:g}{edge} | {by_passes.mean():.3f} ± "
                f"{by_passes.std(ddof=1):.3f} "
                f"| {by_time.mean():.3f} ± {by_time.std(ddof=1):.3f} | {cosine:.3f} |"
            )
            print(lines[-1], flush=True)
    write(lines, curves, model.num_params)


def write(lines, curves, num_params: int) -> None:
    docs = Path(__file__).parent.parent / "docs"
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for (mode, optimizer), run in curves.items():
        if optimizer == "adam":
            axes[0].plot(run["passes"], run["loss"], marker=".", label=mode)
            axes[1].plot(run["seconds"], run["loss"], marker=".", label=mode)
    axes[0].set(xlabel="forward passes", ylabel="validation loss (nats)", title="adam, seed 0")
    axes[1].set(xlabel="seconds")
    axes[0].legend()
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(docs / "modes.png", dpi=120)
    table = "\n".join(
        (
            f"Validation loss of a GPT of {num_params:,} parameters after {PASSES:,} forward "
            f"passes, and after {SECONDS:g} seconds "
            "of steps; mean and standard deviation of three seeds; mean cosine of the estimate to "
            "the gradient along the run "
            "(instruct: of its guided steps). 'edge': the best rate is the grid's first or last.",
            "",
            "| mode | optimiser | learning rate | at equal passes | at equal time | cosine |",
            "|---|---|---|---|---|---|",
            *lines,
        )
    )
    page = docs / "modes.md"
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- end of table -->")[2]
    page.write_text(f"{before}<!-- table -->\n{table}\n<!-- end of table -->{after}")
    print(f"wrote the table of {page} and {docs / 'modes.png'}")


if __name__ == "__main__":
    main()
